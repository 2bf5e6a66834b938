"""Views: the law of the crops, the pixels against a straightforward PIL form, pictures of every kind, bad ones."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from PIL.JpegImagePlugin import JpegImageFile
from scipy import stats

from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from training.data import views
from training.data.views import (
    BadPicture,
    ViewSettings,
    check_decodes,
    crop_box,
    make_views,
    open_picture,
    upright_size,
    view_boxes,
)

SETTINGS = ViewSettings(64, 64)


def picture(width, height, mode="RGB"):
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 120 * np.sin(x / a + y / b) for a, b in ((9, 30), (25, 11), (40, 50))]
    return Image.fromarray(np.stack(waves, -1).astype(np.uint8)).convert(mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(("width", "height"), [(100, 100), (640, 480), (300, 400)])
@pytest.mark.parametrize("area", [(0.9, 1.0), (0.5, 1.0), (0.3, 0.3)])
def test_crops_follow_their_law(width, height, area):
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(width, height, area, (3 / 4, 4 / 3), rng) for _ in range(2000)])
    x1, y1, x2, y2 = boxes.T
    share, aspect = (x2 - x1) * (y2 - y1) / (width * height), (x2 - x1) / (y2 - y1)
    assert (boxes >= 0).all() and (x2 <= width).all() and (y2 <= height).all()
    assert share.min() >= area[0] - 1e-9 and share.max() <= area[1] + 1e-9
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    if area[0] < area[1]:
        uniform = stats.uniform(area[0], area[1] - area[0])
        assert stats.kstest(share, uniform.cdf).pvalue > 0.001
    free = width - (x2 - x1)
    assert stats.kstest((x1 / free)[free > 1], "uniform").pvalue > 0.001


def test_aspect_is_that_of_drawing_until_it_fits():
    rng = np.random.default_rng(1)
    ours = [
        (b[2] - b[0]) / (b[3] - b[1]) for b in (crop_box(640, 480, (0.8, 0.8), (0.75, 4 / 3), rng) for _ in range(2000))
    ]
    drawn = np.exp(rng.uniform(np.log(0.75), np.log(4 / 3), 20000))
    fits = (np.sqrt(0.8 * 640 * 480 * drawn) <= 640) & (np.sqrt(0.8 * 640 * 480 / drawn) <= 480)
    assert 0.1 < fits.mean() < 0.9
    assert stats.ks_2samp(ours, drawn[fits]).pvalue > 0.001


def test_long_pictures_give_the_largest_allowed_crop():
    for size, expected in (((900, 100), (400 / 3, 100)), ((100, 900), (100, 400 / 3))):
        x1, y1, x2, y2 = crop_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
        assert (x2 - x1, y2 - y1) == pytest.approx(expected)


def test_boxes_are_a_pure_function_and_views_independent():
    boxes = view_boxes(640, 480, SETTINGS, 1, 2, 3)
    assert boxes == view_boxes(640, 480, SETTINGS, 1, 2, 3)
    for other in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        assert boxes != view_boxes(640, 480, SETTINGS, *other)
    # The same law for both levels gives unrelated crops.
    same = ViewSettings(64, 64, (0.5, 1.0), (0.5, 1.0))
    pairs = [view_boxes(100, 100, same, 0, 0, n) for n in range(500)]
    corners = np.array([[p["global"][0], p["local"][0]] for p in pairs])
    assert abs(np.corrcoef(corners.T)[0, 1]) < 0.15
    data = encoded(picture(120, 90))
    both = make_views(data, SETTINGS, 1, 2, 3)
    assert (make_views(data, SETTINGS, 1, 2, 3, levels=("local",))["local"] == both["local"]).all()
    assert set(make_views(data, SETTINGS, 1, 2, 3, levels=("global",))) == {"global"}


def straightforward(image, box, scale, settings=SETTINGS, filter=Image.BICUBIC):
    """Decodes everything, crops (to whole pixels of the `scale` times reduced picture), resizes with PIL."""
    x1, y1, x2, y2 = (round(v / scale) * scale for v in box)
    crop = upright_rgb(image).crop((x1, y1, min(x2, image.width), min(y2, image.height)))
    return np.asarray(crop.resize((settings.width, settings.height), filter), float)


def difference(view, expected):
    return np.abs(view.permute(1, 2, 0).numpy() - expected)


def test_pixels_equal_the_straightforward_form():
    image = picture(150, 110)
    for sample in range(5):
        found = make_views(encoded(image), SETTINGS, 0, 0, sample)
        for level, box in view_boxes(150, 110, SETTINGS, 0, 0, sample).items():
            assert found[level].shape == (3, 64, 64)
            assert difference(found[level], straightforward(image, box, 1)).max() <= 1  # rounding


def natural_pictures(side):
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "hubble_deep_field"):
        yield Image.fromarray(getattr(data, name)()).resize((side, side), Image.LANCZOS)


@pytest.mark.parametrize(
    ("side", "kind", "scale"),
    [(90, "JPEG", 1), (128, "JPEG", 1), (221, "JPEG", 2), (421, "JPEG", 4), (900, "JPEG", 8), (900, "PNG", 6)],
)
def test_reduced_decoding_changes_less_than_the_choice_of_filter(side, kind, scale, monkeypatch):
    """Mean difference to full decoding and PIL's filter: at most 1.5 of 255, and less than bilinear from bicubic."""
    scales, draft = [], JpegImageFile.draft

    def watched(self, mode, size):
        scales.append(self.width // size[0])
        return draft(self, mode, size)

    monkeypatch.setattr(JpegImageFile, "draft", watched)
    settings = ViewSettings(64, 64, (0.95, 0.95), (0.95, 0.95))
    for source in natural_pictures(side):
        data = encoded(source, kind, quality=92)
        for level, view in make_views(data, settings, 0, 0, 1).items():
            box = view_boxes(side, side, settings, 0, 0, 1)[level]
            full = Image.open(io.BytesIO(data))
            expected = straightforward(full, box, scale, settings)
            bilinear = straightforward(full, box, scale, settings, Image.BILINEAR)
            found = difference(view, expected).mean()
            assert found < min(1.5, np.abs(bilinear - expected).mean()) if scale > 1 else found < 0.1
    assert set(scales) == ({scale} if scale > 1 and kind == "JPEG" else set())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(200, 120)
    data = encoded(image, "JPEG", quality=95, exif=exif)
    opened = Image.open(io.BytesIO(data))
    upright = upright_rgb(Image.open(io.BytesIO(data)))
    assert upright_size(opened) == upright.size
    settings = ViewSettings(96, 96)  # no reduced decoding
    found = make_views(data, settings, 0, 0, 4)
    for level, box in view_boxes(*upright.size, settings, 0, 0, 4).items():
        assert difference(found[level], straightforward(upright, box, 1, settings)).max() <= 2


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (picture(90, 70, "L"), "PNG"),
        (picture(90, 70, "CMYK"), "JPEG"),
        (picture(90, 70, "P"), "PNG"),
        (picture(90, 70, "1"), "PNG"),
        (picture(90, 70, "LA"), "PNG"),
        (picture(90, 70, "RGBA"), "WEBP"),
        (Image.fromarray(np.linspace(0, 65535, 6300).reshape(70, 90).astype(np.uint16)), "PNG"),
        (picture(90, 70, "P"), "GIF"),
    ],
)
def test_modes_are_read_as_the_image_processor_does(image, kind):
    data = encoded(image, kind)
    upright = upright_rgb(Image.open(io.BytesIO(data)))
    found = make_views(data, SETTINGS, 0, 0, 1)
    for level, box in view_boxes(90, 70, SETTINGS, 0, 0, 1).items():
        assert difference(found[level], straightforward(upright, box, 1)).max() <= 2


def test_bad_pictures_have_a_reason():
    jpeg = encoded(picture(100, 100), "JPEG")
    flipped = bytearray(encoded(picture(100, 100)))
    flipped[200:230] = bytes(30)
    cases = {
        b"": "no-picture-format",
        b"<html>not found</html>": "no-picture-format",
        jpeg[: len(jpeg) // 2]: "bad-picture",
        bytes(flipped): "bad-picture",
    }
    for data, reason in cases.items():
        with pytest.raises(BadPicture) as caught:
            make_views(data, SETTINGS, 0, 0, 0)
        assert caught.value.reason == reason, data[:20]


def png_header(width, height):
    """A PNG that announces a size and has no pixels to decode."""

    def chunk(name, body):
        return len(body).to_bytes(4) + name + body + zlib.crc32(name + body).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("size", [(2000, 2000), (12000, 9000), (60000, 60000)])
def test_large_pictures_are_refused_before_decoding(size, monkeypatch, recwarn):
    def never(*args):
        raise AssertionError("decoded")

    monkeypatch.setattr(views, "upright_rgb", never)
    with pytest.raises(BadPicture) as caught:
        make_views(png_header(*size), ViewSettings(64, 64, max_image_pixels=1_000_000), 0, 0, 0)
    assert caught.value.reason == "picture-too-large" and not recwarn
    if size == (12000, 9000):  # PIL alone only warns about this one
        assert open_picture(png_header(*size)).size == size


def test_a_small_png_with_much_text_is_not_called_too_large():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * (3 << 20), zip=True)
    with pytest.raises(BadPicture) as caught:
        open_picture(encoded(picture(8, 8), "PNG", pnginfo=info), 10**8)
    assert caught.value.reason == "bad-picture" and "MAX_TEXT_CHUNK" in str(caught.value)


@pytest.mark.parametrize("size", [(1, 1), (7, 100), (100, 7)])
def test_a_jpeg_of_a_few_pixels_is_a_picture(size):
    check_decodes(open_picture(encoded(picture(*size), "JPEG")))


def test_settings_are_checked():
    for wrong in ({"global_area": (0.0, 1.0)}, {"local_area": (0.9, 0.5)}, {"aspect": (2, 1)}, {"height": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)) if "height" not in wrong else "positive"):
            ViewSettings(**wrong)
