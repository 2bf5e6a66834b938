# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are there whole or not at all; locks between processes; where caches lie; hidden files.

What is written goes beside its name and is renamed when it is complete and on the disk. So a full disk, an error, a
kill or a loss of power leaves what was there before, and a reader sees the old or the new, never a part.
"""

import errno
import glob
import inspect
import json
import math
import os
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


def cache_folder() -> Path:
    """Where indexes, fetched shards and features are kept: `$PYRAMIDCLIP_CACHE`, else `~/.cache/pyramidclip`."""
    return Path(os.environ.get("PYRAMIDCLIP_CACHE") or Path.home() / ".cache" / "pyramidclip")


# More than any list of names or captions has.
_MAX_TEXT_BYTES = 512 << 20
# What macOS and network drives put among people's files, beside all that begins with a dot.
_HIDDEN = ("__MACOSX", "@eaDir")


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name, without its path, is one that people neither made nor see."""
    return name.startswith(".") or name in _HIDDEN


def visible(folder: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """The files and folders in `folder` that fit the pattern, sorted, without hidden ones."""
    return sorted(path for path in Path(folder).glob(pattern) if not is_hidden(path.name))


def contents_of(folder: str | os.PathLike[str]) -> str:
    """What a path holds, in words, for errors: "it is not there", "it is empty", "it holds 3 *.jpg, 1 *.txt"."""
    folder = Path(folder)
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "it is not there"
    kinds = Counter(
        "folder" if path.is_dir() else f"*{path.suffix}" if path.suffix else "without an ending"
        for path in folder.iterdir()
    )
    if not kinds:
        return "it is empty"
    named = [f"{n} {'folders' if n > 1 and kind == 'folder' else kind}" for kind, n in kinds.most_common(3)]
    others = kinds.total() - sum(n for _, n in kinds.most_common(3))
    return "it holds " + ", ".join([*named, f"{others} others"] if others else named)


def read_regular(path: str | os.PathLike[str], most: int) -> bytes:
    """The contents of a file that somebody else may have put there.

    Args:
        path: of a file, or of a link to one.
        most: so many bytes are read.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: no file with contents (a folder, a device, a FIFO), or one with more bytes.
    """
    check_regular(path)
    with open(path, "rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{os.fspath(path)} has more than the {most} bytes that are read of such a file")
    return data


def check_regular(path: str | os.PathLike[str]) -> None:
    """Looks what stands under a name before it is opened: opening a FIFO waits, opening some devices does something.

    Raises:
        OSError: nothing is there.
        ValueError: no file with contents.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{os.fspath(path)} is a folder, device or FIFO, expected a file")


def read_utf8(path: str | os.PathLike[str]) -> str:
    """The text of a list, table or description that a user names, with or without a byte order mark.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: no file with contents, more than 512 MiB, or not UTF-8.
    """
    try:
        return read_regular(path, _MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(path)} is not UTF-8 text: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text that somebody else may have written stands for.

    Raises:
        ValueError: it is no JSON, or nested deeper than anything that is read here.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


@contextmanager
def written_aside(path: str | os.PathLike[str], *, sole_writer: bool = False) -> Iterator[Path]:
    """A file to fill that takes the place of `path` once the block ends well, and vanishes where it fails.

    Args:
        path: in a folder that exists.
        sole_writer: no other process writes `path` now, so what killed ones left beside it is removed.

    Yields:
        The empty file beside `path`; closed again by the end of the block, or replaced by another of its name.

    Raises:
        OSError: the disk is full or refuses; `path` is as it was.
    """
    path = Path(path)
    if sole_writer:
        for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
            leftover.unlink(missing_ok=True)
    # Several processes may write one file of a cache at a time, each beside the others.
    aside = path.with_name(f".{path.name}.{secrets.token_hex(6)}.partial")
    try:
        os.close(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        mode = aside.stat().st_mode & 0o777
        yield aside
        # safetensors makes a file of its own, which no other user may read.
        aside.chmod(mode)
        fsync(aside)
        os.replace(aside, path)
    except OSError as error:
        if is_full(error):
            raise named(error, path) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Removes what killed writers left in a folder and below it, where nobody else writes now."""
    for leftover in Path(folder).rglob(".*.partial"):
        leftover.unlink(missing_ok=True)


def is_full(error: OSError) -> bool:
    """Whether an error says that a disk or a quota has no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def named(error: OSError, path: str | os.PathLike[str]) -> OSError:
    """The error of a file that is open, of which the system does not say the name."""
    return OSError(error.errno, error.strerror, os.fspath(path))


def reason_of(error: BaseException) -> str:
    """What went wrong, for a sentence that has the path: the words of the system without their number and the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a whole file, see `written_aside`."""
    with written_aside(path) as aside:
        aside.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a whole file of UTF-8, see `written_aside`; for text that names what others made.

    Names of files need not be UTF-8, and JSON may hold half of a surrogate pair: such letters are written as JSON
    escapes them.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


def json_text(value: Any, **layout: Any) -> str:
    """JSON that any reader takes: what it has no number for is text, which Python's `float` reads back.

    Args:
        value: of dicts, lists, numbers, texts, booleans and None.
        **layout: of `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **layout)
    except (TypeError, ValueError):  # a number that is none, or a mapping that is no dict
        return json.dumps(_with_spelled_numbers(value), allow_nan=False, **layout)


def _with_spelled_numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _with_spelled_numbers(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_spelled_numbers(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def folder_written_aside(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` once the block ends well, and vanishes where it fails.

    One process at a time may write a folder: what a killed one left beside it is removed.

    Yields:
        The empty folder beside it.

    Raises:
        OSError: the disk is full or refuses; `folder` is as it was.
    """
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        replace_folder(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Puts the complete folder `new` in the place of `folder`, which need not be there, on the same disk."""
    settle(new)
    stale = folder.with_name(f".{folder.name}.stale")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        os.replace(folder, stale)
    os.replace(new, folder)
    shutil.rmtree(stale, ignore_errors=True)
    fsync(folder.parent)


def settle(folder: Path) -> None:
    """Makes the files below `folder` as readable as the user's other files, and waits until all is on the disk."""
    readable = folder.stat().st_mode & 0o666
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o777 | readable)
        fsync(path)
    fsync(folder)


def fsync(path: str | os.PathLike[str]) -> None:
    """Waits until a file or the entries of a folder are on the disk; of a folder, where its file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL or not os.path.isdir(path):
            raise
    finally:
        os.close(handle)


class NoLocks(OSError):
    """A file system that has no locks, as network drives may be mounted."""


# Newer ones put a file of their own in the place of a lock that the file system does not have, which stays when the
# process is killed; older ones raise NotImplementedError.
_KNOWN = inspect.signature(FileLock.__init__).parameters
_HARD: dict[str, Any] = {"fallback_to_soft": False} if "fallback_to_soft" in _KNOWN else {}
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def locked(path: str | os.PathLike[str], *, wait: bool = True, needed: bool = True) -> Iterator[None]:
    """Holds the lock file `path`, which is made where it is absent; the system lets go when the process ends.

    Args:
        path: of a file that is nothing but a lock.
        wait: until whoever holds it lets go.
        needed: off, the block runs without a lock where the file system has none.

    Raises:
        BlockingIOError: another process, or another block of this one, holds it and `wait` is off.
        NoLocks: the file system has none, and one is `needed`.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if wait else 0, **_HARD)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{path} is held by another process") from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        if needed:
            raise NoLocks(f"{path}: this file system has no locks") from error
    try:
        yield
    finally:
        lock.release()
