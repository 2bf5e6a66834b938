"""Where each line of a manifest begins, found once a machine and mapped by every process of it."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyramidclip_hf.files import cache_folder, json_text, locked, written_aside

_BLOCK = 16 << 20
_BLANKS = np.frombuffer(b" \t\r\n\x0b\x0c", np.uint8)


class Lines(NamedTuple):
    """The lines of a file that are not blank.

    Attributes:
        offsets: (n + 1,) int64: where each begins, and the size of the file.
        digest: a hash of the file.
        kept_in: the file that `offsets` is mapped from; None where they are in memory.
    """

    offsets: np.ndarray
    digest: str
    kept_in: Path | None


def manifest_lines(path: Path) -> Lines:
    """The lines of a file; kept in the cache folder for exactly this file as it is now.

    Raises:
        OSError: it cannot be read.
    """
    stat = os.stat(path)
    now = [os.path.abspath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    name = hashlib.sha256(json_text(now).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    folder = cache_folder() / "indexes"
    index, said = folder / f"{name}.lines.npy", folder / f"{name}.lines.json"
    try:
        with locked(cache_folder() / "locks" / f"{name}.lock", needed=False):
            if not said.exists():
                folder.mkdir(parents=True, exist_ok=True)
                offsets, digest = _looked_through(path)
                with written_aside(index) as aside, open(aside, "wb") as file:
                    np.save(file, offsets)
                with written_aside(said) as aside:
                    aside.write_text(json_text({"digest": digest}), encoding="utf-8")
        return Lines(np.load(index, mmap_mode="r"), json.loads(said.read_text(encoding="utf-8"))["digest"], index)
    except (OSError, ValueError):  # no room, or not ours
        return Lines(*_looked_through(path), None)


def _looked_through(path: Path) -> tuple[np.ndarray, str]:
    """Offsets and hash, from blocks that end with a line."""
    parts: list[np.ndarray] = []
    digest, position = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK) + file.readline():
            digest.update(block)
            values = np.frombuffer(block, np.uint8)
            ends = np.flatnonzero(values == ord("\n")) + 1
            if not len(ends) or ends[-1] < len(block):
                ends = np.append(ends, len(block))
            starts = np.concatenate([[0], ends[:-1]])
            # A line that begins as a record does is none that is blank; of the others there are few.
            doubtful = np.flatnonzero(np.isin(values[starts], _BLANKS))
            blank = [i for i in doubtful.tolist() if not block[starts[i] : ends[i]].strip()]
            parts.append(np.delete(starts, blank) + position)
            position += len(block)
    return np.concatenate([*parts, [position]]).astype(np.int64), digest.hexdigest()[:16]
