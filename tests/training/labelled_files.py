"""Folders of labelled pictures that a classifier can learn: each class has a colour, each picture its own noise."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "dark_red": (160, 20, 30)}
# Class -> pictures, for most tests.
COUNTS = dict.fromkeys(COLOURS, 8)


def write_pictures(folder, counts, seed=0, size=(20, 18)):
    """`folder/CLASS/N.png` for each class of `counts`, {class: pictures}."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            noise = rng.normal(0, 40, (size[1], size[0], 3))
            pixels = (noise + COLOURS[name]).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder) / name / f"{number:02d}.png")
    return str(folder)
