"""The golden vectors in tests/fixtures: outputs of the published reference implementation (released code of
2022-11-15) on weights that are a function of each checkpoint entry's name and shape. This file rebuilds the weights."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

from conversion.key_map import to_transformers
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("tiny-vit", "tiny-resnet")
OUTPUTS = {
    "global": "global_image_features",
    "local": "local_image_features",
    "roi": "roi_image_features",
    "summary": "summary_text_features",
    "caption": "caption_text_features",
    "tags": "tag_text_features",
}


def draw(key: str, shape) -> torch.Tensor:
    """The reference's value of one checkpoint entry."""
    noise = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(tuple(shape), dtype=np.float32)
    leaf = key.rpartition(".")[2]
    special = {
        "num_batches_tracked": lambda: np.array(1000),
        "logit_scale": lambda: np.array(3.9, dtype=np.float32),
        "running_mean": lambda: 0.1 * noise,
        "running_var": lambda: 0.8 + 0.4 * np.abs(noise),
        "class_embedding": lambda: 0.1 * noise,
        "positional_embedding": lambda: 0.1 * noise,
        "bias": lambda: 0.05 * noise,
        "in_proj_bias": lambda: 0.05 * noise,
    }
    if leaf in special:
        value = special[leaf]()
    elif "token_embedding" in key:
        value = 0.1 * noise
    elif key.endswith("bn3.weight"):
        value = 0.3 + 0.03 * noise
    elif noise.ndim == 1:
        value = 1 + 0.1 * noise
    elif leaf in ("proj", "proj_pre", "text_projection"):
        value = (noise / np.sqrt(shape[0])).astype(np.float32)
    else:
        value = noise * np.float32(np.sqrt((2.0 if noise.ndim == 4 else 1.0) / np.prod(shape[1:], dtype=int)))
    return torch.from_numpy(np.asarray(value))


def reference_state_dict(name: str) -> dict[str, torch.Tensor]:
    """The checkpoint behind the vectors of `name`, under the reference's keys."""
    return {key: draw(key, shape) for key, shape in _description(name)["keys"].items()}


def golden_config(name: str, **kwargs) -> PyramidCLIPConfig:
    """Our configuration of it; `kwargs` go to the composed configuration."""
    given = _description(name)["config"]
    if name == "tiny-vit":
        vision = {"hidden_size": given["vision_width"], "num_hidden_layers": given["vision_layers"],
                  "patch_size": given["vision_patch_size"]}  # fmt: skip
    else:
        vision = {"tower": "resnet", "layers": given["vision_layers"], "width": given["vision_width"]}
    text = {"vocab_size": 512, "hidden_size": given["transformer_width"], "bos_token_id": 510, "eos_token_id": 511}
    return PyramidCLIPConfig(
        projection_dim=given["embed_dim"],
        vision_config={"image_size": given["image_resolution"], **vision},
        text_config=text,
        **kwargs,
    )


def golden_model(name: str, **kwargs) -> PyramidCLIPModel:
    """Our model with the reference's weights, in eval mode."""
    model = PyramidCLIPModel(golden_config(name, **kwargs))
    model.load_state_dict(to_transformers(reference_state_dict(name), model.config))
    return model.eval()


def golden_vectors(name: str) -> dict[str, torch.Tensor]:
    """Every stored array of `name`."""
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def golden_batch(name: str) -> dict[str, torch.Tensor]:
    """The stored inputs under our names."""
    found = {key[6:]: value for key, value in golden_vectors(name).items() if key.startswith("input.")}
    return {"pixel_values": found.pop("global_pixel_values"), **found}


def _description(name: str) -> dict:
    return json.loads((FIXTURES / f"{name}.json").read_text())
