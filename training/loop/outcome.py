"""How a run ended, for whoever started it: RUN/stopped.json, with the reason and whether trying again can help.

A launcher's exit code is 1 whatever happened to its processes; this file is what a supervisor reads, as
`training/configs/accelerate/slurm.sh` does. It is absent while the run goes on and after a death that nobody could
write down.

    reason       a key of REASONS
    message      the sentence that the process said
    exit_code    of the process
    try_again    whether the same command may go further
    step, time   optimizer steps done, seconds since 1970
"""

import contextlib
import errno
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyramidclip_command import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_UNPUBLISHED,
    EXIT_WRONG_USAGE,
    Failure,
)
from pyramidclip_hf.files import fsync, json_text
from training.data.batches import DataError, StoreError
from training.data.loader import WorkerDied
from training.loop.record import CheckpointError
from training.loop.signals import deaths_unheard
from training.loop.tracking import NonFiniteLoss

NAME = "stopped.json"

# Reason -> (the process's exit code, whether the same command may go further).
REASONS = {
    "finished": (0, False),
    "finished, not published": (EXIT_UNPUBLISHED, False),
    "asked to stop": (EXIT_STOPPED, True),
    "interrupted": (EXIT_INTERRUPTED, False),
    "setting or data": (EXIT_WRONG_USAGE, False),
    "not finite": (EXIT_FAILED, False),
    "bad data": (EXIT_FAILED, False),
    "disk full": (EXIT_FAILED, False),
    "memory": (EXIT_FAILED, False),
    "checkpoint": (EXIT_FAILED, False),
    "loader worker died": (EXIT_FAILED, True),
    "store away": (EXIT_FAILED, True),
    "input or output": (EXIT_FAILED, True),
    "another process": (EXIT_FAILED, True),
    "fault": (EXIT_FAILED, True),
}


class RunFailed(Failure):
    """What a file or a setting did to a run that was on its way; the message says it, and how to go on."""


@dataclass(frozen=True)
class Outcome:
    """One way to end.

    Attributes:
        reason: A key of `REASONS`.
        message: A sentence.
    """

    reason: str
    message: str

    @property
    def finished(self) -> bool:
        """Whether the run went to its end."""
        return self.reason.startswith("finished")


class OtherProcessFailed(Failure):
    """Another process of the run failed, and told why; the command ends with the same exit code.

    Args:
        outcome: What it told, or is known of it, with its number.
    """

    def __init__(self, outcome: Outcome):
        super().__init__(outcome.message)
        self.outcome = outcome
        self.exit_code = REASONS[outcome.reason][0]


def outcome_of(error: BaseException) -> Outcome:
    """The way to end that an error is."""
    return error.outcome if isinstance(error, OtherProcessFailed) else Outcome(_reason(error), _line(error))


def _reason(error: BaseException) -> str:
    kinds: list[tuple[type[BaseException] | tuple[type[BaseException], ...], str]] = [
        (KeyboardInterrupt, "interrupted"),
        (NonFiniteLoss, "not finite"),
        (WorkerDied, "loader worker died"),
        (StoreError, "store away"),
        (DataError, "bad data"),
        ((MemoryError, torch.OutOfMemoryError), "memory"),
        (CheckpointError, "checkpoint"),
        ((ValueError, ImportError), "setting or data"),
        (
            (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError),
            "setting or data",
        ),
        ((RunFailed, OSError), "input or output"),
        (torch.distributed.DistError, "another process"),
    ]
    if is_full_disk(error):
        return "disk full"
    if isinstance(error, RuntimeError) and "gloo" in str(error):  # which has no type of its own
        return "another process"
    return next((reason for kind, reason in kinds if isinstance(error, kind)), "fault")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is a disk or a share of one that is full; libraries hide the number."""
    seen = set[int]()
    while error is not None and id(error) not in seen:  # an error may be its own cause
        seen.add(id(error))
        text = str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if any(sign in text for sign in ("No space left on device", "Disk quota exceeded", "File too large")):
            return True
        error = error.__cause__
    return False


def read_outcome(folder: Path) -> dict[str, Any]:
    """What the last run in this folder left; empty where it left nothing."""
    try:
        found = json.loads((Path(folder) / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_finished(told: dict[str, Any]) -> bool:
    """Whether `read_outcome` told of a run that went to its end."""
    return str(told.get("reason", "")).startswith("finished")


def forget_outcome(folder: Path) -> None:
    """A run goes on from here."""
    (Path(folder) / NAME).unlink(missing_ok=True)


def forget_unfinished(folder: Path) -> None:
    """The same, unless the run in this folder went to its end; what a process killed in writing left goes anyway."""
    for leftover in Path(folder).glob(f".{NAME}.*.partial"):
        leftover.unlink(missing_ok=True)
    if not is_finished(read_outcome(folder)):
        forget_outcome(folder)


@dataclass
class Way:
    """How far a run has come, for `explained`.

    Attributes:
        reached: Gives the optimizer steps done.
        folder: Where its end is written down; None: nowhere.
    """

    reached: Callable[[], int] = lambda: 0
    folder: Path | None = None


@contextlib.contextmanager
def explained(way: Way) -> Iterator[None]:
    """Writes down the error that ends the block."""
    try:
        yield
    except BaseException as error:
        if way.folder is not None:
            with deaths_unheard(), contextlib.suppress(OSError):  # the error itself is what must be heard
                write_outcome(way.folder, outcome_of(error), way.reached())
        raise


def write_outcome(folder: Path, outcome: Outcome, step: int, **more: Any) -> None:
    """Writes stopped.json, unless it is there: what happened first explains the rest.

    Args:
        folder: Of the run.
        outcome: How it ended.
        step: Optimizer steps done.
        **more: Further entries.

    Raises:
        OSError: The disk refuses.
    """
    code, again = REASONS[outcome.reason]
    told = {
        "reason": outcome.reason,
        "message": outcome.message,
        "exit_code": code,
        "try_again": again,
        "step": step,
        "time": round(time.time()),
        **more,
    }
    path = Path(folder) / NAME
    # Written aside: a process with a full disk must not leave half of a file, in place of what another could say.
    aside = path.with_name(f".{NAME}.{secrets.token_hex(6)}.partial")
    try:
        with open(aside, "x", encoding="utf-8") as file:
            file.write(json_text(told, indent=1) + "\n")
        fsync(aside)
        _put_first(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _put_first(aside: Path, path: Path) -> None:
    """Gives a file its name, unless another process has put one there."""
    try:
        os.link(aside, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links: two processes that fail at one moment may both come here
        if not path.exists():
            os.replace(aside, path)
