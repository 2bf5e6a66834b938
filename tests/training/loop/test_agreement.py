"""Processes that do not see the same: all of them end at once, with who has what, and nothing is written."""

import shutil
import time

import pytest

from tests.training.processes import run_in_processes
from tests.training.runs import MemoryReader, assert_equal_runs, resumable_settings, run_settings, use_memory
from training import pretrain
from training.loop import resume
from training.loop.agreement import check_equal, first_decides, together
from training.loop.outcome import OtherProcessFailed, read_outcome
from training.loop.run_folder import list_checkpoints


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


def attempted(rank, world_size, folders, **changes):
    """What each process of a run in its own of the folders says, and after how long."""
    started = time.monotonic()
    try:
        pretrain.run(resumable_settings(folders[rank], **changes))
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - started
    return None, time.monotonic() - started


def outcomes(*given, **changes):
    def run(rank, world_size):
        return attempted(rank, world_size, *given, **changes)

    return run_in_processes(run, 2)


class OneShort(MemoryReader):
    """The second process has a copy of the data that lacks a sample."""

    def __init__(self, args):
        super().__init__(args, samples=40 - pretrain.rank())


def test_another_copy_of_the_data_ends_all_with_a_table(tmp_path, monkeypatch):
    use_memory(monkeypatch, OneShort)
    for told, seconds in outcomes([tmp_path] * 2):
        assert "do not agree" in told and "data: memory-40 in process 0, memory-39 in process 1" in told
        assert "steps in an epoch: 5 in process 0, 4 in process 1" in told and seconds < 60
    assert not list_checkpoints(tmp_path) and not (tmp_path / "metrics.jsonl").exists()
    assert read_outcome(tmp_path)["reason"] == "setting or data"


def test_an_output_dir_that_is_not_shared_ends_all_before_the_first_step(tmp_path):
    for told, seconds in outcomes([tmp_path / "a", tmp_path / "b"]):
        assert "checkpoints/ is another folder for process 1 than for process 0" in told and seconds < 60
    assert not (tmp_path / "a" / "metrics.jsonl").exists() and not list((tmp_path / "a").rglob(".same-*"))


def test_the_first_process_chooses_the_checkpoint(tmp_path):
    """Another process that lists an older state of the folder, as a file system may show it, follows."""
    run_in_processes(run_settings, 2, resumable_settings(tmp_path / "undisturbed"))
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "run")
    for name in ("checkpoints/step-00000009", "final", "final-average"):
        shutil.rmtree(tmp_path / "run" / name)

    def blind(rank, world_size):
        if rank == 1:
            resume.list_checkpoints = resume.find_checkpoints = lambda *given: []
        return pretrain.run(resumable_settings(tmp_path / "run", resume="latest")).steps

    assert run_in_processes(blind, 2) == [9, 9]
    assert_equal_runs(tmp_path / "undisturbed", tmp_path / "run")


class Absent(MemoryReader):
    """The second process does not find its data."""

    def __init__(self, args):
        if pretrain.rank() == 1:
            raise FileNotFoundError("no folder or file data/scenes")
        super().__init__(args)


def test_what_one_process_cannot_open_ends_all_with_its_number(tmp_path, monkeypatch):
    use_memory(monkeypatch, Absent)
    first, second = outcomes([tmp_path] * 2)
    assert first[0] == "OtherProcessFailed: process 1: no folder or file data/scenes"
    assert second[0] == "FileNotFoundError: no folder or file data/scenes" and max(first[1], second[1]) < 60
    assert "no folder or file data/scenes" in read_outcome(tmp_path)["message"]


def decide(rank, world_size):
    said = [first_decides(lambda: f"of {rank}"), together(lambda: rank)]
    check_equal({"same": 3, "step": 4})
    for work in (first_decides, together):
        try:
            work(lambda: 1 // (0 if rank == 0 else 1))
        except OtherProcessFailed as error:
            said.append(str(error))
        except ZeroDivisionError:
            said.append("own")
    try:
        check_equal({"same": 3, "step": rank // 2})
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_the_first_finds_all_have_and_what_one_cannot_do_none_does():
    zero, *others = run_in_processes(decide, 3)
    table = "the processes of this run do not agree:\n  step: 0 in processes 0, 1, 1 in process 2"
    assert zero == ["of 0", 0, "own", "own", table]
    failed = "process 0: integer division or modulo by zero"
    assert others == [["of 0", rank, failed, failed, table] for rank in (1, 2)]
