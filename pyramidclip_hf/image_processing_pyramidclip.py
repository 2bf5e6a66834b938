# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures to `pixel_values`: upright RGB, bicubic resize of the shorter side, centre crop, CLIP's normalisation.

On plain RGB and grey pictures this equals the reference (torchvision's Resize, CenterCrop, ToTensor and Normalize on
PIL pictures). What the reference leaves to chance is fixed (docs/design.md, Names): the EXIF rotation is applied, alpha
is dropped, palettes become RGB before resizing, and 16 bits are scaled to 8. Only PIL and numpy are used.
"""

import base64
import binascii
import io
import os
import struct
import urllib.request
import warnings
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageFile, features
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
    SizeDict,
    infer_channel_dimension_format,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from .saved_folders_pyramidclip import LoadedFromFolder

# left, upper, right, lower, in pixels
Box: TypeAlias = tuple[float, float, float, float]

# Those that Pillow reads by itself: EPS, for one, would start another program.
# AVIF is one of them where Pillow was built with it, which its own wheels are from 11.3 on.
_READS_AVIF = "avif" in features.modules and features.check("avif")
PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", *(["AVIF"] if _READS_AVIF else []))
# Of pictures from elsewhere, more are not decoded unless somebody asks for it.
MAX_IMAGE_PIXELS = 100_000_000
# A JPEG may pass over its pixels again and again, in a few bytes each time. Encoders need ten passes or so; more than
# these over the largest picture that is allowed are not decoded.
_MAX_PASSES = 16
_LEAST_PASS_BYTES = 11
_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_HOLDERS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")
# At most so much is read from a URL, and so long it may keep silent, in seconds.
_MAX_FETCHED_BYTES = 256 << 20
_FETCH_TIMEOUT = 60
# Beyond this many times the area that the crop keeps, the rest of the resized picture is not computed.
_WASTE_LIMIT = 16


class PictureTooLarge(ValueError):
    """A picture of more pixels than are decoded."""


def open_undecoded(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO, max_image_pixels: int | None = None
) -> Image.Image:
    """Opens a picture of one of `PICTURE_FORMATS`, whoever made it, without decoding it.

    Args:
        source: path, encoded bytes, or an open file.
        max_image_pixels: of width times height; None: PIL's own limit, which warns long before it refuses.

    Raises:
        PIL.UnidentifiedImageError: none of these formats.
        PictureTooLarge: more than `max_image_pixels` or than PIL itself allows, or a JPEG of too many scans.
        OSError, SyntaxError, ValueError, TypeError, OverflowError: a damaged header.
    """
    with warnings.catch_warnings():
        if max_image_pixels is not None:  # which refuses where PIL's would only warn
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        file = io.BytesIO(source) if isinstance(source, bytes | bytearray | memoryview) else source
        try:
            picture = Image.open(file, formats=PICTURE_FORMATS)
        except Image.DecompressionBombError as error:
            raise PictureTooLarge(
                f"The picture has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels that PIL opens, whatever "
                "max_image_pixels is; make it smaller."
            ) from error
    try:
        check_image_pixels(picture, max_image_pixels)
        if picture.format in ("JPEG", "MPO"):
            _check_passes(picture, max_image_pixels or MAX_IMAGE_PIXELS)
    except PictureTooLarge:
        picture.close()
        raise
    return picture


def _check_passes(picture: ImageFile.ImageFile, max_image_pixels: int) -> None:
    """Refuses an opened JPEG whose scans would take longer than the largest picture of `max_image_pixels` does.

    Raises:
        PictureTooLarge: with the number of scans.
    """
    file, pixels, most = picture.fp, picture.width * picture.height, _MAX_PASSES * max_image_pixels
    if file is None or pixels * _length(file) <= most * _LEAST_PASS_BYTES:
        return
    before, scans = file.tell(), 0
    file.seek(0)
    while block := file.read(1 << 20):
        values = np.frombuffer(block, np.uint8)
        scans += int(np.count_nonzero((values[:-1] == 0xFF) & (values[1:] == 0xDA)))
        if len(block) == 1 << 20:
            file.seek(-1, io.SEEK_CUR)  # a mark may lie across the edge
    file.seek(before)
    if scans * pixels > most:
        raise PictureTooLarge(
            f"The JPEG has {scans} scans of {picture.width} x {picture.height} pixels, more than {_MAX_PASSES} of "
            f"max_image_pixels={max_image_pixels}; save it anew or raise the limit."
        )


def _length(file: Any) -> int:
    """Bytes of an open file, which stays where it is."""
    before = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(before)
    return int(end)


def _encoded(source: str | os.PathLike[str]) -> str | os.PathLike[str] | bytes:
    """Where the encoded picture is that a path names, or a URL or base64 stands for.

    Raises:
        ValueError: none of these, or more bytes than are read.
        OSError: the URL does not answer, or with an error.
    """
    if not isinstance(source, str) or os.path.isfile(source):
        return source
    if source.startswith(("http://", "https://")):
        request = urllib.request.Request(source, headers={"User-Agent": "pyramidclip_hf"})
        with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT) as response:
            data = response.read(_MAX_FETCHED_BYTES + 1)
        if len(data) > _MAX_FETCHED_BYTES:
            raise ValueError(f"{source} sends more than {_MAX_FETCHED_BYTES} bytes, expected a picture.")
        return data
    try:
        return base64.b64decode(source.partition(",")[2] if source.startswith("data:image/") else source, validate=True)
    except (binascii.Error, ValueError):
        shown = source if len(source) < 200 else f"{source[:200]}..."
        raise ValueError(f"Expected a picture's path (a file), URL or base64, got {shown!r}.") from None


class _Unopened(Image.Image):
    """Stands for a picture behind a path or URL until its turn comes: a batch may name more files than can be open."""

    def __init__(self, source: str | os.PathLike[str]):
        super().__init__()
        self.source = source

    def opened(self, max_image_pixels: int | None) -> Image.Image:
        """The picture, not yet decoded; raises as `_encoded` and `open_undecoded`."""
        return open_undecoded(_encoded(self.source), max_image_pixels)


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture with its EXIF rotation applied, as 8-bit RGB without alpha.

    16-bit grey is scaled linearly to 8 bits; mode "I" counts as 16-bit if any value is above 255; mode "F" may hold
    0..1 or 0..255.

    Raises:
        ValueError: values outside those ranges.
        OSError, SyntaxError, ...: what Pillow raises where the picture is not decoded yet and damaged.
    """
    image = _upright(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        if values.dtype == np.int32 and values.size and 255 < values.max() <= 65535 and values.min() >= 0:
            values = values.astype(np.uint16)
        return Image.fromarray(_eight_bit(values)).convert("RGB")
    return image.convert("RGB")


def check_image_pixels(image: Image.Image, max_image_pixels: int | None) -> None:
    """Refuses an opened, not yet decoded picture of more than `max_image_pixels` pixels (None: no limit here).

    Raises:
        PictureTooLarge: with the picture's size.
    """
    if max_image_pixels is not None and image.width * image.height > max_image_pixels:
        raise PictureTooLarge(
            f"The picture has {image.width} x {image.height} pixels, more than max_image_pixels={max_image_pixels}; "
            "make it smaller or raise the limit."
        )


def _upright(image: Image.Image) -> Image.Image:
    # Pixels before metadata: Pillow turns a TIFF itself while it decodes, and asking a damaged PNG for its EXIF decodes
    # it, after which what is missing is black.
    image.load()
    try:
        turn = _UPRIGHT.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error, OSError):
        # Broken metadata says nothing about the pixels.
        turn = None
    if turn is None:
        return image
    image = image.transpose(turn)
    for holder in _ORIENTATION_HOLDERS:
        # Left in place, it would turn the picture again.
        image.info.pop(holder, None)
    return image


def _eight_bit(array: np.ndarray) -> np.ndarray:
    """uint8 values of the same shape: uint16 by scaling, floats from 0..1 or 0..255 by rounding.

    Raises:
        ValueError: values outside those ranges, or not finite.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= 255):
        raise ValueError(
            f"Expected a picture with {array.dtype} values in 0..255 (floats also 0..1, uint16 0..65535), got "
            f"{low} to {high}; already normalised pictures need do_rescale=False and do_normalize=False."
        )
    if array.dtype.kind == "f":
        array = np.rint(array * 255 if high <= 1 else array)
    return array.astype(np.uint8)


def _crop_for_size(size: Any) -> dict[str, int] | None:
    """The crop that a resize to `size` asks for: the square of the shortest edge, or the whole (height, width).

    None for sizes that name neither, such as `max_height` and `max_width`.
    """
    size = dict(size) if isinstance(size, SizeDict) else get_size_dict(size, default_to_square=False)
    edge = size.get("shortest_edge")
    height, width = size.get("height") or edge, size.get("width") or edge
    return {"height": height, "width": width} if height and width else None


class PyramidCLIPImageProcessorKwargs(ImagesKwargs, total=False):
    """`max_image_pixels`: pictures with more pixels are refused before they are decoded (None: PIL's own limit)."""

    max_image_pixels: int | None


class PyramidCLIPImageProcessor(LoadedFromFolder, PilBackend):
    """Pictures -> `pixel_values` (B, 3, height, width) float32, exactly the reference's on plain RGB and grey pictures.

    Takes PIL pictures, numpy arrays and tensors ((H, W), (H, W, C) or (C, H, W); uint8, uint16, or floats in 0..1 or
    0..255), paths and URLs, one or a list. One class serves both of transformers' backends: it works without
    torchvision, and gives the same pixels with it. A `size` without a `crop_size` sets both: `size=288` gives 288 px.

    Raises:
        ValueError: an empty batch, values out of range, a picture beyond `max_image_pixels`.
    """

    valid_kwargs = PyramidCLIPImageProcessorKwargs
    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"shortest_edge": 224}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_image_pixels = None

    def __init__(self, **kwargs: Unpack[PyramidCLIPImageProcessorKwargs]):
        super().__init__(**self._with_crop(kwargs))

    @staticmethod
    def _with_crop(kwargs: Mapping[str, Any]) -> dict[str, Any]:
        crop = None
        if kwargs.get("size") is not None and kwargs.get("crop_size") is None:
            crop = _crop_for_size(kwargs["size"])
        return dict(kwargs) if crop is None else {**kwargs, "crop_size": crop}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class; `size=` without `crop_size=` overrides both."""
        return super().from_dict(image_processor_dict, **cls._with_crop(kwargs))

    def preprocess(
        self, images: ImageInput, *args: Any, **kwargs: Unpack[PyramidCLIPImageProcessorKwargs]
    ) -> BatchFeature:
        """One picture or a list of them -> BatchFeature with `pixel_values`; see the class for the inputs."""
        return super().preprocess(images, *args, **self._with_crop(kwargs))

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths, URLs and base64 become pictures that are opened when they are processed, one at a time."""
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(one) for one in source]
        if isinstance(source, (str, os.PathLike)):
            return _Unopened(source)
        return super().fetch_images(source)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> Any:
        if hasattr(images, "__len__") and len(images) == 0:
            raise ValueError("Expected at least one picture, got an empty batch.")
        images = self.fetch_images(images)
        if isinstance(images, list):
            images = [one[None] if getattr(one, "ndim", 3) == 2 else one for one in images]
        elif getattr(images, "ndim", 3) == 2:
            images = images[None]
        return super()._prepare_images_structure(images, expected_ndims)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One picture as (C, H, W); uint8 RGB unless `do_convert_rgb` or `do_rescale` is off."""
        if isinstance(image, _Unopened):
            with image.opened(kwargs.get("max_image_pixels")) as picture:
                return self.process_image(picture, do_convert_rgb, input_data_format, **kwargs)
        if isinstance(image, Image.Image):
            check_image_pixels(image, kwargs.get("max_image_pixels"))
            if do_convert_rgb:
                return np.moveaxis(np.asarray(upright_rgb(image)), -1, 0)
            return super().process_image(_upright(image), do_convert_rgb=False, **kwargs)
        if not isinstance(image, np.ndarray):
            image = image.detach().cpu()
            if image.is_floating_point() and image.element_size() < 4:  # numpy lacks bfloat16
                image = image.float()
            image = image.numpy()
        if do_convert_rgb:
            if input_data_format is None:
                input_data_format = infer_channel_dimension_format(image, num_channels=(1, 3, 4))
            if input_data_format == ChannelDimension.LAST:
                image, input_data_format = np.moveaxis(image, -1, 0), ChannelDimension.FIRST
            image = np.repeat(image, 3, axis=0) if len(image) == 1 else image[:3]
        if kwargs.get("do_rescale"):
            image = _eight_bit(image)
        return super().process_image(image, do_convert_rgb=False, input_data_format=input_data_format, **kwargs)

    def resize(self, image: np.ndarray, size: SizeDict, resample: Any = None, *args: Any, **kwargs: Any) -> np.ndarray:
        """Resizes (C, H, W); the sizes are torchvision's, the filter is PIL's.

        Floats outside of 0..1, which are no pixels of PIL's, are resized as they are.
        """
        target = self._target_size((image.shape[-2], image.shape[-1]), size)
        if target is not None and isinstance(resample, int) and _is_normalised(image):
            planes = (Image.fromarray(plane.astype(np.float32)) for plane in image)
            return np.stack([np.asarray(plane.resize(target[::-1], resample)) for plane in planes])
        if target is None or image.dtype != np.uint8 or len(image) != 3 or not isinstance(resample, int):
            return super().resize(image, size, resample, *args, **kwargs)
        return self._pil_resize(image, target, resample)

    @staticmethod
    def _target_size(shape: tuple[int, int], size: SizeDict) -> tuple[int, int] | None:
        """(height, width) after resizing, for the two kinds of size that CLIP knows."""
        if size.height and size.width:
            return size.height, size.width
        if not size.shortest_edge or size.longest_edge:
            return None
        height, width = shape
        long = int(size.shortest_edge * max(shape) / min(shape))
        return (size.shortest_edge, long) if height <= width else (long, size.shortest_edge)

    @staticmethod
    def _pil_resize(image: np.ndarray, target: tuple[int, int], resample: int, box: Box | None = None) -> np.ndarray:
        picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(image, 0, -1)))
        return np.moveaxis(np.asarray(picture.resize(target[::-1], resample, box=box)), -1, 0)

    def center_crop(  # type: ignore[override]  # a `SizeDict`, as in transformers' own backends
        self, image: np.ndarray, size: SizeDict, **kwargs: Any
    ) -> np.ndarray:
        """Crops (C, H, W) around the centre as torchvision does; what is too small is padded with 0 first."""
        if size.height is None or size.width is None:
            raise ValueError(f"crop_size needs height and width, got {dict(size)}.")
        missing = [max(0, wanted - have) for wanted, have in zip((size.height, size.width), image.shape[-2:])]
        if any(missing):
            image = np.pad(image, [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing)])
        top, left = self._crop_start((image.shape[-2], image.shape[-1]), (size.height, size.width))
        return image[:, top : top + size.height, left : left + size.width]

    @staticmethod
    def _crop_start(shape: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
        # Rounded half to even; transformers' own crop floors, which differs when (shape - crop) % 4 == 3.
        return round((shape[0] - crop[0]) / 2), round((shape[1] - crop[1]) / 2)

    def _resized_centre(
        self, image: np.ndarray, size: SizeDict, crop_size: SizeDict, resample: PILImageResampling | None
    ) -> np.ndarray:
        """`center_crop(resize(image))` for very long pictures, without computing what the crop throws away."""
        target = self._target_size((image.shape[-2], image.shape[-1]), size)
        crop = (crop_size.height or 0, crop_size.width or 0)
        if (
            target is None
            or 0 in crop
            or image.dtype != np.uint8
            or len(image) != 3
            or not isinstance(resample, int)
            or any(have < wanted for have, wanted in zip(target, crop))
            or target[0] * target[1] <= _WASTE_LIMIT * crop[0] * crop[1]
        ):
            return self.center_crop(self.resize(image, size, resample), crop_size)
        scale_y, scale_x = (have / made for have, made in zip(image.shape[-2:], target))
        top, left = self._crop_start(target, crop)
        box = (left * scale_x, top * scale_y, (left + crop[1]) * scale_x, (top + crop[0]) * scale_y)
        return self._pil_resize(image, crop, resample, box)

    def _preprocess(
        self,
        images: list[np.ndarray],
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | None,
        do_center_crop: bool,
        crop_size: SizeDict,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool | None,
        pad_size: Any,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        def scaled(values: np.ndarray) -> np.ndarray:
            if do_rescale:
                values = self.rescale(values, rescale_factor)
            return self.normalize(values, image_mean, image_std) if do_normalize else values

        prepared = []
        for image in images:
            if do_resize and do_center_crop:
                image = self._resized_centre(image, size, crop_size, resample)
            elif do_resize:
                image = self.resize(image, size, resample)
            elif do_center_crop:
                image = self.center_crop(image, crop_size)
            prepared.append(_by_table(image, scaled) if image.dtype == np.uint8 and do_rescale else scaled(image))
        pictures: Any = self.pad(prepared, pad_size=pad_size) if do_pad else prepared
        if return_tensors is not None and len({picture.shape for picture in pictures}) == 1:
            pictures = np.stack(pictures)
        return BatchFeature(data={"pixel_values": pictures}, tensor_type=return_tensors)


def _is_normalised(image: np.ndarray) -> bool:
    """Whether an array holds neither 0..1 nor whole numbers of 0..255."""
    if image.dtype.kind != "f" or not image.size:
        return False
    low, high = image.min(), image.max()
    return bool(low < 0 or high > 255 or (high > 1 and not np.array_equal(image, np.rint(image))))


def _by_table(image: np.ndarray, scaled: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`scaled(image)` of uint8 (C, H, W), sooner.

    Each channel has 256 values: computing those and looking them up gives the same floats.
    """
    table = scaled(np.broadcast_to(np.arange(256, dtype=np.uint8), (len(image), 1, 256)))
    result = np.empty(image.shape, dtype=table.dtype)
    for channel, (values, levels) in enumerate(zip(image, table)):
        np.take(levels[0], values, out=result[channel])
    return result


__all__ = ["PyramidCLIPImageProcessor"]
