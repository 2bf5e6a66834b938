"""Tar shards in the WebDataset layout with random access (docs/data.md).

A shard is an uncompressed tar whose neighbouring members share a key: `KEY.jpg`, `KEY.txt`, `KEY.json`,
`KEY.roi.npy`. The index beside it (`training.data.shard_index`) says where every member lies, so sample i is read with
one `pread` per member and without unpacking: nothing is ever extracted, so no member name can write anywhere.

Beside the shards, `dataset.json` says what made the levels, how wide the region features are, and how many samples
each shard holds.

`wids` and mosaicml-streaming come near this. Neither reads what a truncated shard still holds in its old order, nor
continues a run byte for byte from any position on another number of processes.
"""

import contextlib
import fcntl
import io
import json
import os
import tarfile
import time
from collections.abc import Container, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from pyramidclip_command import Failure
from pyramidclip_hf.files import json_text, named, read_regular, visible, write_atomically, write_text
from training.data.records import IMAGE_SUFFIXES, BadSample, Sample, members_from_sample
from training.data.remote import SMALL_FILE_BYTES, NotThere, ShardCache, is_url, read_small
from training.data.shard_index import (
    BLOCK,
    NotATar,
    ShardIndex,
    Span,
    add_sums,
    index_path,
    is_header_of,
    load_index,
    span_table,
    sum_of,
)

DATASET_FORMAT = 1
MAX_MEMBER_BYTES = 256 << 20
# A process that was killed a moment ago may still end.
WAIT_FOR_OTHERS = 30.0  # seconds
_REMOVE_INDEX = "remove the .index.json beside the tar, which is of another one, or copy the tar again"


def check_key(key: str) -> None:
    """Raises `ValueError` for what is no relative name without dots in its last component."""
    parts = key.split("/")
    if not parts[-1] or "." in parts[-1] or ".." in parts or "" in parts or "\\" in key or "\0" in key:
        raise ValueError(
            f"key {key!r}: expected a relative name without dots in its last part (where the suffix starts)"
        )


class ShardWriter:
    """Writes one shard: a context manager with `.write(sample)` and `.write_members(key, {suffix: bytes})`.

    The tar grows as `NAME.tar.partial`; leaving the block without an exception renames it to `NAME.tar` and puts the
    index beside it, leaving it with one removes it. So a shard under its own name is complete. Times and owners in
    the tar are fixed: equal samples give equal bytes. One process at a time writes a shard.

    Raises:
        ValueError: `path` does not end in .tar.
        Failure: another process writes this shard, where the block begins.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if self.path.suffix != ".tar":
            raise ValueError(f"shard {self.path}: expected a name that ends in .tar")
        self._keys: list[str] = []
        self._spans: list[dict[str, Span]] = []
        self._sums: list[dict[str, int]] = []
        self._seen: set[str] = set()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(f"{self.path}.partial")
        self._file = _opened_alone(self._partial)
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8")
        return self

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def bytes_written(self) -> int:
        """How large the tar is so far, in bytes."""
        return self._file.tell()

    def write(self, sample: Sample) -> None:
        """Appends a sample; raises as `write_members`."""
        self.write_members(sample.key, members_from_sample(sample))

    def write_members(self, key: str, members: Mapping[str, bytes]) -> None:
        """Appends the members of one sample.

        Args:
            key: a relative name without dots in its last component.
            members: suffix -> bytes.

        Raises:
            ValueError: the key has a dot in its last component, is absolute, leaves its folder or came before; there
                are no members.
        """
        check_key(key)
        if key in self._seen:
            raise ValueError(f"key {key!r} is already in {self.path}")
        if not members:
            raise ValueError(f"sample {key!r} has no members")
        self._seen.add(key)
        spans = {}
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            info.mode = 0o644
            try:
                self._tar.addfile(info, io.BytesIO(data))
            except OSError as error:
                raise named(error, self._partial) from error
            padded = -(-len(data) // BLOCK) * BLOCK
            spans[suffix] = Span(self._tar.offset - padded, len(data))
        self._keys.append(key)
        self._spans.append(spans)
        self._sums.append({suffix: sum_of(data) for suffix, data in members.items()})

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._abandon()
            raise named(error, self._partial) from error
        stat = os.fstat(self._file.fileno())
        suffixes = sorted({suffix for spans in self._spans for suffix in spans})
        # Times in the index would make the same shard differ from run to run; beside a shard they do not count.
        index = ShardIndex(self._keys, suffixes, span_table(self._spans, suffixes), stat.st_size, 0)
        table = [[sums.get(suffix, 0) for suffix in suffixes] for sums in self._sums]
        index.sums = np.array(table, np.uint32).reshape(len(table), len(suffixes))
        index_path(self.path).unlink(missing_ok=True)
        os.replace(self._partial, self.path)
        self._file.close()  # not before: nobody else may take it for one that was left behind
        write_atomically(index_path(self.path), index.dumps().encode())

    def _abandon(self) -> None:
        self._partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what is still in its buffer finds no room either
            self._file.close()


def _opened_alone(path: Path) -> BinaryIO:
    """An empty file that this process alone writes, as long as it is open; what a killed one left under its name goes.

    Raises:
        Failure: another process has it open, and still does after `WAIT_FOR_OTHERS`.
    """
    end = time.monotonic() + WAIT_FOR_OTHERS
    while True:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # what another writes stays
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            if time.monotonic() > end:
                raise Failure(
                    f"{path} is being written by another process: two commands have a share of the same shards. Give "
                    "each its own --part-index of one --part-count, or wait for the other one to end"
                ) from error
            time.sleep(0.2)
            continue
        except OSError:  # a file system without locks
            pass
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                file.truncate(0)
                return file
        file.close()  # whoever wrote it renamed or removed it meanwhile


class ShardReader:
    """Random access to the samples of one shard: `len(reader)`, `reader.keys`, `reader.read(i)`.

    Reads go through `pread`, so a reader may be shared by threads and survives a fork.

    Args:
        path_or_url: a local tar, or a URL that fsspec opens (`https://`, `hf://`, ...), fetched whole.
        cache: where fetched shards lie; default: `ShardCache()`.

    Raises:
        FileNotFoundError: no such file.
        NotATar: the file is not an uncompressed tar.
        OSError: the shard cannot be fetched (`DownloadError`), or is evicted before it can be opened.
    """

    def __init__(self, path_or_url: str | os.PathLike[str], cache: ShardCache | None = None):
        self.name = os.fspath(path_or_url)
        self._file: int | None = None
        self._taken: np.ndarray | None = None
        if is_url(self.name):
            self._open_fetched(cache or ShardCache())
        else:
            if not os.path.isfile(self.name):
                raise FileNotFoundError(f"no shard at {self.name}")
            self._open(Path(path_or_url))

    def _open(self, path: Path) -> None:
        self.path = path
        # Opened before the index is read: a cache may evict the file meanwhile, an open one stays readable.
        self._file = os.open(path, os.O_RDONLY)
        try:
            self.index = load_index(path)
        except BaseException:
            self.close()
            raise

    def _open_fetched(self, cache: ShardCache) -> None:
        problem: NotATar | None = None
        for _ in range(3):
            try:
                return self._open(cache.fetch(self.name))
            except FileNotFoundError:
                continue  # evicted by another process between fetching and opening
            except NotATar as error:  # damaged since it was fetched
                cache.forget(self.name)
                problem = error
                continue
        if problem is not None:
            raise NotThere(f"{self.name}: {problem}", "not-a-tar")
        raise OSError(
            f"{self.name}: evicted from {cache.folder} again and again before it could be opened; the cache of "
            f"{cache.max_bytes} bytes is too small for the shards that are read at a time"
        )

    def _handle(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.name} is closed")
        return self._file

    @property
    def keys(self) -> list[str]:
        """The keys of the samples, in the order of the tar."""
        return self.index.keys

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        return self.index.keys[i]

    @property
    def truncated(self) -> bool:
        """Whether the tar ends before its last sample does."""
        return self.index.truncated or os.fstat(self._handle()).st_size < self.index.tar_bytes

    def __len__(self) -> int:
        return len(self.index.keys)

    def read(self, i: int, suffixes: Container[str] | None = None) -> dict[str, bytes]:
        """The members of sample `i`.

        Args:
            i: from 0.
            suffixes: the members wanted; None: all.

        Returns:
            Suffix -> bytes, of the wanted members that the sample has.

        Raises:
            IndexError: outside the shard.
            BadSample: `truncated-shard`, `member-too-large` or `read-error`: the bytes cannot be had;
                `stale-index`: the tar was changed after its index was made, or this header in it is damaged;
                `damaged-member`: its bytes are not those that were written.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {self.name}, which has {len(self)}")
        members, file = {}, self._handle()
        known = None if self.index.sums is None else self.index.sums[i].tolist()
        for number, (suffix, (offset, size)) in enumerate(zip(self.index.suffixes, self.index.spans[i].tolist())):
            if offset < 0 or (suffixes is not None and suffix not in suffixes):
                continue
            if size > MAX_MEMBER_BYTES:
                detail = f".{suffix} has {size} bytes, at most {MAX_MEMBER_BYTES} are read"
                raise BadSample(self.keys[i], self.name, "member-too-large", detail)
            if offset < BLOCK:
                raise BadSample(self.keys[i], self.name, "stale-index", f".{suffix} at byte {offset}: {_REMOVE_INDEX}")
            try:
                # The member's header comes along, which costs no read more.
                found = os.pread(file, BLOCK + size, offset - BLOCK)
            except OSError as error:
                raise BadSample(self.keys[i], self.name, "read-error", str(error)) from None
            if len(found) != BLOCK + size:
                detail = f".{suffix} has {max(len(found) - BLOCK, 0)} of {size} bytes"
                raise BadSample(self.keys[i], self.name, "truncated-shard", detail)
            if not is_header_of(found[:BLOCK], f"{self.keys[i]}.{suffix}", size):
                detail = f"no .{suffix} of {size} bytes where the index says: {_REMOVE_INDEX}"
                raise BadSample(self.keys[i], self.name, "stale-index", detail)
            members[suffix] = found[BLOCK:]
            if known is not None and known[number] and known[number] != sum_of(members[suffix]):
                detail = f".{suffix} is not what was written, its checksum differs: copy the tar again"
                raise BadSample(self.keys[i], self.name, "damaged-member", detail)
            if self._taken is not None:
                self._taken[i, number] = sum_of(members[suffix])
        return members

    def lacks_picture(self, i: int) -> str:
        """The suffixes that sample `i` has, where none is a picture's."""
        offsets = self.index.spans[i, :, 0].tolist()
        there = [suffix for suffix, offset in zip(self.index.suffixes, offsets) if offset >= 0]
        if set(there) & set(IMAGE_SUFFIXES):
            return ""
        return f"{self.keys[i]} of {self.name} has {', '.join(there)} alone"

    def take_sums(self) -> None:
        """Begins to take a checksum of each member that is read, where the index has none."""
        if self.index.sums is None:
            self._taken = np.zeros(self.index.spans.shape[:2], np.uint32)

    def keep_sums(self) -> bool:
        """Keeps what `take_sums` took with the index; False: there was nothing to take, or no place."""
        taken, self._taken = self._taken, None
        return taken is not None and not is_url(self.name) and add_sums(self.path, self.index, taken)

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def write_dataset_json(
    folder: str | os.PathLike[str],
    made_by: Mapping[str, Any],
    roi_feature_size: int | None,
    counts: Mapping[str, Any],
    **extra: Any,
) -> dict[str, Any]:
    """Writes `dataset.json` beside the shards of a folder.

    Args:
        folder: with the complete shards.
        made_by: level or step -> what made it, e.g. `{"regions": "vinvl-x152c4"}`.
        roi_feature_size: F, or None where no sample has region features.
        counts: whatever the maker counted; `samples` is filled in from the shards.
        **extra: further keys (`attribution`, ...).

    Returns:
        The content. Its key `shards` lists name -> samples, bytes and hash of the keys, so that a reader of remote
        shards knows them without fetching.
    """
    folder = Path(folder)
    shards: dict[str, dict[str, Any]] = {}
    for shard in visible(folder, "*.tar"):
        index = load_index(shard)
        told = {"samples": len(index.keys), "bytes": index.tar_bytes, "keys_digest": index.keys_digest()}
        shards[shard.name] = told | ({"truncated": True} if index.truncated else {})
    content = {
        "format": DATASET_FORMAT,
        "made_by": dict(made_by),
        "roi_feature_size": roi_feature_size,
        "counts": {"samples": sum(s["samples"] for s in shards.values()), **counts},
        **extra,
        "shards": shards,
    }
    write_text(folder / "dataset.json", json_text(content, indent=1, ensure_ascii=False) + "\n")
    return content


def refuse_unfinished(folder: str | os.PathLike[str], described: Mapping[str, Any], may_be_set: bool = False) -> None:
    """Refuses a folder of which a step of preparation has begun and not ended.

    Its levels are of two makers, or some of its shards are missing.

    Args:
        folder: in the message.
        described: the content of its `dataset.json`.
        may_be_set: whoever asked has a setting `allow_unfinished`, which the message names then.

    Raises:
        ValueError: it lists steps under `unfinished`.
    """
    if steps := described.get("unfinished"):
        names = ", ".join(map(str, steps)) if isinstance(steps, list) else str(steps)
        raise ValueError(
            f"{os.fspath(folder)}: {names} has begun and not ended, says its dataset.json: some shards are as before, "
            "others as after. Run that step again, which goes on where it was"
            + ("; or, to use the data as they are, set --allow-unfinished" if may_be_set else "")
        )


def read_dataset_json(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """The content of `dataset.json` of a local folder or URL, or None where there is none.

    Raises:
        ValueError: the file is there but unreadable or of an unknown format.
    """
    name = f"{os.fspath(folder).rstrip('/')}/dataset.json"
    path = Path(name)
    data = read_small(name) if is_url(name) else read_regular(path, SMALL_FILE_BYTES) if path.exists() else None
    if data is None:
        return None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != DATASET_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name}: format {found!r}, expected {DATASET_FORMAT}; it was written by another version")
    wrong = [key for key in ("made_by", "shards", "counts") if not isinstance(content.get(key, {}), dict)]
    if wrong:
        raise ValueError(f"{name}: {wrong[0]} is a {type(content[wrong[0]]).__name__}, expected a mapping")
    return content
