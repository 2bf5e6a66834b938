"""What a term of a kind other than level pairs is: the contract `Term`, and the types that it speaks of.

A kind is one file here with a class derived from `Term`, and its entry in `training.loop.terms.table`.
`training.loop.objective` computes any of them and knows none. A step has two parts, so that gradient caching can stand
between them: `rows` is computed from what the towers give, pair by pair, and may be so in chunks; `share` sees the rows
of the whole batch at once.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from training.loop.checkpoint import Stateful


class Wanted(NamedTuple):
    """Something that a tower computes.

    Attributes:
        level: Of the pyramid or of the run, see `training.data.inputs`.
        part: "embedding" (n, D), projected and not normalised; "pooled" (n, W), the tower's before its projection;
            "tokens" (n, L, W), all hidden states after the tower's last norm, of pictures without the global one.
    """

    level: str
    part: Literal["embedding", "pooled", "tokens"]


Encoded = Mapping[Wanted, torch.Tensor]
Rows = Mapping[str, torch.Tensor]
Tensors = Mapping[str, torch.Tensor]


class Step(NamedTuple):
    """What all terms share in a step.

    Attributes:
        batch: The inputs, n rows.
        scale: 0-d, the model's softmax scale.
        smoothing: Share of the targets that is spread over the negatives, where a kind has such.
    """

    batch: Tensors
    scale: torch.Tensor
    smoothing: float


class Share(NamedTuple):
    """What a term finds.

    Attributes:
        loss: 0-d with gradient, this process's share: the sum over processes is the term. Exactly 0, with zero
            gradients, where nothing can be compared.
        answers: 0-d int64, among how many the right one is chosen, of which the logarithm is the value by chance; 0 or
            1: the term was empty. -1, `training.loop.task.NO_CHOICE`, where it is no choice.
    """

    loss: torch.Tensor
    answers: torch.Tensor


class Term(nn.Module):
    """A term with what it learns beside the model: its heads, which are trained and kept with the run and not saved.

    Attributes:
        name: In settings and log.
        weight: In the objective.
        wanted: What the towers have to give.
        reads: Names of further inputs of a batch.
        uses_scale: Whether the model's own scale plays a part.
        autocast_dtype: Of the heads' products; None: fp32 or wider.
    """

    name: str
    weight: float
    wanted: tuple[Wanted, ...] = ()
    reads: tuple[str, ...] = ()
    uses_scale = False
    autocast_dtype: torch.dtype | None = None

    @property
    def trained(self) -> tuple[Wanted, ...]:
        """What of `wanted` is not a constant."""
        return self.wanted

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """What `share` needs of each pair, (n, ...), fp32 or wider; of each pair by itself, so it may be in chunks."""
        raise NotImplementedError

    def share(self, rows: Rows, step: Step) -> Share:
        """The term over the batch of all processes; they call it together. Outside of autocast."""
        raise NotImplementedError

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """What `share` needs in memory beside the rows, fp32: gathered rows, heads' activations, similarities, a queue.

        Args:
            own: Pairs of this process.
            everyone: Pairs of all.
            tokens: Of each level.
        """
        raise NotImplementedError

    def loss_operations(self, everyone: int, tokens: Mapping[str, int]) -> float:
        """Floating-point operations of `share` and its backward pass for each pair, of products that matter."""
        return 0.0

    def after_step(self, stepped: bool) -> None:
        """Called after the optimizer's step, once. stepped: it was made, and not skipped by the scaler of fp16."""

    @property
    def kept(self) -> Mapping[str, Stateful]:
        """File name -> what a checkpoint keeps beside the parameters and buffers: a queue."""
        return {}

    def word_for_masks(self) -> torch.Tensor | None:
        """(W,), what stands for a masked word where the text tower reads `masked`; None: the term has none."""
        return None

    def options(self) -> dict[str, Any]:
        """What decides the term's function, plain values, for the run's identity."""
        raise NotImplementedError

    @contextmanager
    def autocast(self, device: torch.device) -> Iterator[None]:
        """Inside, the heads' products are computed in `autocast_dtype`."""
        with torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            yield


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in fp32; fp64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_options(name: str, options: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """The options of a term, with the defaults of those that are not given; a default's type is the value's.

    Raises:
        ValueError: One is unknown, or of another type.
    """
    for option, value in options.items():
        if option not in defaults:
            raise ValueError(f"objective: {name} has no option {option!r}; it has {', '.join(['weight', *defaults])}")
        kind = type(defaults[option])
        fits = isinstance(value, (int, float)) if kind is float else type(value) is kind
        if not fits or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"objective: {name}: {option}: expected a {kind.__name__}, got {value!r}")
    return {**defaults, **options}


def at_least(name: str, options: Mapping[str, Any], **bounds: float) -> None:
    """Raises ValueError where an option is below its bound."""
    for option, bound in bounds.items():
        if not bound <= options[option] <= sys.float_info.max:  # whole numbers may have any length
            raise ValueError(f"objective: {name}: {option}: expected at least {bound}, got {options[option]}")


def softened_choice(
    log_sum_exp: torch.Tensor,
    positive: torch.Tensor,
    total: torch.Tensor,
    answers: int | torch.Tensor,
    smoothing: float,
) -> torch.Tensor:
    """Cross-entropy with 1 - a on the right answer and a / (answers - 1) on each of the others, row by row.

    Args:
        log_sum_exp: (n,), of all logits.
        positive: (n,), the right answer's logit.
        total: (n,), the sum of all logits.
        answers: How many there are.
        smoothing: a.
    """
    if not smoothing:
        return log_sum_exp - positive
    others = answers - 1
    spread = smoothing * (total - positive) / (others.clamp(min=1) if isinstance(others, torch.Tensor) else others)
    return log_sum_exp - (1 - smoothing) * positive - spread
