"""Where a process computes that was started with others."""

import pytest
import torch
from accelerate import PartialState

from tests.training.processes import run_in_processes
from training.evaluation import embedding, process


@pytest.mark.parametrize(("backend", "gpus", "refused"), [("nccl", 1, True), ("nccl", 2, False), ("gloo", 1, False)])
def test_two_processes_on_one_gpu_are_refused_where_nccl_would(monkeypatch, backend, gpus, refused):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(process.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(process.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if not refused:
        process.check_own_gpu()
        return
    with pytest.raises(
        ValueError, match=r"2 processes were started .* shows 1 GPUs: NCCL refuses .*\(--num_processes 1"
    ):
        process.check_own_gpu()


def gathered_in_pieces(rank, world_size):
    """The results of 11 batches, and how many of them any gather held."""
    PartialState(cpu=True)  # as an evaluation does first
    largest, original = [], embedding.dist.all_gather_object

    def gather(found, own, group):
        original(found, own, group=group)
        largest.append(sum(map(len, found)))

    embedding.PIECE, embedding.dist.all_gather_object = 2, gather
    return embedding.map_batches(lambda rows: rows[0], 22, 2, "rows"), largest


def test_results_of_all_processes_are_gathered_in_pieces():
    expected = list(range(0, 22, 2)), [6, 5]
    assert run_in_processes(gathered_in_pieces, 3) == [expected] * 3
