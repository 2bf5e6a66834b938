"""Adds the region level: boxes, names, attributes and features of the ten most confident regions, and the tags made of
them.

    accelerate launch -m training.prepare.detect --input-dir data/mine --detector vinvl-x152c4
    python -m training.prepare.detect --input-dir data/mine --detector PekingU/rtdetr_r50vd --feature-size 2048

The detectors are in `training.prepare.steps.detectors`. What made the regions is kept in `dataset.json`; regions of
another maker are not replaced unless --overwrite says so.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from training.data.views import BadPicture
from training.prepare.steps.detectors import DetectorArguments, open_detector
from training.prepare.steps.pictures import decoded
from training.prepare.steps.regions import best_regions
from training.prepare.steps.work import (
    Stage,
    WorkArguments,
    describe_dataset,
    parse,
    refuse_other_maker,
    rewrite_shards,
    this_worker,
)

# The level it makes, as `import_features` does.
STAGE = "regions"
# So many pictures one after the other that a detector refuses are no accident.
_REFUSALS_IN_A_ROW = 100


@dataclass
class DetectArguments:
    """What to read and where to write."""

    input_dir: str = field(metadata={"help": "Folder of shards."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the changed shards go (default: in place)."})
    batch_size: int = field(default=8, metadata={"help": "Pictures detected at once."})
    max_image_pixels: int = field(default=100_000_000, metadata={"help": "Larger pictures get no regions."})
    decode_threads: int = field(default=4, metadata={"help": "Threads that decode pictures while the detector runs."})


def main(argv=None):
    arguments, detector_arguments, work = parse(DetectArguments, DetectorArguments, WorkArguments, argv=argv)
    for name in ("batch_size", "decode_threads", "max_image_pixels"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} is {getattr(arguments, name)}, expected 1 or more")
    worker = this_worker(work)
    provider = open_detector(detector_arguments, worker.device)
    return run(provider, arguments, detector_arguments.top, worker, work.overwrite)


def run(provider, arguments, top, worker, overwrite=False):
    """Runs a provider (`training.prepare.steps.detectors`, or your own with `detect`, `made_by` and `feature_size`)
    over a folder of shards."""
    folder = arguments.output_dir or arguments.input_dir
    refuse_other_maker(arguments.input_dir, "regions", provider.made_by, overwrite)
    settings = {
        "regions": provider.made_by,
        "batch_size": arguments.batch_size,
        "max_image_pixels": arguments.max_image_pixels,
    }
    stage = Stage(folder, STAGE, settings, overwrite)
    change = Change(provider, arguments, top)
    total = rewrite_shards(stage, arguments.input_dir, worker, change)
    if total is not None:
        sizes = [int(name.removeprefix("feature_size_")) for name in total.counts if name.startswith("feature_size_")]
        if len(sizes) > 1:
            raise RuntimeError(f"the detector gave features of different widths: {sorted(sizes)}")
        describe_dataset(
            stage,
            arguments.input_dir,
            total,
            {"regions": provider.made_by},
            sizes[0] if sizes else provider.feature_size,
        )
    if worker.index == 0 or total is not None:
        print(stage.summary(total))
    return total


class Change:
    """The step on one shard (`training.prepare.steps.work.rewrite_shards`): pictures are decoded by threads, one batch
    ahead."""

    def __init__(self, provider, arguments, top):
        self.provider, self.arguments, self.top = provider, arguments, top
        self.refused = 0

    def __call__(self, reader, samples, tally, advance):
        samples = iter(samples)
        with ThreadPoolExecutor(self.arguments.decode_threads) as pool:
            batch, pictures = self._next(samples, pool)
            while batch:
                following = self._next(samples, pool)
                self._detect(batch, [picture.result() for picture in pictures], tally)
                advance(len(batch))
                yield from batch
                batch, pictures = following

    def _next(self, samples, pool):
        batch = list(islice(samples, self.arguments.batch_size))
        return batch, [pool.submit(self._open, opened) for opened in batch]

    def _open(self, opened):
        """The picture, or (reason, detail)."""
        if opened.sample is None:
            return ("bad-sample", "")
        try:
            return decoded(opened.sample.image, self.arguments.max_image_pixels)
        except BadPicture as bad:
            return (bad.reason, str(bad))

    def _detect(self, batch, pictures, tally):
        wanted = []
        for opened, picture in zip(batch, pictures):
            if isinstance(picture, tuple):
                if opened.sample is not None:  # else named where it was read
                    self._without(opened, tally, *picture)
            else:
                wanted.append((opened, picture))
        for opened, found in self._found(wanted, tally):
            opened.levels = best_regions(found, self.top, tally, opened.where, opened.key)
            if opened.levels["roi"] is not None:
                tally.counts[f"feature_size_{opened.levels['roi'].shape[1]}"] += 1

    def _found(self, wanted, tally):
        """(sample, Detections) pairs. Where a batch is refused each picture is tried alone, so that one costs only
        itself."""
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
                raise RuntimeError(
                    f"the detector refused {self.refused} pictures in a row; the last one: {error}"
                ) from error
            self._without(wanted[0][0], tally, "refused-by-detector", str(error))
            return []

    def _without(self, opened, tally, reason, detail):
        """Names a sample that gets no regions; it must not keep those of another detector either."""
        opened.levels = {"regions": None, "roi": None, "tags": None}
        tally.note(opened.where, opened.key, reason, detail)


if __name__ == "__main__":
    main()
