"""The names of the released PyramidCLIP checkpoints against ours, as one table that is read in both directions.

A row says: this original tensor holds these tensors of ours, under this operation. `same` copies, `transpose` swaps the
two axes of a matrix, `stack` joins q, k, v along the first axis. The table follows from the configuration alone, so it
is complete: a tensor that it does not name is an error, and so is a name without a tensor.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig

NORM = ("weight", "bias")
BATCH_NORM = (*NORM, "running_mean", "running_var", "num_batches_tracked")

# The reference splits both transformers into `resblocks1` and `resblocks2` at this depth, the text's too.
REFERENCE_SPLIT = 9

# Inside a block: (original, ours, parameters).
BLOCK = (
    ("attn.out_proj", "self_attn.out_proj", NORM),
    ("ln_1", "layer_norm1", NORM),
    ("ln_2", "layer_norm2", NORM),
)
MLP = (("mlp.c_fc", "mlp.fc1", NORM), ("mlp.c_proj", "mlp.fc2", NORM))
LEFF = (
    ("mlp.linear1", "mlp.fc1", NORM),
    ("mlp.ac1.bn", "mlp.norm1", BATCH_NORM),
    ("mlp.depConv.depconv", "mlp.depthwise", ("weight",)),
    ("mlp.depConv.bn", "mlp.norm2", BATCH_NORM),
    ("mlp.linear2", "mlp.fc2", NORM),
    ("mlp.ac2.bn", "mlp.norm3", BATCH_NORM),
)
# Inside a ResNet's stem or bottleneck.
CONVOLUTIONS = tuple(
    row
    for number in (1, 2, 3)
    for row in ((f"conv{number}", f"conv{number}", ("weight",)), (f"bn{number}", f"norm{number}", BATCH_NORM))
)
SHORTCUT = (("downsample.0", "shortcut.conv", ("weight",)), ("downsample.1", "shortcut.norm", BATCH_NORM))


@dataclass(frozen=True)
class Row:
    """One original tensor and what it holds."""

    original: str
    ours: tuple[str, ...]
    operation: Literal["same", "transpose", "stack"] = "same"

    def split(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """The original tensor as our tensors."""
        if self.operation == "stack":
            return dict(zip(self.ours, (part.clone() for part in tensor.chunk(len(self.ours))), strict=True))
        return {self.ours[0]: tensor.T.contiguous() if self.operation == "transpose" else tensor}

    def join(self, state_dict: dict[str, torch.Tensor]) -> torch.Tensor:
        """Our tensors as the original one."""
        if self.operation == "stack":
            return torch.cat([state_dict[name] for name in self.ours])
        tensor = state_dict[self.ours[0]]
        return tensor.T.contiguous() if self.operation == "transpose" else tensor


def _rows(original: str, ours: str, names: Iterable[tuple[str, str, tuple[str, ...]]]) -> list[Row]:
    return [Row(f"{original}{a}.{leaf}", (f"{ours}{b}.{leaf}",)) for a, b, leaves in names for leaf in leaves]


def _transformer(original: str, ours: str, depth: int, num_leff_layers: int, split: int) -> list[Row]:
    rows = []
    for index in range(depth):
        first = index < split
        old = f"{original}.resblocks{1 if first else 2}.{index if first else index - split}."
        new = f"{ours}.encoder.layers.{index}."
        for leaf in NORM:
            parts = tuple(f"{new}self_attn.{part}_proj.{leaf}" for part in "qkv")
            rows.append(Row(f"{old}attn.in_proj_{leaf}", parts, "stack"))
        rows += _rows(old, new, BLOCK + (LEFF if index < num_leff_layers else MLP))
    return rows


def _text(config: PyramidCLIPConfig) -> list[Row]:
    depth = config.text_config.num_hidden_layers
    return [
        Row("logit_scale", ("logit_scale",)),
        Row("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",)),
        Row("positional_embedding", ("text_model.embeddings.position_embedding.weight",)),
        Row("text_projection", ("text_projection.weight",), "transpose"),
        *_rows("ln_final", "text_model.final_layer_norm", (("", "", NORM),)),
        *_transformer("transformer", "text_model", depth, 0, min(REFERENCE_SPLIT, depth)),
    ]


def _vit(config: PyramidCLIPConfig) -> list[Row]:
    vision, ours = config.vision_config, "vision_model."
    if vision.num_picture_layers != vision.num_leff_layers:
        raise ValueError(
            "The released layout lets regions enter where LeFF ends, and this model has LeFF in "
            f"{vision.num_leff_layers} blocks and regions behind {vision.num_picture_layers} (num_picture_layers): it "
            "cannot hold that."
        )
    return [
        Row("visual.class_embedding", (f"{ours}embeddings.class_embedding",)),
        Row("visual.positional_embedding", (f"{ours}embeddings.position_embedding.weight",)),
        Row("visual.conv1.weight", (f"{ours}embeddings.patch_embedding.weight",)),
        Row("visual.proj_pre", (f"{ours}embeddings.roi_projection.weight",), "transpose"),
        Row("visual.proj", ("visual_projection.weight",), "transpose"),
        *_rows("visual.", ours, (("ln_pre", "pre_layernorm", NORM), ("ln_post", "post_layernorm", NORM))),
        *_transformer("visual.transformer", "vision_model", vision.num_hidden_layers,
                      vision.num_leff_layers, vision.num_leff_layers),
    ]  # fmt: skip


def _resnet(config: PyramidCLIPConfig) -> list[Row]:
    rows = _rows("visual.", "vision_model.trunk.stem.", CONVOLUTIONS)
    for stage, depth in enumerate(config.vision_config.layers):
        for index in range(depth):
            names = CONVOLUTIONS + (SHORTCUT if index == 0 else ())
            rows += _rows(
                f"visual.layer{stage + 1}.{index}.", f"vision_model.trunk.stages.{stage}.layers.{index}.", names
            )
    pool = "vision_model.attention_pool."
    projections = tuple((f"{part}_proj", f"{part}_proj", NORM) for part in "qkv")
    return [
        *rows,
        Row("visual.attnpool.positional_embedding", (f"{pool}position_embedding.weight",)),
        Row("visual.attnpool.proj_pre", (f"{pool}roi_projection.weight",), "transpose"),
        *_rows("visual.attnpool.", pool, (("ln_pre", "roi_layernorm", NORM), *projections)),
        *_rows("visual.attnpool.c_proj", "visual_projection", (("", "", NORM),)),
    ]


def key_table(config: PyramidCLIPConfig) -> list[Row]:
    """Every tensor of a released checkpoint of this configuration, and what of ours it holds."""
    return _text(config) + (_vit(config) if config.vision_config.tower == "vit" else _resnet(config))


def _check_names(kind: str, expected: set[str], given: set[str]) -> None:
    missing, unused = sorted(expected - given), sorted(given - expected)
    if missing or unused:
        raise ValueError(f"The {kind} does not fit: missing {missing or 'nothing'}; unused {unused or 'nothing'}.")


def to_transformers(state_dict: dict[str, torch.Tensor], config: PyramidCLIPConfig) -> dict[str, torch.Tensor]:
    """The original tensors under our names.

    Raises:
        ValueError: missing or unused names, listed.
    """
    table = key_table(config)
    _check_names("checkpoint", {row.original for row in table}, set(state_dict))
    return {name: part for row in table for name, part in row.split(state_dict[row.original]).items()}


def to_original(state_dict: dict[str, torch.Tensor], config: PyramidCLIPConfig) -> dict[str, torch.Tensor]:
    """Our tensors under the original names; the exact inverse of `to_transformers`.

    Raises:
        ValueError: missing or unused names, listed.
    """
    table = key_table(config)
    _check_names("model", {name for row in table for name in row.ours}, set(state_dict))
    return {row.original: row.join(state_dict) for row in table}
