"""`selecting/near.py` against comparing each with each."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.near import close_pairs, groups, near_an_earlier, perceptual_hash
from training.prepare.sources import RawPair

pytest.importorskip("imagehash", reason='needs ImageHash: pip install -e ".[select]"')


def families(draw, count, bits):
    """Hashes of which many are a few bits from each other, in chains."""
    found = []
    while len(found) < count:
        value = draw.getrandbits(64)
        for _ in range(draw.randrange(1, 6)):
            found.append(value)
            for _ in range(draw.randrange(bits + 2)):
                value ^= 1 << draw.randrange(64)
    draw.shuffle(found)
    return found[:count]


@pytest.mark.parametrize("distance", [0, 1, 4, 12])
def test_pairs_are_those_of_comparing_each_with_each(distance):
    hashes = sorted(set(families(random.Random(distance), 150, distance)))
    hashes += [hashes[0] ^ ((1 << distance) - 1) << 20, hashes[1] ^ ((1 << (distance + 1)) - 1) << 30]
    hashes = list(dict.fromkeys(hashes))
    expected = [[i, j] for j in range(len(hashes)) for i in range(j) if (hashes[i] ^ hashes[j]).bit_count() <= distance]
    found = close_pairs(np.array(hashes, np.uint64), distance).tolist()
    assert sorted(found) == sorted(expected)
    assert len(expected) > 20 or distance == 0


@pytest.mark.parametrize("distance", [0, 2, 5])
def test_what_is_near_an_earlier_one_that_stays_goes(distance):
    draw = random.Random(100 + distance)
    hashes = families(draw, 200, distance)
    others = draw.sample(hashes, 10) + [draw.choice(hashes) ^ 1 for _ in range(5)]
    for foreign in ([], others):
        kept, expected = [], []
        for value in hashes:
            near = any((value ^ other).bit_count() <= distance for other in [*kept, *foreign])
            expected.append(near)
            if not near:
                kept.append(value)
        found = near_an_earlier(np.array(hashes, np.uint64), distance, np.array(foreign, np.uint64))
        assert found.tolist() == expected and any(expected)


def test_groups_are_those_of_joining_pair_by_pair():
    draw = random.Random(5)
    hashes, texts = families(draw, 120, 3), [draw.choice([0, 0, 0, *range(1, 60)]) for _ in range(120)]
    label = list(range(120))
    for j in range(120):
        for i in range(j):
            if (hashes[i] ^ hashes[j]).bit_count() <= 3 or (texts[i] and texts[i] == texts[j]):
                label = [label[i] if one == label[j] else one for one in label]
    found = groups([np.array(texts, np.uint64)], 3, np.array(hashes, np.uint64)).tolist()
    assert [[a == b for a in label] for b in label] == [[a == b for a in found] for b in found]
    assert 1 < len(set(label)) < 120


def encoded(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def test_a_picture_looks_as_its_smaller_and_recompressed_copies_and_not_as_others():
    rng = np.random.default_rng(0)
    pictures = [
        Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8)).resize((320, 240), Image.Resampling.BICUBIC)
        for _ in range(12)
    ]

    def hash_of(data):
        return perceptual_hash(Candidate(RawPair("k", "here", picture=data), 10**8))

    for number, picture in enumerate(pictures):
        own = hash_of(encoded(picture, "PNG"))
        for copy in (encoded(picture, "JPEG", quality=40), encoded(picture.resize((100, 75)), "WEBP")):
            assert (own ^ hash_of(copy)).bit_count() <= 4
        for other in pictures[:number]:
            assert (own ^ hash_of(encoded(other, "PNG"))).bit_count() > 8
