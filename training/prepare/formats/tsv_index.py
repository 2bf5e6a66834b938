"""Finding the row of a key in a table of hundreds of gigabytes, by an SQLite file of keys, byte offsets and lines.

The table is read through once (only its keys where a `.lineidx` lies beside it); the result is kept in the cache folder
for every process of a machine.
"""

import hashlib
import io
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from pyramidclip_hf.files import cache_folder, check_regular, json_text, written_aside
from training.prepare.steps.databases import errors_of

MAX_ROW_BYTES = 256 << 20
_VERSION = 2
_KEY_BYTES = 4096


class BadRow(Exception):
    """A row that cannot be used; `reason` one machine-readable word, `detail` a sentence."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class RowProblem(NamedTuple):
    """A line of a table that is no row of its index."""

    path: str
    line: int
    key: str | None
    reason: str
    detail: str


class TsvIndex:
    """The rows of a tab-separated file whose first column is the key.

    Args:
        path: the file.
        key_pattern: a regular expression whose first group is the key within the first column.

    Attributes:
        problems: lines that have no key or one that came before: these are no rows of the index.

    Raises:
        ValueError: a `.lineidx` beside the file does not belong to it, or the pattern has no group.
        OSError: the file cannot be read.
    """

    def __init__(self, path: str | Path, key_pattern: str | None = None):
        self.path = Path(path)
        stat = os.stat(path)
        identity = [_VERSION, str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, key_pattern]
        name = hashlib.sha256(json_text(identity).encode()).hexdigest()[:24]
        file = cache_folder().absolute() / "tsv" / f"{name}.sqlite"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with errors_of(file), written_aside(file) as aside:
                _build(self.path, key_pattern, aside)
        # Nobody writes it any more: no locks, which network file systems lack.
        self._rows = sqlite3.connect(f"{file.as_uri()}?immutable=1", uri=True)
        (self._count,) = self._rows.execute("select coalesce(max(row), -1) + 1 from rows").fetchone()
        found = self._rows.execute("select line, key, reason, detail from problems order by line")
        self.problems = [
            RowProblem(str(self.path), line, None if key is None else _text(key), *why) for line, key, *why in found
        ]
        self._last: tuple[int, list[bytes]] | None = None
        # Open as long as the index is.
        self._file = io.BufferedReader(io.FileIO(self.path))

    def __len__(self) -> int:
        return self._count

    def find(self, key: str) -> int | None:
        """The row number of `key`, or None."""
        found = self._rows.execute("select row from rows where key = ?", (_bytes(key),)).fetchone()
        return found[0] if found else None

    def key(self, row: int) -> str:
        """The key of a row."""
        return _text(self._of("key", row))

    def line(self, row: int) -> int:
        """The line of a row, from 1."""
        return self._of("line", row)

    def offset(self, row: int) -> int:
        """The byte at which a row begins."""
        return self._of("offset", row)

    # Any: bytes or int, by the column.
    def _of(self, column: str, row: int) -> Any:
        return self._rows.execute(f"select {column} from rows where row = ?", (row,)).fetchone()[0]

    def columns(self, row: int) -> list[bytes]:
        """All columns of a row; the last row read is at hand. Raises `BadRow`."""
        if self._last is not None and row == self._last[0]:
            return self._last[1]
        self._file.seek(self.offset(row))
        line = self._file.readline(MAX_ROW_BYTES)
        if not line.endswith(b"\n") and len(line) == MAX_ROW_BYTES:
            raise BadRow("row-too-large", f"more than {MAX_ROW_BYTES} bytes")
        columns = line.rstrip(b"\r\n").split(b"\t")
        self._last = (row, columns)
        return columns


def _bytes(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def _text(key: bytes) -> str:
    return key.decode("utf-8", "surrogateescape")


def _key_of(head: bytes, pattern: re.Pattern[str] | None) -> bytes | None:
    """The key at the beginning of a row, or None."""
    column, tab, _ = head.partition(b"\t")
    if not tab or not column:
        return None
    if pattern is None:
        return column
    found = pattern.search(_text(column))
    return _bytes(found.group(1)) if found else None


def _build(path: Path, key_pattern: str | None, file: Path) -> None:
    """Writes the index of a table into an empty file."""
    pattern = re.compile(key_pattern) if key_pattern else None
    if pattern is not None and pattern.groups < 1:
        raise ValueError(f"key_pattern {key_pattern!r}: expected one group in brackets around the key")
    with closing(sqlite3.connect(file)) as index:
        # The file is put in its place only when it is whole.
        index.executescript(
            """
            pragma journal_mode = off; pragma synchronous = off; pragma cache_size = -65536;
            create table rows (row integer primary key, key blob not null unique, offset int, line int);
            create table problems (line integer primary key, key blob, reason text, detail text);
            """
        )
        add_row, add_problem = (f"insert or ignore into {name} values (?, ?, ?, ?)" for name in ("rows", "problems"))
        row = 0
        for line, (offset, head) in enumerate(_heads(path), start=1):
            key = _key_of(head, pattern)
            if key is not None and index.execute(add_row, (row, key, offset, line)).rowcount:
                row += 1
            elif key is not None:
                index.execute(add_problem, (line, key, "duplicate-key", "the key came before; the first row counts"))
            elif head.strip():
                why = "no key before a tab, or it does not match the pattern"
                index.execute(add_problem, (line, None, "no-key", why))
        index.commit()


def _heads(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, beginning of the row) for every row."""
    beside = path.with_suffix(".lineidx")
    check_regular(path)
    with open(path, "rb") as file:
        if beside.is_file():
            yield from _heads_by_lineidx(file, path, beside)
            return
        offset = 0
        for line in file:
            yield offset, line[:_KEY_BYTES]
            offset += len(line)


def _heads_by_lineidx(file: BinaryIO, path: Path, beside: Path) -> Iterator[tuple[int, bytes]]:
    size = os.path.getsize(path)
    misfit = f"{beside} does not belong to {path}: make it anew, or move it away to have the table read through"
    with open(beside, encoding="ascii") as lines:
        for number, text in enumerate(lines):
            if not text.strip().isdigit() or int(text) >= size or (number == 0) != (int(text) == 0):
                raise ValueError(
                    f"{misfit} (its line {number + 1} is {text.strip()[:40]!r}, the table has {size} bytes)"
                )
            offset = int(text)
            file.seek(max(offset - 1, 0))
            head = file.read(_KEY_BYTES)
            if offset and head[:1] != b"\n":
                raise ValueError(f"{misfit} (no row begins at byte {offset})")
            yield offset, (head[1:] if offset else head).partition(b"\n")[0]
