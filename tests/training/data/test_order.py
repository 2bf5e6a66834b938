"""Order: every sample once, the same from any process count and any start, datasets one after another."""

import pickle

import numpy as np
import pytest

from training.data.order import SampleOrder, batch_positions, default_window

SIZES = [[5, 7, 0, 9, 4], [3, 3], [11]]


def epoch_of(order, epoch):
    return [order.locate(epoch, position) for position in range(len(order))]


@pytest.mark.parametrize("window", [1, 9, 1000])
def test_each_sample_once_and_shuffled_anew(window):
    order = SampleOrder(SIZES, 5, window)
    everything = {(d, s, i) for d, sizes in enumerate(SIZES) for s, n in enumerate(sizes) for i in range(n)}
    seen = [epoch_of(order, epoch) for epoch in range(3)]
    assert all(len(run) == len(everything) and set(run) == everything for run in seen)
    assert seen[0] != seen[1] != seen[2]
    assert epoch_of(SampleOrder(SIZES, 6, window), 0) != seen[0]


def test_pure_function_of_seed_epoch_position():
    order = SampleOrder(SIZES, 5, 12)
    forward = {(e, p): order.locate(e, p) for e in range(3) for p in range(len(order))}
    fresh = pickle.loads(pickle.dumps(SampleOrder(SIZES, 5, 12)))
    for at in np.random.default_rng(0).permutation(np.array(list(forward))):
        assert fresh.locate(*map(int, at)) == forward[tuple(at)]


def test_datasets_one_after_another_in_a_new_order():
    order = SampleOrder([[4, 4], [4], [4, 4, 4]], 0, 8)
    visits = set()
    for epoch in range(20):
        datasets = [d for d, _, _ in epoch_of(order, epoch)]
        visit = [d for i, d in enumerate(datasets) if i == 0 or datasets[i - 1] != d]
        assert sorted(visit) == [0, 1, 2]
        visits.add(tuple(visit))
    assert len(visits) >= 5  # of the six possible ones


def test_shuffled_within_windows_only():
    order = SampleOrder([[50] * 10], 0, 150)
    windows = order.windows(0)
    # Three of 150 would leave 50 alone at the end.
    assert [len(w.shards) for w in windows] == [4, 3, 3] and [w.start for w in windows] == [0, 200, 350]
    run = epoch_of(order, 0)
    for window in windows:
        part = run[window.start : window.start + window.size]
        assert {s for _, s, _ in part} == set(window.shards)
        assert [(s, i) for _, s, i in part] != sorted((s, i) for _, s, i in part)
        assert len({s for _, s, _ in part[:25]}) == len(window.shards)


def test_permutation_is_uniform():
    """Chi-square of where sample 0 of one shard ends up, over 2,000 epochs: 11 degrees of freedom."""
    order = SampleOrder([[12]], 3, 1)
    counts = np.bincount([next(p for p in range(12) if order.locate(e, p)[2] == 0) for e in range(2000)], minlength=12)
    assert ((counts - 2000 / 12) ** 2 / (2000 / 12)).sum() < 31.3  # p = 0.001


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_the_same_global_batches(processes):
    parts = [batch_positions(4, 12, rank, processes) for rank in range(processes)]
    assert {len(part) for part in parts} == {12 // processes}
    assert sorted(p for part in parts for p in part) == list(range(48, 60))
    assert all(p % processes == rank for rank, part in enumerate(parts) for p in part)


@pytest.mark.parametrize(("window", "batch"), [(40, 8), (40, 10), (7, 12), (1000, 8)])
def test_replacements_are_never_in_the_global_batch_already(window, batch):
    """However many samples of it are bad, and however many of what replaces them: all stay different."""
    order = SampleOrder([[13] * 11, [9] * 5], 5, window, batch)
    others = len(order) // batch - 1
    for first in range(0, len(order) - batch + 1, batch):
        inside = [order.locate(1, position) for position in range(first, first + batch)]
        replaced = [
            order.replacement(1, position, attempt)
            for position in range(first, first + batch)
            for attempt in range(others)
        ]
        assert len({*inside, *replaced}) == batch + len(replaced)
        fresh = SampleOrder([[13] * 11, [9] * 5], 5, window, batch)
        assert replaced[-others:] == [fresh.replacement(1, first + batch - 1, attempt) for attempt in range(others)]


def test_replacements_are_of_the_window_while_it_has_others():
    order = SampleOrder([[10] * 30], 0, 100, 8)
    for position in range(0, len(order), 7):
        window = next(w for w in order.windows(0) if w.start <= position < w.start + w.size)
        near = [order.replacement(0, position, attempt) for attempt in range(11)]
        assert all(shard in window.shards for _, shard, _ in near)
    alone = SampleOrder([[8]], 0, 8, 8)  # the only batch: better one twice than none
    assert {alone.replacement(0, 3, attempt).sample for attempt in range(200)} == set(range(8))


def test_the_default_window_spreads_neighbours_over_many_batches():
    """Five captions a picture, one line each, in shards of 1000: how often another one of its picture is in a batch."""
    batch, lines = 8192, 560_000
    order = SampleOrder([[1000] * (lines // 1000)], 0, default_window(batch), batch)
    together = []
    for first in range(0, 20 * batch, batch):
        numbers = [order.sample_id(*order.locate(0, position)) for position in range(first, first + batch)]
        pictures = np.unique(np.array(numbers) // 5, return_counts=True)[1]
        together.append((pictures * (pictures > 1)).sum() / batch)
    # 1 - (1 - 1/16)^4 = 0.23 in windows of 16 batches; eight shards, as before, give 1.
    assert np.mean(together) < 0.27


def test_sample_ids_number_the_data():
    order = SampleOrder(SIZES, 5, 12)
    ids = [order.sample_id(d, s, i) for d, sizes in enumerate(SIZES) for s, n in enumerate(sizes) for i in range(n)]
    assert ids == list(range(42))


def test_errors_show_the_arithmetic():
    order = SampleOrder(SIZES, 0, 12)
    assert order.batches_per_epoch(10) == 4
    with pytest.raises(ValueError, match=r"42 samples / 64 in a global batch = 0\.66"):
        order.batches_per_epoch(64)
    with pytest.raises(ValueError, match="global batch of 10 over 3 processes"):
        batch_positions(0, 10, 0, 3)
    with pytest.raises(ValueError, match="no samples in 2 data sets with 1 shards"):
        SampleOrder([[0], []], 0)
    with pytest.raises(ValueError, match="at least 1"):
        SampleOrder(SIZES, 0, 0)
    with pytest.raises(IndexError, match="42"):
        order.locate(0, 42)


def test_large_data_costs_little():
    """143 million samples in 14,300 shards: a position in the middle is found without building an epoch."""
    order = SampleOrder([[10_000] * 14_300], 0, default_window(8192), 8192)
    dataset, shard, sample = order.locate(7, 71_234_567)
    assert dataset == 0 and 0 <= shard < 14_300 and 0 <= sample < 10_000
    assert max(window.size for window in order.windows(7)) <= 150_000
