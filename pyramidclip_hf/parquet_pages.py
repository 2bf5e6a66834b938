# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What a Parquet file unpacks to, by the headers of its pages: refused before it is read where that is too much.

The sizes in a file's footer are only said. Those of a page hold: pyarrow unpacks a page into exactly so many bytes, or
fails. It offers neither these headers nor a limit of its own, so that they are read here (Thrift's compact protocol).

A page may stand for more than it unpacks to: a text of the column's dictionary for each of its numbers, and one that
goes on from the text before it (DELTA_BYTE_ARRAY). So values are counted too, and in lists those of each row.
"""

import os
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
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}

_Struct = dict[int, "int | bytes | None | _Struct"]


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

    described: Any
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


def check_rows(table: Any, size: int) -> None:
    """Refuses a table of more rows than a file can tell apart.

    Args:
        table: a `pyarrow.parquet.ParquetFile`.
        size: of the file in bytes.

    Raises:
        ValueError: so it is.
    """
    rows = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, and the whole says {table.metadata.num_rows}")
    if sum(rows) > 64 * size:
        raise ValueError(f"it says to have {sum(rows)} rows in {size} bytes")


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
    check_rows(table, size)
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
    described = table.metadata.row_group(group)
    columns = []
    for number in range(described.num_columns):
        chunk = described.column(number)
        if wanted is not None and chunk.path_in_schema.split(".")[0] not in wanted:
            continue
        try:
            columns.append(_column(file, chunk, table.schema.column(number)))
        except ValueError as error:
            raise ValueError(f"column {chunk.path_in_schema}, row group {group}: {error}") from error
    _check_total(sum(column.plain() for column in columns), columns, f"row group {group}:")
    return columns


def _check_total(total: int, columns: list[_Column], what: str) -> None:
    limit = max(ALWAYS_BYTES, LARGEST_RATIO * sum(column.described.total_compressed_size for column in columns))
    if total > limit:
        raise ValueError(f"{what} {len(columns)} columns unpack to {total} bytes, at most {limit} are read")


def _column(file: BinaryIO, chunk: Any, schema: Any) -> _Column:
    start = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < start:
        start = chunk.dictionary_page_offset
    end, size = start + chunk.total_compressed_size, os.fstat(file.fileno()).st_size
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
            longest = max(longest, _longest_text(file, chunk.compression, page))
    return _Column(chunk, chunk.path_in_schema, pages, limit, depth, width, longest)


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


def _bytes_of(file: BinaryIO, codec: str, page: _Page) -> bytes | None:
    """What a page unpacks to; None where nothing here can unpack it."""
    try:
        import pyarrow
    except ImportError:
        return None
    file.seek(page.start)
    data = file.read(page.packed)
    if codec == "UNCOMPRESSED" or not page.unpacked:
        return data
    try:
        name = {"LZ4": "lz4_raw"}.get(codec, codec.lower())
        return pyarrow.decompress(data, page.unpacked, codec=name, asbytes=True)
    except (ValueError, OSError, MemoryError):
        return None


def _longest_text(file: BinaryIO, codec: str, page: _Page) -> int:
    """Of a dictionary: bytes of its longest text, or at most so many."""
    data = _bytes_of(file, codec, page) if page.values <= _MOST_TEXTS else None
    if data is None:
        return page.unpacked
    at = longest = 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, page.unpacked)


def _longest_row(file: BinaryIO, column: _Column) -> int:
    """How many values a row of lists has at most: all of them where the levels cannot be read."""
    carried = longest = runs = 0
    bits = column.depth.bit_length()
    for page in column.pages:
        if page.kind == _DICTIONARY:
            continue
        data = _repetition_levels(file, column.described.compression, page)
        if data is None:
            return column.values()
        at = done = 0
        while done < page.values:
            run, at = _run(data, at, bits, page.values - done)
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


def _repetition_levels(file: BinaryIO, codec: str, page: _Page) -> bytes | None:
    if page.kind == _DATA_V2:  # whose levels are never packed
        file.seek(page.start)
        return file.read(min(_number(page.header, 6), page.packed))
    data = _bytes_of(file, codec, page) if page.header.get(4) == _RUN_LENGTHS else None
    return None if data is None else data[4 : 4 + int.from_bytes(data[:4], "little")]


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


def _number(struct: object, field: int) -> int:
    value = struct.get(field) if isinstance(struct, dict) else None
    if not isinstance(value, int) or not 0 <= value < 1 << 31:
        raise ValueError(f"a page's header has {value!r} where a size belongs")
    return value


def _read_struct(file: BinaryIO, depth: int = 0) -> _Struct:
    """{number of a field: its value}; lists are read over."""
    if depth > _DEEPEST:
        raise ValueError("a page's header has no end")
    found: _Struct = {}
    field = 0
    while head := _byte(file):
        field = field + (head >> 4) if head >> 4 else _signed(file)
        found[field] = _read_value(file, head & 15, depth)
    return found


def _read_value(file: BinaryIO, kind: int, depth: int) -> "int | bytes | None | _Struct":
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
            for _ in range(_varint(file) if head >> 4 == 15 else head >> 4):
                # In a list, a truth value has a byte of its own.
                _read_value(file, 3 if head & 15 in (1, 2) else head & 15, depth)
            return None
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
