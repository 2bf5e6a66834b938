"""Two ways of doing the same thing, timed in alternation, so that what else the machine does hits both."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Comparison:
    """Seconds a call of each way. `ratio`: how many times faster `ours` is, the median over rounds; `spread`: the
    smallest and the largest ratio of a round."""

    ours: float
    theirs: float
    ratio: float
    spread: tuple[float, float]


def compare(ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 7) -> Comparison:
    """Calls both once to warm up, then `rounds` times in turn (A B A B ...)."""
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    ours(), theirs()
    pairs = [(_seconds(ours), _seconds(theirs)) for _ in range(rounds)]
    ratios = [second / first for first, second in pairs]
    first, second = (statistics.median(column) for column in zip(*pairs))
    return Comparison(first, second, statistics.median(ratios), (min(ratios), max(ratios)))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def peak_bytes() -> int:
    """The largest resident size of this process so far. Not `getrusage`'s, which starts at what the parent held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def matmul_gigaflops(size: int, dtype: torch.dtype) -> float:
    """What a square matrix product reaches here: the ceiling that everything else is read against. Best of five."""
    left, right = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    return 2 * size**3 / min(_seconds(lambda: left @ right) for _ in range(5)) / 1e9


def copy_gigabytes(size: int = 1 << 26) -> float:
    """Bytes read and written a second by a copy, in units of 10^9. Best of five."""
    source, target = torch.ones(size), torch.empty(size)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source)) for _ in range(5)) / 1e9
