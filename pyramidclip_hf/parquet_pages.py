# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What a Parquet file unpacks to, by the headers of its pages: refused before it is read where that is too much.

The sizes in a file's footer are only said. Those of a page hold: pyarrow unpacks a page into exactly so many bytes, or
fails. It offers neither these headers nor a limit of its own, so that they are read here (Thrift's compact protocol).
So is the footer: asked what a damaged one says of a column, pyarrow ends the process.

A page may stand for more than it unpacks to: a text of the column's dictionary for each of its numbers, and one that
goes on from the text before it (DELTA_BYTE_ARRAY). So values are counted too, and in lists those of each row.
"""

import io
import os
import weakref
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

# So much may be unpacked whatever it is packed into, beyond it `LARGEST_RATIO` times the bytes in the file.
ALWAYS_BYTES = 256 << 20
LARGEST_RATIO = 16
# A value costs about this when it is read, beside what it is, with its levels.
_BYTES_OF_VALUE = 16
# Below this, nobody asks how the values of lists are spread over rows.
_SMALL = 1 << 20
_LONGEST_TEXT = 1 << 20
_DEEPEST = 8
# More are not looked at: it would take longer than reading them. Honest files have some thousands.
_MOST_RUNS = _MOST_TEXTS = 1 << 20
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
# Of a page's kind, the field of its header.
_HEADERS = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}
_BY_DICTIONARY, _BY_TEXT_BEFORE = (2, 8), 7
_RUN_LENGTHS = 3
# A page is unpacked by each, and the worst of what they give counts: asked which one it is, pyarrow ends the process
# where a damaged footer names none.
_FRAMED = "lz4 in frames"
_CODECS = (None, "snappy", "zstd", "gzip", "lz4_raw", "brotli", _FRAMED)
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}

_Struct = dict[int, Any]  # of what Thrift has: numbers, bytes, lists, structs
# Of a table that is open, its footer is read once.
_FOOTERS: "weakref.WeakKeyDictionary[Any, list[_Struct]]" = weakref.WeakKeyDictionary()


class _Page(NamedTuple):
    """`start`: of its bytes in the file, of which there are `packed`; `values`: those that are null too."""

    kind: int
    start: int
    packed: int
    unpacked: int
    values: int
    encoding: int
    header: _Struct


class _Column(NamedTuple):
    """A column of a row group; `width` of a value that is no text, `longest` text that its dictionary has."""

    packed: int
    name: str
    pages: list[_Page]
    limit: int
    depth: int
    width: int | None
    longest: int

    def repeated(self, values: int | None = None) -> int:
        """Bytes at most of `values` (None: all) by dictionary, or that go on from the one before."""
        if self.width is not None:
            return 0
        sizes = [
            (page.values, self.longest if page.encoding in _BY_DICTIONARY else page.unpacked)
            for page in self.pages
            if page.kind != _DICTIONARY and page.encoding in (*_BY_DICTIONARY, _BY_TEXT_BEFORE)
        ]
        if values is None:
            return sum(count * size for count, size in sizes)
        return values * max((size for _, size in sizes), default=0)

    def values(self) -> int:
        """Of all pages of data."""
        return sum(page.values for page in self.pages if page.kind != _DICTIONARY)

    def plain(self) -> int:
        """What all pages unpack to."""
        return sum(page.unpacked for page in self.pages)

    def largest(self) -> int:
        """What the largest page unpacks to."""
        return max((page.unpacked for page in self.pages), default=0)


def check_rows(file: BinaryIO, table: Any) -> list[int]:
    """The rows of each row group; refuses a table of more than a file can tell apart.

    Args:
        file: opened for reading.
        table: a `pyarrow.parquet.ParquetFile` of it.

    Raises:
        ValueError: so it is, or the footer is damaged.
    """
    size = os.fstat(file.fileno()).st_size
    rows = [_whole(group, 3) for group in _groups(file, table)]
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, and the whole says {table.metadata.num_rows}")
    if sum(rows) > 64 * size:
        raise ValueError(f"it says to have {sum(rows)} rows in {size} bytes")
    return rows


def unpacked_bytes(file: BinaryIO, table: Any, group: int) -> int:
    """How much the pages of all columns of a row group unpack to.

    Raises:
        ValueError: pages outside of the file, headers that are none, or more than the limits allow.
    """
    return sum(column.plain() for column in _columns(file, table, group))


def row_bytes(file: BinaryIO, table: Any, group: int) -> int:
    """How many bytes a row of a row group has at most.

    Raises:
        ValueError: as `unpacked_bytes`; or a row may have more than the limits allow.
    """
    total = 0
    columns = _columns(file, table, group)
    for column in columns:
        if not column.depth:
            total += _BYTES_OF_VALUE + (column.largest() if column.width is None else column.width)
            continue
        values = column.values()
        if max(column.repeated(), values * (column.width or 1), column.plain()) > _SMALL:
            values = _longest_row(file, column)
        repeated = column.repeated(values)
        if repeated > column.limit:
            raise ValueError(
                f"column {column.name}, row group {group}: the {values} values of a row may have {repeated} bytes, as "
                f"one text stands many times; at most {column.limit} are read"
            )
        total += values * _BYTES_OF_VALUE + repeated
        total += min(column.plain(), values * column.largest()) if column.width is None else values * column.width
    _check_total(total, columns, f"row group {group}: a row of")
    return total


def check_whole(file: BinaryIO, table: Any, wanted: Collection[str] | None = None) -> None:
    """Refuses a table of which all rows at once would be far more than the file is.

    Args:
        file: opened for reading.
        table: a `pyarrow.parquet.ParquetFile` of it.
        wanted: columns that are read, by the first part of their names; None: all.

    Raises:
        ValueError: as `unpacked_bytes`; or more than 256 MiB and than 16 times the file's size.
    """
    size = os.fstat(file.fileno()).st_size
    check_rows(file, table)
    total, limit = 0, max(ALWAYS_BYTES, LARGEST_RATIO * size)
    for group in range(table.num_row_groups):
        total += group_bytes(file, table, group, wanted)
        if total > limit:
            raise ValueError(
                f"its rows may have {total} bytes or more: of a file of {size} bytes, at most {limit} are read"
            )


def group_bytes(file: BinaryIO, table: Any, group: int, wanted: Collection[str] | None = None) -> int:
    """How many bytes all rows of a row group have at most; see `check_whole`.

    Raises:
        ValueError: as `unpacked_bytes`.
    """
    total = 0
    for column in _columns(file, table, group, wanted):
        total += column.values() * (_BYTES_OF_VALUE + (column.width or 0)) + column.repeated()
        total += column.plain() if column.width is None else 0
    return total


def _columns(file: BinaryIO, table: Any, group: int, wanted: Collection[str] | None = None) -> list[_Column]:
    chunks = _groups(file, table)[group].get(1)
    if not isinstance(chunks, list) or len(chunks) != len(table.schema):
        raise ValueError(f"row group {group} has not the {len(table.schema)} columns of the table")
    columns = []
    for number, chunk in enumerate(chunks):
        schema = table.schema.column(number)
        if wanted is not None and schema.path.split(".")[0] not in wanted:
            continue
        try:
            columns.append(_column(file, chunk, schema))
        except ValueError as error:
            raise ValueError(f"column {schema.path}, row group {group}: {error}") from error
    _check_total(sum(column.plain() for column in columns), columns, f"row group {group}:")
    return columns


def _check_total(total: int, columns: list[_Column], what: str) -> None:
    limit = max(ALWAYS_BYTES, LARGEST_RATIO * sum(column.packed for column in columns))
    if total > limit:
        raise ValueError(f"{what} {len(columns)} columns unpack to {total} bytes, at most {limit} are read")


def _column(file: BinaryIO, chunk: Any, schema: Any) -> _Column:
    described = chunk.get(3) if isinstance(chunk, dict) else None
    if not isinstance(described, dict):
        raise ValueError("the footer does not describe it")
    start = _whole(described, 9)
    if 0 < described.get(11, 0) < start:
        start = _whole(described, 11)
    end, size = start + _whole(described, 7), os.fstat(file.fileno()).st_size
    if not 0 <= start <= end <= size:
        raise ValueError(f"it says to lie at {start} to {end} of {size} bytes")
    limit, depth = max(ALWAYS_BYTES, LARGEST_RATIO * (end - start)), schema.max_repetition_level
    pages, total, values = [], 0, 0
    for page in _pages(file, start, end):
        pages.append(page)
        total += max(page.unpacked, page.packed)
        values += page.values
        if total > limit or (depth and values * _BYTES_OF_VALUE > limit):
            raise ValueError(f"{end - start} bytes unpack to more than {limit}, at most {LARGEST_RATIO} times as many "
                             f"are read beyond {ALWAYS_BYTES}")  # fmt: skip
    width = schema.length if schema.physical_type == "FIXED_LEN_BYTE_ARRAY" else _WIDTHS.get(schema.physical_type)
    longest = 0
    for page in pages:
        if page.kind == _DICTIONARY and width is None:
            longest = max(longest, _longest_text(file, page))
    return _Column(end - start, schema.path, pages, limit, depth, width, longest)


def _pages(file: BinaryIO, start: int, end: int) -> Iterator[_Page]:
    file.seek(start)
    while file.tell() < end:
        header = _read_struct(file)
        kind, unpacked, packed = _number(header, 1), _number(header, 2), _number(header, 3)
        place = file.tell()
        if place + packed > end:
            raise ValueError(f"a page of {packed} bytes goes beyond its column's end")
        if kind in _HEADERS:
            own = header.get(_HEADERS[kind])
            values = _number(own, 1)
            if kind == _DICTIONARY and values > unpacked:
                raise ValueError(f"a dictionary of {values} values in {unpacked} bytes")
            encoding = _number(own, 4 if kind == _DATA_V2 else 2)
            yield _Page(kind, place, packed, unpacked, values, encoding, own if isinstance(own, dict) else {})
        file.seek(place + packed)


def _bytes_of(file: BinaryIO, codec: str | None, page: _Page) -> bytes | None:
    """What a page unpacks to by a codec (None: it is not packed); None where it does not."""
    file.seek(page.start)
    data = file.read(page.packed)
    if codec is None:
        return data if page.packed == page.unpacked else None
    if codec == _FRAMED:  # as Hadoop wrote it, in blocks with their sizes; not unpacked here
        frame = [int.from_bytes(data[at : at + 4], "big") for at in (0, 4)]
        return b"" if len(data) > 8 and frame[0] <= page.unpacked and frame[1] <= len(data) - 8 else None
    try:
        import pyarrow
    except ImportError:
        return None
    try:
        return pyarrow.decompress(data, page.unpacked, codec=codec, asbytes=True)
    except (ValueError, OSError, MemoryError):
        return None


def _longest_text(file: BinaryIO, page: _Page) -> int:
    """Of a dictionary: bytes of its longest text, or at most so many."""
    contents = [_bytes_of(file, codec, page) for codec in _CODECS] if page.values <= _MOST_TEXTS else []
    found = [_longest_of(data) if data else page.unpacked for data in contents if data is not None]
    return min(max(found, default=page.unpacked), page.unpacked)


def _longest_of(data: bytes) -> int:
    at = longest = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return longest


def _longest_row(file: BinaryIO, column: _Column) -> int:
    """How many values a row of lists has at most: all of them where the levels cannot be read."""
    found = [_longest_row_by(file, codec, column) for codec in _CODECS]
    return max((count for count in found if count is not None), default=column.values())


def _longest_row_by(file: BinaryIO, codec: str | None, column: _Column) -> int | None:
    """None where `codec` is not that of the column."""
    carried = longest = runs = 0
    bits = column.depth.bit_length()
    for page in column.pages:
        if page.kind == _DICTIONARY:
            continue
        if page.kind == _DATA_V2:  # whose levels are never packed
            file.seek(page.start)
            levels = file.read(min(_number(page.header, 6), page.packed))
        else:
            data = _bytes_of(file, codec, page)
            if data is None:
                return None
            levels = data[4 : 4 + int.from_bytes(data[:4], "little")] if page.header.get(4) == _RUN_LENGTHS else b""
        at = done = 0
        while done < page.values:
            run, at = _run(levels, at, bits, page.values - done)
            runs += 1
            if not len(run) or runs > _MOST_RUNS:
                return column.values()
            starts = np.flatnonzero(~run)
            if len(starts):
                longest = max(longest, carried + int(starts[0]), int(np.diff(starts).max(initial=0)))
                carried = len(run) - int(starts[-1])
            else:
                carried += len(run)
            done += len(run)
    return max(longest, carried)


def _run(data: bytes, at: int, bits: int, most: int) -> tuple[np.ndarray, int]:
    """At most `most` numbers of a run (`bits` each) as whether they are not 0, and where the next run starts."""
    head = shift = 0
    while at < len(data) and shift < 35:
        head |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
        if data[at - 1] < 128:
            break
    if head & 1:
        stop = at + (head >> 1) * bits
        packed = np.unpackbits(np.frombuffer(data[at:stop], np.uint8), bitorder="little")
        return packed[: len(packed) // bits * bits].reshape(-1, bits).max(axis=1)[:most] > 0, stop
    stop = at + (bits + 7) // 8
    return np.full(min(head >> 1, most), any(data[at:stop]), bool), stop


def _groups(file: BinaryIO, table: Any) -> list[_Struct]:
    """The row groups of the footer: {1: columns, 3: rows}, a column {3: {7: bytes, 9, 11: offsets}}."""
    if table not in _FOOTERS:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, size - 8 - length))
        groups = _read_struct(io.BytesIO(file.read(length))).get(4)
        if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
            groups = []
        if len(groups) != table.num_row_groups:
            raise ValueError("its footer cannot be read")
        _FOOTERS[table] = groups
    return _FOOTERS[table]


def _whole(struct: _Struct, field: int) -> int:
    value = struct.get(field)
    if not isinstance(value, int):
        raise ValueError(f"the footer has {value!r} where a number belongs")
    return value


def _number(struct: object, field: int) -> int:
    value = struct.get(field) if isinstance(struct, dict) else None
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page's header has {value!r} where a size belongs")
    return value


def _read_struct(file: BinaryIO, depth: int = 0) -> _Struct:
    """{number of a field: its value}."""
    if depth > _DEEPEST:
        raise ValueError("a header has no end")
    found: _Struct = {}
    field = 0
    while head := _byte(file):
        field = field + (head >> 4) if head >> 4 else _signed(file)
        found[field] = _read_value(file, head & 15, depth)
    return found


def _read_value(file: BinaryIO, kind: int, depth: int) -> Any:
    match kind:
        case 1 | 2:
            return int(kind == 1)
        case 3:
            return _byte(file)
        case 4 | 5 | 6:
            return _signed(file)
        case 7:
            return file.read(8)
        case 8:
            length = _varint(file)
            if length > _LONGEST_TEXT:
                raise ValueError(f"a page's header has a text of {length} bytes")
            return file.read(length)
        case 9 | 10:
            head = _byte(file)
            # In a list, a truth value has a byte of its own.
            kind = 3 if head & 15 in (1, 2) else head & 15
            return [_read_value(file, kind, depth) for _ in range(_varint(file) if head >> 4 == 15 else head >> 4)]
        case 12:
            return _read_struct(file, depth + 1)
    raise ValueError(f"a page's header has a field of kind {kind}")


def _byte(file: BinaryIO) -> int:
    read = file.read(1)
    if not read:
        raise ValueError("a page's header has no end")
    return read[0]


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(file)
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a page's header has a number without end")


def _signed(file: BinaryIO) -> int:
    value = _varint(file)
    return value >> 1 ^ -(value & 1)
