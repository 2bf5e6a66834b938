"""SQLite's errors as errors of the file that they are about, which SQLite does not name."""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_of(path: str | os.PathLike[str]) -> Iterator[None]:
    """A block that uses one database.

    Args:
        path: of its file.

    Raises:
        OSError: the disk is full (ENOSPC), or the file cannot be opened, read or written, is damaged, or no database.
    """
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = getattr(error, "sqlite_errorcode", None)
        number = errno.ENOSPC if code == sqlite3.SQLITE_FULL or _is_full(path) else errno.EIO
        raise OSError(number, str(error), os.fspath(path)) from error


def _is_full(path: str | os.PathLike[str]) -> bool:
    """Whether there is no room beside a file: the journal's failing is an input-output error to SQLite."""
    try:
        return os.statvfs(os.path.dirname(os.path.abspath(path))).f_bavail == 0
    except OSError:
        return False
