"""Two machines on this one: two launchers with two processes each, that share a folder and nothing else.

Each machine has its own checkout, home, caches, working folder and copy of the data, and they find each other over the
loopback. Where mounting is allowed each launcher has a mount namespace of its own, in which its disk lies under the
same name as the other's; else the two disks have different names.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import psutil

from tests.training.prepare.small_data import FEATURES, write_shards
from tests.training.tiny import VIT
from training import pretrain
from training.loop.tracking import read_metrics

CHECKOUT = Path(pretrain.__file__).parent.parent
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos", "attention_dropout": 0.1}
MODEL = {"text_config": TEXT, "vision_config": {**VIT, "roi_feature_size": FEATURES}, "projection_dim": 8}
# Seconds within which a launcher passes on to what is left of its processes.
SHUTDOWN = 5


@cache
def mounting():
    """The command before which another has mounts of its own; None where this is not allowed."""
    for command in (["unshare", "--mount"], ["unshare", "--mount", "--map-root-user"]):
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "mount", "--bind", "/tmp", "/tmp"], capture_output=True).returncode == 0:
                return command
    return None


def free_port(among=(0,)):
    """The first of these ports that nobody listens at; of 0 whichever the system gives."""
    for port in among:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return probe.getsockname()[1]
    raise OSError(f"none of {among} is free")


class Machine:
    """One of the two: its disk, its launcher, and what that said.

    Attributes:
        number: 0 or 1.
        disk: What only this machine has, as it is called outside of it.
        seen_as: As it is called on it.
        mounted: More folders that are other ones on this machine: (seen as, really).
        variables: More environment variables.
        settings: That differ here.
    """

    def __init__(self, folder, number, shards):
        self.number, self.disk = number, folder / f"machine-{number}"
        self.seen_as = folder / "disk" if mounting() else self.disk
        self.seen_as.mkdir(exist_ok=True, parents=True)
        self.mounted, self.variables, self.settings, self.launcher = [], {}, {}, None
        for name in ("home", "cache", "tmp", "project"):
            (self.disk / name).mkdir(parents=True)
        shutil.copytree(shards, self.disk / "project" / "scenes")
        for part in ("training", "pyramidclip_hf"):
            shutil.copytree(CHECKOUT / part, self.disk / "project" / part)
        shutil.copy(CHECKOUT / "pyramidclip_command.py", self.disk / "project")

    def start(self, port, settings):
        """Starts torchrun with two processes in the copy of the checkout."""
        (self.disk / "run.yaml").write_text(json.dumps(settings | self.settings))  # JSON is YAML
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
        command += ["--node-rank", str(self.number), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        command += ["-m", "training.pretrain", "--config", str(self.seen_as / "run.yaml"), "--resume", "latest"]
        mounted = [(self.seen_as, self.disk), *self.mounted] if mounting() else []
        if mounted:
            mounts = "".join('mount --bind "$1" "$2" && shift 2 && ' for _ in mounted)
            places = [str(path) for seen, really in mounted for path in (really, seen)]
            script = f'{mounts}cd "$1" && shift && exec "$@"'
            command = [*mounting(), "sh", "-c", script, "sh", *places, str(self.seen_as / "project"), *command]
        own = {"HOME": "home", "PYRAMIDCLIP_CACHE": "cache", "HF_HOME": "home", "TMPDIR": "tmp"}
        environment = os.environ | {name: str(self.seen_as / folder) for name, folder in own.items()}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN), **self.variables}
        environment.pop("PYTHONPATH", None)
        # Through a process of its own: what is said must not end at the limit on files of a process with a full disk.
        with open(self.disk / "output", "w") as output:
            self.writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output)
        self.launcher = subprocess.Popen(
            command,
            cwd=self.disk / "project",
            stdout=self.writer.stdin,
            stderr=self.writer.stdin,
            env=environment,
            start_new_session=True,
        )
        self.writer.stdin.close()

    @property
    def said(self):
        return (self.disk / "output").read_text(errors="replace")

    def processes(self):
        """All that descend from the launcher, and the launcher."""
        launcher = psutil.Process(self.launcher.pid)
        return [*launcher.children(recursive=True), launcher]

    def process(self, rank):
        """The training process of this number."""
        for one in self.processes():
            with contextlib.suppress(psutil.Error):
                if one.environ().get("RANK") == str(rank):
                    return one
        raise AssertionError(f"no process {rank}:\n{self.said[-3000:]}")

    def code(self):
        """The exit code of the process that failed first here, by the launcher's table, or of the launcher."""
        found = re.findall(r"exitcode +: (-?\d+)", self.said)
        return int(found[-1]) if found else self.launcher.returncode

    def kill(self):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)


class Cluster:
    """Two machines and the folder that they share."""

    def __init__(self, folder, shards):
        self.folder, self.run = folder, folder / "shared" / "run"
        self.run.parent.mkdir(parents=True)
        self.machines = [Machine(folder, number, shards) for number in range(2)]

    def start(self, late=0, **changes):
        """Launches a run on both, on the second so many seconds later."""
        settings = {
            "output_dir": str(self.run), "train_data": ["scenes"], "model": "ViT-B-32", "model_config": MODEL,
            "global_batch_size": 8, "precision": "fp32", "log_every_steps": 1, "trackers": ["none"],
            "dataloader_workers": 0, "deterministic": True, **changes,
        }  # fmt: skip
        port = free_port()
        for machine in self.machines:
            machine.start(port, settings)
            time.sleep(late if machine.number == 0 else 0)

    def wait_for_steps(self, steps, seconds):
        end = time.monotonic() + seconds
        while len(read_metrics(self.run / "metrics.jsonl")) < steps:
            assert time.monotonic() < end and all(one.launcher.poll() is None for one in self.machines), self.told()
            time.sleep(0.1)

    def end(self, seconds):
        """The exit code of each machine's processes; all have to end within so many seconds."""
        end = time.monotonic() + seconds
        for machine in self.machines:
            try:
                machine.launcher.wait(timeout=max(end - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"machine {machine.number} is still there\n{self.told()}") from None
            machine.writer.wait(timeout=60)  # it ends with the last process that can say something
        return [machine.code() for machine in self.machines]

    def told(self):
        return "\n".join(f"machine {one.number}:\n{one.said[-3000:]}" for one in self.machines)

    def clear(self):
        for machine in self.machines:
            if machine.launcher is not None:
                machine.kill()


def make_shards(folder):
    return write_shards(folder / "scenes", range(44))
