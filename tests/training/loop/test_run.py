"""A whole run of the loop in this process on made-up data: what it writes, and how it stops."""

import json
import math
import os
import signal
import sys

import pytest
import torch

from pyramidclip_hf import PyramidCLIPModel
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.training.processes import run_in_processes
from tests.training.runs import MemoryReader, run_settings, settings, use_memory
from training import pretrain
from training.loop.optim import learning_rate_at
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import NonFiniteLoss, read_metrics


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


def test_a_run_leaves_a_model_metrics_and_the_newest_checkpoints(tmp_path):
    folder = tmp_path / "run"
    result = pretrain.run(settings(folder, trackers=["tensorboard"], keep_checkpoints=2))
    assert result.finished and result.steps == 8 and result.final == folder / "final"
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000006", "step-00000008"]
    assert list(folder.glob("tensorboard/**/events.*"))
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8]
    for name in DEFAULT_LOSS_WEIGHTS:
        assert 0 < lines[0][f"chance/{name}"] <= math.log(8)
    assert lines[0]["chance/local_caption"] == pytest.approx(math.log(8))
    assert lines[0]["temperature"] == pytest.approx(1 / lines[0]["logit_scale"])
    assert 0 <= lines[0]["data_wait_share"] < 1 and lines[0]["samples_per_second"] > 0
    assert lines[1]["learning_rate"] == learning_rate_at(7, 8, 1e-3, 0.02)
    weights = PyramidCLIPModel.from_pretrained(result.final).state_dict()
    last = PyramidCLIPModel.from_pretrained(folder / "checkpoints" / "step-00000008" / "model").state_dict()
    assert weights.keys() == last.keys() and all(torch.equal(weights[name], last[name]) for name in weights)
    assert json.loads((result.final / "training.json").read_text())["samples_seen"] == 64


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    pretrain.run(settings(tmp_path, max_steps=1))
    with pytest.raises(ValueError, match="already holds a run .*step-00000001.*--resume latest"):
        pretrain.run(settings(tmp_path, max_steps=1))
    assert pretrain.main(["--max-steps", "1", "--output-dir", str(tmp_path), "--model", "x"]) == 2
    assert pretrain.main(["--no-such-flag"]) == 2


class PoisonedReader(MemoryReader):
    """One sample's regions are NaN; it is met at the fifth step."""

    def batches(self, epoch, position):
        for number, batch in enumerate(super().batches(epoch, position)):
            if number == 4:
                batch["roi_features"][2, 0, 0] = math.nan
                batch["roi_mask"][2] = True
            yield batch


def test_a_loss_that_is_not_finite_stops_the_run_with_its_step_terms_and_keys(tmp_path, monkeypatch):
    use_memory(monkeypatch, PoisonedReader)
    with pytest.raises(NonFiniteLoss, match=r"step 5: loss nan .*local_caption \d.*roi_summary nan.*keys of this"):
        pretrain.run(settings(tmp_path, log_every_steps=8, save_every_steps=4))
    (record,) = (tmp_path / "nonfinite").glob("*.json")
    record = json.loads(record.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    assert math.isnan(float(record["terms"]["roi_summary"]))
    assert record["step"] == 5 and len(record["sample_keys"]) == 8
    assert record["sample_keys"] == list(MemoryReader(settings(tmp_path)).batches(0, 0))[4]["sample_keys"]
    (kept,) = list_checkpoints(tmp_path)
    weights = PyramidCLIPModel.from_pretrained(kept / "model").state_dict()
    assert kept.name == "step-00000004" and all(torch.isfinite(tensor).all() for tensor in weights.values())


class ShortReader(MemoryReader):
    """The second process gets one pair less from the third step on."""

    def batches(self, epoch, position):
        for number, batch in enumerate(super().batches(epoch, position)):
            short = number >= 2 and pretrain.rank() == 1
            yield {name: value[: len(value) - short] for name, value in batch.items()}


def test_a_process_with_a_smaller_batch_stops_before_pairs_are_matched_wrongly(tmp_path, monkeypatch):
    use_memory(monkeypatch, ShortReader)
    with pytest.raises(AssertionError, match="(?s)process 1 got 3 pairs at step 3, expected 4 as every process"):
        run_in_processes(run_settings, 2, settings(tmp_path))


def test_sigterm_saves_and_has_its_own_exit_code(tmp_path, monkeypatch):
    class Signalled(MemoryReader):
        def batches(self, epoch, position):
            for number, batch in enumerate(super().batches(epoch, position)):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    before = signal.getsignal(signal.SIGTERM)
    use_memory(monkeypatch, Signalled)
    monkeypatch.setattr(pretrain, "parse", lambda words: settings(tmp_path, save_every_steps=0))
    assert pretrain.main([]) == pretrain.EXIT_STOPPED == 75
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert not (tmp_path / "final").exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_dry_run_takes_two_steps_and_leaves_nothing(tmp_path, capsys):
    result = pretrain.run(settings(tmp_path / "run", dry_run=True, max_steps=1000))
    assert result.steps == 2 and not result.finished and not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "8 = 1 process x 8" in said and "1,000 steps, 8,000 samples" in said


@pytest.mark.parametrize("able", [True, False])
def test_a_half_type_that_is_slow_here_is_said(tmp_path, capsys, monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able}, raising=False)
    pretrain.run(settings(tmp_path / "run", dry_run=True, precision="bf16"))
    told = "--precision bf16: this processor has no bfloat16 arithmetic: it works, but float32 is faster"
    assert (told in capsys.readouterr().err) is not able


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install -e \"\.\[train\]\""):
        pretrain.run(settings(tmp_path))
