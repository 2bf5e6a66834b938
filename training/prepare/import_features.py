r"""Takes region features that others extracted into the shards of a data set, or into a store of their own.

    python -m training.prepare.import_features --input predictions.tsv --hw train.hw.tsv \
        --made-by "VinVL X152-C4" --merge-into data/mine
    python -m training.prepare.import_features --input obj36.tsv --objects objects.txt --attributes attributes.txt \
        --made-by "bottom-up-attention R101, 36 boxes" --store-dir data/regions

The ten most confident regions of a picture are kept, sorted. The formats, and what each lacks, are in
`training.prepare.formats` and docs/prepare.md. A malformed row is named with its line, and the sample it belongs
to goes on without regions.
"""

from dataclasses import asdict, dataclass, field

from training.data.shards import ShardWriter
from training.prepare.formats import BadRow, ManyRows, open_format
from training.prepare.steps.pictures import picture_size
from training.prepare.steps.regions import best_regions, read_names
from training.prepare.steps.work import (
    Opened,
    Stage,
    WorkArguments,
    describe_dataset,
    parse,
    refuse_other_maker,
    rewrite_shards,
    this_worker,
)

# The level it makes: `detect` makes the same one, and what is done by one is not done by the other.
STAGE = "regions"


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
    predictions: list[str] = field(
        default_factory=list, metadata={"help": "Oscar: the tables of names and scores (default: beside each input)."}
    )
    hw: list[str] = field(
        default_factory=list,
        metadata={"help": "scene-graph-benchmark: hw.tsv with picture sizes, one or one an input."},
    )
    objects: str | None = field(default=None, metadata={"help": "LXMERT: class names, one a line."})
    attributes: str | None = field(default=None, metadata={"help": "LXMERT: attribute names, one a line."})
    attribute_threshold: float = field(default=0.1, metadata={"help": "LXMERT: least confidence of an attribute."})
    key_pattern: str | None = field(
        default=None, metadata={"help": r"Regular expression; its group is the key in a row's name, e.g. '(\d+)$'."}
    )
    match_field: str | None = field(
        default=None, metadata={"help": "Field of KEY.json that holds the name of the row (default: the key itself)."}
    )
    top: int = field(default=10, metadata={"help": "Regions kept of a picture."})
    rows_per_shard: int = field(default=10_000, metadata={"help": "Rows to a shard of a store."})


def main(argv=None):
    arguments, work = parse(ImportArguments, WorkArguments, argv=argv)
    if (arguments.merge_into is None) == (arguments.store_dir is None):
        raise ValueError(
            "give one of --merge_into (shards that get the regions) and --store_dir (a folder for the regions alone)"
        )
    worker = this_worker(work, has_model=False)
    rows = open_rows(arguments)
    importer = Importer(rows, arguments, work.overwrite)
    total = importer.store(worker) if arguments.store_dir else importer.merge(worker)
    if total is not None:
        importer.describe(total)
    if worker.index == 0 or total is not None:
        if rows.lacks:
            print(f"{rows.name} here has no {' and no '.join(rows.lacks)}: tags are made without")
        print(importer.stage.summary(total))
    return total


def open_rows(arguments):
    """The reader of all inputs. Raises `ValueError` where companions and inputs differ in number."""
    names = {
        name: read_names(path) if path else None
        for name, path in (("objects", arguments.objects), ("attributes", arguments.attributes))
    }
    companions = {}
    for name in ("predictions", "hw"):
        given = getattr(arguments, name)
        given = (
            given * len(arguments.input) if name == "hw" and len(given) == 1 else given or [None] * len(arguments.input)
        )
        if len(given) != len(arguments.input):
            raise ValueError(f"--{name}: {len(given)} files for {len(arguments.input)} inputs")
        companions[name] = given
    parts = [
        open_format(
            path,
            arguments.key_pattern,
            predictions,
            hw,
            attribute_threshold=arguments.attribute_threshold,
            **names,
        )
        for path, predictions, hw in zip(arguments.input, companions["predictions"], companions["hw"])
    ]
    return parts[0] if len(parts) == 1 else ManyRows(parts)


def _settings(arguments):
    settings = asdict(arguments)
    for place in ("merge_into", "output_dir", "store_dir"):
        del settings[place]
    return settings


class Importer:
    """Reads the rows of one format (`training.prepare.formats`) into shards or into a store."""

    def __init__(self, rows, arguments, overwrite=False):
        self.rows, self.arguments = rows, arguments
        self.feature_size = _feature_size(rows)
        self.made_by = _made_by(rows, arguments, self.feature_size)
        before = None
        if arguments.merge_into is not None:
            before = refuse_other_maker(arguments.merge_into, "regions", self.made_by, overwrite)
        # Samples that get no new regions must not keep those of the other detector.
        self.without = {"regions": None, "roi": None, "tags": None} if before not in (None, self.made_by) else {}
        folder = arguments.store_dir or arguments.output_dir or arguments.merge_into
        self.stage = Stage(folder, STAGE, _settings(arguments), overwrite)

    def merge(self, worker):
        """Adds the regions to existing shards; returns the total or None."""
        return rewrite_shards(self.stage, self.arguments.merge_into, worker, self._change, self._close_merge)

    def _close_merge(self, total):
        total.count("rows", len(self.rows) + len(self.rows.problems))
        if self.arguments.match_field is None:
            total.count("rows_unused", len(self.rows) - total.counts["samples_with_row"])
        for path, line, key, reason, detail in self.rows.problems:
            total.note(path, key, reason, detail, line)

    def _change(self, reader, samples, tally, advance):
        for opened in samples:
            advance(1)
            if opened.sample is not None:
                self._add(opened, tally)
            yield opened

    def _add(self, opened, tally):
        name = opened.key if self.arguments.match_field is None else opened.sample.extra.get(self.arguments.match_field)
        row = None if name is None else self.rows.find(str(name))
        if row is None:
            tally.note(opened.where, opened.key, "no-row", f"no features for {name!r}")
            opened.levels = dict(self.without)
            return
        tally.count("samples_with_row")
        path, line = self.rows.place(row)
        try:
            found = self._read(row, self._size(row, opened))
        except BadRow as bad:
            tally.count("rows_malformed")
            tally.note(path, opened.key, bad.reason, bad.detail, line)
            opened.levels = dict(self.without)
            return
        opened.levels = best_regions(found, self.arguments.top, tally, path, opened.key, line)

    def _size(self, row, opened):
        """The size that the boxes are in pixels of. Raises `BadRow` where the picture is another one than was looked
        at."""
        recorded, shown = self.rows.size(row), picture_size(opened.sample.image)
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
                    f"features are of a picture of {recorded[0]:g} x {recorded[1]:g}, the "
                    f"one here has {shown[0]} x {shown[1]}: "
                    "cropped since, or another one",
                )
        return recorded

    def _read(self, row, size):
        found = self.rows.read(row, size)
        if len(found) and found.features.shape[1] != self.feature_size:
            raise BadRow(
                "bad-width", f"features of {found.features.shape[1]} numbers, the first rows have {self.feature_size}"
            )
        return found

    def store(self, worker):
        """Writes the regions alone, in the order of the file; returns the total or None."""
        step = self.arguments.rows_per_shard
        items = {
            f"{number:05d}": range(start, min(start + step, len(self.rows)))
            for number, start in enumerate(range(0, len(self.rows), step))
        }

        def do(name, tally, advance):
            with ShardWriter(self.stage.folder / f"{name}.tar") as writer:
                for row in items[name]:
                    advance(1)
                    tally.count("in")
                    self._store_row(row, writer, tally)

        self.stage.run({name: len(rows) for name, rows in items.items()}, do, worker, unit="row")
        return self.stage.finish(items, self._close_store)

    def _store_row(self, row, writer, tally):
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

    def _close_store(self, total):
        for path, line, key, reason, detail in self.rows.problems:
            total.count("in")
            total.reject(path, key, reason, detail, line)

    def describe(self, total):
        """Writes `dataset.json`."""
        source = self.arguments.merge_into or self.stage.folder
        describe_dataset(self.stage, source, total, {"regions": self.made_by}, self.feature_size)


def _made_by(rows, arguments, feature_size):
    """What made the regions, for `dataset.json`. A store knows, and keeps it. Raises `ValueError` where nobody says."""
    if rows.made_by is not None:
        return {**rows.made_by, "top": min(arguments.top, rows.made_by.get("top", arguments.top))}
    if not arguments.made_by:
        raise ValueError(
            f"{arguments.input[0]} does not say which detector made its features: name it with --made-by, in the words "
            "by which data sets that may be mixed agree"
        )
    return {
        "maker": arguments.made_by,
        "how": f"import_features, {rows.name}",
        "feature_size": feature_size,
        "top": arguments.top,
        "attributes": "attributes" not in rows.lacks,
    }


def _feature_size(rows):
    """The width of the features in the first rows that can be read. Raises `ValueError` where none can."""
    reason = "the file has no rows"
    for row in range(min(len(rows), 100)):
        try:
            found = rows.read(row, (1, 1) if rows.in_pixels else None)
            if len(found):
                return found.features.shape[1]
        except BadRow as bad:
            reason = f"line {rows.place(row)[1]}: {bad}"
    raise ValueError(
        f"none of the first rows of {rows.place(0)[0]} has features that can be read; the last one: {reason}"
    )


if __name__ == "__main__":
    main()
