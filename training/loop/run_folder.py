"""The folder of a run: which checkpoints are in it, what is taken back, set aside and removed, and who may write.

One process of a run looks and acts here, the first, and tells the others.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyramidclip_command import Failure
from pyramidclip_hf.files import NoLocks, locked
from training.loop.record import NAME, is_whole

_CHECKPOINT = re.compile(r"step-(\d{8,})")
# A run that was killed a moment ago may have processes that still end.
WAIT_FOR_OTHERS = 30.0  # seconds


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The optimizer steps behind a checkpoint of `list_checkpoints`."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of this run, oldest first. Looks at `RUN/checkpoints/step-*` and nowhere else."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _CHECKPOINT.fullmatch(path.name) and (path / NAME).is_file()]
    return sorted(found, key=step_of)


def find_checkpoints(resume: str, run_dir: Path) -> list[Path]:
    """The checkpoints that `--resume` means, best first; none for "latest" of a run that has none yet.

    Raises:
        ValueError: What was named is no folder of a complete checkpoint.
    """
    complete = list_checkpoints(run_dir)
    if resume == "latest":
        return complete[::-1]
    path = Path(resume)
    if not (path / NAME).is_file():
        names = ", ".join(found.name for found in complete) or "none"
        raise ValueError(
            f"--resume {path}: expected 'latest' or the folder of a complete checkpoint, and "
            f"{f'that has no {NAME}' if path.is_dir() else 'that is no folder'}; "
            f"complete in {run_dir}: {names}"
        )
    return [path]


def take_back(run_dir: Path) -> list[Path]:
    """Puts whole checkpoints that a killed process left aside in their places, where nothing is; those places."""
    taken = []
    for ending in ("partial", "stale"):  # the newer of the two first
        for aside in sorted((Path(run_dir) / "checkpoints").glob(f".step-*.{ending}")):
            place = aside.with_name(aside.name.removeprefix(".").removesuffix(f".{ending}"))
            if not place.exists() and is_whole(aside):
                os.replace(aside, place)
                taken.append(place)
    return taken


def remove_leftovers(run_dir: Path) -> None:
    """Removes what killed processes left of checkpoints."""
    for left_over in (Path(run_dir) / "checkpoints").glob(".step-*"):
        shutil.rmtree(left_over)


def prune(run_dir: Path, keep: int, written: Path) -> None:
    """Removes all checkpoints but `written`, which just was, and the newest `keep` - 1 of the others."""
    others = [path for path in list_checkpoints(run_dir) if path != written]
    for path in others[: max(len(others) - (keep - 1), 0)]:
        removed = path.with_name(f".{path.name}.removed")
        os.replace(path, removed)  # first, so that a half removed one does not count as complete
        shutil.rmtree(removed)


def beyond(run_dir: Path, step: int, chosen: Path) -> list[Path]:
    """What another branch left in the folder of a run that continues at `step` from `chosen`."""
    checkpoints = [path for path in list_checkpoints(run_dir) if step_of(path) >= step]
    branch = [path for path in checkpoints if path.resolve() != chosen.resolve()]
    return branch + [path for path in Path(run_dir).glob("final*") if path.is_dir()]


def set_aside(run_dir: Path, branch: Sequence[Path], step: int) -> Path:
    """Moves another branch, from `beyond`, out of the way; where it is now, with a copy of its log.

    Args:
        run_dir: The run's folder.
        branch: Folders in it.
        step: At which the run goes on.
    """
    number = len(list(Path(run_dir).glob("abandoned/*"))) + 1
    folder = Path(run_dir) / "abandoned" / f"{number:04d}-after-step-{step:08d}"
    folder.mkdir(parents=True)
    if (log := Path(run_dir) / "metrics.jsonl").is_file():
        shutil.copyfile(log, folder / log.name)
    for path in sorted(branch, reverse=True):  # the newest first: killed here, the next start chooses the same
        os.replace(path, folder / path.name)
    return folder


@contextlib.contextmanager
def sole_run(run_dir: Path, wait: float = WAIT_FOR_OTHERS) -> Iterator[str]:
    """Holds the folder of a run, as one process at a time can; why it cannot be held here, or nothing.

    Args:
        run_dir: The run's folder, made where it is absent.
        wait: Seconds for whoever holds it to end.

    Raises:
        Failure: Another run holds it.
    """
    path, end = Path(run_dir) / ".lock", time.monotonic() + wait
    with contextlib.ExitStack() as stack:
        told = ""
        while True:
            try:
                stack.enter_context(locked(path, wait=False))
                break
            except BlockingIOError as error:
                if time.monotonic() > end:
                    raise Failure(
                        f"output_dir {run_dir} is in use by another run, which holds {path}: wait for it to end, or "
                        "choose another output_dir"
                    ) from error
                time.sleep(0.5)
            except NoLocks:
                told = f"{run_dir}: this file system has no locks: nothing keeps a second run from writing there"
                break
        yield told
