"""What SLIP and DeCLIP do to a view's pixels beside cropping (MoCo v2's list): colours, grey, blur, flip."""

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

# Probabilities and ranges of MoCo v2, which SLIP's code and DeCLIP's have alike.
JITTER_PROBABILITY, GREY_PROBABILITY, BLUR_PROBABILITY, FLIP_PROBABILITY = 0.8, 0.2, 0.5, 0.5
BRIGHTNESS = CONTRAST = SATURATION = 0.4
HUE = 0.1
BLUR_SIGMA = (0.1, 2.0)


def distorted(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A distorted picture.

    Args:
        pixels: uint8 (3, height, width).
        rng: always draws the same number of numbers.

    Returns:
        uint8 (3, height, width).
    """
    jitter, grey, blur, flip = rng.uniform(size=4) < (
        JITTER_PROBABILITY,
        GREY_PROBABILITY,
        BLUR_PROBABILITY,
        FLIP_PROBABILITY,
    )
    factors, order, sigma = rng.uniform(-1, 1, size=4), rng.permutation(4), rng.uniform(*BLUR_SIGMA)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    if jitter:
        for number in order:
            picture = _jittered(picture, int(number), float(factors[number]))
    if grey:
        picture = picture.convert("L").convert("RGB")
    if blur:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    if flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def _jittered(picture: Image.Image, number: int, factor: float) -> Image.Image:
    """One change of colour by `factor` of its range, in -1 to 1: brightness, contrast, saturation or hue."""
    if number < 3:
        enhancer = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[number]
        return enhancer(picture).enhance(1 + factor * (BRIGHTNESS, CONTRAST, SATURATION)[number])
    turn = round(factor * HUE * 255) % 256
    if not turn:
        return picture
    hsv = np.array(picture.convert("HSV"))
    hsv[..., 0] += np.uint8(turn)  # of a circle, so it may wrap around
    return Image.fromarray(hsv, "HSV").convert("RGB")
