"""A tiny saved model, complete with tokenizer and image processor, for the evaluation tests."""

import torch

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

FEATURES = 8


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
