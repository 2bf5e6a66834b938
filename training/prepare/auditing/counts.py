"""Counts what samples hold: levels, texts and their lengths, pictures, regions; and names what is bad.

Memory does not grow with the data: repeated texts are counted by hashes, of which a random share is kept once there
are too many.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np

from pyramidclip_hf import PyramidCLIPTokenizer
from pyramidclip_hf.files import json_text, write_atomically
from pyramidclip_hf.levels_pyramidclip import levels_of_kind
from training.data.records import (
    MAX_REGIONS,
    BadSample,
    Sample,
    best_objects,
    has_level,
    level_text,
    sample_from_members,
)
from training.data.shard_index import differs_from_tar
from training.data.shards import ShardReader
from training.data.sources import DataSet
from training.data.views import BadPicture, check_decodes, open_picture, upright_size

TEXTS = levels_of_kind("text")
# What every good sample has comes first.
OPTIONAL_TEXTS = tuple(level for level in TEXTS if level != "caption")
LEVELS = ("picture", "caption", *OPTIONAL_TEXTS, "regions")
# Lower edges; the last bin is open.
SIDE_EDGES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
ASPECT_EDGES = (0.0, 0.34, 0.5, 0.75, 0.95, 1.05, 1.34, 2.0, 3.0)
MAX_TOKENS = 77
_FREQUENT = 2000
_TEXTS_AT_ONCE = 512


class RepeatShares(TypedDict):
    """What `RepeatCounter` finds; shares are 0..1.

    `repeated`: of texts that repeat another one, distinct texts counted once. `twin_in_batch`: of samples expected to
    meet their own text again in a random batch. `exact`: nothing was estimated.
    """

    repeated: float
    twin_in_batch: float
    exact: bool


class RepeatCounter:
    """How many of many texts are repeated, from 64-bit hashes in bounded memory.

    When more than `limit` hashes are kept, only those that end in k zero bits stay, k growing as needed. All copies
    of a text share their hash, so the share of copies among what is kept estimates the share among all; up to `limit`
    texts it is exact.
    """

    def __init__(self, limit: int = 20_000_000):
        self.limit, self.bits = limit, 0
        self._parts: list[np.ndarray] = []
        self._kept = 0

    def add(self, hashes: np.ndarray) -> None:
        """Takes the hashes (n,) uint64 of n texts."""
        hashes = hashes[(hashes & np.uint64((1 << self.bits) - 1)) == 0] if self.bits else hashes
        self._parts.append(hashes)
        self._kept += len(hashes)
        while self._kept > self.limit:
            self.bits += 1
            kept = np.concatenate(self._parts)
            kept = kept[(kept & np.uint64((1 << self.bits) - 1)) == 0]
            self._parts, self._kept = [kept], len(kept)

    def result(self, batch_size: int) -> RepeatShares:
        """The shares; twins are those in a random batch of `batch_size`."""
        if not self._kept:
            return {"repeated": 0.0, "twin_in_batch": 0.0, "exact": True}
        _, counts = np.unique(np.concatenate(self._parts), return_counts=True)
        total = self._kept * 2.0**self.bits
        others = (counts - 1) / max(total - 1, 1)
        twins = (counts * (1 - (1 - others) ** (batch_size - 1))).sum() / self._kept
        return {"repeated": float(1 - len(counts) / self._kept), "twin_in_batch": float(twins), "exact": self.bits == 0}


class AuditLimits(NamedTuple):
    """What is looked at, as training would: see the settings of these names.

    Attributes:
        max_image_pixels: larger pictures are bad.
        max_regions: objects of a picture, whose names are its tags.
        drop_repeated_tags: a tag of several objects comes once.
        add_checksums: indexes that have none get them.
    """

    max_image_pixels: int | None = 100_000_000
    max_regions: int = MAX_REGIONS
    drop_repeated_tags: bool = False
    add_checksums: bool = False


AS_BY_DEFAULT = AuditLimits()


class BadEntry(NamedTuple):
    """A sample that training would not take."""

    key: str | None
    where: str
    reason: str
    detail: str


_COUNTERS = ("bad_reasons", "levels", "truncated", "kinds", "region_counts", "region_widths")


@dataclass
class AuditCounts:
    """What is counted; two of them add up.

    Attributes:
        samples: all, bad ones included.
        bad: those that training would not take.
        bad_reasons: {reason: samples}.
        levels: {which of `LEVELS` are there: samples}.
        truncated: {text level: texts of more than `MAX_TOKENS`}.
        lengths: {text level: texts of 0, 1, ... tokens}.
        sides: pictures between the `SIDE_EDGES`.
        aspects: pictures between the `ASPECT_EDGES`.
        kinds: {format and mode: pictures}.
        region_counts: {number of regions, at most 100: samples}.
        region_widths: {width of the features: samples}.
        frequent: {text level: {text: how often}} of the most frequent ones.
    """

    samples: int = 0
    bad: list[BadEntry] = field(default_factory=list)
    bad_reasons: Counter[str] = field(default_factory=Counter)
    levels: Counter[tuple[bool, ...]] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, list[int]] = field(default_factory=lambda: {level: [0] * (MAX_TOKENS + 1) for level in TEXTS})
    sides: list[int] = field(default_factory=lambda: [0] * len(SIDE_EDGES))
    aspects: list[int] = field(default_factory=lambda: [0] * len(ASPECT_EDGES))
    kinds: Counter[str] = field(default_factory=Counter)
    region_counts: Counter[int] = field(default_factory=Counter)
    region_widths: Counter[int] = field(default_factory=Counter)
    frequent: dict[str, Counter[str]] = field(default_factory=lambda: {level: Counter() for level in TEXTS})

    def add(self, other: "AuditCounts") -> None:
        """Adds other counts to these."""
        self.samples += other.samples
        self.bad += other.bad
        for name in _COUNTERS:
            getattr(self, name).update(getattr(other, name))
        for name in ("sides", "aspects"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name))])
        for level in TEXTS:
            self.lengths[level] = [a + b for a, b in zip(self.lengths[level], other.lengths[level])]
            self.count_texts(level, other.frequent[level])

    def count_texts(self, level: str, texts: Sequence[str] | Counter[str]) -> None:
        """Adds to the most frequent texts of a level, of which only so many are kept."""
        self.frequent[level].update(texts)
        if len(self.frequent[level]) > 5 * _FREQUENT:
            self.trim(level)

    def trim(self, level: str) -> None:
        """Leaves the most frequent texts of a level."""
        self.frequent[level] = Counter(dict(self.frequent[level].most_common(_FREQUENT)))

    def dumps(self) -> str:
        """JSON; counters become lists of pairs, for their keys need not be strings."""
        return json_text({name: _pairs(value) for name, value in vars(self).items()})

    @classmethod
    def loads(cls, text: str) -> "AuditCounts":
        """The inverse of `dumps`."""
        data = json.loads(text)
        for name in _COUNTERS:
            data[name] = _counter(data[name])
        data["frequent"] = {level: _counter(pairs) for level, pairs in data["frequent"].items()}
        data["bad"] = [BadEntry(*entry) for entry in data["bad"]]
        return cls(**data)


# Any: what the fields of `AuditCounts` hold, and what JSON makes of it.
def _pairs(value: Any) -> Any:
    if isinstance(value, Counter):
        return [[list(key) if isinstance(key, tuple) else key, count] for key, count in value.items()]
    if isinstance(value, dict):
        return {name: _pairs(one) for name, one in value.items()}
    return value


def _counter(pairs: list[list[Any]]) -> Counter[Any]:
    return Counter({tuple(key) if isinstance(key, list) else key: count for key, count in pairs})


# {text level: hashes (n,) uint64 of its texts}.
Hashes = dict[str, np.ndarray]


# Any: a unit is a shard or a slice of a manifest, which only the data set's own reader looks into.
def audit_unit(
    data: DataSet, unit: Any, tokenizer: PyramidCLIPTokenizer, limits: AuditLimits = AS_BY_DEFAULT
) -> tuple[AuditCounts, Hashes]:
    """Reads one unit of a data set; returns its counts and the hashes of its texts."""
    tally = AuditCounts()
    texts: dict[str, list[str]] = {level: [] for level in TEXTS}
    hashes: dict[str, list[np.ndarray]] = {level: [] for level in TEXTS}
    reader = data.open(unit)
    if isinstance(reader, ShardReader) and limits.add_checksums:
        reader.take_sums()
    try:
        for number in range(len(reader)):
            tally.samples += 1
            try:
                sample = _read(reader, number, tally, limits)
            except BadSample as bad:
                tally.bad.append(BadEntry(bad.key, bad.where or reader.name, bad.reason, bad.detail))
                tally.bad_reasons[bad.reason] += 1
                continue
            for level, text in _texts(sample):
                texts[level].append(text)
                if len(texts[level]) == _TEXTS_AT_ONCE:
                    hashes[level].append(_count_texts(texts[level], level, tokenizer, tally))
                    texts[level] = []
        if getattr(reader, "truncated", False) and not tally.bad_reasons["truncated-shard"]:
            # Between two samples, or by a damaged header: no sample tells it.
            told = "the tar ends early or a header in it is damaged: what followed is not counted"
            tally.bad.append(BadEntry(None, reader.name, "truncated-shard", told))
            tally.bad_reasons["truncated-shard"] += 1
        if isinstance(reader, ShardReader):
            differs = None if reader.truncated else differs_from_tar(reader.path, reader.index)
            if differs is not None:
                tally.bad.append(BadEntry(None, reader.name, "stale-index", differs))
                tally.bad_reasons["stale-index"] += 1
            reader.keep_sums()
    finally:
        reader.close()
    for level in TEXTS:
        hashes[level].append(_count_texts(texts[level], level, tokenizer, tally))
        tally.trim(level)
    return tally, {level: np.concatenate(parts) for level, parts in hashes.items()}


def _texts(sample: Sample) -> Iterator[tuple[str, str]]:
    """(level, text) of what a sample can show the text tower: each of several captions counts."""
    for caption in sample.captions or [sample.caption or ""]:
        yield "caption", caption
    for level in OPTIONAL_TEXTS:
        if has_level(sample, level):
            yield level, level_text(sample, level) or ""


# Any: a reader of shards or of a manifest.
def _read(reader: Any, number: int, tally: AuditCounts, limits: AuditLimits) -> Sample:
    """Reads and decodes a sample and counts what it has; `BadSample` where training would not take it."""
    members = reader.read(number)
    key = reader.key(number)
    sample = sample_from_members(members, key, reader.name)
    if sample.caption is None:
        raise BadSample(key, reader.name, "no-caption", "expected KEY.txt, or `caption` in KEY.json")
    try:
        picture = open_picture(sample.image or b"", limits.max_image_pixels)
        width, height = upright_size(picture) if picture.format in ("JPEG", "MPO") else picture.size
        mode = f"{picture.format} {picture.mode}"
        check_decodes(picture)
    except BadPicture as bad:
        raise BadSample(key, reader.name, bad.reason, str(bad)) from None
    there = (True, True, *(has_level(sample, level) for level in (*OPTIONAL_TEXTS, "roi")))
    tally.levels[there] += 1
    tally.kinds[mode] += 1
    tally.sides[int(np.searchsorted(SIDE_EDGES, min(width, height), "right")) - 1] += 1
    tally.aspects[int(np.searchsorted(ASPECT_EDGES, width / height, "right")) - 1] += 1
    tally.region_counts[min(len(sample.regions or ()), 100)] += 1
    if sample.roi is not None:
        tally.region_widths[sample.roi.shape[1]] += 1
    return best_objects(sample, limits.max_regions, limits.drop_repeated_tags)


def _count_texts(texts: list[str], level: str, tokenizer: PyramidCLIPTokenizer, tally: AuditCounts) -> np.ndarray:
    if not texts:
        return np.zeros(0, np.uint64)
    encoded = tokenizer(
        texts, truncation=True, max_length=MAX_TOKENS, return_attention_mask=False, return_truncation=True
    )
    for ids in encoded["input_ids"]:
        tally.lengths[level][len(ids)] += 1
    tally.truncated[level] += sum(encoded["truncated"])
    # What the model sees decides whether two texts are the same: their ids.
    rows = [np.asarray(ids, np.int32).tobytes() for ids in encoded["input_ids"]]
    tally.count_texts(level, texts)
    return np.array([int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows], np.uint64)


def part_path(parts: Path, unit: Any, limits: AuditLimits) -> Path:
    """The file in the folder `parts` that keeps what was counted in a unit under these limits."""
    name = hashlib.sha256(json_text([unit.name, unit.identity, unit.first, limits]).encode()).hexdigest()[:24]
    return parts / f"{name}.npz"


def save_part(path: Path, tally: AuditCounts, hashes: Hashes) -> None:
    """Keeps what was counted in a unit."""
    file = io.BytesIO()
    # Any: savez has flags beside its arrays.
    arrays: dict[str, Any] = {"tally": np.frombuffer(tally.dumps().encode(), np.uint8), **hashes}
    np.savez(file, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def load_part(path: Path) -> tuple[AuditCounts, Hashes]:
    """What `save_part` kept."""
    with np.load(path, allow_pickle=False) as data:
        return AuditCounts.loads(data["tally"].tobytes().decode()), {level: data[level] for level in TEXTS}
