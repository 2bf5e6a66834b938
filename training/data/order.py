"""In which order samples are seen: a pure function of (seed, epoch, position), docs/data.md.

Datasets are visited one after another, in an order drawn anew each epoch (paper, appendix A.1); within a dataset the
shards are permuted. Their samples, one after another, are cut into lanes of equal length, and each global batch has
equally many neighbouring positions of each lane. The samples of a lane are permuted within windows; the windows of all
lanes that are read at a time hold W samples together.

A process takes a block of neighbouring positions of each global batch, so those of one machine read its lanes alone,
while the batches are the same on any number of processes. Nothing but the sizes of the shards is needed, and nothing
larger than the open windows is ever built, so a run starts at any position at once.
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
# The number of the rule of this order: a run that began under another one would repeat some samples and miss others.
ORDER_RULE = 2
# Below so many global batches, neighbours of the data meet in one batch all the time.
FEW_BATCHES = 8
# Lanes of a data set, and neighbouring positions that a global batch has of each at least: so many of one stretch of
# shards meet that those which belong together (captions of one picture) do not always or never.
MOST_LANES, LEAST_LANE = 64, 128

# What is drawn, so that no two draws share their random numbers.
_DATASETS, _SHARDS, _WINDOW, _REPLACEMENT = range(4)


class Window(NamedTuple):
    """Samples that are shuffled together: a stretch of the data set's samples in the order of its permuted shards.

    Attributes:
        epoch: that it is of.
        number: in the epoch; what its permutation is drawn for.
        visit: the number of its data set in the order of the epoch.
        first: the number of its first sample in the data set's sequence.
        size: how many samples.
    """

    epoch: int
    number: int
    visit: int
    first: int
    size: int


@dataclass(frozen=True)
class _Visit:
    """A data set in an epoch.

    Attributes:
        dataset: which.
        start: the position of its first sample.
        first_window: the number of its first window in the epoch.
        shards: those with samples, permuted.
        ends: where each ends in the sequence of the samples.
        lane: neighbouring positions of a global batch that are of one lane.
        cuts: (lanes + 1,) where each lane begins in the sequence, and its end.
        windows: of each lane.
    """

    dataset: int
    start: int
    first_window: int
    shards: np.ndarray
    ends: np.ndarray
    lane: int
    cuts: list[int]
    windows: int


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
            keeps more shards open). The windows of all lanes together are between W and 2 W samples, or the whole data
            set; W is at least the samples of a shard.
        global_batch_size: how many positions are one batch: it has as many of each lane, and what replaces a bad sample
            is of another one.

    Attributes:
        lanes: of each data set: as many as windows have shards, and the batch can be divided by.

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
        shards = [max(int(np.count_nonzero(sizes)), 1) for sizes in self.shard_sizes]
        totals = [int(sizes.sum()) for sizes in self.shard_sizes]
        self._least = [max(window, -(-total // n)) for window, total, n in zip(windows, totals, shards)]
        self.lanes = [
            _divisor(global_batch_size, min(window, total) * n // max(total, 1))
            for window, total, n in zip(self._least, totals, shards)
        ]
        # Per instance, so that two orders cannot answer for each other.
        self._visits = functools.lru_cache(maxsize=2)(self._draw_visits)
        self._permutation = functools.lru_cache(maxsize=3 * max(self.lanes))(self._draw_permutation)

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

    @property
    def lane_length(self) -> int:
        """Neighbouring positions of a global batch whose samples are of one lane, at least."""
        return self.global_batch_size // max(self.lanes)

    def locate(self, epoch: int, position: int) -> Place:
        """The sample at a position, 0 <= position < total; IndexError elsewhere."""
        window, at = self._window_at(epoch, position)
        return self._in_window(window, int(self._permutation(epoch, window.number, window.size)[at]))

    def replacement(self, epoch: int, position: int, attempt: int) -> Place:
        """The sample to use where that of `position` is bad; `attempt` counts from 0.

        A pure function as well: the sample that has the same place in another global batch, so that neither it nor
        what replaces another sample of this batch is in the batch already. First come the batches in the window,
        whose shards are at hand, then those of the rest of the epoch. Where all of these are bad too, or there is no
        other batch, any sample of the window, whoever has it.
        """
        window, at = self._window_at(epoch, position)
        size, lane = self.global_batch_size, self._visits(epoch)[window.visit].lane
        batch, place = divmod(position, size)
        first, last = batch - at // lane, batch + (window.size - 1 - at) // lane
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

    def turn(self, epoch: int, position: int) -> int:
        """How often the data set at a position was gone through before: what its crops are drawn for."""
        return epoch

    def sample_id(self, dataset: int, shard: int, sample: int) -> int:
        """The number of a sample in the unshuffled data: what augmentation is keyed on."""
        return int(self._firsts[dataset][shard]) + sample

    def window(self, epoch: int, position: int) -> Window:
        """The window that a position is in; raises as `locate`."""
        return self._window_at(epoch, position)[0]

    def next_window(self, epoch: int, position: int) -> Window:
        """The window that whoever takes this place of each global batch comes to after that of `position`."""
        window, at = self._window_at(epoch, position)
        batches = -(-(window.size - at) // self._visits(epoch)[window.visit].lane)
        later = position + batches * self.global_batch_size
        if later < self.total:
            return self.window(epoch, later)
        return self.window(epoch + 1, position % self.global_batch_size)

    def shards_of(self, window: Window) -> tuple[int, list[int]]:
        """The number of a window's data set, and of those shards that it has samples of."""
        visit = self._visits(window.epoch)[window.visit]
        first, last = np.searchsorted(visit.ends, [window.first, window.first + window.size - 1], "right")
        return visit.dataset, visit.shards[first : last + 1].tolist()

    def _window_at(self, epoch: int, position: int) -> tuple[Window, int]:
        """The window that holds a position, and the place in it."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of an epoch of {self.total} samples")
        visits = self._visits(epoch)
        number = bisect.bisect_right(visits, position, key=lambda visit: visit.start) - 1
        visit = visits[number]
        lane = position % self.global_batch_size // visit.lane
        place = self._before(position, lane, visit.lane) - self._before(visit.start, lane, visit.lane)
        length, parts = visit.cuts[lane + 1] - visit.cuts[lane], visit.windows
        # Cut into equal parts, so that no short one is left over: part i begins at length * i // parts.
        part = ((place + 1) * parts - 1) // length
        first, end = length * part // parts, length * (part + 1) // parts
        in_epoch = visit.first_window + part * (len(visit.cuts) - 1) + lane
        return Window(epoch, in_epoch, number, visit.cuts[lane] + first, end - first), place - first

    def _before(self, position: int, lane: int, length: int) -> int:
        """How many positions of a lane are before `position`, from the beginning of the epoch."""
        batches, place = divmod(position, self.global_batch_size)
        return batches * length + min(max(place - lane * length, 0), length)

    def _in_window(self, window: Window, index: int) -> Place:
        visit = self._visits(window.epoch)[window.visit]
        at = window.first + index
        number = int(np.searchsorted(visit.ends, at, "right"))
        shard = int(visit.shards[number])
        begin = int(visit.ends[number] - self.shard_sizes[visit.dataset][shard])
        return Place(visit.dataset, shard, at - begin)

    def _draw_visits(self, epoch: int) -> list[_Visit]:
        """The data sets of an epoch in the order in which they are visited."""
        visits: list[_Visit] = []
        start = window = 0
        for dataset in np.random.default_rng((self.seed, _DATASETS, epoch)).permutation(len(self.shard_sizes)).tolist():
            sizes, lanes = self.shard_sizes[dataset], self.lanes[dataset]
            shards = np.random.default_rng((self.seed, _SHARDS, epoch, dataset)).permutation(np.flatnonzero(sizes))
            if not len(shards):
                continue
            ends, lane = np.cumsum(sizes[shards]), self.global_batch_size // lanes
            total = int(ends[-1])
            of_lanes = (self._before(start + total, n, lane) - self._before(start, n, lane) for n in range(lanes))
            cuts, windows = [0, *itertools.accumulate(of_lanes)], max(1, total // self._least[dataset])
            visits.append(_Visit(dataset, start, window, shards, ends, lane, cuts, windows))
            start, window = start + total, window + windows * lanes
        return visits

    def _draw_permutation(self, epoch: int, number: int, size: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, _WINDOW, epoch, number))
        return rng.permutation(np.arange(size, dtype=np.int32 if size < 2**31 else np.int64))


def _divisor(global_batch_size: int, shards: int) -> int:
    """How many lanes a data set has whose windows have so many shards: a divisor of the batch."""
    most = min(MOST_LANES, global_batch_size // LEAST_LANE, shards)
    return next((n for n in range(most, 1, -1) if global_batch_size % n == 0), 1)


def default_window(global_batch_size: int) -> int:
    """The samples that are shuffled together where nobody says otherwise."""
    return max(WINDOW_BATCHES * global_batch_size, WINDOW_SAMPLES)


def batch_positions(
    batch: int, global_batch_size: int, process_index: int, num_processes: int, lane_length: int | None = None
) -> list[int]:
    """The positions of global batch number `batch` that belong to a process: neighbours, so that it reads few lanes.

    Args:
        batch: from 0.
        global_batch_size: of all processes together.
        process_index: from 0; those of one machine have neighbouring ones.
        num_processes: that share the batch.
        lane_length: of `SampleOrder`; positions of all lanes take turns, so that each chunk of the batch has some of
            every lane. None: in order.

    Raises:
        ValueError: the global batch cannot be shared equally.
    """
    if global_batch_size % num_processes:
        raise ValueError(f"global batch of {global_batch_size} over {num_processes} processes: expected a multiple")
    share = global_batch_size // num_processes
    first = batch * global_batch_size + process_index * share
    positions = range(first, first + share)
    return sorted(positions, key=lambda position: position % lane_length) if lane_length else list(positions)
