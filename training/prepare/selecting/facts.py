"""What was measured of every sample: a file of columns for each part of the data, made once and kept.

A file is there whole or not at all, so measuring can be stopped, continued and shared by part. What the rules decide
over all parts is worked out of these columns, and of nothing else; what decides more loosely or more strictly therefore
needs no second look at the pictures.
"""

import io
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from pyramidclip_hf.files import json_text, write_atomically
from training.data.records import BadSample
from training.prepare.selecting.candidates import Candidate, hash_of
from training.prepare.sources import PairSource, SourcePart
from training.prepare.sources.pairs import REMOTE_PICTURE
from training.prepare.steps.work import Advance

# Columns that are there whatever the rules are.
KEY_HASH, FAULTY = "key_hash", "faulty"
# Candidates that a column measures at a time, where it has a model.
AT_ONCE = 64


class FaultEntry(TypedDict):
    """A sample that cannot be used; `position` is None for a fault of the file around."""

    position: int | None
    key: str
    where: str
    line: int | None
    reason: str
    detail: str


@dataclass(frozen=True)
class Column:
    """One number of every sample, or an array of them.

    Attributes:
        identity: what it depends on, as JSON types; columns of equal identity are measured once.
        dtype: of the numbers.
        measure: gets some candidates at a time and gives a number for each; a `BadSample` in place of one rejects it.
        shape: of what a sample has there; (): it is one number.
        model: columns of one model have files of their own, so that other rules cost no second look by it.
    """

    identity: Sequence[Any]
    dtype: str
    measure: Callable[[Sequence[Candidate]], Sequence[float | int | np.ndarray | BadSample]]
    shape: tuple[int, ...] = ()
    model: str = ""

    @property
    def name(self) -> str:
        """A short name of the identity."""
        text = json_text(self.identity, sort_keys=True, ensure_ascii=False)
        return f"{self.identity[0]}-{hash_of(text.encode(errors='backslashreplace')):016x}"


def each(measure: Callable[[Candidate], float | int]) -> Callable[[Sequence[Candidate]], list[float | int | BadSample]]:
    """What measures one candidate as what measures several."""

    def measure_all(candidates: Sequence[Candidate]) -> list[float | int | BadSample]:
        found: list[float | int | BadSample] = []
        for candidate in candidates:
            try:
                found.append(measure(candidate))
            except BadSample as bad:
                found.append(bad)
        return found

    return measure_all


class PartFacts:
    """The kept columns of one part, of all its files; each is read when it is asked for."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = paths

    def _each(self, name: str) -> Iterator[np.ndarray]:
        for path in self.paths:
            with np.load(path, allow_pickle=False) as file:
                if name in file:
                    yield file[name]

    def column(self, name: str) -> np.ndarray:
        """(n, ...) what each sample has there."""
        return next(self._each(name))

    @property
    def keys(self) -> list[str]:
        """The key of each sample."""
        return json.loads(self.column("keys").tobytes())

    @property
    def faulty(self) -> np.ndarray:
        """(n,) uint8, not 0 for what cannot be used."""
        return np.bitwise_or.reduce(list(self._each(FAULTY)))

    @property
    def faults(self) -> list[FaultEntry]:
        """What cannot be used, and why; of a sample that several files name, what the first one says."""
        first, *others = [json.loads(one.tobytes()) for one in self._each("faults")]
        named = {fault["position"] for fault in first} | {None}
        for faults in others:
            first += [fault for fault in faults if fault["position"] not in named]
            named |= {fault["position"] for fault in faults}
        return first


def is_whole(path: Path) -> bool:
    """Whether a file of facts is there and can be read."""
    return path.is_file() and zipfile.is_zipfile(path)


def measure_part(
    source: PairSource,
    part: SourcePart,
    columns: Mapping[str, Column],
    path: Path,
    max_image_pixels: int,
    with_pictures: bool,
    with_captions: bool,
    advance: Advance,
) -> None:
    """Measures one part and keeps what was found.

    Args:
        source: of the part.
        part: which.
        columns: {name: column}.
        path: of the file.
        max_image_pixels: larger pictures are refused by their header.
        with_pictures: they are looked at; else rows whose picture is a URL are no fault.
        with_captions: a sample without one is a fault.
        advance: moves a progress bar.

    Raises:
        ValueError: a column refuses the data as a whole, as a field that is not there.
    """
    # Sorted, for a sample that one refuses is no company of the others in the next, which may decide its last bits.
    taken = _Taken(dict(sorted(columns.items())), with_pictures, with_captions)
    waiting: list[tuple[int, Candidate]] = []
    for raw in source.read(part):
        if raw.is_note and raw.fault is not None:
            taken.faults.append(_fault(None, raw.key, raw.where, raw.line, *raw.fault))
            continue
        position = taken.begin(raw.key or "")
        advance(1)
        if raw.fault is not None and (with_pictures or raw.fault.reason != REMOTE_PICTURE):
            taken.refuse(position, _fault(position, raw.key, raw.where, raw.line, *raw.fault))
            continue
        waiting.append((position, Candidate(raw, max_image_pixels)))
        if len(waiting) == AT_ONCE:
            taken.measure(waiting)
            waiting = []
    taken.measure(waiting)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, taken.dumps())


def _fault(position: int | None, key: str | None, where: str, line: int | None, reason: str, detail: str) -> FaultEntry:
    return {
        "position": position,
        "key": key or "",
        "where": where,
        "line": line,
        "reason": reason,
        "detail": detail,
    }


class _Taken:
    """The columns of a part while it is read."""

    def __init__(self, columns: Mapping[str, Column], with_pictures: bool, with_captions: bool):
        self.with_pictures, self.with_captions = with_pictures, with_captions
        self.columns, self.keys, self.faults = columns, list[str](), list[FaultEntry]()
        self.faulty = set[int]()
        self.values: dict[str, list[float | int | np.ndarray]] = {name: [] for name in columns}

    def begin(self, key: str) -> int:
        """The position of the next sample."""
        self.keys.append(key)
        for name, values in self.values.items():
            shape = self.columns[name].shape
            values.append(np.zeros(shape) if shape else 0)
        return len(self.keys) - 1

    def refuse(self, position: int, fault: FaultEntry) -> None:
        """Names a sample that cannot be used."""
        self.faulty.add(position)
        self.faults.append(fault)

    def measure(self, waiting: Sequence[tuple[int, Candidate]]) -> None:
        """Fills in the columns of some samples."""
        good = []
        for position, candidate in waiting:
            try:
                candidate.check(self.with_pictures, self.with_captions)
            except BadSample as bad:
                self._bad(position, candidate, bad)
                continue
            good.append((position, candidate))
        for name, column in self.columns.items():
            if not good:
                return
            left = []
            for (position, candidate), value in zip(good, column.measure([one for _, one in good])):
                if isinstance(value, BadSample):
                    self._bad(position, candidate, value)
                else:
                    self.values[name][position] = value
                    left.append((position, candidate))
            good = left

    def _bad(self, position: int, candidate: Candidate, bad: BadSample) -> None:
        raw = candidate.raw
        self.refuse(position, _fault(position, raw.key, raw.where, raw.line, bad.reason, bad.detail))

    def dumps(self) -> bytes:
        """The file."""
        faulty = np.zeros(len(self.keys), np.uint8)
        faulty[sorted(self.faulty)] = 1
        # Any: savez has flags beside its arrays.
        arrays: dict[str, Any] = {
            KEY_HASH: np.array([hash_of(key.encode(errors="surrogatepass")) for key in self.keys], np.uint64),
            FAULTY: faulty,
            "keys": np.frombuffer(json_text(self.keys).encode(), np.uint8),
            "faults": np.frombuffer(json_text(self.faults).encode(), np.uint8),
            **{
                name: np.array(self.values[name], column.dtype).reshape(-1, *column.shape)
                for name, column in self.columns.items()
            },
        }
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()


class Alive(NamedTuple):
    """The samples of a part that no rule has taken yet.

    Attributes:
        rows: (n,) their numbers in the whole data.
        values: (n, ...) of each column that was asked for.
    """

    rows: np.ndarray
    values: list[np.ndarray]


class Facts:
    """What was measured of all parts, and what has become of each sample: a byte of memory a sample.

    Attributes:
        names: of the parts, in order.
        starts: (parts + 1,) the number of each part's first sample in the whole data.
        verdicts: (samples,) uint8: 0 for what is left, `FAULT`, `SAME_KEY`, or 1 + number of the rule that took it.
    """

    FAULT, SAME_KEY = 255, 254

    def __init__(self, files: Mapping[str, Sequence[Path]]):
        self.names = list(files)
        self.parts = [PartFacts(paths) for paths in files.values()]
        faulty = [part.faulty for part in self.parts]
        self.starts = np.cumsum([0, *map(len, faulty)])
        self.verdicts = np.zeros(int(self.starts[-1]), np.uint8)
        for start, flags in zip(self.starts, faulty):
            self.verdicts[start : start + len(flags)][flags > 0] = self.FAULT

    def __len__(self) -> int:
        return len(self.verdicts)

    @property
    def left(self) -> int:
        """How many samples no rule has taken."""
        return int(np.count_nonzero(self.verdicts == 0))

    def alive(self, *columns: str, begin: int = 0, end: int | None = None) -> Iterator[Alive]:
        """What is left of each part, in order, of the rows from `begin` to before `end`."""
        end = len(self) if end is None else end
        for start, stop, part in zip(self.starts.tolist(), self.starts[1:].tolist(), self.parts):
            first, last = max(start, begin), min(stop, end)
            at = np.flatnonzero(self.verdicts[first:last] == 0) + (first - start) if first < last else ()
            if len(at):
                yield Alive(at + start, [part.column(name)[at] for name in columns])

    def reject(self, rows: np.ndarray, rule: int) -> None:
        """Marks rows of the whole data as taken by rule number `rule`."""
        self.verdicts[rows] = rule + 1

    def place(self, row: int) -> tuple[int, int]:
        """The number of a row's part, and its position there."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return part, row - int(self.starts[part])
