# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The picture tower as transformers' backbones are: maps of chosen stages, for detectors and for dense tasks.

    >>> backbone = PyramidCLIPBackbone.from_pretrained(folder, out_features=["stage2", "stage3", "stage4"])
    >>> maps = backbone(pixel_values).feature_maps

Any saved model that has a picture tower is such a folder. A ResNet's stages are its own; of a ViT each block is one, as
a grid of patches. Shape letters: B batch, C channels, D tower width.
"""

from typing import Any, Self

import torch
from torch import nn
from transformers.backbone_utils import BackboneMixin
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pyramidclip import PyramidCLIPBackboneConfig
from .modeling_pyramidclip_base import PyramidCLIPPreTrainedModel
from .modeling_pyramidclip_resnet import PyramidCLIPResNet
from .modeling_pyramidclip_text import (
    PyramidCLIPEncoder,
    PyramidCLIPEncoderLayer,
    PyramidCLIPLayerNorm,
    refuse_no_tensor,
)
from .modeling_pyramidclip_vit import PyramidCLIPLeFFLayer, PyramidCLIPVisionEmbeddings


class PyramidCLIPBackbone(BackboneMixin, PyramidCLIPPreTrainedModel):
    """The picture tower up to its pooling, for pictures of any size; the pooling and the region branch stay behind.

    A ResNet's map of stride s has (H // s, W // s) places: the poolings round down. A ViT's positions are resized
    (bicubic) to the grid of the picture, and the class token takes part and is left out of the maps, which come without
    a last LayerNorm.
    """

    config: PyramidCLIPBackboneConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    # What a saved model has beside: the other tower, heads, and what stands behind the last map.
    _keys_to_ignore_on_load_unexpected = [
        r"^(vision_model\.)?(attention_pool|post_layernorm|embeddings\.roi_projection)\.",
        r"^(text_model|text_projection|visual_projection|classifier|logit_scale)\b",
    ]

    def __init__(self, config: PyramidCLIPBackboneConfig):
        super().__init__(config)
        self.has_attentions = config.tower == "vit"
        self.num_features = config.stage_channels
        if config.tower == "vit":
            self.embeddings = PyramidCLIPVisionEmbeddings(config)
            self.embeddings.roi_projection = None
            self.pre_layernorm = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.encoder = PyramidCLIPEncoder(
                (PyramidCLIPLeFFLayer if index < config.num_leff_layers else PyramidCLIPEncoderLayer)(config)
                for index in range(config.num_hidden_layers)
            )
        else:
            self.trunk = PyramidCLIPResNet(config)
        self.post_init()

    @property
    def strides(self) -> list[int]:
        """Pixels of a step of each map that comes out."""
        return [self.config.stage_strides[self.stage_names.index(name)] for name in self.out_features]

    @property
    def position_holder(self) -> PyramidCLIPVisionEmbeddings:
        """The module with `position_embedding` and `position_ids`.

        Raises:
            ValueError: a ResNet's positions belong to its pooling, which a backbone has not.
        """
        if self.config.tower != "vit":
            raise ValueError("a ResNet backbone has no positions: it takes pictures of any size as it is")
        return self.embeddings

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the pixels."""
        return self.embeddings.patch_embedding if self.config.tower == "vit" else self.trunk.stem.conv1

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a patch convolution that is to stay as it is gets no gradient."""
        if self.config.tower == "vit" and self.config.freeze_patch_embedding:
            self.embeddings.patch_embedding.requires_grad_(False)
        return super().train(mode)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BackboneOutput:
        """Maps (B, C, rows, columns) of the stages `out_features`, in their order.

        Nothing behind the last of them is computed.

        Args:
            pixel_values: (B, 3, H, W); at least the stride of the last map, and of a ViT multiples of `patch_size`.
            **kwargs: transformers' own, such as `output_hidden_states`.

        Raises:
            ValueError: a picture of another shape.
        """
        last = max(self.stage_names.index(name) for name in self.out_features)
        self._check_pixels(pixel_values, last)
        pixel_values = pixel_values.to(self.dtype)
        if self.config.tower == "vit":
            maps = self._vit_maps(pixel_values, last, **kwargs)
        else:
            maps = self.trunk.maps(pixel_values, last)
        wanted = tuple(found for name, found in zip(self.stage_names, maps) if name in self.out_features)
        return BackboneOutput(feature_maps=wanted)  # type: ignore[arg-type]  # says one, means any number

    def _vit_maps(self, pixel_values: torch.Tensor, last: int, **kwargs: Any) -> list[torch.Tensor]:
        grid = (pixel_values.shape[2] // self.config.patch_size, pixel_values.shape[3] // self.config.patch_size)
        hidden_states = self.pre_layernorm(self.embeddings(pixel_values, interpolate_pos_encoding=True))
        tokens = [hidden_states]
        for layer in self.encoder.layers[:last]:
            tokens.append(layer(tokens[-1], None, grid_size=grid, **kwargs))
        return [one[:, 1:].transpose(1, 2).unflatten(2, grid).contiguous() for one in tokens]

    def _check_pixels(self, pixel_values: torch.Tensor, last: int) -> None:
        channels, stride = self.config.num_channels, self.config.stage_strides[last]
        refuse_no_tensor("pixel_values", pixel_values, floats=True)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != channels or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values must be a non-empty (batch_size, {channels}, height, width) tensor, got shape "
                f"{tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if self.config.tower == "vit" and (height % stride or width % stride):
            raise ValueError(
                f"Height and width ({height} x {width}) must be multiples of the ViT's patch_size {stride}: pad the "
                "pictures, e.g. with the image processor's size_divisor."
            )
        if min(height, width) < stride:
            raise ValueError(f"The picture is {height} x {width}, smaller than one place of {stride} x {stride}.")


# A saved model's tower lies below this name.
register_checkpoint_conversion_mapping(
    "PyramidCLIPBackbone", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)

__all__ = ["PyramidCLIPBackbone"]
