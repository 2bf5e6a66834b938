"""Handing out: every piece is done once, whoever dies, and the last worker is ready hardly later than it must be."""

import heapq

import numpy as np
import pytest

from pyramidclip_hf.handing_out import MOST_DEATHS, Lost, Schedule


def simulated(items, speeds, deaths=()):
    """When the last of some workers is ready, and how often each piece was done, with a `Schedule` in between.

    Args:
        items: piece -> samples.
        speeds: samples a second of each worker.
        deaths: (when, worker) whose piece is lost; another one takes its place at once.
    """
    done, now = [], 0.0
    schedule = Schedule(items, lambda: now)
    free, left = list(range(len(speeds))), sorted(deaths)
    at_work = []  # (when ready, worker, piece)
    while not schedule.is_done:
        for worker in free[:]:
            if (item := schedule.next(worker, "here")) is not None:
                free.remove(worker)
                heapq.heappush(at_work, (now + items[item] / speeds[worker], worker, item))
        if left and left[0][0] <= at_work[0][0]:
            now, worker = left.pop(0)
            lost = [entry for entry in at_work if entry[1] == worker]
            at_work = [entry for entry in at_work if entry[1] != worker]
            heapq.heapify(at_work)
            for _, _, item in lost:
                schedule.died(item, "killed")
            free += [worker] * bool(lost)
            continue
        now, worker, item = heapq.heappop(at_work)
        schedule.done(item)
        done.append(item)
        free.append(worker)
    return now, done


def uneven_shards(seed):
    """1,000 shards of some thousand samples, 70 to 90,000."""
    sizes = np.random.default_rng(seed).lognormal(8.5, 0.9, 1000).astype(int) + 1
    return {f"{number:05d}": int(size) for number, size in enumerate(sizes)}


SPEEDS = {
    "equal": [100.0] * 32,
    "one of four at half the pace": [100.0, 100.0, 100.0, 50.0] * 8,
    "a straggler at a tenth": [100.0] * 31 + [10.0],
}


@pytest.mark.parametrize("speeds", SPEEDS.values(), ids=SPEEDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_uneven_shards_are_done_within_a_tenth_of_the_ideal(speeds, seed):
    items = uneven_shards(seed)
    total = sum(items.values())
    # Nobody can be faster than all workers at full pace to the end, nor than the fastest with the largest shard.
    ideal = max(total / sum(speeds), max(items.values()) / max(speeds))
    found, done = simulated(items, speeds)
    assert sorted(done) == sorted(items) and found <= 1.1 * ideal
    # By number of the worker, as processes share that never talk.
    fixed = max(sum(list(items.values())[number :: len(speeds)]) / speed for number, speed in enumerate(speeds))
    assert fixed > 1.1 * ideal


def test_deaths_cost_what_was_under_way_and_no_more():
    items, speeds = uneven_shards(5), [100.0] * 32
    ideal = sum(items.values()) / sum(speeds)
    deaths = [(ideal * (worker + 1) / 40, worker) for worker in range(20)]
    found, done = simulated(items, speeds, deaths)
    assert sorted(done) == sorted(items)
    assert found <= 1.1 * ideal


def test_a_small_piece_first_then_the_largest_and_unknown_sizes_in_their_order():
    now = 0.0
    schedule = Schedule({"a": 3, "b": None, "c": 9, "d": None, "e": 1, "f": 3}, lambda: now)
    assert schedule.next(0, "x") == "e"
    now += 1
    schedule.done("e")
    found = []
    while (item := schedule.next(0, "x")) is not None:
        found.append(item)
        now += 1
        schedule.done(item)
    assert found == ["c", "a", "b", "d", "f"] and schedule.is_done
    plain = Schedule(dict.fromkeys("zyx"))
    assert [plain.next(number, "x") for number in range(4)] == ["z", "y", "x", None]


def test_a_slow_worker_gets_nothing_that_the_others_have_done_sooner():
    now = 0.0
    schedule = Schedule({"first": 10, "second": 10, "third": 10, "last": 10}, lambda: now)
    assert [schedule.next("fast", "x"), schedule.next("slow", "x")] == ["first", "second"]
    now = 1.0
    schedule.done("first")
    assert schedule.next("fast", "x") == "third"
    now = 2.0
    schedule.done("third")
    assert schedule.next("fast", "x") == "last"
    now = 2.5
    schedule.died("second", "killed")
    # Ten seconds of its own, and 1.5 of who is at work.
    schedule._did["slow"] = (10.0, 10.0)
    assert schedule.next("slow", "x") is None
    schedule.died("last", "killed")
    assert schedule.next("slow", "x") == "second"


def test_a_piece_over_which_worker_after_worker_dies_ends_the_work():
    schedule = Schedule({"bad": 1, "good": 2})
    for _ in range(MOST_DEATHS):
        assert schedule.next(0, "x") == "bad"
        schedule.died("bad", "out of memory")
    assert schedule.next(0, "x") == "bad"
    with pytest.raises(Lost, match="bad: 4 workers died over it.*out of memory"):
        schedule.died("bad", "out of memory")


def test_what_one_machine_does_not_see_goes_to_another_and_what_none_sees_is_named():
    schedule = Schedule({"far": 1, "near": 2})
    assert schedule.next("one", "one") == "far"
    schedule.unseen("far", "one", {"one", "two"}, "no such file")
    assert schedule.next("one", "one") == "near" and schedule.next("one", "one") is None
    assert schedule.next("two", "two") == "far" and not schedule.is_done
    with pytest.raises(Lost, match=r"far: no worker can see it \(one, two\): no such file"):
        schedule.unseen("far", "two", {"one", "two"}, "no such file")
