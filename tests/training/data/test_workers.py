"""Loader processes end with the process that started them, and of no SIGTERM but its own."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from training.data.workers import live_as_long_as_the_parent, started_untouched_by_termination

CHECKOUT = Path(__file__).parents[3]


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 10_000

    def __getitem__(self, position):
        return os.getpid()


def numbers(method):
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=None, num_workers=2, multiprocessing_context=method,
        worker_init_fn=live_as_long_as_the_parent,
    )  # fmt: skip
    with started_untouched_by_termination():
        return iter(loader)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_after(pids, seconds=20):
    started = time.monotonic()
    while any(map(alive, pids)) and time.monotonic() < started + seconds:
        time.sleep(0.02)
    return time.monotonic() - started


@pytest.fixture(params=["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def method(request):
    return request.param


def test_workers_live_through_the_sigterm_of_others_and_end_by_their_parent_s(method):
    batches = numbers(method)
    workers = {next(batches), next(batches)}
    sender = os.fork()
    if sender == 0:
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        os._exit(0)
    os.waitpid(sender, 0)
    time.sleep(0.3)
    assert {next(batches) for _ in range(20)} == workers and all(map(alive, workers))
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
    assert gone_after(workers) < 3
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would speak of them


def test_workers_have_sigterm_blocked_from_their_first_moment():
    """The mask is what a process inherits, not what it sets."""
    seen = multiprocessing.get_context("fork").Queue()

    def report():
        seen.put(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    with started_untouched_by_termination():
        child = multiprocessing.get_context("fork").Process(target=report)
        child.start()
    assert signal.SIGTERM in seen.get(timeout=20)
    child.join()
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


BEGUN = """
import torch
from multiprocessing.forkserver import _forkserver as server
from tests.training.data.test_workers import numbers
from training.data.loader import begin_workers
begin_workers(torch.device("cpu"), 2)
begin_workers(torch.device("cuda"), 0)
assert server._forkserver_pid is None
begin_workers(torch.device("cuda"), 2)
batches = numbers("forkserver")
print(server._forkserver_pid, next(batches), flush=True)
input()
"""


@pytest.mark.slow
def test_workers_are_forked_from_what_was_begun_before_the_model_was_built():
    """It has imported what they need, and lives through the SIGTERM of others as they do."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-uc", BEGUN], cwd=CHECKOUT, text=True, **pipes) as parent:
        server, worker = map(int, parent.stdout.readline().split())
        status = dict(line.split(":", 1) for line in Path(f"/proc/{worker}/status").read_text().splitlines())
        assert int(status["PPid"]) == server
        status = dict(line.split(":", 1) for line in Path(f"/proc/{server}/status").read_text().splitlines())
        assert int(status["SigBlk"], 16) >> (signal.SIGTERM - 1) & 1
        assert "libtorch_python" in Path(f"/proc/{server}/maps").read_text()
        parent.communicate("\n")
    assert gone_after([server]) < 5


PARENT = "from tests.training.data.test_workers import numbers; b = numbers({!r}); print(next(b), next(b)); input()"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_soon_after_a_parent_that_was_killed(method):
    command = [sys.executable, "-uc", PARENT.format(method)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=CHECKOUT, text=True, **pipes) as parent:
        workers = list(map(int, parent.stdout.readline().split()))
        assert len(set(workers)) == 2
        parent.kill()
    assert gone_after(workers) < 4  # torch's own watch takes five seconds and more
