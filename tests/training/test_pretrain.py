"""A whole run in this process on made-up data: what it writes, what it refuses, and how it stops."""

import functools
import json
import math
import os
import signal
import sys

import numpy as np
import pytest
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidclip_hf import PyramidCLIPModel
from pyramidclip_hf.loss_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.training.memory_reader import MODEL_CONFIG, MemoryReader
from tests.training.processes import run_in_processes
from tests.training.tiny import RESNET, TEXT, VIT
from training import pretrain
from training.loop import run as loop
from training.loop.checkpoint import list_checkpoints, quiet_transformers
from training.loop.optim import learning_rate_at
from training.loop.tracking import MetricsLog, NonFiniteLoss, duplicate_rates, read_metrics
from training.settings.pretraining import PretrainingArguments

NO_BATCH_NORM = {**MODEL_CONFIG, "vision_config": {**VIT, "num_leff_layers": 0}}


def settings(folder, **changes):
    chosen = {
        "output_dir": str(folder),
        "model": "ViT-B-32",
        "model_config": MODEL_CONFIG,
        "global_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "log_every_steps": 4,
        "save_every_steps": 3,
        "trackers": ["none"],
    }
    return PretrainingArguments(**{**chosen, **changes})


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    monkeypatch.setattr(pretrain, "open_reader", lambda args, processor, config, folder: MemoryReader(args))


def logged(folder, name):
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


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


def test_the_logged_losses_are_those_of_the_objective(tmp_path):
    """The first step's terms, against a loss written out here on the same samples."""
    pretrain.run(settings(tmp_path, max_steps=1, learning_rate=0.0))
    reader = MemoryReader(settings(tmp_path))
    batch = next(iter(reader.batches(0, 0)))
    torch.manual_seed(0)
    model = pretrain.initial_model(settings(tmp_path))[0].train()
    with torch.no_grad():
        embeds = model.encode_levels(("local", "caption"), **{k: v for k, v in batch.items() if k != "sample_keys"})
    images, texts = (torch.nn.functional.normalize(embeds[level].double(), dim=1) for level in ("local", "caption"))
    logits = images @ texts.T / 0.07
    target = torch.full((8, 8), 0.2 / 7, dtype=torch.float64).fill_diagonal_(0.8)
    expected = -(target * (logits.log_softmax(0) + logits.log_softmax(1))).sum() / 16
    # BatchNorm sees the global pictures as a batch of their own, so leaving them out changes nothing for the local
    # ones.
    assert logged(tmp_path, "loss/local_caption") == pytest.approx([expected.item()], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "ViT-B-61"},
            "expected an architecture, a folder or a Hub id .* got 'ViT-B-61'; architectures: ViT-B-16",
        ),
        (
            {"global_batch_size": 64},
            "40 samples, fewer than one global batch: 1 processes x 64 = 64. Lower .* at most 40",
        ),
        ({"overfit_batches": 6}, "overfit_batches 6: the data has only 5 batches of 8"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"validation_data": "nowhere"}, "no folder nowhere"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_starts(tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){message}"):
        pretrain.run(settings(tmp_path, **changes))


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
    monkeypatch.setattr(pretrain, "open_reader", lambda args, processor, config, folder: PoisonedReader(args))
    with pytest.raises(NonFiniteLoss, match=r"step 5: loss nan .*local_caption \d.*roi_summary nan.*keys of this"):
        pretrain.run(settings(tmp_path, log_every_steps=8, save_every_steps=4))
    (record,) = (tmp_path / "nonfinite").glob("*.json")
    record = json.loads(record.read_text())
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
    monkeypatch.setattr(pretrain, "open_reader", lambda args, processor, config, folder: ShortReader(args))
    with pytest.raises(AssertionError, match="(?s)process 1 got 3 pairs at step 3, expected 4 as every process"):
        run_in_processes(run_settings, 2, settings(tmp_path))


def run_settings(rank, world_size, args):
    result = pretrain.run(args)
    return result.steps, result.finished


def test_sigterm_saves_and_has_its_own_exit_code(tmp_path, monkeypatch):
    class Signalled(MemoryReader):
        def batches(self, epoch, position):
            for number, batch in enumerate(super().batches(epoch, position)):
                if number == 3:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(pretrain, "open_reader", lambda args, processor, config, folder: Signalled(args))
    monkeypatch.setattr(pretrain, "parse_settings", lambda kind, argv: settings(tmp_path, save_every_steps=0))
    assert pretrain.main([]) == pretrain.EXIT_STOPPED == 75
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000004"]
    assert not (tmp_path / "final").exists() and signal.getsignal(signal.SIGTERM) is before


def test_a_dry_run_takes_two_steps_and_leaves_nothing(tmp_path, capsys):
    result = pretrain.run(settings(tmp_path / "run", dry_run=True, max_steps=1000))
    assert result.steps == 2 and not result.finished and not (tmp_path / "run").exists()
    said = capsys.readouterr().out
    assert "8 = 1 processes x 8" in said and "1,000 steps, 8,000 samples" in said


def test_overfitting_two_batches_reaches_the_smoothing_floor(tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain, "open_reader", lambda args, processor, config, folder: MemoryReader(args, 16, missing=False)
    )
    weights = {"local_caption": 0.5, "roi_tags": 0.5}
    pretrain.run(
        settings(
            tmp_path, max_steps=250, overfit_batches=2, learning_rate=5e-3, loss_weights=weights, save_every_steps=0,
            log_every_steps=50, model_config=NO_BATCH_NORM, weight_decay=0.0,
        )
    )  # fmt: skip
    floor = -0.8 * math.log(0.8) - 0.2 * math.log(0.2 / 7)  # the entropy of the softened targets at N = 8
    losses = logged(tmp_path, "loss/total")
    assert floor - 1e-4 < losses[-1] < floor + 0.15 < losses[0]


def test_caching_and_two_processes_give_the_losses_of_one(tmp_path):
    """Losses, gradient norm and learning rate of every step, on a model without BatchNorm."""
    common = {"model_config": NO_BATCH_NORM, "log_every_steps": 1, "save_every_steps": 0, "max_steps": 6}
    pretrain.run(settings(tmp_path / "one", **common))
    pretrain.run(settings(tmp_path / "cached", per_device_chunk_size=2, **common))
    run_in_processes(run_settings, 2, settings(tmp_path / "two", **common))
    run_in_processes(run_settings, 2, settings(tmp_path / "both", per_device_chunk_size=2, **common))
    for name in ("loss/total", "loss/roi_tags", "grad_norm", "logit_scale", "learning_rate"):
        if expected := logged(tmp_path / "one", name):
            for other in ("cached", "two", "both"):
                np.testing.assert_allclose(
                    logged(tmp_path / other, name), expected, rtol=1e-4, err_msg=f"{name} {other}"
                )
    assert len(logged(tmp_path / "two", "learning_rate")) == 6


def test_the_scale_is_clamped_after_each_step(tmp_path):
    config = {**MODEL_CONFIG, "logit_scale_init_value": math.log(99.99)}
    pretrain.run(settings(tmp_path, model_config=config, learning_rate=0.05, log_every_steps=1, overfit_batches=1))
    assert max(logged(tmp_path, "logit_scale")) <= 100 * (1 + 1e-6)


def test_half_precision_checkpointing_and_the_moving_average(tmp_path):
    changes = {"precision": "bf16", "gradient_checkpointing": True, "ema_decay": 0.5, "max_steps": 3}
    pretrain.run(settings(tmp_path, **changes))
    weights = PyramidCLIPModel.from_pretrained(tmp_path / "final").state_dict()
    average = PyramidCLIPModel.from_pretrained(tmp_path / "final-average").state_dict()
    assert weights["text_projection.weight"].dtype == torch.float32
    assert not torch.equal(weights["text_projection.weight"], average["text_projection.weight"])


class HostReads(TorchDispatchMode):
    """Counts operations whose result the host needs before it can go on."""

    WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [{"pooling": "max"}, {"pooling": "eos"}, {"tower": RESNET}, {"per_device_chunk_size": 4}, {"multi_positive": True}],
    ids=lambda changes: next(iter(changes)) + "=" + str(next(iter(changes.values())))[:4],
)
def test_the_host_reads_nothing_off_the_device_in_a_step(tmp_path, monkeypatch, changes):
    config = {**MODEL_CONFIG, "text_config": {**TEXT, "pooling": changes.pop("pooling", "eos")}}
    config["vision_config"] = changes.pop("tower", VIT)
    size = config["vision_config"]["image_size"]
    monkeypatch.setattr(pretrain, "open_reader", lambda args, *rest: MemoryReader(args, missing=False, image_size=size))
    args = settings(tmp_path, model_config=config, ema_decay=0.5, **changes)
    with loop.termination_noticed(), quiet_transformers():
        run = pretrain.build(args, tmp_path)
        loop.resume(run)
    run.objective.train()
    tensors = next(iter(run.reader.batches(0, 0)))
    keys = tensors.pop("sample_keys")
    run.take_step(tensors, 1e-3)  # the optimizer's state is made
    with HostReads() as reads:
        losses, norm = run.take_step(tensors, 1e-3)
        run.window.add(1, losses, norm, run.logit_scale, 1e-3, keys, 8, 0.0)
    assert not reads.found
    with reads:
        assert math.isfinite(losses.loss.item())
    assert reads.found == ["_local_scalar_dense"]


def test_a_model_continues_from_a_folder_and_freezes_a_tower(tmp_path):
    first = pretrain.run(settings(tmp_path / "first", max_steps=2))
    again = settings(tmp_path / "second", model=str(first.final), model_config=None, freeze="vision", max_steps=3)
    again.loss_weights, again.label_smoothing = {"global_caption": 1.0}, 0.0
    second = pretrain.run(again)
    before = PyramidCLIPModel.from_pretrained(first.final)
    after = PyramidCLIPModel.from_pretrained(second.final)
    changed = {n for n, t in after.state_dict().items() if not torch.equal(t, before.state_dict()[n])}
    assert changed and not [name for name in changed if name.startswith(("vision_model.", "visual_projection."))]
    assert after.config.loss_weights == {"global_caption": 1.0} and after.config.label_smoothing == 0.0


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    class Main:
        is_main_process = True

    log = MetricsLog(tmp_path / "run", Main())
    log.path.unlink()
    log.path.mkdir()  # as unwritable as a full disk, for root too
    with pytest.raises(OSError, match="the run stops at step 7; make room.*metrics.jsonl"):
        log.write(7, {"loss/total": 1.0})


def test_a_missing_package_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install -e \"\.\[train\]\""):
        pretrain.run(settings(tmp_path))


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


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_a_plain_one(tmp_path, monkeypatch):
    """Traced by dynamo, run by its eager backend: the code generator takes minutes on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    for name, switch in (("plain", False), ("compiled", True)):
        pretrain.run(
            settings(tmp_path / name, torch_compile=switch, max_steps=3, log_every_steps=1, save_every_steps=0)
        )
    assert logged(tmp_path / "compiled", "loss/total") == pytest.approx(
        logged(tmp_path / "plain", "loss/total"), rel=1e-5
    )
