# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The text tower's parts, and the attention block that the ViT shares with it.

Read from the top: activation and LayerNorm, attention, MLP, block, then the text embeddings, what pooling makes of
token ids and hidden states.
The model classes are in `modeling_pyramidclip.py`, all initialisation is in `modeling_pyramidclip_base.py`.
Shape letters: B batch, L tokens, D width, H heads.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_pyramidclip import PyramidCLIPTextConfig, TowerConfig
from .half_weights_pyramidclip import casts_weights, weights_in_half
from .versions_pyramidclip import DEVICE_ONLY

QUICK_GELU_SLOPE = 1.702
# What an attention backend takes: bool (True = seen) or added to the scores, (B or 1, 1, Q, L); flash attention's
# (B, L); flex attention's own; None where every token sees all.
AttentionMask: TypeAlias = torch.Tensor | BlockMask | None
# (rows, tokens) of each part of packed tokens (1, sum of rows x tokens, D): one text after another, those of a part of
# one length. Only attention knows the parts; all else is one operation over all of them.
Packing: TypeAlias = tuple[tuple[int, int], ...]


class _QuickGELU(torch.autograd.Function):
    """One operation forward, two backward, one tensor kept; written out these are seven over two tensors."""

    generate_vmap_rule = True

    @staticmethod
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return _quick_gelu(hidden_states)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        scaled = QUICK_GELU_SLOPE * ctx.saved_tensors[0]
        if torch.is_grad_enabled():  # silu_backward has no derivative
            sigmoid = scaled.sigmoid()
            return grad * sigmoid * (1 + scaled * (1 - sigmoid))
        return torch.ops.aten.silu_backward(grad, scaled)


def _quick_gelu(hidden_states: torch.Tensor) -> torch.Tensor:
    # The derivative of softplus(x) / 1.702 is the sigmoid, and torch multiplies it by what came, here x: one kernel.
    # Beyond 40 the sigmoid is 1 in fp64 too.
    return torch.ops.aten.softplus_backward(hidden_states, hidden_states, QUICK_GELU_SLOPE, 40)


class PyramidCLIPQuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Any shape -> the same."""
        if is_traced():  # SiLU is what every graph format knows, and compilers fuse the products into it
            return F.silu(QUICK_GELU_SLOPE * hidden_states).mul_(1 / QUICK_GELU_SLOPE)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            return _QuickGELU.apply(hidden_states)
        return _quick_gelu(hidden_states)


class PyramidCLIPLayerNorm(nn.LayerNorm):
    """Computes in fp32 and returns what came, under autocast too, so that the residual stream keeps its dtype there."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        dtype, device_type = hidden_states.dtype, hidden_states.device.type
        if dtype not in (torch.bfloat16, torch.float16) or not torch.is_autocast_enabled(device_type):
            return super().forward(hidden_states)
        with torch.autocast(device_type, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(hidden_states, self.normalized_shape, weight, bias, self.eps)


def in_autocast_dtype(hidden_states: torch.Tensor) -> torch.Tensor:
    """In the dtype of autocast, where it is on and the states are fp32: the residual stream begins so."""
    device_type = hidden_states.device.type
    if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device_type):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device_type))


def is_traced() -> bool:
    """Whether a graph is being recorded, which must not depend on the values of this batch or on this processor."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def activation_named(name: str) -> nn.Module:
    """The activation that `config.hidden_act` names."""
    return PyramidCLIPQuickGELU() if name == "quick_gelu" else ACT2FN[name]


def mask_of_keys(
    config: TowerConfig, queries: torch.Tensor, keys: torch.Tensor, states: torch.Tensor | None = None
) -> AttentionMask:
    """The mask that lets `queries` (B, Q, D) see the tokens where `keys` (B, L) is True.

    `states` (B, L, D) are these tokens where they are not the queries themselves.
    """
    return create_bidirectional_mask(config, queries, keys, encoder_hidden_states=states, **DEVICE_ONLY)


def keys_with_first(keys: torch.Tensor) -> torch.Tensor:
    """(B, L) bool -> (B, 1 + L), True in front: what `mask_of_keys` takes where a token that all see comes first."""
    # Each number is read from inside of `keys`. Of a concatenation along the last dimension, and of a write into place,
    # torch.compile makes CPU code that loads from one number before its start: at the start of a page, a fault.
    place = torch.arange(-1, keys.shape[1], device=keys.device)
    return keys[:, place.clamp(min=0)] | (place < 0)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; q, k, v are (B, H, L, D / H). Returns (B, L, H, D / H) and the weights (B, H, L, L)."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PyramidCLIPAttention(nn.Module):
    """Multi-head self-attention through transformers' attention interface."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        query_states: torch.Tensor | None = None,
        *,
        packing: Packing | None = None,
        projection: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, L, D) -> (B, L, D) and the weights (B, H, L, L), `None` where the backend has none.

        `query_states` (B, Q, D) are the tokens that look at all L; then Q stands in place of the first L. All L look
        where it is not given. With `packing`, all of it is packed, masks are one for each part, and the weights `None`.
        `projection` are weight (3 D, D) and bias (3 D) of the three layers, where one product is to do their work.
        """
        query, key, value = self._projected(hidden_states, query_states, projection)
        query_states = hidden_states if query_states is None else query_states
        if packing is None:
            output, weights = self._attend(query, key, value, attention_mask, hidden_states.shape[0], **kwargs)
            return self.out_proj(output.reshape(query_states.shape)), weights
        looking = [tokens if query_states is hidden_states else 1 for _, tokens in packing]
        sizes = [rows * tokens for rows, tokens in packing]
        parts = zip(
            query.split([rows * tokens for (rows, _), tokens in zip(packing, looking)], dim=1),
            key.split(sizes, dim=1),
            value.split(sizes, dim=1),
            attention_mask if isinstance(attention_mask, tuple) else [None] * len(packing),
            [rows for rows, _ in packing],
        )
        outputs = [self._attend(*part, **kwargs)[0].reshape(1, -1, query.shape[-1]) for part in parts]
        return self.out_proj(torch.cat(outputs, dim=1)), None

    def _projected(
        self,
        hidden_states: torch.Tensor,
        query_states: torch.Tensor | None,
        projection: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> Sequence[torch.Tensor]:
        if projection is None:
            query = self.q_proj(hidden_states if query_states is None else query_states)
            return query, self.k_proj(hidden_states), self.v_proj(hidden_states)
        if query_states is None:
            return F.linear(hidden_states, *projection).chunk(3, dim=-1)
        width = hidden_states.shape[-1]
        of_query, of_others = zip(*(part.split([width, 2 * width]) for part in projection))
        return F.linear(query_states, *of_query), *F.linear(hidden_states, *of_others).chunk(2, dim=-1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, rows: int, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (rows, -1, self.config.num_attention_heads, self.head_dim)
        query, key, value = (states.view(shape).transpose(1, 2) for states in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, mask, scaling=self.scaling, dropout=dropout, **kwargs)


class PyramidCLIPMLP(nn.Module):
    """The feed-forward part."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.activation_fn = activation_named(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, L, D)."""
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class PyramidCLIPEncoderLayer(GradientCheckpointingLayer):
    """A pre-LN transformer block. Subclasses change the feed-forward part only.

    Attributes:
        casts_ahead: under autocast, its weights are cast together before it computes.
    """

    mlp: nn.Module
    casts_ahead = True

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.self_attn = PyramidCLIPAttention(config)
        self.layer_norm1 = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PyramidCLIPMLP(config)
        self.layer_norm2 = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def feed_forward(
        self, hidden_states: torch.Tensor, grid_size: tuple[int, int] | None, views: int = 1
    ) -> torch.Tensor:
        """(B, L, D) after the second LayerNorm -> what is added to the tokens."""
        return self.mlp(hidden_states)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `compute`: transformers puts gradient checkpointing around this, and what is compiled lies inside."""
        if is_traced() or not (self.casts_ahead and casts_weights(self, hidden_states)):
            return self.compute(hidden_states, *args, **kwargs)
        read_alike = (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        with weights_in_half(self, hidden_states, PyramidCLIPLayerNorm, read_alike) as projection:
            return self.compute(hidden_states, *args, projection=projection, **kwargs)

    def compute(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        grid_size: tuple[int, int] | None = None,
        query_at: torch.Tensor | None = None,
        *,
        views: int = 1,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """(B, L, D) -> (B, L, D), or (B, 1, D) where `query_at` names the only positions (B,) that are wanted.

        For LeFF, `grid_size` is the patch grid's (rows, columns), and the rows hold `views` BatchNorm batches of equal
        size. Packed tokens stay packed, and (1, sum of rows, D) is what `query_at` leaves of them.
        """
        normed, queries = self.layer_norm1(hidden_states), None
        if query_at is not None:
            take = take_position if packing is None else take_packed
            hidden_states, queries = take(hidden_states, query_at), take(normed, query_at)
        attended, _ = self.self_attn(normed, attention_mask, queries, packing=packing, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.layer_norm2(hidden_states), grid_size, views)


class PyramidCLIPTextLayer(PyramidCLIPEncoderLayer):
    """A block of the text tower: the same computation under another initialisation (see `_init_weights`)."""

    mlp: PyramidCLIPMLP


class PyramidCLIPEncoder(nn.Module):
    """A stack of blocks, built by the tower that owns it."""

    def __init__(self, layers: Iterable[PyramidCLIPEncoderLayer]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: AttentionMask = None,
        first: int = 0,
        query_at: torch.Tensor | None = None,
        query_mask: AttentionMask = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Runs the blocks from number `first` on: (B, L, D) -> (B, L, D).

        Where only the positions `query_at` (B,) of the result are wanted, the last block computes no others:
        (B, 1, D). `query_mask` is its attention mask, for one query a row.
        """
        layers = self.layers[first:]
        last = len(layers) if query_at is None else len(layers) - 1
        for layer in layers[:last]:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        for layer in layers[last:]:
            kwargs["is_causal"] = False  # the mask says what the one query may see
            hidden_states = layer(hidden_states, query_mask, query_at=query_at, **kwargs)
        return hidden_states


class PyramidCLIPTextEmbeddings(nn.Module):
    """Token plus learned positional embedding."""

    def __init__(self, config: PyramidCLIPTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.position_ids = nn.Buffer(torch.arange(config.max_position_embeddings)[None], persistent=False)

    def forward(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, packing: Packing | None = None
    ) -> torch.Tensor:
        """(B, L) ids -> (B, L, D); packed ids (1, T) -> (1, T, D)."""
        if packing is not None:
            return self._embed_packed(input_ids, packing)
        if position_ids is None:
            position_ids = self.position_ids[:, : input_ids.shape[1]]
        return in_autocast_dtype(self.token_embedding(input_ids) + self.position_embedding(position_ids))

    def _embed_packed(self, input_ids: torch.Tensor, packing: Packing) -> torch.Tensor:
        longest = max(tokens for _, tokens in packing)
        positions = in_autocast_dtype(self.position_embedding(self.position_ids[0, :longest]))
        tokens = unpacked(in_autocast_dtype(self.token_embedding(input_ids)), packing)
        return torch.cat([(part + positions[: part.shape[1]]).flatten(0, 1) for part in tokens])[None]


def packed(input_ids: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Ids (B, L) of all parts one after another, padded to the longest -> (1, T)."""
    parts = input_ids.split([rows for rows, _ in packing])
    return torch.cat([part[:, :tokens].flatten() for part, (_, tokens) in zip(parts, packing)])[None]


def unpacked(states: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """(1, T, ...) -> for each part (rows, tokens, ...)."""
    parts = states[0].split([rows * tokens for rows, tokens in packing])
    return [part.unflatten(0, shape) for part, shape in zip(parts, packing)]


def refuse_no_tensor(name: str, value: object, floats: bool) -> None:
    """Raises `ValueError` for an input that is no tensor, or one of integers where floats are wanted, or the reverse.

    A processor gives lists without `return_tensors`; a picture's bytes would be encoded as if they were normalised.
    """
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f'{name} must be a tensor, got {type(value).__name__}: call the processor with return_tensors="pt".'
        )
    if value.is_floating_point() != floats:
        raise ValueError(f"{name} must be {'floats' if floats else 'integers'} of the processor, got {value.dtype}.")


def checked_input_ids(input_ids: torch.Tensor | None, config: PyramidCLIPTextConfig) -> torch.Tensor:
    """The ids, refused where the tower cannot encode them: none, no integers, another rank, no texts, too many.

    Raises:
        ValueError: with what was expected and what came.
    """
    if input_ids is None:
        raise ValueError("The text tower needs input_ids of shape (batch_size, sequence_length), got None.")
    refuse_no_tensor("input_ids", input_ids, floats=False)
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be a non-empty (batch_size, sequence_length) tensor, got shape {tuple(input_ids.shape)}."
        )
    if input_ids.shape[1] > config.max_position_embeddings:
        raise ValueError(
            f"input_ids holds {input_ids.shape[1]} tokens, the model has {config.max_position_embeddings} positions: "
            "tokenize with truncation=True (the processor's default), which keeps the end token."
        )
    return input_ids


def text_starts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, config: PyramidCLIPTextConfig
) -> torch.Tensor:
    """(B,) where each row's text starts: behind padding on its left, which a mask hides or pad or end ids fill.

    Without a mask only the start-of-text id tells such padding from a text.
    """
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    starts = kept & (input_ids == config.bos_token_id)
    filling = ~kept | (input_ids == config.eos_token_id)
    if config.pad_token_id is not None:
        filling = filling | (input_ids == config.pad_token_id)
    first = starts.int().argmax(dim=1)
    leading = ((~filling).int().cumsum(dim=1) == 0).sum(dim=1)  # cumprod is unknown to ONNX
    is_padded = starts.any(dim=1) & (first <= leading)
    return torch.where(is_padded, first, kept.int().argmax(dim=1))


def moved_left(rows: torch.Tensor, starts: torch.Tensor, filler: torch.Tensor | int) -> torch.Tensor:
    """Rows (B, L) from their starts (B,) on, `filler` (1, L) or a number at their ends; as they are from 0 on."""
    wanted = starts[:, None] + torch.arange(rows.shape[1], device=rows.device)
    last = rows.shape[1] - 1
    return torch.where(wanted > last, filler, rows.gather(1, wanted.clamp(max=last)))


def canonical_input_ids(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, config: PyramidCLIPTextConfig
) -> torch.Tensor:
    """What maximum pooling sees: the same ids whoever padded, and with whatever (docs/design.md, Towers).

    Everything behind the first end-of-text id, and everything the attention mask hides, becomes `pad_token_id`; the
    row is filled with it to `max_position_embeddings`, because the maximum runs over the padded positions too.
    """
    is_end = input_ids == config.eos_token_id
    behind_end = (is_end.int().cumsum(1) - is_end.int() > 0) | (attention_mask == 0)
    padding = config.pad_token_id or 0  # never None under "max"
    input_ids = input_ids.masked_fill(behind_end, padding)
    return F.pad(input_ids, (0, config.max_position_embeddings - input_ids.shape[1]), value=padding)


def end_positions(input_ids: torch.Tensor, attention_mask: torch.Tensor, config: PyramidCLIPTextConfig) -> torch.Tensor:
    """(B,) the first end-of-text id of each row; a row without it: its last unmasked position."""
    is_end = (input_ids == config.eos_token_id).int()
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = ((attention_mask != 0).int() * steps).amax(dim=1)
    return torch.where(is_end.amax(dim=1) > 0, is_end.argmax(dim=1), last)


def take_packed(hidden_states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(1, T, D), positions (N,) -> (1, N, D)."""
    return hidden_states.index_select(1, position)


def packed_positions(ends: Sequence[torch.Tensor], packing: Packing) -> torch.Tensor:
    """(rows,) of each part, counted within a text -> (sum of rows,), counted within all packed tokens."""
    first, positions = 0, []
    for end, (rows, tokens) in zip(ends, packing):
        positions.append(torch.arange(first, first + rows * tokens, tokens, device=end.device) + end)
        first += rows * tokens
    return torch.cat(positions)


def take_position(hidden_states: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """(B, L, D), positions (B,) -> (B, 1, D)."""
    return hidden_states.gather(1, position[:, None, None].expand(-1, 1, hidden_states.shape[-1]))
