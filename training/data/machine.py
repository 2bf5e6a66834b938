"""Which machine this is: part of the names in caches that several machines would share, so that none meets another's.

Machines that share a file system may fetch, evict and index at the same moment, and locks between them are the file
system's to have or not. So what a machine fetches for itself, what it knows of its own disk, and a database, which
needs locks, have its name where the cache lies on a network.
"""

import contextlib
import os
import re
import socket
from functools import lru_cache
from pathlib import Path

_NETWORK = frozenset(
    "nfs nfs4 lustre gpfs beegfs ceph cifs smb3 afs panfs wekafs fuse.glusterfs fuse.ceph fuse.sshfs orangefs".split()
)


def host() -> str:
    """The name of this machine, as a part of a file's name."""
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:64] or "unnamed"


def own_name(name: str, folder: str | os.PathLike[str]) -> str:
    """A name in a folder, with this machine's name before its suffix where several machines share the folder."""
    if not is_shared(folder):
        return name
    stem, dot, suffix = name.partition(".")
    return f"{stem}-{host()}{dot}{suffix}"


def is_shared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder lies on a network; looked up once."""
    return _looked_up(os.fspath(folder))


@lru_cache(256)
def _looked_up(folder: str) -> bool:
    return is_on_network(Path(folder))


def is_on_network(path: Path, mounts: str | os.PathLike[str] = "/proc/self/mountinfo") -> bool:
    """Whether a path lies on a file system that several machines share; False where the system does not say."""
    place = Path(os.path.realpath(path))
    found = (-1, "")
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(mounts).read_text(encoding="utf-8", errors="surrogateescape").splitlines():
            fields = line.split()
            point, kind = fields[4].replace("\\040", " "), fields[fields.index("-") + 1]
            if place.is_relative_to(point):
                found = max(found, (len(point), kind))
    return found[1] in _NETWORK
