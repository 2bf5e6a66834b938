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


def windows_of(order, epoch):
    """The windows of an epoch in turn with the positions that are in each."""
    found = {}
    for position in range(len(order)):
        found.setdefault(order.window(epoch, position), []).append(position)
    return found


def test_shuffled_within_windows_only():
    order = SampleOrder([[50] * 10], 0, 150)
    windows = windows_of(order, 0)
    # Of 150 there would be 50 left over at the end.
    assert [(w.first, w.size) for w in windows] == [(0, 166), (166, 167), (333, 167)]
    run = epoch_of(order, 0)
    for window, positions in windows.items():
        part = [run[position] for position in positions]
        assert positions == list(range(window.first, window.first + window.size))
        assert {s for _, s, _ in part} == set(order.shards_of(window)[1])
        assert [(s, i) for _, s, i in part] != sorted((s, i) for _, s, i in part)
        assert len({s for _, s, _ in part[:50]}) == len(order.shards_of(window)[1])


def test_a_window_has_the_samples_of_a_shard_at_least():
    assert len(windows_of(SampleOrder([[100] * 4], 0, 1), 0)) == 4


LANES = {
    "equal": ([[300] * 40], 2400, 512),
    "ragged, several data sets": ([list(range(100, 300, 7)), [2000], [900, 0, 300] * 5], [1000, 3000, 2000], 768),
    "less than a batch": ([[10] * 70, [400] * 30], 2048, 1024),
}


@pytest.mark.parametrize(("sizes", "window", "batch"), LANES.values(), ids=LANES)
def test_lanes_hold_equally_many_of_each_batch_and_each_sample_once(sizes, window, batch):
    order = SampleOrder(sizes, 3, window, batch)
    assert max(order.lanes) > 1
    run = epoch_of(order, 1)
    assert len(set(run)) == len(run) == sum(map(sum, sizes))
    windows = windows_of(order, 1)
    for window, positions in windows.items():
        assert len(positions) == window.size and len({run[p] for p in positions}) == window.size
        dataset, shards = order.shards_of(window)
        assert {run[p][:2] for p in positions} == {(dataset, shard) for shard in shards}
        # Neighbours in each batch: the same part of all of them.
        places = {p % batch * order.lanes[dataset] // batch for p in positions}
        assert len(places) == 1
        for position in positions[:: max(window.size // 2, 1)]:
            after = [p for p in range(position, len(order), batch) if order.window(1, p) != window]
            assert order.next_window(1, position) == (
                order.window(1, after[0]) if after else order.window(2, position % batch)
            )


@pytest.mark.parametrize(("shards", "size"), [(1000, 10_000), (100_000, 1430)])
def test_a_node_reads_its_lanes_alone(shards, size):
    """Of eight nodes: the shards that each reads in an epoch, and in the windows of a moment."""
    batch, nodes = 8192, 8
    order = SampleOrder([[size] * shards], 0, default_window(batch), batch)
    read = []
    for node in range(nodes):
        places = range(node * batch // nodes, (node + 1) * batch // nodes, order.lane_length)
        epoch = set()
        for first in range(0, len(order) - batch, 16 * batch):  # as many as a window has at least
            now = {shard for place in places for shard in order.shards_of(order.window(0, first + place))[1]}
            epoch |= now
            # What the windows hold, and a shard cut at both ends of each.
            assert len(now) <= 1.1 * default_window(batch) / nodes / size + 2 * len(places)
        read.append(epoch)
    assert sum(map(len, read)) <= shards + nodes and max(map(len, read)) <= shards / nodes + 2


def test_positions_of_a_process_take_turns_between_lanes():
    assert batch_positions(1, 16, 0, 2, 4) == [16, 20, 17, 21, 18, 22, 19, 23]
    assert batch_positions(1, 16, 1, 2) == list(range(24, 32))


def test_permutation_is_uniform():
    """Chi-square of where sample 0 of one shard ends up, over 2,000 epochs: 11 degrees of freedom."""
    order = SampleOrder([[12]], 3, 1)
    counts = np.bincount([next(p for p in range(12) if order.locate(e, p)[2] == 0) for e in range(2000)], minlength=12)
    assert ((counts - 2000 / 12) ** 2 / (2000 / 12)).sum() < 31.3  # p = 0.001


@pytest.mark.parametrize("processes", [1, 2, 3, 6])
def test_processes_share_the_same_global_batches(processes):
    parts = [batch_positions(4, 12, rank, processes) for rank in range(processes)]
    assert {len(part) for part in parts} == {12 // processes}
    assert [p for part in parts for p in part] == list(range(48, 60))


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
    for sizes, window, batch in (([10] * 30, 100, 8), ([100] * 64, 3200, 512)):
        order = SampleOrder([sizes], 0, window, batch)
        for position in range(0, len(order), 7):
            inside = order.shards_of(order.window(0, position))[1]
            others = order.window(0, position).size * order.lanes[0] // batch - 1
            near = [order.replacement(0, position, attempt) for attempt in range(others)]
            assert all(shard in inside for _, shard, _ in near)
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
    assert order.lanes == [8] and order.window(7, 71_234_567).size <= 150_000 // 8
