"""How many bad samples a run puts up with: a share of those that all processes read lately.

Lately is the last epoch, or the last `LARGEST_WINDOW` samples where an epoch has more. Over the whole past a late fault
would drown; over less than that, one shard that is cut off would end a run over thousands of shards, in whose shuffle
window it is a tenth of all samples.
"""

from collections.abc import Mapping
from typing import Any

# A few bad samples say nothing about the share.
SMALLEST_WINDOW = 1000
LARGEST_WINDOW = 1 << 20
BLOCKS = 64


class BadSamples:
    """The bad samples of one process, in blocks of the samples that it read.

    Args:
        samples: In an epoch, of all processes.
        num_processes: How many read.
        limit: The share beyond which the data is not fit to train on.
    """

    def __init__(self, samples: int, num_processes: int, limit: float):
        self.window = min(max(samples, SMALLEST_WINDOW), LARGEST_WINDOW)
        self.limit = limit
        self._num_processes = num_processes
        # A sixty-fourth of what this process reads while all of them together read the window.
        self._block = self.window / num_processes / BLOCKS
        self._read = 0
        self._bad: dict[int, int] = {}

    def add(self, samples: int, bad: int) -> None:
        """Counts a batch.

        Args:
            samples: Good ones.
            bad: Those that were replaced.
        """
        self._read += samples
        now = int(self._read / self._block)
        if bad:
            self._bad[now] = self._bad.get(now, 0) + bad
        if self._bad and min(self._bad) <= now - BLOCKS:
            self._bad = {block: number for block, number in self._bad.items() if block > now - BLOCKS}

    def share(self) -> float:
        """Of the samples that this process read lately, how many were bad."""
        return self.number / max(self.read / self._num_processes + self.number, 1)

    @property
    def read(self) -> int:
        """Good samples that all processes read lately."""
        return min(self._read * self._num_processes, self.window)

    @property
    def number(self) -> int:
        """How many of those that this process read lately were bad."""
        return sum(self._bad.values())

    def too_many(self, number: int) -> bool:
        """Whether so many, in all processes together, are beyond the limit; of one process at least as many are."""
        return number > self.limit * self.window

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; those of all processes, added up, are that of one process that reads alone."""
        return {"share": self._block, "read": self._read, "bad": {str(block): n for block, n in self._bad.items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continues from `state()`, where as many processes read as before, or one: else it begins anew."""
        if abs(state.get("share", 0) - self._block) < 1e-6 * self._block:
            self._read = state["read"]
            self._bad = {int(block): number for block, number in state.get("bad", {}).items()}
