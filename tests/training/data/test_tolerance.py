"""How many bad samples are too many: against every sample written down, and on two processes."""

import random

import pytest

from tests.training.runs import MemoryReader, run_in_processes, settings, use_memory
from training import pretrain
from training.data import tolerance
from training.data.batches import DataError
from training.data.tolerance import BadSamples


@pytest.mark.parametrize("processes", [1, 4])
def test_lately_is_the_last_window_of_samples(processes, monkeypatch):
    monkeypatch.setattr(tolerance, "LARGEST_WINDOW", 64 * 40)
    draw, window = random.Random(0), 64 * 40
    counted = BadSamples(10**6, processes, 0.01)
    of_each, read = [], 0  # (good samples read when it was found) of every bad one
    for batch in range(400):
        bad = draw.choice([0, 0, 0, 1, 5]) if batch < 300 else 0
        read += 8
        counted.add(8, bad)
        of_each += [read] * bad
        share = window // processes
        block = share // 64
        least = sum(at > read - share + block for at in of_each)
        most = sum(at > read - share - block for at in of_each)
        assert least <= counted.number <= most
        assert counted.read == min(read * processes, window)
        expected = counted.number / (min(read, share) + counted.number)
        assert counted.share() == pytest.approx(expected)
    assert counted.number == 0 or window // processes > 800


def test_a_damaged_shard_of_thousands_is_little_and_a_late_rot_is_not_hidden():
    counted = BadSamples(143_000_000, 1, 0.01)
    for _ in range(100):  # one shard of eight in the first shuffle window
        counted.add(700, 100)
    assert not counted.too_many(counted.number) and counted.share() == 0.125
    for _ in range(1000):
        counted.add(10_000, 0)
    assert counted.number == 0
    for _ in range(100):
        counted.add(10_000, 110)
    assert counted.too_many(counted.number)


def test_few_samples_count_as_a_thousand():
    counted = BadSamples(44, 1, 0.01)
    counted.add(34, 10)
    assert not counted.too_many(counted.number)
    counted.add(44, 1)
    assert counted.too_many(counted.number)


def test_the_states_of_all_processes_are_that_of_one_that_reads_alone():
    both = [BadSamples(100_000, 2, 0.01), BadSamples(100_000, 2, 0.01)]
    alone, again, of_three = (BadSamples(100_000, number, 0.01) for number in (1, 2, 3))
    for number in range(300):
        bad = [number % 3, number % 5]
        for one, its in zip(both, bad):
            one.add(500, its)
        alone.add(1000, sum(bad))
    first, second = (one.state() for one in both)
    blocks = {block: first["bad"].get(block, 0) + second["bad"].get(block, 0) for block in first["bad"] | second["bad"]}
    summed = {name: first[name] + second[name] for name in ("share", "read")} | {"bad": blocks}
    loaded = BadSamples(100_000, 1, 0.01)
    loaded.load_state(summed)
    assert loaded.state() == alone.state() and loaded.number == both[0].number + both[1].number
    again.load_state(first)
    assert again.state() == first
    of_three.load_state(first)
    assert of_three.number == 0


class BadInOne(MemoryReader):
    """The second process comes by two bad samples a batch, which is too many only with what the first one adds."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.counted = BadSamples(self.samples, 2, 0.02)

    def batches(self, epoch, position):
        for batch in super().batches(epoch, position):
            self.counted.add(10, 1 + pretrain.rank())
            yield batch

    @property
    def recent_bad(self):
        return self.counted.number

    def check_bad(self, number):
        if self.counted.too_many(number):
            raise DataError(f"{number} in all")


def run(rank, world_size, args):
    with pytest.raises(DataError, match="^21 in all"):
        pretrain.run(args)


def test_all_processes_stop_together_at_what_they_read_together(tmp_path, monkeypatch):
    use_memory(monkeypatch, BadInOne)
    run_in_processes(run, 2, settings(tmp_path, max_steps=40, log_every_steps=1))
