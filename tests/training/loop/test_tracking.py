"""What a run says about itself."""

import pytest
import torch
from accelerate import PartialState

from tests.training.processes import run_in_processes
from training.loop.tracking import MetricsLog, duplicate_rates


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    class Main:
        is_main_process = True

    log = MetricsLog(tmp_path / "run", Main())
    log.path.unlink()
    log.path.mkdir()  # as unwritable as a full disk, for root too
    with pytest.raises(OSError, match="the run stops at step 7; make room.*metrics.jsonl"):
        log.write(7, {"loss/total": 1.0})


def duplicates(rank, world_size):
    PartialState(cpu=True)  # as a run does first
    row = [5, 6, 7, 0]
    batch = {
        "input_ids": torch.tensor([row + [0] * rank, [rank + 1, 2, 3, 4] + [0] * rank]),
        "tag_input_ids": torch.tensor([row, row]),
        "has_tags": torch.tensor([True, rank == 0]),
    }
    return duplicate_rates(batch)


def test_duplicates_are_counted_over_the_global_batch_whatever_the_padding():
    expected = {"duplicates/caption": 1 / 4, "duplicates/tags": 2 / 3}
    assert run_in_processes(duplicates, 2) == [pytest.approx(expected)] * 2
