"""The data that a string names, for training and evaluation: shards in folders or behind URLs, or loose pictures.

- a folder of `*.tar`, one tar, a glob (`data/part-*/00*.tar`), or a range (`data/{00000..00099}.tar`);
- a URL of a tar or of a range, or of a folder that has `dataset.json` (`https://`, `hf://`, ... through fsspec);
- a text file `*.txt` with one tar, path or URL, a line;
- a manifest `*.jsonl`: one object a line with `image` (path), `caption`, `summary`, `tags`, `regions`, `roi` (path of a
  `.npy`) and, if wanted, `key`; paths are relative to the manifest.

`open_data_set` turns the string into a `DataSet`: a list of units (a shard, or a thousand lines of a manifest) whose
sizes are known without opening them, and from which samples are read by number, as members {suffix: bytes}.
"""

import concurrent.futures
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from pyramidclip_hf.files import contents_of, json_text, read_regular
from training.data.manifest_lines import manifest_lines
from training.data.records import MAX_JSON_BYTES, BadSample
from training.data.remote import LOCAL_PROCESS, SMALL_FILE_BYTES, ShardCache, is_url, read_small, remote_size
from training.data.shard_index import (
    BLOCK,
    HEADER_BYTES,
    cached_header,
    check_counts,
    counted_before,
    index_path,
    load_index,
    parse_index_header,
    read_index_header,
)
from training.data.shards import MAX_MEMBER_BYTES, ShardReader, read_dataset_json, refuse_unfinished

MANIFEST_UNIT = 1000
# The largest public data sets have some 230,000.
MOST_SHARDS = 1_000_000
# What begins the hash of statistics.
_STATISTICS = "stats-"
_STATISTICS_BYTES = 1 << 20
_COUNTED_AT_ONCE = 64
# Whole shards by each process; all of them have to fit into the cache of the machine.
_FETCHED_AT_ONCE = 2
EXPECTED = (
    "a folder with shards (*.tar, as `python -m training.prepare.pack` writes them), a tar, a glob or range of tars, a "
    "URL of these, a .txt list of tars or a .jsonl manifest; for classification also a folder with one sub-folder of "
    "pictures for each class"
)
# Of tables that `training.prepare.pack` reads, and training does not.
TABLE_SUFFIXES = (".csv", ".tsv", ".parquet", ".ndjson", ".json")
_PACK = "Shards of it are made by `python -m training.prepare.pack --input {} --output-dir DIR`"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


Found = TypeVar("Found")


class Crew(Protocol):
    """Processes that do something together; `training.loop.agreement` has those of a run.

    Attributes:
        number: of this process.
        processes: how many there are.
        first_of_machine: whether this is the one of its machine that looks for all; process 0 is.
    """

    number: int
    processes: int
    first_of_machine: bool

    def share(self, work: Callable[[], Found]) -> list[Found]:
        """What each process found, in all of them, which all call this; where one fails, all do."""
        ...


class Alone:
    """A crew of one."""

    number, processes, first_of_machine = 0, 1, True

    def share(self, work: Callable[[], Found]) -> list[Found]:
        """What `work` gives."""
        return [work()]


class UnitIdentity(NamedTuple):
    """What a unit is known by, wherever it lies: name without folder, bytes, hash of the keys or of the lines.

    Of a shard that img2dataset's statistics count, their hash, after `_STATISTICS`; of a remote one without its bytes.
    """

    name: str
    size: int
    digest: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A shard, or a stretch of a manifest.

    Attributes:
        name: path or URL.
        samples: how many.
        identity: what it is known by.
        first: the number of the stretch's first line in the manifest.
        truncated: the tar ends early.
    """

    name: str
    samples: int
    identity: UnitIdentity
    first: int = 0
    truncated: bool = False


class UnitReader(Protocol):
    """The samples of one open unit; `ShardReader` and `ManifestReader` are such."""

    name: str

    def __len__(self) -> int: ...

    def key(self, i: int) -> str:
        """The key of sample `i`."""
        ...

    def read(self, i: int, suffixes: Container[str] | None = None) -> dict[str, bytes]:
        """The members of sample `i`, those of `suffixes` only where given; raises `BadSample`."""
        ...

    def lacks_picture(self, i: int) -> str:
        """What is there in place of the picture of sample `i`, "" where it is or nobody can know; reads none."""
        ...

    def close(self) -> None:
        """Closes the files; reading afterwards is an error."""
        ...


class ShardReplaced(ValueError):
    """A shard has other samples than it had when its data set was opened."""

    reason = "shard-replaced"


@dataclass
class DataSet:
    """What one string names.

    Attributes:
        name: the string.
        units: in a fixed order.
        described: the contents of the `dataset.json` beside its shards, one for each folder that has one.
        manifest: where the units are stretches of one.
    """

    name: str
    units: list[Unit]
    described: list[dict[str, Any]] = field(default_factory=list)
    manifest: "Manifest | None" = None

    @property
    def samples(self) -> int:
        """Number of samples, bad ones included."""
        return sum(unit.samples for unit in self.units)

    def open(self, unit: Unit, cache: ShardCache | None = None) -> UnitReader:
        """A reader of one unit.

        Raises:
            ShardReplaced: the shard has other samples than were counted.
            NotATar: it is none.
            OSError: it is gone, or cannot be fetched.
        """
        if self.manifest is not None:
            return ManifestReader(self.manifest, unit)
        reader, by_statistics = ShardReader(unit.name, cache), unit.identity.digest.startswith(_STATISTICS)
        if len(reader) != unit.samples:
            found = len(reader)
            reader.close()
            if by_statistics:
                raise ShardReplaced(
                    f"{unit.name} has {found} samples, {unit.samples} says {_statistics_of(unit.name)}, which belongs "
                    "to another tar or to a whole one: remove it, then the tars are counted themselves"
                )
            raise ShardReplaced(
                f"{unit.name} has {found} samples, {unit.samples} were counted before; it was replaced meanwhile"
            )
        if not by_statistics and reader.index.keys_digest() != unit.identity.digest:
            reader.close()
            raise ShardReplaced(f"{unit.name} has other keys than were there before; it was replaced meanwhile")
        return reader


def open_data_set(
    name: str | os.PathLike[str],
    cache: ShardCache | None = None,
    allow_unfinished: bool | None = None,
    at_least: int | None = None,
    crew: Crew | None = None,
) -> DataSet:
    """The data that a string names, see the module.

    Args:
        name: the string.
        cache: for shards behind a URL that have to be fetched before their samples can be counted.
        allow_unfinished: also data of which a step of preparation has begun and not ended; None: no, and whoever asks
            has no setting for it.
        at_least: only the first shards, as many as hold so many samples; the others are not looked at.
        crew: processes that call this together and count each shard once; None: this process alone. The lines of a
            manifest are found once a machine all the same.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is not what is expected, has no samples, is unfinished, or not the same on all machines.
        DownloadError: a URL cannot be read.
    """
    name, crew = os.fspath(name), crew or Alone()
    if name.endswith(".jsonl"):
        manifest = Manifest(name)
        return DataSet(name, manifest.units(), manifest=manifest)
    shards, described = _listed_once(name, crew)
    if not allow_unfinished:
        for folder, told in described.items():
            refuse_unfinished(folder, told.content, allow_unfinished is not None)
    units = _counted(shards, described, cache, at_least, crew)
    if not any(unit.samples for unit in units):
        raise ValueError(f"{name}: no samples in {len(units)} shards")
    cut = [unit.name for unit in units if unit.truncated]
    if cut and os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        print(
            f"{name}: {len(cut)} of {len(units)} shards end early or have a damaged header, first {cut[0]}: what "
            "followed is missing. Fetch them again",
            file=sys.stderr,
        )
    return DataSet(name, units, [told.content for told in described.values() if told.content])


@dataclass(frozen=True)
class _Described:
    """The content of a `dataset.json`, empty where there is none, and when it was written, in nanoseconds."""

    content: dict[str, Any]
    written: int

    @classmethod
    def of(cls, folder: str) -> "_Described":
        content = read_dataset_json(folder)
        if content is None or is_url(folder):
            return cls(content or {}, 0)
        return cls(content, os.stat(f"{folder.rstrip('/')}/dataset.json").st_mtime_ns)


class _Listed(NamedTuple):
    """The shards that a string names, and what is said of them, by folder."""

    shards: list[str]
    described: dict[str, _Described]

    @classmethod
    def of(cls, name: str) -> "_Listed":
        """Without a look at any shard."""
        shards = shard_names(name)
        return cls(shards, {folder: _Described.of(folder) for folder in dict.fromkeys(map(_folder, shards))})

    def digest(self) -> str:
        """Equal where these are, whatever the folder is called."""
        names = [shard.rpartition("/")[2] for shard in self.shards]
        told = json_text([names, [dict(one.content) for one in self.described.values()]])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def _listed_once(name: str, crew: Crew) -> _Listed:
    """What the first process lists; the first of each other machine compares.

    Raises:
        ValueError: in all processes, where a machine has others.
    """

    def look() -> tuple[_Listed | None, int, str]:
        if not crew.first_of_machine:
            return None, 0, ""
        own = _Listed.of(name)
        return (own if crew.number == 0 else None), len(own.shards), own.digest()

    told = crew.share(look)
    seen = {number: (shards, digest) for number, (_, shards, digest) in enumerate(told) if digest}
    if other := next((number for number, one in seen.items() if one != seen[0]), None):
        raise ValueError(
            f"{name} is not the same on all machines: process 0 sees {seen[0][0]} shards, process {other} "
            f"{seen[other][0]}, with other names or another dataset.json. Copy it anew, or name a place that all share"
        )
    if (listed := told[0][0]) is None:
        raise RuntimeError("process 0 is the first of its machine")
    return listed


def _counted(
    shards: Sequence[str],
    described: Mapping[str, _Described],
    cache: ShardCache | None,
    at_least: int | None,
    crew: Crew,
) -> list[Unit]:
    """The units of shards, or of the first that hold `at_least` samples."""
    not_said, slots = threading.Lock(), threading.Semaphore(_FETCHED_AT_ONCE)

    @contextlib.contextmanager
    def fetching() -> Iterator[None]:
        # Of several processes one says it, and of its threads the first.
        if os.environ.get("RANK", "0") == "0" and not_said.acquire(blocking=False):
            print(
                f"{shards[0]}{' and others' * (len(shards) > 1)}: shards that neither dataset.json nor an index or "
                "img2dataset's _stats.json beside them counts are fetched whole, each once, before the first step. Put "
                "the .index.json and dataset.json beside them that training.prepare.pack writes",
                file=sys.stderr,
                flush=True,
            )
        with slots:
            yield

    def count(shard: str) -> Unit:
        return _unit(shard, described[_folder(shard)], cache, fetching)

    def count_all(some: Sequence[str]) -> list[Unit]:
        return [*map(count, some)]

    if at_least is not None:
        units: list[Unit] = []
        for shard in shards:
            units.append(count(shard))
            if sum(unit.samples for unit in units) >= at_least:
                break
        return units

    def shared() -> list[Unit]:
        own = shards[crew.number :: crew.processes]
        # Processes of a machine that each count all begin at different places: what one has indexed, the others find.
        local, processes = (int(os.environ.get(name, default)) for name, default in LOCAL_PROCESS.items())
        first = len(own) * local // processes if crew.processes == 1 else 0
        turned = [*own[first:], *own[:first]]
        parts = [turned[begin : begin + _COUNTED_AT_ONCE] for begin in range(0, len(turned), _COUNTED_AT_ONCE)]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = [unit for units in pool.map(count_all, parts) for unit in units]
        return [*found[len(own) - first :], *found[: len(own) - first]]

    told = crew.share(shared)
    return [told[number % crew.processes][number // crew.processes] for number in range(len(shards))]


def _folder(shard: str) -> str:
    return shard.rpartition("/")[0] or "."


def _unit(
    shard: str, described: _Described, cache: ShardCache | None, fetching: Callable[[], AbstractContextManager[None]]
) -> Unit:
    """Counts a shard's samples: by `dataset.json`, its index or img2dataset's statistics that fit, else by reading it.

    In this order whatever is cached by now: what a shard is known by stays the same when a run continues.
    """
    base = shard.rpartition("/")[2]
    entry = described.content.get("shards", {}).get(base)
    if not is_url(shard):
        stat = os.stat(shard)
        size = stat.st_size
        # One look at each shard; what another tool wrote since is counted anew.
        if entry is not None and stat.st_mtime_ns <= described.written:
            with contextlib.suppress(ValueError):
                if (unit := _told(shard, entry)).identity.size == size:
                    return unit
        try:
            header = read_index_header(index_path(shard))
        except (FileNotFoundError, ValueError):
            header = None
        if header is not None and header["tar_bytes"] == size:
            identity = UnitIdentity(base, size, header["keys_digest"])
            return Unit(shard, header["samples"], identity, truncated=bool(header.get("truncated")))
        if (counted := _by_statistics(shard, stat)) is not None:
            return counted
        if (header := counted_before(shard, stat)) is not None:
            identity = UnitIdentity(base, size, header["keys_digest"])
            return Unit(shard, header["samples"], identity, truncated=bool(header.get("truncated")))
        index = load_index(shard)
        cut = index.truncated or size < index.tar_bytes
        return Unit(shard, len(index.keys), UnitIdentity(base, size, index.keys_digest()), truncated=cut)
    if entry is not None:
        return _told(shard, entry)
    if (data := read_small(f"{shard}.index.json", first=HEADER_BYTES)) is not None:
        header = parse_index_header(data.decode("utf-8", "replace").partition("\n")[0], f"{shard}.index.json")
        return Unit(shard, header["samples"], UnitIdentity(base, header["tar_bytes"], header["keys_digest"]))
    if (counted := _by_statistics(shard, None)) is not None:
        return counted
    cache = cache or ShardCache()
    header = cached_header(cache.path_of(shard))
    if header is not None and header["tar_bytes"] == remote_size(shard):
        return Unit(shard, header["samples"], UnitIdentity(base, header["tar_bytes"], header["keys_digest"]))
    with fetching(), ShardReader(shard, cache) as reader:
        index = reader.index
        identity = UnitIdentity(base, index.tar_bytes, index.keys_digest())
        return Unit(shard, len(reader), identity, truncated=reader.truncated)


def _statistics_of(shard: str) -> str:
    """Where img2dataset puts what it counted, beside `NAME.tar`: `NAME_stats.json`."""
    return f"{shard.removesuffix('.tar')}_stats.json"


def _by_statistics(shard: str, stat: os.stat_result | None) -> Unit | None:
    """The unit of a shard by what img2dataset wrote when it had closed it, or None where there is nothing that fits.

    It counts pictures that were fetched, which are the samples; `DataSet.open` compares. So the data that the paper
    trains on can be opened without reading each header of each tar.

    Args:
        shard: path or URL.
        stat: of a local one; what was written since is counted anew.
    """
    name = _statistics_of(shard)
    try:
        if stat is None:
            data = read_small(name)
        else:
            data = read_regular(name, _STATISTICS_BYTES) if os.stat(name).st_mtime_ns >= stat.st_mtime_ns else None
        samples = None if data is None else json.loads(data)["successes"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None
    most = SMALL_FILE_BYTES if stat is None else stat.st_size // BLOCK
    if data is None or type(samples) is not int or not 0 <= samples <= most:
        return None
    digest = _STATISTICS + hashlib.sha256(data).hexdigest()[:16]
    return Unit(shard, samples, UnitIdentity(shard.rpartition("/")[2], 0 if stat is None else stat.st_size, digest))


def _told(shard: str, entry: Any) -> Unit:
    """The unit of a shard by its entry in `dataset.json`; ValueError where that is damaged."""
    try:
        check_counts(entry["samples"], entry["bytes"], entry["keys_digest"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"dataset.json beside {shard}: its entry for that is damaged: {error}") from None
    identity = UnitIdentity(shard.rpartition("/")[2], entry["bytes"], entry["keys_digest"])
    return Unit(shard, entry["samples"], identity, truncated=bool(entry.get("truncated")))


def shard_names(name: str) -> list[str]:
    """The tars, paths or URLs, that a string names, in a fixed order.

    Raises:
        FileNotFoundError: there is nothing, or one of several is missing.
        ValueError: the string names something else beside tars.
    """
    if name.endswith(".txt"):
        return _listed(name)
    if is_url(name):
        return _behind_url(name)
    if os.path.isdir(name):
        found = sorted(glob.glob(os.path.join(glob.escape(name), "*.tar")))
        if not found:
            raise FileNotFoundError(f"{name} has no shards (*.tar), {contents_of(name)}: expected {EXPECTED}")
        return found
    if os.path.isfile(name):
        if name.lower().endswith(TABLE_SUFFIXES):
            raise ValueError(f"{name} is a table, not shards: expected {EXPECTED}. {_PACK.format(name)}")
        return [name]
    folders = _Folders()
    return sorted(path for pattern in _expand(name) for path in _matches(pattern, name, folders))


class _Folders:
    """What lies in folders, each listed once: whether a shard is there takes no look at the shard."""

    def __init__(self) -> None:
        self._listed: dict[str, dict[str, str]] = {}

    def kind(self, path: str) -> str | None:
        """`file`, `folder`, `device` (FIFOs too), or None where there is nothing."""
        folder, _, base = path.rpartition("/")
        folder = folder or ("/" if path.startswith("/") else ".")
        if folder not in self._listed:
            found: dict[str, str] = {}
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                found = {entry.name: kind for entry in entries if (kind := self._kind_of(entry))}
            self._listed[folder] = found
        return self._listed[folder].get(base)

    @staticmethod
    def _kind_of(entry: "os.DirEntry[str]") -> str | None:
        # The listing says it of all but links, which have to be looked at.
        kind = "file" if entry.is_file() else "folder" if entry.is_dir() else "device"
        return None if kind == "device" and not os.path.exists(entry.path) else kind


def _listed(name: str) -> list[str]:
    """The tars of a .txt list; relative paths start from the list's folder."""
    data = read_small(name) if is_url(name) else read_regular(name, SMALL_FILE_BYTES) if os.path.isfile(name) else None
    if data is None:
        raise FileNotFoundError(f"no list of shards at {name}")
    lines = [line.strip() for line in data.decode().splitlines()]
    base = name.rpartition("/")[0]
    names = [
        line if is_url(line) or os.path.isabs(line) or not base else f"{base}/{line}"
        for line in lines
        if line and not line.startswith("#")
    ]
    shards = [shard for line in names for shard in _expand(line)]
    folders = _Folders()
    missing = [shard for shard in shards if not is_url(shard) and folders.kind(shard) != "file"]
    if missing:
        raise FileNotFoundError(
            f"{name}: {len(missing)} of {len(shards)} tars are not there, first {missing[0]}; expected one tar, path "
            "or URL, a line, paths relative to the list"
        )
    if not shards:
        raise ValueError(f"{name} lists nothing; expected one tar, path or URL, a line")
    return shards


def _behind_url(name: str) -> list[str]:
    if "*" in name:
        raise ValueError(f"{name}: a URL takes a range, as in {{00000..00099}}.tar, but no *")
    if ".tar" in name.rpartition("/")[2]:
        return _expand(name)
    described = read_dataset_json(name)
    if not described or not described.get("shards"):
        raise FileNotFoundError(
            f"{name} has no dataset.json that lists its shards: name them "
            "(a URL of a .tar or with {00000..00099}.tar, or a list in a .txt file)"
        )
    return [f"{name.rstrip('/')}/{shard}" for shard in sorted(described["shards"])]


def _matches(pattern: str, name: str, folders: _Folders) -> list[str]:
    """The local tars that a glob matches, or the one that a plain path names; `name` is the whole string."""
    found = glob.glob(pattern, recursive=True) if glob.has_magic(pattern) else [pattern]
    kinds = {path: folders.kind(path) for path in found}
    if not found or None in kinds.values():
        what = (
            f"{name} names {pattern}, which is not there" if pattern != name else f"there is no folder or file {name}"
        )
        raise FileNotFoundError(f"{what}: expected {EXPECTED}")
    other = [path for path in found if kinds[path] != "file" or not path.endswith(".tar")]
    # A tar may be called anything; but beside others that are called so, what is not is something else.
    if other and (len(other) < len(found) or kinds[other[0]] != "file"):
        kind = "no tar" if kinds[other[0]] == "file" else f"a {kinds[other[0]]}"
        raise ValueError(
            f"{name} also matches {other[0]}, which is {kind}: expected a glob of tars, as in folder/*.tar"
        )
    return found


def _expand(name: str) -> list[str]:
    """Replaces each {00..12} by its numbers, as shells and WebDataset do.

    Raises:
        ValueError: a range runs down, or they stand for more than `MOST_SHARDS`.
    """
    named = math.prod(max(int(high) - int(low), 0) + 1 for low, high in _RANGE.findall(name))
    if named > MOST_SHARDS:
        raise ValueError(f"{name[:200]}: stands for more shards than the {MOST_SHARDS:,} that a data set may have")
    return _expanded(name)


def _expanded(name: str) -> list[str]:
    match = _RANGE.search(name)
    if not match:
        return [name]
    low, high = match.groups()
    if int(low) > int(high):
        raise ValueError(f"{name}: the range {match.group()} is empty, expected the smaller number first")
    numbers = range(int(low), int(high) + 1)
    return [one for n in numbers for one in _expanded(f"{name[: match.start()]}{n:0{len(low)}d}{name[match.end() :]}")]


class Manifest:
    """A JSONL file of loose pictures, of which only the offset of each line is kept.

    Raises:
        FileNotFoundError: it is absent.
        ValueError: it has no lines, the first of them names no picture, or it is behind a URL.
    """

    def __init__(self, path: str | os.PathLike[str]):
        if is_url(path):
            raise ValueError(
                f"manifest {path}: loose pictures are read from a file system; pack remote ones into shards"
            )
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no manifest at {path}")
        lines = manifest_lines(self.path)
        self.offsets, self._index = lines.offsets, lines.kept_in
        self.identity = UnitIdentity(self.path.name, int(lines.offsets[-1]), lines.digest)
        if len(self.offsets) < 2:
            raise ValueError(f"manifest {path} has no lines")
        self._check_keys(int(self.offsets[0]))

    def __getstate__(self) -> dict[str, Any]:
        """Without the offsets where they lie in a file, which every process maps."""
        return self.__dict__ | ({} if self._index is None else {"offsets": None})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self._index is not None:
            self.offsets = np.load(self._index, mmap_mode="r")

    def _check_keys(self, first: int) -> None:
        """ValueError where the first line, at a byte offset, is of another kind of table; bad lines are bad samples."""
        with open(self.path, "rb") as file:
            file.seek(first)
            line = file.readline(MAX_JSON_BYTES)
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(record, dict) and "image" not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "nothing"
            raise ValueError(
                f"manifest {self.path}: expected lines with 'image' (a path) and 'caption', and the first has {keys}. "
                f"{_PACK.format(self.path)}, which also takes --image-column and --caption-column"
            )

    def units(self) -> list[Unit]:
        """Stretches of a thousand lines, which are shuffled as shards are."""
        count = len(self.offsets) - 1
        return [
            Unit(str(self.path), min(MANIFEST_UNIT, count - first), self.identity, first)
            for first in range(0, count, MANIFEST_UNIT)
        ]


class ManifestReader:
    """Reads the samples of one stretch of a manifest as members, just as `ShardReader` does."""

    def __init__(self, manifest: Manifest, unit: Unit):
        self.manifest, self.unit, self.name = manifest, unit, str(manifest.path)
        self._file: int | None = os.open(manifest.path, os.O_RDONLY)

    def __len__(self) -> int:
        return self.unit.samples

    def _line(self, i: int) -> tuple[int, int, int]:
        """Number of line `i` of the stretch in the manifest, and where it starts and ends there, in bytes."""
        line = self.unit.first + i
        start, end = self.manifest.offsets[line : line + 2].tolist()
        return line, start, end

    def _bytes(self, start: int, end: int) -> bytes:
        if self._file is None:
            raise ValueError(f"{self.name} is closed")
        return os.pread(self._file, end - start, start)

    def read(self, i: int, suffixes: Container[str] | None = None) -> dict[str, bytes]:
        """The members of line `i` of the stretch: `json` and, where asked for, the picture and `roi.npy`.

        Raises:
            BadSample: `bad-json`, `json-too-large`, `no-image` or `no-roi` (a file that cannot be read),
                `member-too-large`.
        """
        line, start, end = self._line(i)
        where = f"{self.name}:{line + 1}"
        if end - start > MAX_JSON_BYTES:
            detail = f"{end - start} bytes, at most {MAX_JSON_BYTES} are read"
            raise BadSample(str(line), where, "json-too-large", detail)
        data = self._bytes(start, end)
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

    def key(self, i: int) -> str:
        """The key of line `i`: its `key`, else its `image`."""
        line, start, end = self._line(i)
        data = self._bytes(start, end)
        try:
            record = json.loads(data)
            return str(record.get("key", record.get("image", line)))
        except (ValueError, AttributeError, RecursionError):
            return str(line)

    def lacks_picture(self, i: int) -> str:
        """Where the picture of line `i` would be, and is not."""
        _, start, end = self._line(i)
        try:
            path = self.manifest.path.parent / json.loads(self._bytes(start, end))["image"]
            return "" if path.exists() else f"there is no {path}"
        except (ValueError, RecursionError, KeyError, TypeError, OSError):
            return ""

    def _file_bytes(self, name: str, key: str, where: str, reason: str) -> bytes:
        path = self.manifest.path.parent / name
        try:
            stat = path.stat()
            if not S_ISREG(stat.st_mode):
                raise BadSample(key, where, reason, f"{path} is not a file with contents")
            size = stat.st_size
            if size > MAX_MEMBER_BYTES:
                detail = f"{path} has {size} bytes, at most {MAX_MEMBER_BYTES} are read"
                raise BadSample(key, where, "member-too-large", detail)
            return path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample(key, where, reason, str(error)) from None

    def close(self) -> None:
        """Closes the manifest."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()
