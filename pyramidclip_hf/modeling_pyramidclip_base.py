# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What all model classes share: initialisation, gradient checkpointing, the inference form, resizing of positions.

The base class comes first, what it needs stands below it. It knows the towers' parts, not the models built of them.
"""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, Self, TypeAlias, overload

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel

from .configuration_pyramidclip import PyramidCLIPConfig
from .fusion_pyramidclip import LinearBackend, fuse_
from .modeling_pyramidclip_resnet import (
    PyramidCLIPAttentionPool,
    PyramidCLIPResNetBottleneck,
    PyramidCLIPResNetStage,
    resize_position_table,
)
from .modeling_pyramidclip_text import (
    PyramidCLIPAttention,
    PyramidCLIPEncoderLayer,
    PyramidCLIPTextEmbeddings,
    PyramidCLIPTextLayer,
)
from .modeling_pyramidclip_vit import PyramidCLIPVisionEmbeddings
from .saved_folders_pyramidclip import faults_named
from .versions_pyramidclip import HAS_ACTIVATION_CHECKPOINTING, NOT_CUSTOM_CODE

Source: TypeAlias = str | os.PathLike[str] | None


class PyramidCLIPPreTrainedModel(PreTrainedModel):
    """Base class: loading and saving, initialisation, gradient checkpointing."""

    config_class = PyramidCLIPConfig
    base_model_prefix = "pyramidclip"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    is_fused = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = [
        "PyramidCLIPTextEmbeddings",
        "PyramidCLIPVisionEmbeddings",
        "PyramidCLIPEncoderLayer",
        "PyramidCLIPTextLayer",
        "PyramidCLIPLeFFLayer",
        "PyramidCLIPResNetStem",
        "PyramidCLIPResNetBottleneck",
        "PyramidCLIPResNetShortcut",
        "PyramidCLIPAttentionPool",
    ]
    _can_record_outputs = {
        "hidden_states": [PyramidCLIPEncoderLayer, PyramidCLIPResNetStage],
        "attentions": [PyramidCLIPAttention],
    }

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # Transformers skips the blocks of custom code that hold no tensors of their own, because such code may write
        # over loaded weights. Ours does not (`init` leaves loaded tensors alone), and it initialises per block.
        super()._initialize_weights(module, **NOT_CUSTOM_CODE)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The reference's initialisation (docs/design.md, Towers), not Transformers' N(0, 0.02)."""
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            _init_like_torch(module)
        elif isinstance(module, (nn.LayerNorm, _BatchNorm)):
            super()._init_weights(module)
        elif isinstance(module, PyramidCLIPTextEmbeddings):
            init.normal_(module.token_embedding.weight, std=0.02)
            init.normal_(module.position_embedding.weight, std=0.01)
            init.copy_(module.position_ids, torch.arange(module.position_ids.shape[1])[None])
        elif isinstance(module, PyramidCLIPAttention):
            bound = math.sqrt(6 / (4 * module.q_proj.in_features))  # Xavier uniform over the packed (3 D, D) matrix
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init.uniform_(projection.weight, -bound, bound)
                init.zeros_(projection.bias)
            init.zeros_(module.out_proj.bias)
        elif isinstance(module, PyramidCLIPTextLayer):
            _init_text_layer(module)
        elif isinstance(module, PyramidCLIPVisionEmbeddings):
            std = module.config.hidden_size**-0.5
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.position_embedding.weight, std=std)
            if module.roi_projection is not None:
                init.normal_(module.roi_projection.weight, std=std)
            init.copy_(module.position_ids, torch.arange(len(module.position_ids)))
        elif isinstance(module, PyramidCLIPAttentionPool):
            std = module.config.hidden_size**-0.5
            init.normal_(module.position_embedding.weight, std=std)
            for projection in (module.roi_projection, module.q_proj, module.k_proj, module.v_proj):
                init.normal_(projection.weight, std=std)
            init.copy_(module.position_ids, torch.arange(len(module.position_ids)))
        elif isinstance(module, PyramidCLIPResNetBottleneck):
            init.zeros_(module.norm3.weight)
        for name in ("visual_projection", "text_projection"):
            if isinstance(head := getattr(module, name, None), nn.Linear):
                init.normal_(head.weight, std=head.in_features**-0.5)
        if isinstance(scale := getattr(module, "logit_scale", None), nn.Parameter):
            init.constant_(scale, self.config.logit_scale_init_value)

    def fuse(self, linear: LinearBackend = "auto") -> Self:
        """Turns the model into its inference form, in place, and returns it: the same outputs (1e-4 in fp32), faster.

        BatchNorm and QuickGELU's factor become part of the weights, see `fusion_pyramidclip.py`. Weights are frozen,
        and train(), state_dict() and save_pretrained() raise from then on; moving to another device or dtype goes on
        working, but what is fused is decided by where the model is when this is called: on a GPU a ResNet keeps its
        layers, as they are faster there. Other activations than QuickGELU stay as they are. A fused model stays as it
        is.

        Args:
            linear: `"onednn"` or `"torch"` for the fp32 products of linear layers on a CPU; `"auto"` measures (a tenth
                of a second) and takes oneDNN where it is clearly faster.

        Raises:
            ValueError: the model is in train mode, spread over devices, quantised, has no weights yet, or has adapters
                inside of its towers (on the projections they stay).
        """
        return fuse_(self, linear)

    def _refuse_if_fused(self, what: str) -> None:
        fused = next((module for module in self.modules() if getattr(module, "is_fused", False)), None)
        if fused is not None:
            raise RuntimeError(
                f"{what} needs the plain form, but fuse() has folded BatchNorm and activations of this "
                f"{type(fused).__name__} into its weights, which cannot be undone: load the model again with "
                "from_pretrained."
            )

    def train(self, mode: bool = True) -> Self:
        """As in the base class, but frozen BatchNorm stays in evaluation mode; a fused model cannot be trained."""
        if mode:
            self._refuse_if_fused("train()")
        super().train(mode)
        return self._hold_frozen_statistics()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in the base class; BatchNorm that is frozen here is in evaluation mode from now on."""
        super().requires_grad_(requires_grad)
        return self._hold_frozen_statistics()

    def _hold_frozen_statistics(self) -> Self:
        # Running statistics are part of what a frozen layer computes, and adapters do not save them.
        for module in self.modules():
            if isinstance(module, _BatchNorm) and module.affine:
                module.train(self.training and module.weight.requires_grad)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a fused model has weights that no plain one can load."""
        self._refuse_if_fused("state_dict()")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class; a fused model cannot take a plain one's weights."""
        self._refuse_if_fused("load_state_dict()")
        return super().load_state_dict(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in the base class; a fused model cannot be saved."""
        self._refuse_if_fused("save_pretrained()")
        return super().save_pretrained(*args, **kwargs)

    if not HAS_ACTIVATION_CHECKPOINTING:

        def activation_checkpointing_enable(
            self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
        ) -> None:
            """As newer versions of transformers have it, but for what older ones cannot do."""
            if every_n_layers != 1 or offload:
                raise ValueError("every_n_layers and offload need a newer version of transformers.")
            chosen = {"use_reentrant": False} | (activation_checkpointing_kwargs or {})
            self.gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        more = {} if every_n_layers == 1 else {"every_n_layers": every_n_layers}  # older versions do not know it
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **more)
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                run = partial(_checkpoint_layer, gradient_checkpointing_func, module)
                module._gradient_checkpointing_func = run  # type: ignore[assignment]  # a function, says transformers

    @overload
    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Source, *model_args: Any, output_loading_info: Literal[True], **kwargs: Any
    ) -> tuple[Self, dict[str, Any]]: ...

    @overload
    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        *model_args: Any,
        output_loading_info: Literal[False] = ...,
        **kwargs: Any,
    ) -> Self: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Source,
        *model_args: Any,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """As [`~transformers.PreTrainedModel.from_pretrained`], for another resolution where `image_size` is given.

        Args:
            pretrained_model_name_or_path: folder or id on the Hub.
            *model_args: as in the base class.
            image_size: side of the pictures in pixels; the image tower's positions are resized (bicubic) to it.
            **kwargs: as in the base class.

        Raises:
            FileNotFoundError: the folder is that of a run, which holds the model's.
            ValueError: `image_size` does not fit the tower, or the model has no image tower; a file of the folder is
                damaged, which the message names.
        """
        with faults_named(pretrained_model_name_or_path, kwargs.get("subfolder"), weights=True):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_size is not None:
            model.resize_image_positions(image_size)
        return loaded

    @torch.no_grad()
    def resize_image_positions(self, image_size: int) -> None:
        """Resizes the learned positions of the image tower to square pictures of `image_size` pixels, in place.

        Raises:
            ValueError: the size does not fit the tower, or the model has no image tower.
        """
        tower: Any = self if hasattr(self, "position_holder") else getattr(self, "vision_model", None)
        if tower is None:
            raise ValueError(f"{type(self).__name__} has no image tower, so image_size cannot be given.")
        old_size = tower.config.image_size
        tower.config.image_size = image_size
        try:
            tower.config.validate_architecture()
        except ValueError:
            tower.config.image_size = old_size
            raise
        holder, grid = tower.position_holder, tower.config.grid_size
        table = resize_position_table(holder.position_embedding.weight, grid, grid)
        holder.position_embedding = nn.Embedding.from_pretrained(table, freeze=False)
        holder.position_ids = nn.Buffer(torch.arange(len(table), device=table.device), persistent=False)
        vision_config = getattr(self.config, "vision_config", self.config)
        vision_config.image_size = image_size


def _checkpoint_layer(
    checkpoint_func: Callable[..., Any], layer: nn.Module, function: Callable[..., Any], *args: Any
) -> Any:
    """Runs `function` now and again in the backward pass, without counting the batch twice in BatchNorm statistics."""
    runs: list[int] = []

    def run(*args: Any) -> Any:
        again = frozen_batch_norm_statistics(layer) if runs else contextlib.nullcontext()
        runs.append(1)
        with again:
            return function(*args)

    return checkpoint_func(run, *args)


def _init_like_torch(module: nn.Linear | nn.Conv2d) -> None:
    """What `nn.Linear` and `nn.Conv2d` do to themselves: uniform within fan_in^-0.5."""
    if getattr(module, "weight", None) is None:  # quantised layers hold it elsewhere
        return
    bound = (module.weight.shape[1] * math.prod(module.weight.shape[2:])) ** -0.5
    init.uniform_(module.weight, -bound, bound)
    if module.bias is not None:
        init.uniform_(module.bias, -bound, bound)


def _init_text_layer(layer: PyramidCLIPTextLayer) -> None:
    width, depth = layer.self_attn.config.hidden_size, layer.self_attn.config.num_hidden_layers
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        init.normal_(projection.weight, std=width**-0.5)
    for projection in (layer.self_attn.out_proj, layer.mlp.fc2):
        init.normal_(projection.weight, std=width**-0.5 * (2 * depth) ** -0.5)
    init.normal_(layer.mlp.fc1.weight, std=(2 * width) ** -0.5)


@contextlib.contextmanager
def frozen_batch_norm_statistics(module: nn.Module) -> Iterator[None]:
    """Within it, BatchNorm layers of `module` in train mode use batch statistics and leave the running ones alone."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    kept = [(layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer, (_, num_batches_tracked) in zip(layers, kept, strict=True):
        # Momentum 0 rather than no statistics at all: a checkpointed block must save the same tensors when it reruns.
        layer.momentum = 0.0
        if num_batches_tracked is not None:
            layer.num_batches_tracked = num_batches_tracked.clone()
    try:
        yield
    finally:
        for layer, (momentum, num_batches_tracked) in zip(layers, kept, strict=True):
            layer.momentum, layer.num_batches_tracked = momentum, num_batches_tracked


__all__ = ["PyramidCLIPPreTrainedModel", "frozen_batch_norm_statistics"]
