"""Pixels as bytes until they are where they are used: what loaders send, and what a device makes of it."""

from collections.abc import Sequence

import torch


class Normalisation:
    """uint8 pixels to (pixel / 255 - mean) / std in fp32, in one kernel, wherever the pixels are.

    Bytes are a quarter of what the loader's processes share, pin and send to a device otherwise, and normalising them
    costs a device nothing that can be noticed.

    Args:
        mean: of each channel.
        std: of each channel.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        self._scale = torch.tensor([1 / (255 * one) for one in std]).view(-1, 1, 1)
        self._shift = torch.tensor([-centre / one for centre, one in zip(mean, std)]).view(-1, 1, 1)
        self._at: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        """(..., 3, height, width): fp32 of uint8; what is normalised already stays as it is."""
        if pixels.dtype != torch.uint8:
            return pixels
        if pixels.device not in self._at:
            # Without waiting for the device, and once.
            self._at[pixels.device] = (self._scale.to(pixels.device), self._shift.to(pixels.device))
        scale, shift = self._at[pixels.device]
        return torch.addcmul(shift, pixels, scale)
