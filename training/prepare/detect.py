"""Adds the region level: boxes, names, attributes and features of the ten most confident regions, and their tags.

    python -m training.prepare.detect --input-dir data/mine --detector vinvl-x152c4
    python -m training.prepare.detect --input-dir data/mine --detector PekingU/rtdetr_r50vd --feature-size 2048

The detectors are in `training.prepare.steps.detectors`. What made the regions is kept in `dataset.json`; regions of
another maker are not replaced unless --overwrite says so.
"""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from pyramidclip_command import Failure, answer_words, check_there, run_command
from training.prepare.steps.flags import DetectorArguments, WorkArguments, parse_dataclasses


@dataclass
class DetectArguments:
    """What to read and where to write."""

    input_dir: str = field(metadata={"help": "Folder of shards."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the changed shards go (default: in place)."})
    batch_size: int = field(default=8, metadata={"help": "Pictures detected at once."})
    max_image_pixels: int = field(default=100_000_000, metadata={"help": "Larger pictures get no regions."})
    decode_threads: int = field(default=4, metadata={"help": "Threads that decode pictures while the detector runs."})


@dataclass
class DetectSettings:
    """All flags."""

    detect: DetectArguments
    detector: DetectorArguments
    work: WorkArguments


def parse(words: Sequence[str]) -> DetectSettings:
    """The words of the command as settings. Raises `ValueError`."""
    settings = DetectSettings(*parse_dataclasses(words, __doc__, DetectArguments, DetectorArguments, WorkArguments))
    for name in ("batch_size", "decode_threads", "max_image_pixels"):
        if getattr(settings.detect, name) < 1:
            raise ValueError(f"{name} is {getattr(settings.detect, name)}, expected 1 or more")
    if settings.detector.top < 1:
        raise ValueError(f"top is {settings.detector.top}, expected 1 or more")
    check_there("--input-dir", settings.detect.input_dir, "a folder of shards, as training.prepare.pack writes them")
    check_there("--detector", settings.detector.detector, "a folder or Hub name", "id")
    for name in ("names", "attributes"):
        check_there(f"--{name}", getattr(settings.detector, name), "a file, one a line")
    return settings


if __name__ == "__main__":
    answer_words(parse)

from PIL import Image

from pyramidclip_hf.handing_out import Advance
from training.data.shards import ShardReader
from training.data.views import BadPicture, decoded_picture
from training.prepare.steps.detectors import Detector, open_detector
from training.prepare.steps.regions import Detections, best_regions
from training.prepare.steps.rewriting import (
    NO_REGIONS,
    Opened,
    Rewriting,
    describe_dataset,
    in_place,
    refuse_half_made,
    refuse_other_maker,
    shards_of,
)
from training.prepare.steps.work import Stage, Tally, Worker, ray_worker, refuse_nothing, run_here, run_job

# The level it makes, as `import_features` does.
STAGE = "regions"


# So many pictures one after the other that a detector refuses are no accident.
_REFUSALS_IN_A_ROW = 100


# A picture, or why it cannot be shown to a detector: (reason, detail).
Shown = Image.Image | tuple[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, _command, argv)


def _command(settings: DetectSettings) -> None:
    refuse_nothing(detect(settings), [settings.detect.input_dir])


def detect(settings: DetectSettings) -> Tally | None:
    """Detects in this process's share; returns the total, or None while others have not finished theirs.

    Raises:
        ValueError: the detector cannot be used, or the shards have regions of another.
        FileNotFoundError: there are no shards.
    """
    shards_of(settings.detect.input_dir)
    return run_job("training.prepare.detect:worker_job", open_job, settings, settings.work, has_model=True)


def worker_job(settings: DetectSettings) -> Rewriting:
    """The job of a worker of Ray."""
    return open_job(settings, ray_worker(settings.work))


def open_job(settings: DetectSettings, worker: Worker) -> Rewriting:
    """The step as a job; raises as `detect`."""
    arguments = settings.detect
    refuse_half_made(arguments.input_dir, arguments.output_dir or arguments.input_dir, STAGE)
    detector = open_detector(settings.detector, worker.device)
    return _job(detector, arguments, settings.detector.top, worker, settings.work.overwrite)


def run(
    provider: Detector, arguments: DetectArguments, top: int, worker: Worker, overwrite: bool = False
) -> Tally | None:
    """Runs a detector over a folder of shards.

    Args:
        provider: of `training.prepare.steps.detectors`, or your own with `detect`, `made_by` and `feature_size`.
        arguments: what to read, and where to write.
        top: regions kept of a picture.
        worker: whose shards.
        overwrite: replaces regions of another detector.

    Returns:
        The total, or None while other processes have not finished theirs.
    """
    return run_here(_job(provider, arguments, top, worker, overwrite), worker)


def _job(provider: Detector, arguments: DetectArguments, top: int, worker: Worker, overwrite: bool) -> Rewriting:
    source, folder = arguments.input_dir, arguments.output_dir or arguments.input_dir
    refuse_half_made(source, folder, STAGE)
    refuse_other_maker(source, "regions", provider.made_by, overwrite)
    settings = {
        "regions": provider.made_by,
        "batch_size": arguments.batch_size,
        "max_image_pixels": arguments.max_image_pixels,
    }
    stage = Stage(folder, STAGE, settings, overwrite, anew=not in_place(source, folder))

    def describe(total: Tally) -> None:
        sizes = [int(name.removeprefix("feature_size_")) for name in total.counts if name.startswith("feature_size_")]
        if len(sizes) > 1:
            raise Failure(f"the detector gave features of different widths: {sorted(sizes)}")
        width = sizes[0] if sizes else provider.feature_size
        describe_dataset(stage, source, total, {"regions": provider.made_by}, width)

    return Rewriting(stage, source, Change(provider, arguments, top), describe, worker)


class Change:
    """The step on one shard (`steps.rewriting.Change`): pictures are decoded by threads, one batch ahead."""

    def __init__(self, provider: Detector, arguments: DetectArguments, top: int):
        self.provider, self.arguments, self.top = provider, arguments, top
        self.refused = 0

    def __call__(
        self, reader: ShardReader, samples: Iterator[Opened], tally: Tally, advance: Advance
    ) -> Iterator[Opened]:
        """Gives back the samples of a shard with their regions and tags."""
        with ThreadPoolExecutor(self.arguments.decode_threads) as pool:
            batch, pictures = self._next(samples, pool)
            while batch:
                following = self._next(samples, pool)
                self._detect(batch, [picture.result() for picture in pictures], tally)
                advance(len(batch))
                yield from batch
                batch, pictures = following

    def _next(self, samples: Iterator[Opened], pool: ThreadPoolExecutor) -> tuple[list[Opened], list[Future[Shown]]]:
        batch = list(islice(samples, self.arguments.batch_size))
        return batch, [pool.submit(self._open, opened) for opened in batch]

    def _open(self, opened: Opened) -> Shown:
        if opened.sample is None or opened.sample.image is None:
            return ("bad-sample", "")
        try:
            return decoded_picture(opened.sample.image, self.arguments.max_image_pixels)
        except BadPicture as bad:
            return (bad.reason, str(bad))

    def _detect(self, batch: Sequence[Opened], pictures: Sequence[Shown], tally: Tally) -> None:
        wanted: list[tuple[Opened, Image.Image]] = []
        for opened, picture in zip(batch, pictures):
            if isinstance(picture, tuple):
                if opened.sample is not None:  # else named where it was read
                    self._without(opened, tally, *picture)
            else:
                wanted.append((opened, picture))
        for opened, found in self._found(wanted, tally):
            opened.levels = best_regions(found, self.top, tally, opened.where, opened.key)
            roi = opened.levels["roi"]
            if roi is not None:
                tally.count(f"feature_size_{roi.shape[1]}")

    def _found(self, wanted: Sequence[tuple[Opened, Image.Image]], tally: Tally) -> list[tuple[Opened, Detections]]:
        """(sample, Detections) pairs.

        Where a batch is refused each picture is tried alone, so that one costs only itself.
        """
        if not wanted:
            return []
        try:
            found = self.provider.detect([picture for _, picture in wanted])
            self.refused = 0
            return [(opened, detections) for (opened, _), detections in zip(wanted, found)]
        except ValueError as error:
            if len(wanted) > 1:
                return [pair for one in wanted for pair in self._found([one], tally)]
            self.refused += 1
            if self.refused >= _REFUSALS_IN_A_ROW:
                raise Failure(
                    f"the detector refused {self.refused} pictures in a row; the last one: {error}"
                ) from error
            self._without(wanted[0][0], tally, "refused-by-detector", str(error))
            return []

    def _without(self, opened: Opened, tally: Tally, reason: str, detail: str) -> None:
        """Names a sample that gets no regions; it must not keep those of another detector either."""
        opened.levels = NO_REGIONS.copy()
        tally.note(opened.where, opened.key, reason, detail)


if __name__ == "__main__":
    sys.exit(main())
