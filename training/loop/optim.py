"""Parameter groups, AdamW and SGD, the learning rate of a step, and the moving average of the weights."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

# Besides every parameter with at most one axis (norms, biases, class embedding, logit_scale), these keep their size
# by design.
NO_DECAY_NAMES = ("position_embedding", "positional_embedding", "class_embedding", "logit_scale")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the trainable parameters: with weight decay, and without.

    Without: norms, biases, position and class embeddings, logit_scale. The order within a group is that of
    `named_parameters`, so a stored optimizer state fits again.

    Raises:
        ValueError: No parameter is left to train.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.dim() > 1 and not any(part in name for part in NO_DECAY_NAMES)
            groups[decays].append(parameter)
    if not any(groups.values()):
        raise ValueError("no parameter is left to train: the objective's levels and `freeze` exclude all of them")
    both = [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return [group for group in both if group["params"]]


def build_optimizer(
    model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float], epsilon: float
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the fused kernel where the device has one.

    Raises:
        ValueError: Weights are not fp32 or fp64: AdamW's small updates vanish in half precision.
    """
    half = sorted({str(p.dtype) for p in model.parameters() if p.dtype not in (torch.float32, torch.float64)})
    if half:
        raise ValueError(
            f"weights must be float32 (or float64) for training, found {', '.join(half)}; precision: bf16 or "
            f"fp16 sets the autocast"
        )
    fused = {p.device.type for p in model.parameters()} <= {"cpu", "cuda"}
    return torch.optim.AdamW(
        parameter_groups(model, weight_decay), lr=learning_rate, betas=betas, eps=epsilon, fused=fused
    )


def build_sgd(model: nn.Module, learning_rate: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum; weight decay on all but norms, biases of other layers included, as detectron2 has it.

    Raises:
        ValueError: No parameter is left to train.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, (_NormBase, nn.LayerNorm)) for p in m.parameters(False)}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups[id(parameter) not in norms].append(parameter)
    if not any(groups.values()):
        raise ValueError("no parameter is left to train")
    both = [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]
    return torch.optim.SGD([group for group in both if group["params"]], lr=learning_rate, momentum=momentum)


def learning_rate_at(
    step: int, total_steps: int, peak: float, warmup_fraction: float, final_fraction: float = 0.0
) -> float:
    """The learning rate of optimizer step `step`, from 0: a linear rise, then half a cosine (paper, appendix A.2).

    Depends on nothing but its arguments: neither on the number of processes nor on how often it was asked. The
    warm-up takes ceil(warmup_fraction x total_steps) steps; the first of them has 1/warm-up of the peak, so that no
    step is wasted at 0. The cosine reaches `final_fraction` of the peak where the run ends, behind its last step, which
    is not wasted either.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    return peak * (final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives all groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


class MovingAverage:
    """Exponential moving average of a model's floating-point weights and buffers; integers are copied.

    Attributes:
        decay: Of the average.
        tensors: Name -> average, named as the model's state dict, so it can be saved and loaded as one.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """The average becomes decay x average + (1 - decay) x model."""
        state = model.state_dict()
        floating = [name for name, tensor in state.items() if tensor.is_floating_point()]
        others = [name for name, tensor in state.items() if not tensor.is_floating_point()]
        torch._foreach_lerp_(
            [self.tensors[name] for name in floating], [state[name] for name in floating], 1 - self.decay
        )
        if others:
            torch._foreach_copy_([self.tensors[name] for name in others], [state[name] for name in others])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`tensors`."""
        return self.tensors

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes stored averages; KeyError where names differ."""
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])

    @contextmanager
    def swapped_into(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the averages; afterwards its own weights again."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)
