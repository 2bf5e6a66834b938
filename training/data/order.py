"""In which order samples are seen: a pure function of (seed, epoch, position), docs/data.md.

Datasets are visited one after another, in an order drawn anew each epoch (paper, appendix A.1); within a dataset the
shards are permuted; the samples of each run of consecutive shards that hold W samples or more (a window) are permuted
among themselves. Position p goes to process p mod P. Nothing but the sizes of the shards is needed, and nothing larger
than one window is ever built, so a run starts at any position at once, and on another number of processes with the same
global batch it sees the same batches.
"""

import bisect
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

# Of a window: global batches, and samples at least.
WINDOW_BATCHES, WINDOW_SAMPLES = 16, 131_072
# Below so many global batches, neighbours of the data meet in one batch all the time.
FEW_BATCHES = 8

# What is drawn, so that no two draws share their random numbers.
_DATASETS, _SHARDS, _WINDOW, _REPLACEMENT = range(4)


@dataclass(frozen=True)
class Window:
    """A run of shards whose samples are shuffled together: positions `start` to `start + size` of an epoch."""

    start: int
    size: int
    dataset: int
    shards: tuple[int, ...]


class Place(NamedTuple):
    """Where a sample lies: the numbers of its data set, of the shard in it, and of the sample in that."""

    dataset: int
    shard: int
    sample: int


class SampleOrder:
    """Where each position of each epoch points.

    Args:
        shard_sizes: number of samples of every shard, a list for each data set.
        seed: of all that is drawn.
        window_samples: W, how many samples are shuffled together, of each data set or of all (more mixes better and
            keeps more shards open). A window is between W and 2 W samples and a shard; or the whole data set.
        global_batch_size: how many positions are one batch: what replaces a bad sample is of another one.

    Raises:
        ValueError: there are no samples, or W is below 1.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        seed: int,
        window_samples: int | Sequence[int] = WINDOW_SAMPLES,
        global_batch_size: int = 1,
    ):
        self.shard_sizes = [np.asarray(sizes, np.int64).reshape(-1) for sizes in shard_sizes]
        windows = [window_samples] * len(shard_sizes) if isinstance(window_samples, int) else list(window_samples)
        if min([*windows, global_batch_size]) < 1:
            raise ValueError(
                f"window_samples {window_samples}, global_batch_size {global_batch_size}: expected at least 1 sample"
            )
        self.seed, self.window_samples, self.global_batch_size = seed, windows, global_batch_size
        self.total = int(sum(sizes.sum() for sizes in self.shard_sizes))
        if self.total == 0:
            raise ValueError(f"no samples in {len(shard_sizes)} data sets with {sum(map(len, shard_sizes))} shards")
        firsts = np.cumsum([0, *itertools.chain.from_iterable(self.shard_sizes)])[:-1]
        self._firsts = np.split(firsts, np.cumsum([len(sizes) for sizes in self.shard_sizes])[:-1])
        # Per instance, so that two orders cannot answer for each other.
        self._windows = functools.lru_cache(maxsize=2)(self._draw_windows)
        self._permutation = functools.lru_cache(maxsize=3)(self._draw_permutation)

    def __len__(self) -> int:
        return self.total

    def __getstate__(self) -> dict[str, Any]:
        names = ("shard_sizes", "seed", "window_samples", "global_batch_size")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        SampleOrder.__init__(self, **state)

    def batches_per_epoch(self, global_batch_size: int) -> int:
        """Number of complete global batches.

        Raises:
            ValueError: there is not one; with the arithmetic.
        """
        batches = self.total // global_batch_size
        if batches == 0:
            raise ValueError(
                f"{self.total} samples / {global_batch_size} in a global batch = {self.total / global_batch_size:.2f}, "
                f"less than one batch an epoch: lower the global batch size to at most {self.total} or add data"
            )
        return batches

    def locate(self, epoch: int, position: int) -> Place:
        """The sample at a position, 0 <= position < total; IndexError elsewhere."""
        window, number, at = self._window_at(epoch, position)
        return self._in_window(window, int(self._permutation(epoch, number)[at]))

    def replacement(self, epoch: int, position: int, attempt: int) -> Place:
        """The sample to use where that of `position` is bad; `attempt` counts from 0.

        A pure function as well: the sample that has the same place in another global batch, so that neither it nor
        what replaces another sample of this batch is in the batch already. First come the batches in the window,
        whose shards are at hand, then those of the rest of the epoch. Where all of these are bad too, or there is no
        other batch, any sample of the window, whoever has it.
        """
        window, _, _ = self._window_at(epoch, position)
        size, (batch, place) = self.global_batch_size, divmod(position, self.global_batch_size)
        first, last = -(-(window.start - place) // size), (window.start + window.size - 1 - place) // size
        draw = np.random.default_rng((self.seed, _REPLACEMENT, epoch, position))
        near = [other for other in draw.permutation(np.arange(first, last + 1)).tolist() if other != batch]
        if attempt < len(near):
            return self.locate(epoch, near[attempt] * size + place)
        others = (self.total - 1 - place) // size + 1 - (last + 1 - first)
        if attempt - len(near) < others:
            # Numbers of the batches outside of the window, shifted by a drawn distance, so that none comes twice.
            number = (int(draw.integers(others)) + attempt - len(near)) % others
            return self.locate(epoch, (number if number < first else number + last + 1 - first) * size + place)
        draw = np.random.default_rng((self.seed, _REPLACEMENT, epoch, position, attempt))
        return self._in_window(window, int(draw.integers(window.size)))

    def sample_id(self, dataset: int, shard: int, sample: int) -> int:
        """The number of a sample in the unshuffled data: what augmentation is keyed on."""
        return int(self._firsts[dataset][shard]) + sample

    def windows(self, epoch: int) -> list[Window]:
        """The windows of an epoch in the order in which they are visited."""
        return self._windows(epoch)[0]

    def _window_at(self, epoch: int, position: int) -> tuple[Window, int, int]:
        """The window that holds a position, its number in the epoch, and the place in it."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of an epoch of {self.total} samples")
        windows, starts = self._windows(epoch)
        number = bisect.bisect_right(starts, position) - 1
        return windows[number], number, position - windows[number].start

    def _in_window(self, window: Window, index: int) -> Place:
        sizes = self.shard_sizes[window.dataset]
        for shard in window.shards:
            if index < sizes[shard]:
                return Place(window.dataset, shard, index)
            index -= int(sizes[shard])
        raise IndexError(f"index beyond the window of {window.size} samples")

    def _draw_windows(self, epoch: int) -> tuple[list[Window], list[int]]:
        """The windows of an epoch, and where each starts."""
        windows: list[Window] = []
        start = 0
        for dataset in np.random.default_rng((self.seed, _DATASETS, epoch)).permutation(len(self.shard_sizes)).tolist():
            sizes = self.shard_sizes[dataset]
            full = np.flatnonzero(sizes)
            shards = np.random.default_rng((self.seed, _SHARDS, epoch, dataset)).permutation(full)
            ends = np.cumsum(sizes[shards])
            total = int(ends[-1]) if len(ends) else 0
            # Of equal length, so that no short one is left over at the end of the data set.
            number = max(1, total // self.window_samples[dataset])
            cuts = np.searchsorted(ends, [total * part // number for part in range(1, number)], "left") + 1
            for chosen in np.split(shards, np.unique(cuts)) if len(shards) else ():
                if not len(chosen):
                    continue
                size = int(sizes[chosen].sum())
                windows.append(Window(start, size, dataset, tuple(chosen.tolist())))
                start += size
        return windows, [window.start for window in windows]

    def _draw_permutation(self, epoch: int, number: int) -> np.ndarray:
        size = self._windows(epoch)[0][number].size
        rng = np.random.default_rng((self.seed, _WINDOW, epoch, number))
        return rng.permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))


def default_window(global_batch_size: int) -> int:
    """The samples that are shuffled together where nobody says otherwise."""
    return max(WINDOW_BATCHES * global_batch_size, WINDOW_SAMPLES)


def batch_positions(batch: int, global_batch_size: int, process_index: int, num_processes: int) -> range:
    """The positions of global batch number `batch` that belong to a process: those equal to its index modulo all.

    Raises:
        ValueError: the global batch cannot be shared equally.
    """
    if global_batch_size % num_processes:
        raise ValueError(f"global batch of {global_batch_size} over {num_processes} processes: expected a multiple")
    first = batch * global_batch_size
    return range(first + process_index, first + global_batch_size, num_processes)
