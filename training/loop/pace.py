"""How fast each process is by itself, what the log shows of all of them, and the name of the one the others wait for.

In a step every process takes as long as the slowest, because all wait for each other; so a process tells what it does
alone: how long it waited for data, and how long its towers took in the forward pass, where no process waits for
another. On a GPU that is the device's own clock, read when the log is written and the device has long passed these
points; nothing waits for it in a step. Once in a line of the log the processes tell each other, between hosts.
"""

import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from training.loop.distributed import everyone

# A process that is slower than the median one by so much, in so many steps in a row, is named.
SLOW, SLOW_STEPS = 1.2, 100


@dataclass(frozen=True)
class Told:
    """What a process tells of the steps since the last line of the log.

    Attributes:
        host: Its machine.
        seconds: From the first step to now.
        waited: Of these, waiting for data.
        computed: Of these, in its towers' forward passes, as far as no other process is waited for there; 0: unknown.
        data: What its reader says, `Reader.metrics`.
    """

    host: str
    seconds: float
    waited: float
    computed: float
    data: dict[str, float]


class Pace:
    """The clock of one process, over the steps since the last line of the log.

    Args:
        model: Of the objective, whose towers are timed.
        device: Of the process.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self._device = device
        self._open: list[Any] = []
        self._spans: list[tuple[Any, Any]] = []
        for tower in model.children():
            # Under SyncBatchNorm a forward pass waits for other processes.
            if not any(isinstance(part, nn.SyncBatchNorm) for part in tower.modules()):
                tower.register_forward_pre_hook(self._enter)
                tower.register_forward_hook(self._leave)
        self._slow_for: dict[int, int] = {}
        self._start()

    def _start(self) -> None:
        self._started, self._waited, self._samples, self._steps = time.perf_counter(), 0.0, 0, 0
        self._open, self._spans = [], []

    def _now(self) -> Any:
        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.get_device_module(self._device.type).Event(enable_timing=True)
        event.record()
        return event

    def _enter(self, tower: nn.Module, given: Any) -> None:
        if tower.training:  # not while something is measured on other data
            self._open.append(self._now())

    def _leave(self, tower: nn.Module, given: Any, result: Any) -> None:
        if self._open and tower.training:
            self._spans.append((self._open.pop(), self._now()))

    def _computed(self) -> float:
        if self._device.type == "cpu":
            return sum(end - start for start, end in self._spans)
        return sum(start.elapsed_time(end) for start, end in self._spans) / 1000

    def add(self, samples: int, waited: float) -> None:
        """Counts a step.

        Args:
            samples: In the batch of all processes.
            waited: Seconds that this one waited for data.
        """
        self._waited += waited
        self._samples += samples
        self._steps += 1

    def metrics(self, data: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
        """What the log shows of all processes, and lines to say; all call it together, the device's window fetched.

        Args:
            data: What this process's reader says.
        """
        if not self._steps:  # a run that continued right behind its window
            return dict(data), []
        seconds = time.perf_counter() - self._started
        told = everyone(Told(socket.gethostname(), seconds, self._waited, self._computed(), dict(data)))
        metrics = {"samples_per_second": self._samples / seconds} | shown(told)
        lines = self._named(told, relative_times(told), self._steps) if len(told) > 1 else []
        self._start()
        return metrics, lines

    def _named(self, told: Sequence[Told], times: Sequence[float], steps: int) -> list[str]:
        lines = []
        for number, (one, factor) in enumerate(zip(told, times)):
            before = self._slow_for.get(number, 0)
            self._slow_for[number] = before + steps if factor >= SLOW else 0
            if before < SLOW_STEPS <= self._slow_for[number]:
                lines.append(
                    f"process {number} on {one.host} takes {factor:.2f} of the median process's time, since "
                    f"{self._slow_for[number]} steps, and all wait for it: a step waits {one.waited / steps:.3f} s for "
                    f"data there (median {statistics.median(each.waited for each in told) / steps:.3f} s), and its "
                    f"towers take {one.computed / steps:.3f} s "
                    f"(median {statistics.median(each.computed for each in told) / steps:.3f} s)"
                )
        return lines


def relative_times(told: Sequence[Told]) -> list[float]:
    """The time that each process would take alone, the median one's being 1.

    What is left of a step without waiting for data is the same for all, as all wait for each other; the process that
    read at once did least else than computing in it.
    """
    rest = min(one.seconds - one.waited for one in told)
    computed = statistics.median(one.computed for one in told)
    alone = [one.waited + rest * (one.computed / computed if computed else 1.0) for one in told]
    median = statistics.median(alone)
    return [each / median if median else 1.0 for each in alone]


def shown(told: Sequence[Told]) -> dict[str, float]:
    """Means over the processes, and of what may be bad in one alone the largest too, with the slowest one's number."""
    waits = [one.waited / one.seconds for one in told]
    metrics = {"data_wait_share": statistics.fmean(waits)}
    for name in dict.fromkeys(name for one in told for name in one.data):
        metrics[name] = statistics.fmean([one.data[name] for one in told if name in one.data])
    if len(told) == 1:
        return metrics
    times = relative_times(told)
    slowest = max(range(len(times)), key=times.__getitem__)
    metrics |= {"data_wait_share_largest": max(waits), "slowest_process": slowest, "slowest_time": times[slowest]}
    bad = [one.data["data/bad_fraction"] for one in told if "data/bad_fraction" in one.data]
    return metrics | ({"data/bad_fraction_largest": max(bad)} if bad else {})
