"""`selecting/ranking.py`: the N smallest rows, found by histograms, are those that sorting finds."""

import math
import random

import numpy as np
import pytest

from training.prepare.selecting.ranking import border, ordered, shuffled, up_to


def test_floats_keep_their_order():
    values = [0.0, -0.0, 1.5, -1.5, 1e-300, -1e-300, 1e300, -1e300, math.inf, -math.inf, 0.1, 0.3, 0.30000000000000004]
    words = ordered(np.array(values))
    for a, x in zip(values, words):
        for b, y in zip(values, words):
            assert (a < b) == bool(x < y) and (a == b) == bool(x == y), (a, b)


@pytest.mark.parametrize("held", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["spread", "few values", "one value", "close"])
def test_the_border_is_that_of_sorted_rows(held, kind):
    draw = random.Random(f"{held} {kind}")
    size = 200
    firsts = {
        "spread": [draw.getrandbits(64) for _ in range(size)],
        "few values": [draw.choice([5, 5 << 40, 7 << 60]) for _ in range(size)],
        "one value": [1 << 63] * size,
        "close": [(1 << 62) + draw.randrange(100) for _ in range(size)],
    }[kind]
    rows = [(first, draw.randrange(3), n) for n, first in enumerate(firsts)]
    chunks = [np.array(rows[start : start + 37], np.uint64) for start in range(0, size, 37)]
    for count in (1, 2, 36, 37, 38, 111, size - 1, size):
        last = border(lambda: iter(chunks), count, held)
        assert tuple(map(int, last)) == sorted(rows)[count - 1]
        chosen = [tuple(map(int, row)) for chunk in chunks for row in chunk[up_to(chunk, last)]]
        assert sorted(chosen) == sorted(rows)[:count]
    with pytest.raises(ValueError, match="201 rows are asked for, and there are 200"):
        border(lambda: iter(chunks), size + 1, held)


def test_random_numbers_of_keys_are_those_of_splitmix64_in_whole_numbers():
    whole = (1 << 64) - 1

    def plain(key, seed):
        mixed = ((key ^ ((seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) & whole)) + 0x9E3779B97F4A7C15) & whole
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & whole
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & whole
        return mixed ^ (mixed >> 31)

    keys = [0, 1, 2, 1 << 63, whole, *(random.Random(0).getrandbits(64) for _ in range(200))]
    for seed in (0, 1, 12345):
        found = shuffled(np.array(keys, np.uint64), seed)
        assert found.tolist() == [plain(key, seed) for key in keys]
    many = shuffled(np.arange(100_000, dtype=np.uint64), 3) / 2.0**64
    assert abs(many.mean() - 0.5) < 0.005 and abs((many < 0.1).mean() - 0.1) < 0.005
