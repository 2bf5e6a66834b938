# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The ViT's own parts: locally-enhanced feed-forward (LeFF), and what stands in front of the blocks.

The block itself is the text tower's (`modeling_pyramidclip_text.py`), the tower is in `modeling_pyramidclip.py`.
Shape letters: B batch, L tokens, D width.
"""

import torch
from torch import nn

from .configuration_pyramidclip import PyramidCLIPVisionConfig
from .modeling_pyramidclip_resnet import resize_position_table
from .modeling_pyramidclip_text import PyramidCLIPEncoderLayer, activation_named


class PyramidCLIPLeFF(nn.Module):
    """Locally-enhanced feed-forward (paper, Figure 3c): a depth-wise 3x3 convolution between the two linear layers.

    BatchNorm and activation follow each of the three. Tokens stay channels-last: the grid view of (B, L, C) tokens is
    what a channels-last convolution reads, so nothing is copied.
    """

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        self.activation_fn = activation_named(config.hidden_act)
        inner = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, inner)
        self.norm1 = nn.BatchNorm1d(inner)
        self.depthwise = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm1d(inner)
        self.fc2 = nn.Linear(inner, config.hidden_size)
        self.norm3 = nn.BatchNorm1d(config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """(B, rows * columns, D) -> the same shape."""
        batch = hidden_states.shape[0]
        tokens = hidden_states.flatten(0, 1)
        tokens = self.activation_fn(self.norm1(self.fc1(tokens)))
        grid = tokens.view(batch, *grid_size, -1).permute(0, 3, 1, 2)
        tokens = self.depthwise(grid).permute(0, 2, 3, 1).reshape(tokens.shape)
        tokens = self.activation_fn(self.norm2(tokens))
        return self.activation_fn(self.norm3(self.fc2(tokens))).view_as(hidden_states)


class PyramidCLIPLeFFLayer(PyramidCLIPEncoderLayer):
    """A block whose feed-forward is LeFF on the patch tokens; the class token passes it unchanged."""

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__(config)
        self.mlp = PyramidCLIPLeFF(config)

    def feed_forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int] | None, views: int = 1
    ) -> torch.Tensor:
        """(B, 1 + rows * columns, D) after the second LayerNorm -> what is added to the tokens."""
        first, patches = hidden_states.split([1, hidden_states.shape[1] - 1], dim=1)
        # All of LeFF view by view, not its BatchNorms alone: that would copy the wide tokens together three times.
        parts = patches.chunk(views) if self.training else (patches,)
        done = [self.mlp(part, grid_size) for part in parts]
        return torch.cat([first, torch.cat(done) if len(done) > 1 else done[0]], dim=1)


class PyramidCLIPVisionEmbeddings(nn.Module):
    """Class token and positions in front of patches; the same class token, without positions, in front of regions."""

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        self.config = config
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size, bias=False
        )
        num_positions = config.grid_size**2 + 1
        self.position_embedding = nn.Embedding(num_positions, config.hidden_size)
        self.position_ids = nn.Buffer(torch.arange(num_positions), persistent=False)
        # None in a backbone, which sees no regions.
        self.roi_projection: nn.Linear | None = nn.Linear(config.roi_feature_size + 4, config.hidden_size, bias=False)

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        roi_features: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> torch.Tensor:
        """(B, 3, H, W) pixels, or (B, K, F + 4) regions -> tokens (B, 1 + patches or K, D)."""
        if roi_features is not None and self.roi_projection is not None:
            tokens = self.roi_projection(roi_features)
        else:
            grid = self.patch_embedding(pixel_values)
            tokens = grid.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_embedding.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens], dim=1)
        if roi_features is not None:
            return tokens
        positions = self.position_embedding(self.position_ids)
        if interpolate_pos_encoding and grid.shape[2:] != (self.config.grid_size, self.config.grid_size):
            positions = resize_position_table(positions, *grid.shape[2:])
        return tokens + positions.to(tokens.dtype)
