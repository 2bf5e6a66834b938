"""Continuing: after SIGKILL anywhere, also inside of a checkpoint, bit for bit as if nothing had happened."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import run_in_processes
from tests.training.runs import (
    MemoryReader,
    after_step,
    assert_equal_runs,
    die,
    expect_killed,
    run_settings,
    use_memory,
)
from tests.training.runs import resumable_settings as arguments
from tests.training.tiny import tiny_model
from training import pretrain
from training.loop import run as loop
from training.loop.checkpoint import Progress, TrainingState, read_checkpoint, write_checkpoint
from training.loop.distributed import rank
from training.loop.identity import IdentityError, model_identity
from training.loop.record import CheckpointError, read_record, sealed, write_record
from training.loop.run_folder import find_checkpoints, list_checkpoints
from training.loop.tracking import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_killed_run_continues_bit_for_bit(tmp_path, world_size):
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    run_in_processes(run_settings, world_size, arguments(undisturbed))
    expect_killed(arguments(disturbed), world_size, 5, "step")  # in the middle of an epoch and of a log window
    assert [path.name for path in list_checkpoints(disturbed)] == ["step-00000002", "step-00000004"]
    expect_killed(arguments(disturbed, resume="latest"), world_size, 6, "before")  # nothing of the new one is written
    assert list_checkpoints(disturbed)[-1].name == "step-00000004"
    expect_killed(arguments(disturbed, resume="latest"), world_size, 6, "after")  # a part of it is
    assert list_checkpoints(disturbed)[-1].name == "step-00000004"
    run_in_processes(run_settings, world_size, arguments(disturbed, resume="latest"))
    assert_equal_runs(undisturbed, disturbed)
    assert not list(disturbed.glob("checkpoints/.*"))


def test_killed_between_renaming_and_pruning(tmp_path):
    expect_killed(arguments(tmp_path), 1, 6, "rename")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-0000000{n}" for n in (2, 4, 6)]
    run_in_processes(run_settings, 1, arguments(tmp_path, resume="latest"))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000008", "step-00000009"]


def test_sigterm_saves_at_an_odd_step_and_continues_bit_for_bit(tmp_path):
    def terminated(rank, world_size, args):
        if rank == 1:  # a scheduler that reaches only one of the processes first
            after_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = pretrain.run(args)
        return result.finished, result.steps

    run_in_processes(run_settings, 2, arguments(tmp_path / "a"))
    results = run_in_processes(terminated, 2, arguments(tmp_path / "b"))
    # A vote is known one step later, on all processes at the same step.
    assert results[0] == results[1] and results[0] == (False, 6)
    assert list_checkpoints(tmp_path / "b")[-1].name == "step-00000006"
    run_in_processes(run_settings, 2, arguments(tmp_path / "b", resume="latest"))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        use_memory(patch)
        pretrain.run(arguments(folder))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 2e-3}, "schedule.learning_rate: was 0.001, is now 0.002"),
        ({"max_steps": 20}, "schedule.total_steps: was 9, is now 20"),
        ({"loss_weights": {"roi_tags": 1.0}}, "objective.loss_weights.global_summary: was 0.16.*, is now None"),
        ({"seed": 1}, "data.seed: was 0, is now 1"),
        ({"global_batch_size": 4}, "schedule.global_batch_size: was 8, is now 4"),
        ({"freeze": "text"}, "objective.freeze: was 'none', is now 'text'"),
        ({"max_image_pixels": 9}, "data.max_image_pixels: was 100000000, is now 9"),
    ],
)
def test_another_run_is_not_continued(finished, changes, message):
    with pytest.raises(IdentityError, match=f"(?s){message}.*model: .*to begin from these weights"):
        pretrain.run(arguments(finished, resume="latest", **changes))


def test_another_run_begins_from_the_weights_of_a_checkpoint(finished, tmp_path):
    """What the error above and docs/training.md advise."""
    model = str(list_checkpoints(finished)[-1] / "model")
    changes = {"model": model, "model_config": None, "learning_rate": 0.0, "ema_decay": 0.0}
    result = pretrain.run(arguments(tmp_path, steps=1, **changes))
    frozen = "visual_projection.weight"
    assert torch.equal(
        load_file(result.final / "model.safetensors")[frozen], load_file(f"{model}/model.safetensors")[frozen]
    )


def test_a_setting_that_the_checkpoint_s_version_did_not_know_had_its_default(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    record = list_checkpoints(tmp_path / "run")[-1] / "run.json"
    content = json.loads(record.read_text())
    del content["identity"]["data"]["max_image_pixels"]
    record.write_text(json.dumps(sealed(content)))
    assert pretrain.run(arguments(tmp_path / "run", resume="latest")).finished
    with pytest.raises(IdentityError, match="data.max_image_pixels: was 100000000, is now 9"):
        pretrain.run(arguments(tmp_path / "run", resume="latest", max_image_pixels=9))


def test_another_data_set_is_not_continued(finished, monkeypatch):
    use_memory(monkeypatch, samples=41)
    with pytest.raises(IdentityError, match="data.fingerprint: was 'memory-40', is now 'memory-41'"):
        pretrain.run(arguments(finished, resume="latest"))


def test_another_number_of_processes_continues_with_a_message(tmp_path, capfd):
    pretrain.run(arguments(tmp_path / "one", max_steps=9))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for path in list_checkpoints(tmp_path / "two")[1:]:
        shutil.rmtree(path)  # back to step 8
    shutil.rmtree(tmp_path / "two" / "final")
    run_in_processes(run_settings, 2, arguments(tmp_path / "two", resume="latest", gradient_checkpointing=True))
    said = capfd.readouterr().out
    assert "written by 1 process and continues on 2" in said and "not bit-equal" in said
    assert "changed setting: how.gradient_checkpointing: was False, is now True" in said
    first, second = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("one", "two"))
    assert first.keys() == second.keys()
    assert max((first[name] - second[name]).abs().max() for name in first if "running" not in name) < 0.01


@pytest.mark.parametrize(
    ("processes", "number", "own"),
    [(3, 1, [1]), (3, 0, [0]), (2, 0, [0, 1, 2]), (2, 1, [])],  # as many as wrote it, and one less
)
def test_each_process_reads_its_own_part_of_a_checkpoint(tmp_path, monkeypatch, processes, number, own):
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    identity = {"model": model_identity(model.config)}
    state = TrainingState(model, optimizer, identity, identity)
    path = write_checkpoint(tmp_path, state, Progress(step=2, reader={"seen": 1}), keep=1)
    files = read_record(path)["files"]
    for other in (1, 2):
        shutil.copy(path / "process-00000.pt", path / f"process-0000{other}.pt")
        files[f"process-0000{other}.pt"] = files["process-00000.pt"]
    write_record(path, read_record(path) | {"processes": 3, "files": files})
    opened, original = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **how: opened.append(path.name) or original(path, **how))
    monkeypatch.setattr("training.loop.checkpoint.world_size", lambda: processes)
    monkeypatch.setattr("training.loop.checkpoint.rank", lambda: number)
    progress, messages = read_checkpoint(path, state)
    assert [name for name in opened if name != "optimizer.pt"] == [f"process-0000{one}.pt" for one in own]
    # Counts are added up, by the first process, where others than their own go on with them.
    assert progress.reader.get("seen", 0) == len(own)
    assert not messages if processes == 3 else "was written by 3 processes and continues on 2" in messages[0]


def test_latest_looks_at_this_run_only(tmp_path, capsys):
    pretrain.run(arguments(tmp_path / "other" / "run", max_steps=2))
    shutil.copytree(tmp_path / "other", tmp_path / "mine" / "nested")
    assert find_checkpoints("latest", tmp_path / "mine") == []
    pretrain.run(arguments(tmp_path / "mine", max_steps=1, resume="latest"))
    assert "no complete checkpoint yet, starting from the beginning" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no run.json; complete in .*: step-00000001"):
        find_checkpoints(str(tmp_path / "mine" / "checkpoints"), tmp_path / "mine")
    with pytest.raises(ValueError, match=r"gone: .* no folder; complete in .*: step-00000001"):
        find_checkpoints(str(tmp_path / "gone"), tmp_path / "mine")


def test_a_full_disk_is_said_and_the_older_checkpoint_stays(tmp_path):
    """A limit on file sizes makes writing fail as a full disk does, without needing one."""

    def limited(rank, world_size, args):
        def fill_the_disk():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

        if rank == 1:
            after_step(4, fill_the_disk)
        try:
            pretrain.run(args)
        except CheckpointError as error:
            return str(error)

    first, second = run_in_processes(limited, 2, arguments(tmp_path))
    assert "could not write the checkpoint of step 4" in first and first == second
    assert "process 1: " in first and ("File too large" in first or "write" in first)
    for message in (first, second):
        assert "--resume latest" in message and "step-00000002" in message
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert not list(tmp_path.glob("checkpoints/.*"))
    run_in_processes(run_settings, 2, arguments(tmp_path, resume="latest"))


@pytest.mark.parametrize("numbers", [10, 100_000])
def test_torch_hides_no_full_disk(tmp_path, numbers):
    """Where a write fails in the middle of its archive torch tells of a position there, and not of the disk."""

    def limited(rank, world_size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        state = TrainingState(tiny_model(), None, identity={})
        with pytest.raises(CheckpointError, match=r"of step 2 .*: OSError: \[Errno 27\] File too large"):
            write_checkpoint(tmp_path, state, Progress(step=2, reader={"seen": list(range(numbers))}), keep=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # the group's own file is still to be written

    run_in_processes(limited, 1)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 11 MB; two checkpoints of these runs fit, a third does not."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=11300k", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk, tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint of step 6 .*No space left on device.*step-00000004"):
        pretrain.run(arguments(small_disk / "run"))
    assert [path.name for path in list_checkpoints(small_disk / "run")] == ["step-00000002", "step-00000004"]
    assert not list(small_disk.glob("run/checkpoints/.*"))
    shutil.copytree(small_disk / "run", tmp_path / "moved")
    run_in_processes(run_settings, 1, arguments(tmp_path / "moved", resume="latest"))
    run_in_processes(run_settings, 1, arguments(tmp_path / "undisturbed"))
    assert_equal_runs(tmp_path / "undisturbed", tmp_path / "moved")


def test_checkpoints_hold_no_code(finished):
    """Everything reads with weights_only, so nothing is unpickled."""
    for path in list_checkpoints(finished)[-1].glob("*.pt"):
        assert torch.load(path, weights_only=True)


def evaluated_run(rank, world_size, args, at=None, kill=False):
    """Evaluates every two steps by what draws random numbers and depends on the weights; fails or dies at one."""

    steps = []
    advance = loop.advance

    def counting(run):
        advance(run)
        steps[:] = [run.progress.step]

    def measure(task):
        torch.rand(3)
        if steps == [at]:
            if kill:
                die()
            raise ValueError("the validation server is away")
        total = sum(parameter.detach().double().sum().item() for parameter in task.objective.parameters())
        return {"validation/sum": total}

    loop.advance, pretrain.ContrastiveTask.evaluate = counting, measure
    return pretrain.run(args).steps


@pytest.mark.parametrize("kill", [False, True])
def test_an_evaluation_that_fails_loses_nothing_and_is_made_up_for(tmp_path, kill):
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    run_in_processes(evaluated_run, 1, arguments(undisturbed, eval_every_steps=2))
    with pytest.raises(AssertionError, match="signal 9" if kill else "the validation server is away"):
        run_in_processes(evaluated_run, 1, arguments(disturbed, eval_every_steps=2), 4, kill)
    assert list_checkpoints(disturbed)[-1].name == "step-00000004"  # the one that was due too
    run_in_processes(evaluated_run, 1, arguments(disturbed, eval_every_steps=2, resume="latest"))
    measured = [line["step"] for line in read_metrics(disturbed / "metrics.jsonl") if "validation/sum" in line]
    assert measured == [2, 4, 6, 8, 9]
    assert_equal_runs(undisturbed, disturbed)


def disturbing_run(rank, world_size, args):
    """An evaluation that leaves the model in evaluation mode and takes random numbers; what was printed."""

    def measure(task):
        task.objective.eval()
        torch.rand(3)
        return {"validation/x": 0.5} if args.eval_every_steps else {}

    pretrain.ContrastiveTask.evaluate = measure
    with contextlib.redirect_stdout(io.StringIO()) as said:
        pretrain.run(args)
    return said.getvalue()


def test_an_evaluation_changes_nothing_in_training_and_is_logged(tmp_path):
    said = run_in_processes(disturbing_run, 1, arguments(tmp_path / "a", eval_every_steps=3))
    run_in_processes(disturbing_run, 1, arguments(tmp_path / "b"))
    weights = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("a", "b")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    log = read_metrics(tmp_path / "a" / "metrics.jsonl")
    assert [line["step"] for line in log if "validation/x" in line] == [3, 6, 9]
    assert "served 72" in said[0]  # the reader's report
    files = {path.name for path in (tmp_path / "a" / "final").iterdir()}
    assert {"README.md", "processor_config.json", "tokenizer.json"} <= files


class WithBad(MemoryReader):
    """Each process meets as many bad samples as its number says; each is told those of all."""

    told = []

    @property
    def recent_bad(self):
        return rank() + 3

    def check_bad(self, number):
        self.told.append(number)


def run_with_bad(rank, world_size, args):
    pretrain.open_reader = lambda *rest: WithBad(args)
    pretrain.run(args)
    return set(WithBad.told)


def test_bad_samples_of_all_processes_are_judged_together(tmp_path):
    assert run_in_processes(run_with_bad, 2, arguments(tmp_path, max_steps=3)) == [{7}, {7}]


def test_an_evaluation_that_the_checkpoint_knows_is_not_repeated(tmp_path):
    """Saved at a step that is evaluated because SIGTERM came: what the log has of it stays."""

    def terminated(rank, world_size, args):
        after_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        return evaluated_run(rank, world_size, args)

    run_in_processes(evaluated_run, 1, arguments(tmp_path / "a", save_every_steps=5, eval_every_steps=3))
    run_in_processes(terminated, 1, arguments(tmp_path / "b", save_every_steps=5, eval_every_steps=3))
    assert list_checkpoints(tmp_path / "b")[-1].name == "step-00000003"
    run_in_processes(
        evaluated_run, 1, arguments(tmp_path / "b", save_every_steps=5, eval_every_steps=3, resume="latest")
    )
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
