"""One process decides and all hear; what one cannot do ends all; what all must have alike is compared.

Nothing here waits behind a condition that processes evaluate on their own.
"""

import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from training.loop.distributed import everyone, from_first, rank, world_size
from training.loop.outcome import OtherProcessFailed, Outcome, outcome_of

Result = TypeVar("Result")


def together(work: Callable[[], Result]) -> Result:
    """All processes do it, each its own; all call it together.

    Raises:
        OtherProcessFailed: In those that could, where another could not.
        Exception: What `work` raised here.
    """
    result, error = _tried(work)
    outcomes = everyone(None if error is None else outcome_of(error))
    if error is not None:
        raise error
    for number, outcome in enumerate(outcomes):
        if outcome is not None:
            raise _failed(number, outcome)
    return cast(Result, result)


class RunCrew:
    """The processes of a run, as those who open data together (`training.data.sources.Crew`)."""

    def __init__(self) -> None:
        self.number, self.processes = rank(), world_size()
        self.first_of_machine = self.number == 0 or os.environ.get("LOCAL_RANK", "0") == "0"

    def share(self, work: Callable[[], Result]) -> list[Result]:
        """What each process found, in all; raises as `together`."""
        return everyone(together(work))


def first_decides(work: Callable[[], Result]) -> Result:
    """The first process does it, and all have what it found; all call it together. Small plain results only.

    Raises:
        OtherProcessFailed: In the others, where the first could not.
        Exception: In the first, what `work` raised.
    """
    result, error = _tried(work) if rank() == 0 else (None, None)
    found: tuple[Result | None, Outcome | None]
    found = from_first((result, None if error is None else outcome_of(error)))
    if error is not None:
        raise error
    if found[1] is not None:
        raise _failed(0, found[1])
    return cast(Result, found[0])


def _failed(number: int, outcome: Outcome) -> OtherProcessFailed:
    return OtherProcessFailed(Outcome(outcome.reason, f"process {number}: {outcome.message}"))


def _tried(work: Callable[[], Result]) -> tuple[Result | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def check_equal(facts: Mapping[str, Any]) -> None:
    """Compares what must be the same in all processes; all call it together.

    Raises:
        ValueError: In every process, with a table of who has what.
    """
    told = everyone(dict(facts))
    lines = []
    for name in facts:
        having: dict[str, list[int]] = {}
        for number, one in enumerate(told):
            having.setdefault(str(one.get(name)), []).append(number)
        if len(having) > 1:
            lines.append(f"{name}: " + ", ".join(f"{value} in {_processes(who)}" for value, who in having.items()))
    if lines:
        raise ValueError("the processes of this run do not agree:\n  " + "\n  ".join(lines))


def _processes(numbers: list[int]) -> str:
    return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def check_same_folder(folder: Path) -> None:
    """Looks whether all processes mean the same folder, and the same one for its checkpoints; all call it together.

    Raises:
        ValueError: In every process, with those that see another.
    """
    if world_size() == 1:
        return
    checkpoints = folder / "checkpoints"
    # A name that nobody has asked for yet, so that no file system remembers its absence.
    name = first_decides(lambda: _left_token(checkpoints))
    path = checkpoints / name
    found = everyone(together(path.is_file))
    first_decides(lambda: path.unlink(missing_ok=True))
    if not all(found):
        blind = [number for number, one in enumerate(found) if not one]
        raise ValueError(
            f"output_dir {folder}: checkpoints/ is another folder for {_processes(blind)} than for process 0: all "
            "processes need one that they share, for checkpoints are written by all of them"
        )


def _left_token(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    name = f".same-{secrets.token_hex(8)}"
    (folder / name).touch()
    return name
