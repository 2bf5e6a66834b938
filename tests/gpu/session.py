"""What every part of `python -m tests.gpu` gets: the device, a size, a folder, and where to put what it finds."""

import contextlib
import gc
import importlib
import io
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from pyramidclip_hf.loading import check_device
from tests.gpu.record import Record, sentence

CHECKOUT = Path(__file__).resolve().parents[2]
T = TypeVar("T")


class Skipped(Exception):
    """A part that this machine cannot run; the message says why."""


class OverTime(BaseException):
    """The part's seconds are over. Not an Exception, so that no `except Exception` inside of a part swallows it."""


@dataclass(frozen=True)
class Part:
    """A step of the whole. name: "subject: what". seconds: how long it may take on one H100."""

    name: str
    seconds: float
    run: Callable[["Session"], None]

    @property
    def subject(self) -> str:
        """What the part is about: "right" or "fast"."""
        return self.name.partition(":")[0]


@dataclass
class Finished:
    """A command that ended. output: what it printed, both streams."""

    code: int
    seconds: float
    output: str


class Session:
    """One call of `python -m tests.gpu`.

    Args:
        record: where rows go.
        device: the GPU, or the CPU of a dry pass.
        folder: for whatever a part writes; removed by the caller.
        ends: `time.monotonic()` after which nothing is begun.
    """

    def __init__(self, record: Record, device: torch.device, folder: Path, ends: float):
        self.record, self.device, self.folder, self.ends = record, device, folder, ends
        self.dry = device.type == "cpu"
        self.part = ""
        self.part_ends = ends

    def size(self, real: T, toy: T) -> T:
        """`toy` in a dry pass."""
        return toy if self.dry else real

    def left(self) -> float:
        """Seconds that the part still has."""
        return self.part_ends - time.monotonic()

    def note(self, **row: Any) -> None:
        """A measurement; `what` names it."""
        self._add(row)

    def check(self, what: str, value: Any, **bound: Any) -> None:
        """A value that must be `at_most`, `at_least` or `equals` the one given; the part fails where it is not."""
        self._add({"check": what, "value": value} | _verdict(value, bound))

    def goal(self, what: str, value: float, **bound: float) -> None:
        """A value that should be `at_most` or `at_least` the one given; says nothing in a dry pass."""
        if not self.dry:
            self._add({"goal": what, "value": value} | _verdict(value, bound))

    def attempt(self, what: str, call: Callable[[], T]) -> T | None:
        """What `call` returns; where it raises, a row says so, the part fails, and this returns None."""
        try:
            return call()
        except Exception as error:
            torch.cuda.empty_cache()
            self._add({"check": what, "value": short(error), "wanted": "no error", "holds": False})
            return None

    def _add(self, row: Mapping[str, Any]) -> None:
        self.record.add(self.part, row)
        print(f"  {sentence(self.record.parts[self.part]['rows'][-1])}", flush=True)

    def run(self, part: Part) -> None:
        """The part with its seconds, whatever comes of it."""
        now = time.monotonic()
        if now >= self.ends:
            return
        self.part, self.part_ends = part.name, min(self.ends, now + (600 if self.dry else part.seconds))
        print(f"== {part.name}", flush=True)
        self.record.begin(part.name)
        state, reason = "passed", ""
        try:
            with alarm(self.part_ends - now):
                part.run(self)
        except Skipped as why:
            state, reason = "skipped", str(why)
        except OverTime:
            state, reason = "failed", f"not finished after {time.monotonic() - now:.0f} s"
        except Exception as error:
            state, reason = "failed", short(error)
            traceback.print_exc()
        self.record.end(part.name, state, time.monotonic() - now, reason)
        ended = self.record.parts[part.name]
        print(f"== {part.name}: {ended['state']} after {ended['seconds']} s {ended.get('reason', '')}", flush=True)

    def tidy(self) -> None:
        """Gives back what the part held."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()

    def command(self, module: str, *words: object) -> Finished:
        """`python -m MODULE WORDS`. In a dry pass its `main` is called here: an interpreter more costs seconds."""
        start, argv = time.monotonic(), [str(word) for word in words]
        if self.dry:
            code, output = _called(module, argv)
            return Finished(code, time.monotonic() - start, output)
        program = [sys.executable, "-m", module, *argv]
        done = subprocess.run(
            program,
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=max(1.0, self.left()),
        )
        return Finished(done.returncode, time.monotonic() - start, done.stdout + done.stderr)

    def side_by_side(self, calls: Mapping[str, Callable[[], T]], at_once: int = 4) -> dict[str, T]:
        """Name -> what the call returned, several at once on a GPU's machine; one that raises gets a failed row."""
        if self.dry:
            found = {name: self.attempt(name, call) for name, call in calls.items()}
        else:
            with ThreadPoolExecutor(at_once) as pool:
                futures = {name: pool.submit(call) for name, call in calls.items()}
                found = {name: self.attempt(name, future.result) for name, future in futures.items()}
        return {name: value for name, value in found.items() if value is not None}


def _verdict(value: Any, bound: Mapping[str, Any]) -> dict[str, Any]:
    [(kind, wanted)] = bound.items()
    compare = {
        "at_most": lambda: value <= wanted,
        "at_least": lambda: value >= wanted,
        "equals": lambda: value == wanted,
    }
    words = {"at_most": "at most", "at_least": "at least", "equals": "equal to"}
    return {"wanted": f"{words[kind]} {wanted}", "holds": bool(compare[kind]())}


def short(error: BaseException) -> str:
    """The error in at most 400 characters, its end where it is longer."""
    return f"{type(error).__name__}: {str(error).strip()[-400:]}"


def _called(module: str, argv: list[str]) -> tuple[int, str]:
    output, before = io.StringIO(), sys.argv
    sys.argv = [module, *argv]
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            code = importlib.import_module(module).main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return int(code or 0), output.getvalue()


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """OverTime inside of the block once `seconds` have passed; needs the main thread."""

    def ring(number: int, frame: object) -> None:
        raise OverTime

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def find_device(dry: bool) -> tuple[torch.device, str]:
    """The device to measure, and a sentence on why it is the CPU where it is.

    Raises:
        ValueError: there is a GPU, and this torch cannot compute on it.
    """
    if dry:
        return torch.device("cpu"), "a dry pass was asked for"
    if torch.cuda.is_available():
        device = torch.device("cuda")
        check_device(device)
        return device, ""
    if torch.version.cuda is None:
        return torch.device("cpu"), f"this torch ({torch.__version__}) was built without CUDA"
    driver = Path("/proc/driver/nvidia/version").exists()
    why = "the machine has NVIDIA's driver, which may be too old for it" if driver else "this machine has no such GPU"
    return torch.device("cpu"), f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, finds no GPU: {why}"


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    import accelerate
    import transformers

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    ).stdout.strip()
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "dry": not on_gpu,
        "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 1e9, 1) if on_gpu else None,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
    }


def named(parts: Sequence[Part], subjects: Sequence[str], only: Sequence[str]) -> list[Part]:
    """The parts of these subjects whose name contains one of `only`; all of them where that is empty.

    Raises:
        ValueError: a subject or name that fits no part.
    """
    known = sorted({part.subject for part in parts})
    for subject in subjects:
        if subject not in known:
            raise ValueError(f"--parts: expected some of {', '.join(known)}, got {subject!r}")
    for word in only:
        if not any(word in part.name for part in parts):
            raise ValueError(
                f"--only {word}: no part has this in its name; there are: " + ", ".join(p.name for p in parts)
            )
    return [
        part for part in parts if part.subject in subjects and (not only or any(word in part.name for word in only))
    ]
