"""Right: the commands as people type them, on the device."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from tests.gpu.measure import apart, waits_counted
from tests.gpu.models import TOY_RESNET, TOY_TEXT
from tests.gpu.pictures import picture_folder, shards
from tests.gpu.right_model import saved_model
from tests.gpu.session import CHECKOUT, Finished, Part, Session

EXIT_STOPPED = 75
# Of the runs that only have to be right: they start quickly, and every kind of layer is in them.
SMALL = {
    "vision_config": {"image_size": 64, "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
                      "num_leff_layers": 1},
    "text_config": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "pooling": "eos"},
    "projection_dim": 64,
}  # fmt: skip
TOY = {"vision_config": TOY_RESNET, "text_config": {**TOY_TEXT, "pooling": "eos"}, "projection_dim": 32}


def pretraining_words(session: Session, name: str, **settings: Any) -> list[object]:
    """The command line of a small run into the folder `name`; `settings` are fields, True for a flag."""
    words = {
        "model": session.size("ViT-B-32", "RN50"),
        "model_config": json.dumps(session.size(SMALL, TOY)),
        "train_data": shards(session, "small", session.size(1024, 32)),
        "output_dir": session.folder / name,
        "global_batch_size": session.size(64, 8),
        "max_steps": session.size(8, 2),
        "precision": "bf16",
        "dataloader_workers": session.size(2, 0),
        "log_every_steps": 1,
        "trackers": "none",
    } | {key.replace("steps", "max_steps") if key == "steps" else key: value for key, value in settings.items()}
    line: list[object] = []
    for key, value in words.items():
        line += [f"--{key}"] if value is True else [f"--{key}", value]
    return line


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that have a loss; empty while there are none."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if "loss/total" in row]


def ways(session: Session) -> None:
    """Every way of training: exit code 0, and the first loss of the plain run where it is the same objective."""
    validation = shards(session, "validation", session.size(128, 8))
    chosen: dict[str, dict[str, Any]] = {
        "plain": {},
        "caching": {"per_device_chunk_size": session.size(16, 4)},
        "checkpointing": {"gradient_checkpointing": True},
        "average": {"ema_decay": 0.9, "validation_data": validation, "eval_every_steps": 4, "save_every_steps": 4},
        "freeze": {"freeze": "vision"},
        "multi-positive": {"multi_positive": True},
    }
    if not session.dry:
        chosen |= {"fp16": {"precision": "fp16"}, "fp32": {"precision": "fp32"}, "compiled": {"torch_compile": True}}
        graphs = {"torch_compile_mode": "reduce-overhead", "text_lengths": 32}
        chosen |= {"CUDA graphs": {"torch_compile": True, **graphs}}
    calls: dict[str, Callable[[], Finished]] = {
        name: lambda name=name, settings=settings: session.command(
            "training.pretrain", *pretraining_words(session, f"way-{name}", **settings)
        )
        for name, settings in chosen.items()
    }
    if not session.dry:
        launched = ("--config_file", CHECKOUT / "training/configs/accelerate/one_gpu.yaml", "-m", "training.pretrain")
        calls["launched"] = lambda: session.command(
            "accelerate.commands.launch", *launched, *pretraining_words(session, "way-launched")
        )
    shards(session, "small", session.size(1024, 32))  # before several ask for them at once
    for name, done in session.side_by_side(calls).items():
        session.check(f"{name}: exit code{'' if done.code == 0 else ' ' + done.output[-300:]}", done.code, equals=0)
        rows = metrics_of(session.folder / f"way-{name}")
        if not rows:
            continue
        session.note(
            what=name, seconds=done.seconds, first_loss=rows[0]["loss/total"], last_loss=rows[-1]["loss/total"]
        )
        plain = metrics_of(session.folder / "way-plain")
        if plain and name not in ("freeze", "multi-positive"):
            # Caching has BatchNorm's statistics of a chunk; half precisions round. A frozen tower has the running ones.
            difference = abs(rows[0]["loss/total"] - plain[0]["loss/total"])
            session.check(f"{name}: first loss against the plain run's", difference, at_most=0.1)


def resume(session: Session) -> None:
    """SIGTERM and --resume against the run that nobody stopped.

    Equal to the bit with `deterministic`; without, a row says how far off.
    """
    shards(session, "small", session.size(1024, 32))
    kinds = ("deterministic",) if session.dry else ("deterministic", "plain")
    calls = {
        f"{kind}, {way}": lambda kind=kind, way=way: one_run(session, kind, way == "stopped")
        for kind in kinds
        for way in ("whole", "stopped")
    }
    weights = session.side_by_side(calls)
    for kind in kinds:
        whole, stopped = (weights.get(f"{kind}, {way}") for way in ("whole", "stopped"))
        if whole is None or stopped is None:
            continue
        whole, stopped = load_file(whole), load_file(stopped)
        differing = [name for name in whole if not whole[name].equal(stopped[name])]
        if kind == "deterministic":
            session.check("tensors that differ, deterministic", len(differing), equals=0)
        most = max((apart(stopped[name], whole[name]) for name in differing), default=0.0)
        session.note(what=f"resumed, {kind}", tensors=len(whole), differ=len(differing), by_at_most=most)


def one_run(session: Session, kind: str, stopped: bool) -> Path:
    """The weights that a run ends with; `stopped`: after a SIGTERM on its way.

    Raises:
        RuntimeError: an exit code that should not be.
    """
    name = f"resume-{kind}-{'stopped' if stopped else 'whole'}"
    folder = session.folder / name
    words = pretraining_words(session, name, steps=session.size(40, 16), keep_checkpoints=5, resume="latest")
    if kind == "deterministic":
        words.append("--deterministic")
    if stopped:
        code, output = terminated(session, words, folder)
        if code != EXIT_STOPPED:
            raise RuntimeError(f"SIGTERM at step {len(metrics_of(folder))}: exit code {code}: {output[-300:]}")
    done = session.command("training.pretrain", *words)
    if done.code:
        raise RuntimeError(f"exit code {done.code}: {done.output[-300:]}")
    return folder / "final" / "model.safetensors"


def terminated(session: Session, words: Sequence[object], folder: Path) -> tuple[int, str]:
    """(exit code, output) of a run that gets SIGTERM after its third step."""
    running = threading.Event()

    def third_step() -> bool:
        while not running.is_set() and session.left() > 0:
            if len(metrics_of(folder)) >= 3:
                return True
            time.sleep(0.005)
        return False

    if session.dry:
        watcher = threading.Thread(target=lambda: third_step() and os.kill(os.getpid(), signal.SIGTERM))
        watcher.start()
        try:
            done = session.command("training.pretrain", *words)
        finally:
            running.set()
            watcher.join()
        return done.code, done.output
    program = [sys.executable, "-m", "training.pretrain", *map(str, words)]
    with subprocess.Popen(
        program, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            third_step()
            process.terminate()
            _, errors = process.communicate(timeout=max(1.0, session.left()))
        finally:
            process.kill()
    return process.returncode, errors


def whole_run_waits(session: Session) -> None:
    """Nothing in the loop of `training.pretrain` waits for the device: ten more steps add nothing to a run's waits."""
    from training import pretrain

    counts = []
    for steps in (2, session.size(12, 3)):
        words = pretraining_words(session, f"waits-{steps}", steps=steps, log_every_steps=10_000)
        with waits_counted() as found:
            code = pretrain.main([str(word) for word in words])
        session.check(f"exit code of {steps} steps", code, equals=0)
        counts.append(dict(found))
    more = {place: count - counts[0].get(place, 0) for place, count in counts[1].items()}
    more = {place: count for place, count in more.items() if count > 0}
    places = ", ".join(f"{place} x {count}" for place, count in more.items())
    session.check(f"waits that more steps add{': ' if places else ''}{places}", sum(more.values()), equals=0)


def embed_and_explain(session: Session) -> None:
    """`pyramidclip embed` on the device against the CPU, in all types; `classify` and `explain` end well."""
    pictures, vit = picture_folder(session), saved_model(session)
    resnet, first = saved_model(session, "RN50"), sorted(picture_folder(session).iterdir())[0]
    device = session.device.type
    jobs: dict[str, list[object]] = {
        "cpu": ["embed", pictures, "--model", vit, "--device", "cpu"],
        "fp32": ["embed", pictures, "--model", vit, "--device", device],
        "bf16": ["embed", pictures, "--model", vit, "--device", device, "--dtype", "bfloat16"],
        "fp16": ["embed", pictures, "--model", vit, "--device", device, "--dtype", "float16"],
        "resnet cpu": ["embed", pictures, "--model", resnet, "--device", "cpu"],
        "resnet fp32": ["embed", pictures, "--model", resnet, "--device", device],
        "classify": ["classify", first, "--labels", "a dog", "a cat", "--model", vit, "--device", device],
        "explain": ["explain", first, "--text", "a dog", "--model", vit, "--device", device],
        "explain resnet": ["explain", first, "--text", "a dog", "--model", resnet, "--device", device],
    }
    outputs = {}
    for name, words in jobs.items():
        if words[0] != "classify":
            outputs[name] = session.folder / f"{name.replace(' ', '-')}{'.npz' if words[0] == 'embed' else '.png'}"
            words += ["--output", outputs[name]]
    calls = {name: lambda words=words: session.command("pyramidclip_command", *words) for name, words in jobs.items()}
    for name, done in session.side_by_side(calls, at_once=5).items():
        session.check(f"{name}: exit code{'' if done.code == 0 else ' ' + done.output[-300:]}", done.code, equals=0)
    found = {}
    for name, path in outputs.items():
        if path.suffix == ".npz" and path.is_file():
            with np.load(path) as arrays:
                found[name] = arrays["embedding"]
    bounds = {
        "fp32": ("cpu", 0.9999),
        "bf16": ("cpu", 0.99),
        "fp16": ("cpu", 0.999),
        "resnet fp32": ("resnet cpu", 0.999),
    }
    for name, (against, bound) in bounds.items():
        if name in found and against in found:
            smallest = float((found[name] * found[against]).sum(axis=1).min())
            session.check(f"{name}: smallest cosine with the CPU's", smallest, at_least=bound)


PARTS = (
    Part("right: waits of a run", 45, whole_run_waits),
    Part("right: embed and explain", 70, embed_and_explain),
    Part("right: ways of training", 110, ways),
    Part("right: SIGTERM and resume", 110, resume),
)
