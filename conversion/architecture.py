"""The configuration of a released PyramidCLIP checkpoint, read off its shapes, and its check against one.

Shapes leave two things open: the number of attention heads (width / 64 unless given) and the special token ids, which
are the last two of the vocabulary, as in CLIP.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from conversion.key_map import key_table
from pyramidclip_hf.configuration_pyramidclip import ARCHITECTURES, PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel

_TEXT = {"token_embedding.weight", "positional_embedding", "text_projection", "ln_final.weight"}
_VIT = {"visual.class_embedding", "visual.positional_embedding", "visual.conv1.weight", "visual.proj_pre"}
_RESNET = {"visual.layer1.0.conv1.weight", "visual.attnpool.positional_embedding", "visual.attnpool.proj_pre"}


def config_from_shapes(
    state_dict: Mapping[str, torch.Tensor], vision_heads: int | None = None, text_heads: int | None = None
) -> PyramidCLIPConfig:
    """The configuration of a checkpoint of any size, ViT or ResNet.

    Args:
        state_dict: tensors under the released names.
        vision_heads: attention heads of the image tower, which no shape tells; by default width / 64.
        text_heads: those of the text tower.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    is_vit = "visual.class_embedding" in state_dict
    absent = sorted((_TEXT | (_VIT if is_vit else _RESNET)) - set(state_dict))
    if absent:
        raise ValueError(f"This is no PyramidCLIP checkpoint: {absent} are missing.{_other_model(state_dict)}")
    vocab_size, text_width = _shape(state_dict, "token_embedding.weight", 2)
    text_config = {
        "vocab_size": vocab_size,
        "hidden_size": text_width,
        "num_hidden_layers": _depth(state_dict, "transformer.resblocks1", "transformer.resblocks2"),
        "num_attention_heads": text_heads,
        "intermediate_size": _inner_width(state_dict, "transformer."),
        "max_position_embeddings": _shape(state_dict, "positional_embedding", 2)[0],
        **token_ids(vocab_size),
    }
    vision_config = _vit_config(state_dict) if is_vit else _resnet_config(state_dict)
    return make_config(
        text_config=text_config,
        vision_config={**vision_config, "num_attention_heads": vision_heads},
        projection_dim=_shape(state_dict, "text_projection", 2)[1],
    )


def make_config(**sections: Any) -> PyramidCLIPConfig:
    """A configuration; ValueError, and not huggingface_hub's own class of errors, where its parts do not fit."""
    try:
        return PyramidCLIPConfig(**sections)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error


def token_ids(vocab_size: int) -> dict[str, int]:
    """CLIP's special ids: the last two of the vocabulary; padding is 0."""
    return {"pad_token_id": 0, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}


def _vit_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    width, _, patch_size, _ = _shape(state_dict, "visual.conv1.weight", 4)
    first, second = "visual.transformer.resblocks1", "visual.transformer.resblocks2"
    return {
        "tower": "vit",
        "hidden_size": width,
        "intermediate_size": _inner_width(state_dict, "visual.transformer."),
        "patch_size": patch_size,
        "image_size": patch_size * grid_side(state_dict, "visual.positional_embedding"),
        "num_hidden_layers": _depth(state_dict, first, second),
        "num_leff_layers": _depth(state_dict, first),
        "roi_feature_size": _shape(state_dict, "visual.proj_pre", 2)[0] - 4,
    }


def _resnet_config(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {
        "tower": "resnet",
        "layers": tuple(_depth(state_dict, f"visual.layer{stage}") for stage in range(1, 5)),
        "width": _shape(state_dict, "visual.layer1.0.conv1.weight", 4)[0],
        "image_size": 32 * grid_side(state_dict, "visual.attnpool.positional_embedding"),
        "roi_feature_size": _shape(state_dict, "visual.attnpool.proj_pre", 2)[0] - 4,
    }


def _shape(state_dict: Mapping[str, torch.Tensor], name: str, rank: int) -> tuple[int, ...]:
    shape = tuple(state_dict[name].shape)
    if len(shape) != rank:
        raise ValueError(f"This is no PyramidCLIP checkpoint: {name} has shape {shape}, expected {rank} dimensions.")
    return shape


def grid_side(state_dict: Mapping[str, torch.Tensor], name: str) -> int:
    """Side of the square grid behind a table of 1 + side * side positions."""
    positions = _shape(state_dict, name, 2)[0]
    side = round((positions - 1) ** 0.5)
    if side * side + 1 != positions or side < 1:
        raise ValueError(f"{name} has {positions} rows, expected 1 + side * side for a square grid.")
    return side


def _depth(state_dict: Mapping[str, torch.Tensor], *prefixes: str) -> int:
    patterns = [re.compile(re.escape(prefix) + r"\.(\d+)\.") for prefix in prefixes]
    return sum(len({found[1] for name in state_dict if (found := pattern.match(name))}) for pattern in patterns)


def _inner_width(state_dict: Mapping[str, torch.Tensor], prefix: str) -> int | None:
    """Width of the feed-forward part; `None`, four times the width, where there is no block."""
    names = sorted(name for name in state_dict if name.startswith(prefix))
    found = [name for name in names if name.endswith(("mlp.c_fc.weight", "mlp.linear1.weight"))]
    return state_dict[found[0]].shape[0] if found else None


def _other_model(state_dict: Mapping[str, torch.Tensor]) -> str:
    names = " ".join(state_dict)
    if "transformer.resblocks.0." in names or "vision_model." in names:
        return " It looks like a plain CLIP model: start from it with `python -m conversion.init_from_clip`."
    return f" Its first names are {list(state_dict)[:5]}."


def check_checkpoint(state_dict: Mapping[str, torch.Tensor], config: PyramidCLIPConfig) -> None:
    """Compares names and shapes with what the configuration needs.

    Raises:
        ValueError: every missing, unused and misshapen tensor, listed.
    """
    with torch.device("meta"):
        ours = PyramidCLIPModel(config).state_dict()
    expected = {row.original: tuple(row.join(ours).shape) for row in key_table(config)}
    missing, unused = sorted(set(expected) - set(state_dict)), sorted(set(state_dict) - set(expected))
    misshapen = [
        f"{name} is {tuple(state_dict[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state_dict and tuple(state_dict[name].shape) != shape
    ]
    if missing or unused or misshapen:
        raise ValueError(
            f"The checkpoint does not fit its architecture ({describe(config)}).\n"
            f"  missing: {_listed(missing)}\n  unused: {_listed(unused)}\n  misshapen: {_listed(misshapen)}"
        )


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def describe(config: PyramidCLIPConfig) -> str:
    """One line: the named architecture where it is one, and the sizes."""
    vision, text = config.vision_config, config.text_config
    if vision.tower == "vit":
        picture = (
            f"ViT, width {vision.hidden_size}, {vision.num_hidden_layers} blocks, the first {vision.num_leff_layers} "
            f"with LeFF, patch {vision.patch_size}"
        )
    else:
        picture = f"ResNet, width {vision.width}, blocks {list(vision.layers)}"
    name = next((name for name in ARCHITECTURES if _same_sizes(config, name)), "no named architecture")
    return (
        f"{name}: {picture}, {vision.image_size} px, {vision.num_attention_heads} heads; text width "
        f"{text.hidden_size}, {text.num_hidden_layers} blocks, {text.num_attention_heads} heads, vocabulary "
        f"{text.vocab_size}; embedding {config.projection_dim}"
    )


def _same_sizes(config: PyramidCLIPConfig, name: str) -> bool:
    named = PyramidCLIPConfig.from_architecture(name)
    fields = ("tower", "image_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "width")
    return (
        config.projection_dim == named.projection_dim
        and config.text_config.hidden_size == named.text_config.hidden_size
        and tuple(config.vision_config.layers) == tuple(named.vision_config.layers)
        and all(getattr(config.vision_config, field) == getattr(named.vision_config, field) for field in fields)
    )
