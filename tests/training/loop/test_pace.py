"""What the log shows of all processes, and the slow one by name."""

import time

import pytest
import torch
from torch import nn

from tests.training.processes import run_in_processes
from tests.training.runs import MemoryReader, settings, use_memory
from training import pretrain
from training.loop import pace
from training.loop.pace import Pace, Told, relative_times, shown
from training.loop.tracking import read_metrics


def told(*each):
    """(seconds waited for data, seconds computed alone) of each process, in a window of 10 s."""
    return [Told(f"node-{n}", 10.0, waited, computed, {}) for n, (waited, computed) in enumerate(each)]


def test_a_process_that_computes_slowly_takes_longer_and_so_does_one_that_reads_slowly():
    assert relative_times(told((0, 2), (0, 2), (0, 2.6))) == pytest.approx([1, 1, 1.3])
    # Without its waiting all would need 8 s.
    assert relative_times(told((0, 2), (2, 2), (0, 2))) == pytest.approx([1, 10 / 8, 1])
    assert relative_times(told((1, 0), (1, 0))) == pytest.approx([1, 1])  # nothing is known of computing


def test_what_is_bad_in_one_process_alone_is_seen():
    both = [Told("a", 10, 1, 2, {"data/bad_fraction": 0.0, "x": 1}), Told("b", 10, 5, 2, {"data/bad_fraction": 0.5})]
    found = shown(both)
    assert found["data_wait_share"] == pytest.approx(0.3) and found["data_wait_share_largest"] == 0.5
    assert found["data/bad_fraction"] == 0.25 and found["data/bad_fraction_largest"] == 0.5 and found["x"] == 1
    assert found["slowest_process"] == 1 and found["slowest_time"] > 1.2
    assert shown(both[:1]) == {"data_wait_share": 0.1, "data/bad_fraction": 0, "x": 1}


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.text = nn.Linear(2, 2)
        self.vision = nn.Sequential(nn.Conv1d(1, 1, 1), nn.SyncBatchNorm(1))


def test_a_slow_process_is_named_after_a_hundred_steps_and_once(monkeypatch):
    one, slow = Pace(Towers(), torch.device("cpu")), told((0, 2), (0, 3), (0, 2))
    monkeypatch.setattr(pace, "everyone", lambda own: slow)
    said = []
    for _ in range(4):
        for _ in range(50):
            one.add(8, 0.0)
        said.append(one.metrics({})[1])
    assert [len(lines) for lines in said] == [0, 1, 0, 0]
    assert said[1][0].startswith("process 1 on node-1 takes 1.50 of the median process's time, since 100 steps")
    assert "its towers take 0.060 s (median 0.040 s)" in said[1][0]


def test_only_towers_in_which_nobody_waits_for_others_are_timed():
    towers = Towers()
    one = Pace(towers, torch.device("cpu"))
    towers.text(torch.ones(1, 2))
    towers.eval()
    towers.text(torch.ones(1, 2))  # a measurement on other data
    towers.vision[0](torch.ones(1, 1, 1))
    assert len(one._spans) == 1 and 0 < one._computed() < 10


class SlowInOne(MemoryReader):
    """The second process waits for its data."""

    def batches(self, epoch, position):
        for batch in super().batches(epoch, position):
            if pretrain.rank() == 1:
                time.sleep(0.2)
            yield batch

    def metrics(self):
        return {"data/bad_fraction": 0.25 * pretrain.rank()}


def run(rank, world_size, args):
    pace.SLOW_STEPS = 4
    pretrain.run(args)


def test_a_run_shows_all_processes(tmp_path, monkeypatch, capfd):
    use_memory(monkeypatch, SlowInOne)
    run_in_processes(run, 2, settings(tmp_path, max_steps=4, log_every_steps=2))
    for line in (line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in line):
        assert line["data_wait_share_largest"] > 1.5 * line["data_wait_share"] > 0
        assert line["data/bad_fraction"] == 0.125 and line["data/bad_fraction_largest"] == 0.25
        assert line["slowest_process"] == 1 and line["slowest_time"] > 1
