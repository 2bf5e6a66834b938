"""The one loader of a saved model: nothing in it may be drawn at random, and what is missing is named."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPForImageClassification, PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.loading import choose_device, load_model

PARTS = {"model.safetensors": "weights", "tokenizer.json": "tokenizer", "preprocessor_config.json": "image processor"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model, with both towers and the processor."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_leff_layers": 1}  # fmt: skip
    PyramidCLIPModel(PyramidCLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).save_pretrained(
        folder
    )
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=16)).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def refusal(folder, **options):
    with pytest.raises(ValueError, match=".") as error:
        load_model(str(folder), **options)
    assert str(error.value).startswith(f"--model {folder}: ")
    return str(error.value)


def test_what_was_saved_is_loaded(saved, monkeypatch):
    loaded = load_model(str(saved))
    stored = safetensors.torch.load_file(saved / "model.safetensors")
    state = loaded.model.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(stored[name], state[name]) for name in stored)
    assert not loaded.model.training and (loaded.name, loaded.folder) == (str(saved), saved)
    assert loaded.processor.image_processor.crop_size.height == 16
    half = load_model(str(saved), device=torch.device("cpu"), dtype="bfloat16", fuse=True)
    assert half.model.dtype == torch.bfloat16 and half.model.is_fused


def test_the_hash_is_of_the_weights_alone(saved, copy):
    same, folder = load_model(str(saved)).sha256(), load_model(str(copy))
    (copy / "README.md").write_text("a card")
    assert folder.sha256() == same
    folder.model.save_pretrained(copy, max_shard_size="5KB")
    (copy / "model.safetensors").unlink()
    in_shards = load_model(str(copy)).sha256()
    assert in_shards != same and len(in_shards) == 64


def test_a_folder_without_a_part_is_refused(copy):
    (copy / "processor_config.json").unlink()  # it has the image processor's settings too
    for name, part in PARTS.items():
        content = (copy / name).read_bytes()
        (copy / name).unlink()
        assert f"the {part} is missing ({name}" in refusal(copy)
        (copy / name).write_bytes(content)
    (copy / "config.json").unlink()
    assert "no config.json there" in refusal(copy)


@pytest.mark.parametrize(("content", "message"), [("[1]", "no JSON mapping"), ("{", "no JSON mapping"),
                                                  ('{"model_type": "clip"}', "its model_type is 'clip'")])  # fmt: skip
def test_another_kind_of_model_is_refused(content, message, copy):
    (copy / "config.json").write_text(content)
    assert message in refusal(copy)


def test_missing_and_misshapen_weights_are_refused(copy, capfd):
    weights = safetensors.torch.load_file(copy / "model.safetensors")

    def save(changed):
        safetensors.torch.save_file(changed, copy / "model.safetensors", {"format": "pt"})

    save({**weights, "logit_scale": torch.zeros(2)})
    assert "1 weights are missing or of another shape: ['logit_scale']" in refusal(copy)
    missing = {name: tensor for name, tensor in weights.items() if not name.startswith("text_model")}
    save(missing)
    assert f"{len(weights) - len(missing)} weights are missing" in refusal(copy)
    assert capfd.readouterr().err == ""  # transformers would list them all
    (copy / "model.safetensors").write_bytes(b"damaged")
    assert "cut short or damaged" in refusal(copy)
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "the weights is missing (model.safetensors" in refusal(copy)


def test_weights_that_are_cut_short_name_the_file_and_what_to_do(saved, copy):
    whole = (copy / "model.safetensors").read_bytes()
    for content in (whole[:-100], whole[:50], b"damaged", b""):
        (copy / "model.safetensors").write_bytes(content)
        told = refusal(copy)
        assert f"{copy / 'model.safetensors'}, {len(content):,} bytes, is cut short or damaged" in told
        assert "copy or download it again" in told
    (copy / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "`git lfs pull` fetches it" in refusal(copy)
    (copy / "model.safetensors").unlink()
    load_model(str(saved)).model.save_pretrained(copy, max_shard_size="5KB")
    first, second, *_ = sorted(copy.glob("model-*.safetensors"))
    second.write_bytes(second.read_bytes()[:-1])
    assert f"{second}, " in refusal(copy) and "cut short" in refusal(copy)
    first.unlink()
    assert f"{first} is not there, and the index of the weights names it; copy or download" in refusal(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    assert "model.safetensors.index.json is damaged" in refusal(copy)


def test_a_name_that_can_be_no_hub_id_is_not_looked_for_there(monkeypatch):
    monkeypatch.setattr("pyramidclip_hf.loading.snapshot_download", lambda *args, **options: pytest.fail("asked"))
    assert "there is no such folder here, and an id of the Hub has its owner in front" in refusal("nowhere")
    assert "the name of an architecture, which has no weights" in refusal("ViT-B-32")


def test_a_classifier_is_no_dual_encoder(saved, copy):
    model = load_model(str(saved)).model
    PyramidCLIPForImageClassification(model.config).save_pretrained(copy)
    told = "Expected a whole PyramidCLIPModel, with both towers. This one is of a PyramidCLIPForImageClassification."
    assert told in refusal(copy)


def test_names_that_lead_nowhere(tmp_path, monkeypatch):
    for name in (str(tmp_path / "nowhere"), "./nowhere", "~/nowhere", "a/b/c"):
        assert "there is no such folder" in refusal(name)
    assert "the Hub did not give one of that id" in refusal("someone/nothing")
    (tmp_path / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("model.safetensors", str(tmp_path / "model.safetensors")):
        assert f"--model {name}: that is a file, expected the folder" in refusal(name)
    with pytest.raises(ValueError, match="^--teacher a/b/c: there is no such folder"):
        load_model("a/b/c", flag="--teacher")


def test_a_hub_id_and_its_revision(saved, monkeypatch):
    """From the Hub's cache, as after a download."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = Path(constants.HF_HUB_CACHE) / "models--someone--loaded"
    for folder in ("refs", "snapshots"):
        (cache / folder).mkdir(parents=True)
    (cache / "refs" / "v1").write_text(commit)
    os.symlink(saved, cache / "snapshots" / commit)
    loaded = load_model("someone/loaded", revision="v1")
    assert loaded.name == "someone/loaded" and loaded.sha256() == load_model(str(saved)).sha256()
    assert "the Hub did not give one" in refusal("someone/loaded", revision="v2")


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in {"cpu", "cuda", "mps"}
    for name in ("toaster", "cuda:99", "meta"):
        with pytest.raises(
            ValueError, match=f"^--device {name}: expected auto, cpu, or cuda, cuda:1, mps where it is there"
        ):
            choose_device(name)


def test_a_gpu_that_this_torch_was_not_built_for_is_a_sentence(monkeypatch):
    def no_kernel(*shape, device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with")

    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    monkeypatch.setattr(torch, "ones", no_kernel)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (3, 5))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_90", "sm_100"])
    sentence = (
        r"^cuda:0: Some Card \(sm_35\) is there, but torch .*, built for sm_90, sm_100, cannot compute on it \(CUDA"
    )
    with pytest.raises(ValueError, match=sentence):
        choose_device("cuda:0")
    monkeypatch.setattr(torch, "ones", lambda *shape, device: torch.zeros(2))
    assert choose_device("cuda:0") == torch.device("cuda:0")


def test_the_settings_of_transformers_stay(saved):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load_model(str(saved))
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    assert json.loads((saved / "config.json").read_text())["model_type"] == "pyramidclip"


@pytest.mark.parametrize(
    "claim", [{"num_hidden_layers": 10**7}, {"hidden_size": 10**6}, {"hidden_size": 10**400}, {"vocab_size": 10**9}]
)
def test_a_configuration_that_claims_far_more_than_its_weights_is_refused_at_once(copy, claim):
    """Ten million layers took more than a minute, and were then found missing."""
    content = json.loads((copy / "config.json").read_text())
    content["text_config"] |= claim
    (copy / "config.json").write_text(json.dumps(content))
    began = time.perf_counter()
    assert "text_config of its config.json stands for" in refusal(copy)
    assert time.perf_counter() - began < 2


def test_configurations_and_tokenizers_of_absurd_size_or_depth_are_refused(copy):
    (copy / "config.json").write_text("[" * 10**6)
    assert "config.json is no JSON mapping" in refusal(copy)
    with open(copy / "config.json", "wb") as file:
        file.truncate(300 << 20)
    assert "config.json has more than" in refusal(copy)


def test_a_tokenizer_of_absurd_size_is_refused_before_it_is_read(copy):
    with open(copy / "tokenizer.json", "wb") as file:
        file.truncate(300 << 20)
    assert "tokenizer.json has more than" in refusal(copy)
    (copy / "tokenizer.json").unlink()
    os.mkfifo(copy / "tokenizer.json")
    assert "tokenizer.json is a folder, device or FIFO" in refusal(copy)
