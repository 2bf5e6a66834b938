"""Tiny models and batches for the tests here."""

import torch

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel

ROI_FEATURE_SIZE = 6
TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 38,
    "eos_token_id": 39,
}
VIT = {
    "tower": "vit",
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_leff_layers": 1,
    "roi_feature_size": ROI_FEATURE_SIZE,
}
RESNET = {
    "tower": "resnet",
    "image_size": 32,
    "layers": [1, 1, 1, 1],
    "width": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "roi_feature_size": ROI_FEATURE_SIZE,
}

# The longest sum of these models: a patch of 3 x 8 x 8 pixels.
WIDEST = 192


def tiny_model(tower=VIT, seed=0, dtype=torch.float64, **text):
    """A `PyramidCLIPModel` with a few thousand parameters."""
    torch.manual_seed(seed)
    config = PyramidCLIPConfig(text_config={**TEXT, "pooling": "eos", **text}, vision_config=tower, projection_dim=8)
    return PyramidCLIPModel(config).to(dtype)


def tiny_batch(size=12, image_size=16, seed=0, dtype=torch.float64, missing=True):
    """A batch with all levels; with `missing`, the first half lacks most summaries, tags and regions, the second has
    nearly all.
    """
    draw = torch.Generator().manual_seed(seed)

    def texts(length):
        ids = torch.randint(1, 38, (size, length), generator=draw)
        ids[:, 0], ids[:, -1] = 38, 39
        return ids

    def mask():
        kept = torch.rand(size, generator=draw) < torch.linspace(0.2, 1.2, size)
        return kept | (torch.arange(size) >= size - 2) if missing else torch.ones(size, dtype=torch.bool)

    roi_mask = torch.rand(size, 3, generator=draw) < 0.8
    roi_mask[:, 0] = True
    return {
        "pixel_values": torch.randn(size, 3, image_size, image_size, generator=draw, dtype=dtype),
        "local_pixel_values": torch.randn(size, 3, image_size, image_size, generator=draw, dtype=dtype),
        "roi_features": torch.randn(size, 3, ROI_FEATURE_SIZE + 4, generator=draw, dtype=dtype),
        "roi_mask": roi_mask & mask()[:, None],
        "input_ids": texts(7),
        "summary_input_ids": texts(8),
        "has_summary": mask(),
        "tag_input_ids": texts(6),
        "has_tags": mask(),
    }


def tiny_run_batch(size=12, image_size=16, seed=0, dtype=torch.float64, missing=True):
    """`tiny_batch`, with the inputs that terms of other kinds read; some captions have no masked word, some three."""
    batch = tiny_batch(size, image_size, seed, dtype, missing)
    draw = torch.Generator().manual_seed(seed + 100)
    for view in ("view1", "view2"):
        batch[f"{view}_pixel_values"] = torch.randn(size, 3, image_size, image_size, generator=draw, dtype=dtype)
    ids = batch["input_ids"].clone()
    ids[:, 2] = torch.randint(1, 38, (size,), generator=draw)
    ids[1::3, 4:] = 39  # shorter ones, padded with anything
    ids[1::6, 5:] = 0
    batch["augmented_input_ids"] = ids
    masked, positions = batch["input_ids"].clone(), torch.zeros(size, 3, dtype=torch.int64)
    labels = torch.full((size, 3), -100)
    for row in range(size):
        for place in range(row % 4):
            at = (1, 3, 5)[place]
            positions[row, place], labels[row, place] = at, batch["input_ids"][row, at]
            masked[row, at] = (-1, 7, masked[row, at])[place]
    return batch | {"masked_input_ids": masked, "masked_positions": positions, "masked_labels": labels}


def rows_of(batch, rank, world_size):
    """The rows that a process of several has: every world_size-th, as the loader deals them."""
    return {key: value[rank::world_size] for key, value in batch.items()}
