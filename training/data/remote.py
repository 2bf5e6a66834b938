"""What lies behind a URL: shards, fetched whole into a bounded folder, and small files (docs/data.md).

fsspec opens `https://`, `hf://`, `s3://` and the rest. A shard is downloaded beside its name and renamed when its
size is the announced one and it begins as a tar does, so a file under its own name is whole; processes and loader
workers that want the same shard wait for one download. What was used longest ago goes first when the folder is full; a
shard that is open stays readable after it has been evicted.

A store that stumbles (no connection, HTTP 429 or 5xx, a body that breaks off) is asked again with growing pauses, as
its `Patience` says; what it does not have is said at once.
"""

import contextlib
import hashlib
import itertools
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyramidclip_hf.files import cache_folder, is_full, locked, written_aside
from training.data.machine import is_shared, own_name
from training.data.patience import Patience

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DEFAULT_MAX_BYTES = 64 * 10**9
SMALL_FILE_BYTES = 512 << 20
# For what is asked for at a start, where a wrong name should be said soon.
FEW_TRIES = Patience(attempts=4)
_CHUNK = 1 << 20
# What launchers (torchrun, `accelerate launch`) say: which trainer of a machine this is, of how many; and without them.
LOCAL_PROCESS = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
# So much room is made at a time for a body of unknown length.
_ROOM = 64 << 20
# Between two pieces of a body, in seconds; a whole one may take its time.
_SILENCE = 60.0


class DownloadError(OSError):
    """A shard could not be fetched; the message names the URL, what went wrong and how often it was tried."""


class NotThere(DownloadError):
    """The store answers, and what it has under this name cannot be used: nothing, nothing for us, or no tar.

    Trying again does not help. `reason` is `no-shard` or `not-a-tar`.
    """

    def __init__(self, message: str, reason: str = "no-shard"):
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["NotThere"], tuple[str, str]]:
        return NotThere, (str(self), self.reason)


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name goes through fsspec (`https://`, `hf://`, `s3://`, ...) rather than the file system."""
    return "://" in os.fspath(name)


class ShardCache:
    """A folder of downloaded shards.

    Args:
        folder: default: `shards` in `cache_folder()`. Where that lies on a network, all machines would fetch into it
            and evict from it: then `shards-HOST` in it, or, where nobody chose it and it is the home's, `shards` in
            the machine's folder for temporary files.
        max_bytes: of all shards in it together, those that are being fetched included.
        patience: how often and how long a download is tried before `DownloadError`.

    Raises:
        ValueError: a number that is not positive.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        patience: Patience | None = None,
    ):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes is {max_bytes}, expected a positive number")
        self.folder = Path(folder) if folder else _own_folder()
        self.max_bytes, self.patience = max_bytes, patience or Patience()

    def path_of(self, url: str) -> Path:
        """Where the shard of `url` lies once fetched."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:20]
        return self.folder / f"{digest}.tar"

    def fetch(self, url: str, wait: bool = True) -> Path:
        """The local path of the shard at `url`, which is downloaded where it is not there.

        Args:
            url: of a tar.
            wait: while another process fetches it.

        Raises:
            NotThere: the store has no such tar.
            DownloadError: every attempt failed or came out short.
            ValueError: the shard is larger than the whole cache.
            ImportError: what fsspec needs for such a URL is not installed.
            BlockingIOError: another process fetches it, and `wait` is off.
        """
        path = self.path_of(url)
        if not path.exists():
            with locked(path.with_suffix(".lock"), wait=wait, needed=False):
                if not path.exists():
                    self._download_with_retries(url, path)
        stat = os.stat(path)
        # The access time says when it was used last; the modification time must stay, indexes go by it.
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return path

    def forget(self, url: str) -> None:
        """Takes the shard of `url` out of the cache."""
        self.path_of(url).unlink(missing_ok=True)

    def _download_with_retries(self, url: str, path: Path) -> None:
        problem: Exception | None = None
        number = 0
        for one in self.patience.tries():
            number = one.number
            try:
                return self._download(url, path)
            except (NotThere, ValueError, ImportError):
                raise
            except Exception as error:  # every file system of fsspec has its own network errors
                if isinstance(error, OSError) and is_full(error):
                    raise  # of this machine, and said with the file
                if (missing := _missing(error)) is not None:
                    raise NotThere(f"{url}: {missing}") from None
                problem, one.pause_at_least = error, _retry_after(error)
                if one.number == 1:
                    print(f"{url}: {_called(error)}; it is tried again", file=sys.stderr, flush=True)
        raise DownloadError(f"{url}: {_called(problem)}; tried {number} times") from problem

    def _download(self, url: str, path: Path) -> None:
        system, name = _file_system(url)
        # Listings are cached by fsspec; a shard that was replaced must not be judged by its old size.
        system.invalidate_cache()
        expected = system.info(name).get("size")
        if expected is not None and expected > self.max_bytes:
            raise ValueError(f"{url} has {expected} bytes, {self._too_small()}")
        with written_aside(path, sole_writer=True) as aside:
            # What is announced is reserved at once, so that downloads side by side keep the bound together.
            self._make_room(aside, expected or 0)
            room, received = expected or 0, 0
            with system.open(name, "rb", cache_type="none", block_size=0) as source, open(aside, "r+b") as target:
                while chunk := source.read(_CHUNK):
                    received += len(chunk)
                    if expected is not None and received > expected:
                        raise NotThere(f"{url}: the server sends more than the {expected} bytes that it announces")
                    if received > self.max_bytes:
                        raise ValueError(f"{url} has more than {self.max_bytes} bytes, {self._too_small()}")
                    if received > room:
                        room = min(room + _ROOM, self.max_bytes)
                        self._make_room(aside, room)
                    target.write(chunk)
                target.truncate(received)
            if expected is not None and received != expected:
                raise OSError(f"received {received} of {expected} bytes")
            _check_tar(aside, url)

    def _too_small(self) -> str:
        return f"the cache holds {self.max_bytes}; raise its limit (cache_gigabytes) or use smaller shards"

    def _make_room(self, own: Path, wanted: int) -> None:
        """Makes `own` `wanted` bytes long, once nothing but it and what fits beside it is in the folder."""
        for _ in self.patience.tries():
            with locked(self.folder / "evict.lock", needed=False):
                files = []
                # In this order, as one that is renamed meanwhile is else in neither.
                for path in itertools.chain(self.folder.glob(".*.partial"), self.folder.glob("*.tar")):
                    with contextlib.suppress(FileNotFoundError):
                        stat = path.stat()
                        files.append((stat.st_atime_ns, path, stat.st_size))
                used = sum(size for _, path, size in files if path != own)
                for _, path, size in sorted(files):
                    if used + wanted <= self.max_bytes:
                        break
                    if path.suffix == ".tar":
                        path.unlink(missing_ok=True)
                        used -= size
                if used + wanted <= self.max_bytes:
                    os.truncate(own, wanted)
                    return
        raise ValueError(f"{self.folder} is full of shards that are being fetched at this moment, {self._too_small()}")


def _own_folder() -> Path:
    """Where this machine keeps what it fetched."""
    chosen = cache_folder()
    if is_shared(chosen) and not os.environ.get("PYRAMIDCLIP_CACHE"):
        own = Path(tempfile.gettempdir(), f"pyramidclip-{os.getuid()}")
        with contextlib.suppress(OSError):
            own.mkdir(mode=0o700, exist_ok=True)
            if own.lstat().st_uid == os.getuid() and not own.is_symlink():
                return own / "shards"
    return chosen / own_name("shards", chosen)


def remote_size(url: str) -> int | None:
    """The bytes that a server announces for a file; None where it does not say, or there is none."""
    system, name = _file_system(url)
    try:
        return system.info(name).get("size")
    except Exception:  # whoever reads it says what is wrong
        return None


def _check_tar(path: Path, url: str) -> None:
    try:
        with tarfile.open(path, "r:"):
            return
    except tarfile.TarError as error:
        with open(path, "rb") as file:
            start = file.read(40)
        raise NotThere(f"{url} is no tar ({error}); it begins with {start!r}", "not-a-tar") from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from, the first last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of any of fsspec's file systems carries, also where it is told as another one."""
    for one in _causes(error):
        for found in (getattr(one, "status", None), getattr(getattr(one, "response", None), "status_code", None)):
            if isinstance(found, int) and 400 <= found < 600:
                return found
    return None


def _missing(error: BaseException) -> str | None:
    """Why trying again does not help, in words; None where it may."""
    status = _status(error)
    if status is not None:
        waits = status >= 500 or status in (408, 425, 429)
        return None if waits else "not found" if status in (404, 410) else f"refused with HTTP status {status}"
    # fsspec turns whatever fails while it asks for a size into FileNotFoundError, and keeps the cause.
    if all(isinstance(one, FileNotFoundError) for one in _causes(error)):
        return f"not found ({error})"
    return f"refused ({error})" if isinstance(error, PermissionError) else None


def _called(error: BaseException | None) -> str:
    """What went wrong, by its own name: an HTTP status before the error that a library made of it."""
    if error is None:
        return "not tried"
    if (status := _status(error)) is not None:
        return f"HTTP status {status}" + (" (too many requests)" if status == 429 else "")
    first = [one for one in _causes(error) if not isinstance(one, FileNotFoundError)] or [error]
    text = str(first[0]).strip()
    return type(first[0]).__name__ + (f": {text}" if text else "")


def _retry_after(error: BaseException) -> float:
    """The seconds that a server asks to wait, else 0."""
    for one in _causes(error):
        for headers in (getattr(one, "headers", None), getattr(getattr(one, "response", None), "headers", None)):
            with contextlib.suppress(AttributeError, TypeError, ValueError):
                return max(float(headers.get("Retry-After")), 0.0)  # type: ignore[union-attr]
    return 0.0


def _file_system(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system of fsspec for a URL and the name in it; `ImportError` naming what to install."""
    try:
        import fsspec

        options: dict[str, Any] = {}
        if url.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
            options["client_kwargs"] = {"timeout": timeout}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ImportError(
            f'{url} cannot be read: {error}. pip install "pyramidclip-hf[train]" (from a checkout: pip install -e '
            '".[train]"), or for s3://, gs:// and others the package that fsspec names'
        ) from error


def read_small(url: str, patience: Patience | None = None, first: int | None = None) -> bytes | None:
    """The bytes of a small remote file (an index, `dataset.json`), or None where there is none.

    Args:
        url: of the file.
        patience: how often and how long it is tried; None: `FEW_TRIES`.
        first: only so many bytes of its beginning, or what there is.

    Raises:
        DownloadError: it is there and cannot be read, however often it is tried, or is larger than 512 MiB.
    """
    system, name = _file_system(url)
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        options["size"] = 1  # not asked for then
        if first is not None:
            options["headers"] = {**system.kwargs.get("headers", {}), "Range": f"bytes=0-{first - 1}"}
    problem: Exception | None = None
    number = 0
    for one in (patience or FEW_TRIES).tries():
        number = one.number
        try:
            with system.open(name, "rb", cache_type="none", block_size=0, **options) as file:
                data = _read_up_to(file, SMALL_FILE_BYTES + 1 if first is None else first)
        except Exception as error:  # every file system of fsspec has its own network errors
            if (missing := _missing(error)) is not None:
                if missing.startswith("not found"):
                    return None
                raise NotThere(f"{url}: {missing}") from error
            problem, one.pause_at_least = error, _retry_after(error)
            continue
        if len(data) > SMALL_FILE_BYTES:
            raise DownloadError(f"{url}: more than {SMALL_FILE_BYTES} bytes, which is no index and no dataset.json")
        return data
    raise DownloadError(f"{url}: {_called(problem)}; tried {number} times") from problem


def _read_up_to(file: Any, most: int) -> bytes:
    """So many bytes, or all that there are: a stream hands out what has arrived so far."""
    parts: list[bytes] = []
    while most > 0 and (part := file.read(min(most, _CHUNK))):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)
