"""Tiny runs of pre-training on made-up data: their settings, killing them, and comparing what two of them leave."""

import copy
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from pyramidclip_hf.levels_pyramidclip import LEVELS, TERMS
from tests.training.processes import run_in_processes
from tests.training.tiny import TEXT, VIT, tiny_batch
from training import pretrain
from training.data.coverage import Coverage
from training.loop import checkpoint
from training.loop import run as loop
from training.loop.distributed import rank, world_size
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics
from training.settings.pretraining import PretrainingArguments

MODEL_CONFIG = {"text_config": {**TEXT, "pooling": "eos"}, "vision_config": VIT, "projection_dim": 8}
NO_BATCH_NORM = {**MODEL_CONFIG, "vision_config": {**VIT, "num_leff_layers": 0}}
# Of the log: all that differs between two equal runs.
TIMES = (
    "samples_per_second",
    "data_wait_share",
    "data_wait_share_largest",
    "slowest_process",
    "slowest_time",
    "seconds",
)


class MemoryReader:
    """What the loader gives, without files: `samples` synthetic samples, in an order that depends on (seed, epoch,
    position) only; every process gets each world_size-th of a global batch.
    """

    def __init__(self, args, samples=40, missing=True, image_size=16):
        self.args, self.samples = args, samples
        self.fingerprint, self.description = f"memory-{samples}", [{"name": "memory", "samples": samples}]
        self.data = tiny_batch(samples, image_size, dtype=torch.float32, missing=missing)
        self.served = 0

    def batches(self, epoch, position):
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(self.args.seed * 1000 + epoch))
        size = self.args.global_batch_size
        for start in range(position, self.samples - size + 1, size):
            if self.args.overfit_batches and start >= self.args.overfit_batches * size:
                return
            rows = order[start : start + size][rank() :: world_size()]
            self.served += len(rows)
            yield {name: value[rows] for name, value in self.data.items()} | {"sample_keys": [f"{r:06d}" for r in rows]}

    def look(self):
        everyone = torch.ones(self.samples, dtype=torch.bool)
        present = {name: self.data.get(level.mask, everyone) for name, level in LEVELS.items()}
        present["roi"] = self.data["roi_mask"].any(dim=1)
        both = {term: (present[a] & present[b]).float().mean().item() for term, (a, b) in TERMS.items()}
        return Coverage(self.samples, both)

    def state(self):
        return {"served": self.served}

    def load_state(self, state):
        self.served = state.get("served", 0)

    def metrics(self):
        return {}

    recent_bad = 0

    def check_bad(self, number):
        pass

    def report(self):
        return [f"served {self.served}"]

    def close(self):
        pass


def settings(folder, **changes):
    """Eight steps of eight pairs, five steps to a pass over the data."""
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


def resumable_settings(folder, steps=9, **changes):
    """Checkpoints at 2, 4, 6, 8; dropout, so that random states matter; an average of the weights."""
    given = settings(folder, max_steps=steps, save_every_steps=2, log_every_steps=3, keep_checkpoints=2, ema_decay=0.9)
    given.model_config = copy.deepcopy(given.model_config)
    given.model_config["text_config"]["attention_dropout"] = 0.1
    for name, value in changes.items():
        setattr(given, name, value)
    return given


def use_memory(monkeypatch, reader=MemoryReader, **options):
    """Pre-training reads `reader` from here on, whatever data it is given."""
    monkeypatch.setattr(pretrain, "open_reader", lambda args, *rest: reader(args, **options))


def logged(folder, name):
    return [line[name] for line in read_metrics(folder / "metrics.jsonl") if name in line]


def run_settings(rank, world_size, args):
    """A whole run, for `run_in_processes`."""
    result = pretrain.run(args)
    return result.steps, result.finished


def after_step(step, action):
    """From here on, in this process, `action()` is done after that step of a run."""
    original = loop.advance

    def advance(run):
        original(run)
        if run.progress.step == step:
            action()

    loop.advance = advance


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_run(rank, world_size, args, step, where):
    """Runs until the last process kills itself, in a step or in the middle of writing a checkpoint."""
    reached = []

    def dying(original):
        def wrapper(*arguments):
            result = original(*arguments) if where == "after" or not reached else None
            if reached:
                die()
            return result

        return wrapper

    if rank == world_size - 1:
        after_step(step, die if where == "step" else lambda: reached.append(step))
        if where in ("before", "after"):  # the random states are the first file of a checkpoint, of every process
            checkpoint._write_tensors = dying(checkpoint._write_tensors)
        if where == "rename":
            checkpoint.prune = dying(checkpoint.prune)
    pretrain.run(args)


def expect_killed(args, world_size, step, where):
    with pytest.raises(AssertionError):
        run_in_processes(killed_run, world_size, args, step, where)


def outcome(folder):
    """(tensors by part, plain values) that a finished run left, but for times."""
    last = list_checkpoints(folder)[-1]
    optimizer = torch.load(last / "optimizer.pt", weights_only=True)
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(folder / "metrics.jsonl")]
    record = json.loads((last / "run.json").read_text())["progress"]
    readers = [torch.load(path, weights_only=True)["reader"] for path in sorted(last.glob("process-*.pt"))]
    parts = {
        "weights": load_file(last / "model" / "model.safetensors"),
        "optimizer": {f"{i}.{name}": value for i, s in optimizer["state"].items() for name, value in s.items()},
        "final": load_file(folder / "final" / "model.safetensors"),
    }
    parts |= {path.stem: load_file(path) for path in last.glob("*.safetensors")}
    return parts, [lines, readers, {name: record[name] for name in ("step", "epoch", "position", "window")}]


def assert_equal_runs(first, second, kept=("moving_average",)):
    """Both left the same to the bit. kept: what their last checkpoints have beside model and optimizer."""
    (tensors, values), (other_tensors, other_values) = outcome(first), outcome(second)
    assert tensors.keys() == other_tensors.keys() == {"weights", "optimizer", "final", *kept}
    for part, content in tensors.items():
        assert content.keys() == other_tensors[part].keys()
        assert not [name for name in content if not torch.equal(content[name], other_tensors[part][name])], part
    assert values == other_values
