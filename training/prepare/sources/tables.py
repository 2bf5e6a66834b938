"""JSONL, CSV, TSV and Parquet tables, cut into parts without being read into memory.

JSONL and CSV are read by hand: `pyarrow.json`, `pyarrow.csv` and `datasets` refuse a whole table for one bad row, and
tell neither its line nor the byte where a row begins.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from pyramidclip_hf import parquet_pages
from training.prepare.sources.columns import Columns, choose_columns, fill, key_text, parted_otherwise
from training.prepare.sources.pairs import Fault, RawPair, SourcePart
from training.prepare.steps.flags import SourceArguments

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# Of Parquet, so much is unpacked at a time, or one row.
_BATCH_BYTES = 256 << 20
# Beside the first two, which are pyarrow's own: text that is not UTF-8, kinds that it does not know, no memory.
_PARQUET_ERRORS = (ValueError, OSError, NotImplementedError, KeyError, TypeError, OverflowError, MemoryError)


class TableRow(NamedTuple):
    """A row as read: its line, {column: value}, and why it could not be read."""

    line: int
    values: Mapping[str, object]
    fault: Fault | None = None


class TableSource:
    """Tables whose rows name a picture (or hold its bytes) and a caption."""

    name, is_stream = "table", False

    def __init__(self, files: Sequence[str], arguments: SourceArguments):
        self.files, self.arguments = files, arguments
        self.has_keys = arguments.key_column is not None

    def parts(self) -> list[SourcePart]:
        """Cuts every table into parts of `samples_per_shard` rows; JSONL and CSV are read through once for that."""
        parts: list[SourcePart] = []
        for number, path in enumerate(self.files):
            for start, first, rows, line in _cut(path, self.arguments.samples_per_shard):
                parts.append(SourcePart(f"{len(parts):05d}", path, rows, start, first, line, number))
        if not parts:
            raise ValueError(f"{', '.join(self.files)[:200]}: no rows, expected a picture and a caption in each")
        return parts

    def keys(self, part: SourcePart) -> list[str | None]:
        """The keys of a part, in order; an unreadable row has None. Needs `key_column`."""
        column = self.arguments.key_column
        return [
            None if row.fault or column is None else key_text(row.values.get(column)) for row in _rows(part, [column])
        ]

    def read(self, part: SourcePart, skip: int = 0) -> Iterator[RawPair]:
        """Yields the pairs of a part in order, from row `skip` on.

        Raises:
            ValueError: the table lacks the columns.
        """
        root = Path(self.arguments.picture_root or Path(part.path).parent)
        columns: Columns | None = None
        for number, row in enumerate(islice(_rows(part), skip, None), start=skip):
            key = f"{part.file_number:03d}{part.first + number:09d}"
            raw = RawPair(key, part.path, row.line, fault=row.fault)
            if row.fault is None:
                columns = columns or choose_columns(row.values.keys(), self.arguments, part.path)
                fill(raw, row.values, columns, root)
            yield raw


def _cut(path: str, step: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (start, first row, rows, line) for every `step` rows of a table."""
    if _is_parquet(path):
        total = sum(_parquet(path)[1])
        yield from ((start, start, min(step, total - start), start + 1) for start in range(0, total, step))
        return
    begin, first, line, rows = 0, 0, 1, 0
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


def _row_starts(path: str) -> Iterator[tuple[int, int]]:
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
        _header(reader, path)
        before = (lines.offset, lines.number)
        for row in _csv_rows(reader):
            if row != []:
                yield before[0], before[1] + 1
            before = (lines.offset, lines.number)


def _header(reader: Iterator[list[str]], path: str) -> list[str]:
    """The first row; empty where there is none."""
    try:
        return next(reader, [])
    except csv.Error as error:
        raise ValueError(f"{path}: its first row cannot be read as CSV: {error}") from error


def _csv_rows(reader: Iterator[list[str]]) -> Iterator[list[str] | csv.Error]:
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

    def __init__(self, file: BinaryIO, offset: int = 0, number: int = 0):
        self.file, self.offset, self.number = file, offset, number

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.file.readline()
        if not line:
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def _is_csv(path: str) -> bool:
    return path.lower().endswith((".csv", ".tsv"))


def _is_parquet(path: str) -> bool:
    return path.lower().endswith(".parquet")


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _rows(part: SourcePart, columns: Sequence[str | None] | None = None) -> Iterator[TableRow]:
    """Yields the rows of a part; `columns` limits what Parquet reads."""
    if _is_parquet(part.path):
        return _part_of_parquet(part, columns)
    return _part_of_csv(part) if _is_csv(part.path) else _part_of_jsonl(part)


def _part_of_jsonl(part: SourcePart) -> Iterator[TableRow]:
    with open(part.path, "rb") as file:
        file.seek(part.start)
        number, left = part.line - 1, part.rows or 0
        while left:
            line, number = file.readline(), number + 1
            if line.isspace():
                continue
            left -= 1
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise ValueError(f"expected an object, found {type(row).__name__}")
                yield TableRow(number, row)
            except (ValueError, RecursionError) as error:
                yield TableRow(number, {}, Fault("bad-row", str(error)[:300]))


def _part_of_csv(part: SourcePart) -> Iterator[TableRow]:
    delimiter = _delimiter(part.path)
    with open(part.path, "rb") as file:
        header = _header(csv.reader(_CountedLines(file), delimiter=delimiter), part.path)
        if any("\0" in name or not _is_utf8(name) for name in header):
            raise ValueError(f"{part.path}: its first row is not UTF-8 text; save the table as UTF-8")
        file.seek(part.start)
        lines = _CountedLines(file, part.start, part.line - 1)
        left, at = part.rows or 0, part.line
        for values in _csv_rows(csv.reader(lines, delimiter=delimiter)):
            if values != []:
                yield _csv_row(at, values, header)
                left -= 1
            at = lines.number + 1
            if not left:
                return


def _csv_row(line: int, values: list[str] | csv.Error, header: Sequence[str]) -> TableRow:
    """Nothing is read as "missing": the captions None, null and NA are words."""
    if isinstance(values, csv.Error):
        return TableRow(line, {}, Fault("bad-row", str(values)))
    if len(values) != len(header):
        return TableRow(
            line, {}, Fault("bad-row", f"{len(values)} values for {len(header)} columns{parted_otherwise(header)}")
        )
    if not _is_utf8("".join(values)):
        return TableRow(line, {}, Fault("bad-utf8", "the row is not UTF-8"))
    return TableRow(line, dict(zip(header, values)))


def _is_utf8(text: str) -> bool:
    """Whether text that was decoded with surrogates in place of wrong bytes has none."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(path: str) -> tuple["ParquetFile", list[int]]:
    """The table, and the rows of each of its row groups."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError('Parquet tables need pyarrow: pip install -e ".[train]"') from error
    try:
        table = ParquetFile(path)
        with open(path, "rb") as file:
            return table, parquet_pages.check_rows(file, table)
    except _PARQUET_ERRORS as error:
        raise ValueError(f"{path} is no Parquet table that can be read: {error}") from error


def _part_of_parquet(part: SourcePart, columns: Sequence[str | None] | None) -> Iterator[TableRow]:
    """Only the row groups that hold the part are read, a few rows at a time.

    Raises:
        ValueError: the table is damaged.
    """
    rows = _rows_of_parquet(part, columns)
    while True:
        try:
            row = next(rows, None)
        except _PARQUET_ERRORS as error:
            raise ValueError(f"{part.path} is no Parquet table that can be read: {error}") from error
        if row is None:
            return
        yield row


def _rows_of_parquet(part: SourcePart, columns: Sequence[str | None] | None) -> Iterator[TableRow]:
    (table, counts), stop = _parquet(part.path), part.start + (part.rows or 0)
    position = 0
    for group, size in enumerate(counts):
        if position < stop and part.start < position + size:
            step = _rows_at_once(part.path, table, group)
            for batch in table.iter_batches(step, row_groups=[group], columns=columns):
                first = max(part.start - position, 0)
                rows = batch.slice(min(first, len(batch)), max(stop - position - first, 0))
                yield from (TableRow(position + first + i, row) for i, row in enumerate(rows.to_pylist(), start=1))
                position += len(batch)
        else:
            position += size


def _rows_at_once(path: str, table: "ParquetFile", group: int) -> int:
    """How many rows of a row group stay below `_BATCH_BYTES` even where each is the longest that there may be.

    Parquet writes equal values once, so a few bytes of a file may stand for any number of long rows.
    """
    with open(path, "rb") as file:
        largest = parquet_pages.row_bytes(file, table, group)
    return min(max(_BATCH_BYTES // max(largest, 1), 1), 256)
