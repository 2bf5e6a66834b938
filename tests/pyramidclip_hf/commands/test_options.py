"""What all subcommands share: the model, its device and type, too little memory."""

import os

import pytest
import safetensors.torch
import torch

from pyramidclip_hf import PyramidCLIPModel
from tests.pyramidclip_hf.commands.plain import run


def test_folders_that_hold_no_model(model_dir, pictures, capsys, tmp_path):
    def refused(*messages):
        code, out, err = run(capsys, "classify", "--model", tmp_path, pictures / "blue.jpg", "--labels", "cat")
        assert (code, out) == (2, "") and all(message in err for message in messages), err

    refused("no config.json")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").touch()
    refused("no config.json", f"{tmp_path / 'final'} is such a one")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    refused("'clip'", "expected 'pyramidclip'")
    for name in ("config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"):
        absent = {"config.json": "weights", "model.safetensors": "tokenizer", "tokenizer.json": "image processor"}
        (tmp_path / name).write_bytes(open(os.path.join(model_dir, name), "rb").read())
        if name in absent:
            refused(f"the {absent[name]} is missing")
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    refused("model.safetensors, 7 bytes, is cut short or damaged", "copy or download it again")
    weights = safetensors.torch.load_file(os.path.join(model_dir, "model.safetensors"))
    wrong = {**weights, "logit_scale": torch.zeros(2)}
    safetensors.torch.save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    refused("1 weights are missing or of another shape", "logit_scale")
    weights.pop("visual_projection.weight")
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    refused("1 weights are missing or of another shape", "visual_projection.weight")
    code, _, err = run(capsys, "classify", "--model", "no/such/folder", pictures / "blue.jpg", "--labels", "cat")
    assert code == 2 and "no such file or folder" in err
    code, _, err = run(capsys, "classify", "--model", "someone/nothing", pictures / "blue.jpg", "--labels", "cat")
    assert code == 2 and "the Hub did not give" in err


def test_a_hub_id_is_the_same_model_as_its_folder(embedded, model_dir, capsys):
    """From the Hub's cache, as after a download."""
    from huggingface_hub import constants

    cache = os.path.join(constants.HF_HUB_CACHE, "models--someone--tiny")
    commit = "0123456789abcdef0123456789abcdef01234567"
    os.makedirs(os.path.join(cache, "refs"))
    os.makedirs(os.path.join(cache, "snapshots"))
    with open(os.path.join(cache, "refs", "main"), "w") as file:
        file.write(commit)
    os.symlink(model_dir, os.path.join(cache, "snapshots", commit))
    by_folder = run(capsys, "search", embedded, "--text", "fox")
    assert run(capsys, "search", embedded, "--model", "someone/tiny", "--text", "fox")[:2] == by_folder[:2]


@pytest.mark.parametrize("device", ["toaster", "cuda:99", "meta"])
def test_devices_that_are_not_there(device, model_dir, pictures, capsys):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat", "--device", device]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and f"--device {device}" in err and err.count("\n") == 1


def test_half_types_work_and_say_where_they_are_slow(model_dir, pictures, capsys, monkeypatch):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat", "--device", "cpu"]
    for able in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able}, raising=False)
        code, out, err = run(capsys, *argv, "--dtype", "bfloat16")
        assert code == 0 and out.endswith("cat\t1.0000\n") and ("float32 is faster" in err) is not able
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # torch 2.6 does not say
    code, _, err = run(capsys, *argv, "--dtype", "bfloat16")
    assert code == 0 and "float32 is faster" not in err


def test_too_little_memory_is_named(model_dir, pictures, capsys, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("no more memory")

    monkeypatch.setattr(PyramidCLIPModel, "encode_image", exhausted)
    code, _, err = run(capsys, "classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "cat")
    assert code == 1 and "Lower --batch-size" in err
