# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures -> what the VinVL detector reads: short side 600, BGR in 0..255 less the mean, padded to one size."""

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import ImagesKwargs, Unpack


class VinVLImageProcessorKwargs(ImagesKwargs, total=False):
    """`max_image_pixels` (`int`): larger pictures are refused before they are decoded."""

    max_image_pixels: int | None


class VinVLImageProcessor(PilBackend):
    r"""
    Prepares pictures for [`VinVLForObjectAttributeDetection`], as the published detector does it.

    `processor(images)` takes one picture or a list: PIL images, or uint8 arrays or tensors, grey or RGB, of shape
    (H, W), (H, W, 3) or (3, H, W). EXIF rotation is applied, alpha dropped, 16-bit grey scaled to 8 bits. It returns

    - `pixel_values` (B, 3, H, W) float32, BGR, `(value in 0..255 - image_mean) / image_std`; smaller pictures stand at
      the top left, the rest is 0;
    - `image_sizes` (B, 2) int64, height and width of each picture within `pixel_values`;
    - `original_sizes` (B, 2) int64, height and width of the pictures as given (after the EXIF rotation).

    Args:
        size (`dict`): `shortest_edge` and `longest_edge` in pixels; see [`resized_size`].
        image_mean, image_std (`tuple` of 3): in BGR order, on the scale 0..255.
        max_image_pixels (`int`): larger pictures raise ValueError.
        do_resize, do_normalize (`bool`), resample (`int`): as in every image processor.
    """

    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 600, "longest_edge": 1000}
    image_mean = (103.530, 116.280, 123.675)
    image_std = (1.0, 1.0, 1.0)
    do_resize = True
    do_normalize = True
    rescale_factor = None
    default_to_square = False
    max_image_pixels = 178_956_970
    model_input_names = ["pixel_values", "image_sizes", "original_sizes"]
    valid_kwargs = VinVLImageProcessorKwargs

    def __init__(self, **kwargs: Unpack[VinVLImageProcessorKwargs]):
        super().__init__(**kwargs)

    def process_image(self, image, max_image_pixels=None, **kwargs):
        """Any accepted picture -> RGB PIL image, upright."""
        if not isinstance(image, Image.Image):
            image = _image_from_array(np.asarray(image))
        pixels = image.width * image.height
        if max_image_pixels is not None and pixels > max_image_pixels:
            raise ValueError(
                f"The picture has {image.width} x {image.height} = {pixels} pixels, more than max_image_pixels = "
                f"{max_image_pixels}. Raise max_image_pixels if the source is trusted."
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            # PIL clips 16-bit grey at 255 instead of scaling it.
            image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
        return image.convert("RGB")

    def _preprocess(
        self, images, size, resample, image_mean, image_std, do_resize, do_normalize, return_tensors, **kwargs
    ):
        if do_resize and not (size.shortest_edge and size.longest_edge):
            raise ValueError(f"size must give shortest_edge and longest_edge, got {size}.")
        prepared, original_sizes = [], []
        for image in images:
            original_sizes.append((image.height, image.width))
            if do_resize:
                target = resized_size(image.height, image.width, size.shortest_edge, size.longest_edge)
                if target != (image.height, image.width):
                    image = image.resize(target[::-1], resample)
            values = np.asarray(image)[..., ::-1].astype(np.float32)
            if do_normalize:
                values = (values - np.float32(image_mean)) / np.float32(image_std)
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


def resized_size(height, width, shortest_edge, longest_edge):
    """Height and width after resizing: the short side becomes `shortest_edge`, or less where the long side would pass
    `longest_edge`. The rounding is the detector's (the long side is cut off, so 1920 x 1080 gives 999 x 562).

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


def _image_from_array(array):
    if array.dtype != np.uint8:
        raise ValueError(f"Pictures that are not PIL images must be uint8 in 0..255, got {array.dtype}.")
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"Expected a picture of shape (H, W), (H, W, 3) or (3, H, W), got {array.shape}.")
    return Image.fromarray(np.ascontiguousarray(array))
