"""What a checkpoint really keeps of a run, against what its settings say of themselves."""

import dataclasses
import json

from tests.training.runs import MODEL_CONFIG, settings, use_memory
from tests.training.to_evaluate import write_pictures
from training import finetune, pretrain
from training.loop.run_folder import list_checkpoints
from training.settings.fields import Through, identity_of
from training.settings.finetuning import FinetuneArguments


def assert_kept(args):
    """Every setting that belongs to the identity is in the checkpoint: by value, or by what comes of it."""
    (path,) = list_checkpoints(args.output_dir)
    kept = json.loads((path / "run.json").read_text())["identity"]
    for group, values in identity_of(args).items():
        assert values.items() <= kept[group].items()
    through = [entry.metadata["identity"] for entry in dataclasses.fields(args)]
    through = [found for found in through if isinstance(found, Through)]
    assert through and all(found.key in kept[found.group] if found.key else kept[found.group] for found in through)


def test_of_pre_training(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    args = settings(tmp_path, max_steps=1)
    pretrain.run(args)
    assert_kept(args)


def test_of_fine_tuning(tmp_path):
    data = write_pictures(tmp_path / "data", {"blue": 4, "green": 4}, 0)
    chosen = {"epochs": 1, "head_epochs": 1, "global_batch_size": 8, "precision": "fp32", "trackers": ["none"]}
    chosen |= {"output_dir": str(tmp_path / "run"), "model": "ViT-B-32", "model_config": MODEL_CONFIG}
    args = FinetuneArguments(train_data=data, dataloader_workers=0, **chosen)
    finetune.run(args)
    assert_kept(args)
