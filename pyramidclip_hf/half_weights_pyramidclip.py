# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Training under autocast: the weights of a block in half precision by one operation, their gradients back by one.

Autocast casts each weight by itself, which is some 800 operations a step. Here parameters stay fp32 too and get fp32
gradients, block after block in the backward pass, so that DDP sends them as ever.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

# What autocast runs in half precision; BatchNorm keeps its weights.
CAST = (nn.Linear, nn.Conv2d)
NAMES = ("weight", "bias")
Item = TypeVar("Item")


class _InHalf(torch.autograd.Function):
    """fp32 tensors -> the same in half precision, those of each group as one tensor, joined along the first axis."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: Sequence[int], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.sizes, ctx.layouts = sizes, [(weight.shape, weight.stride()) for weight in weights]
        ctx.set_materialize_grads(False)
        halves: list[torch.Tensor] = []
        parts: list[torch.Tensor] = []
        for group in _grouped(weights, sizes):
            rows = [len(weight) for weight in group]
            joined = len(group) > 1
            shape = (sum(rows), *group[0].shape[1:])
            halves.append(group[0].new_empty(shape, dtype=dtype) if joined else torch.empty_like(group[0], dtype=dtype))
            parts += halves[-1].split(rows) if joined else halves[-1:]
        torch._foreach_copy_(parts, weights)
        needed = [any(needs) for needs in _grouped(ctx.needs_input_grad[2:], sizes)]
        ctx.mark_non_differentiable(*(half for half, needs in zip(halves, needed) if not needs))
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        halves: list[torch.Tensor | None] = []
        for grad, layouts in zip(grads, _grouped(ctx.layouts, ctx.sizes)):
            if grad is None or len(layouts) == 1:
                halves += [grad] * len(layouts)
            else:
                halves += grad.split([shape[0] for shape, _ in layouts])
        given = {at: half for at, half in enumerate(halves) if half is not None and ctx.needs_input_grad[2 + at]}
        if torch.is_grad_enabled():  # this derivative may be derived again
            full = {at: half.float() for at, half in given.items()}
        else:
            full = {
                at: torch.empty_strided(*ctx.layouts[at], dtype=torch.float32, device=half.device)
                for at, half in given.items()
            }
            if full:
                torch._foreach_copy_(list(full.values()), list(given.values()))
        return None, None, *(full.get(at) for at in range(len(halves)))


def _grouped(items: Sequence[Item], sizes: Sequence[int]) -> Iterator[Sequence[Item]]:
    start = 0
    for size in sizes:
        yield items[start : start + size]
        start += size


def casts_weights(module: nn.Module, states: torch.Tensor) -> bool:
    """Whether `weights_in_half` is for this call: training under autocast. Threads may share what does not train."""
    device_type = states.device.type
    return module.training and torch.is_grad_enabled() and torch.is_autocast_enabled(device_type)


@contextmanager
def weights_in_half(
    module: nn.Module, states: torch.Tensor, norm: type[nn.Module], joined: Sequence[nn.Linear] = ()
) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """Inside, autocast finds the weights of linear layers, convolutions and norms in half precision already.

    Args:
        module: Any; its fp32 parameters on the device of `states` stay what they are.
        states: What goes through it.
        norm: The class of its LayerNorms.
        joined: Layers of it that read the same states.

    Yields:
        The weight (sum of rows, D) and bias (sum of rows,) of the `joined` layers, where all of them are plain ones.
    """
    dtype = torch.get_autocast_dtype(states.device.type)
    together: list[Any] = []
    if joined and all(_is_unhooked(layer, states) for layer in joined):
        together = [[layer._parameters[name] for layer in joined] for name in NAMES]
    places = [
        (part, name)
        for part in module.modules()
        if type(part) in (*CAST, norm) and not (together and part in joined)
        for name in NAMES
        if _is_plain(part._parameters[name], states)
    ]
    parameters = [part._parameters[name] for part, name in places]
    sizes = [len(group) for group in together] + [1] * len(parameters)
    halves: tuple[torch.Tensor, ...] = ()
    if sizes:
        halves = _InHalf.apply(dtype, sizes, *sum(together, []), *parameters)
    for (part, name), half in zip(places, halves[len(together) :], strict=True):
        part._parameters[name] = half  # type: ignore[assignment]  # what stands in is no parameter
    try:
        yield (halves[0], halves[1]) if together else None
    finally:
        for (part, name), parameter in zip(places, parameters, strict=True):
            part._parameters[name] = parameter


def _is_plain(parameter: nn.Parameter | None, states: torch.Tensor) -> bool:
    """Neither quantised, sharded, offloaded nor in half precision already."""
    if parameter is None or type(parameter) is not nn.Parameter:
        return False
    return parameter.dtype == torch.float32 and parameter.device == states.device


def _is_unhooked(layer: nn.Module, states: torch.Tensor) -> bool:
    """A linear layer whose result is its product and nothing else."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return not any(hooks) and all(_is_plain(layer._parameters[name], states) for name in NAMES)
