"""Models, pictures and embeddings that the tests of the commands share."""

import functools

import numpy as np
import pytest
from PIL import Image

import pyramidclip_command
from pyramidclip_hf import PyramidCLIPProcessor
from tests.pyramidclip_hf.commands.plain import BROKEN, COLOURS, ROTATED, save_tiny_model


@pytest.fixture(autouse=True, scope="module")
def each_processor_is_read_once():
    """Most of the time of a command on a tiny model goes into the vocabulary."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PyramidCLIPProcessor, "from_pretrained", functools.cache(PyramidCLIPProcessor.from_pretrained))
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), 0)


@pytest.fixture(scope="session")
def other_model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), 1)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """Seven good pictures, one of them turned by EXIF, two broken ones, and files that are none."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name in ("a", "b", ".hidden"):
        (folder / name).mkdir()
    for name, colour in COLOURS.items():
        Image.new("RGB", (40, 30), colour).save(folder / name)
    for name in ("a/noise.PNG", "b/noise.gif", "noise.bmp"):
        Image.fromarray(rng.integers(60, 140, (50, 36, 3), np.uint8)).save(folder / name)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(60, 140, (30, 60, 3), np.uint8)).save(folder / ROTATED, exif=exif)
    (folder / BROKEN[0]).write_bytes((folder / ROTATED).read_bytes()[:700])
    (folder / BROKEN[1]).write_text("no picture")
    (folder / "notes.txt").write_text("no picture either")
    Image.new("RGB", (8, 8)).save(folder / ".hidden" / "no.png")
    Image.new("RGB", (8, 8)).save(folder / "a" / "._red.png")
    return folder


@pytest.fixture(scope="session")
def embedded(pictures, model_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("embedded") / "pictures.npz"
    argv = ["embed", "--model", model_dir, str(pictures), "--output", str(output), "--quiet"]
    assert pyramidclip_command.main(argv) == 3
    return output
