"""Where pairs come from: WebDataset tars, tables beside pictures, Hub datasets. Used by `training.prepare.pack`.

A source is cut into parts, each of which becomes one shard (or a row of them, where its length is unknown before it
is read). It gives `Raw` samples in a fixed order; what a row lacks is said in `Raw.fault` and never guessed.
"""

import csv
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

from training.data.records import BadSample
from training.data.shards import ShardReader, is_url

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "svg")
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
MAX_PICTURE_BYTES = 256 << 20


@dataclass
class Raw:
    """One pair before it is checked. `picture` undecoded bytes; `members` the other members {suffix: bytes}; `fault`
    (reason, detail) where the row itself could not be read."""

    key: str
    where: str
    line: int | None = None
    picture: bytes | None = None
    members: dict = field(default_factory=dict)
    fault: tuple | None = None


@dataclass
class SourceArguments:
    """What to read."""

    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Tars, tables (.jsonl .csv .tsv .parquet), folders of either, or one Hub dataset name."},
    )
    picture_root: str | None = field(
        default=None, metadata={"help": "Folder that the paths of a table start from (default: the table's own)."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the picture: path or bytes (default: image, file_name, path, jpg)."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the text (default: caption, text, alt, title, txt)."}
    )
    key_column: str | None = field(
        default=None, metadata={"help": "Column with a unique name of each row (default: rows are numbered)."}
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    subset: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    streaming: bool = field(default=True, metadata={"help": "Read a Hub dataset as a stream, without a copy on disk."})
    samples_per_shard: int = field(default=10_000, metadata={"help": "Rows to a shard (tars keep their own size)."})


@dataclass(frozen=True)
class Part:
    """A piece of the source that is worked on as a whole. `start` is a byte offset (JSONL, CSV) or row (Parquet,
    Hub), `rows` None where only reading tells, `first` the number of its first row in its file, `line` that row's
    line."""

    name: str
    path: str
    rows: int | None
    start: int = 0
    first: int = 0
    line: int = 1
    file_number: int = 0


def open_source(arguments):
    """The `TarSource`, `TableSource` or `HubSource` that `arguments` names.

    Raises `ValueError` where nothing or a mixture is named, `FileNotFoundError` for a path that is not there.
    """
    if not arguments.input:
        raise ValueError("--input is missing: expected tars, tables, folders of either, or the name of a Hub dataset")
    if arguments.samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {arguments.samples_per_shard}, expected 1 or more")
    first = arguments.input[0]
    if len(arguments.input) == 1 and _is_hub_name(first):
        return HubSource(arguments)
    files = _files(arguments.input)
    tars = [name for name in files if name.endswith(".tar")]
    if len(tars) == len(files):
        return TarSource(files)
    if not tars:
        return TableSource(files, arguments)
    raise ValueError(f"--input names {len(tars)} tars and {len(files) - len(tars)} tables: pack them into two folders")


def _is_hub_name(name):
    if os.path.exists(name):
        return (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists()
    return (
        not is_url(name)
        and name.count("/") <= 1
        and not name.endswith((".tar", *TABLE_SUFFIXES))
        and name[:1] not in "./~"
    )


def _files(inputs):
    files = []
    for name in inputs:
        if is_url(name):
            files.append(name)
        elif os.path.isdir(name):
            found = sorted(str(p) for p in Path(name).iterdir() if p.suffix == ".tar")
            found = found or sorted(str(p) for p in Path(name).iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"{name} holds no *.tar and no table ({', '.join(TABLE_SUFFIXES)})")
            files += found
        elif os.path.exists(name):
            if not name.lower().endswith((".tar", *TABLE_SUFFIXES)):
                raise ValueError(f"{name}: expected .tar or a table ({', '.join(TABLE_SUFFIXES)})")
            files.append(name)
        else:
            raise FileNotFoundError(f"{name} is not there")
    return files


class TarSource:
    """Shards that img2dataset or WebDataset wrote, one part each; all members of a sample are kept."""

    has_keys = True

    def __init__(self, files):
        self.files = files

    def parts(self):
        return [Part(f"{number:05d}", path, None, file_number=number) for number, path in enumerate(self.files)]

    def keys(self, part):
        """The keys of a part, in order."""
        with ShardReader(part.path) as reader:
            return reader.keys

    def read(self, part):
        """Yields the `Raw` samples of a part."""
        with ShardReader(part.path) as reader:
            for i, key in enumerate(reader.keys):
                raw = Raw(key, part.path)
                try:
                    members = reader.read(i)
                except BadSample as bad:
                    raw.fault = (bad.reason, bad.detail)
                    yield raw
                    continue
                pictures = [suffix for suffix in PICTURE_SUFFIXES if suffix in members]
                if pictures:
                    raw.picture = members.pop(pictures[0])
                raw.members = members
                yield raw
            if reader.truncated:
                yield Raw(
                    None, part.path, fault=("truncated-shard", "the tar ends in the middle: what followed is lost")
                )


class TableSource:
    """JSONL, CSV, TSV or Parquet tables whose rows name a picture (or hold its bytes) and a caption."""

    def __init__(self, files, arguments):
        self.files, self.arguments = files, arguments
        self.has_keys = arguments.key_column is not None

    def parts(self):
        """Cuts every table into parts of `samples_per_shard` rows; JSONL and CSV are read through once for that."""
        parts = []
        for number, path in enumerate(self.files):
            for start, first, rows, line in _cut(path, self.arguments.samples_per_shard):
                parts.append(Part(f"{len(parts):05d}", path, rows, start, first, line, number))
        return parts

    def keys(self, part):
        """The keys of a part, in order; an unreadable row has None."""
        column = self.arguments.key_column
        return [None if fault else _key_text(row.get(column)) for _, row, fault in _rows(part, [column])]

    def read(self, part):
        """Yields the `Raw` samples of a part."""
        root = Path(self.arguments.picture_root or Path(part.path).parent)
        columns = None
        for number, (line, row, fault) in enumerate(_rows(part)):
            raw = Raw(f"{part.file_number:03d}{part.first + number:09d}", part.path, line, fault=fault)
            if fault is None:
                columns = columns or _columns(row, self.arguments, part.path)
                _fill(raw, row, columns, root)
            yield raw


class HubSource:
    """A dataset of the Hub, or one that `save_to_disk` wrote. Pictures are taken as the stored bytes, never decoded
    and encoded again."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.has_keys = arguments.key_column is not None
        self.data = self._load()
        columns = self.data.features or next(iter(self.data.take(1)), {})
        self.columns = _columns(columns, arguments, arguments.input[0])
        self.data = self._undecoded(self.data)

    def _load(self):
        try:
            import datasets
        except ImportError as error:
            raise ImportError('Hub datasets need the train extra: pip install -e ".[train]"') from error
        name, options = self.arguments.input[0], self.arguments
        if os.path.exists(name):
            data = datasets.load_from_disk(name)
            return data[options.split] if isinstance(data, datasets.DatasetDict) else data
        return datasets.load_dataset(
            name, options.subset, split=options.split, revision=options.revision, streaming=options.streaming
        )

    def _undecoded(self, data):
        from datasets import Image

        for name, feature in (data.features or {}).items():
            if isinstance(feature, Image):
                data = data.cast_column(name, Image(decode=False))
        return data

    def parts(self):
        """Row ranges of a dataset on disk; the shards of a stream, whose lengths nobody knows before they are read."""
        step = self.arguments.samples_per_shard
        name = self.arguments.input[0]
        if hasattr(self.data, "__len__"):
            starts = range(0, len(self.data), step)
            rows = len(self.data)
            return [Part(f"{n:05d}", name, min(step, rows - s), s, s) for n, s in enumerate(starts)]
        return [Part(f"{n:05d}", name, None, file_number=n) for n in range(self.data.num_shards)]

    def keys(self, part):
        """The keys of a part, in order; only that column is read."""
        column = self.arguments.key_column
        return [_key_text(row[column]) for row in self._select(part, self.data.select_columns([column]))]

    def _select(self, part, data):
        if part.rows is not None:
            return data.select(range(part.start, part.start + part.rows))
        return data.shard(num_shards=self.data.num_shards, index=part.file_number)

    def read(self, part, skip=0):
        """Yields the `Raw` samples of a part, from row `skip` on."""
        data = self._select(part, self.data)
        data = data.skip(skip) if skip else data
        for number, row in enumerate(data, start=skip):
            raw = Raw(f"{part.file_number:03d}{part.first + number:09d}", part.path, part.first + number + 1)
            _fill(raw, row, self.columns, None)
            yield raw


_KNOWN_COLUMNS = {
    "image": ("image", "file_name", "path", "jpg", "png", "webp", "img", "image_path"),
    "caption": ("caption", "text", "alt", "title", "txt", "TEXT"),
}


def _columns(names, arguments, where):
    """{"image": column, "caption": column, "key": column or None}. Raises `ValueError` naming the columns that are
    there."""
    chosen = {"key": arguments.key_column}
    for role, known in _KNOWN_COLUMNS.items():
        asked = getattr(arguments, f"{role}_column")
        chosen[role] = asked or next((name for name in known if name in names), None)
    missing = [f"--{role}_column" for role, name in chosen.items() if name is None and role != "key"]
    absent = [name for name in chosen.values() if name is not None and name not in names]
    if missing or absent:
        wanted = f"give {', '.join(missing)}" if missing else f"there is no column {', '.join(absent)}"
        raise ValueError(f"{where} has the columns {', '.join(map(str, names))}: {wanted}")
    return chosen


def _key_text(value):
    return None if value is None or value == "" else str(value)


def _fill(raw, row, columns, root):
    """Puts picture, caption and the remaining columns of a table row into `raw`."""
    rest = {
        name: value for name, value in row.items() if name not in (columns["image"], columns["caption"], columns["key"])
    }
    if columns["key"]:
        raw.key = _key_text(row.get(columns["key"]))
        if raw.key is None:
            raw.fault = ("no-key", f"column {columns['key']} is empty")
            return
    try:
        raw.picture, path = _picture(row.get(columns["image"]), root)
        if path is not None:
            rest.setdefault("path", path)
        if isinstance(rest.get("roi"), str):
            raw.members["roi.npy"] = _read_file(root, rest.pop("roi"), "roi")
    except BadSample as bad:
        raw.fault = (bad.reason, bad.detail)
        return
    caption = row.get(columns["caption"])
    if isinstance(caption, list):
        rest["captions"] = caption
    elif caption is not None and not (isinstance(caption, float) and math.isnan(caption)):
        raw.members["txt"] = str(caption).encode("utf-8", "surrogatepass")
    record = {str(name): _plain(value) for name, value in rest.items()}
    if record:
        raw.members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )


def _picture(value, root):
    """The bytes of a picture and its path: from bytes, the Hub's {bytes, path}, or a path. Raises `BadSample`."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"], value.get("path")
        value = value.get("path")
        if root is None and isinstance(value, str) and is_url(value):  # a picture folder on the Hub, streamed
            return _fetch(value), value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), None
    if not isinstance(value, str) or not value:
        raise BadSample(None, root, "no-image", f"expected a path or bytes, found {type(value).__name__}")
    if is_url(value):
        raise BadSample(
            None, root, "remote-picture", f"{value[:200]}: fetch pictures first, for instance with img2dataset"
        )
    return _read_file(root, value, "image"), value


def _fetch(url):
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise BadSample(None, url, "no-image", f"{url[:200]}: {error}") from None


def _read_file(root, name, what):
    path = Path(root or ".") / name
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            raise BadSample(
                None, path, f"{what}-too-large", f"{path.stat().st_size} bytes, at most {MAX_PICTURE_BYTES}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadSample(None, path, f"no-{what}", f"{name}: {error}") from None


def _plain(value):
    """A value as JSON knows it: NaN is null, bytes and dates become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _cut(path, step):
    """Yields (start, first row, rows, line) for every `step` rows of a table."""
    if path.lower().endswith(".parquet"):
        rows = _parquet(path).metadata.num_rows
        yield from ((start, start, min(step, rows - start), start + 1) for start in range(0, rows, step))
        return
    begin, first, line, rows = None, 0, 1, 0
    # A row ends where the next one starts; CSV quoting may put line ends inside it.
    for offset, at_line in _row_starts(path):
        if rows == step:
            yield begin, first, rows, line
            first, rows = first + rows, 0
        if not rows:
            begin, line = offset, at_line
        rows += 1
    if rows:
        yield begin, first, rows, line


def _row_starts(path):
    """(byte offset, line number) of every row of a JSONL or CSV file; blank lines are no rows."""
    with open(path, "rb") as file:
        if not _is_csv(path):
            offset = 0
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield offset, number
                offset += len(line)
            return
        lines = _CountedLines(file)
        reader = csv.reader(lines, delimiter=_delimiter(path))
        next(reader, None)
        before = (lines.offset, lines.number)
        for row in _csv_rows(reader):
            if row != []:
                yield before[0], before[1] + 1
            before = (lines.offset, lines.number)


def _csv_rows(reader):
    """Rows of a csv reader; one it cannot read is a `csv.Error` in its place."""
    while True:
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield error


class _CountedLines:
    """Text lines of a binary file with the byte offset and number of what has been handed out."""

    def __init__(self, file, offset=0, number=0):
        self.file, self.offset, self.number = file, offset, number

    def __iter__(self):
        return self

    def __next__(self):
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def _is_csv(path):
    return path.lower().endswith((".csv", ".tsv"))


def _delimiter(path):
    return "\t" if path.lower().endswith(".tsv") else ","


def _rows(part, columns=None):
    """Yields (line, {column: value}, fault) for the rows of a part; `columns` limits what Parquet reads."""
    if part.path.lower().endswith(".parquet"):
        yield from _parquet_rows(part, columns)
    elif _is_csv(part.path):
        yield from _part_of_csv(part)
    else:
        yield from _part_of_jsonl(part)


def _part_of_jsonl(part):
    with open(part.path, "rb") as file:
        file.seek(part.start)
        number, left = part.line - 1, part.rows
        while left:
            line, number = file.readline(), number + 1
            if line.isspace():
                continue
            left -= 1
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, found {type(row).__name__}")
                yield number, row, None
            except (ValueError, RecursionError) as error:
                yield number, {}, ("bad-row", str(error)[:300])


def _part_of_csv(part):
    delimiter = _delimiter(part.path)
    with open(part.path, "rb") as file:
        header = next(csv.reader(_CountedLines(file), delimiter=delimiter))
        file.seek(part.start)
        lines = _CountedLines(file, part.start, part.line - 1)
        left, at = part.rows, part.line
        for values in _csv_rows(csv.reader(lines, delimiter=delimiter)):
            if values != []:
                left -= 1
                yield at, *_csv_row(values, header)
            at = lines.number + 1
            if not left:
                return


def _csv_row(values, header):
    """({column: text}, fault). Nothing is read as "missing": the captions None, null and NA are words."""
    if isinstance(values, csv.Error):
        return {}, ("bad-row", str(values))
    if len(values) != len(header):
        return {}, ("bad-row", f"{len(values)} values for {len(header)} columns")
    try:
        for value in values:
            value.encode()
    except UnicodeEncodeError:
        return {}, ("bad-utf8", "the row is not UTF-8")
    return dict(zip(header, values)), None


def _parquet(path):
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError('Parquet tables need pyarrow: pip install -e ".[train]"') from error
    return ParquetFile(path)


def _parquet_rows(part, columns=None):
    """Only the row groups that hold the part are read, one at a time."""
    table, group_start, stop = _parquet(part.path), 0, part.start + part.rows
    for group in range(table.num_row_groups):
        size = table.metadata.row_group(group).num_rows
        low, high = max(part.start, group_start), min(stop, group_start + size)
        position = group_start
        if low < high:
            for batch in table.iter_batches(256, row_groups=[group], columns=columns):
                inside = batch.slice(
                    max(low - position, 0), max(min(high - position, len(batch)) - max(low - position, 0), 0)
                )
                for offset, row in enumerate(inside.to_pylist()):
                    yield max(low, position) + offset + 1, row, None
                position += len(batch)
        group_start += size
