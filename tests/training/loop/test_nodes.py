"""A process that dies in front of any call that all processes make: how the others end, and that the run continues.

Two machines of two processes are forked here, each with the environment that its launcher would give, as so many starts
of launchers would take too long; two launchers have their tests in test_machines.py.
"""

import os
import shutil
import time
import traceback
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.training.processes import run_in_processes
from tests.training.runs import assert_equal_runs, die, resumable_settings, use_memory
from training import pretrain
from training.loop import distributed, watch
from training.loop.outcome import read_outcome
from training.loop.record import is_whole
from training.loop.run_folder import list_checkpoints
from training.loop.watch import GONE

PROCESSES, MACHINES = 4, 2
# What calls all processes: torch's functions, both gathers by the names that torch 2.13 and 2.14 know, DDP's copy of
# the weights and its sums of gradients.
CALLS = [
    *((dist, name) for name in ("all_reduce", "all_gather", "all_gather_object", "all_to_all_single", "barrier")),
    *((dist, name) for name in ("broadcast", "broadcast_object_list", "gather_object", "new_group")),
    *((distributed, name) for name in ("_all_gather", "_reduce_scatter")),
    (DistributedDataParallel, "__init__"),
    (torch.Tensor, "backward"),
]


def on_its_machine(rank):
    """The environment that a launcher gives to a process."""
    here = PROCESSES // MACHINES
    os.environ |= {"LOCAL_RANK": str(rank % here), "LOCAL_WORLD_SIZE": str(here), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # Accelerate asks for it; the group is there


def whole_run(rank, world_size, args):
    on_its_machine(rank)
    return pretrain.run(args).steps


def noting(before):
    """From here on `before(place, time)` is called in front of each collective: the lines that make it, how often."""
    times = Counter()

    def wrapped(owner, name):
        original = getattr(owner, name)

        def call(*given, **options):
            stack = [line for line in traceback.extract_stack()[:-1] if "/training/" in line.filename]
            own = [line for line in stack if "/tests/" not in line.filename][-3:]
            place = f"{name} " + " < ".join(f"{line.filename.rpartition('/')[2]}:{line.lineno}" for line in own[::-1])
            times[place] += 1
            before(place, times[place])
            return original(*given, **options)

        setattr(owner, name, call)

    for owner, name in CALLS:
        wrapped(owner, name)


def places(rank, world_size, args):
    """Every place where a process of a whole run meets the others -> how often, in the order of their first time."""
    on_its_machine(rank)
    found = {}
    noting(found.__setitem__)
    pretrain.run(args)
    return found


def dying(rank, world_size, args, place, moment):
    on_its_machine(rank)
    watch.BEAT = 0.3
    if rank == PROCESSES - 1:
        noting(lambda here, time: die() if (here, time) == (place, moment) else None)
    pretrain.run(args)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_process_that_dies_before_any_of_its_collectives_ends_the_others(tmp_path, monkeypatch):
    """At the middle one of the times that each place is come to."""
    use_memory(monkeypatch)
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    exactly = {"deterministic": True}  # sums of more than two run in one order
    found = run_in_processes(places, PROCESSES, resumable_settings(undisturbed, **exactly), timeout=300)[-1]
    assert len(found) > 25 and max(found.values()) >= 9
    heard = False
    for place, times in found.items():
        shutil.rmtree(run, ignore_errors=True)
        args = resumable_settings(run, process_timeout_minutes=0.2, **exactly)
        began = time.monotonic()
        with pytest.raises(AssertionError, match=f"process {PROCESSES - 1}:\nended by signal 9"):
            run_in_processes(dying, PROCESSES, args, place, (times + 1) // 2, timeout=120, grace=60)
        took = time.monotonic() - began
        print(f"{took:.1f} s {place}")
        assert took < 12 + 40, place  # the set time, and a busy machine
        if outcome := read_outcome(run):
            heard = True
            if place == list(found)[-1]:  # the model is there; that this was written is what it died before hearing
                assert outcome["reason"] == "finished"
            else:
                assert (outcome["message"], outcome["exit_code"]) == (f"process {PROCESSES - 1} {GONE}", 1), place
        assert outcome or not heard, place  # at first the run has no folder yet
        assert all(map(is_whole, list_checkpoints(run)))
        again = resumable_settings(run, resume="latest", **exactly)
        assert run_in_processes(whole_run, PROCESSES, again, timeout=300) == [9] * PROCESSES
        assert_equal_runs(undisturbed, run)
