"""Where a process computes that was started with others."""

import pytest
import torch

from training.evaluation import process


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
