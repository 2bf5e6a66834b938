"""Distorted views: each change against its plain form, and the shares of the list."""

import colorsys

import numpy as np
import pytest
import torch

from training.data import distortion
from training.data.distortion import distorted


def pixels(height=12, width=16):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8))


class Fixed:
    """Draws given numbers."""

    def __init__(self, chances=(1, 1, 1, 1), factors=(0, 0, 0, 0), sigma=1.0):
        self.given = [np.array(chances, float), np.array(factors, float), sigma]

    def uniform(self, low=0.0, high=1.0, size=None):
        return self.given.pop(0)

    def permutation(self, number):
        return np.arange(number)


def test_without_a_change_the_picture_stays():
    assert torch.equal(distorted(pixels(), Fixed()), pixels())


def test_flip_and_grey():
    assert torch.equal(distorted(pixels(), Fixed((1, 1, 1, 0))), pixels().flip(2))
    grey = distorted(pixels(), Fixed((1, 0, 1, 1)))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((pixels() * weights).sum(0) - grey.float()).abs().max() <= 1


@pytest.mark.parametrize(("number", "factor"), [(0, 0.5), (1, -0.5), (2, 1.0)])
def test_brightness_contrast_and_saturation(number, factor):
    factors = [0.0] * 4
    factors[number] = factor
    found = distorted(pixels(), Fixed((0, 1, 1, 1), factors)).float()
    picture, grey = pixels().float(), (pixels() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    mixed_with = (torch.zeros(()), grey.mean(), grey)[number]
    expected = (mixed_with + (1 + 0.4 * factor) * (picture - mixed_with)).clamp(0, 255)
    assert (found - expected).abs().max() <= 2  # rounded on the way


def test_hue_turns_the_circle():
    colour = torch.tensor([200, 40, 40], dtype=torch.uint8)[:, None, None].expand(3, 4, 4).contiguous()
    found = distorted(colour, Fixed((0, 1, 1, 1), (0, 0, 0, 1.0)))[:, 0, 0]
    h, s, v = colorsys.rgb_to_hsv(*(colour[:, 0, 0] / 255).tolist())
    expected = torch.tensor(colorsys.hsv_to_rgb(h + 0.1, s, v)) * 255
    assert (found - expected).abs().max() <= 4


def test_the_shares_are_those_of_the_list(monkeypatch):
    done = []
    monkeypatch.setattr(distortion, "_jittered", lambda picture, number, factor: done.append("jitter") or picture)
    rng = np.random.default_rng(0)
    flipped = sum(torch.equal(distorted(pixels(), rng), pixels().flip(2)) for _ in range(600))
    assert len(done) / 4 / 600 == pytest.approx(0.8, abs=0.05)
    assert flipped / 600 == pytest.approx(0.5 * 0.5 * 0.8, abs=0.05)  # flipped, and neither blurred nor grey


def test_as_many_numbers_are_drawn_whatever_is_done():
    after = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        distorted(pixels(), rng)
        other = np.random.default_rng(seed)
        other.uniform(size=4), other.uniform(-1, 1, size=4), other.permutation(4), other.uniform(0.1, 2.0)
        after.add(rng.random() == other.random())
    assert after == {True}
