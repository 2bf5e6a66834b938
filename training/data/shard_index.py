"""Where each sample of a tar shard lies: the index beside it, or one that is built once into a cache.

`NAME.tar.index.json` holds the offset and size of every member, so that a sample is read without unpacking the tar. Its
first line is a header with the number of samples, so that counting a data set does not mean parsing every offset. The
indexes that are written here also hold a checksum of each member, which is compared when it is read.
"""

import dataclasses
import hashlib
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple, NotRequired, Self, TypedDict

import numpy as np

from pyramidclip_hf.files import cache_folder, json_text, locked, read_regular, write_atomically
from training.data.machine import host, is_shared

INDEX_FORMAT = 1
# Its first line has no more.
HEADER_BYTES = 4096
# A tar consists of blocks of so many bytes.
BLOCK = 512
# An index is compared with the headers of about so many samples when it is opened, and with each one that is read.
_ROWS_LOOKED_AT = 16
# An index of a million samples has a tenth of it.
_MAX_INDEX_BYTES = 512 << 20
# Which members a new index takes in; an index that was cached under another rule is built anew.
_MEMBERS_RULE = 3


class Span(NamedTuple):
    """Where the bytes of a member are: offset in the tar, -1 where a sample lacks the member, and size, in bytes."""

    offset: int
    size: int


class NotATar(ValueError):
    """A file is not an uncompressed tar."""

    reason = "not-a-tar"


class IndexHeader(TypedDict):
    """The first line of an index; `tar_bytes` and the times are those of the tar that it was made from."""

    format: int
    samples: int
    tar_bytes: int
    mtime_ns: int
    truncated: bool
    keys_digest: str
    ctime_ns: NotRequired[int]


def sum_of(member: bytes) -> int:
    """32 bits of XXH3, never 0: one damaged member in four billion passes."""
    import xxhash

    return (xxhash.xxh3_64_intdigest(member) & 0xFFFFFFFF) or 1


def index_path(shard: str | os.PathLike[str]) -> Path:
    """The path of the index beside a shard."""
    return Path(f"{os.fspath(shard)}.index.json")


@dataclass
class ShardIndex:
    """Where each of the n samples of a shard lies.

    Attributes:
        keys: n names.
        suffixes: the S kinds of member.
        spans: (n, S, 2) int64, a `Span` for each sample and kind.
        tar_bytes: of the tar that the index was made from.
        mtime_ns: of the tar that the index was made from.
        truncated: the tar ends in the middle.
        ctime_ns: when the file was last changed on this machine, which no program can set back; 0: not known.
        sums: (n, S) uint32, `sum_of` each member, 0 where there is none; None: not known.
    """

    keys: list[str]
    suffixes: list[str]
    spans: np.ndarray
    tar_bytes: int
    mtime_ns: int
    truncated: bool = False
    ctime_ns: int = 0
    sums: np.ndarray | None = None

    def keys_digest(self) -> str:
        """A hash of the keys in order: what makes two shards the same data to a run that continues."""
        return hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def dumps(self) -> str:
        """JSON whose first line holds the header."""
        header = IndexHeader(
            format=INDEX_FORMAT,
            samples=len(self.keys),
            tar_bytes=self.tar_bytes,
            mtime_ns=self.mtime_ns,
            truncated=self.truncated,
            keys_digest=self.keys_digest(),
        )
        body: dict[str, Any] = {
            "suffixes": self.suffixes,
            "keys": self.keys,
            "spans": self.spans.reshape(len(self.keys), 2 * len(self.suffixes)).tolist(),
        }
        if self.ctime_ns:
            header["ctime_ns"] = self.ctime_ns
        if self.sums is not None:
            body["sums"] = self.sums.astype("<u4").tobytes().hex()
        return f'{{"header": {json_text(header)},\n{json_text(body, separators=(",", ":"))[1:]}'

    @classmethod
    def loads(cls, text: str) -> Self:
        """The index of what `dumps` gave.

        Raises:
            ValueError: anything that is not a consistent index.
        """
        try:
            data = json.loads(text)
            header, keys, suffixes = data["header"], data["keys"], data["suffixes"]
            if header["format"] != INDEX_FORMAT or header["samples"] != len(keys):
                raise ValueError(f"format {header['format']!r} with {len(keys)} keys")
            check_counts(header["samples"], header["tar_bytes"], header["keys_digest"])
            if not all(isinstance(name, str) for names in (keys, suffixes) for name in names):
                raise ValueError("a key or suffix that is no text")
            spans = np.array(data["spans"], np.int64).reshape(len(keys), len(suffixes), 2)
            found = cls(keys, suffixes, spans, header["tar_bytes"], header["mtime_ns"], header["truncated"])
            found.ctime_ns = header.get("ctime_ns", data.get("ctime_ns", 0))  # of older caches
            if "sums" in data:
                sums = np.frombuffer(bytes.fromhex(data["sums"]), "<u4")
                found.sums = sums.astype(np.uint32).reshape(len(keys), len(suffixes))
            return found
        except (KeyError, TypeError, OverflowError, RecursionError) as error:
            raise ValueError(f"not a shard index: {error!r}") from None


def read_index_header(path: str | os.PathLike[str]) -> IndexHeader:
    """The header of an index file, of which only the first line is read.

    Raises:
        ValueError: the file is no index.
        FileNotFoundError: it is absent.
    """
    if not S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait
        raise ValueError(f"{os.fspath(path)} is no file")
    with open(path, encoding="utf-8") as file:
        return parse_index_header(file.readline(HEADER_BYTES), os.fspath(path))


def parse_index_header(line: str, name: str) -> IndexHeader:
    """The header from the first line of an index called `name`.

    Raises:
        ValueError: the line is none.
    """
    try:
        header = json.loads(line.rstrip().removesuffix(",") + "}")["header"]
        if header["format"] != INDEX_FORMAT:
            raise ValueError(f"format {header['format']!r}")
        check_counts(header["samples"], header["tar_bytes"], header["keys_digest"])
        return header
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a shard index: {error}") from None


def check_counts(samples: object, tar_bytes: object, keys_digest: object) -> None:
    """Refuses what no tar can have, before memory is asked for it.

    Raises:
        ValueError: other types, or more samples than there are blocks.
    """
    if type(samples) is not int or type(tar_bytes) is not int or not isinstance(keys_digest, str):
        raise ValueError(f"expected numbers and a hash, found {samples!r}, {tar_bytes!r}, {keys_digest!r}"[:300])
    if not 0 <= samples <= tar_bytes // BLOCK:
        raise ValueError(f"{samples} samples in a tar of {tar_bytes} bytes"[:300])


def build_index(path: str | os.PathLike[str]) -> ShardIndex:
    """The index of the tar at `path`, from the headers in it.

    A tar that ends in the middle, or in which a header is damaged, gives the samples up to there, the cut one included
    (reading it raises `BadSample`), with `truncated` set. Links, folders and devices are ignored.

    Raises:
        NotATar: the file is not an uncompressed tar.
    """
    stat = os.stat(path)
    keys: list[str] = []
    samples: list[dict[str, Span]] = []
    truncated = False
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError:
                    truncated = True
                    break
                if member is None:
                    # tarfile takes a damaged header, too, for the end.
                    truncated = not _only_zeros_from(path, tar.offset)
                    break
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
                if not member.isreg() or member.issparse():
                    continue
                key, suffix = split_name(member.name)
                if not suffix:
                    continue
                if not keys or keys[-1] != key or suffix in samples[-1]:
                    keys.append(key)
                    samples.append({})
                samples[-1][suffix] = Span(member.offset_data, member.size)
                truncated |= member.offset_data + member.size > stat.st_size
    except tarfile.ReadError as error:
        if stat.st_size:
            raise NotATar(
                f"{os.fspath(path)} is not an uncompressed tar ({error}); shards must not be gzipped, unpack them first"
            ) from None
        truncated = True
    suffixes = sorted({suffix for sample in samples for suffix in sample})
    truncated = truncated or not _has_end(path, stat.st_size)
    spans = span_table(samples, suffixes)
    return ShardIndex(keys, suffixes, spans, stat.st_size, stat.st_mtime_ns, truncated, stat.st_ctime_ns)


def span_table(samples: list[dict[str, Span]], suffixes: list[str]) -> np.ndarray:
    """The spans {suffix: span} of n samples as an int64 array (n, S, 2)."""
    absent = Span(-1, -1)
    table = [[spans.get(suffix, absent) for suffix in suffixes] for spans in samples]
    return np.array(table, np.int64).reshape(len(samples), len(suffixes), 2)


def split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a member's name, cut at the first dot of its last component, as WebDataset does.

    Returns:
        The key with its folders, and the suffix in lower case, empty where there is no dot or the name begins with it:
        macOS's tar puts a `._KEY.jpg` in front of each `KEY.jpg`.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower() if stem else ""


def differs_from_tar(path: str | os.PathLike[str], index: ShardIndex) -> str | None:
    """What an index says otherwise than all the headers of its tar, of which opening looks at a few; None: nothing."""
    fresh = build_index(path)
    if fresh.keys != index.keys:
        return f"its index has {len(index.keys)} samples, its headers {len(fresh.keys)}, and their keys differ"
    if fresh.suffixes != index.suffixes or not np.array_equal(fresh.spans, index.spans):
        return "members lie elsewhere in the tar than its index says"
    return None


def _only_zeros_from(path: str | os.PathLike[str], offset: int) -> bool:
    """Whether nothing but the padding of a tar's end follows."""
    with open(path, "rb") as file:
        file.seek(offset)
        return not any(any(piece) for piece in iter(lambda: file.read(1 << 16), b""))


def _has_end(path: str | os.PathLike[str], size: int) -> bool:
    """Whether a tar ends with the two empty blocks that closing it writes."""
    if size < 2 * BLOCK:
        return False
    with open(path, "rb") as file:
        file.seek(size - 2 * BLOCK)
        return not any(file.read())


def load_index(path: str | os.PathLike[str]) -> ShardIndex:
    """The index of the local tar at `path`: the one beside it, else a cached one, else newly built and cached.

    The index beside a shard counts where the tar's size is the recorded one and the members of the first, the last and
    some samples between lie where it says, in the sizes that it says; every other member is compared so when it is read
    (copying a data set changes times, so time does not count there). It also counts where the tar is shorter but starts
    the same: a truncated shard keeps its order, and what is cut off raises `BadSample` when read. A cached index counts
    for exactly the size and the times it was made from, of which one is the system's own and goes on with every change,
    where its members lie so too. Where the cache cannot be written, the index is only returned.

    Raises:
        NotATar: the file is not an uncompressed tar.
    """
    index = _read_index(index_path(path))
    if index is not None and _index_fits(path, index):
        return index
    cached = _cached_path(path)
    if (index := _cached_index(path, cached)) is not None:
        return index
    try:
        # The processes of a machine build it once; shards share locks, of which there are 256.
        with locked(cache_folder() / "locks" / f"{cached.name[:2]}.lock", needed=False):
            if (index := _cached_index(path, cached)) is None:
                index = build_index(path)
                cached.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(cached, index.dumps().encode("utf-8", "surrogateescape"))
            return index
    except OSError:
        if index is None:
            return build_index(path)
        return index  # no room, or not ours: it is built again next time


def add_sums(path: str | os.PathLike[str], index: ShardIndex, sums: np.ndarray) -> bool:
    """Keeps checksums with the index that `load_index` finds, beside the tar or in the cache; whether it could.

    Args:
        path: of the local tar.
        index: of `load_index`.
        sums: as `ShardIndex` has them.
    """
    beside = index_path(path)
    target = beside if beside.exists() else _cached_path(path)
    try:
        write_atomically(target, dataclasses.replace(index, sums=sums).dumps().encode("utf-8", "surrogateescape"))
    except OSError:
        return False
    return True


def cached_header(path: str | os.PathLike[str]) -> IndexHeader | None:
    """The header of the index in the cache of a tar that was at `path` and need not be any more; None without one."""
    try:
        return read_index_header(_cached_path(path))
    except (OSError, ValueError):
        return None


def counted_before(path: str | os.PathLike[str], stat: os.stat_result) -> IndexHeader | None:
    """The header of the cached index of the tar at `path` where that is as it was then, by what `stat` says of it.

    A hundredth of the time of `load_index`, which compares some samples too: whoever opens the tar does.
    """
    header = cached_header(path)
    if header is None:
        return None
    made_from = header["tar_bytes"], header.get("mtime_ns"), header.get("ctime_ns")
    return header if made_from == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) else None


def _cached_path(path: str | os.PathLike[str]) -> Path:
    place = os.path.abspath(path)
    # On another machine another tar may lie there.
    whose = f"{host()} " if is_shared(cache_folder()) and not is_shared(os.path.dirname(place)) else ""
    name = hashlib.sha256(f"{_MEMBERS_RULE} {whose}{place}".encode()).hexdigest()[:24]
    return cache_folder() / "indexes" / f"{name}.json"


def _cached_index(path: str | os.PathLike[str], cached: Path) -> ShardIndex | None:
    index, stat = _read_index(cached), os.stat(path)
    made_from = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if index is None or (index.tar_bytes, index.mtime_ns, index.ctime_ns) != made_from:
        return None
    # Some file systems have no time of their own.
    return index if _index_fits(path, index) else None


def _read_index(path: Path) -> ShardIndex | None:
    """The index in a file, or None where there is none that this version can read."""
    try:
        return ShardIndex.loads(read_regular(path, _MAX_INDEX_BYTES).decode("utf-8", "surrogateescape"))
    except (FileNotFoundError, ValueError):
        return None


def _index_fits(path: str | os.PathLike[str], index: ShardIndex) -> bool:
    """Whether the headers in a tar say what the index says; of all samples the first, the last and some between."""
    size = os.path.getsize(path)
    if size > index.tar_bytes:
        return False
    if not index.keys:
        return size == index.tar_bytes
    count = len(index.keys)
    rows = sorted({i * (count - 1) // _ROWS_LOOKED_AT for i in range(_ROWS_LOOKED_AT + 1)})
    with open(path, "rb") as file:
        for row in rows if size == index.tar_bytes else (0,):
            there = [(suffix, at, n) for suffix, (at, n) in zip(index.suffixes, index.spans[row].tolist()) if at >= 0]
            if not there or min(at for _, at, _ in there) < BLOCK:
                return False
            for suffix, offset, bytes_ in there:
                file.seek(offset - BLOCK)
                if not is_header_of(file.read(BLOCK), f"{index.keys[row]}.{suffix}", bytes_):
                    return False
    return True


def is_header_of(block: bytes, name: str, size: int) -> bool:
    """Whether a block of a tar is the header of a member of this name, whose suffix is in lower case, and size."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.size == size and _names_agree(header.name.lower(), name.lower())


def _names_agree(found: str, expected: str) -> bool:
    """Whether the name in a header is the expected one as far as it can be told.

    Long names and those that are not ASCII are cut or replaced there; the full one lies before the header.
    """
    if found == expected:
        return True
    if not expected.isascii():
        return True
    base, found_base = expected.rpartition("/")[2], found.rpartition("/")[2]
    return len(expected) > 100 and (expected.startswith(found[:80]) or base.startswith(found_base[:40]))
