"""The N smallest of any number of rows, exactly, in memory that does not grow with them.

A pass counts the rows by 16 bits at a time (a histogram of 65,536 numbers) until those of the bin in which the border
lies can be held; a last pass takes these and sorts them. For values that spread that is two or three passes.
"""

from collections.abc import Callable, Iterable

import numpy as np

_BITS = 16
_DIGITS = 64 // _BITS
# Rows of the border's bin that are held and sorted.
HELD = 1 << 22


def ordered(values: np.ndarray) -> np.ndarray:
    """Floats (n,) without NaN as (n,) uint64 in the same order."""
    bits = (np.asarray(values, np.float64) + 0.0).view(np.uint64)  # -0.0 becomes 0.0
    top = np.uint64(1 << 63)
    return np.where(bits & top, ~bits, bits | top)


def shuffled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """64-bit hashes (n,) of keys as random numbers (n,) uint64 of a seed: splitmix64."""
    step = np.uint64(0x9E3779B97F4A7C15)
    first = np.uint64((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % (1 << 64))
    with np.errstate(over="ignore"):
        mixed = (hashes ^ first) + step
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def border(chunks: Callable[[], Iterable[np.ndarray]], count: int, held: int = HELD) -> np.ndarray:
    """The largest of the `count` smallest rows, which are compared word by word.

    Args:
        chunks: gives the rows anew each time, (n, W) uint64, all different.
        count: at least 1 and at most as many as there are.
        held: rows that are sorted at a time.

    Returns:
        (W,) uint64.

    Raises:
        ValueError: there are fewer rows.
    """
    digits: list[int] = []
    left = count
    while True:
        histogram = np.zeros(1 << _BITS, np.int64)
        for rows in chunks():
            histogram += np.bincount(_digit(_begins_with(rows, digits), len(digits)), minlength=1 << _BITS)
        ends = np.cumsum(histogram)
        if left > ends[-1] or count < 1:
            raise ValueError(f"{count} rows are asked for, and there are {ends[-1]}")
        digit = int(np.searchsorted(ends, left))
        left -= int(ends[digit] - histogram[digit])
        digits.append(digit)
        if histogram[digit] <= held:
            rows = np.concatenate([_begins_with(rows, digits) for rows in chunks()])
            return rows[np.lexsort(rows.T[::-1])[left - 1]]


def up_to(rows: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Whether each of the rows (n, W) is at most `last` (W,), word by word: (n,) bool."""
    below, equal = np.zeros(len(rows), bool), np.ones(len(rows), bool)
    for column, bound in zip(rows.T, last):
        below |= equal & (column < bound)
        equal &= column == bound
    return below | equal


def _digit(rows: np.ndarray, number: int) -> np.ndarray:
    word, place = divmod(number, _DIGITS)
    shift = np.uint64(64 - _BITS * (place + 1))
    return ((rows[:, word] >> shift) & np.uint64((1 << _BITS) - 1)).astype(np.int64)


def _begins_with(rows: np.ndarray, digits: list[int]) -> np.ndarray:
    for number, digit in enumerate(digits):
        rows = rows[_digit(rows, number) == digit]
    return rows
