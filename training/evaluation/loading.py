"""A saved model and its processor for evaluation."""

import torch

from pyramidclip_hf import loading
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor


def load_model(
    name: str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    """The model in evaluation mode and its processor; see `pyramidclip_hf.loading.load_model`."""
    loaded = loading.load_model(name, dtype=dtype, device=device)
    return loaded.model, loaded.processor
