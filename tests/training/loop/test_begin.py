"""Where a run begins: branches that are left, checkpoints that cannot be read, runs that are finished or at work."""

import contextlib
import errno
import fcntl
import functools
import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

from pyramidclip_command import Failure
from pyramidclip_hf.files import NoLocks
from tests.training.processes import run_in_processes
from tests.training.runs import (
    MemoryReader,
    after_step,
    assert_equal_runs,
    expect_killed,
    resumable_settings,
    run_settings,
    use_memory,
)
from training import pretrain
from training.loop import run as loop
from training.loop.identity import IdentityError
from training.loop.outcome import read_outcome
from training.loop.record import CheckpointError
from training.loop.run_folder import list_checkpoints, prune, sole_run, take_back
from training.loop.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """With checkpoints after 2, 4, 6, 8 and 9 steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        use_memory(patch)
        pretrain.run(resumable_settings(folder, keep_checkpoints=9))
    return folder


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def names(folder):
    return [path.name.removeprefix("step-0000000") for path in list_checkpoints(folder)]


def go_on(folder, resume="latest", **changes):
    return pretrain.run(resumable_settings(folder, resume=str(resume), **changes))


def contents(folder):
    """Of all files but the lock: what is in them and when it was written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def terminated(rank, world_size, args, step):
    said = []

    def stop():
        said.append(read_outcome(args.output_dir))
        os.kill(os.getpid(), signal.SIGTERM)

    after_step(step, stop)
    return pretrain.run(args).finished, said


def test_after_going_back_latest_is_of_the_new_branch(finished, copy, capfd):
    back = resumable_settings(copy, resume=str(copy / "checkpoints" / "step-00000004"), keep_checkpoints=2)
    assert read_outcome(copy)["reason"] == "finished"
    assert run_in_processes(terminated, 1, back, 5) == [(False, [{}])]  # meanwhile it is finished no more
    assert names(copy) == ["4", "5"]  # what was just written stays, whatever else there was
    said = capfd.readouterr().out
    aside = copy / "abandoned" / "0001-after-step-00000004"
    assert f"moved to {aside}" in said and "step-00000009" in said
    left = {"step-00000006", "step-00000008", "step-00000009", "final", "final-average", "metrics.jsonl"}
    assert {path.name for path in aside.iterdir()} == left
    assert read_metrics(aside / "metrics.jsonl") == read_metrics(finished / "metrics.jsonl")
    assert not (copy / "final").exists()
    assert go_on(copy).finished
    assert_equal_runs(finished, copy)


def test_the_reader_goes_on_from_where_it_was(copy, monkeypatch):
    began = []

    class Noted(MemoryReader):
        def load_state(self, state):
            began.append(dict(state))
            super().load_state(state)

    use_memory(monkeypatch, Noted)
    for step in (4, 8):
        assert go_on(copy, resume=copy / "checkpoints" / f"step-0000000{step}").finished
    assert began[0]["served"] > 0 and began[1]["served"] == 2 * began[0]["served"]


def test_seconds_of_training_are_those_of_all_parts(copy, monkeypatch):
    def slow(run, batch, rate, step=loop.optimizer_step):
        time.sleep(0.3)
        return step(run, batch, rate)

    monkeypatch.setattr(loop, "optimizer_step", slow)
    before = json.loads((copy / "final" / "training.json").read_text())["seconds"]
    assert go_on(copy, resume=copy / "checkpoints" / "step-00000006").finished
    after = json.loads((copy / "final" / "training.json").read_text())["seconds"]
    assert before > 0 and after > 0.9


def test_a_damaged_checkpoint_is_passed_over_by_latest_and_said(finished, copy, capsys):
    shutil.rmtree(copy / "final")
    flip_a_bit(copy / "checkpoints" / "step-00000009" / "optimizer.pt")
    flip_a_bit(copy / "checkpoints" / "step-00000008" / "model" / "model.safetensors")
    assert go_on(copy).finished
    said = capsys.readouterr().out
    for name, file in (("step-00000009", "optimizer.pt"), ("step-00000008", "model/model.safetensors")):
        assert f"{name}/{file}: is not what was written: its checksum differs. Going back to" in said
    assert "step-00000006, step 6 of 9" in said
    assert_equal_runs(finished, copy)
    assert names(copy)[-1] == "9" and (copy / "abandoned" / "0001-after-step-00000006" / "step-00000008").is_dir()


def test_a_damaged_checkpoint_that_was_named_is_an_error_with_the_file(copy):
    chosen = copy / "checkpoints" / "step-00000008"
    (chosen / "optimizer.pt").write_bytes((chosen / "optimizer.pt").read_bytes()[:500])
    before = contents(copy)
    with pytest.raises(CheckpointError, match=r"step-00000008/optimizer.pt: has 500 bytes, \d+ were.*--resume DIR"):
        go_on(copy, chosen)
    assert contents(copy) == before
    for path in list_checkpoints(copy):
        flip_a_bit(path / "process-00000.pt")
    with pytest.raises(CheckpointError, match="(?s)step-00000009/process.*step-00000002/process"):
        go_on(copy)


def test_pruning_never_removes_what_was_just_written(copy):
    written = copy / "checkpoints" / "step-00000004"
    prune(copy, 1, written)
    assert list_checkpoints(copy) == [written] and [path.name for path in written.parent.iterdir()] == [written.name]


def test_no_step_is_written_twice(tmp_path, monkeypatch):
    written, original = [], loop.write_checkpoint

    def noted(run_dir, state, progress, keep):
        written.append(progress.step)
        return original(run_dir, state, progress, keep)

    monkeypatch.setattr(loop, "write_checkpoint", noted)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "advance", loop.advance)
        after_step(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert not pretrain.run(resumable_settings(tmp_path)).finished
    assert written == [2, 4]  # where the stop came in a step that saves
    go_on(tmp_path)
    assert written == [2, 4, 6, 8, 9]


@pytest.mark.parametrize("ending", ["partial", "stale"])
def test_a_whole_checkpoint_beside_its_place_is_taken_back(copy, capsys, ending):
    place = copy / "checkpoints" / "step-00000009"
    place.rename(place.with_name(f".step-00000009.{ending}"))
    (copy / "stopped.json").unlink()
    assert go_on(copy).steps == 9
    told = capsys.readouterr().out
    assert "step-00000009 had been written to its end" in told and f"continuing from {place}, step 9 of 9" in told
    assert names(copy)[-1] == "9" and not list(place.parent.glob(".*"))


def test_a_half_or_an_old_one_beside_a_place_is_not_taken_back(copy):
    folder = copy / "checkpoints"
    (folder / "step-00000009").rename(folder / ".step-00000009.partial")
    (folder / ".step-00000009.partial" / "optimizer.pt").unlink()
    shutil.copytree(folder / "step-00000008", folder / ".step-00000008.stale")
    assert take_back(copy) == [] and names(copy) == ["2", "4", "6", "8"]


def test_killed_while_removing_nothing_stays_behind(tmp_path):
    """A removed checkpoint is renamed first, and its rest goes with the next that is written."""
    expect_killed(resumable_settings(tmp_path), 1, 6, "rename")
    (tmp_path / "checkpoints" / "step-00000002").rename(tmp_path / "checkpoints" / ".step-00000002.removed")
    run_in_processes(run_settings, 1, resumable_settings(tmp_path, resume="latest"))
    assert names(tmp_path) == ["8", "9"] and not list(tmp_path.glob("checkpoints/.*"))


def test_a_second_run_in_the_same_folder_is_refused(copy, monkeypatch):
    before = contents(copy)
    monkeypatch.setattr(loop, "sole_run", functools.partial(sole_run, wait=0))
    with sole_run(copy), pytest.raises(Failure, match=f"output_dir {copy} is in use by another run, which holds"):
        go_on(copy)
    assert contents(copy) == before
    assert go_on(copy).finished


def test_a_file_system_without_locks_is_said(copy, monkeypatch, capsys):
    @contextlib.contextmanager
    def without(path, wait=True):
        raise NoLocks(path)
        yield

    monkeypatch.setattr("training.loop.run_folder.locked", without)
    assert go_on(copy).finished
    said = [line for line in capsys.readouterr().out.splitlines() if "has no locks" in line]
    assert said == [f"{copy}: this file system has no locks: nothing keeps a second run from writing there"]


def test_a_run_waits_for_one_that_ends(tmp_path):
    """Processes of a killed run hold the folder until they are gone."""
    with sole_run(tmp_path, wait=0):
        reader, writer = os.pipe()
        waiting = os.fork()
        if waiting == 0:
            try:
                with sole_run(tmp_path, wait=20):
                    os.write(writer, b"held")
            finally:
                os._exit(0)
    assert os.read(reader, 10) == b"held"
    os.waitpid(waiting, 0)


def test_a_run_says_that_its_folder_has_no_locks(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    for _ in range(2):
        with sole_run(tmp_path, wait=0) as told:
            assert told == f"{tmp_path}: this file system has no locks: nothing keeps a second run from writing there"


def test_a_finished_run_given_again_changes_nothing(copy, capsys, monkeypatch):
    record = copy / "final" / "training.json"
    metrics = {"validation/a": 0.5, "validation/b": "inf"}  # what is no number is text in JSON
    record.write_text(json.dumps(json.loads(record.read_text()) | {"metrics": metrics}))
    before = contents(copy)
    again = go_on(copy)
    assert again.finished and again.steps == 9 and again.final == copy / "final"
    assert again.metrics == {"validation/a": 0.5, "validation/b": math.inf}
    assert "is finished, step 9: nothing is left to do" in capsys.readouterr().out
    with pytest.raises(IdentityError, match="learning_rate"):
        go_on(copy, learning_rate=2e-3)
    assert contents(copy) == before
    shutil.rmtree(copy / "checkpoints")
    before = contents(copy)
    given = {}
    original = loop.resume

    def noted(settings, accelerator, state, *more):
        given["begun"], given["model"] = original(settings, accelerator, state, *more), state.model
        return given["begun"]

    monkeypatch.setattr(loop, "resume", noted)
    assert go_on(copy).finished
    for name, tensor in load_file(copy / "final" / "model.safetensors").items():
        torch.testing.assert_close(given["model"].state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(IdentityError, match="learning_rate"):
        go_on(copy, learning_rate=2e-3)
    with pytest.raises(ValueError, match="already holds the model of a run, without a checkpoint"):
        pretrain.run(resumable_settings(copy))
    assert contents(copy) == before
    weights = copy / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors"):
        go_on(copy)


def test_a_damaged_log_is_continued_said_and_kept(finished, copy, capsys):
    for path in (copy / "final", copy / "final-average"):
        shutil.rmtree(path)
    (copy / "stopped.json").unlink()
    log = copy / "metrics.jsonl"
    flip = log.read_bytes().replace(b'{"step": 3', b'{"step: 3', 1)
    log.write_bytes(flip)
    assert go_on(copy).finished
    said = capsys.readouterr().out
    assert f"as it was found it is {copy / 'metrics-found-at-step-00000009.jsonl'}" in said
    assert "metrics.jsonl: line 1 cannot be read" in said and "not what it was when step 9 was saved" in said
    assert (copy / "metrics-found-at-step-00000009.jsonl").read_bytes() == flip
    assert read_metrics(log) == read_metrics(finished / "metrics.jsonl")[1:]
    log.write_bytes(flip)
    with pytest.raises(ValueError, match="metrics.jsonl: line 1 is damaged"):
        read_metrics(log)
