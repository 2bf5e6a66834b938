"""Large contrastive batches on few devices, exactly (gradient caching, Gao et al. 2021, arXiv 2101.06983).

The loss needs all embeddings of the batch at once, but the encoders need not run on all pairs at once. A step
therefore has three phases:

1. `_embed`: encode chunk after chunk without keeping activations,
2. `_differentiate`: compute the loss at all embeddings and its gradient there,
3. `_encode_again`: encode each chunk once more, now with activations, and send that gradient back through it.

The memory is that of one chunk plus the embeddings; the price is a second forward pass. Random numbers of phase 1 are
replayed in phase 3. Gradients are those of the whole batch, to rounding, for a model without BatchNorm.

BatchNorm: with a chunk as the batch, its statistics are those of the chunk and not of the batch one process would
otherwise have had. That is the statistics of a run with that many more processes and without SyncBatchNorm; it is
another (slightly noisier) function, equal in both passes. Running statistics are frozen in phase 1 and updated in
phase 3 only, once for each chunk.

logit_scale and the heads of further terms get their gradients in phase 2, outside of DDP's forward. They enter DDP with
the last chunk, the only one that is not under `no_sync`, as `parameter x gradient`: so each is counted once, and
averaged over processes by the same reduction as all other parameters. Heads see the whole batch there, BatchNorm of
theirs included.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from pyramidclip_hf.modeling_pyramidclip_base import frozen_batch_norm_statistics
from training.loop.objective import ContrastiveObjective
from training.loop.task import StepLoss

Chunk = dict[str, torch.Tensor]


class RandomState:
    """The state of torch's generators (CPU and the device of `device`, of any kind) at construction, to be replayed."""

    def __init__(self, device: torch.device):
        self._generators = [torch, *([] if device.type == "cpu" else [torch.get_device_module(device.type)])]
        self._states = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [generator.get_rng_state() for generator in self._generators]  # a process trains on its current device

    def _set(self, states: list[torch.Tensor]) -> None:
        for generator, state in zip(self._generators, states):
            generator.set_rng_state(state)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, random numbers come as they did after construction; afterwards, as if none had been drawn inside."""
        before = self._now()
        self._set(self._states)
        try:
            yield
        finally:
            self._set(before)


class GradientCache:
    """The three phases, for an objective that Accelerate has prepared.

    Args:
        accelerator: Accelerate's `Accelerator`, which decides gradient scaling and `no_sync`.
        wrapped: The prepared objective: DDP, or the module itself.
        chunk_size: Pairs encoded at a time by each process; must divide the process's batch.
    """

    def __init__(self, accelerator: Any, wrapped: nn.Module, chunk_size: int):
        self.accelerator = accelerator
        self.wrapped = wrapped
        self.objective: ContrastiveObjective = accelerator.unwrap_model(wrapped)
        self.chunk_size = chunk_size

    def forward_backward(self, batch: Mapping[str, torch.Tensor]) -> StepLoss:
        """Adds the gradients of the global batch to the parameters; returns the losses, without gradient.

        Raises:
            ValueError: The chunk size does not divide the batch.
        """
        chunks = self._split(batch)
        states, rows = self._embed(chunks)
        losses, row_gradients, parameter_gradients = self._differentiate(rows, batch)
        self._encode_again(chunks, states, row_gradients, parameter_gradients)
        return losses

    def _split(self, batch: Mapping[str, torch.Tensor]) -> list[Chunk]:
        rows = len(next(iter(batch.values())))
        if rows % self.chunk_size:
            raise ValueError(f"the chunk size {self.chunk_size} must divide the {rows} pairs of this process's batch")
        split = {key: value.split(self.chunk_size) for key, value in batch.items()}
        return [{key: parts[i] for key, parts in split.items()} for i in range(rows // self.chunk_size)]

    def _embed(self, chunks: Sequence[Chunk]) -> tuple[list[RandomState], dict[str, torch.Tensor]]:
        states: list[RandomState] = []
        rows: list[dict[str, torch.Tensor]] = []
        with torch.no_grad(), frozen_batch_norm_statistics(self.objective):
            for chunk in chunks:
                states.append(RandomState(self.accelerator.device))
                rows.append(self.objective.embed(chunk))
        return states, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def _differentiate(
        self, rows: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]
    ) -> tuple[StepLoss, list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        rows = {name: row.requires_grad_(row.is_floating_point()) for name, row in rows.items()}
        outer = self.objective.outer_parameters()
        losses = self.objective.loss(rows, batch)
        at = {name: row for name, row in rows.items() if row.requires_grad}
        # Heads that rows are made with get their gradient from these, in the third phase.
        gradients = torch.autograd.grad(losses.loss, [*at.values(), *outer.values()], allow_unused=True)
        split = {name: gradient.split(self.chunk_size) for name, gradient in zip(at, gradients) if gradient is not None}
        of_parameters = zip(outer, gradients[len(at) :], strict=True)
        return (
            losses._replace(loss=losses.loss.detach()),
            [{name: parts[i] for name, parts in split.items()} for i in range(len(next(iter(split.values()))))],
            {name: gradient for name, gradient in of_parameters if gradient is not None},
        )

    def _encode_again(
        self,
        chunks: Sequence[Chunk],
        states: Sequence[RandomState],
        row_gradients: Sequence[dict[str, torch.Tensor]],
        parameter_gradients: dict[str, torch.Tensor],
    ) -> None:
        for i, (chunk, state) in enumerate(zip(chunks, states)):
            last = i == len(chunks) - 1
            with state.replayed(), nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                surrogate = self.wrapped(chunk, row_gradients[i], parameter_gradients if last else None)
                self.accelerator.backward(surrogate)
