"""Tar shards in the WebDataset layout with random access (design section 6).

A shard is an uncompressed tar whose neighbouring members share a key: `KEY.jpg`, `KEY.txt`, `KEY.json`,
`KEY.roi.npy`. Beside it lies `NAME.tar.index.json` with the offset and size of every member, so that sample i is read
with one `pread` per member and without unpacking: nothing is ever extracted, so no member name can write anywhere.
The index is built once, into a cache, where it is absent.

Beside the shards, `dataset.json` says what made the levels, how wide the region features are, and how many samples
each shard holds.
"""

import hashlib
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramidclip_hf.files import cache_folder, write_atomically
from training.data.records import BadSample, members_from_sample

INDEX_FORMAT = 1
DATASET_FORMAT = 1
MAX_MEMBER_BYTES = 256 << 20
_BLOCK = 512


def index_path(shard):
    """The path of the index beside a shard."""
    return Path(f"{shard}.index.json")


@dataclass
class ShardIndex:
    """Where each sample of a shard lies.

    `keys` (n) names; `suffixes` (S) the kinds of member; `spans` int64 (n, S, 2): offset and size in bytes, offset -1
    where a sample lacks the member. `tar_bytes` and `mtime_ns` identify the tar it was made from; `truncated` says
    that the tar ends in the middle.
    """

    keys: list
    suffixes: list
    spans: np.ndarray
    tar_bytes: int
    mtime_ns: int
    truncated: bool = False

    def keys_digest(self):
        """A hash of the keys in order: what makes two shards the same data to a run that continues."""
        return hashlib.sha256("\n".join(self.keys).encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def dumps(self):
        """JSON whose first line holds the header, so that counting samples does not mean parsing every offset."""
        header = {
            "format": INDEX_FORMAT,
            "samples": len(self.keys),
            "tar_bytes": self.tar_bytes,
            "mtime_ns": self.mtime_ns,
            "truncated": self.truncated,
            "keys_digest": self.keys_digest(),
        }
        body = {
            "suffixes": self.suffixes,
            "keys": self.keys,
            "spans": self.spans.reshape(len(self.keys), 2 * len(self.suffixes)).tolist(),
        }
        return f'{{"header": {json.dumps(header)},\n{json.dumps(body, separators=(",", ":"))[1:]}'

    @classmethod
    def loads(cls, text):
        """Raises `ValueError` on anything that is not a consistent index."""
        try:
            data = json.loads(text)
            header, keys, suffixes = data["header"], data["keys"], data["suffixes"]
            if header["format"] != INDEX_FORMAT or header["samples"] != len(keys):
                raise ValueError(f"format {header['format']!r} with {len(keys)} keys")
            spans = np.array(data["spans"], np.int64).reshape(len(keys), len(suffixes), 2)
            return cls(keys, suffixes, spans, header["tar_bytes"], header["mtime_ns"], header["truncated"])
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"not a shard index: {error!r}") from None


def read_index_header(path):
    """The header of an index file (dict with `samples`, `tar_bytes`, `keys_digest`, ...), reading its first line only.

    Raises `ValueError` where the file is no index, `FileNotFoundError` where it is absent.
    """
    with open(path, encoding="utf-8") as file:
        return parse_index_header(file.readline(4096), path)


def parse_index_header(line, name):
    """The header from the first line of an index called `name`; `ValueError` where it is none."""
    try:
        header = json.loads(line.rstrip().removesuffix(",") + "}")["header"]
        if header["format"] != INDEX_FORMAT:
            raise ValueError(f"format {header['format']!r}")
        return header
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name} is not a shard index: {error}") from None


def build_index(path):
    """Reads the headers of the tar at `path` and returns its `ShardIndex`.

    A tar that ends in the middle gives the samples up to there, the cut one included (reading it raises `BadSample`),
    with `truncated` set. Links, folders and devices are ignored. Raises `ValueError` where the file is not an
    uncompressed tar.
    """
    stat = os.stat(path)
    keys, samples, truncated = [], [], False
    try:
        with tarfile.open(path, "r:") as tar:
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError:
                    truncated = True
                    break
                if member is None:
                    break
                tar.members = []  # tarfile keeps every header otherwise
                if not member.isreg() or member.issparse():
                    continue
                key, suffix = split_name(member.name)
                if not suffix:
                    continue
                if not keys or keys[-1] != key or suffix in samples[-1]:
                    keys.append(key)
                    samples.append({})
                samples[-1][suffix] = (member.offset_data, member.size)
                truncated |= member.offset_data + member.size > stat.st_size
    except tarfile.ReadError as error:
        if stat.st_size:
            raise ValueError(
                f"{path} is not an uncompressed tar ({error}); shards must not be gzipped, unpack them first"
            ) from None
        truncated = True
    suffixes = sorted({suffix for sample in samples for suffix in sample})
    spans = np.full((len(keys), len(suffixes), 2), -1, np.int64)
    for row, sample in zip(spans, samples):
        for suffix, span in sample.items():
            row[suffixes.index(suffix)] = span
    return ShardIndex(
        keys, suffixes, spans, stat.st_size, stat.st_mtime_ns, truncated or not _has_end(path, stat.st_size)
    )


def split_name(name):
    """Splits a member name into key and suffix at the first dot of its last component, as WebDataset does; the suffix
    in lower case."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()


def _has_end(path, size):
    """Whether a tar ends with the two empty blocks that closing it writes."""
    if size < 2 * _BLOCK:
        return False
    with open(path, "rb") as file:
        file.seek(size - 2 * _BLOCK)
        return not any(file.read())


def load_index(path):
    """The index of the local tar at `path`: the one beside it, else a cached one, else newly built and cached.

    The index beside a shard counts where the tar's size is the recorded one and the first and last members lie where
    it says (copying a data set changes times, so time does not count there). It also counts where the tar is shorter
    but starts the same: a truncated shard keeps its order, and what is cut off raises `BadSample` when read. A cached
    index counts for exactly the size and time it was made from.
    """
    beside = index_path(path)
    if beside.exists():
        try:
            index = ShardIndex.loads(beside.read_text(encoding="utf-8", errors="surrogateescape"))
        except ValueError:
            index = None
        if index is not None and _index_fits(path, index):
            return index
    stat = os.stat(path)
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:24]
    cached = cache_folder() / "indexes" / f"{name}.json"
    if cached.exists():
        try:
            index = ShardIndex.loads(cached.read_text(encoding="utf-8", errors="surrogateescape"))
            if (index.tar_bytes, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return index
        except ValueError:
            pass  # written by another version: built anew below
    index = build_index(path)
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cached, index.dumps().encode("utf-8", "surrogateescape"))
    return index


def _index_fits(path, index):
    size = os.path.getsize(path)
    if size > index.tar_bytes:
        return False
    if not len(index.keys):
        return size == index.tar_bytes
    with open(path, "rb") as file:
        for row in (0, -1) if size == index.tar_bytes else (0,):
            suffix, (offset, _) = next((s, span) for s, span in zip(index.suffixes, index.spans[row]) if span[0] >= 0)
            file.seek(offset - _BLOCK)
            try:
                found = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "surrogateescape").name
            except tarfile.HeaderError:
                return False
            expected = f"{index.keys[row]}.{suffix}"
            # Long names are cut in the plain header (the full one lies in an extended header before it).
            if not (
                found.lower() == expected.lower()
                or (len(expected.encode()) > 100 and expected.lower().startswith(found.lower()[:80]))
            ):
                return False
    return True


class ShardWriter:
    """Writes one shard: a context manager with `.write(sample)` and `.write_members(key, {suffix: bytes})`.

    The tar grows as `NAME.tar.partial`; leaving the block without an exception renames it to `NAME.tar` and puts the
    index beside it, leaving it with one removes it. So a shard under its own name is complete. Times and owners in
    the tar are fixed: equal samples give equal bytes.
    """

    def __init__(self, path):
        self.path = Path(path)
        if self.path.suffix != ".tar":
            raise ValueError(f"shard {self.path}: expected a name that ends in .tar")
        self._keys, self._spans, self._suffixes, self._seen = [], [], {}, set()

    def __enter__(self):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._partial = Path(f"{self.path}.partial")
        self._file = open(self._partial, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8")
        return self

    def __len__(self):
        return len(self._keys)

    @property
    def bytes_written(self):
        """How large the tar is so far, in bytes."""
        return self._file.tell()

    def write(self, sample):
        """Appends a `records.Sample`."""
        self.write_members(sample.key, members_from_sample(sample))

    def write_members(self, key, members):
        """Appends the members {suffix: bytes} of one sample.

        Raises `ValueError` on a key that has a dot in its last component, is absolute, leaves its folder or came
        before.
        """
        parts = key.split("/")
        if not parts[-1] or "." in parts[-1] or ".." in parts or "" in parts or "\\" in key or "\0" in key:
            raise ValueError(
                f"key {key!r}: expected a relative name without dots in its last part (where the suffix starts)"
            )
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
            self._tar.addfile(info, io.BytesIO(data))
            padded = -(-len(data) // _BLOCK) * _BLOCK
            spans[suffix] = (self._tar.offset - padded, len(data))
            self._suffixes.setdefault(suffix, len(self._suffixes))
        self._keys.append(key)
        self._spans.append(spans)

    def __exit__(self, kind, value, trace):
        if kind is not None:
            self._file.close()
            self._partial.unlink(missing_ok=True)
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        stat = os.stat(self._partial)
        suffixes = sorted(self._suffixes)
        table = [[spans.get(suffix, (-1, -1)) for suffix in suffixes] for spans in self._spans]
        spans = np.array(table, np.int64).reshape(len(self._keys), len(suffixes), 2)
        # Times in the index would make the same shard differ from run to run; beside a shard they do not count.
        index = ShardIndex(self._keys, suffixes, spans, stat.st_size, 0)
        index_path(self.path).unlink(missing_ok=True)
        os.replace(self._partial, self.path)
        write_atomically(index_path(self.path), index.dumps().encode())


class ShardReader:
    """Random access to the samples of one shard.

    `ShardReader(path)` for a local tar, `ShardReader(url)` for `https://`, `hf://` and whatever else fsspec opens
    (fetched whole into a bounded cache, see `training.data.remote`). `len(reader)`, `reader.keys`, `reader.read(i)`.
    Reads go through `pread`, so a reader may be shared by threads and survives a fork.
    """

    def __init__(self, path_or_url, cache=None):
        self.name, self._file = str(path_or_url), None
        if is_url(self.name):
            self._open_fetched(cache)
        else:
            if not os.path.exists(self.name):
                raise FileNotFoundError(f"no shard at {self.name}")
            self._open(Path(path_or_url))

    def _open(self, path):
        self.path = path
        # Opened before the index is read: a cache may evict the file meanwhile, an open one stays readable.
        self._file = os.open(path, os.O_RDONLY)
        try:
            self.index = load_index(path)
        except BaseException:
            self.close()
            raise

    def _open_fetched(self, cache):
        from training.data.remote import ShardCache

        cache = cache or ShardCache()
        for _ in range(3):
            try:
                return self._open(cache.fetch(self.name))
            except FileNotFoundError:
                continue  # evicted by another process between fetching and opening
        raise OSError(
            f"{self.name}: evicted from {cache.folder} again and again before it could be opened; the cache of "
            f"{cache.max_bytes} bytes is too small for the shards that are read at a time"
        )

    @property
    def keys(self):
        """The keys of the samples, in the order of the tar."""
        return self.index.keys

    def key(self, i):
        """The key of sample `i`."""
        return self.index.keys[i]

    @property
    def truncated(self):
        """Whether the tar ends before its last sample does."""
        return self.index.truncated or os.fstat(self._file).st_size < self.index.tar_bytes

    def __len__(self):
        return len(self.index.keys)

    def read(self, i, suffixes=None):
        """The members {suffix: bytes} of sample `i`; with `suffixes`, those of them that it has.

        Raises `IndexError` outside the shard, `BadSample` (`truncated-shard`, `member-too-large`, `read-error`) where
        the bytes cannot be had.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {self.name}, which has {len(self)}")
        members = {}
        for suffix, (offset, size) in zip(self.index.suffixes, self.index.spans[i].tolist()):
            if offset < 0 or (suffixes is not None and suffix not in suffixes):
                continue
            if size > MAX_MEMBER_BYTES:
                raise BadSample(
                    self.keys[i],
                    self.name,
                    "member-too-large",
                    f".{suffix} has {size} bytes, at most {MAX_MEMBER_BYTES} are read",
                )
            try:
                data = os.pread(self._file, size, offset)
            except OSError as error:
                raise BadSample(self.keys[i], self.name, "read-error", str(error)) from None
            if len(data) != size:
                raise BadSample(
                    self.keys[i], self.name, "truncated-shard", f".{suffix} has {len(data)} of {size} bytes"
                )
            members[suffix] = data
        return members

    def close(self):
        """Closes the file; reading afterwards is an error."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self.close()


def is_url(name):
    """Whether a shard name goes through fsspec (`https://`, `hf://`, `s3://`, ...) rather than the file system."""
    return "://" in str(name)


def write_dataset_json(folder, made_by, roi_feature_size, counts, **extra):
    """Writes `dataset.json` beside the shards of `folder` and returns its content.

    Args: `made_by` {level or step: what made it}, e.g. `{"regions": "vinvl-x152c4"}`; `roi_feature_size` F or None
    where no sample has region features; `counts` whatever counts the maker has (`samples` is filled in from the
    shards); `extra` further keys (`attribution`, ...). The key `shards` lists name -> samples and bytes, so that a
    reader of remote shards knows the sizes without fetching them.
    """
    folder = Path(folder)
    shards = {}
    for shard in sorted(folder.glob("*.tar")):
        index = load_index(shard)
        shards[shard.name] = {"samples": len(index.keys), "bytes": index.tar_bytes, "keys_digest": index.keys_digest()}
    content = {
        "format": DATASET_FORMAT,
        "made_by": dict(made_by),
        "roi_feature_size": roi_feature_size,
        "counts": {"samples": sum(s["samples"] for s in shards.values()), **counts},
        **extra,
        "shards": shards,
    }
    write_atomically(folder / "dataset.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    return content


def read_dataset_json(folder):
    """The content of `dataset.json` of a local folder or URL, or None where there is none.

    Raises `ValueError` where the file is there but unreadable or of an unknown format.
    """
    name = f"{str(folder).rstrip('/')}/dataset.json"
    if is_url(name):
        from training.data.remote import read_small

        data = read_small(name)
    else:
        data = Path(name).read_bytes() if os.path.exists(name) else None
    if data is None:
        return None
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != DATASET_FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{name}: format {found!r}, expected {DATASET_FORMAT}; it was written by another version")
    return content
