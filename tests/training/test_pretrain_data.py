"""Whole runs on shards: exact continuation with augmentation and workers, faults in the data, the command itself."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyramidclip_hf.loading import load_model
from tests.training.prepare.small_data import FEATURES, write_pictures, write_shards
from tests.training.processes import run_in_processes
from tests.training.runs import after_step, assert_equal_runs, expect_killed, run_settings
from tests.training.tiny import VIT
from training import pretrain
from training.data import loader
from training.data.batches import DataError
from training.data.inputs import MASKED_ID
from training.data.loader import WorkerDied
from training.data.samples import ShardSamples
from training.data.shard_index import index_path
from training.data.shards import ShardReader, ShardWriter
from training.loop.identity import IdentityError
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics
from training.settings.pretraining import PretrainingArguments

CHECKOUT = Path(pretrain.__file__).parent.parent
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos", "attention_dropout": 0.1}
MODEL = {"text_config": TEXT, "vision_config": {**VIT, "roi_feature_size": FEATURES}, "projection_dim": 8}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "scenes", range(44))


def settings(folder, data, **changes):
    chosen = {
        "output_dir": str(folder),
        "train_data": [str(data)],
        "model": "ViT-B-32",
        "model_config": MODEL,
        "global_batch_size": 8,
        "max_steps": 9,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "log_every_steps": 3,
        "save_every_steps": 2,
        "ema_decay": 0.9,
        "trackers": ["none"],
        "dataloader_workers": 0,
    }
    return PretrainingArguments(**{**chosen, **changes})


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (2, 2)])
def test_a_killed_run_continues_bit_for_bit_with_the_real_loader(tmp_path, shards, workers, world_size):
    """An epoch has five steps; the run is killed at the seventh, two steps into the second epoch."""
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    run_in_processes(run_settings, world_size, settings(undisturbed, shards, dataloader_workers=workers))
    expect_killed(settings(disturbed, shards, dataloader_workers=workers), world_size, 7, "step")
    assert list_checkpoints(disturbed)[-1].name == "step-00000006"
    # The number of workers is no part of the run either.
    again = settings(disturbed, shards, dataloader_workers=2 - workers, resume="latest")
    run_in_processes(run_settings, world_size, again)
    assert_equal_runs(undisturbed, disturbed)


def test_mixed_data_sets_continue_bit_for_bit_and_tell_their_shares(tmp_path, shards):
    other = write_shards(tmp_path / "other", range(100, 124))

    def mixed(folder, **changes):
        chosen = {"train_data": [str(shards), str(other)], "data_shares": [0.25, 0.75], "log_every_steps": 1}
        return settings(tmp_path / folder, shards, **{**chosen, **changes})

    run_in_processes(run_settings, 2, mixed("a"))
    expect_killed(mixed("b"), 2, 7, "step")
    for changes in ({"data_shares": []}, {"data_shares": [0.5, 0.5]}):
        with pytest.raises(IdentityError, match=r"data\.data_shares: was \[0\.25, 0\.75\], is now"):
            pretrain.run(mixed("b", resume="latest", **changes))
    run_in_processes(run_settings, 2, mixed("b", resume="latest"))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")
    for run in (mixed("a"), mixed("b")):
        lines = [line for line in read_metrics(Path(run.output_dir) / "metrics.jsonl") if "loss/total" in line]
        assert [(line[f"data/share_{shards.name}"], line["data/share_other"]) for line in lines] == [(0.25, 0.75)] * 9
    assert "75.0% of each batch" in (tmp_path / "a" / "final" / "README.md").read_text()


def test_what_terms_of_other_kinds_read_is_made_from_shards(tmp_path, shards, monkeypatch):
    """Distorted views, changed and masked captions, from the file to each term's loss."""
    words = {word.lower() for sample in ShardSamples(str(shards)) for word in sample.caption.split()}
    (tmp_path / "synonyms.json").write_text(json.dumps({word: [f"{word}ish"] for word in words}))
    seen, backward = [], pretrain.ContrastiveTask.backward

    def watched(self, accelerator, wrapped, batch):
        seen.append(batch)
        return backward(self, accelerator, wrapped, batch)

    monkeypatch.setattr(pretrain.ContrastiveTask, "backward", watched)
    objective = {
        "views_simclr": {"hidden": 8, "out": 4},
        "views_simsiam": {"width": 8, "bottleneck": 4},
        "views_nn": {"size": 64},
        "caption_mlm": 1.0,
        "global_caption_tokens": {"width": 4, "keep": 0.5},
        "view2_caption_aug": 1.0,
    }
    changes = {"objective": objective, "synonyms": str(tmp_path / "synonyms.json"), "max_steps": 3}
    pretrain.run(settings(tmp_path / "run", shards, loss_weights={}, log_every_steps=1, **changes))
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss/total" in line]
    assert all(0 < abs(lines[-1][f"loss/{name}"]) < float("inf") for name in objective)
    for batch in seen:
        first, second = batch["view1_pixel_values"], batch["view2_pixel_values"]
        assert first.shape == second.shape == batch["pixel_values"].shape
        assert all((one != other).any() for one, other in zip(first, second))
        assert batch["masked_input_ids"].shape[0] == len(first) and "masked_labels" in batch
    assert any((batch["masked_input_ids"] == MASKED_ID).any() for batch in seen)
    decode = load_model(str(tmp_path / "run" / "final")).processor.tokenizer.batch_decode
    texts = [(decode(batch["input_ids"]), decode(batch["augmented_input_ids"])) for batch in seen]
    changed = [new for olds, news in texts for old, new in zip(olds, news, strict=True) if old != new]
    assert len(changed) > 6 and any("ish" in text for text in changed)


@pytest.fixture
def unused_gpu(monkeypatch):
    """A machine whose GPU may not be touched."""

    def touched():
        raise AssertionError("the GPU was touched")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    # torch's own: an optimizer asks whether the GPU's stream is being captured, wherever its parameters are.
    for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):
        monkeypatch.setattr(torch.optim.Optimizer, name, lambda optimizer: None, raising=False)


def test_a_training_on_the_cpu_leaves_the_gpu_alone(tmp_path, shards, unused_gpu):
    pretrain.run(settings(tmp_path, shards, max_steps=2, dataloader_workers=1))
    pretrain.run(settings(tmp_path, shards, max_steps=2, dataloader_workers=1, resume="latest"))


def validate(rank, world_size, args):
    return pretrain.run(args).metrics


def test_validation_is_the_same_on_one_two_and_three_processes(tmp_path, shards):
    """The same weights (nothing is learnt at rate 0), evaluated on a number of samples that no two processes share
    evenly.
    """
    first = pretrain.run(settings(tmp_path / "model", shards, max_steps=1)).final
    expected = None
    for count in (1, 2, 3):
        args = settings(
            tmp_path / str(count), shards, max_steps=1, global_batch_size=6, learning_rate=0.0, freeze="vision"
        )
        args.model, args.model_config, args.ema_decay = str(first), None, 0.0
        args.validation_data, args.validation_samples, args.save_every_steps = str(shards), 37, 0
        results = run_in_processes(validate, count, args)
        expected = expected or results[0]
        assert all(result == expected for result in results), count
    assert {name.split("/")[1] for name in expected} == {
        "global_caption", "global_summary", "local_caption", "roi_summary", "global_tags", "roi_caption", "local_tags"
    }  # fmt: skip
    assert 0 < expected["validation/global_caption/image_to_text_R@10"] < 1
    lines = [line for line in read_metrics(tmp_path / "3" / "metrics.jsonl") if "validation/roi_tags/x" not in line]
    assert {name: value for name, value in lines[-1].items() if name != "step"} == expected


def test_validation_data_that_are_trained_on_are_told(tmp_path, shards, capsys):
    for data, is_same in ((f"{shards}/", True), (str(write_shards(tmp_path / "other", range(16))), False)):
        pretrain.run(settings(tmp_path / "run", shards, dry_run=True, max_steps=1, validation_data=data))
        told = f"validation_data {data} is trained on: what is measured there says what is remembered"
        assert (told in capsys.readouterr().err) is is_same


def test_validation_samples_that_cannot_be_read_are_left_out_and_counted(tmp_path, shards, capsys):
    spoil = {
        5: lambda members: {**members, "jpg": members["jpg"][: len(members["jpg"]) // 2]},
        9: lambda members: {**members, "json": b"{broken"},
    }
    data = write_shards(tmp_path / "validation", range(16), spoil=spoil)
    without = write_shards(tmp_path / "without", [number for number in range(16) if number not in spoil])
    options = {"max_steps": 2, "eval_every_steps": 1, "save_every_steps": 1}
    result = pretrain.run(settings(tmp_path / "run", shards, validation_data=str(data), **options))
    assert result.finished
    told = capsys.readouterr().err
    assert re.search(r"validation: 2 of 16 samples cannot be read and are left out: picture 0005 of .*truncated", told)
    assert "skips nothing" not in told
    expected = pretrain.run(settings(tmp_path / "clean", shards, validation_data=str(without), **options)).metrics
    assert result.metrics == {"validation/bad": 2.0, **expected} and expected
    all_bad = {number: lambda members: {**members, "jpg": b"x"} for number in range(4)}
    bad = write_shards(tmp_path / "bad", range(4), spoil=all_bad)
    with pytest.raises(ValueError, match="validation_data .*bad: none of 4 samples can be read; picture 0000"):
        pretrain.run(settings(tmp_path / "none", shards, validation_data=str(bad), **options))


def damaged(folder, shards):
    """A copy of the shards with one picture cut and another shard that ends in the middle."""
    shutil.copytree(shards, folder)
    first, second = sorted(folder.glob("*.tar"))[:2]
    reader = ShardReader(str(first))
    rows = [(key, reader.read(i)) for i, key in enumerate(reader.keys)]
    with ShardWriter(str(first)) as writer:
        for number, (key, members) in enumerate(rows):
            members = {suffix: bytes(data) for suffix, data in members.items()}
            if number == 3:
                members["jpg"] = members["jpg"][:100]
            writer.write_members(key, members)
    index_path(second).unlink()
    with open(second, "r+b") as file:
        file.truncate(os.path.getsize(second) * 3 // 4)
    return folder


def test_damaged_pictures_and_shards_are_replaced_counted_and_named(tmp_path, shards, capsys):
    data = damaged(tmp_path / "damaged", shards)
    result = pretrain.run(settings(tmp_path / "run", data, max_steps=10))
    said = capsys.readouterr().out
    assert result.finished and "bad and replaced" in said and "0003" in said
    named = [json.loads(line) for path in (tmp_path / "run").glob("bad-samples-*") for line in path.open()]
    assert "0003" in {entry["key"] for entry in named} and all(entry["reason"] for entry in named)
    with pytest.raises(DataError, match="max_bad_fraction is 0.0%.*training.prepare.audit"):
        pretrain.run(settings(tmp_path / "strict", data, max_steps=10, max_bad_fraction=0.0))


def test_a_dead_worker_ends_the_run_and_nothing_is_lost(tmp_path, shards):
    """The worker is killed as the kernel does it when memory runs out."""

    def run(rank, world_size, args):
        def kill_the_workers():
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

        after_step(5, kill_the_workers)
        try:
            pretrain.run(args)
        except WorkerDied as error:
            message = str(error)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would speak again while this process ends
        return message

    (message,) = run_in_processes(run, 1, settings(tmp_path, shards, dataloader_workers=1, max_steps=30))
    assert "a loader worker died" in message and "(now 1)" in message and "--resume latest" in message
    assert list_checkpoints(tmp_path)[-1].name == "step-00000004"


@pytest.fixture
def captions(tmp_path):
    """A manifest as README asks for: pictures and captions alone."""
    write_pictures(tmp_path / "loose", 12)
    lines = [json.dumps({"image": f"{n}.jpg", "caption": f"caption {n}"}) for n in range(12)]
    (tmp_path / "loose" / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path / "loose" / "pairs.jsonl"


def test_captions_alone_are_refused_under_the_default_objective_and_the_advice_works(tmp_path, captions, capsys):
    with pytest.raises(ValueError, match="global_summary.*none of 12 pairs") as error:
        pretrain.run(settings(tmp_path / "run", captions))
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "stopped.json"}
    advised = json.loads(re.search(r"--loss-weights '(.*?)'", str(error.value))[1])
    result = pretrain.run(settings(tmp_path / "run", captions, max_steps=1, loss_weights=advised))
    assert json.loads((result.final / "training.json").read_text())["shares_of_pairs"] == dict.fromkeys(advised, 1.0)
    assert "global_caption 100%, local_caption 100%" in (result.final / "README.md").read_text()
    assert "of 12 pairs looked at: global_caption 100%" in capsys.readouterr().err
    pretrain.run(settings(tmp_path / "dry", captions, dry_run=True, allow_empty_terms=True))
    said = capsys.readouterr()
    assert "warning: less than half" in said.err
    assert "global_summary 0.167 (0%)" in said.out and "local_caption 0.167 (100%)" in said.out


@pytest.mark.timeout(120)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_manifest_whose_pictures_go_away_ends_with_the_first(tmp_path, monkeypatch, captions, workers):
    """What a reading thread or process raised ends the run: walking back its causes must end, too."""
    found = loader.look_at

    def look_and_lose(*arguments):
        coverage = found(*arguments)
        for picture in captions.parent.glob("*.jpg"):
            picture.unlink()
        return coverage

    monkeypatch.setattr(loader, "look_at", look_and_lose)
    changes = {"loss_weights": {"global_caption": 1.0}, "dataloader_workers": workers}
    with pytest.raises(DataError, match="loose/pairs.jsonl:.*no-image.*drawn in place of it"):
        pretrain.run(settings(tmp_path / "run", captions, **changes))
    told = json.loads((tmp_path / "run" / "stopped.json").read_text())
    assert (told["reason"], told["exit_code"], told["try_again"]) == ("bad data", 1, False)


def terminated_with_its_group(rank, world_size, args, kill_workers):
    """SIGTERM to the whole process group, twice, as a scheduler and a launcher send it; perhaps workers die of it."""
    os.setpgid(0, 0)

    def terminate():
        workers = multiprocessing.active_children()
        assert len(workers) == args.dataloader_workers
        sender = os.fork()  # torch's own workers tell their parent's signals from those of others
        if sender == 0:
            for _ in range(2):
                os.killpg(0, signal.SIGTERM)
            os._exit(0)
        os.waitpid(sender, 0)
        time.sleep(0.5)  # what is to die of it is dead
        assert all(worker.is_alive() for worker in workers)
        if kill_workers:
            for worker in workers:
                os.kill(worker.pid, signal.SIGKILL)
                worker.join()

    after_step(5, terminate)
    result = pretrain.run(args)
    return result.finished, result.steps


@pytest.mark.parametrize(("world_size", "kill_workers"), [(1, False), (2, True)])
def test_sigterm_to_all_processes_saves_with_workers(tmp_path, shards, world_size, kill_workers):
    run_in_processes(run_settings, world_size, settings(tmp_path / "a", shards))
    disturbed = settings(tmp_path / "b", shards, dataloader_workers=2, save_every_steps=0)
    found = run_in_processes(terminated_with_its_group, world_size, disturbed, kill_workers)
    assert found == [(False, 4 + world_size)] * world_size
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == [f"step-0000000{4 + world_size}"]
    run_in_processes(run_settings, world_size, settings(tmp_path / "b", shards, resume="latest"))
    assert_equal_runs(tmp_path / "a", tmp_path / "b")


def test_one_dataset_too_small_shows_the_arithmetic(tmp_path, shards):
    with pytest.raises(ValueError, match="44 samples / 64 in a global batch = 0.69"):
        pretrain.run(settings(tmp_path, shards, global_batch_size=64))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["one_gpu", "two_processes"])
def test_the_command_takes_two_steps_under_the_engines_that_a_cpu_can_run(tmp_path, shards, engine):
    config = tmp_path / "run.yaml"
    content = settings(tmp_path / "run", shards).to_dict()
    config.write_text(json.dumps(content))  # JSON is YAML
    command = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    command += ["--config_file", str(CHECKOUT / "training" / "configs" / "accelerate" / f"{engine}.yaml")]
    command += ["-m", "training.pretrain", "--config", str(config), "--dry-run"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    processes = 2 if engine == "two_processes" else 1
    assert f"8 = {processes} process{'' if processes == 1 else 'es'} x {8 // processes}" in done.stdout
    assert done.stdout.count("dry run:") == 1 and not (tmp_path / "run").exists()
