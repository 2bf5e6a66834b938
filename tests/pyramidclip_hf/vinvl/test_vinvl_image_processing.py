"""The detector's image processor against the published sizes and torchvision's resizing."""

import base64
import io
import os

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from torchvision.transforms import functional
from transformers import AutoImageProcessor

from pyramidclip_hf.vinvl import VinVLImageProcessor
from pyramidclip_hf.vinvl.image_processing_vinvl import resized_size

MEAN = torch.tensor([103.530, 116.280, 123.675])[:, None, None]


def picture(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 4), dtype=np.uint8)
    return Image.fromarray(values[..., : len(mode)] if len(mode) > 1 else values[..., 0])


@pytest.fixture(scope="module")
def small():
    """Short side 40, long side at most 60."""
    return VinVLImageProcessor(size={"shortest_edge": 40, "longest_edge": 60})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((640, 480), (800, 600)),
        ((480, 640), (600, 800)),
        ((1920, 1080), (999, 562)),
        ((500, 333), (900, 600)),
        ((1000, 300), (1000, 300)),
        ((224, 224), (600, 600)),
        ((2000, 400), (1000, 200)),
    ],
)
def test_published_sizes(given, expected):
    width, height = given
    assert resized_size(height, width, 600, 1000) == expected[::-1]


def test_published_size_through_the_processor():
    inputs = VinVLImageProcessor()([picture(1920, 1080)], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 562, 999)
    assert inputs["image_sizes"].tolist() == [[562, 999]] and inputs["original_sizes"].tolist() == [[1080, 1920]]


def test_pixels_are_the_published_transformation(small):
    given = picture(75, 50)
    expected = functional.to_tensor(functional.resize(given, [40, 60]))[[2, 1, 0]] * 255 - MEAN
    assert torch.equal(small(given, return_tensors="pt")["pixel_values"][0], expected)


def test_padding_is_zero_and_pictures_stand_at_the_top_left(small):
    given = [picture(75, 50), picture(40, 55, seed=1), picture(80, 40, seed=2)]
    inputs = small(given, return_tensors="pt")
    assert inputs["image_sizes"].tolist() == [[40, 60], [55, 40], [30, 60]]
    assert inputs["pixel_values"].shape == (3, 3, 55, 60) and inputs["pixel_values"].dtype == torch.float32
    for row, (height, width), one in zip(inputs["pixel_values"], inputs["image_sizes"].tolist(), given):
        assert torch.equal(row[:, :height, :width], small(one, return_tensors="pt")["pixel_values"][0])
        assert not row[:, height:].any() and not row[:, :, width:].any()


def test_arrays_and_tensors_are_pictures_too(small):
    given = picture(60, 40)
    expected = small(given, return_tensors="pt")["pixel_values"]
    array = np.asarray(given)
    for other in (array, torch.from_numpy(array.copy()), array.transpose(2, 0, 1)):
        assert torch.equal(small(other, return_tensors="pt")["pixel_values"], expected)
    with pytest.raises(ValueError, match="uint8"):
        small(array / 255)


def test_alpha_is_dropped_and_grey_repeated(small):
    transparent = picture(60, 40, "RGBA")
    opaque = Image.fromarray(np.asarray(transparent)[..., :3])
    assert np.array_equal(small(transparent)["pixel_values"], small(opaque)["pixel_values"])
    grey = picture(60, 40, "L")
    repeated = Image.fromarray(np.repeat(np.asarray(grey)[..., None], 3, axis=2))
    assert np.array_equal(small(grey)["pixel_values"], small(repeated)["pixel_values"])


def test_sixteen_bits_are_scaled(small):
    grey = np.asarray(picture(60, 40, "L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode.startswith("I")
    assert np.array_equal(small(deep)["pixel_values"], small(Image.fromarray(grey))["pixel_values"])


def test_exif_rotation_is_applied(small):
    upright, exif = picture(60, 40), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "png", exif=exif)
    inputs = small(Image.open(file))
    assert inputs["original_sizes"].tolist() == [[40, 60]]
    assert np.array_equal(inputs["pixel_values"], small(upright)["pixel_values"])


def test_too_many_pixels_are_refused_before_decoding(small):
    file = io.BytesIO()
    picture(60, 40).save(file, "png")
    cut_off = Image.open(io.BytesIO(file.getvalue()[:200]))
    with pytest.raises(ValueError, match="max_image_pixels"):
        small(cut_off, max_image_pixels=2399)


def test_a_line_of_pixels_is_refused():
    with pytest.raises(ValueError, match="5000 x 1"):
        VinVLImageProcessor()(picture(5000, 1))


def test_size_needs_both_edges():
    with pytest.raises(ValueError, match="longest_edge"):
        VinVLImageProcessor(size=600)(picture(60, 40))


def test_settings_survive_saving(small, tmp_path):
    small.save_pretrained(tmp_path)
    for backend in (None, "pil", "torchvision"):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert isinstance(loaded, VinVLImageProcessor) and loaded.to_dict() == small.to_dict()
    assert np.array_equal(loaded(picture(75, 50))["pixel_values"], small(picture(75, 50))["pixel_values"])


def test_files_are_opened_without_starting_other_programs(small, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started a program"))
    given = picture(60, 40)
    given.save(tmp_path / "good.png")
    given.save(tmp_path / "bad.jpg", "EPS")
    assert torch.equal(*(small([one], return_tensors="pt")["pixel_values"] for one in (given, tmp_path / "good.png")))
    with pytest.raises(UnidentifiedImageError):
        small(str(tmp_path / "bad.jpg"))
    os.mkfifo(tmp_path / "fifo.png")
    for wrong in (str(tmp_path / "fifo.png"), "https://x.example/y.png", base64.b64encode(b"%!PS-Adobe").decode()):
        with pytest.raises(ValueError, match="path of a file"):
            small(wrong)


def test_a_tiff_is_turned_once(small, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(60, 40).save(tmp_path / "a.tif", exif=exif)
    inputs = small(Image.open(tmp_path / "a.tif"))
    assert np.asarray(inputs["original_sizes"]).tolist() == [[60, 40]]
