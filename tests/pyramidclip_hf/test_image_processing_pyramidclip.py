"""The image processor against the reference's pixels, against torchvision, and on pictures that are not plain RGB."""

import base64
import importlib.util
import io
import os
import resource
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image, ImageOps, UnidentifiedImageError
from transformers import AutoImageProcessor

from pyramidclip_hf import image_processing_pyramidclip
from pyramidclip_hf.image_processing_pyramidclip import (
    PictureTooLarge,
    PyramidCLIPImageProcessor,
    check_image_pixels,
    open_undecoded,
    upright_rgb,
)
from tests.rounding import rounding

GOLDEN = Path(__file__).resolve().parents[1] / "fixtures" / "preprocess_golden.npz"
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


@pytest.fixture(scope="module")
def processor():
    return PyramidCLIPImageProcessor()


@pytest.fixture(scope="module")
def small():
    return PyramidCLIPImageProcessor(size=32)


def photograph(height=90, width=120, seed=0):
    """Smooth coloured noise: (height, width, 3) uint8."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def pixels(processor, images, **kwargs):
    return processor(images, return_tensors="np", **kwargs)["pixel_values"]


def eight_bits(values):
    """Normalised pixels back to 0..255, (..., 3, H, W) -> (..., H, W, 3)."""
    return np.rint((np.moveaxis(values, -3, -1) * STD + MEAN) * 255).astype(int)


@pytest.mark.parametrize("name", np.load(GOLDEN).files)
def test_golden_pictures(processor, name):
    found = importlib.util.find_spec("skimage")
    if found is None:
        pytest.skip("needs the pictures in scikit-image's wheel")
    file, _, resized = name.partition("@")
    picture = Image.open(Path(found.origin).parent / "data" / (file if "." in file else f"{file}.png"))
    if resized:
        picture = picture.resize(tuple(map(int, resized.split("x"))), Image.Resampling.BILINEAR)
    result = pixels(processor, picture)
    assert result.shape == (1, 3, 224, 224)
    assert result.dtype == np.float32
    # The golden values are float16, which alone is 2e-4 off.
    assert np.abs(result[0, :, ::4, ::4] - np.load(GOLDEN)[name].astype(np.float32)).mean() <= 1e-3


def test_equals_torchvision_at_every_remainder_of_the_crop(small):
    transforms = pytest.importorskip("torchvision.transforms")
    reference = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN.tolist(), STD.tolist()),
        ]
    )
    shapes = [(32, 32 + extra) for extra in range(9)] + [(32 + extra, 32) for extra in range(9)] + [(90, 121), (20, 9)]
    for mode in ("RGB", "L"):
        for height, width in shapes:
            picture = Image.fromarray(photograph(height, width)).convert(mode)
            expected = reference(picture.convert("RGB")).numpy()
            np.testing.assert_allclose(pixels(small, picture)[0], expected, atol=1e-6)


def test_crop_larger_than_the_picture_is_padded_as_torchvision_does():
    functional = pytest.importorskip("torchvision.transforms.functional")
    processor = PyramidCLIPImageProcessor(do_resize=False, crop_size=40, do_normalize=False)
    for height, width in ((31, 50), (33, 44), (60, 37), (20, 21)):
        array = photograph(height, width)
        expected = functional.to_tensor(functional.center_crop(Image.fromarray(array), [40, 40]))
        np.testing.assert_allclose(pixels(processor, Image.fromarray(array))[0], expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_exif_rotation_is_applied_once(small, orientation):
    upright = photograph(48, 64)
    turned = {
        2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1), 7: upright[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    stored = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(turned)).save(stored, "PNG", exif=exif)
    picture = Image.open(stored)
    assert np.array_equal(np.asarray(upright_rgb(upright_rgb(picture))), upright)
    assert np.array_equal(pixels(small, picture), pixels(small, Image.fromarray(upright)))
    unconverted = pixels(small, picture, do_convert_rgb=False)
    assert np.array_equal(unconverted, pixels(small, Image.fromarray(upright)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_that_is_turned_is_turned_once(small, tmp_path, orientation):
    """Pillow turns a TIFF while it decodes, so whether it was decoded before must not matter."""
    upright = Image.fromarray(photograph(48, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for turn in (None, *Image.Transpose):
        stored = upright if turn is None else upright.transpose(turn)
        stored.save(tmp_path / "picture.tif", exif=exif)
        if np.array_equal(ImageOps.exif_transpose(Image.open(tmp_path / "picture.tif")), upright):
            break
    decoded = Image.open(tmp_path / "picture.tif")
    decoded.load()
    for form in (tmp_path / "picture.tif", Image.open(tmp_path / "picture.tif"), decoded):
        assert np.array_equal(pixels(small, form), pixels(small, upright))
    unconverted = pixels(small, Image.open(tmp_path / "picture.tif"), do_convert_rgb=False)
    assert np.array_equal(unconverted, pixels(small, upright))


def test_a_damaged_png_is_an_error_and_not_half_black(small, tmp_path):
    Image.fromarray(photograph()).save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    (tmp_path / "picture.png").write_bytes(data[: len(data) // 2])
    for form in (tmp_path / "picture.png", Image.open(tmp_path / "picture.png")):
        with pytest.raises(OSError, match="truncated"):
            small(form)


def test_more_paths_than_files_may_be_open(small, tmp_path):
    for number in range(100):
        Image.new("L", (9, 8), number).save(tmp_path / f"{number}.png")
    paths = [tmp_path / f"{number}.png" for number in range(100)]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        found = pixels(small, paths, do_normalize=False)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert np.rint(found[:, 0, 0, 0] * 255).tolist() == list(range(100))


@pytest.mark.parametrize("exif", [b"MM\x00\x2a\xff\xff\xff\xff", b"no TIFF header"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_leaves_the_picture_as_it_is(small, exif):
    array = photograph()
    stored = io.BytesIO()
    Image.fromarray(array).save(stored, "PNG", exif=b"Exif\x00\x00" + exif)
    assert np.array_equal(pixels(small, Image.open(stored)), pixels(small, Image.fromarray(array)))


def test_alpha_is_dropped_and_not_blended(small):
    array = photograph()
    expected = pixels(small, array)
    rng = np.random.default_rng(0)
    alpha = rng.integers(0, 256, (*array.shape[:2], 1), dtype=np.uint8)
    rgba = np.concatenate([array, alpha], axis=2)
    for image in (Image.fromarray(rgba), rgba, rgba.transpose(2, 0, 1), torch.from_numpy(rgba)):
        assert np.array_equal(pixels(small, image), expected)
    grey = Image.fromarray(array[..., 0])
    with_alpha = grey.convert("LA")
    with_alpha.putalpha(Image.fromarray(alpha[..., 0]))
    assert np.array_equal(pixels(small, with_alpha), pixels(small, grey))


def test_palettes_become_rgb_before_resizing(small):
    palette = Image.fromarray(photograph()).quantize(16)
    expected = pixels(small, palette.convert("RGB"))
    assert np.array_equal(pixels(small, palette), expected)
    stored = io.BytesIO()
    palette.save(stored, "PNG", transparency=3)
    assert np.array_equal(pixels(small, Image.open(stored)), expected)
    black_and_white = Image.fromarray(photograph()).convert("1")
    assert np.array_equal(pixels(small, black_and_white), pixels(small, black_and_white.convert("L")))


def test_sixteen_bits_are_scaled(small):
    grey = photograph()[..., 0]
    expected = pixels(small, grey)
    wide = grey.astype(np.uint16) * 257
    stored = io.BytesIO()
    Image.fromarray(wide).save(stored, "PNG")
    opened = Image.open(stored)
    assert opened.mode.startswith("I")
    images = [opened, wide, np.repeat(wide[..., None], 3, axis=2), Image.fromarray(wide.astype(np.int32))]
    for image in images:
        assert np.array_equal(pixels(small, image), expected)
    assert upright_rgb(Image.fromarray(np.array([[0, 128, 129, 65535]], np.uint16))).getpixel((2, 0)) == (1, 1, 1)
    assert (
        upright_rgb(Image.fromarray(grey.astype(np.float32) / 255)).tobytes()
        == upright_rgb(Image.fromarray(grey)).tobytes()
    )


def test_cmyk_and_other_colour_spaces():
    array = photograph()
    processor = PyramidCLIPImageProcessor(do_resize=False, do_center_crop=False)
    for mode, tolerance in (("CMYK", 1), ("YCbCr", 4), ("HSV", 8), ("LAB", 30)):
        converted = Image.fromarray(array).convert(mode)
        assert np.abs(eight_bits(pixels(processor, converted))[0] - array.astype(int)).max() <= tolerance, mode
    stored = io.BytesIO()
    Image.fromarray(array).convert("CMYK").save(stored, "JPEG", quality=98)
    decoded = eight_bits(pixels(processor, Image.open(stored)))[0]
    assert np.abs(decoded - array.astype(int)).mean() < 3


def test_arrays_tensors_and_pictures_are_the_same(small, tmp_path):
    array = photograph()
    expected = pixels(small, Image.fromarray(array))
    Image.fromarray(array).save(tmp_path / "picture.png")
    forms = [
        array, array.transpose(2, 0, 1), torch.tensor(array), torch.tensor(array).permute(2, 0, 1),
        array.astype(np.float32), array / 255, torch.from_numpy(array / 255).float(), array.astype(np.int64),
        tmp_path / "picture.png", str(tmp_path / "picture.png"),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(pixels(small, form), expected)
    assert np.array_equal(pixels(small, forms), np.repeat(expected, len(forms), axis=0))
    assert np.array_equal(pixels(small, np.stack([array, array])), np.repeat(expected, 2, axis=0))
    grey = array[..., 0]
    for form in (grey, grey[..., None], grey[None], [grey], torch.from_numpy(grey.copy())):
        assert np.array_equal(pixels(small, form), pixels(small, Image.fromarray(grey)))
    already_scaled = pixels(small, array / 255, do_rescale=False)
    np.testing.assert_allclose(already_scaled, expected, atol=1e-5)


def test_the_lookup_table_is_the_plain_arithmetic(small):
    array = photograph(32, 32)
    plain = (array.astype(np.float32) / np.float32(255) - MEAN) / STD
    # A quotient and a difference of at most 1, scaled by 1 / STD, and a last quotient.
    most = 2 * rounding(1 / STD.min(), 1) + rounding(plain, 1)
    np.testing.assert_allclose(pixels(small, array)[0], plain.transpose(2, 0, 1), atol=most)
    unnormalised = pixels(small, array, do_normalize=False)[0]
    np.testing.assert_allclose(unnormalised, array.transpose(2, 0, 1) / 255, atol=rounding(1, 1))
    unscaled = pixels(small, array, do_rescale=False, do_normalize=False)[0]
    assert np.array_equal(unscaled, array.transpose(2, 0, 1))


def test_return_types(small):
    images = [photograph(), photograph(seed=1)]
    as_tensor = small(images, return_tensors="pt")["pixel_values"]
    assert as_tensor.dtype == torch.float32
    assert as_tensor.shape == (2, 3, 32, 32)
    as_list = small(images)["pixel_values"]
    assert isinstance(as_list, list)
    assert np.array_equal(as_list[1], as_tensor[1].numpy())
    uncropped = small([photograph(), photograph(200)], do_center_crop=False)["pixel_values"]
    assert [one.shape for one in uncropped] == [(3, 32, 42), (3, 53, 32)]


def test_very_long_pictures_are_not_resized_whole(small, monkeypatch):
    array = photograph(20, 900)
    whole = np.asarray(Image.fromarray(array).resize((1440, 32), Image.Resampling.BICUBIC))[:, 704:736]
    made = []
    original = PyramidCLIPImageProcessor._pil_resize

    def recorded(image, target, *args):
        made.append(target)
        return original(image, target, *args)

    monkeypatch.setattr(PyramidCLIPImageProcessor, "_pil_resize", staticmethod(recorded))
    for image, expected in ((array, whole), (array.transpose(1, 0, 2), whole.transpose(1, 0, 2))):
        assert np.abs(eight_bits(pixels(small, image)[0]) - expected.astype(int)).max() <= 1
    assert made == [(32, 32), (32, 32)]
    assert pixels(PyramidCLIPImageProcessor(), np.zeros((1, 60000, 3), np.uint8)).shape == (1, 3, 224, 224)


def test_size_sets_the_crop_unless_it_is_given(tmp_path):
    assert dict(PyramidCLIPImageProcessor().crop_size) == {"height": 224, "width": 224}
    assert dict(PyramidCLIPImageProcessor(size=288).crop_size) == {"height": 288, "width": 288}
    assert dict(PyramidCLIPImageProcessor(size={"height": 20, "width": 30}).crop_size) == {"height": 20, "width": 30}
    both = PyramidCLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32)
    assert pixels(both, photograph()).shape[2:] == (32, 32)
    assert pixels(both, photograph(), size=48).shape[2:] == (48, 48)
    assert pixels(both, photograph(), size=48, crop_size=16).shape[2:] == (16, 16)
    both.save_pretrained(tmp_path)
    assert pixels(PyramidCLIPImageProcessor.from_pretrained(tmp_path, size=24), photograph()).shape[2:] == (24, 24)


def test_save_load_and_auto_class_for_both_backends(tmp_path):
    processor = PyramidCLIPImageProcessor(size=24, image_mean=[0.5, 0.4, 0.3], max_image_pixels=10_000)
    processor.save_pretrained(tmp_path)
    loads = [PyramidCLIPImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)]
    for backend in ("pil", "torchvision"):
        loads.append(AutoImageProcessor.from_pretrained(tmp_path, backend=backend))
    for loaded in loads:
        assert type(loaded) is PyramidCLIPImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert np.array_equal(pixels(loaded, photograph()), pixels(processor, photograph()))


def test_pictures_beyond_the_limit_are_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("L", (400, 300)).save(path)
    path.write_bytes(path.read_bytes()[:100])
    processor = PyramidCLIPImageProcessor(size=32, max_image_pixels=119_999)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 59_999)  # PIL refuses twice as many
    with pytest.raises(PictureTooLarge, match="more than the 119998 pixels that PIL opens, whatever max_image_pixels"):
        open_undecoded(path, 200_000)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="400 x 300 pixels, more than max_image_pixels=119999"):
        processor(path)
    with pytest.raises(OSError, match="truncated"):
        processor(path, max_image_pixels=120_000)
    check_image_pixels(Image.new("L", (400, 300)), None)


def test_formats_that_other_programs_decode_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30)).save(path, "EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started a program"))
    for source in (path, path.read_bytes()):
        with pytest.raises(UnidentifiedImageError):
            open_undecoded(source)
    with pytest.raises(UnidentifiedImageError):
        PyramidCLIPImageProcessor()(path)
    Image.new("RGB", (40, 30)).save(path)
    for source in (path, str(path), path.read_bytes(), memoryview(path.read_bytes())):
        assert open_undecoded(source, 1200).size == (40, 30)


def test_pictures_from_urls_and_base64_are_opened_as_files_are(small, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started a program"))
    Image.fromarray(photograph()).save(tmp_path / "good.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "bad.png", "EPS")
    good, bad = ((tmp_path / name).read_bytes() for name in ("good.png", "bad.png"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for form in (f"{url}/good.png", b64(good), f"data:image/png;base64,{b64(good)}"):
            assert np.array_equal(pixels(small, form), pixels(small, photograph()))
            with pytest.raises(PictureTooLarge):
                small(form, max_image_pixels=100)
        for form in (f"{url}/bad.png", b64(bad), f"data:image/png;base64,{b64(bad)}"):
            with pytest.raises(UnidentifiedImageError):
                small(form)
        with pytest.raises(OSError, match="404"):
            small(f"{url}/missing.png")
        monkeypatch.setattr(image_processing_pyramidclip, "_MAX_FETCHED_BYTES", 100)
        with pytest.raises(ValueError, match="sends more than 100 bytes"):
            small(f"{url}/good.png")
    finally:
        server.shutdown()
        server.server_close()
    os.mkfifo(tmp_path / "fifo.png")
    for wrong in (str(tmp_path / "fifo.png"), str(tmp_path / "missing.png"), "no picture"):
        with pytest.raises(ValueError, match=r"Expected a picture's path \(a file\), URL or base64, got '"):
            small(wrong)


def b64(data):
    return base64.b64encode(data).decode()


@pytest.mark.parametrize("empty", [[], (), np.zeros((0, 8, 8, 3), np.uint8), torch.zeros(0, 3, 8, 8)])
def test_an_empty_batch_is_refused(small, empty):
    with pytest.raises(ValueError, match="at least one picture"):
        small(empty)


@pytest.mark.parametrize(("low", "high"), [(-1, 1), (0, 300), (0, np.nan)])
def test_values_out_of_range_are_refused(small, low, high):
    with pytest.raises(ValueError, match="already normalised pictures need"):
        small(np.linspace(low, high, 192, dtype=np.float32).reshape(8, 8, 3))


def test_the_advice_for_normalised_pictures_works(small):
    array = photograph() // 2 + 64  # where the filter does not overshoot 0..255
    normalised = ((array / 255 - MEAN) / STD).astype(np.float32)
    with pytest.raises(ValueError, match="need do_rescale=False and do_normalize=False"):
        small(normalised)
    found = pixels(small, normalised, do_rescale=False, do_normalize=False)
    # Pixels are rounded to 8 bits after each of the two passes of the filter, these are not.
    assert np.abs(found - pixels(small, array)).max() <= 1.1 / 255 / STD.min()
    pixels(small, normalised, do_rescale=False, do_normalize=False, size={"height": 20, "width": 30})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_of_half_precision(small, dtype):
    tensor = torch.from_numpy(photograph() / 255).to(dtype)
    assert np.array_equal(pixels(small, tensor), pixels(small, tensor.float()))


def test_sizes_that_name_no_crop(small):
    size = {"max_height": 40, "max_width": 30}
    found = pixels(small, Image.fromarray(photograph()), size=size, do_center_crop=False)
    assert found.shape == (1, 3, 22, 30)  # 90 x 120 made to fit
    assert pixels(small, Image.fromarray(photograph()), size=size).shape == (1, 3, 32, 32)


def jpeg_of_scans(side, more):
    """A progressive JPEG whose last scan comes `more` times again."""
    file = io.BytesIO()
    Image.new("RGB", (side, side), (90, 120, 40)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + more) + data[-2:]


def test_a_small_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(tmp_path):
    """At 4 ns a pixel and scan, 42 kB of 1000 x 1000 pixels hold a worker for 12 s, and larger ones for minutes."""
    data = jpeg_of_scans(1000, 3000)
    assert len(data) < 50_000
    (tmp_path / "a.jpg").write_bytes(data)
    for source in (data, str(tmp_path / "a.jpg"), io.BytesIO(data)):
        began = time.perf_counter()
        with pytest.raises(PictureTooLarge, match="3010 scans of 1000 x 1000 pixels"):
            open_undecoded(source)
        assert time.perf_counter() - began < 1
    with pytest.raises(PictureTooLarge, match="110 scans"):  # the limit follows from that of the pixels
        open_undecoded(jpeg_of_scans(100, 100), 60_000)
    picture = open_undecoded(jpeg_of_scans(100, 100))
    assert np.asarray(picture).shape == (100, 100, 3)
    whole = open_undecoded(jpeg_of_scans(1000, 0), 1_000_000)  # ten scans, as any encoder makes them
    assert whole.info["progressive"] and np.asarray(whole).std() < 40
