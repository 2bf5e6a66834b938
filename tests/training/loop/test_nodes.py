"""Machines that differ, a process that dies in the wrong moment: how all end, what is left, and that it continues.

Two machines are forked here, each with its own environment, caches and copy of the data; of one process where runs are
compared to the bit, as sums of more than two run in any order, else of two.
"""

import errno
import os
import shutil
import time
import traceback
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.training.prepare.small_data import FEATURES, write_shards
from tests.training.processes import run_in_processes
from tests.training.runs import assert_equal_runs, die, resumable_settings, run_settings, use_memory
from tests.training.tiny import VIT
from training import pretrain
from training.loop import checkpoint, distributed, watch
from training.loop import run as loop
from training.loop.outcome import read_outcome
from training.loop.record import is_whole
from training.loop.run_folder import list_checkpoints
from training.loop.watch import GONE


def machine_of(rank, world_size):
    """The first half of the processes is on one machine; with the environment that its launcher gives."""
    here = world_size // 2
    machine, local = divmod(rank, here)
    os.environ |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(here), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # Accelerate asks for it; the group is there
    return machine


def on_machines(rank, world_size, args, prepare):
    """What a process of a run says, and how long it took; `prepare(machine)` happens on each before."""
    prepare(machine_of(rank, world_size), args)
    began = time.monotonic()
    try:
        steps = pretrain.run(args).steps
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return steps, time.monotonic() - began


def told_by_all(args, prepare, processes=2):
    found = run_in_processes(on_machines, processes, args, prepare, timeout=300)
    assert max(took for _, took in found) < 100
    return [told for told, _ in found]


@pytest.fixture
def undisturbed(tmp_path, monkeypatch):
    """A function that compares a run in RUN with one that nothing happened to."""
    use_memory(monkeypatch)

    def compare():
        if not (tmp_path / "undisturbed").exists():
            run_in_processes(run_settings, 2, resumable_settings(tmp_path / "undisturbed"), timeout=300)
        assert_equal_runs(tmp_path / "undisturbed", tmp_path / "run")

    return compare


def nothing(machine, args):
    pass


def continued(tmp_path):
    assert all(map(is_whole, list_checkpoints(tmp_path / "run")))
    assert told_by_all(resumable_settings(tmp_path / "run", resume="latest"), nothing) == [9] * 2


def an_hour_ahead(machine, args):
    if machine:
        clock = time.time
        time.time = lambda: clock() + 3600


def late(machine, args):
    time.sleep(5 * machine)


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [an_hour_ahead, late])
def test_a_machine_that_is_late_or_whose_clock_is_off_changes_nothing(tmp_path, undisturbed, prepare):
    assert told_by_all(resumable_settings(tmp_path / "run"), prepare) == [9] * 2
    undisturbed()


def other_version(machine, args):
    if machine:
        loop.__version__ = "0.0.1"


@pytest.mark.slow
def test_another_version_on_one_machine_ends_all(tmp_path, undisturbed):
    for told in told_by_all(resumable_settings(tmp_path / "run"), other_version):
        assert f"pyramidclip-hf: {loop.__version__} in process 0, 0.0.1 in process 1" in told
    assert read_outcome(tmp_path / "run")["reason"] == "setting or data"
    continued(tmp_path)
    undisturbed()


def full_from_the_second_save_on(machine, args):
    written, original = [], checkpoint._write_tensors

    def write(path, content):
        written.append(path)
        if machine and len(written) > 1:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    checkpoint._write_tensors = write


@pytest.mark.slow
def test_a_full_disk_on_one_machine_ends_all(tmp_path, undisturbed):
    for told in told_by_all(resumable_settings(tmp_path / "run"), full_from_the_second_save_on):
        assert "CheckpointError: could not write the checkpoint of step 4" in told and "process 1: OSError" in told
    assert read_outcome(tmp_path / "run")["exit_code"] == 1
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000002"]
    continued(tmp_path)
    undisturbed()


def own_copy(machine, args):
    os.environ["PYRAMIDCLIP_CACHE"] = f"{args.train_data[0]}/cache-{machine}"
    os.chdir(f"{args.train_data[0]}/machine-{machine}")
    args.train_data = ["scenes"]


@pytest.mark.slow
def test_another_list_of_shards_on_one_machine_ends_all(tmp_path):
    for machine in (0, 1):
        write_shards(tmp_path / f"machine-{machine}" / "scenes", range(44))
    (tmp_path / "machine-1" / "scenes" / "part-003.tar").unlink()
    args = resumable_settings(tmp_path / "run", train_data=[str(tmp_path)], dataloader_workers=0)
    args.model_config["vision_config"] = {**VIT, "roi_feature_size": FEATURES}
    for name in ("vocab_size", "max_position_embeddings", "bos_token_id", "eos_token_id"):
        del args.model_config["text_config"][name]  # the tokenizer's own
    for told in told_by_all(args, own_copy, 4):
        assert "scenes is not the same on all machines: process 0 sees 6 shards, process 2 5" in told
    assert read_outcome(tmp_path / "run")["exit_code"] == 2 and not list_checkpoints(tmp_path / "run")
    shutil.copy(tmp_path / "machine-0/scenes/part-003.tar", tmp_path / "machine-1/scenes/part-003.tar")
    assert told_by_all(args, own_copy, 4) == [9] * 4


# What calls all processes: torch's functions, both gathers by the names that torch 2.13 and 2.14 know, DDP's copy of
# the weights and its sums of gradients.
CALLS = [
    *((dist, name) for name in ("all_reduce", "all_gather", "all_gather_object", "all_to_all_single", "barrier")),
    *((dist, name) for name in ("broadcast", "broadcast_object_list", "gather_object", "new_group")),
    *((distributed, name) for name in ("_all_gather", "_reduce_scatter")),
    (DistributedDataParallel, "__init__"),
    (torch.Tensor, "backward"),
]


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
    found = {}
    noting(found.__setitem__)
    pretrain.run(args)
    return found


def dying(rank, world_size, args, place, moment):
    watch.BEAT = 0.3
    if rank == 1:
        noting(lambda here, time: die() if (here, time) == (place, moment) else None)
    pretrain.run(args)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_process_that_dies_before_any_of_its_collectives_ends_the_other(tmp_path, undisturbed):
    """At the middle one of the times that each place is come to."""
    found = run_in_processes(places, 2, resumable_settings(tmp_path / "all"), timeout=300)[1]
    assert len(found) > 25 and max(found.values()) >= 9
    heard = False
    for place, times in found.items():
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        args = resumable_settings(tmp_path / "run", process_timeout_minutes=0.2)
        began = time.monotonic()
        with pytest.raises(AssertionError, match="process 1:\nended by signal 9"):
            run_in_processes(dying, 2, args, place, (times + 1) // 2, timeout=120, grace=60)
        assert time.monotonic() - began < 12 + 40, place  # the set time, and a busy machine
        if outcome := read_outcome(tmp_path / "run"):
            heard = True
            if place == list(found)[-1]:  # the model is there; that this was written is what it died before hearing
                assert outcome["reason"] == "finished"
            else:
                assert (outcome["message"], outcome["exit_code"]) == (f"process 1 {GONE}", 1), place
        assert outcome or not heard, place  # at first the run has no folder yet
        continued(tmp_path)
        undisturbed()
