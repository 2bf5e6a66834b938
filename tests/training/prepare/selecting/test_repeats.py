"""`selecting/repeats.py`: what a plain count of everything finds, whatever the buckets."""

import random
from collections import Counter

import numpy as np
import pytest

from training.prepare.selecting.repeats import Numbered, repeated


@pytest.mark.parametrize("bucket", [5, 50, 10_000])
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("whole", [False, True])
def test_rows_that_are_too_many_are_those_of_a_plain_count(bucket, most, whole):
    draw = random.Random(f"{bucket} {most} {whole}")
    values = [draw.getrandbits(64) for _ in range(60)] + [0]
    hashes = [draw.choice(values) for _ in range(300)]
    others = draw.sample(values, 7) + [draw.getrandbits(64) for _ in range(20)]
    rows = list(range(0, 900, 3))

    def chunks():
        for start in range(0, 300, 41):
            part = slice(start, start + 41)
            yield Numbered(np.array(hashes[part], np.uint64), np.array(rows[part]))

    for foreign in (None, others):
        counts, seen, expected = Counter(hashes), Counter(), []
        for row, value in zip(rows, hashes):
            seen[value] += 1
            too_many = counts[value] > most if whole else seen[value] > most
            if value and (too_many or (foreign is not None and value in foreign)):
                expected.append(row)
        read = (
            None
            if foreign is None
            else lambda: iter([np.array(others[:9], np.uint64), np.array(others[9:], np.uint64)])
        )
        found = np.concatenate(list(repeated(chunks, 300, most, whole, read, bucket))).tolist()
        assert sorted(found) == expected and len(expected) > 10


def test_nothing_has_no_repeats():
    assert list(repeated(lambda: iter([]), 0, 1, False)) == []
