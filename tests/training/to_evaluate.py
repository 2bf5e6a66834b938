"""What the tests evaluate: a tiny saved model, and folders of labelled pictures that a classifier can learn."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

FEATURES = 8
# The longest sum of the tiny model: a patch of 3 x 16 x 16 pixels.
WIDEST = 768
COLOURS = {"blue": (40, 60, 220), "green": (40, 200, 60), "dark_red": (160, 20, 30)}
# Class -> pictures, for most tests.
COUNTS = dict.fromkeys(COLOURS, 8)


def save_tiny_model(folder):
    """Writes it (32 px, width 32, region features of width `FEATURES`) and returns the folder's name."""
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16, "num_leff_layers": 1, "roi_feature_size": FEATURES}
    config = PyramidCLIPConfig(text_config={**tower, "pooling": "eos"}, vision_config=vision, projection_dim=16)
    PyramidCLIPModel(config).save_pretrained(folder)
    images = PyramidCLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    PyramidCLIPProcessor(images, roi_feature_size=FEATURES).save_pretrained(folder)
    return str(folder)


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
