# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The inference form of a model, which `model.fuse()` makes of it in place: the same function with fewer operations.

- BatchNorm becomes part of the weights beside it (LeFF, ResNet).
- QuickGELU is `x * sigmoid(1.702 x) = silu(1.702 x) / 1.702`: both factors go into the weights around it, and what
  remains is one SiLU in place.
- Query, key and value are one product; residuals are added in place.
- Where one token alone is wanted (attention pooling, last block), keys and values are never computed: the query goes
  through the key weights instead, and the weighted mean of the tokens through the value weights.
- ResNet: channels-last, activation and residual sum inside of oneDNN's convolution, where torch has that operation. On
  a GPU it stays as it is: cuDNN's own path was faster on an H200 (docs/speed.md).
- Linear layers in fp32 go through oneDNN where that is faster than torch's own choice on this processor.

Shape letters: B batch, L tokens, D width, H heads, d = D / H.
"""

import time
from collections.abc import Iterator
from functools import cache, partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_mask
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from .modeling_pyramidclip_resnet import (
    PyramidCLIPAttentionPool,
    PyramidCLIPResNet,
    PyramidCLIPResNetBottleneck,
    PyramidCLIPResNetShortcut,
    PyramidCLIPResNetStage,
    PyramidCLIPResNetStem,
)
from .modeling_pyramidclip_text import (
    QUICK_GELU_SLOPE,
    AttentionMask,
    PyramidCLIPAttention,
    PyramidCLIPEncoder,
    PyramidCLIPEncoderLayer,
    PyramidCLIPLayerNorm,
    PyramidCLIPMLP,
    PyramidCLIPQuickGELU,
    eager_attention_forward,
    is_traced,
    take_position,
)
from .modeling_pyramidclip_vit import PyramidCLIPLeFF, PyramidCLIPLeFFLayer

LinearBackend = Literal["auto", "torch", "onednn"]
Model = TypeVar("Model", bound=PreTrainedModel)
# What oneDNN must save before it replaces torch's own choice: timings on a busy machine vary by about a tenth.
_CLEARLY_FASTER = 0.85
# Whose layers end up in others, and what these layers may be.
_TAKEN_APART = (
    PyramidCLIPAttention,
    PyramidCLIPMLP,
    PyramidCLIPLeFF,
    PyramidCLIPResNetStem,
    PyramidCLIPResNetShortcut,
    PyramidCLIPResNetBottleneck,
    PyramidCLIPAttentionPool,
)
# Where a plain part is `Any` below, `_check` has looked at what it holds: a list of modules knows no type of its items.
_PLAIN_LAYERS = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, PyramidCLIPLayerNorm, nn.Embedding)


def fuse_(model: Model, linear: LinearBackend = "auto") -> Model:
    """See [`PyramidCLIPPreTrainedModel.fuse`]."""
    if linear not in ("auto", "torch", "onednn"):
        raise ValueError(f'linear must be "auto", "torch" or "onednn", got {linear!r}.')
    if getattr(model, "is_fused", False):
        return model
    _check(model)
    if linear == "onednn" and not _has_operations("_linear_pointwise"):
        raise ValueError('linear="onednn" needs a torch whose CPU build has oneDNN; pass linear="auto" or "torch".')
    with torch.no_grad():
        for _, module in list(_plain_modules(model)):
            _fuse_parts(module, linear)
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            # The recorders of hidden states and attentions sat on modules that are gone: the next call sets new ones.
            vars(module).update(is_fused=True, _output_capturing_hooks_installed=False)
    return model.requires_grad_(False)


def _plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` without the towers that were fused before."""
    if not getattr(module, "is_fused", False):
        yield name, module
        for child_name, child in module.named_children():
            yield from _plain_modules(child, f"{name}.{child_name}".removeprefix("."))


def _check(model: nn.Module) -> None:
    """Refuses models whose parts are not what this file can fold, before anything is changed."""
    if model.training:
        raise ValueError("fuse() is for inference and cannot be undone, but the model is in train mode: call eval().")
    for name, module in _plain_modules(model):
        if hasattr(module, "_hf_hook"):
            raise ValueError(f"{name or 'The model'} is dispatched to devices: call fuse() first, without device_map.")
        for child_name, child in module.named_children() if isinstance(module, _TAKEN_APART) else ():
            # By type and not by subclass: what wraps a layer (adapters, quantisation) has its weight, not its function.
            if child_name not in ("activation_fn", "shortcut") and type(child) not in _PLAIN_LAYERS:
                raise ValueError(
                    f"{name}.{child_name} is a {type(child).__name__}: expected plain layers, without adapters, "
                    "quantisation or parametrisation. Merge adapters first; a quantised model cannot be fused."
                )
        if isinstance(module, _BatchNorm) and not module.track_running_stats:
            raise ValueError(f"{name} keeps no running statistics, so there is nothing to fold.")
        for kind, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(f"{name}.{kind} has no values yet (meta device): load the weights first.")
            if type(parameter.data) is not torch.Tensor:  # torchao's layers are plain ones, their weights are not
                raise ValueError(
                    f"{name}.{kind} is a {type(parameter.data).__name__}: expected plain weights. A quantised or "
                    "distributed model cannot be fused."
                )
            if not parameter.is_floating_point():
                raise ValueError(f"{name}.{kind} is {parameter.dtype}: only floating-point weights can be fused.")


def _fuse_parts(module: nn.Module, linear: LinearBackend) -> None:
    """Replaces what `module` holds directly; children are visited by the caller."""
    if isinstance(module, PyramidCLIPEncoder):
        # One after the other, so that only one block is in memory twice.
        for index, layer in enumerate(module.layers):
            fused = FusedLeFFLayer if isinstance(layer, PyramidCLIPLeFFLayer) else FusedLayer
            module.layers[index] = fused(layer, linear)
    elif isinstance(module, PyramidCLIPResNet) and not _on_gpu(module):
        module.add_module("stem", FusedStem(module.stem))
        for index, stage in enumerate(module.stages):
            module.stages[index] = FusedStage(stage)
    for name, child in module.named_children():
        if type(child) is PyramidCLIPAttentionPool and not _on_gpu(child):
            setattr(module, name, FusedAttentionPool(child))


def _on_gpu(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "cuda"


# ------------------------------------------------------------------------------------------------------ linear layers


class OneDNNLinear(nn.Linear):
    """`nn.Linear` whose fp32 product on a CPU is oneDNN's; torch itself would call MKL."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D_in) -> (..., D_out)."""
        if (
            hidden_states.device.type != "cpu"
            or hidden_states.dtype != torch.float32
            or self.weight.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or _has_gradient(hidden_states)
            or is_traced()
        ):
            return super().forward(hidden_states)
        return torch.ops.mkldnn._linear_pointwise(hidden_states, self.weight, self.bias, "none", [], "")


def _has_operations(*names: str) -> bool:
    """Whether torch has these operations of its own graph compiler; they are not a public interface."""
    if not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in names)


def _has_gradient(hidden_states: torch.Tensor) -> bool:
    """Whether somebody wants the gradient to the inputs; weights have none any more."""
    return torch.is_grad_enabled() and hidden_states.requires_grad


@cache
def _onednn_is_faster(width: int, threads: int, tokens: int = 512) -> bool:
    """Measures one product of the MLP's shape both ways; `threads` is a key only, other counts have other answers."""
    if not _has_operations("_linear_pointwise"):
        return False
    with torch.inference_mode():
        ones = partial(torch.ones, dtype=torch.float32, device="cpu")  # whatever the defaults are
        states, weight = ones(tokens, width), ones(4 * width, width)
        seconds: dict[str, list[float]] = {"torch": [], "onednn": []}
        for _ in range(4):
            for name, run in (
                ("torch", lambda: F.linear(states, weight)),
                ("onednn", lambda: torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")),
            ):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return min(seconds["onednn"][1:]) < _CLEARLY_FASTER * min(seconds["torch"][1:])


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, like: torch.Tensor, linear: LinearBackend) -> nn.Linear:
    """A linear layer of these values in the dtype of `like`."""
    use_onednn = linear == "onednn" or (
        linear == "auto"
        and (like.device.type, like.dtype) == ("cpu", torch.float32)
        and _onednn_is_faster(min(weight.shape), torch.get_num_threads())
    )
    kind, (width_out, width_in) = OneDNNLinear if use_onednn else nn.Linear, weight.shape
    layer = kind(width_in, width_out, bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to(like.dtype).contiguous())
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(like.dtype))
    return layer.eval()


# ------------------------------------------------------------------------------------------------------------ folding


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least fp32: folding in bf16 would round twice."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _folded(layer: nn.Linear | nn.Conv2d, norm: _BatchNorm | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of `layer` with `norm` behind it."""
    weight = _wide(layer.weight)
    bias = weight.new_zeros(len(weight)) if layer.bias is None else _wide(layer.bias)
    if norm is None:
        return weight, bias
    mean: Any = norm.running_mean  # it and the variance are there: `_check` has looked
    variance: Any = norm.running_var
    fold = fuse_conv_bn_weights if isinstance(layer, nn.Conv2d) else fuse_linear_bn_weights
    return fold(weight, bias, mean, _wide(variance), norm.eps, norm.weight, norm.bias)


def _activation(function: nn.Module) -> tuple[nn.Module, float]:
    """(f, s) with `f(s x) / s` equal to `function(x)`; QuickGELU becomes SiLU, everything else stays itself."""
    if type(function) is PyramidCLIPQuickGELU:
        return nn.SiLU(inplace=True), QUICK_GELU_SLOPE
    return function, 1.0


# ------------------------------------------------------------------------------------------------- transformer blocks


def attend_from_one_token(
    query: torch.Tensor,
    tokens: torch.Tensor,
    key_weight: torch.Tensor,
    value_weight: torch.Tensor,
    value_bias: torch.Tensor,
    scaling: float,
    mask: AttentionMask = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query a row without computing keys and values.

    `q . (K x + c)` is `(K^T q) . x` plus a number that is the same for all x, which softmax ignores; and a weighted
    mean of `V x + e` is V times the weighted mean of x, plus e.

    Args:
        query: (B, H, d), projected.
        tokens: (B, L, D).
        key_weight: (D, D).
        value_weight: (D, D).
        value_bias: (D,).
        scaling: factor of the scores.
        mask: (B or 1, 1, 1, L), bool (True = seen) or to be added to the scores; or flash attention's (B, L), or flex
            attention's BlockMask.

    Returns:
        (B, D) and the weights (B, H, 1, L).
    """
    heads = query.shape[1]
    looked_for = torch.einsum("bhd,hdw->bhw", query, key_weight.unflatten(0, (heads, -1)))
    scores = torch.matmul(looked_for, tokens.transpose(1, 2)) * scaling
    if mask is not None:
        if not isinstance(mask, torch.Tensor):
            mask = create_mask(mask.mask_mod, len(scores), 1, 1, tokens.shape[1], device=tokens.device)
        mask = mask[:, None].bool() if mask.ndim == 2 else mask[:, 0]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(tokens.dtype)
    means = torch.matmul(weights, tokens)
    values = torch.einsum("bhw,hdw->bhd", means, value_weight.unflatten(0, (heads, -1)))
    return values.flatten(1) + value_bias, weights.unsqueeze(2)


class FusedAttention(PyramidCLIPAttention):
    """One product for query, key and value; for one query, none for keys and values at all."""

    def __init__(self, plain: PyramidCLIPAttention, linear: LinearBackend):
        nn.Module.__init__(self)
        self.config, self.head_dim, self.scaling = plain.config, plain.head_dim, plain.scaling
        self.is_causal = plain.is_causal
        parts = [_folded(projection) for projection in (plain.q_proj, plain.k_proj, plain.v_proj)]
        weight, bias = (torch.cat(column) for column in zip(*parts))
        self.qkv_proj = _linear(weight, bias, plain.q_proj.weight, linear)
        self.out_proj = _linear(*_folded(plain.out_proj), plain.q_proj.weight, linear)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        query_states: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As [`PyramidCLIPAttention`]."""
        if query_states is not None:
            return self._attend_from_one(hidden_states, attention_mask, query_states)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (part.view(shape).transpose(1, 2) for part in self.qkv_proj(hidden_states).chunk(3, dim=-1))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.out_proj(output.reshape(hidden_states.shape)), weights

    def _attend_from_one(
        self, hidden_states: torch.Tensor, mask: AttentionMask, query_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        weights, biases = self.qkv_proj.weight.chunk(3), self.qkv_proj.bias.chunk(3)
        query = F.linear(query_states[:, 0], weights[0], biases[0]).unflatten(-1, (-1, self.head_dim))
        output, seen = attend_from_one_token(
            query, hidden_states, weights[1], weights[2], biases[2], self.scaling, mask
        )
        return self.out_proj(output.unsqueeze(1)), seen


class FusedLayer(PyramidCLIPEncoderLayer):
    """A block without LeFF."""

    def __init__(self, plain: Any, linear: LinearBackend):
        nn.Module.__init__(self)
        self.self_attn = FusedAttention(plain.self_attn, linear)
        self.layer_norm1, self.layer_norm2 = plain.layer_norm1, plain.layer_norm2
        self._take_feed_forward(plain.mlp, linear)
        self.eval()

    def _take_feed_forward(self, mlp: Any, linear: LinearBackend) -> None:
        self.activation, slope = _activation(mlp.activation_fn)
        like = mlp.fc1.weight
        weight, bias = _folded(mlp.fc1)
        self.fc1 = _linear(slope * weight, slope * bias, like, linear)
        weight, bias = _folded(mlp.fc2)
        self.fc2 = _linear(weight / slope, bias, like, linear)

    def _add_feed_forward(
        self, hidden_states: torch.Tensor, normed: torch.Tensor, grid_size: tuple[int, int] | None
    ) -> torch.Tensor:
        """Adds to `hidden_states`, in place where no graph is recorded."""
        return hidden_states.add_(self.fc2(self.activation(self.fc1(normed))))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        grid_size: tuple[int, int] | None = None,
        query_at: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """As [`PyramidCLIPEncoderLayer`]. What it is given stays as it was: somebody may keep hidden states."""
        normed, queries = self.layer_norm1(hidden_states), None
        if query_at is not None:
            hidden_states, queries = take_position(hidden_states, query_at), take_position(normed, query_at)
        attended, _ = self.self_attn(normed, attention_mask, queries, **kwargs)
        # Under autocast the residual is wider than what is added to it, and must stay so.
        same = attended.dtype == hidden_states.dtype
        hidden_states = attended.add_(hidden_states) if same else hidden_states + attended
        normed = self.layer_norm2(hidden_states)
        if _has_gradient(hidden_states):  # which needs what LayerNorm saw
            hidden_states = hidden_states.clone()
        return self._add_feed_forward(hidden_states, normed, grid_size)


class FusedLeFFLayer(FusedLayer):
    """A block with LeFF: three BatchNorms in the weights, three activations in place, tokens always channels-last."""

    def _take_feed_forward(self, mlp: Any, linear: LinearBackend) -> None:
        self.activation, self.slope = _activation(mlp.activation_fn)
        like, slope = mlp.fc1.weight, self.slope
        weight, bias = _folded(mlp.fc1, mlp.norm1)
        self.fc1 = _linear(slope * weight, slope * bias, like, linear)
        # Each activation gives `slope` times the plain one and wants `slope` times its input, so weights stay.
        weight, bias = _folded(mlp.depthwise, mlp.norm2)
        self.depthwise = _convolution(mlp.depthwise, weight, slope * bias, like)
        weight, bias = _folded(mlp.fc2, mlp.norm3)
        self.fc2 = _linear(weight, slope * bias, like, linear)

    def _add_feed_forward(self, hidden_states: torch.Tensor, normed: torch.Tensor, grid_size: Any) -> torch.Tensor:
        batch, width = hidden_states.shape[0], hidden_states.shape[2]
        tokens = self.activation(self.fc1(normed[:, 1:].reshape(-1, width)))
        grid = tokens.view(batch, *grid_size, -1).permute(0, 3, 1, 2)
        grid = self.activation(self.depthwise(grid))
        tokens = self.activation(self.fc2(grid.permute(0, 2, 3, 1).reshape(tokens.shape)))
        tokens = tokens.view(batch, -1, width)
        if is_traced():  # a slice that is written in place is a scatter in a graph, over which Inductor fails in bf16
            first, patches = hidden_states.split([1, hidden_states.shape[1] - 1], dim=1)
            return torch.cat([first + normed[:, :1], torch.add(patches, tokens, alpha=1 / self.slope)], dim=1)
        hidden_states[:, 1:].add_(tokens, alpha=1 / self.slope)
        hidden_states[:, :1].add_(normed[:, :1])
        return hidden_states


# ------------------------------------------------------------------------------------------------------------- ResNet


def _convolution(plain: nn.Conv2d, weight: torch.Tensor, bias: torch.Tensor, like: torch.Tensor) -> nn.Conv2d:
    """`plain` with these values, channels-last, in the dtype of `like`."""
    names = ("kernel_size", "stride", "padding", "dilation", "groups")
    options: dict[str, Any] = {name: getattr(plain, name) for name in names}
    layer = nn.Conv2d(plain.in_channels, plain.out_channels, **options, device="meta")
    layer.weight = nn.Parameter(weight.to(like.dtype).contiguous(memory_format=torch.channels_last))
    layer.bias = nn.Parameter(bias.to(like.dtype))
    return layer.eval()


class FusedConvolution(nn.Module):
    """A convolution with its BatchNorm, the ReLU behind it and, where there is one, the residual in front of that."""

    def __init__(self, convolution: nn.Conv2d, norm: _BatchNorm):
        super().__init__()
        self.convolution = _convolution(convolution, *_folded(convolution, norm), convolution.weight)
        self.post_operations = _has_operations("_convolution_pointwise", "_convolution_pointwise_")
        self.eval()

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = True
    ) -> torch.Tensor:
        """(B, C, H, W) channels-last -> the same; `residual` is overwritten with the result."""
        if not self._can_post_operate(hidden_states):
            output = self.convolution(hidden_states)
            output = output if residual is None else output.add_(residual)
            return output.relu_() if relu else output
        plain = self.convolution
        parameters = (plain.weight, plain.bias, plain.padding, plain.stride, plain.dilation, plain.groups)
        if residual is None:
            return torch.ops.mkldnn._convolution_pointwise(
                hidden_states, *parameters, "relu" if relu else "none", [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, hidden_states, *parameters, "add", 1.0, "relu" if relu else None, [], ""
        )

    def _can_post_operate(self, hidden_states: torch.Tensor) -> bool:
        return (
            self.post_operations
            and hidden_states.device.type == "cpu"
            and hidden_states.dtype == self.convolution.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu")
            and not _has_gradient(hidden_states)
            and not is_traced()
        )


class FusedStem(nn.Module):
    """As [`PyramidCLIPResNetStem`]."""

    def __init__(self, plain: PyramidCLIPResNetStem):
        super().__init__()
        self.conv1 = FusedConvolution(plain.conv1, plain.norm1)
        self.conv2 = FusedConvolution(plain.conv2, plain.norm2)
        self.conv3 = FusedConvolution(plain.conv3, plain.norm3)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, width, H / 4, W / 4), channels-last."""
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        return F.avg_pool2d(self.conv3(self.conv2(self.conv1(pixel_values))), 2)


class FusedBottleneck(nn.Module):
    """As [`PyramidCLIPResNetBottleneck`]; without a shortcut of its own it overwrites its input."""

    def __init__(self, plain: Any):
        super().__init__()
        self.stride = plain.stride
        self.conv1 = FusedConvolution(plain.conv1, plain.norm1)
        self.conv2 = FusedConvolution(plain.conv2, plain.norm2)
        self.conv3 = FusedConvolution(plain.conv3, plain.norm3)
        projects = not isinstance(plain.shortcut, nn.Identity)
        self.shortcut = FusedConvolution(plain.shortcut.conv, plain.shortcut.norm) if projects else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, 4 * width, H / stride, W / stride)."""
        residual = hidden_states
        hidden_states = self.conv2(self.conv1(hidden_states))
        if self.stride > 1:
            hidden_states = F.avg_pool2d(hidden_states, self.stride)
        if self.shortcut is not None:
            residual = F.avg_pool2d(residual, self.stride) if self.stride > 1 else residual
            residual = self.shortcut(residual, relu=False)
        return self.conv3(hidden_states, residual)


class FusedStage(PyramidCLIPResNetStage):
    """As [`PyramidCLIPResNetStage`]. Its first block has a shortcut of its own, so that its input stays as it was."""

    def __init__(self, plain: Any):
        nn.Module.__init__(self)
        self.layers = nn.ModuleList(FusedBottleneck(layer) for layer in plain.layers)
        self.eval()


class FusedAttentionPool(PyramidCLIPAttentionPool):
    """The attention pooling for its one query: neither keys nor values of the other tokens."""

    def __init__(self, plain: PyramidCLIPAttentionPool):
        nn.Module.__init__(self)
        self.config, self.head_dim, self.scaling = plain.config, plain.head_dim, plain.scaling
        self.position_ids = nn.Buffer(plain.position_ids, persistent=False)
        for name, child in plain.named_children():
            setattr(self, name, child)
        self.eval()

    def _attend(self, tokens: torch.Tensor, mask: AttentionMask, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        query = self.q_proj(tokens[:, 0]).unflatten(-1, (-1, self.head_dim))
        value = self.v_proj
        return attend_from_one_token(query, tokens, self.k_proj.weight, value.weight, value.bias, self.scaling, mask)


__all__ = ["fuse_"]
