"""What is said of a saved folder with a damaged file, and of a run's folder in place of the model's in it."""

import shutil

import pytest
import torch

from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPImageProcessor,
    PyramidCLIPModel,
    PyramidCLIPProcessor,
    PyramidCLIPTokenizer,
)
from pyramidclip_hf.loading import load_model

CLASSES = (PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor, PyramidCLIPTokenizer, PyramidCLIPImageProcessor)
# Which files each class cannot do without.
READ = {
    "config.json": {PyramidCLIPConfig, PyramidCLIPModel},
    "model.safetensors": {PyramidCLIPModel},
    "processor_config.json": {PyramidCLIPProcessor, PyramidCLIPImageProcessor},
    "tokenizer.json": {PyramidCLIPProcessor, PyramidCLIPTokenizer},
    "tokenizer_config.json": {PyramidCLIPProcessor, PyramidCLIPTokenizer},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    PyramidCLIPModel(PyramidCLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).save_pretrained(
        folder
    )
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", [*READ, "preprocessor_config.json"])
def test_a_damaged_file_is_named_with_what_to_do(saved, tmp_path, name):
    folder = shutil.copytree(saved, tmp_path / "copy")
    if name == "preprocessor_config.json":  # read where the processor has no file of its own
        (folder / "processor_config.json").unlink()
    whole = (folder / name).read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"):
        (folder / name).write_bytes(content)
        told = "`git lfs pull` fetches it" if b"lfs" in content else "copy or download it again"
        for one in READ.get(name, {PyramidCLIPProcessor, PyramidCLIPImageProcessor}):
            with pytest.raises(ValueError, match=told) as error:
                one.from_pretrained(folder)
            assert str(folder / name) in str(error.value), one
        with pytest.raises(ValueError, match=told) as error:
            load_model(str(folder))
        assert str(error.value).startswith(f"--model {folder}: ") and str(folder / name) in str(error.value)


def test_json_that_is_no_tokenizer_is_named(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer \(.*copy or download it again"):
        PyramidCLIPProcessor.from_pretrained(folder)


def test_errors_of_other_kinds_stay_what_they_are(saved, tmp_path):
    """No file is damaged: what the loader says is not replaced."""
    with pytest.raises(ValueError, match="image_size .* must be a multiple of patch_size"):
        PyramidCLIPModel.from_pretrained(saved, image_size=17)
    with pytest.raises(OSError, match="no file named model.safetensors"):
        PyramidCLIPModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("inside", ["final", "checkpoints/step-00000008/model"])
@pytest.mark.parametrize("one", CLASSES)
def test_a_run_folder_leads_to_the_model_in_it(saved, tmp_path, one, inside):
    run = tmp_path / "run"
    shutil.copytree(saved, run / inside)
    (run / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(FileNotFoundError, match=f"no config.json there.* {run / inside} is such a one"):
        one.from_pretrained(run)
    with pytest.raises(ValueError, match=f"no config.json there.* {run / inside} is such a one"):
        load_model(str(run))
    assert type(one.from_pretrained(run, subfolder=inside)) is one


def test_a_folder_of_its_own_may_lie_around_a_model(saved, tmp_path):
    """A processor saved into the folder above: it is what was asked for."""
    shutil.copytree(saved, tmp_path / "model")
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32)).save_pretrained(tmp_path)
    assert PyramidCLIPProcessor.from_pretrained(tmp_path).image_processor.crop_size.height == 32
