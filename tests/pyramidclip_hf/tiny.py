"""Tiny models of both towers, and batches of all levels for them, for the tests here."""

import pytest
import torch
from torch.torch_version import TorchVersion

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel

TEXT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49}  # fmt: skip
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_leff_layers": 2, "roi_feature_size": 6},
    "resnet": {"tower": "resnet", "image_size": 64, "layers": (1, 1, 1, 1), "width": 4, "num_attention_heads": 4,
               "roi_feature_size": 6},
}  # fmt: skip
# The longest sum of these models: a ResNet's window of 3 x 3 pixels and 32 channels.
WIDEST = 288
# 2.6 compiles neither transformers' decorators in one graph nor flex attention for any length, and its fake CUDA
# tensors need a driver; 2.11 does. Those between were not tried.
OLD_TORCH = pytest.mark.skipif(TorchVersion(torch.__version__) < "2.11", reason="torch 2.6 cannot")
BOTH = pytest.mark.parametrize("tower", TOWERS)


def tiny(tower="vit", pooling="max", vision=None, text=None, **kwargs):
    """A `PyramidCLIPModel` in evaluation mode; the rest are further fields of its configuration."""
    torch.manual_seed(0)
    config = PyramidCLIPConfig(
        projection_dim=16,
        vision_config=TOWERS[tower] | (vision or {}),
        text_config=TEXT | {"pooling": pooling} | (text or {}),
        **kwargs,
    )
    return PyramidCLIPModel(config).eval()


def make_batch(model, count=5, regions=4, seed=1):
    """All levels; the first sample has all its regions, the second has none."""
    generator = torch.Generator().manual_seed(seed)
    size = model.config.vision_config.image_size

    def ids():
        rows = torch.zeros(count, 12, dtype=torch.long)
        for row in rows:
            length = int(torch.randint(1, 10, (), generator=generator))
            row[0], row[1 + length] = 48, 49
            row[1 : 1 + length] = torch.randint(1, 48, (length,), generator=generator)
        return rows

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    roi_mask = torch.rand(count, regions, generator=generator) < 0.7
    roi_mask[0], roi_mask[1] = True, False
    return {
        "pixel_values": normal(count, 3, size, size),
        "local_pixel_values": normal(count, 3, size, size),
        "roi_features": normal(count, regions, 10),
        "roi_mask": roi_mask,
        "summary_input_ids": ids(),
        "input_ids": ids(),
        "tag_input_ids": ids(),
    }
