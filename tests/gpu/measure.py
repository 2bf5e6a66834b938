"""Time, kernels, memory and waiting of a call on a device."""

import contextlib
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.gpu.session import CHECKOUT, Session

GB = 1e9


@dataclass(frozen=True)
class Timing:
    """Milliseconds a call, medians over rounds.

    whole: from before the call to the end of its last kernel. host: until the call returned, its kernels still queued.
    spread: the smallest and the largest `whole`.
    """

    whole: float
    host: float
    spread: tuple[float, float]


def wait_for(device: torch.device) -> None:
    """Until all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_turn(
    session: Session, ways: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2
) -> dict[str, Timing]:
    """Times every way `rounds` times, one after the other in each round, so that a change of clocks hits all of them.

    A way that raises while it is warmed up gets a failed row and is left out.
    """

    def warmed(call: Callable[[], object]) -> bool:
        for _ in range(warm):
            call()
        wait_for(session.device)
        return True

    good = {name: call for name, call in ways.items() if session.attempt(name, lambda call=call: warmed(call))}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in good}
    for _ in range(rounds):
        for name, call in good.items():
            wait_for(session.device)
            start = time.perf_counter()
            call()
            returned = time.perf_counter()
            wait_for(session.device)
            taken[name].append((1e3 * (time.perf_counter() - start), 1e3 * (returned - start)))
    return {
        name: Timing(
            statistics.median(whole for whole, _ in times),
            statistics.median(host for _, host in times),
            (min(whole for whole, _ in times), max(whole for whole, _ in times)),
        )
        for name, times in taken.items()
        if times
    }


def kernels(session: Session, call: Callable[[], object]) -> tuple[int, float, list[list[Any]]]:
    """(how many, their milliseconds, the ten longest as [name, milliseconds, how many]) of one call, warmed up.

    In a dry pass they are the CPU's operations.
    """
    from torch.profiler import ProfilerActivity, profile

    kind = torch.autograd.DeviceType.CUDA if not session.dry else torch.autograd.DeviceType.CPU
    activities = [ProfilerActivity.CPU] + ([] if session.dry else [ProfilerActivity.CUDA])
    with profile(activities=activities) as profiled:
        call()
        wait_for(session.device)
    found = []
    for event in profiled.key_averages():
        if event.device_type == kind:
            spent = event.self_cpu_time_total if session.dry else event.self_device_time_total
            found.append([event.key[:80], spent / 1e3, event.count])
    found.sort(key=lambda entry: -entry[1])
    return sum(count for _, _, count in found), sum(spent for _, spent, _ in found), found[:10]


@contextlib.contextmanager
def peak(session: Session) -> Iterator[list[float]]:
    """A list that holds, after the block, the GB that its tensors took at most, beyond those of before."""
    found: list[float] = []
    if session.dry:
        yield found
        found.append(0.0)
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield found
    torch.cuda.synchronize()
    found.append((torch.cuda.max_memory_allocated() - before) / GB)


@contextlib.contextmanager
def waits_counted() -> Iterator[dict[str, int]]:
    """How often each line of this project makes the host wait for the device, inside of the block.

    Yields a mapping that fills: "file:line" -> count. It stays empty without a GPU.
    """
    found: dict[str, int] = {}

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        if "synchroniz" not in str(message):
            return
        ours = [frame for frame in traceback.extract_stack() if _is_ours(frame.filename)]
        place = f"{Path(ours[-1].filename).relative_to(CHECKOUT)}:{ours[-1].lineno}" if ours else f"{filename}:{lineno}"
        found[place] = found.get(place, 0) + 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def _is_ours(filename: str) -> bool:
    return any(Path(filename).is_relative_to(CHECKOUT / room) for room in ("training", "pyramidclip_hf"))


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """fp32 products and convolutions in fp32, not in TF32."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference as a share of the largest wanted value."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-300)).item()


def cosine(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The smallest cosine between rows."""
    return (
        torch.nn.functional.cosine_similarity(found.detach().float().cpu(), wanted.detach().float().cpu()).min().item()
    )
