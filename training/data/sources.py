"""Where training samples come from: shards in folders or behind URLs, and JSONL manifests of loose pictures.

A data set is named by one string:

- a folder of `*.tar`, one tar, or a glob (`data/part-*/00*.tar`);
- a URL of a tar, with `{00000..00099}` for a range, or of a folder that has `dataset.json` (`https://`, `hf://`, ...
  through fsspec);
- a text file `*.txt` with one tar, path or URL, a line;
- a manifest `*.jsonl`: one object a line with `image` (path), `caption`, `summary`, `tags`, `regions`, `roi` (path of a
  `.npy`) and, if wanted, `key`; paths are relative to the manifest.

`open_data_set` turns the string into a `DataSet`: a list of units (a shard, or a thousand lines of a manifest) whose
sizes are known without opening them, and from which samples are read by number, as members {suffix: bytes}.
"""

import concurrent.futures
import glob
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.data.records import MAX_JSON_BYTES, BadSample
from training.data.remote import read_small
from training.data.shards import (
    MAX_MEMBER_BYTES,
    ShardReader,
    index_path,
    is_url,
    load_index,
    parse_index_header,
    read_dataset_json,
    read_index_header,
)

MANIFEST_UNIT = 1000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Unit:
    """A shard, or a stretch of a manifest: `name` path or URL, `samples` how many, `identity` what it is known by
    (name without folder, bytes, hash of the keys), `first` the first line of a manifest's stretch."""

    name: str
    samples: int
    identity: tuple
    first: int = 0


@dataclass
class DataSet:
    """One data set: `units`, and `described`, the contents of the `dataset.json` beside its shards (as many as there
    are folders that have one)."""

    name: str
    units: list
    described: list = field(default_factory=list)
    manifest: "Manifest | None" = None

    @property
    def samples(self):
        """Number of samples, bad ones included."""
        return sum(unit.samples for unit in self.units)

    def open(self, unit, cache=None):
        """A reader of one unit: `len`, `keys`, `read(i, suffixes)`, `close()`."""
        if self.manifest is not None:
            return ManifestReader(self.manifest, unit)
        reader = ShardReader(unit.name, cache)
        if len(reader) != unit.samples:
            found = len(reader)
            reader.close()
            raise ValueError(
                f"{unit.name} has {found} samples, {unit.samples} were counted before; it was replaced meanwhile"
            )
        return reader


def open_data_set(name, cache=None):
    """The `DataSet` that a string names, see the module.

    Raises `FileNotFoundError` where there is nothing, `ValueError` where it is not what is expected.
    """
    name = os.fspath(name)
    if name.endswith(".jsonl"):
        manifest = Manifest(name)
        return DataSet(name, manifest.units(), manifest=manifest)
    shards = shard_names(name)
    described = {folder: read_dataset_json(folder) or {} for folder in dict.fromkeys(map(_folder, shards))}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        units = list(pool.map(lambda shard: _unit(shard, described[_folder(shard)], cache), shards))
    if not any(unit.samples for unit in units):
        raise ValueError(f"{name}: no samples in {len(units)} shards")
    return DataSet(name, units, [content for content in described.values() if content])


def _folder(shard):
    return shard.rpartition("/")[0] or "."


def _unit(shard, described, cache):
    """Counts the samples of a shard: from its index where that fits, from `dataset.json` for a remote one, else by
    reading it."""
    base = shard.rpartition("/")[2]
    if not is_url(shard):
        header = None
        if index_path(shard).exists():
            try:
                header = read_index_header(index_path(shard))
            except ValueError:
                header = None
        size = os.path.getsize(shard)
        if header is not None and header["tar_bytes"] == size:
            return Unit(shard, header["samples"], (base, size, header["keys_digest"]))
        index = load_index(shard)
        return Unit(shard, len(index.keys), (base, size, index.keys_digest()))
    entry = described.get("shards", {}).get(base)
    if entry is None and (data := read_small(f"{shard}.index.json")) is not None:
        header = parse_index_header(data.decode("utf-8", "replace").partition("\n")[0], f"{shard}.index.json")
        entry = {"samples": header["samples"], "bytes": header["tar_bytes"], "keys_digest": header["keys_digest"]}
    if entry is None:
        with ShardReader(shard, cache) as reader:
            index = reader.index
            entry = {"samples": len(reader), "bytes": index.tar_bytes, "keys_digest": index.keys_digest()}
    return Unit(shard, entry["samples"], (base, entry["bytes"], entry["keys_digest"]))


def shard_names(name):
    """The shards that a string names, in a fixed order; `FileNotFoundError` where there are none."""
    if name.endswith(".txt"):
        data = read_small(name) if is_url(name) else Path(name).read_bytes()
        if data is None:
            raise FileNotFoundError(f"no list of shards at {name}")
        lines = [line.strip() for line in data.decode().splitlines()]
        base = name.rpartition("/")[0]
        names = [
            line if is_url(line) or os.path.isabs(line) or not base else f"{base}/{line}"
            for line in lines
            if line and not line.startswith("#")
        ]
        return [shard for line in names for shard in _expand(line)]
    if is_url(name):
        if ".tar" in name.rpartition("/")[2]:
            return _expand(name)
        described = read_dataset_json(name)
        if not described or not described.get("shards"):
            raise FileNotFoundError(
                f"{name} has no dataset.json that lists its shards: name them "
                "(a URL with {00000..00099}.tar, or a list in a .txt file)"
            )
        return [f"{name.rstrip('/')}/{shard}" for shard in sorted(described["shards"])]
    if os.path.isdir(name):
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
    elif os.path.isfile(name):
        found = [name]
    else:
        found = sorted(path for pattern in _expand(name) for path in glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(
            f"no data at {name}: expected a folder with *.tar, a tar, a glob, a URL, a .txt list of shards "
            "or a .jsonl manifest"
        )
    return found


def _expand(name):
    """Replaces each {00..12} by its numbers, as shells and WebDataset do."""
    match = _RANGE.search(name)
    if not match:
        return [name]
    low, high = match.groups()
    numbers = range(int(low), int(high) + 1)
    return [one for n in numbers for one in _expand(f"{name[: match.start()]}{n:0{len(low)}d}{name[match.end() :]}")]


class Manifest:
    """A JSONL file of loose pictures. Only the offset of each line is kept.

    Raises `FileNotFoundError` where it is absent, `ValueError` where it has no lines.
    """

    def __init__(self, path):
        if is_url(path):
            raise ValueError(
                f"manifest {path}: loose pictures are read from a file system; pack remote ones into shards"
            )
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no manifest at {path}")
        offsets, digest, position = [], hashlib.sha256(), 0
        with open(self.path, "rb") as file:
            for line in file:
                if line.strip():
                    offsets.append(position)
                position += len(line)
                digest.update(line)
        self.offsets = np.array([*offsets, position], np.int64)
        self.identity = (self.path.name, position, digest.hexdigest()[:16])
        if not offsets:
            raise ValueError(f"manifest {path} has no lines")

    def units(self):
        """Stretches of a thousand lines, which are shuffled as shards are."""
        count = len(self.offsets) - 1
        return [
            Unit(str(self.path), min(MANIFEST_UNIT, count - first), self.identity, first)
            for first in range(0, count, MANIFEST_UNIT)
        ]


class ManifestReader:
    """Reads the samples of one stretch of a manifest as members {suffix: bytes}, just as `ShardReader` does."""

    def __init__(self, manifest, unit):
        self.manifest, self.unit, self.name = manifest, unit, str(manifest.path)
        self._file = os.open(manifest.path, os.O_RDONLY)

    def __len__(self):
        return self.unit.samples

    def read(self, i, suffixes=None):
        """The members of line `i` of the stretch: `json` and, where asked for, the picture and `roi.npy`.

        Raises `BadSample` with `bad-json`, `no-image` or `no-roi` (a file that cannot be read), `member-too-large`.
        """
        line = self.unit.first + i
        start, end = self.manifest.offsets[line : line + 2].tolist()
        where = f"{self.name}:{line + 1}"
        if end - start > MAX_JSON_BYTES:
            raise BadSample(
                str(line), where, "json-too-large", f"{end - start} bytes, at most {MAX_JSON_BYTES} are read"
            )
        data = os.pread(self._file, end - start, start)
        try:
            record = json.loads(data)
            image = record["image"]
            if not isinstance(image, str):
                raise TypeError(f"`image` is {type(image).__name__}, expected a path")
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise BadSample(str(line), where, "bad-json", f"{type(error).__name__}: {error}") from None
        key = str(record.get("key", image))
        members = {"json": data}
        if suffixes is None or "jpg" in suffixes:
            # The suffix only says "the picture"; what it is, its first bytes say.
            members["jpg"] = self._file_bytes(image, key, where, "no-image")
        if record.get("roi") is not None and (suffixes is None or "roi.npy" in suffixes):
            members["roi.npy"] = self._file_bytes(str(record["roi"]), key, where, "no-roi")
        return members

    def key(self, i):
        """The key of line `i`: its `key`, else its `image`."""
        line = self.unit.first + i
        start, end = self.manifest.offsets[line : line + 2].tolist()
        try:
            record = json.loads(os.pread(self._file, end - start, start))
            return str(record.get("key", record.get("image", line)))
        except (ValueError, AttributeError, RecursionError):
            return str(line)

    def _file_bytes(self, name, key, where, reason):
        path = self.manifest.path.parent / name
        try:
            size = path.stat().st_size
            if size > MAX_MEMBER_BYTES:
                raise BadSample(
                    key, where, "member-too-large", f"{path} has {size} bytes, at most {MAX_MEMBER_BYTES} are read"
                )
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample(key, where, reason, str(error)) from None

    def close(self):
        """Closes the manifest."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self):
        if getattr(self, "_file", None) is not None:
            self.close()
