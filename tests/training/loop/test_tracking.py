"""What a run says about itself."""

import errno
import json
import math
import time
from pathlib import Path

import pytest
import torch
from accelerate import PartialState

from tests.training.processes import run_in_processes
from training.loop.record import sum_of
from training.loop.task import StepLoss
from training.loop.tracking import MetricsLog, NonFiniteLoss, StepWindow, duplicate_rates, read_metrics


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    class Main:
        is_main_process = True

    log = MetricsLog(tmp_path / "run", Main())
    log.path.mkdir(parents=True)  # as unwritable as a full disk, for root too
    with pytest.raises(OSError, match="the run stops at step 7; mend it and use --resume latest.*metrics.jsonl"):
        log.write(7, {"loss/total": 1.0})
    log.path.rmdir()

    def full(metrics, step):
        raise OSError(errno.ENOSPC, "No space left on device")

    Main.log = staticmethod(full)
    with pytest.raises(OSError, match='step 7; make room and use --resume latest: "the trackers\' files"'):
        log.write(7, {"loss/total": 1.0})
    log.path.write_bytes(b'{"step": 7}\n' + b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match="line 2 is damaged"):
        read_metrics(log.path)


def test_a_log_goes_on_where_the_checkpoint_was(tmp_path):
    class Main:
        is_main_process = True

    folder = tmp_path / "new" / "run"
    log = MetricsLog(folder, Main())
    assert log.continue_at(0) == [] and log.path.read_bytes() == b""
    lines = [b'{"step": 2, "a": 1}\n', b'{"step": 4, "a": 2}\n', b'{"step": 6, "a": 3}\n', b'{"step": 8']
    log.path.write_bytes(b"".join(lines[:2]))
    written = sum_of(log.path)
    log.path.write_bytes(b"".join(lines))
    (folder / ".metrics.jsonl.123.partial").write_bytes(b"half")
    assert log.continue_at(4, written) == [] and log.path.read_bytes() == b"".join(lines[:2])
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    log.path.write_bytes(b"".join(lines[1:]))
    found = folder / "metrics-found-at-step-00000004.jsonl"
    assert log.continue_at(4, written) == [
        f"{log.path}: line 3 cannot be read and is left out",
        f"{log.path} is not what it was when step 4 was saved",
        f"as it was found it is {found}",
    ]
    assert log.path.read_bytes() == lines[1] and found.read_bytes() == b"".join(lines[1:])
    assert log.continue_at(0) == [] and log.path.read_bytes() == b""
    other = MetricsLog(tmp_path / "other", type("Other", (), {"is_main_process": False})())
    assert other.continue_at(0) == [] and not other.path.parent.exists()


def one_norm_is_not_finite(rank, world_size, folder):
    if rank == 1:  # which is slow to write
        write = Path.write_text
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path, "write_text", lambda *words, **more: (time.sleep(1), write(*words, **more))[1])
            return _one_norm_is_not_finite(rank, folder)
    return _one_norm_is_not_finite(rank, folder)


def _one_norm_is_not_finite(rank, folder):
    window = StepWindow([], folder, check_gradients=True)
    for step, norm in ((1, 1.0), (2, math.nan if rank == 1 else 1.0), (3, 1.0)):
        losses = StepLoss(torch.zeros(()), torch.ones(1), torch.zeros(0, dtype=torch.int64))
        window.add(step, losses, torch.tensor(norm), None, 1e-3, [f"key-{step}"])
    with pytest.raises(NonFiniteLoss, match="step 2: "):
        window.rows()
    return len(list((folder / "nonfinite").iterdir()))


def test_a_norm_that_is_not_finite_in_one_process_ends_all_at_that_step(tmp_path):
    assert run_in_processes(one_norm_is_not_finite, 2, tmp_path) == [2, 2]  # all is written before one ends the run
    written = sorted(path.name for path in (tmp_path / "nonfinite").iterdir())
    assert written == ["step-00000002-process-00000.json", "step-00000002-process-00001.json"]
    assert json.loads((tmp_path / "nonfinite" / written[0]).read_text())["sample_keys"] == ["key-2"]


def duplicates(rank, world_size):
    PartialState(cpu=True)  # as a run does first
    row = [5, 6, 7, 0]
    batch = {
        "input_ids": torch.tensor([row + [0] * rank, [rank + 1, 2, 3, 4] + [0] * rank]),
        "tag_input_ids": torch.tensor([row, row]),
        "has_tags": torch.tensor([True, rank == 0]),
    }
    return duplicate_rates(batch)


def test_what_is_no_number_is_null_which_any_tool_can_read(tmp_path):
    """The gradient norm of a step that fp16 overflowed in."""

    class Main:
        is_main_process = True

        def log(self, metrics, step):
            pass

    log = MetricsLog(tmp_path, Main())
    log.write(1, {"grad_norm": math.inf, "loss/total": 0.5, "other": math.nan})

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse) == {
        "step": 1,
        "grad_norm": None,
        "loss/total": 0.5,
        "other": None,
    }


def test_duplicates_are_counted_over_the_global_batch_whatever_the_padding():
    expected = {"duplicates/caption": 1 / 4, "duplicates/tags": 2 / 3}
    assert run_in_processes(duplicates, 2) == [pytest.approx(expected)] * 2
