"""Machines that differ: how all end, what is left, and that the run continues once they do not.

Two machines are forked here, each with its own environment, caches and copy of the data; of one process where runs are
compared to the bit, as sums of more than two run in any order, else of two.
"""

import errno
import os
import shutil
import time

import pytest

from tests.training.prepare.small_data import FEATURES, write_shards
from tests.training.processes import run_in_processes
from tests.training.runs import assert_equal_runs, resumable_settings, run_settings, use_memory
from tests.training.tiny import VIT
from training import pretrain
from training.loop import checkpoint
from training.loop import run as loop
from training.loop.outcome import read_outcome
from training.loop.record import is_whole
from training.loop.run_folder import list_checkpoints


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
    for told in told_by_all(args, own_copy, 4):
        assert "scenes is not the same on all machines: process 0 sees 6 shards, process 2 5" in told
    assert read_outcome(tmp_path / "run")["exit_code"] == 2 and not list_checkpoints(tmp_path / "run")
    shutil.copy(tmp_path / "machine-0/scenes/part-003.tar", tmp_path / "machine-1/scenes/part-003.tar")
    assert told_by_all(args, own_copy, 4) == [9] * 4
