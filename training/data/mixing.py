"""Several data sets in every global batch, in given shares: a pure function of (seed, epoch, position), docs/data.md.

Of each global batch a data set has the same number of positions, spread evenly over the batch, so that a block of it
has the shares of the whole. In these positions it is gone through again and again, each time in the order that
`training.data.order` draws for it alone, whatever the others do: no sample of it comes a second time before all others
came, and a small one with a large share comes several times in an epoch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.order import WINDOW_SAMPLES, Place, SampleOrder, Window

# What keeps two data sets of one size from being shuffled alike.
_SEEDS = 4
# By how much the sum of shares that are written with a few digits may miss 1.
ROUNDING = 1e-3


def check_shares(shares: Sequence[float], data_sets: int) -> None:
    """Refuses shares that are none.

    Args:
        shares: of each data set in a batch.
        data_sets: how many there are.

    Raises:
        ValueError: another number of them, one that is not above 0, or a sum other than 1.
    """
    if len(shares) != data_sets:
        raise ValueError(f"data_shares: expected a share for each of the {data_sets} train_data, got {len(shares)}")
    if not all(share > 0 for share in shares):
        raise ValueError(f"data_shares: expected shares above 0, got {_told(shares)}; leave that data set out")
    if not abs(sum(shares) - 1) <= ROUNDING:
        raise ValueError(
            f"data_shares: expected shares whose sum is 1, got {_told(shares)}, whose sum is {sum(shares):g}"
        )


def positions_of(shares: Sequence[float], global_batch_size: int) -> list[int]:
    """How many positions of a global batch each data set has: its share, rounded so that the sum is the batch.

    Raises:
        ValueError: a share is less than one position.
    """
    exact = np.array(shares) / sum(shares) * global_batch_size
    found = np.floor(exact).astype(int)
    left = global_batch_size - int(found.sum())
    found[np.argsort(found - exact, kind="stable")[:left]] += 1
    if not found.all():
        number = int(np.argmin(found))
        raise ValueError(
            f"data_shares: {shares[number]:g} of a global batch of {global_batch_size} is {exact[number]:.2f} "
            f"positions for data set {number + 1}: expected one at least"
        )
    return found.tolist()


class MixedOrder:
    """Where each position of each epoch points, with all data sets in every global batch.

    An epoch is as many global batches as all samples together fill. It has what training needs of `SampleOrder`.

    Args:
        shard_sizes: see `SampleOrder`.
        shares: of each data set in a global batch.
        seed: see `SampleOrder`, also for the next two.
        window_samples: W, of each data set or of all.
        global_batch_size: positions in a batch.

    Attributes:
        parts: (data sets,) positions of a global batch that each has.
        total: positions of an epoch, in whole batches.

    Raises:
        ValueError: shares that are none, or of more positions than a data set has samples.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        shares: Sequence[float],
        seed: int,
        window_samples: int | Sequence[int] = WINDOW_SAMPLES,
        global_batch_size: int = 1,
    ):
        check_shares(shares, len(shard_sizes))
        self.shard_sizes = [np.asarray(sizes, np.int64).reshape(-1) for sizes in shard_sizes]
        self.shares, self.seed, self.global_batch_size = list(shares), seed, global_batch_size
        windows = [window_samples] * len(shard_sizes) if isinstance(window_samples, int) else list(window_samples)
        self.window_samples, self.parts = windows, positions_of(shares, global_batch_size)
        samples = [int(sizes.sum()) for sizes in self.shard_sizes]
        for number, (part, size) in enumerate(zip(self.parts, samples)):
            if part > size:
                raise ValueError(
                    f"data_shares: {shares[number]:g} of a global batch of {global_batch_size} is {part} samples of "
                    f"data set {number + 1}, which has {size}: one would come twice in a "
                    "batch. Lower its share or the batch"
                )
        self.total = sum(samples) // global_batch_size * global_batch_size
        self._firsts = np.cumsum([0, *samples])
        self._inner = [
            SampleOrder([sizes], _seed_of(seed, number), window, part)
            for number, (sizes, window, part) in enumerate(zip(self.shard_sizes, windows, self.parts))
        ]
        # Whole batches of a pass: the rest is left out, other samples in each pass.
        self._batches = [size // part for size, part in zip(samples, self.parts)]
        middles = [(np.arange(part) + 0.5) / part for part in self.parts]
        owners = np.repeat(np.arange(len(self.parts)), self.parts)
        self._owners = owners[np.argsort(np.concatenate(middles), kind="stable")]
        self._within = np.empty(global_batch_size, np.int64)
        for number, part in enumerate(self.parts):
            self._within[self._owners == number] = np.arange(part)

    def __len__(self) -> int:
        return self.total

    def __getstate__(self) -> dict[str, Any]:
        names = ("shard_sizes", "shares", "seed", "window_samples", "global_batch_size")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        MixedOrder.__init__(self, **state)

    @property
    def lanes(self) -> list[int]:
        """Of each data set, see `SampleOrder`."""
        return [lanes for inner in self._inner for lanes in inner.lanes]

    @property
    def lane_length(self) -> int:
        """Neighbouring positions of a global batch whose samples are of one lane of each data set, at least."""
        return self.global_batch_size // max(self.lanes)

    def batches_per_epoch(self, global_batch_size: int) -> int:
        """Number of global batches; of the size that the shares were made for."""
        if global_batch_size != self.global_batch_size:
            raise ValueError(f"shares of a global batch of {self.global_batch_size}, asked for {global_batch_size}")
        return self.total // global_batch_size

    def passes_per_epoch(self) -> list[float]:
        """How often each data set is gone through in an epoch."""
        return [self.total // self.global_batch_size / batches for batches in self._batches]

    def locate(self, epoch: int, position: int) -> Place:
        """The sample at a position, 0 <= position < total; IndexError elsewhere."""
        number, turn, inside = self._inside(epoch, position)
        return self._inner[number].locate(turn, inside)._replace(dataset=number)

    def replacement(self, epoch: int, position: int, attempt: int) -> Place:
        """The sample to use where that of `position` is bad, of the same data set: see `SampleOrder`."""
        number, turn, inside = self._inside(epoch, position)
        return self._inner[number].replacement(turn, inside, attempt)._replace(dataset=number)

    def turn(self, epoch: int, position: int) -> int:
        """How often the data set at a position was gone through before: what its crops are drawn for."""
        return self._inside(epoch, position)[1]

    def sample_id(self, dataset: int, shard: int, sample: int) -> int:
        """The number of a sample in the unshuffled data: what augmentation is keyed on."""
        return int(self._firsts[dataset]) + self._inner[dataset].sample_id(0, shard, sample)

    def window(self, epoch: int, position: int) -> Window:
        """The window that a position is in: its epoch is the pass, its visit the data set; raises as `locate`."""
        number, turn, inside = self._inside(epoch, position)
        return self._inner[number].window(turn, inside)._replace(visit=number)

    def next_window(self, epoch: int, position: int) -> Window:
        """The window that whoever takes this place of each global batch comes to after that of `position`."""
        number, turn, inside = self._inside(epoch, position)
        return self._inner[number].next_window(turn, inside)._replace(visit=number)

    def shards_of(self, window: Window) -> tuple[int, list[int]]:
        """The number of a window's data set, and of those shards that it has samples of."""
        return window.visit, self._inner[window.visit].shards_of(window._replace(visit=0))[1]

    def _inside(self, epoch: int, position: int) -> tuple[int, int, int]:
        """The data set at a position, the number of the pass over it, and the position in the order of that."""
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} of an epoch of {self.total} samples")
        batch, place = divmod(position, self.global_batch_size)
        number = int(self._owners[place])
        turn, inner = divmod(epoch * (self.total // self.global_batch_size) + batch, self._batches[number])
        return number, turn, inner * self.parts[number] + int(self._within[place])


def _seed_of(seed: int, dataset: int) -> int:
    return int(np.random.SeedSequence((seed, _SEEDS, dataset)).generate_state(1, np.uint64)[0])


def _told(shares: Sequence[float]) -> str:
    return " ".join(f"{share:g}" for share in shares)
