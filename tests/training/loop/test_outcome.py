"""RUN/stopped.json: why a run ended, and whether the same command may go further."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess

import pytest

from pyramidclip_command import Failure
from tests.training.processes import run_in_processes
from tests.training.runs import MemoryReader, after_step, settings, use_memory
from training import pretrain
from training.loop import run as loop
from training.loop.outcome import REASONS, Outcome, RunFailed, read_outcome, write_outcome
from training.loop.tracking import NonFiniteLoss


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch)


@pytest.fixture
def after(monkeypatch):
    """`after_step`, forgotten at the end."""
    monkeypatch.setattr(loop, "advance", loop.advance)
    return after_step


def told(folder):
    found = read_outcome(folder)
    assert (found["exit_code"], found["try_again"]) == REASONS[found["reason"]]
    return found["reason"], found["try_again"], found["exit_code"], found["step"]


def test_finished_and_stopped(tmp_path, after):
    after(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    pretrain.run(settings(tmp_path))
    assert told(tmp_path) == ("asked to stop", True, 75, 3)
    seen = []
    after(5, lambda: seen.append(read_outcome(tmp_path)))
    pretrain.run(settings(tmp_path, resume="latest"))
    assert seen == [{}]  # while the run goes on nothing is told
    assert told(tmp_path) == ("finished", False, 0, 8)


class Poisoned(MemoryReader):
    """Regions of the third batch are NaN."""

    def batches(self, epoch, position):
        for number, batch in enumerate(super().batches(epoch, position)):
            if number == 2:
                batch["roi_features"][:] = math.nan
                batch["roi_mask"][:] = True
            yield batch


def test_a_loss_that_will_be_nan_again_is_not_tried_again(tmp_path, monkeypatch):
    use_memory(monkeypatch, Poisoned)
    with pytest.raises(NonFiniteLoss):
        pretrain.run(settings(tmp_path))
    assert told(tmp_path)[:3] == ("not finite", False, 1)


def test_a_wrong_setting_is_not_tried_again(tmp_path, after):
    after(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    pretrain.run(settings(tmp_path))
    with pytest.raises(ValueError):
        pretrain.run(settings(tmp_path, resume="latest", learning_rate=1.0))
    assert told(tmp_path)[:3] == ("setting or data", False, 2)
    assert "learning_rate: was 0.001, is now 1.0" in read_outcome(tmp_path)["message"]


@pytest.mark.parametrize("change", [{"precision": "fp16"}, {"trackers": ["nobody"]}, {"engine": "true"}])
def test_a_start_that_is_refused_leaves_its_own_reason(tmp_path, after, monkeypatch, change):
    """A scheduler that read "asked to stop, try again" would start it for ever."""
    after(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    pretrain.run(settings(tmp_path))
    if "engine" in change:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", change.pop("engine"))
    with pytest.raises(ValueError):
        pretrain.run(settings(tmp_path, resume="latest", **change))
    assert told(tmp_path)[:3] == ("setting or data", False, 2)


def test_a_file_that_is_gone_on_the_way_is_no_wrong_usage(tmp_path, after, monkeypatch, capsys):
    after(5, lambda: shutil.rmtree(tmp_path / "run"))
    monkeypatch.setattr(pretrain, "parse", lambda words: settings(tmp_path / "run", log_every_steps=1))
    assert pretrain.main([]) == 1
    assert "error: step 5: " in capsys.readouterr().err


class Unequal(MemoryReader):
    """The second process gets a pair less from the third step on."""

    def batches(self, epoch, position):
        for number, batch in enumerate(super().batches(epoch, position)):
            short = number >= 2 and pretrain.rank() == 1
            yield {name: value[: len(value) - short] for name, value in batch.items()}


def failing(rank, world_size, args):
    try:
        pretrain.run(args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_the_process_that_fails_is_the_one_that_tells(tmp_path, monkeypatch):
    use_memory(monkeypatch, Unequal)
    with pytest.raises(AssertionError):
        run_in_processes(lambda *given: pretrain.run(given[2]), 2, settings(tmp_path))
    assert "process 1 got 3 pairs at step 3" in read_outcome(tmp_path)["message"]


@pytest.mark.parametrize("links", [True, False])
def test_what_happened_first_stays(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*paths):
            raise OSError(errno.EPERM, "Operation not permitted")  # as FAT and some shares have it

        monkeypatch.setattr(os, "link", refuse)
    write_outcome(tmp_path, Outcome("not finite", "first"), 3)
    write_outcome(tmp_path, Outcome("another process", "second"), 4)
    assert told(tmp_path) == ("not finite", False, 1, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["stopped.json"]


def test_who_cannot_write_leaves_it_to_the_others(tmp_path):
    """Also what stands there: a file of which the disk took the beginning would be in their way."""

    def limited(rank, world_size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, before[1]))
        with pytest.raises(OSError, match="File too large"):
            write_outcome(tmp_path, Outcome("disk full", "first"), 3)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # the group's own file is still to be written

    run_in_processes(limited, 1)
    assert not list(tmp_path.iterdir())
    write_outcome(tmp_path, Outcome("disk full", "second"), 3)
    assert told(tmp_path) == ("disk full", False, 1, 3)


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("room", [1_000, 1_000_000])
def test_a_disk_that_is_full_when_the_model_is_written(small_disk, monkeypatch, room):
    """Full in the weights, or in the tokenizer behind them; each library has another error for it."""
    folder, ballast = small_disk / "run", small_disk / "ballast"
    original = loop.training_record

    def fill(run, metrics):
        left = os.statvfs(small_disk)
        ballast.write_bytes(bytes(max(left.f_bavail * left.f_frsize - room, 0)))
        return original(run, metrics)

    monkeypatch.setattr(loop, "training_record", fill)
    with pytest.raises(RunFailed, match=r"could not write .*/run/final: .*(No space left|os error 28).*make room"):
        pretrain.run(settings(folder, save_every_steps=0))
    assert not (folder / "final").exists() and not list(folder.glob(".final*"))
    ballast.unlink()
    monkeypatch.setattr(loop, "training_record", original)
    assert pretrain.run(settings(folder, save_every_steps=0, resume="latest")).finished
    assert told(folder)[0] == "finished"


def test_a_push_that_fails_takes_nothing_away(tmp_path, monkeypatch, capsys):
    def refuse(folder, repository):
        assert (folder / "final" / "model.safetensors").is_file()
        raise Failure("no right to write there")

    monkeypatch.setattr(loop, "publish", refuse)
    monkeypatch.setattr(pretrain, "parse", lambda words: settings(tmp_path, push_to_hub="owner/name"))
    assert pretrain.main([]) == 4
    assert "no right to write there. Publish it with python -m training.publish" in capsys.readouterr().err
    assert told(tmp_path) == ("finished, not published", False, 4, 8)
    assert json.loads((tmp_path / "final" / "training.json").read_text())["steps"] == 8
