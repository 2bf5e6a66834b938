"""What the processes of a run tell each other: one gather with gradient, sums for the log, and agreement to stop.

All of it works in a single process too, where nothing is sent. The gather is an autograd function of our own on the
two public collectives for whole tensors, which gloo and NCCL both have; the helpers
of `torch.distributed.nn` that did this are deprecated.
"""

from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from training.evaluation.process import hosts
from training.loop.watch import waiting


def world_size() -> int:
    """Number of processes of the default group; 1 outside of one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process in the default group; 0 outside of one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


# Renamed in torch 2.14, where the old names warn; 2.13 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        gathered = rows.new_empty((world_size() * rows.shape[0], *rows.shape[1:]))
        _all_gather(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gathered_grad: torch.Tensor) -> torch.Tensor:
        own = gathered_grad.new_empty((gathered_grad.shape[0] // world_size(), *gathered_grad.shape[1:]))
        _reduce_scatter(own, gathered_grad.contiguous(), op=dist.ReduceOp.SUM)
        return own


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, (n, ...) -> (processes x n, ...), in the order of the ranks; n is the same everywhere.

    Gradients go back: what the other processes' losses say about this process's rows is summed into their gradient.
    Booleans are sent as bytes, without gradient.
    """
    if world_size() == 1:
        return rows
    if rows.dtype == torch.bool:
        return gather_rows(rows.to(torch.uint8)).to(torch.bool)
    return _GatherRows.apply(rows)


class _Exchange(torch.autograd.Function):
    """Row r of this process becomes row `rank` of process r; the gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.contiguous()
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows)
        return received

    @staticmethod
    def backward(ctx: Any, received_grad: torch.Tensor) -> torch.Tensor:
        return _Exchange.forward(ctx, received_grad)


def merge_log_sum_exps(partial: torch.Tensor) -> torch.Tensor:
    """This process's columns of a log-sum-exp over rows that all processes have a part of.

    Args:
        partial: (terms, processes x n), over this process's rows.

    Returns:
        (terms, n), over all rows. Gradients go back to every process.
    """
    if world_size() == 1:
        return partial
    by_process = partial.unflatten(1, (world_size(), -1)).transpose(0, 1)
    return torch.logsumexp(_Exchange.apply(by_process), dim=0)


def sum_over_processes(values: torch.Tensor) -> torch.Tensor:
    """A new tensor with the sum of `values` over all processes, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def sum_each_gradient_alone(wrapped: nn.Module) -> None:
    """Makes DDP average gradient by gradient, so that the order of additions depends on the gradient's own size alone.

    Of three processes and more, the place of a number in a bucket decides whose part is added first, and the buckets
    of a process's first step are others than those of its later ones.

    Args:
        wrapped: DDP, before its first backward pass; anything else stays as it is.
    """
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return

    def average(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        works = [dist.all_reduce(part.div_(world_size()), async_op=True) for part in bucket.gradients()]
        for work in works:
            work.wait()
        averaged: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        averaged.set_result(bucket.buffer())
        return averaged

    wrapped.register_comm_hook(None, average)


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the first one's floating-point and integer buffers (BatchNorm statistics), in place."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def check_equal_batches(size: int, device: torch.device) -> None:
    """Compares the sizes of all processes' batches; all call it together.

    Raises:
        ValueError: On every process; it names those whose batch is not of the first one's size.
    """
    if world_size() == 1:
        return
    gathered = torch.zeros(world_size(), dtype=torch.int64, device=device)
    _all_gather(gathered, torch.tensor([size], device=device))
    sizes = gathered.tolist()
    if len(set(sizes)) > 1:
        others = {process: found for process, found in enumerate(sizes) if found != sizes[0]}
        raise ValueError(
            f"every process must bring the same number of pairs, but process 0 has {sizes[0]} and others "
            f"differ: {others}. The gathered loss would pair the wrong rows; check the loader of those processes"
        )


class StopVote:
    """All processes leave the loop after the same step when one of them was asked to stop; no device is waited for.

    Each step every process puts in its vote (`cast`) and learns the outcome of the step before. The votes travel
    through a gloo group of their own between the hosts, while the step computes, so the device is never synchronised
    for them.

    Args:
        timeout: How long a process waits for the votes of the others.
    """

    def __init__(self, timeout: timedelta) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timeout) if world_size() > 1 else None
        self._pending = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def cast(self, stop: bool) -> bool:
        """Votes; True when any process voted to stop in the previous call (a single process: in this one)."""
        if self._group is None:
            return stop
        decided = self.outcome()
        self._pending = torch.tensor([int(stop)])
        self._work = dist.all_reduce(self._pending, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return decided

    def outcome(self) -> bool:
        """The outcome of the last vote; waits for it."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._pending.item())


Told = TypeVar("Told")


def everyone(told: Told) -> list[Told]:
    """What each process told, in the order of the ranks; a collective call that waits. Small plain values only."""
    if world_size() == 1:
        return [told]
    found: list[Any] = [None] * world_size()
    with waiting():
        dist.all_gather_object(found, told, group=hosts())
    return found


def from_first(told: Told) -> Told:
    """What the first process told, on all of them; a collective call that waits. Small plain values only."""
    if world_size() == 1:
        return told
    held: list[Any] = [told]
    with waiting():
        dist.broadcast_object_list(held, src=0, group=hosts())
    return held[0]


def largest_everywhere(number: int) -> int:
    """The largest number that a process brings; a collective call between hosts, which no device is waited for in."""
    return max(everyone(number))


def any_process(flag: bool) -> bool:
    """True on every process when `flag` is on one of them; a collective call that waits."""
    return any(everyone(flag))
