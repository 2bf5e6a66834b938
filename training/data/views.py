"""The views of a picture: a global and a local crop, independent of each other, from one decode (docs/data.md).

Global 0.9 to 1.0 and local 0.5 to 1.0 of the area, aspect 3/4 to 4/3, no flip (captions name sides, boxes have
coordinates). Two further ones, which only terms of a run's own read, are distorted as SLIP and DeCLIP do: smaller
crops, colours, grey, blur, flip. All are a pure function of (seed, epoch, sample). What a picture is (EXIF rotation,
palettes, CMYK, 16 bits, alpha) is decided by the image processor's own `upright_rgb`.

Decoding dominates the time, so a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where the smallest crop still has
`REDUCED_MARGIN` pixels for each pixel of the result; what this changes is measured in the tests.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from pyramidclip_hf.image_processing_pyramidclip import PICTURE_FORMATS, PictureTooLarge, open_undecoded, upright_rgb
from training.data.distortion import distorted
from training.data.records import Box

DISTORTED = ("view1", "view2")
REDUCED_MARGIN = 1.25
# Before the bicubic filter, larger pictures are averaged by whole factors down to this many pixels for each pixel of
# the result.
_REDUCING_GAP = 2.0
ORIENTATION = 0x0112
# Of each view, what its random numbers begin with (2 is the choice of a caption), and which setting bounds its crop.
VIEW_NUMBERS = {"global": 0, "local": 1, "view1": 3, "view2": 4}
VIEW_AREAS = {"global": "global_area", "local": "local_area", "view1": "view_area", "view2": "view_area"}
_JPEGS = ("JPEG", "MPO")


class BadPicture(ValueError):
    """A picture that cannot be used; `reason` is `no-picture-format`, `picture-too-large` or `bad-picture`."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class ViewSettings:
    """What the views look like.

    Attributes:
        height: in pixels.
        width: in pixels.
        global_area: least and largest share of the picture's area (paper).
        local_area: least and largest share of the picture's area (paper).
        view_area: least and largest share of it in the two distorted views (SLIP).
        aspect: least and largest width over height of a crop.
        max_image_pixels: larger pictures are refused; None: PIL's limit.
    """

    height: int = 224
    width: int = 224
    global_area: Sequence[float] = (0.9, 1.0)
    local_area: Sequence[float] = (0.5, 1.0)
    view_area: Sequence[float] = (0.08, 1.0)
    aspect: Sequence[float] = (3 / 4, 4 / 3)
    max_image_pixels: int | None = 100_000_000

    def __post_init__(self) -> None:
        for name in ("global_area", "local_area", "view_area"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(
                    f"{name} is ({low}, {high}), expected shares of the picture with 0 < smallest <= largest <= 1"
                )
        if not 0 < self.aspect[0] <= self.aspect[1]:
            raise ValueError(f"aspect is {self.aspect}, expected 0 < smallest <= largest")
        if min(self.height, self.width) < 1:
            raise ValueError(f"views of {self.height} x {self.width} pixels, expected positive sizes")


def crop_box(
    width: float, height: float, area: Sequence[float], aspect: Sequence[float], rng: np.random.Generator
) -> Box:
    """One random crop of a `width` x `height` picture: x1, y1, x2, y2, floats in pixels.

    The share of the area is uniform; the aspect ratio is log-uniform among those of `aspect` with which that share
    fits into the picture (what drawing again until it fits would give). A picture too long for any of them gives the
    largest crop of the nearest aspect ratio.

    Args:
        width: of the picture in pixels.
        height: of the picture in pixels.
        area: least and largest share.
        aspect: least and largest width over height.
        rng: four numbers are drawn from it.
    """
    share = rng.uniform(area[0], area[1])
    low, high = max(aspect[0], share * width / height), min(aspect[1], width / height / share)
    where = rng.uniform(size=3)
    if low <= high:
        ratio = math.exp(math.log(low) + where[0] * (math.log(high) - math.log(low)))
        crop_width = min(math.sqrt(share * width * height * ratio), width)
        crop_height = min(math.sqrt(share * width * height / ratio), height)
    else:
        ratio = min(max(width / height, aspect[0]), aspect[1])
        crop_width, crop_height = min(width, height * ratio), min(height, width / ratio)
    x, y = where[1] * (width - crop_width), where[2] * (height - crop_height)
    return x, y, min(x + crop_width, width), min(y + crop_height, height)


def view_boxes(
    width: int,
    height: int,
    settings: ViewSettings,
    seed: int,
    epoch: int,
    sample: int,
    levels: Collection[str] = ("global", "local"),
) -> dict[str, Box]:
    """The boxes of the wanted views of one sample in one epoch, in pixels of the upright picture."""
    boxes = {}
    for level in levels:
        rng = view_generator(level, seed, epoch, sample)
        boxes[level] = crop_box(width, height, getattr(settings, VIEW_AREAS[level]), settings.aspect, rng)
    return boxes


def view_generator(level: str, seed: int, epoch: int, sample: int) -> np.random.Generator:
    """A generator for each view: asking for one of them does not change the other."""
    return np.random.default_rng((seed, epoch, sample, VIEW_NUMBERS[level]))


@contextmanager
def _read_by_pillow() -> Iterator[None]:
    """Makes one of what Pillow's readers raise on broken data, which is nearly anything: `BadPicture`."""
    try:
        yield
    except UnidentifiedImageError:
        raise
    except PictureTooLarge as error:
        raise BadPicture("picture-too-large", str(error)) from None
    except Exception as error:
        raise BadPicture("bad-picture", f"{type(error).__name__}: {error}") from None


def open_picture(data: bytes, max_image_pixels: int | None = None) -> Image.Image:
    """Opens encoded bytes without decoding them.

    Raises:
        BadPicture: the bytes are no picture, or it has more than `max_image_pixels` pixels.
    """
    try:
        with _read_by_pillow():
            return open_undecoded(data, max_image_pixels)
    except UnidentifiedImageError:
        found = f"{len(data)} bytes beginning {bytes(data[:8])!r} are no {', '.join(PICTURE_FORMATS)}"
        raise BadPicture("no-picture-format", found) from None


def decoded_picture(data: bytes, max_image_pixels: int | None = None) -> Image.Image:
    """The upright RGB picture of encoded bytes. Raises `BadPicture`."""
    picture = open_picture(data, max_image_pixels)
    with _read_by_pillow():
        return upright_rgb(picture)


def check_decodes(picture: Image.Image) -> None:
    """Reads an opened picture to its end, a JPEG at an eighth of its size: all data, few pixels.

    Raises:
        BadPicture: it is damaged.
    """
    with _read_by_pillow():
        picture.draft("RGB", (max(picture.width // 8, 1), max(picture.height // 8, 1)))
        picture.load()


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height of an opened picture after its EXIF rotation, in pixels."""
    try:
        turned = picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
    except Exception:  # as the image processor: broken metadata says nothing about the pixels
        turned = False
    return picture.size[::-1] if turned else picture.size


def make_views(
    data: bytes,
    settings: ViewSettings,
    seed: int,
    epoch: int,
    sample: int,
    levels: Collection[str] = ("global", "local"),
) -> dict[str, torch.Tensor]:
    """Decodes a picture once and cuts the wanted views.

    Args:
        data: the encoded bytes.
        settings: of the views.
        seed: with `epoch` and `sample`, all three not negative, decides the crops, which are rounded to whole pixels of
            the decoded picture.
        epoch: see `seed`.
        sample: see `seed`.
        levels: the wanted views.

    Returns:
        Level -> uint8 (3, height, width).

    Raises:
        BadPicture: the picture cannot be used.
    """
    picture = open_picture(data, settings.max_image_pixels)
    with _read_by_pillow():
        decoded, boxes, scale = _decode(picture, settings, seed, epoch, sample, levels)
    pixels = torch.from_numpy(decoded).permute(2, 0, 1)[None]
    views = {}
    for level, box in boxes.items():
        x1, y1, x2, y2 = box
        scaled = (x1 / scale, y1 / scale, x2 / scale, y2 / scale)
        views[level] = cut_view(pixels, scaled, settings.height, settings.width)
        if level in DISTORTED:
            rng = view_generator(level, seed, epoch, sample)
            rng.uniform(size=4)  # the crop's
            views[level] = distorted(views[level], rng)
    return views


def cut_view(pixels: torch.Tensor, box: Box, height: int, width: int) -> torch.Tensor:
    """A box of a picture, resized.

    Args:
        pixels: uint8 (1, 3, H, W).
        box: x1, y1, x2, y2, in pixels of it, rounded here.
        height: of the result.
        width: of the result.

    Returns:
        uint8 (3, height, width).
    """
    x1, y1, x2, y2 = box
    left, right = _whole(x1, x2, pixels.shape[3])
    top, bottom = _whole(y1, y2, pixels.shape[2])
    crop = pixels[:, :, top:bottom, left:right]
    # torch's filter for bytes equals PIL's to rounding and takes a third of its time.
    return torch.nn.functional.interpolate(crop, (height, width), mode="bicubic", antialias=True)[0]


def _decode(
    picture: Image.Image, settings: ViewSettings, seed: int, epoch: int, sample: int, levels: Collection[str]
) -> tuple[np.ndarray, dict[str, Box], int]:
    """The upright picture (H, W, 3), the boxes of the levels in its original pixels, how many of those make one now."""
    if picture.format not in _JPEGS:
        # Before anything asks for metadata: reading those of a PNG decodes it and hides its errors.
        picture.load()
    width, height = upright_size(picture)
    boxes = view_boxes(width, height, settings, seed, epoch, sample, levels)
    # The picture may be turned later: the shorter side of a crop has to do for the longer side of the view.
    least = min(min(x2 - x1, y2 - y1) for x1, y1, x2, y2 in boxes.values()) / max(settings.height, settings.width)
    scale = next((s for s in (8, 4, 2) if least >= s * REDUCED_MARGIN), 1) if picture.format in _JPEGS else 1
    if scale > 1:
        picture.draft(None, (picture.width // scale, picture.height // scale))
    picture.load()
    picture = upright_rgb(picture)
    factor = int(least / scale / _REDUCING_GAP)
    if factor > 1:
        picture = picture.reduce(factor)
        scale *= factor
    return np.array(picture), boxes, scale


def _whole(low: float, high: float, size: int) -> tuple[int, int]:
    low = min(round(low), size - 1)
    return low, max(min(round(high), size), low + 1)
