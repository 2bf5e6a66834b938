"""Finding the row of a key in a table of hundreds of gigabytes: the byte offset of each row, in the order of hashed
keys.

The table is read through once (only its keys where a `.lineidx` lies beside it); the result is kept in the cache folder
and mapped into memory, 16 bytes a row, so that every process of a machine shares it.
"""

import hashlib
import json
import os
import re
from pathlib import Path

import numpy as np

from pyramidclip_hf.files import cache_folder, write_atomically

MAX_ROW_BYTES = 256 << 20
_VERSION = 1
_KEY_BYTES = 4096


class BadRow(Exception):
    """A row that cannot be used; `reason` one machine-readable word, `detail` a sentence."""

    def __init__(self, reason, detail=""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self):
        return f"{self.reason}: {self.detail}"


class TsvIndex:
    """The rows of a tab-separated file whose first column is the key.

    Args: `path`; `key_pattern` a regular expression whose first group is the key within the first column. `problems`
    lists (line, key, reason, detail) of rows that have no key or one that came before: these are no rows of the index.
    Raises `ValueError` where a `.lineidx` beside the file does not belong to it.
    """

    def __init__(self, path, key_pattern=None):
        self.path = Path(path)
        stat = os.stat(path)
        identity = [_VERSION, str(self.path.resolve()), stat.st_size, stat.st_mtime_ns, key_pattern]
        name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        folder = cache_folder() / "tsv" / name
        if not (folder / "problems.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            _build(self.path, key_pattern, folder)
        self.offsets = np.load(folder / "offsets.npy", mmap_mode="r")
        self.lines = np.load(folder / "lines.npy", mmap_mode="r")
        self.hashes = np.load(folder / "hashes.npy", mmap_mode="r")
        self.order = np.load(folder / "order.npy", mmap_mode="r")
        self.problems = json.loads((folder / "problems.json").read_text(encoding="utf-8"))
        self._pattern = re.compile(key_pattern) if key_pattern else None
        self._last = (None, None)
        self._file = open(self.path, "rb")

    def __len__(self):
        return len(self.offsets)

    def find(self, key):
        """The row number of `key`, or None."""
        value = _hash(key)
        place = int(np.searchsorted(self.hashes, value))
        while place < len(self.hashes) and self.hashes[place] == value:
            row = int(self.order[place])
            if self.key(row) == key:
                return row
            place += 1
        return None

    def key(self, row):
        """The key of a row."""
        self._file.seek(self.offsets[row])
        return _key_of(self._file.readline(_KEY_BYTES), self._pattern)

    def columns(self, row):
        """All columns of a row as bytes; the last row read is at hand. Raises `BadRow`."""
        if row == self._last[0]:
            return self._last[1]
        self._file.seek(self.offsets[row])
        line = self._file.readline(MAX_ROW_BYTES)
        if not line.endswith(b"\n") and len(line) == MAX_ROW_BYTES:
            raise BadRow("row-too-large", f"more than {MAX_ROW_BYTES} bytes")
        self._last = (row, line.rstrip(b"\r\n").split(b"\t"))
        return self._last[1]


def _hash(key):
    return np.uint64(
        int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
    )


def _key_of(head, pattern):
    """The key at the beginning of a row, or None."""
    column, tab, _ = head.partition(b"\t")
    if not tab or not column:
        return None
    key = column.decode("utf-8", "surrogateescape")
    if pattern is None:
        return key
    found = pattern.search(key)
    return found.group(1) if found else None


def _heads(path):
    """Yields (byte offset, beginning of the row) for every row."""
    beside = path.with_suffix(".lineidx")
    with open(path, "rb") as file:
        if beside.exists():
            yield from _heads_by_lineidx(file, path, beside)
            return
        offset = 0
        for line in file:
            yield offset, line[:_KEY_BYTES]
            offset += len(line)


def _heads_by_lineidx(file, path, beside):
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


def _build(path, key_pattern, folder):
    pattern = re.compile(key_pattern) if key_pattern else None
    if pattern is not None and pattern.groups < 1:
        raise ValueError(f"key_pattern {key_pattern!r}: expected one group in brackets around the key")
    offsets, lines, hashes, problems, seen = [], [], [], [], set()
    for number, (offset, head) in enumerate(_heads(path), start=1):
        key = _key_of(head, pattern)
        if key is None:
            if head.strip():
                problems.append([number, None, "no-key", "no key before a tab, or it does not match the pattern"])
            continue
        value = _hash(key)
        if value in seen:
            problems.append([number, key, "duplicate-key", "the key came before; the first row counts"])
            continue
        seen.add(value)
        offsets.append(offset)
        lines.append(number)
        hashes.append(value)
    hashes = np.array(hashes, np.uint64)
    order = np.argsort(hashes, kind="stable")
    arrays = {"offsets": np.array(offsets, np.int64), "lines": np.array(lines, np.int64)}
    arrays |= {"hashes": hashes[order], "order": order.astype(np.int64)}
    for name, array in arrays.items():
        write_atomically(folder / f"{name}.npy", _npy(array))
    # Written last: it says that the index is whole.
    write_atomically(folder / "problems.json", json.dumps(problems).encode())


def _npy(array):
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
