"""Runs under torchrun, with loader processes: SIGTERM as launchers and schedulers send it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.training.prepare.small_data import FEATURES, write_shards
from tests.training.tiny import VIT
from training import pretrain
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics

CHECKOUT = Path(pretrain.__file__).parent.parent
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"}
MODEL = {
    "text_config": TEXT,
    "vision_config": {**VIT, "roi_feature_size": FEATURES},
    "projection_dim": 8,
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "scenes", range(44))


def launched(folder, shards, **changes):
    """torchrun with two processes, each with two workers, in a process group of its own."""
    settings = {
        "output_dir": str(folder / "run"),
        "train_data": [str(shards)],
        "model": "ViT-B-32",
        "model_config": MODEL,
        "global_batch_size": 8,
        "max_steps": 100_000,
        "precision": "fp32",
        "log_every_steps": 1,
        "save_every_steps": 0,
        "trackers": ["none"],
        "dataloader_workers": 2,
        **changes,
    }
    config = folder / "run.yaml"
    config.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "training.pretrain", "--config", str(config), "--resume", "latest"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "120"
    with open(folder / "output", "w") as output:
        return subprocess.Popen(
            command, cwd=CHECKOUT, stdout=output, stderr=output, env=environment, start_new_session=True
        )


def steps_logged(folder):
    return [line["step"] for line in read_metrics(folder / "run" / "metrics.jsonl")]


def wait_for_steps(launcher, folder, steps, seconds=300):
    end = time.monotonic() + seconds
    while len(steps_logged(folder)) < steps:
        assert launcher.poll() is None and time.monotonic() < end, (folder / "output").read_text()[-3000:]
        time.sleep(0.2)


def processes_below(pid):
    """All processes that descend from this one."""
    return psutil.Process(pid).children(recursive=True)


def to_the_launcher(launcher):
    launcher.terminate()


def to_everybody(launcher):
    """As Slurm's --signal does, beside what the launcher passes on."""
    for process in [*processes_below(launcher.pid), launcher]:
        os.kill(process.pid, signal.SIGTERM)


def twice_to_the_trainers(launcher):
    for _ in range(2):
        for process in processes_below(launcher.pid):
            process.terminate()
        time.sleep(0.05)


@pytest.fixture
def launch(tmp_path, shards):
    """`launched`, and whatever is left of it is killed at the end."""
    started = []

    def start(**changes):
        started.append(launched(tmp_path, shards, **changes))
        return started[-1]

    yield start
    for launcher in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [*processes_below(launcher.pid), psutil.Process(launcher.pid)]:
                process.kill()


@pytest.mark.parametrize("send", [to_the_launcher, to_everybody, twice_to_the_trainers])
def test_sigterm_saves_whoever_gets_it(tmp_path, launch, send):
    launcher = launch()
    wait_for_steps(launcher, tmp_path, 3)
    processes = processes_below(launcher.pid)
    assert len(processes) >= 6  # two processes and their workers
    send(launcher)
    code = launcher.wait(timeout=200)
    said = (tmp_path / "output").read_text()
    assert code != 0 and "stopped by SIGTERM at step" in said, said[-3000:]
    assert "loader worker died" not in said
    (saved,) = list_checkpoints(tmp_path / "run")
    assert int(saved.name.removeprefix("step-")) == steps_logged(tmp_path)[-1]
    end = time.monotonic() + 20
    while any(process.is_running() and process.status() != "zombie" for process in processes):
        assert time.monotonic() < end
        time.sleep(0.2)
