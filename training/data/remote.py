"""What lies behind a URL: shards, fetched whole into a bounded folder, and small files (docs/data.md).

fsspec opens `https://`, `hf://`, `s3://` and the rest. A shard is downloaded beside its name and renamed when its
size is the announced one, so a file under its own name is whole; processes and loader workers that want the same
shard wait for one download. What was used longest ago goes first when the folder is full; a shard that is open stays
readable after it has been evicted.
"""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyramidclip_hf.files import cache_folder, locked, written_aside

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

DEFAULT_MAX_BYTES = 64 << 30
SMALL_FILE_BYTES = 512 << 20
_CHUNK = 1 << 20


class DownloadError(OSError):
    """A shard could not be fetched; the message names the URL, what went wrong and how often it was tried."""


def is_url(name: str | os.PathLike[str]) -> bool:
    """Whether a name goes through fsspec (`https://`, `hf://`, `s3://`, ...) rather than the file system."""
    return "://" in os.fspath(name)


class ShardCache:
    """A folder of downloaded shards.

    Args:
        folder: default: `shards` in `cache_folder()`.
        max_bytes: of all shards in it together.
        attempts: downloads of one shard before `DownloadError`.
        backoff: seconds before the second attempt, doubled for each further one.

    Raises:
        ValueError: a number that is not positive.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        max_bytes: int = DEFAULT_MAX_BYTES,
        attempts: int = 4,
        backoff: float = 1.0,
    ):
        if max_bytes <= 0 or attempts < 1:
            raise ValueError(f"max_bytes {max_bytes} and attempts {attempts}: expected positive numbers")
        self.folder = Path(folder) if folder else cache_folder() / "shards"
        self.max_bytes, self.attempts, self.backoff = max_bytes, attempts, backoff

    def path_of(self, url: str) -> Path:
        """Where the shard of `url` lies once fetched."""
        digest = hashlib.sha256(url.encode()).hexdigest()[:20]
        return self.folder / f"{digest}.tar"

    def fetch(self, url: str) -> Path:
        """The local path of the shard at `url`, which is downloaded where it is not there.

        Raises:
            DownloadError: every attempt failed or came out short.
            ValueError: the shard is larger than the whole cache.
            ImportError: what fsspec needs for such a URL is not installed.
        """
        path = self.path_of(url)
        if not path.exists():
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    self._download_with_retries(url, path)
        stat = os.stat(path)
        # The access time says when it was used last; the modification time must stay, indexes go by it.
        os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return path

    def _download_with_retries(self, url: str, path: Path) -> None:
        problem: Exception | None = None
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.backoff * 2 ** (attempt - 1))
            try:
                return self._download(url, path)
            except FileNotFoundError as error:
                raise DownloadError(f"{url}: not found ({error})") from None
            except (ValueError, ImportError):
                raise
            except Exception as error:  # every file system of fsspec has its own network errors
                problem = error
        raise DownloadError(f"{url}: {type(problem).__name__}: {problem}; tried {self.attempts} times") from problem

    def _download(self, url: str, path: Path) -> None:
        system, name = _file_system(url)
        # Listings are cached by fsspec; a shard that was replaced must not be judged by its old size.
        system.invalidate_cache()
        expected = system.info(name).get("size")
        if expected is not None and expected > self.max_bytes:
            raise ValueError(
                f"{url} has {expected} bytes, the cache holds {self.max_bytes}; raise its limit or use smaller shards"
            )
        self._make_room(expected or 0)
        with written_aside(path, sole_writer=True) as aside:
            received = 0
            with system.open(name, "rb", cache_type="none", block_size=0) as source, open(aside, "wb") as target:
                while chunk := source.read(_CHUNK):
                    target.write(chunk)
                    received += len(chunk)
            if expected is not None and received != expected:
                raise OSError(f"received {received} of {expected} bytes")
            if received % 512 or received < 1024:
                raise OSError(f"received {received} bytes, which is not the length of a tar")

    def _make_room(self, wanted: int) -> None:
        with locked(self.folder / "evict.lock"):
            files = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    files.append((stat.st_atime_ns, path, stat.st_size))
            used = sum(size for _, _, size in files)
            for _, path, size in sorted(files):
                if used + wanted <= self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= size


def _file_system(url: str) -> tuple["AbstractFileSystem", str]:
    """The file system of fsspec for a URL and the name in it; `ImportError` naming what to install."""
    try:
        import fsspec

        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise ImportError(
            f'{url} cannot be read: {error}. pip install "pyramidclip-hf[train]" (from a checkout: pip install -e '
            '".[train]"), or for s3://, gs:// and others the package that fsspec names'
        ) from error


def read_small(url: str) -> bytes | None:
    """The bytes of a small remote file (an index, `dataset.json`), or None where there is none.

    Raises:
        DownloadError: it is there and cannot be read, or is larger than 512 MiB.
    """
    system, name = _file_system(url)
    try:
        with system.open(name, "rb", cache_type="none", block_size=0) as file:
            data = file.read(SMALL_FILE_BYTES + 1)
    except Exception as error:  # every file system of fsspec has its own network errors
        # The Hub's file system says "not found" with an error of its own when a file is read as a stream.
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, FileNotFoundError) or status == 404:
            return None
        raise DownloadError(f"{url}: {type(error).__name__}: {error}") from error
    if len(data) > SMALL_FILE_BYTES:
        raise DownloadError(f"{url}: more than {SMALL_FILE_BYTES} bytes, which is no index and no dataset.json")
    return data
