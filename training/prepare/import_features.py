r"""Takes region features that others extracted into the shards of a data set, or into a store of their own.

    python -m training.prepare.import_features --input predictions.tsv --hw train.hw.tsv \
        --made-by "VinVL X152-C4" --merge-into data/mine
    python -m training.prepare.import_features --input obj36.tsv --objects objects.txt --attributes attributes.txt \
        --made-by "bottom-up-attention R101, 36 boxes" --store-dir data/regions

The ten most confident regions of a picture are kept, sorted. The formats, and what each lacks, are in
`training.prepare.formats` and docs/prepare.md. A malformed row is named with its line, and the sample it belongs to
goes on without regions.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pyramidclip_command import answer_words, check_there, run_command
from training.prepare.steps.flags import FORMAT_FLAGS, FormatFlags, WorkArguments, parse_dataclasses


@dataclass
class ImportArguments:
    """What to read, and where to put it."""

    input: list[str] = field(
        metadata={
            "help": "Features: predictions.tsv, features.tsv, *.feature.tsv, LXMERT's TSV, or a store folder; several "
            "pieces of one format are read as one."
        }
    )
    made_by: str | None = field(
        default=None, metadata={"help": "The detector that made them: only a store says. Kept in dataset.json."}
    )
    merge_into: str | None = field(default=None, metadata={"help": "Folder of shards that get the regions."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the changed shards go (default: in place)."})
    store_dir: str | None = field(default=None, metadata={"help": "Write a store of regions without pictures instead."})

    @property
    def folder(self) -> str:
        """Where the results go."""
        return self.store_dir or self.output_dir or self.merge_into or ""


@dataclass
class RowArguments:
    """Which row belongs to which sample, and what is kept of it."""

    key_pattern: str | None = field(
        default=None, metadata={"help": r"Regular expression; its group is the key in a row's name, e.g. '(\d+)$'."}
    )
    match_field: str | None = field(
        default=None, metadata={"help": "Field of KEY.json that holds the name of the row (default: the key itself)."}
    )
    top: int = field(default=10, metadata={"help": "Regions kept of a picture."})
    rows_per_shard: int = field(default=10_000, metadata={"help": "Rows to a shard of a store."})


@dataclass
class ImportSettings:
    """All flags."""

    places: ImportArguments
    formats: Sequence[FormatFlags]
    rows: RowArguments
    work: WorkArguments

    def that_decide(self) -> dict[str, Any]:
        """Those that the result depends on, as JSON."""
        settings = asdict(self.places)
        for own in self.formats:
            settings |= asdict(own)
        settings |= asdict(self.rows)
        return {
            name: value for name, value in settings.items() if name not in ("merge_into", "output_dir", "store_dir")
        }


def parse(words: Sequence[str]) -> ImportSettings:
    """The words of the command as settings. Raises `ValueError`."""
    places, *formats, rows, work = parse_dataclasses(
        words, __doc__, ImportArguments, *FORMAT_FLAGS, RowArguments, WorkArguments
    )
    if (places.merge_into is None) == (places.store_dir is None):
        raise ValueError(
            "give one of --merge-into (shards that get the regions) and --store-dir (a folder for the regions alone)"
        )
    if rows.rows_per_shard < 1:
        raise ValueError(f"rows_per_shard is {rows.rows_per_shard}, expected 1 or more")
    check_there("--merge-into", places.merge_into, "a folder of shards, as training.prepare.pack writes them")
    check_there("--input", places.input, "files of features", "data")
    return ImportSettings(places, formats, rows, work)


if __name__ == "__main__":
    answer_words(parse)

from pyramidclip_hf.handing_out import Advance, Phase
from training.data.records import Sample
from training.data.shards import ShardReader, ShardWriter
from training.prepare.formats import BadRow, RegionFormat, Size, open_formats
from training.prepare.steps.pictures import picture_size
from training.prepare.steps.regions import Detections, best_regions
from training.prepare.steps.rewriting import (
    NO_REGIONS,
    Levels,
    MadeBy,
    Opened,
    Rewriting,
    describe_dataset,
    in_place,
    mark_unfinished,
    refuse_half_made,
    refuse_other_maker,
    shards_of,
)
from training.prepare.steps.work import Stage, Tally, Worker, ray_worker, run_job

# The level it makes: `detect` makes the same one, and what is done by one is not done by the other.
STAGE = "regions"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(settings: ImportSettings) -> None:
    """Imports and reports."""
    import_features(settings)


def import_features(settings: ImportSettings) -> Tally | None:
    """Imports this process's share; returns the total, or None while others have not finished theirs.

    Raises:
        ValueError: the input cannot be used, or the output holds something else.
        FileNotFoundError: an input or the folder of shards is not there.
    """
    if settings.places.merge_into is not None:
        shards_of(settings.places.merge_into)
    return run_job("training.prepare.import_features:worker_job", open_job, settings, settings.work)


def worker_job(settings: ImportSettings) -> "Importer":
    """The job of a worker of Ray."""
    return open_job(settings, ray_worker(settings.work, has_model=False))


def open_job(settings: ImportSettings, worker: Worker) -> "Importer":
    """The step as a job; raises as `import_features`."""
    return Importer(open_formats(settings.places.input, settings.rows.key_pattern, *settings.formats), settings, worker)


class Importer:
    """Reads the rows of one format (`training.prepare.formats`) into shards or into a store, as a job."""

    def __init__(self, rows: RegionFormat, settings: ImportSettings, worker: Worker):
        self.worker = worker
        self.rows, self.places, self.arguments = rows, settings.places, settings.rows
        overwrite = settings.work.overwrite
        self.feature_size = _feature_size(rows)
        self.made_by = _made_by(rows, settings, self.feature_size)
        before, anew = None, False
        if self.places.merge_into is not None:
            refuse_half_made(self.places.merge_into, self.places.folder, STAGE)
            anew = not in_place(self.places.merge_into, self.places.folder)
            before = refuse_other_maker(self.places.merge_into, "regions", self.made_by, overwrite)
        # Samples that get no new regions must not keep those of the other detector.
        self.without: Levels = NO_REGIONS if before not in (None, self.made_by) else {}
        self.stage = Stage(self.places.folder, STAGE, settings.that_decide(), overwrite, anew)
        self.merging: Rewriting | None = None
        if self.places.merge_into is not None:
            self.merging = Rewriting(
                self.stage, self.places.merge_into, self._change, self._describe, worker, self._close_merge
            )
        step = self.arguments.rows_per_shard
        self.pieces = {
            f"{number:05d}": range(start, min(start + step, len(rows)))
            for number, start in enumerate(range(0, len(rows), step))
        }

    def phases(self) -> Iterator[Phase]:
        """One: all shards, or all pieces of the store."""
        if self.merging is not None:
            yield from self.merging.phases()
            return
        if any(self.stage.report(name) is None for name in self.worker.share(self.pieces)):
            mark_unfinished(self.stage)
        yield self.stage.phase({name: len(rows) for name, rows in self.pieces.items()}, self._store, unit="row")

    def finish(self) -> Tally | None:
        """The total, or None while shards are missing."""
        if self.merging is not None:
            return self.merging.finish()
        total = self.stage.finish(self.pieces, self._close_store)
        if total is not None:
            self._describe(total)
        return total

    def told(self, result: Tally | None) -> str:
        """What people are told of the total."""
        lacks = " and no ".join(self.rows.lacks)
        told = [f"{self.rows.name} here has no {lacks}: tags are made without"] if lacks else []
        return "\n".join([*told, self.stage.summary(result)])

    def _close_merge(self, total: Tally) -> None:
        total.count("rows", len(self.rows) + len(self.rows.problems))
        if self.arguments.match_field is None:
            total.count("rows_unused", len(self.rows) - total.counts["samples_with_row"])
        for path, line, key, reason, detail in self.rows.problems:
            total.note(path, key, reason, detail, line)

    def _change(
        self, reader: ShardReader, samples: Iterator[Opened], tally: Tally, advance: Advance
    ) -> Iterator[Opened]:
        for opened in samples:
            advance(1)
            if opened.sample is not None:
                opened.levels = self._levels(opened, opened.sample, tally)
            yield opened

    def _levels(self, opened: Opened, sample: Sample, tally: Tally) -> Levels:
        field_name = self.arguments.match_field
        name = opened.key if field_name is None else sample.extra.get(field_name)
        row = None if name is None else self.rows.find(str(name))
        if row is None:
            tally.note(opened.where, opened.key, "no-row", f"no features for {name!r}")
            return self.without.copy()
        tally.count("samples_with_row")
        path, line = self.rows.place(row)
        try:
            found = self._read(row, self._size(row, sample))
        except BadRow as bad:
            tally.count("rows_malformed")
            tally.note(path, opened.key, bad.reason, bad.detail, line)
            return self.without.copy()
        return best_regions(found, self.arguments.top, tally, path, opened.key, line)

    def _size(self, row: int, sample: Sample) -> Size | None:
        """The size that the boxes are in pixels of.

        Raises:
            BadRow: nobody says it, or the picture is another one than was looked at.
        """
        recorded, shown = self.rows.size(row), picture_size(sample.image or b"")
        if recorded is None:
            if self.rows.in_pixels and shown is None:
                raise BadRow(
                    "no-size", "the picture is turned by its EXIF mark or unreadable: give the sizes with --hw"
                )
            return shown if self.rows.in_pixels else None
        if shown is not None and min(recorded) > 0:
            expected, found = recorded[0] / recorded[1], shown[0] / shown[1]
            # A resized picture keeps its shape up to the rounding of its short side; a cropped one does not.
            if abs(expected / found - 1) > max(0.02, 1.5 / min(shown)):
                raise BadRow(
                    "size-mismatch",
                    f"features are of a picture of {recorded[0]:g} x {recorded[1]:g}, the one here has "
                    f"{shown[0]} x {shown[1]}: cropped since, or another one",
                )
        return recorded

    def _read(self, row: int, size: Size | None) -> Detections:
        found = self.rows.read(row, size)
        if len(found) and found.features.shape[1] != self.feature_size:
            raise BadRow(
                "bad-width", f"features of {found.features.shape[1]} numbers, the first rows have {self.feature_size}"
            )
        return found

    def _store(self, name: str, tally: Tally, advance: Advance) -> None:
        """Writes the regions of a piece alone, in the order of the file."""
        with ShardWriter(self.stage.folder / f"{name}.tar") as writer:
            for row in self.pieces[name]:
                advance(1)
                tally.count("in")
                self._store_row(row, writer, tally)

    def _store_row(self, row: int, writer: ShardWriter, tally: Tally) -> None:
        key, (path, line) = self.rows.key(row), self.rows.place(row)
        try:
            if self.rows.find(key) != row:
                raise BadRow("duplicate-key", "the key came before; the first row counts")
            size = self.rows.size(row)
            if size is None and self.rows.in_pixels:
                raise BadRow("no-size", "without the pictures, the sizes must come from --hw")
            found = self._read(row, size)
        except BadRow as bad:
            tally.reject(path, key, bad.reason, bad.detail, line)
            return
        opened = Opened(key, path, {}, None, best_regions(found, self.arguments.top, tally, path, key, line))
        try:
            writer.write_members(key, opened.members_now())
            tally.count("out")
        except ValueError as error:
            tally.reject(path, key, "bad-key", str(error), line)

    def _close_store(self, total: Tally) -> None:
        for path, line, key, reason, detail in self.rows.problems:
            total.count("in")
            total.reject(path, key, reason, detail, line)

    def _describe(self, total: Tally) -> None:
        source = self.places.merge_into or self.stage.folder
        describe_dataset(self.stage, source, total, {"regions": self.made_by}, self.feature_size)


def _made_by(rows: RegionFormat, settings: ImportSettings, feature_size: int) -> MadeBy:
    """What made the regions, for `dataset.json`. A store knows, and keeps it. Raises `ValueError` where nobody says."""
    top = settings.rows.top
    if rows.made_by is not None:
        return {**rows.made_by, "top": min(top, rows.made_by.get("top", top))}
    if not settings.places.made_by:
        raise ValueError(
            f"{settings.places.input[0]} does not say which detector made its features: name it with --made-by, in the "
            "words by which data sets that may be mixed agree"
        )
    return {
        "maker": settings.places.made_by,
        "how": f"import_features, {rows.name}",
        "feature_size": feature_size,
        "top": top,
        "attributes": "attributes" not in rows.lacks,
    }


def _feature_size(rows: RegionFormat) -> int:
    """The width of the features in the first rows that can be read. Raises `ValueError` where none can."""
    reason = "the file has no rows"
    for row in range(min(len(rows), 100)):
        try:
            found = rows.read(row, (1, 1) if rows.in_pixels else None)
            if len(found):
                return found.features.shape[1]
        except BadRow as bad:
            reason = f"line {rows.place(row).line}: {bad}"
    raise ValueError(
        f"none of the first rows of {rows.place(0).path} has features that can be read; the last one: {reason}"
    )


if __name__ == "__main__":
    sys.exit(main())
