"""JSONL, CSV, TSV and Parquet tables, cut into parts without being read into memory."""

import csv
import json
from pathlib import Path

from training.prepare.sources.columns import choose_columns, fill, key_text
from training.prepare.sources.raw import Part, Raw

TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


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
        return [None if fault else key_text(row.get(column)) for _, row, fault in _rows(part, [column])]

    def read(self, part):
        """Yields the `Raw` samples of a part."""
        root = Path(self.arguments.picture_root or Path(part.path).parent)
        columns = None
        for number, (line, row, fault) in enumerate(_rows(part)):
            raw = Raw(f"{part.file_number:03d}{part.first + number:09d}", part.path, line, fault=fault)
            if fault is None:
                columns = columns or choose_columns(row, self.arguments, part.path)
                fill(raw, row, columns, root)
            yield raw


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
