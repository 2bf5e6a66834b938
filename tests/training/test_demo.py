"""The demo's stages: kept, timed, comparable; and, slow, the whole demo in small."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from training import demo
from training.demo import (
    DemoArguments,
    Stages,
    main,
    reload_stage,
    save_arrays,
    steps_in_the_same_time,
    training_settings,
)

SMALL = {
    "model": "ViT-B-32",
    "model_config": {
        "projection_dim": 16,
        "vision_config": {
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_leff_layers": 1,
        },
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"},
    },
    "global_batch_size": 8,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "dataloader_workers": 0,
    "log_every_steps": 2,
    "eval_every_steps": 3,
    "save_every_steps": 2,
    "trackers": "none",
}


@pytest.fixture
def args(tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return DemoArguments(
        output_dir=str(tmp_path / "demo"),
        config=str(tmp_path / "small.yaml"),
        train=24,
        validation=10,
        per_object=2,
        processes=2,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"processes": -1}, "--processes: expected 0 or more, got -1"),
        ({"max_steps": 3}, "--training and --max-steps belong to --stage"),
        ({"training": "clip"}, "--training and --max-steps belong to --stage"),
        ({"train": 1}, "--train: expected at least 2, got 1"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_drawn(args, words, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(args, **words)


@pytest.mark.parametrize(
    ("asked", "there", "on_gpu"), [("auto", True, True), ("auto", False, False), ("cpu", True, False)]
)
def test_a_gpu_is_taken_where_there_is_one(args, monkeypatch, asked, there, on_gpu):
    """By one process, which Accelerate does not keep on the CPU."""
    started = []

    def run(command, env, check):
        started.append((command, env["ACCELERATE_USE_CPU"]))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(demo, "choose_device", torch.device)
    monkeypatch.setattr(demo, "usable_cores", lambda: 2)
    monkeypatch.setattr(subprocess, "run", run)
    chosen = demo.settled(DemoArguments(output_dir=args.output_dir, config=args.config, device=asked))
    demo.start(chosen, "train", "pyramid", processes=chosen.processes)
    [(command, on_cpu)] = started
    assert ("torch.distributed.run" in command, on_cpu) == (not on_gpu, str(not on_gpu).lower())
    assert command[command.index("--device") + 1] == chosen.device == ("cuda" if on_gpu else "cpu")


def test_stages_are_kept_and_timed(tmp_path):
    stages = Stages(tmp_path / "demo", {"train": 3})
    with pytest.raises(KeyError), stages.clock("scenes") as result:
        result["half"] = 1
        raise KeyError
    assert not stages.done("scenes") and stages.seconds("scenes") > 0
    before = stages.seconds("scenes")
    with stages.clock("scenes") as result:
        result["scenes"] = 3
    again = Stages(tmp_path / "demo", {"train": 3})
    assert again.done("scenes") and again.result("scenes") == {"scenes": 3} and again.seconds("scenes") > before
    with pytest.raises(ValueError, match="demo of other settings.*'train': 3.*'train': 4.*remove it"):
        Stages(tmp_path / "demo", {"train": 4})


def test_clip_is_clip_and_all_else_is_the_pyramids(args):
    pyramid = training_settings(args).to_dict()
    args.training = "clip"
    clip = training_settings(args).to_dict()
    assert (clip["loss_weights"], clip["label_smoothing"]) == ({"global_caption": 1.0}, 0.0)
    assert clip["model_config"].pop("vision_config") == {**SMALL["model_config"]["vision_config"], "num_leff_layers": 0}
    assert clip["model_config"] == {
        key: value for key, value in SMALL["model_config"].items() if key != "vision_config"
    }
    differ = {name for name, value in pyramid.items() if clip[name] != value}
    assert differ == {"loss_weights", "label_smoothing", "model_config", "output_dir"}


def test_only_a_training_that_saved_something_is_continued(args):
    """So that the first run does not say that there is no checkpoint yet, once for each training."""
    args.training = "pyramid"
    assert training_settings(args).resume is None
    (args.folder / "pyramid" / "checkpoints").mkdir(parents=True)
    assert training_settings(args).resume == "latest"
    args.training = "clip"
    (args.folder / "clip" / "final").mkdir(parents=True)
    assert training_settings(args).resume == "latest"


def test_same_time_in_steps(args):
    for name, steps, seconds in (("pyramid", 100, 90.0), ("clip", 100, 40.0)):
        (args.folder / name / "final").mkdir(parents=True)
        (args.folder / name / "final/training.json").write_text(json.dumps({"steps": steps, "seconds": seconds}))
    assert steps_in_the_same_time(args) == 225


def test_one_changed_bit_is_found(args, monkeypatch):
    embeds = {"global": np.ones((4, 8), np.float32), "caption": np.full((5, 8), -0.0, np.float32)}
    save_arrays(args.folder / "pyramid/before_saving.npz", process=7, **embeds)
    monkeypatch.setattr("training.demo.load_model", lambda folder: SimpleNamespace(model=None, processor=None))

    def compared_with(after):
        monkeypatch.setattr("training.demo.compared_embeddings", lambda *_: after)
        assert reload_stage(args) == 0
        return json.loads((args.folder / "reload.json").read_text())

    same = compared_with(embeds)
    assert (same["equal"], same["numbers"], same["different"], same["training_process"]) == (True, 72, 0, 7)
    changed = {**embeds, "global": embeds["global"].copy()}
    changed["global"][2, 3] = np.nextafter(np.float32(1), np.float32(2))
    different = compared_with(changed)
    assert (different["equal"], different["different"]) == (False, 1) and 0 < different["largest"] < 1e-6
    assert not compared_with({**embeds, "caption": -embeds["caption"]})["equal"]  # 0.0 is not -0.0


def test_wrong_settings_end_with_code_2(tmp_path, capsys):
    assert main(["--config", str(tmp_path / "no.yaml")]) == 2
    assert "there is no" in capsys.readouterr().err
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    assert main(["--config", str(tmp_path / "small.yaml"), "--train", "1"]) == 2
    assert "--train: expected at least 2" in capsys.readouterr().err


@pytest.mark.slow
def test_whole_demo_in_small(args, checkout):
    """All stages in their own processes; started again, it trains nothing anew; the page has all three runs."""
    command = [sys.executable, "-m", "training.demo", "--output-dir", args.output_dir, "--config", args.config]
    command += ["--train", "24", "--validation", "10", "--per-object", "2", "--processes", "2"]
    first = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "loaded in a new process: bit-equal" in first.stdout
    written = {path: path.stat().st_mtime_ns for path in args.folder.glob("*/final/model.safetensors")}
    assert len(written) == 3
    again = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)
    assert again.returncode == 0 and {path: path.stat().st_mtime_ns for path in written} == written
    page = (args.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/svg+xml") >= 4 and "OpenMoji" in page
