# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""CLIP's modified ResNet with attention pooling, and PyramidCLIP's region branch through that pooling.

Differences from a plain ResNet: a stem of three convolutions, average pooling in front of every strided 1x1
convolution in place of the stride, and attention pooling whose only query is the mean token.
The output projection of the attention pooling is the dual encoder's visual projection and lives there.
Shape letters: B batch, C channels, T tokens, K regions, D = 32 x `width`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pyramidclip import PyramidCLIPVisionConfig
from .modeling_pyramidclip_text import (
    AttentionMask,
    PyramidCLIPLayerNorm,
    eager_attention_forward,
    is_traced,
    keys_with_first,
    mask_of_keys,
)


class _Halved(torch.autograd.Function):
    """A 2 x 2 average pooling of even sides, whose gradient is spread by a copy; torch's own sums over windows."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(hidden_states, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        return

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return F.interpolate(grad * 0.25, scale_factor=2.0, mode="nearest")


def halved(hidden_states: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, H / 2, W / 2), means of 2 x 2."""
    rows, columns = hidden_states.shape[2:]
    if is_traced() or rows % 2 or columns % 2 or not (torch.is_grad_enabled() and hidden_states.requires_grad):
        return F.avg_pool2d(hidden_states, 2)
    return _Halved.apply(hidden_states)


class PyramidCLIPResNetStem(nn.Module):
    """Three convolutions and a pooling: a quarter of the size."""

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        half = config.width // 2
        self.conv1 = nn.Conv2d(config.num_channels, half, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, config.width, kernel_size=3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(config.width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, width, H / 4, W / 4)."""
        hidden_states = F.relu(self.norm1(self.conv1(pixel_values)))
        hidden_states = F.relu(self.norm2(self.conv2(hidden_states)))
        hidden_states = F.relu(self.norm3(self.conv3(hidden_states)))
        return halved(hidden_states)


class PyramidCLIPResNetShortcut(nn.Module):
    """The projection beside a bottleneck that changes the width or the size."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, C', H / stride, W / stride)."""
        if self.stride > 1:
            hidden_states = halved(hidden_states)
        return self.norm(self.conv(hidden_states))


class PyramidCLIPResNetBottleneck(GradientCheckpointingLayer):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width * self.expansion, kernel_size=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width * self.expansion)
        needs_shortcut = stride > 1 or in_channels != width * self.expansion
        self.shortcut = (
            PyramidCLIPResNetShortcut(in_channels, width * self.expansion, stride) if needs_shortcut else nn.Identity()
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As `compute`: transformers puts gradient checkpointing around this, and what is compiled lies inside."""
        return self.compute(hidden_states)

    def compute(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        residual = self.shortcut(hidden_states)
        hidden_states = F.relu(self.norm1(self.conv1(hidden_states)))
        hidden_states = F.relu(self.norm2(self.conv2(hidden_states)))
        if self.stride > 1:
            hidden_states = halved(hidden_states)
        return F.relu(self.norm3(self.conv3(hidden_states)) + residual)


class PyramidCLIPResNetStage(nn.Module):
    """Bottlenecks of one width; the first may halve the size."""

    def __init__(self, in_channels: int, width: int, depth: int, stride: int):
        super().__init__()
        out_channels = width * PyramidCLIPResNetBottleneck.expansion
        self.layers = nn.ModuleList(
            PyramidCLIPResNetBottleneck(in_channels if index == 0 else out_channels, width, stride if index == 0 else 1)
            for index in range(depth)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class PyramidCLIPResNet(nn.Module):
    """The convolution trunk: stem and four stages."""

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        self.stem = PyramidCLIPResNetStem(config)
        stages, in_channels = [], config.width
        for index, depth in enumerate(config.layers):
            width = config.width * 2**index
            stages.append(PyramidCLIPResNetStage(in_channels, width, depth, stride=1 if index == 0 else 2))
            in_channels = width * PyramidCLIPResNetBottleneck.expansion
        self.stages = nn.ModuleList(stages)
        self.gradient_checkpointing = False

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, D, H / 32, W / 32)."""
        return self.maps(pixel_values)[-1]

    def maps(self, pixel_values: torch.Tensor, last: int = 4) -> list[torch.Tensor]:
        """(B, 3, H, W) -> the stem's map (B, `width`, H / 4, W / 4), then those of the stages up to number `last`."""
        if pixel_values.device.type == "cuda":
            # Convolutions keep this layout to the end. Weights stay as they are, and with them optimizer states and
            # checkpoints. On CPUs it gains nothing (docs/speed.md).
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        maps = [self.stem(pixel_values)]
        for stage in self.stages[:last]:
            maps.append(stage(maps[-1]))
        return maps


def resize_position_table(table: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bicubic resize of a (1 + side * side, D) position table, first row apart, to (1 + rows * columns, D)."""
    side = int((len(table) - 1) ** 0.5)
    grid = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=(rows, columns), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:1], grid.permute(0, 2, 3, 1).reshape(rows * columns, -1)])


class PyramidCLIPAttentionPool(nn.Module):
    """Attention pooling, up to its output projection: the mean token is the only query.

    Pictures get learned positions; regions get an own LayerNorm in their place (`ln_pre` of the reference).
    """

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.head_dim = dim // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        num_positions = config.grid_size**2 + 1
        self.position_embedding = nn.Embedding(num_positions, dim)
        self.position_ids = nn.Buffer(torch.arange(num_positions), persistent=False)
        self.roi_projection = nn.Linear(config.roi_feature_size + 4, dim, bias=False)
        self.roi_layernorm = PyramidCLIPLayerNorm(dim, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)

    def forward(
        self,
        feature_map: torch.Tensor | None = None,
        roi_features: torch.Tensor | None = None,
        roi_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Tokens (B, 1 + T, D) with the mean in front, the pooled vector (B, D), the weights (B, H, 1, 1 + T)."""
        if roi_features is not None:
            tokens = self._embed_regions(roi_features, roi_mask)
        else:
            tokens = self._embed_map(feature_map, interpolate_pos_encoding)
        mask = None
        if roi_mask is not None:
            mask = mask_of_keys(self.config, tokens[:, :1], keys_with_first(roi_mask), tokens)
        pooled, weights = self._attend(tokens, mask, **kwargs)
        return tokens, pooled, weights

    def _embed_map(self, feature_map: torch.Tensor | None, interpolate_pos_encoding: bool) -> torch.Tensor:
        if feature_map is None:
            raise ValueError("The attention pooling needs a feature map or region features, got neither.")
        rows, columns = feature_map.shape[2:]
        tokens = feature_map.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        positions = self.position_embedding(self.position_ids)
        if interpolate_pos_encoding and (rows, columns) != (self.config.grid_size, self.config.grid_size):
            positions = resize_position_table(positions, rows, columns)
        return tokens + positions.to(tokens.dtype)

    def _embed_regions(self, roi_features: torch.Tensor, roi_mask: torch.Tensor | None) -> torch.Tensor:
        tokens = self.roi_projection(roi_features)
        if roi_mask is None:
            mean = tokens.mean(dim=1, keepdim=True)
        else:
            # At least 1: a row without regions keeps a finite value and a finite gradient.
            count = roi_mask.sum(dim=1).clamp(min=1)[:, None, None]
            mean = tokens.masked_fill(~roi_mask[..., None], 0.0).sum(dim=1, keepdim=True) / count
        return self.roi_layernorm(torch.cat([mean.to(tokens.dtype), tokens], dim=1))

    def _attend(
        self, tokens: torch.Tensor, mask: AttentionMask, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (tokens.shape[0], -1, self.config.num_attention_heads, self.head_dim)
        query = self.q_proj(tokens[:, :1]).view(shape).transpose(1, 2)
        key = self.k_proj(tokens).view(shape).transpose(1, 2)
        value = self.v_proj(tokens).view(shape).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return output.reshape(tokens.shape[0], -1), weights
