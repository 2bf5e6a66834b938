"""Every command that takes a saved model refuses one that is not whole: what is missing would be drawn at random."""

import pytest
import safetensors.torch
import torch

from tests.training.to_evaluate import save_tiny_model, write_pictures
from training import evaluate, finetune, linear_probe, pretrain

COMMANDS = {"pretrain": pretrain, "finetune": finetune, "evaluate": evaluate, "linear_probe": linear_probe}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"), {"blue": 4, "green": 4})


@pytest.fixture
def damaged(tmp_path):
    """Changes the weights of a saved model and returns its folder."""

    def damage(change):
        folder = save_tiny_model(tmp_path / "model")
        weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
        change(weights)
        safetensors.torch.save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
        return folder

    return damage


def missing(weights):
    del weights["vision_model.pre_layernorm.weight"]


def misshapen(weights):
    weights["vision_model.pre_layernorm.weight"] = torch.ones(7)


@pytest.mark.parametrize("change", [missing, misshapen])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_that_is_not_whole_is_refused(name, change, damaged, pictures, tmp_path, capsys):
    folder = damaged(change)
    words = {
        "pretrain": ["--train-data", pictures, "--output-dir", str(tmp_path / "run"), "--max-steps", "1"],
        "finetune": ["--train-data", pictures, "--output-dir", str(tmp_path / "run"), "--precision", "fp32"],
        "evaluate": ["--data", pictures, "--task", "zero-shot"],
        "linear_probe": ["--train-data", pictures, "--test-fraction", "0.5", "--cache-dir", "none"],
    }
    assert COMMANDS[name].main(["--model", folder, *words[name]]) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:] and f"--model {folder}: 1 weights are missing or of another shape" in errors[0]
    assert "pre_layernorm.weight" in errors[0] and not any("Traceback" in line for line in lines)
