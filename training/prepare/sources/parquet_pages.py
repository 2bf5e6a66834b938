"""What a row group of a Parquet file unpacks to, by the headers of its pages.

The sizes in a file's footer are only said. Those of a page hold: pyarrow unpacks a page into exactly so many bytes, or
fails. It offers neither these headers nor a limit of its own, so that they are read here (Thrift's compact protocol).
"""

import os
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# So much may be unpacked whatever it is packed into, beyond it `LARGEST_RATIO` times the bytes in the file.
ALWAYS_BYTES = 256 << 20
LARGEST_RATIO = 16
# A value of a list costs about this when it is read, with its levels.
_BYTES_OF_LISTED = 16
_LONGEST_TEXT = 1 << 20
_DEEPEST = 8

_Struct = dict[int, "int | bytes | None | _Struct"]


def check_rows(table: "ParquetFile", size: int) -> None:
    """Refuses a table of more rows than a file of `size` bytes can tell apart.

    Raises:
        ValueError: so it is.
    """
    rows = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows:
        raise ValueError(f"its row groups have {sum(rows)} rows, and the whole says {table.metadata.num_rows}")
    if sum(rows) > 64 * size:
        raise ValueError(f"it says to have {sum(rows)} rows in {size} bytes")


def unpacked_bytes(file: BinaryIO, table: "ParquetFile", group: int) -> int:
    """How much the pages of all columns of a row group unpack to.

    Raises:
        ValueError: pages outside of the file, headers that are none, or more than the limits allow.
    """
    size, total = os.fstat(file.fileno()).st_size, 0
    described = table.metadata.row_group(group)
    for number in range(described.num_columns):
        column = described.column(number)
        start = column.data_page_offset
        if column.has_dictionary_page and 0 < (column.dictionary_page_offset or 0) < start:
            start = column.dictionary_page_offset
        end = start + column.total_compressed_size
        if not 0 <= start <= end <= size:
            raise ValueError(f"column {column.path_in_schema} says to lie at {start} to {end} of {size} bytes")
        listed = table.schema.column(number).max_repetition_level > 0
        try:
            total += _unpacked_chunk(file, start, end, listed)
        except ValueError as error:
            raise ValueError(f"column {column.path_in_schema}, row group {group}: {error}") from error
    return total


def _unpacked_chunk(file: BinaryIO, start: int, end: int, listed: bool) -> int:
    total = values = 0
    limit = max(ALWAYS_BYTES, LARGEST_RATIO * (end - start))
    file.seek(start)
    while file.tell() < end:
        header = _read_struct(file)
        unpacked, packed = _number(header, 2), _number(header, 3)
        if file.seek(packed, os.SEEK_CUR) > end:
            raise ValueError(f"a page of {packed} bytes goes beyond its column's end")
        if 7 in header and _number(header[7], 1) > unpacked:
            raise ValueError(f"a dictionary of {_number(header[7], 1)} values in {unpacked} bytes")
        values += sum(_number(header[kind], 1) for kind in (5, 8) if kind in header)
        total += max(unpacked, packed)
        if total > limit or (listed and values * _BYTES_OF_LISTED > limit):
            raise ValueError(f"{end - start} bytes unpack to more than {limit}, at most {LARGEST_RATIO} times as many "
                             f"are read beyond {ALWAYS_BYTES}")  # fmt: skip
    return total


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
