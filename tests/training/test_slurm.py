"""training/configs/accelerate/slurm.sh with stand-ins for Slurm, and the launcher that it calls."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from accelerate.commands.launch import launch_command_parser

from tests.training.machines import free_port
from tests.training.prepare.small_data import FEATURES, write_shards
from tests.training.tiny import VIT
from training import pretrain
from training.loop.outcome import REASONS, Outcome, read_outcome, write_outcome
from training.loop.run_folder import checkpoint_path, list_checkpoints
from training.loop.tracking import read_metrics

CHECKOUT = Path(pretrain.__file__).parent.parent
CONFIGS = CHECKOUT / "training" / "configs" / "accelerate"
RECIPE = "training/configs/vit_b_32_15m_8_epochs.yaml"
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"}
MODEL = {"text_config": TEXT, "vision_config": {**VIT, "roi_feature_size": FEATURES}, "projection_dim": 8}

# One local process a node, with Slurm's variables; SIGTERM goes to all processes of the step, as --signal sends it.
SRUN = """
import contextlib, os, signal, subprocess, sys
import psutil
words = [word for word in sys.argv[1:] if not word.startswith("--")]
nodes = [subprocess.Popen(words, env=os.environ | {"SLURM_NODEID": str(n)}) for n in range(int(os.environ["NODES"]))]
def tell(signum, frame):
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # a loader may end with the parent that was told before it
            process.send_signal(signal.SIGTERM)
signal.signal(signal.SIGTERM, tell)
codes = [node.wait() for node in nodes]
sys.exit(max(codes))
"""


class Cluster:
    """A folder of stand-ins at the head of PATH, and what they were asked."""

    def __init__(self, folder):
        self.bin, self.run, self.asked = folder / "bin", folder / "run", folder / "asked"
        self.bin.mkdir()
        self.jobs = []
        self.port = free_port(random.sample(range(10_000, 30_000), 50))
        self.job_id = str(self.port + 10_000)
        self.stand_in("scontrol", f'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >>{self.asked}; fi')
        self.stand_in("python", "exit 0")

    def stand_in(self, name, script):
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(0o755)

    def environment(self, nodes, **more):
        return os.environ | {
            "PATH": f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_ID": self.job_id,
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_PER_TASK": "1",
            "SLURM_GPUS_ON_NODE": "1",
            **more,
        }

    def start(self, recipe=RECIPE, nodes=2, **more):
        command = ["bash", str(CONFIGS / "slurm.sh"), str(recipe), str(self.run)]
        with open(self.run.parent / "output", "a") as output:
            job = subprocess.Popen(
                command, cwd=CHECKOUT, stdout=output, stderr=output, env=self.environment(nodes, **more)
            )
        self.jobs.append(job)
        return job

    def clear(self):
        """Kills what is left of the jobs."""
        for job in self.jobs:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*psutil.Process(job.pid).children(recursive=True), job]:
                    process.kill()

    def end(self, **more):
        """(exit code, whether the job went back into the queue, what was said) of a whole job."""
        self.asked.unlink(missing_ok=True)
        code = self.start(**more).wait(timeout=60)
        back = self.asked.is_file() and self.asked.read_text() == f"requeue {self.job_id}\n"
        return code, back, (self.run.parent / "output").read_text()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    cluster.clear()


@pytest.mark.parametrize("reason", REASONS)
def test_the_script_obeys_what_the_run_says(cluster, reason):
    cluster.run.mkdir()
    write_outcome(cluster.run, Outcome(reason, 'said "so"'), 3)
    (cluster.run / "stopped.json").rename(cluster.run.parent / "said")
    cluster.stand_in("srun", f"cp {cluster.run.parent}/said {cluster.run}/stopped.json; exit 1")
    code, back, said = cluster.end()
    finished, again = reason.startswith("finished"), REASONS[reason][1]
    assert back is again and code == (0 if finished or again else 1)
    if not again:
        assert reason in said and (finished or 'said \\"so\\"' in said)


@pytest.mark.parametrize("reason", ["setting or data", "finished", "asked to stop"])
def test_what_an_earlier_try_said_is_no_word_of_a_start_that_failed_before_it_could_speak(cluster, reason):
    cluster.run.mkdir()
    cluster.stand_in("srun", "exit 1")
    write_outcome(cluster.run, Outcome(reason, "long ago"), 3)
    code, back, said = cluster.end()
    assert (code, back) == (0, True) and "back into the queue (killed)" in said and reason not in said
    assert [cluster.end()[:2] for _ in range(2)] == [(0, True), (1, False)]


def test_a_finished_run_that_had_nothing_to_do_is_finished(cluster):
    cluster.run.mkdir()
    cluster.stand_in("srun", "exit 0")
    write_outcome(cluster.run, Outcome("finished", "long ago"), 3)
    code, back, said = cluster.end()
    assert (code, back) == (0, False) and "slurm.sh: finished" in said


def test_the_script_gives_up_after_three_deaths_without_progress(cluster):
    cluster.stand_in("srun", "exit 137")
    assert [cluster.end()[:2] for _ in range(3)] == [(0, True), (0, True), (1, False)]
    assert "3 times in a row without a new checkpoint (killed)" in cluster.end()[2]
    # A try that reaches a new checkpoint begins the count anew.
    path = checkpoint_path(cluster.run, 7)
    cluster.stand_in("srun", f"[ -e {path} ] || mkdir -p {path}; exit 137")
    assert [cluster.end()[:2] for _ in range(4)] == [(0, True), (0, True), (0, True), (1, False)]


def test_a_wrong_setting_never_reaches_the_nodes(cluster):
    cluster.stand_in("python", 'echo "error: no setting named x" >&2; exit 2')
    cluster.stand_in("srun", f"touch {cluster.run}.started")
    assert cluster.end()[:2] == (2, False) and not Path(f"{cluster.run}.started").exists()


def test_the_launcher_understands_what_the_script_asks(cluster, monkeypatch):
    told = cluster.run.parent / "told"
    flags = 'while [[ "$1" == --* ]]; do echo "$1"; shift; done'
    cluster.stand_in("srun", f'{flags} >{told}.flags; SLURM_NODEID=1 "$@"')
    cluster.stand_in("accelerate", f'printf "%s\\n" "$@" >{told}; echo $TORCH_ELASTIC_SHUTDOWN_TIMEOUT >{told}.time')
    cluster.end(nodes=4, SLURM_CPUS_PER_TASK="6")
    # Slurm itself gives a step one processor, and lets the other nodes wait when a launcher fails.
    assert Path(f"{told}.flags").read_text().splitlines() == ["--cpus-per-task=6", "--kill-on-bad-exit=1"]
    words = told.read_text().splitlines()
    assert words[0] == "launch"
    args = launch_command_parser().parse_args(words[1:])
    assert (args.num_machines, args.num_processes, args.machine_rank, args.main_process_port) == (4, 4, 1, cluster.port)
    assert args.module and args.training_script == "training.pretrain" and args.main_process_ip == "127.0.0.1"
    monkeypatch.setenv("RANK", "0")  # as the launcher sets it: whether data are there is then for the run to say
    settings = pretrain.parse(args.training_script_args)
    assert settings.output_dir == str(cluster.run) and settings.resume == "latest" and settings.model == "ViT-B-32"
    # Room between the launcher's patience and Slurm's.
    noticed = next(line for line in (CONFIGS / "slurm.sh").read_text().splitlines() if "--signal" in line)
    assert 30 < int(Path(f"{told}.time").read_text()) < int(noticed.partition("@")[2])


@pytest.fixture
def patience():
    """Seconds in which a job of two nodes surely starts: many times what a start of Python with torch takes now."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import training.pretrain, accelerate"], cwd=CHECKOUT, check=True)
    return 120 + 30 * (time.monotonic() - began)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_job_starts_is_stopped_goes_back_and_finishes(cluster, tmp_path, patience):
    """The script itself, two nodes of one process and two workers each."""
    shards = write_shards(tmp_path / "scenes", range(44))
    recipe, steps = tmp_path / "recipe.yaml", 200
    content = {
        "output_dir": "elsewhere", "train_data": [str(shards)], "model": "ViT-B-32", "model_config": MODEL,
        "global_batch_size": 8, "max_steps": steps, "precision": "fp32", "log_every_steps": 1, "save_every_steps": 0,
        "trackers": ["none"], "dataloader_workers": 2,
    }  # fmt: skip
    recipe.write_text(json.dumps(content))
    (cluster.bin / "python").unlink()
    (tmp_path / "srun.py").write_text(SRUN)
    cluster.stand_in("srun", f'exec {sys.executable} {tmp_path / "srun.py"} "$@"')
    environment = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

    job = cluster.start(recipe, **environment)
    end = time.monotonic() + patience
    while len(read_metrics(cluster.run / "metrics.jsonl")) < 3:
        assert job.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()[-3000:]
        time.sleep(0.1)
    subprocess.run(["pkill", "-TERM", "-P", str(job.pid)], check=True)  # its only child is srun
    assert job.wait(timeout=patience) == 0
    assert cluster.asked.read_text() == f"requeue {cluster.job_id}\n"
    outcome = read_outcome(cluster.run)
    assert outcome, (tmp_path / "output").read_text()[-3000:]
    assert outcome["reason"] == "asked to stop" and 3 <= outcome["step"] < steps
    assert list_checkpoints(cluster.run)[-1].name == f"step-{outcome['step']:08d}"
    cluster.asked.unlink()
    assert cluster.start(recipe, **environment).wait(timeout=2 * patience) == 0
    assert not cluster.asked.exists() and read_outcome(cluster.run)["reason"] == "finished"
    lines = [line["step"] for line in read_metrics(cluster.run / "metrics.jsonl") if "loss/total" in line]
    assert lines == list(range(1, steps + 1))
