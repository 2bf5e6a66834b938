"""Which of any number of hashes come again: bucket by bucket, in memory that does not grow with them."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

# Hashes of about this many rows are sorted at a time.
BUCKET = 1 << 23


class Numbered(NamedTuple):
    """Hashes (n,) uint64, and the numbers (n,) of their rows."""

    hashes: np.ndarray
    rows: np.ndarray


def repeated(
    chunks: Callable[[], Iterable[Numbered]],
    total: int,
    most: int,
    whole: bool,
    others: Callable[[], Iterable[np.ndarray]] | None = None,
    bucket: int = BUCKET,
) -> Iterator[np.ndarray]:
    """The rows that are too many, a bucket of hashes at a time.

    Args:
        chunks: gives hashes and rows anew each time, rows rising; the hash 0 stands for nothing and never repeats.
        total: about how many rows there are.
        most: rows of one hash that are not too many; the first ones.
        whole: of a hash that comes more often, all rows are too many.
        others: hashes of another data set, which are too many wherever they come.
        bucket: rows that are sorted at a time.

    Yields:
        Rows, each once in all.
    """
    buckets = total // bucket + 1
    for number in range(buckets):
        found = [_of(chunk, buckets, number) for chunk in chunks()]
        if not found:
            return
        hashes, rows = (np.concatenate(parts) for parts in zip(*found))
        order = np.argsort(hashes, kind="stable")
        hashes, rows = hashes[order], rows[order]
        firsts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, np.int64)
        counts = np.diff(np.r_[firsts, len(hashes)])
        if whole:
            excess = np.repeat(counts > most, counts)
        else:
            excess = np.arange(len(hashes)) - np.repeat(firsts, counts) >= most
        if others is not None:
            for chunk in others():
                excess |= np.isin(hashes, chunk[chunk % np.uint64(buckets) == number])
        yield rows[excess & (hashes != 0)]


def _of(chunk: Numbered, buckets: int, number: int) -> Numbered:
    if buckets == 1:
        return chunk
    chosen = chunk.hashes % np.uint64(buckets) == number
    return Numbered(chunk.hashes[chosen], chunk.rows[chosen])
