"""Mixing: shares of each batch, against a straightforward form that deals out whole passes; exact from any start."""

import pickle
from fractions import Fraction

import numpy as np
import pytest

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import write_shards
from training.data.mixing import MixedOrder, check_shares, positions_of
from training.data.order import SampleOrder

SIZES = [[5, 7, 0, 9, 4], [6, 5], [40]]
SHARES = [0.25, 0.5, 0.25]
BATCH = 8


def straightforward(sizes, parts, seeds, window, epochs, batch):
    """Every batch of some epochs as a list of (data set, shard, sample): decks that are dealt out, no arithmetic.

    Each data set is a pile of its passes, of which what does not fill its part of a batch at the end is thrown away. Of
    the places of a batch, that whose owner is the furthest behind its share is filled first.
    """
    batches = sum(map(sum, sizes)) // batch * epochs
    piles = []
    for number, (own, part, seed) in enumerate(zip(sizes, parts, seeds)):
        pile, turn, order = [], 0, SampleOrder([own], seed, window, part)
        while len(pile) < batches * part:
            deck = [(turn, number, *order.locate(turn, at)[1:]) for at in range(sum(own))]
            pile += deck[: len(deck) - len(deck) % part]
            turn += 1
        piles.append(iter(pile))
    seats = sorted((Fraction(2 * k + 1, 2 * part), number) for number, part in enumerate(parts) for k in range(part))
    return [[next(piles[number]) for _, number in seats] for _ in range(batches)]


@pytest.mark.parametrize("window", [1, 9, 1000])
@pytest.mark.parametrize("seed", [0, 7])
def test_as_the_straightforward_form(window, seed):
    order = MixedOrder(SIZES, SHARES, seed, window, BATCH)
    dealt = straightforward(SIZES, order.parts, [inner.seed for inner in order._inner], window, 5, BATCH)
    per_epoch = len(order) // BATCH
    assert per_epoch == 9 and order.batches_per_epoch(BATCH) == 9
    for number, expected in enumerate(dealt):
        epoch, first = number // per_epoch, number % per_epoch * BATCH
        positions = range(first, first + BATCH)
        found = [(order.turn(epoch, p), *order.locate(epoch, p)) for p in positions]
        assert found == expected


def test_every_batch_has_the_shares_and_no_sample_twice():
    order = MixedOrder([[100] * 30, [50] * 4, [1000]], [0.6, 0.1, 0.3], 3, 300, 100)
    for epoch in range(2):
        places = [order.locate(epoch, position) for position in range(len(order))]
        for first in range(0, len(order), 100):
            batch = places[first : first + 100]
            assert np.bincount([place.dataset for place in batch]).tolist() == [60, 10, 30] == order.parts
            assert len(set(batch)) == 100
            # Any block, which a process has: its own share of each, within one sample.
            for block in (batch[:50], batch[50:], batch[20:40]):
                counts = np.bincount([place.dataset for place in block], minlength=3)
                assert np.abs(counts - len(block) * np.array([0.6, 0.1, 0.3])).max() <= 1
    assert order.passes_per_epoch() == [42 / 50, 42 / 20, 42 / 33]


def test_a_data_set_comes_whole_before_it_comes_again():
    """A small one with a large share: each pass over it has every sample once, in another order each time."""
    order = MixedOrder([[4, 4], [64]], [0.5, 0.5], 1, 4, 8)
    seen = [order.locate(0, p) for p in range(len(order)) if order.locate(0, p).dataset == 0]
    passes = [seen[at : at + 8] for at in range(0, len(seen), 8)]
    assert len(passes) == 5 and all(len(set(one)) == 8 for one in passes[:4])
    assert len({tuple(one) for one in passes[:4]}) == 4
    turns = [order.turn(0, p) for p in range(len(order)) if order.locate(0, p).dataset == 0]
    assert turns == [turn for turn in range(4) for _ in range(8)] + [4] * (len(turns) - 32)


def test_two_data_sets_of_one_size_are_shuffled_apart():
    order = MixedOrder([[50] * 10, [50] * 10], [0.5, 0.5], 0, 100, 20)
    first, second = (
        [place[1:] for place in map(order.locate, [0] * len(order), range(len(order))) if place.dataset == number]
        for number in (0, 1)
    )
    assert sum(a == b for a, b in zip(first, second)) < 50


def test_pure_function_of_seed_epoch_position():
    order = MixedOrder(SIZES, SHARES, 5, 12, BATCH)
    fresh = pickle.loads(pickle.dumps(order))
    everywhere = [(e, p) for e in range(3) for p in range(len(order))]
    forward = {at: (order.locate(*at), order.replacement(*at, 1), order.window(*at)) for at in everywhere}
    for at in np.random.default_rng(0).permutation(np.array(everywhere)).tolist():
        assert (fresh.locate(*at), fresh.replacement(*at, 1), fresh.window(*at)) == forward[tuple(at)]
    assert [MixedOrder(SIZES, SHARES, 6, 12, BATCH).locate(*at) for at in everywhere] != [
        forward[at][0] for at in everywhere
    ]


def test_replacements_are_of_the_same_data_set_and_not_in_the_batch():
    order = MixedOrder([[13] * 11, [9] * 5], [0.75, 0.25], 5, 40, 16)
    for first in range(0, len(order), 16):
        inside = [order.locate(1, position) for position in range(first, first + 16)]
        replaced = [order.replacement(1, p, attempt) for p in range(first, first + 16) for attempt in range(9)]
        assert len({*inside, *replaced}) == 16 + len(replaced)
        assert [place.dataset for place in replaced] == [place.dataset for place in inside for _ in range(9)]


def test_windows_tell_their_shards_and_samples_are_numbered_over_all():
    order = MixedOrder([[30] * 20, [10] * 12], [0.5, 0.5], 2, [90, 40], 20)
    for position in range(len(order)):
        place, window = order.locate(1, position), order.window(1, position)
        dataset, shards = order.shards_of(window)
        assert dataset == place.dataset and place.shard in shards
        later = [p for p in range(position, len(order), 20) if order.window(1, p) != window]
        if later:
            assert order.next_window(1, position) == order.window(1, later[0])
    plain = SampleOrder([[30] * 20, [10] * 12], 2)
    assert order.sample_id(1, 3, 4) == plain.sample_id(1, 3, 4) and order.sample_id(0, 3, 4) == 94
    with pytest.raises(IndexError, match=f"position {len(order)} of"):
        order.locate(0, len(order))


def test_large_data_has_lanes():
    order = MixedOrder([[10_000] * 9_900, [10_000] * 1_500], [0.5, 0.5], 0, 131_072, 8192)
    assert order.lanes == [8, 8] and order.lane_length == 1024
    assert order.locate(3, 51_234_567).shard < 9_900


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([0.5, 0.5], "a share for each of the 3 train_data, got 2"),
        ([0.5, 0.5, 0.0], r"shares above 0, got 0\.5 0\.5 0; leave that data set out"),
        ([0.5, 0.5, float("nan")], "shares above 0"),
        ([0.5, 0.5, 0.5], r"whose sum is 1, got 0\.5 0\.5 0\.5, whose sum is 1\.5"),
        ([0.1, 0.895, 0.005], r"0\.005 of a global batch of 8 is 0\.04 positions for data set 3"),
    ],
)
def test_shares_that_cannot_be(shares, message):
    with pytest.raises(ValueError, match=message):
        MixedOrder(SIZES, shares, 0, 9, BATCH)


def test_a_data_set_smaller_than_its_part():
    with pytest.raises(ValueError, match=r"0\.5 of a global batch of 32 is 16 samples of data set 2, which has 11"):
        MixedOrder(SIZES, SHARES, 0, 9, 32)


def test_rounding_gives_whole_batches():
    assert positions_of([0.333, 0.333, 0.334], 100) == [33, 33, 34]
    check_shares([0.333, 0.333, 0.333], 3)
    assert sum(positions_of([0.333, 0.333, 0.333], 4096)) == 4096
    # The largest remainders are rounded up.
    assert positions_of([0.44, 0.28, 0.28], 10) == [4, 3, 3]


@pytest.fixture
def two_sets(shards, tmp_path):
    return [shards, write_shards(tmp_path / "other", range(100, 124))]


def test_batches_from_any_start_with_workers_and_of_two_processes(two_sets, reader):
    alone = reader(two_sets, shares=[0.25, 0.75])
    expected = [list(alone.batches(epoch)) for epoch in range(2)]
    assert [len(batches) for batches in expected] == [8, 8]
    for batch in (*expected[0], *expected[1]):
        assert sum(int(key) >= 100 for key in batch["sample_keys"]) == 6
    assert equal(list(reader(two_sets, shares=[0.25, 0.75], workers=2).batches(1, 16)), expected[1][2:])
    halves = [list(reader(two_sets, shares=[0.25, 0.75], process_index=i, num_processes=2).batches(1)) for i in (0, 1)]
    for whole, *parts in zip(expected[1], *halves):
        assert sorted(key for part in parts for key in part["sample_keys"]) == sorted(whole["sample_keys"])
    # The second pass over the small set is inside of epoch 0, and is cropped anew.
    pictures = {}
    for batch in expected[0]:
        for key, view in zip(batch["sample_keys"], batch["local_pixel_values"]):
            pictures.setdefault(key, []).append(view)
    twice = [views for key, views in pictures.items() if len(views) == 2]
    assert len(twice) == 24 and sum(bool((a == b).all()) for a, b in twice) == 0


def test_the_share_of_each_is_told_and_kept(two_sets, reader, tmp_path):
    data = reader(two_sets, shares=[0.25, 0.75])
    assert [(one["share"], one["passes_per_epoch"]) for one in data.description] == [(0.25, 8 / 22), (0.75, 8 / 4)]
    next(data.batches(0))
    name = two_sets[0].name
    assert data.metrics()[f"data/share_{name}"] == 0.25 and data.metrics()["data/share_other"] == 0.75
    again = reader(two_sets, shares=[0.25, 0.75])
    again.load_state(data.state())
    assert again.metrics() == data.metrics()
    # One after another: what came so far.
    plain = reader(two_sets, batch=4)
    next(plain.batches(0))
    assert sorted(plain.metrics()[f"data/share_{one}"] for one in (name, "other")) == [0, 1]
    both = reader([two_sets[1], write_shards(tmp_path / "again" / "other", range(8))], shares=[0.5, 0.5])
    next(both.batches(0))
    assert both.metrics()["data/share_1_other"] == both.metrics()["data/share_2_other"] == 0.5
    assert not any("share" in key for key in reader(two_sets[0]).metrics())
