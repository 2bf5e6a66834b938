"""Fine-tuning a classifier on coloured noise: its two stages, its numbers against plain forms, killed and continued."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyramidclip_command import EXIT_STOPPED
from pyramidclip_hf import PyramidCLIPForImageClassification, PyramidCLIPProcessor
from tests.training.processes import run_in_processes
from tests.training.runs import MODEL_CONFIG, NO_BATCH_NORM, TIMES, after_step, assert_equal_runs
from tests.training.to_evaluate import COUNTS, write_pictures
from training import finetune
from training.data.batches import DataError
from training.data.labelled import labelled_folder
from training.data.order import SampleOrder
from training.evaluation.classification import classification_metrics
from training.evaluation.results import read_json
from training.linear_probe import LinearProbeArguments
from training.loop import card
from training.loop import run as loop
from training.loop.identity import IdentityError
from training.loop.optim import learning_rate_at
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics
from training.settings.finetuning import FinetuneArguments
from training.transfer.batches import LabelledBatches
from training.transfer.classifier import classify
from training.transfer.parts import open_parts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return {name: write_pictures(folder / name, COUNTS, seed) for seed, name in enumerate(("train", "test"))}


def settings(folder, data, **changes):
    """Six epochs of three steps, the first two of the head alone."""
    chosen = {
        "output_dir": str(folder),
        "model": "ViT-B-32",
        "model_config": MODEL_CONFIG,
        "train_data": data["train"],
        "global_batch_size": 8,
        "epochs": 6,
        "head_epochs": 2,
        "learning_rate": 5e-3,
        "crop_area": [0.5, 1.0],
        "precision": "fp32",
        "dataloader_workers": 0,
        "log_every_steps": 3,
        "save_every_steps": 3,
        "keep_checkpoints": 9,
        "trackers": ["none"],
    }
    return FinetuneArguments(**{**chosen, **changes})


def run_settings(rank, world_size, args):
    return finetune.run(args).steps


def weights_of(checkpoint):
    return load_file(checkpoint / "model" / "model.safetensors")


def test_a_run_learns_and_leaves_a_classifier_that_transformers_loads(tmp_path, data):
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    folder = tmp_path / "run"
    args = settings(folder, data, validation_fraction=0.25, test_data=data["test"], trackers=["tensorboard"], epochs=8)
    args.global_batch_size = args.log_every_steps = 6
    result = finetune.run(args)
    assert result.finished and result.steps == 24
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation/top_1" in line] == [3, 6, 9, 12, 15, 18, 21, 24]
    assert [line["head_only"] for line in lines if "loss/total" in line] == [1.0, 0.0, 0.0, 0.0]
    assert lines[-1]["test/top_1"] == lines[-1]["test/mean_per_class"] == result.metrics["test/top_1"] == 1.0
    assert "logit_scale" not in lines[0] and list(folder.glob("tensorboard/**/events.*"))
    rates = [line["learning_rate"] for line in lines if "loss/total" in line]
    assert rates == [learning_rate_at(step, 24, 5e-3, 0.0) for step in (5, 11, 17, 23)]

    model = AutoModelForImageClassification.from_pretrained(result.final).eval()
    assert isinstance(model, PyramidCLIPForImageClassification)
    assert model.config.id2label == {0: "blue", 1: "dark red", 2: "green"}
    assert model.config.label2id == {"blue": 0, "dark red": 1, "green": 2}
    assert type(PyramidCLIPProcessor.from_pretrained(result.final).tokenizer).__name__ == "PyramidCLIPTokenizer"
    test = labelled_folder(data["test"])
    classify = pipeline("image-classification", model=str(result.final), device="cpu")
    pixels = AutoImageProcessor.from_pretrained(result.final)(test.read(9), return_tensors="pt")
    with torch.no_grad():
        expected = model(**pixels).logits.softmax(-1)[0]
    found = {one["label"]: one["score"] for one in classify(test.read(9))}
    assert max(found, key=found.get) == "dark red" == test.class_names[test.labels[9]]
    assert found == pytest.approx(dict(zip(test.class_names, expected.tolist())), rel=1e-4)

    record = json.loads((result.final / "training.json").read_text())
    assert record["pictures"] == {"train": 18, "validation": 6, "test": 24} and record["samples_seen"] == 144
    assert read_json(result.final / "results.json")[1][-1].metric_value == 1.0
    card = (result.final / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "| test/top_1 | 1.0000 |" in card


def test_the_first_stage_moves_the_head_alone_and_the_second_everything(tmp_path, data):
    """The encoder's BatchNorm statistics included."""
    finetune.run(settings(tmp_path, data, epochs=3, head_epochs=2))
    start = finetune.initial_classifier(settings(tmp_path, data), ["a", "b", "c"])[0].state_dict()
    head_only, whole = (weights_of(list_checkpoints(tmp_path)[place]) for place in (1, 2))
    moved = {name for name in start if not torch.equal(start[name], head_only[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    still = {name for name in start if torch.equal(start[name], whole[name])}
    # Frozen by design, and what pictures do not pass through.
    assert still == {
        "vision_model.embeddings.patch_embedding.weight",
        "vision_model.embeddings.roi_projection.weight",
    }
    assert any("running_mean" in name for name in start)


def test_the_logged_loss_is_the_cross_entropy_of_the_samples(tmp_path, data):
    args = settings(tmp_path, data, epochs=1, head_epochs=0, learning_rate=0.0, label_smoothing=0.1, log_every_steps=1)
    finetune.run(args)
    model, processor = finetune.initial_classifier(args, ["a", "b", "c"])
    pictures = labelled_folder(data["train"])
    maker = LabelledBatches(pictures, SampleOrder([[24]], 0, 1), processor, args.crop_area, args.flip)
    losses = []
    for batch in (maker[0, range(first, first + 8)] for first in (0, 8, 16)):
        with torch.no_grad():
            logits = model.train()(pixel_values=batch["pixel_values"]).logits.double().numpy()
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        right = logs[np.arange(8), batch["labels"].numpy()]
        losses.append(-(0.9 * right + 0.1 * logs.mean(axis=1)).mean())
    logged = [line["loss/total"] for line in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in line]
    assert logged == pytest.approx(losses, rel=1e-5)


def test_two_processes_do_what_one_does(tmp_path, data, monkeypatch):
    """In fp64 without BatchNorm, whose batches are a process's own; through both stages, with clipping."""
    original = finetune.initial_classifier

    def double(args, names):
        model, processor = original(args, names)
        return model.double(), processor

    monkeypatch.setattr(finetune, "initial_classifier", double)
    for world_size in (1, 2):
        args = settings(tmp_path / str(world_size), data, model_config=NO_BATCH_NORM, epochs=3, head_epochs=1)
        args.validation_data, args.max_grad_norm, args.label_smoothing = data["test"], 0.5, 0.1
        assert run_in_processes(run_settings, world_size, args) == [9] * world_size
    one, two = (load_file(tmp_path / n / "final" / "model.safetensors") for n in "12")
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-9
    lines = [read_metrics(tmp_path / n / "metrics.jsonl") for n in "12"]
    for first, second in zip(*lines, strict=True):
        assert second.pop("data/bad_fraction_largest", 0.0) == 0.0  # said of several processes only
        assert {k: v for k, v in first.items() if k not in TIMES} == pytest.approx(
            {k: v for k, v in second.items() if k not in TIMES}, rel=1e-5
        )


def disturbed(rank, world_size, args, step, kind):
    """Runs until a signal after a step."""
    after_step(step, lambda: os.kill(os.getpid(), kind))
    return finetune.run(args).finished


def test_a_killed_run_continues_bit_for_bit(tmp_path, data):
    """Killed while the head learns alone, and in the second stage; the checkpoint before lies in the first."""
    plain, killed = tmp_path / "a", tmp_path / "b"
    changes = {"validation_data": data["test"], "save_every_steps": 4, "log_every_steps": 2}
    run_in_processes(run_settings, 1, settings(plain, data, **changes))
    for step in (5, 7):  # the stages meet at step 6
        with pytest.raises(AssertionError):
            again = settings(killed, data, resume="latest", **changes)
            run_in_processes(disturbed, 1, again, step, signal.SIGKILL)
        assert list_checkpoints(killed)[-1].name == "step-00000004"
    run_in_processes(run_settings, 1, settings(killed, data, resume="latest", dataloader_workers=1, **changes))
    assert_equal_runs(plain, killed, kept=())
    assert len(read_metrics(plain / "metrics.jsonl")) == 15


def test_sigterm_saves_and_the_exit_code_says_so(tmp_path, data, monkeypatch):
    args = settings(tmp_path, data, save_every_steps=0)
    assert run_in_processes(disturbed, 1, args, 5, signal.SIGTERM) == [False]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005"]
    words = ["--output-dir", str(tmp_path), "--model", "RN50", "--train-data", str(tmp_path)]
    stopped = loop.RunResult(tmp_path, 5, False, None, {}, None, None)
    monkeypatch.setattr(finetune, "run", lambda args: stopped)
    assert finetune.main(words) == EXIT_STOPPED


def test_another_run_is_not_continued(tmp_path, data):
    own = {"train": write_pictures(tmp_path / "own", COUNTS, 0)}
    folder = tmp_path / "run"
    finetune.run(settings(folder, own, epochs=2, head_epochs=1))

    def refusal(**changes):
        with pytest.raises(IdentityError) as caught:
            finetune.run(settings(folder, own, **{"epochs": 2, "head_epochs": 1, "resume": "latest"} | changes))
        return str(caught.value)

    assert "schedule.learning_rate: was 0.005, is now 0.001" in refusal(learning_rate=1e-3)
    assert "schedule.head_epochs: was 1, is now 0" in refusal(head_epochs=0)
    assert "data.flip: was True, is now False" in refusal(flip=False)
    assert "objective.label_smoothing: was 0.0, is now 0.1" in refusal(label_smoothing=0.1)
    (tmp_path / "own" / "green").rename(tmp_path / "own" / "lime")
    assert "data.classes" in refusal() and "data.fingerprint" in refusal()
    with pytest.raises(ValueError, match="already holds a run .*--resume latest"):
        finetune.run(settings(folder, own))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, data, workers):
    own = {"train": write_pictures(tmp_path / "own", COUNTS, 0)}
    (tmp_path / "own" / "green" / "03.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="03.png cannot be read.*replaces none of them"):
        finetune.run(settings(tmp_path / "run", own, dataloader_workers=workers))
    with pytest.raises(DataError, match="more than max_image_pixels=99"):
        finetune.run(settings(tmp_path / "other", data, dataloader_workers=workers, max_image_pixels=99))


def test_pictures_to_measure_on_are_looked_at_before_the_first_step(tmp_path, data, capsys):
    """Of validation a bad one is left out and counted; of the test data, whose score is reported, it is refused."""
    own = write_pictures(tmp_path / "own", COUNTS, 1)
    (tmp_path / "own" / "green" / "03.png").write_bytes(b"no picture")
    args = settings(tmp_path / "run", data, validation_data=own, epochs=1, head_epochs=1)
    result = finetune.run(args)
    assert result.finished and result.metrics["validation/bad"] == 1
    assert "1 of 24 pictures cannot be read and are left out of validation: picture" in capsys.readouterr().err
    rest = write_pictures(tmp_path / "rest", COUNTS, 1)
    (tmp_path / "rest" / "green" / "03.png").unlink()
    same = finetune.run(dataclasses.replace(args, output_dir=str(tmp_path / "same"), validation_data=rest))
    assert {**same.metrics, "validation/bad": 1} == result.metrics
    with pytest.raises(ValueError, match="(?s)test data .*1 of 24 pictures cannot be read: .*03.png.*another score"):
        finetune.run(settings(tmp_path / "other", data, test_data=own))
    assert not (tmp_path / "other" / "checkpoints").exists()
    for path in (tmp_path / "own").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="validation data .*24 of 24 pictures cannot be read"):
        finetune.run(settings(tmp_path / "none", data, validation_data=own))


def test_what_cannot_be_run_is_refused(tmp_path, data):
    def refusal(**changes):
        with pytest.raises(ValueError) as caught:
            finetune.run(settings(tmp_path, data, **changes))
        return str(caught.value)

    few = write_pictures(tmp_path / "few", {"blue": 2, "green": 1})
    assert "only in few: []; not in it: ['dark red']" in refusal(validation_data=few)
    assert "24 samples, fewer than one global batch" in refusal(global_batch_size=25)
    assert "head_epochs 9 are part of all epochs" in refusal(head_epochs=9)
    assert "set both, or head_epochs: 0" in refusal(head_epochs=9)
    assert "model: expected a folder" in refusal(model="")
    assert "train_data: expected a folder" in refusal(train_data="")
    assert "crop_area: expected two shares" in refusal(crop_area=[0.9, 0.1])
    assert "label_smoothing: expected a share" in refusal(label_smoothing=1.0)
    assert finetune.main(["--learning-rat", "1"]) == 2


def test_a_file_of_settings_and_a_dry_run(tmp_path, data, capsys):
    config = tmp_path / "run.yaml"
    lines = [f"{name}: {json.dumps(value)}" for name, value in settings(tmp_path / "run", data).to_dict().items()]
    config.write_text("\n".join(line for line in lines if not line.endswith("null")))
    assert finetune.main(["--config", str(config), "--epochs", "4", "--dry-run", "--trackers", "none"]) == 0
    said = capsys.readouterr().out
    assert "cross-entropy over 3 classes" in said and "2 of 4 epochs the head alone" in said and "12 steps" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings_class", [FinetuneArguments, LinearProbeArguments])
def test_the_page_has_every_setting_as_it_is(settings_class):
    page = (Path(__file__).parents[2] / "docs" / "transfer.md").read_text(encoding="utf-8")
    for entry in dataclasses.fields(settings_class):
        default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
        shown = "" if default in (None, [], "", dataclasses.MISSING) else f"`{default}`"
        text = entry.metadata["help"].replace("%%", "%").replace("|", "\\|")
        assert f"| `{entry.name}` | {shown} | {text} |" in page


def test_a_classifier_is_published_with_its_own_card(tmp_path, data, monkeypatch):
    finetune.run(settings(tmp_path, data, epochs=1, head_epochs=1, validation_fraction=0.25, global_batch_size=6))
    calls = []
    monkeypatch.setattr(card, "publish_folder", lambda *args, **options: calls.append((args, options)))
    card.publish(tmp_path, "user/name")
    assert calls == [((tmp_path / "final", "user/name"), {"card": None, "remote_code": True, "private": None})]
    with pytest.raises(ValueError, match="is a classifier.*leave --results out"):
        card.publish(tmp_path, "user/name", result_files=[tmp_path / "final" / "results.json"])


def test_scores_while_training_are_those_of_the_saved_model(tmp_path, data):
    """Against a run's own last line, through a fresh process-independent load."""
    result = finetune.run(settings(tmp_path, data, epochs=1, head_epochs=1, validation_data=data["test"]))
    part = open_parts(settings(tmp_path, data, validation_data=data["test"]))["validation"]
    model = PyramidCLIPForImageClassification.from_pretrained(result.final).eval()
    processor = PyramidCLIPProcessor.from_pretrained(result.final)
    rows = []
    for number in range(24):
        pixels = processor(images=part.data.read(number), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            rows.append(model(pixel_values=pixels).logits[0])
    right = torch.stack(rows).argmax(1) == torch.tensor(part.data.labels)
    assert result.metrics["validation/top_1"] == pytest.approx(right.double().mean().item())
    scores = classify(model, processor, part.pictures, 7)
    assert classification_metrics(scores, torch.tensor(part.labels))["top_1"] == result.metrics["validation/top_1"]
