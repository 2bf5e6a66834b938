"""docs/faults.md, from what became of the runs."""

import re
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
KINDS = {
    "kill": "killed (SIGKILL) before a file operation",
    "fill": "the disk full from a file operation on that needs room",
    "flip": "one bit flipped in a file of the newest checkpoint, drawn by a seed",
}
_HEAD = """# Faults

What runs of training survive, and how that is known. `python -m tests.faults --write` wrote this page; `make
test-faults` does every fault and compares what became of the runs, `make test` does a few.

A tiny pre-training of four steps, with dropout, saves twice and writes its model. It is done undisturbed, and then with
one fault in it, in a process of its own; after the fault the same command with `--resume latest` continues it. Weights,
optimizer, random states, log (but for times) and model are then compared with the undisturbed run's, bit by bit, and
nothing half written may lie about. File operations are those that Python is told of (open for writing, mkdir, rename,
remove, rmdir) below the folder of the run; what safetensors and tokenizers write by themselves is between them.

| fault | times | what became of the run |
|---|---|---|
"""
_REST = """
These were {done} of the {there} faults that the table has: before each file operation of the run, from each one on that
needs room, and twelve flips. A full disk ends a run with exit code 1 and one line that names the file and says how to
go on.

Others have their tests where their subject is:

- the launcher and its signals: `tests/training/test_launched.py`, with `make test-faults`; several processes and
  machines that stop, die or disagree: `make test-ranks`;
- a disk that is really full (a small tmpfs, where mounting is allowed) and a limit on file sizes:
  `tests/training/loop/test_resume.py`;
- preparation killed and continued: `tests/training/prepare/steps/test_work.py`; embedding:
  `tests/pyramidclip_hf/commands/test_embed.py`;
- damaged, vanishing and replaced data while training: `tests/training/data/test_faults.py`;
- damaged and hostile bytes for every reader: `tests/test_fuzz.py` ([security.md](security.md)).
"""


def page(counts: Mapping[tuple[str, str], int], there: int) -> str:
    """The page.

    Args:
        counts: (kind of fault, what became of the run) -> times.
        there: How many faults the table has.
    """
    order = sorted(counts, key=lambda found: (list(KINDS).index(found[0]), found[1]))
    rows = "".join(f"| {KINDS[kind]} | {counts[kind, end]} | {end} |\n" for kind, end in order)
    return _HEAD + rows + _REST.format(done=sum(counts.values()), there=there)


def read_counts(text: str) -> dict[tuple[str, str], int]:
    """What `page` was made of."""
    rows = re.findall(r"^\| (.+) \| (\d+) \| (.+) \|$", text, re.MULTILINE)
    kinds = {told: kind for kind, told in KINDS.items()}
    return {(kinds[told], end): int(times) for told, times, end in rows}
