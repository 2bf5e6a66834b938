"""Pictures that look alike: perceptual hashes (ImageHash's pHash, 64 bits) within some bits of each other.

Two hashes of 64 bits that differ in at most d bits agree in two of any d + 2 stretches of them. So for each two
stretches the hashes are sorted by these, and only those that agree there are compared: the result is that of comparing
each with each.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from training.prepare.selecting.alike import MOST_COSINE, alike_an_earlier, embedding_column, import_faiss
from training.prepare.selecting.candidates import Candidate, hash_of
from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.facts import KEY_HASH, Column, Facts, each
from training.prepare.selecting.ranking import shuffled
from training.prepare.selecting.rules import Rule, check_number_or_share, require, told

MOST_DISTANCE = 12
# Pairs that are compared at a time.
_PAIRS = 1 << 22


def perceptual_hash(candidate: Candidate) -> int:
    """The pHash of a picture: signs of its low frequencies against their median. Raises `BadSample`, `ImportError`."""
    bits = _imagehash().phash(candidate.pixels).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _imagehash() -> Any:
    try:
        import imagehash
    except ImportError as error:
        raise ImportError('near duplicates need ImageHash: pip install -e ".[select]"') from error
    return imagehash


PHASH = Column(("phash",), "u8", each(perceptual_hash))


def close_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """(P, 2) indices i < j of all pairs of distinct 64-bit hashes (n,) that differ in at most `distance` bits."""
    stretches = _stretches(distance + 2)
    found = [np.zeros((0, 2), np.int64)]
    for first, second in itertools.combinations(stretches, 2):
        keys = hashes & (first | second)
        order = np.argsort(keys, kind="stable")
        bounds = np.flatnonzero(np.diff(keys[order])) + 1
        ends = np.repeat(np.r_[bounds, len(order)], np.diff(np.r_[0, bounds, len(order)]))
        # Each place of the sorted hashes is paired with those behind it that agree.
        places = np.arange(len(order))
        partners = ends - places - 1
        for low, high in _slices(partners):
            left = np.repeat(places[low:high], partners[low:high])
            before = np.cumsum(partners[low:high]) - partners[low:high]
            steps = np.arange(len(left)) - np.repeat(before, partners[low:high])
            a, b = order[left], order[left + 1 + steps]
            near = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            found.append(np.stack([np.minimum(a[near], b[near]), np.maximum(a[near], b[near])], axis=1))
    return np.unique(np.concatenate(found), axis=0)


def _stretches(count: int) -> list[np.uint64]:
    """Masks of `count` neighbouring stretches of 64 bits."""
    edges = [64 * n // count for n in range(count + 1)]
    return [np.uint64(((1 << (high - low)) - 1) << low) for low, high in itertools.pairwise(edges)]


def _slices(partners: np.ndarray) -> Iterator[tuple[int, int]]:
    """Stretches of places with about `_PAIRS` partners together."""
    ends = np.cumsum(partners)
    low = 0
    while low < len(partners):
        before = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + _PAIRS, side="right")))
        yield low, high
        low = high


def near_an_earlier(hashes: np.ndarray, distance: int, others: np.ndarray) -> np.ndarray:
    """Whether each hash (n,) is near one of `others`, or near an earlier one that is not itself taken: (n,) bool."""
    distinct, firsts, back = np.unique(hashes, return_index=True, return_inverse=True)
    foreign = np.unique(others)
    order = np.argsort(firsts, kind="stable")  # distinct hashes by their first row
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    both = np.concatenate([foreign, distinct[order]])
    # Equal ones of the other data set are no pair of distinct hashes.
    taken = np.r_[np.ones(len(foreign), bool), np.isin(distinct[order], foreign)]
    is_foreign = np.arange(len(both)) < len(foreign)
    both_distinct = np.flatnonzero(is_foreign | ~taken)
    pairs = both_distinct[close_pairs(both[both_distinct], distance)]
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    for earlier, later in pairs.tolist():
        if is_foreign[earlier] and not is_foreign[later] or not is_foreign[earlier] and not taken[earlier]:
            taken[later] = True
    of_distinct = taken[len(foreign) :][rank]
    again = np.ones(len(hashes), bool)
    again[firsts] = False
    return of_distinct[back] | again


def check_distance(distance: int) -> None:
    """Whether a number of bits is one that is looked for. Raises `ValueError`."""
    require(0 <= distance <= MOST_DISTANCE, f"distance: expected 0 to {MOST_DISTANCE} bits, got {distance}")


@dataclass
class NearDuplicates(Rule):
    """Pictures that look as an earlier one that stays or as one of another data set, by perceptual hash or a model."""

    kind: ClassVar[str] = "near_duplicates"
    looks_at_pictures = True
    distance: int | None = told(None, "bits of 64 that may differ, 0 to 12; default: 4")
    against: list[str] = told([], "data sets: what looks as a picture of theirs goes")
    model: str = told("", "folder or Hub name: its embeddings are compared, in place of hashes")
    cosine: float | None = told(None, "with a model: from which on two pictures are alike")
    revision: str | None = told(None, "of a Hub name")
    dtype: Literal["float32", "bfloat16", "float16"] = told("float32", "of the model's weights")

    def __post_init__(self) -> None:
        check_distance(self.hash_distance)
        require(bool(self.model) == (self.cosine is not None), "expected model and cosine together, or none of them")
        if self.cosine is not None:
            require(self.distance is None, "expected distance, which is of hashes, or model and cosine, got both")
            require(
                0 < self.cosine <= MOST_COSINE, f"cosine: expected more than 0, up to {MOST_COSINE}, got {self.cosine}"
            )
            import_faiss()
            self.encoder = Encoder(self.model, self.revision, self.dtype)
        else:
            _imagehash()

    @property
    def hash_distance(self) -> int:
        """The bits in which hashes may differ."""
        return 4 if self.distance is None else self.distance

    def columns(self) -> list[Column]:
        """The perceptual hash, or the embedding."""
        return [PHASH if self.encoder is None else embedding_column(self.encoder)]

    def of_others(self) -> list[Column]:
        """The same."""
        return self.columns() if self.against else []

    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """What looks as something that stays."""
        if self.cosine is not None:
            yield from alike_an_earlier(facts, others, self.columns()[0], self.cosine)
            return
        alive = list(facts.alive(PHASH.name))
        if not alive:
            return
        hashes = np.concatenate([part.values[0] for part in alive])
        rows = np.concatenate([part.rows for part in alive])
        foreign = [part.values[0] for part in others.alive(PHASH.name)] if others is not None else []
        near = near_an_earlier(hashes, self.hash_distance, np.concatenate([np.zeros(0, np.uint64), *foreign]))
        yield rows[near]


def groups(columns: list[np.ndarray], distance: int | None, hashes: np.ndarray | None) -> np.ndarray:
    """Numbers (n,) of groups: rows that are equal in one of the columns, or near by their hashes, are of one group.

    Args:
        columns: of (n,) uint64, in which 0 is equal to nothing.
        distance: in bits; None: `hashes` are not looked at.
        hashes: (n,) perceptual hashes.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(columns[0])
    edges = [_chains(column, column != 0) for column in columns]
    if distance is not None and hashes is not None:
        distinct, firsts = np.unique(hashes, return_index=True)
        edges += [_chains(hashes, np.ones(size, bool)), firsts[close_pairs(distinct, distance)]]
    pairs = np.concatenate(edges)
    graph = coo_array((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1]


def _chains(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(P, 2) pairs that link all rows of equal value, of those that count."""
    rows = np.flatnonzero(counts)
    rows = rows[np.argsort(values[rows], kind="stable")]
    same = np.flatnonzero(values[rows][1:] == values[rows][:-1])
    return np.stack([rows[same], rows[same + 1]], axis=1)


@dataclass
class Split:
    """What is put aside for validation: whole groups of what is alike, so that no picture is on both sides."""

    share: float | None = told(None, "about this share of the samples goes to validation, 0 to 1")
    number: int | None = told(None, "so many go, or the few more that belong to the last group")
    by: list[str] = told(["picture", "near"], "what stays together: equal `picture`, equal `caption`, `near` pictures")
    distance: int = told(4, "bits of 64 in which near pictures may differ, 0 to 12")

    def __post_init__(self) -> None:
        check_number_or_share(self)
        unknown = [name for name in self.by if name not in ("picture", "caption", "near")]
        require(not unknown, f"by: expected picture, caption or near, got {', '.join(unknown)}")
        check_distance(self.distance)
        if "near" in self.by:
            _imagehash()

    @property
    def looks_at_pictures(self) -> bool:
        """Whether the encoded bytes are needed."""
        return "picture" in self.by or "near" in self.by

    def columns(self) -> list[Column]:
        """What is compared."""
        return [_COMPARED[name] for name in self.by]

    def decide(self, facts: Facts, seed: int) -> np.ndarray:
        """Rows of the whole data that go to validation.

        Raises:
            ValueError: fewer are left than are asked for.
        """
        names = [column.name for column in self.columns()]
        alive = list(facts.alive(KEY_HASH, *names))
        require(bool(alive), "split: the rules leave nothing to split")
        rows = np.concatenate([part.rows for part in alive])
        keys, *values = (np.concatenate(parts) for parts in zip(*(part.values for part in alive)))
        by = dict(zip(self.by, values))
        near = by.pop("near", None)
        columns = [*by.values()] or [np.zeros(len(rows), np.uint64)]
        group = groups(columns, None if near is None else self.distance, near)
        drawn = shuffled(keys, seed)
        # A group is drawn by the number of its first member: the smallest would favour large ones.
        firsts = np.unique(group, return_index=True)[1]
        sizes = np.bincount(group)
        order = np.lexsort((firsts, drawn[firsts]))
        wanted = self.number or round((self.share or 0.0) * len(rows))
        require(wanted < len(rows), f"split: {wanted} are asked for, and the rules leave {len(rows)}")
        count = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1 if wanted else 0
        chosen = np.zeros(len(sizes), bool)
        chosen[order[:count]] = True
        return rows[chosen[group]]


def _caption_hash(candidate: Candidate) -> int:
    text = candidate.text("caption")
    return hash_of(text.encode(errors="surrogatepass")) if text else 0


_COMPARED = {
    "picture": Column(("picture",), "u8", each(lambda one: one.picture_hash)),
    "caption": Column(("caption",), "u8", each(_caption_hash)),
    "near": PHASH,
}
