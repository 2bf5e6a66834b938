"""Packs a folder of clip art (SVG files that say what they show) into shards: real, noisy pairs without a download hub.

    apt-get install openclipart-svg         # Debian: 8,000 drawings in the public domain
    python -m training.prepare.openclipart --source /usr/share/openclipart/svg --output-dir data/openclipart

Files are drawn by resvg in a process that can open nothing and is ended when it takes too long. Captions are titles
with descriptions, tags are keywords, as their makers wrote them. What cannot be used is rejected by name, as `pack`
does. What to do with the shards, and what is in them: docs/real-data.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pyramidclip_command import answer_words, check_there, run_command
from training.prepare.steps.flags import (
    PackArguments,
    PackSettings,
    SourceArguments,
    WorkArguments,
    parse_dataclasses,
)


@dataclass
class ClipArtArguments:
    """What to draw, and how large."""

    source: str = field(metadata={"help": "Folder with SVG files, at any depth."})
    output_dir: str = field(metadata={"help": "Folder of the shards."})
    side: int = field(default=256, metadata={"help": "Pixels of a picture's longer side."})
    samples_per_shard: int = field(default=1000, metadata={"help": "Files to a shard."})

    def __post_init__(self) -> None:
        """Raises `ValueError` where a number cannot be."""
        if not 16 <= self.side <= 4096:
            raise ValueError(f"--side: expected 16 to 4096, got {self.side}")
        if self.samples_per_shard < 1:
            raise ValueError(f"--samples-per-shard: expected 1 or more, got {self.samples_per_shard}")


@dataclass
class ClipArtSettings(PackSettings):
    """All flags, and what `pack` is told."""

    drawing: ClipArtArguments

    def that_decide(self) -> dict[str, Any]:
        """Those that the result depends on, as JSON."""
        return super().that_decide() | {"side": self.drawing.side}


def parse(words: Sequence[str]) -> ClipArtSettings:
    """The words of the command as settings. Raises `ValueError`, `FileNotFoundError`."""
    drawing, work = parse_dataclasses(words, __doc__, ClipArtArguments, WorkArguments)
    check_there("--source", drawing.source, "a folder of SVG files", "path")
    source = SourceArguments(input=[drawing.source], samples_per_shard=drawing.samples_per_shard)
    return ClipArtSettings(source, PackArguments(drawing.output_dir), work, drawing)


if __name__ == "__main__":
    answer_words(parse)

from training.prepare.pack import Packing, refuse_empty
from training.prepare.sources.clip_art import ClipArtSource
from training.prepare.steps.work import Tally, Worker, ray_worker, run_job


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(settings: ClipArtSettings) -> None:
    """Draws, packs and reports."""
    refuse_empty(draw(settings), settings.source.input)


def draw(settings: ClipArtSettings) -> Tally | None:
    """Packs this process's share; returns the total, or None while others have not finished theirs.

    Raises:
        FileNotFoundError: there is no SVG file.
        ImportError: resvg is missing.
    """
    return run_job("training.prepare.openclipart:worker_job", open_job, settings, settings.work)


def worker_job(settings: ClipArtSettings) -> Packing:
    """The job of a worker of Ray."""
    return open_job(settings, ray_worker(settings.work, has_model=False))


def open_job(settings: ClipArtSettings, worker: Worker) -> Packing:
    """The step as a job; raises as `draw`."""
    own = settings.drawing
    return Packing(settings, worker, ClipArtSource(own.source, own.side, own.samples_per_shard))


if __name__ == "__main__":
    sys.exit(main())
