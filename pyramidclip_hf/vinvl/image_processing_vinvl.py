# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures -> what the VinVL detector reads: short side 600, BGR in 0..255 less the mean, padded to one size."""

import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs, Unpack

# Those that Pillow reads by itself: EPS, for one, would start another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


class VinVLImageProcessorKwargs(ImagesKwargs, total=False):
    """`max_image_pixels`: larger pictures are refused before they are decoded."""

    max_image_pixels: int | None


class VinVLImageProcessor(PilBackend):
    r"""Prepares pictures for [`VinVLForObjectAttributeDetection`], as the published detector does it.

    `processor(images)` takes one picture or a list: PIL images, paths of files, or uint8 arrays or tensors, grey or
    RGB, of shape (H, W), (H, W, 3) or (3, H, W). EXIF rotation is applied, alpha dropped, 16-bit grey scaled to 8
    bits. It returns

    - `pixel_values` (B, 3, H, W) float32, BGR, `(value in 0..255 - image_mean) / image_std`; smaller pictures stand at
      the top left, the rest is 0;
    - `image_sizes` (B, 2) int64, height and width of each picture within `pixel_values`;
    - `original_sizes` (B, 2) int64, height and width of the pictures as given (after the EXIF rotation).

    Args:
        size: `shortest_edge` and `longest_edge` in pixels; see [`resized_size`].
        image_mean: three numbers in BGR order, on the scale 0..255.
        image_std: three numbers in BGR order, on the scale 0..255.
        max_image_pixels: larger pictures raise ValueError.
        **kwargs: `do_resize`, `do_normalize`, `resample`: as in every image processor.
    """

    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 600, "longest_edge": 1000}
    image_mean = (103.530, 116.280, 123.675)
    image_std = (1.0, 1.0, 1.0)
    do_resize = True
    do_normalize = True
    rescale_factor = None  # type: ignore[assignment]  # values stay in 0..255
    default_to_square = False
    max_image_pixels = 178_956_970
    model_input_names = ["pixel_values", "image_sizes", "original_sizes"]
    valid_kwargs = VinVLImageProcessorKwargs

    def __init__(self, **kwargs: Unpack[VinVLImageProcessorKwargs]):
        super().__init__(**kwargs)  # type: ignore[misc]  # the base class keeps any keyword

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Paths become pictures that are opened and not yet decoded.

        Raises:
            ValueError: text that is no file's path, such as a URL.
            PIL.UnidentifiedImageError: none of the formats that are read here.
        """
        source = image_url_or_urls
        if isinstance(source, (list, tuple)):
            return [self.fetch_images(one) for one in source]
        if not isinstance(source, (str, os.PathLike)):
            return super().fetch_images(source)
        if not os.path.isfile(source):
            raise ValueError(f"Expected a picture or the path of a file, got {str(source)[:200]!r}: fetch it first.")
        return Image.open(source, formats=[name for name in _FORMATS if name in _readable()])

    def process_image(  # type: ignore[override]  # resizing needs pictures, not arrays
        self, image: Any, max_image_pixels: int | None = None, **kwargs: Any
    ) -> Image.Image:
        """Any accepted picture -> RGB PIL image, upright."""
        if not isinstance(image, Image.Image):
            image = _image_from_array(np.asarray(image))
        pixels = image.width * image.height
        if max_image_pixels is not None and pixels > max_image_pixels:
            raise ValueError(
                f"The picture has {image.width} x {image.height} = {pixels} pixels, more than max_image_pixels = "
                f"{max_image_pixels}. Raise max_image_pixels if the source is trusted."
            )
        # Pixels before metadata: a TIFF turns itself while it is decoded, and would be turned twice.
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # PIL clips 16-bit grey at 255 instead of scaling it.
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        return image.convert("RGB")

    def _preprocess(  # type: ignore[override]  # see process_image; transformers passes all by keyword
        self,
        images: list[Image.Image],
        size: SizeDict,
        resample: int,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        do_resize: bool,
        do_normalize: bool,
        return_tensors: str | None,
        **kwargs: Any,
    ) -> BatchFeature:
        shortest, longest = size.shortest_edge, size.longest_edge
        if do_resize and not (shortest and longest):
            raise ValueError(f"size must give shortest_edge and longest_edge, got {size}.")
        prepared, original_sizes = [], []
        for image in images:
            original_sizes.append((image.height, image.width))
            if do_resize and shortest and longest:
                target = resized_size(image.height, image.width, shortest, longest)
                if target != (image.height, image.width):
                    image = image.resize(target[::-1], resample)
            values: np.ndarray = np.asarray(image)[..., ::-1].astype(np.float32)
            if do_normalize:
                values = (values - np.asarray(image_mean, np.float32)) / np.asarray(image_std, np.float32)
            prepared.append(values)
        image_sizes = np.array([values.shape[:2] for values in prepared])
        pixel_values = np.zeros((len(prepared), 3, *image_sizes.max(axis=0)), dtype=np.float32)
        for row, values in zip(pixel_values, prepared):
            row[:, : values.shape[0], : values.shape[1]] = values.transpose(2, 0, 1)
        data = {
            "pixel_values": pixel_values,
            "image_sizes": image_sizes,
            "original_sizes": np.array(original_sizes),
        }
        return BatchFeature(data=data, tensor_type=return_tensors)


def resized_size(height: int, width: int, shortest_edge: int, longest_edge: int) -> tuple[int, int]:
    """Height and width after resizing, as the detector rounds: 1920 x 1080 gives 999 x 562.

    The short side becomes `shortest_edge`, or less where the long side would pass `longest_edge`, which is cut off.

    Raises:
        ValueError: a picture so narrow that its short side would vanish.
    """
    short, long = sorted((height, width))
    if long / short * shortest_edge > longest_edge:
        shortest_edge = round(longest_edge * short / long)
    if shortest_edge < 1:
        raise ValueError(
            f"A picture of {width} x {height} (width x height) cannot be resized to a long side of {longest_edge}: its "
            "short side would be less than a pixel. Leave it out or crop it."
        )
    if short == shortest_edge:
        return height, width
    long = int(shortest_edge * long / short)
    return (long, shortest_edge) if height > width else (shortest_edge, long)


def _readable() -> dict[str, Any]:
    """The formats of this Pillow; AVIF is not in each."""
    Image.init()
    return Image.OPEN


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8:
        raise ValueError(f"Pictures that are not PIL images must be uint8 in 0..255, got {array.dtype}.")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"Expected a picture of shape (H, W), (H, W, 3) or (3, H, W), got {array.shape}.")
    return Image.fromarray(np.ascontiguousarray(array))
