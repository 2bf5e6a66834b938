"""The table of faults: a tiny run killed before each file operation, out of room at each, its checkpoints damaged."""

import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from pyramidclip_command import run_command
from tests.faults.injected import GROWING, UNEXPECTED, full_from, in_child, killed_at, watch
from tests.training.runs import assert_equal_runs, resumable_settings, use_memory
from training import pretrain
from training.loop.run import exit_code
from training.loop.run_folder import list_checkpoints
from training.settings.pretraining import PretrainingArguments

FLIPS = 12


class Suite:
    """Faults of one run, each in a folder of its own, compared with an undisturbed one.

    Args:
        folder: Where all goes.
    """

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.undisturbed = self.folder / "undisturbed"
        self.operations: list[tuple[str, str]] = []
        listed = self.folder / "operations.txt"
        self.folder.mkdir(parents=True, exist_ok=True)

        def write(count: int, event: str, path: str) -> None:
            with os.fdopen(os.open(listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as file:
                file.write(f"{event}\t{os.path.relpath(path, self.undisturbed)}\n")

        assert self._run(self.undisturbed, happens=write) == 0, self.said()
        for line in listed.read_text().splitlines():
            event, path = line.split("\t")
            self.operations.append((event, path))

    def said(self) -> str:
        """What the newest run printed."""
        return (self.folder / "said.txt").read_text(encoding="utf-8", errors="replace")

    def _run(self, folder: Path, resume: str | None = None, happens: object = None) -> int:
        def work() -> int:
            AcceleratorState._reset_state(reset_partial_state=True)
            os.environ |= {"ACCELERATE_USE_CPU": "true"}
            if callable(happens):
                watch(folder, happens)
            args = settings(folder, resume)
            return run_command(lambda words: args, lambda args: exit_code(pretrain.run(args), args), [])

        with pytest.MonkeyPatch.context() as patch:
            use_memory(patch)
            return in_child(work, self.folder / "said.txt")

    def _continued(self, folder: Path) -> str:
        """Runs to the end and compares; the folder goes."""
        code = self._run(folder, resume="latest")
        assert code == 0, f"{folder.name}: continuing ends with {code}: {self.said()}"
        assert_equal_runs(self.undisturbed, folder, kept=())
        leftovers = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
        assert not leftovers, f"{folder.name}: left behind: {leftovers}"
        shutil.rmtree(folder)
        return "continued to the same bits"

    def kill(self, number: int) -> str:
        """Killed before an operation, from 1; what became of the run."""
        folder = self.folder / f"killed-{number:03d}"
        code = self._run(folder, happens=killed_at(number))
        assert code == -9, f"operation {number}, {self.operations[number - 1]}: {code}, {self.said()}"
        return self._continued(folder)

    def fill(self, number: int) -> str:
        """No room from an operation on; room again; what became of the run."""
        folder = self.folder / f"full-{number:03d}"
        code, said = self._run(folder, happens=full_from(number)), self.said()
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code != UNEXPECTED and "Traceback" not in said, f"operation {number}: {said}"
        assert code == 1 and len(errors) == 1 and "No space left" in errors[0], f"operation {number}: {code} {said}"
        return self._continued(folder)

    def flip(self, number: int) -> str:
        """One bit of the newest checkpoint but the run's end flipped; what became of the run."""
        chance, folder = random.Random(number), self.folder / f"flipped-{number:03d}"
        shutil.copytree(self.undisturbed, folder)
        shutil.rmtree(folder / "final")
        for path in folder.glob("final-*"):
            shutil.rmtree(path)
        (folder / "stopped.json").unlink()
        newest = list_checkpoints(folder)[-1]
        path = chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        data = bytearray(path.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        code, said = self._run(folder, resume="latest"), self.said()
        assert code == 0, f"{path}: {code} {said}"
        assert "Going back to the checkpoint before" in said, f"{path}: {said}"
        assert_equal_runs(self.undisturbed, folder, kept=())
        shutil.rmtree(folder)
        return "found, and continued from the checkpoint before to the same bits"

    def jobs(self) -> list[tuple[str, int]]:
        """Every fault of the table: its kind, and its number from 1."""
        growing = [number for number, (event, _) in enumerate(self.operations, 1) if event in GROWING]
        kills = [("kill", number) for number in range(1, len(self.operations) + 1)]
        return kills + [("fill", number) for number in growing] + [("flip", n) for n in range(1, FLIPS + 1)]

    def do(self, job: tuple[str, int]) -> str:
        """What became of the run."""
        kind, number = job
        outcome: str = getattr(self, kind)(number)
        return outcome


def settings(folder: Path, resume: str | None) -> PretrainingArguments:
    """Four steps, checkpoints at 2 and 4, of which both are kept; dropout, so that random states matter."""
    return resumable_settings(folder, steps=4, resume=resume, ema_decay=0.0)


# Of a process of a pool, made when it starts.
_suites: list[Suite] = []


def start_suite(folder: str) -> None:
    """Makes the suite of this process, in a folder of its own there."""
    _suites[:] = [Suite(Path(tempfile.mkdtemp(dir=folder)))]


def jobs_of_suite() -> list[tuple[str, int]]:
    """Of the suite of this process."""
    return _suites[0].jobs()


def do_in_suite(job: tuple[str, int]) -> tuple[str, str]:
    """Kind of the fault, and what became of the run."""
    return job[0], _suites[0].do(job)
