"""The samples of a data set as a sequence, for evaluation: nothing is shuffled, skipped or replaced.

Item i is the same sample in every run, and one that cannot be read is an error, because a score over fewer samples than
the data set has is another score.
"""

import bisect
import collections
import functools
import itertools
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, overload

from PIL import Image

from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.levels_pyramidclip import LEVELS
from training.data.records import BadSample, Sample, sample_from_members
from training.data.sources import UnitReader, open_data_set
from training.data.views import BadPicture, decoded_picture

# So many shards are open at a time; samples are read in their order, or nearly so.
_OPEN_UNITS = 64
_WORDS = frozenset(("txt", "json"))


class Samples(Sequence[Sample]):
    """Samples by number, from 0, each read when it is asked for; a slice gives a list.

    Attributes:
        name: the data set, as results call it.
        described: fields of `EvalResult` that say which data this is.
    """

    name: str
    described: Mapping[str, str | None] = {}

    @abstractmethod
    def read(self, number: int) -> Sample:
        """Sample `number`, which is among those there are; ValueError where it cannot be read, naming it."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self.read(number) for number in range(len(self))[index]]
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        return self.read(index)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.read, range(len(self)))


class ShardSamples(Samples):
    """The samples of shards or of a manifest.

    Args:
        data: the string that names it, see `training.data.sources`.
        max_samples: only the first so many.
        allow_unfinished: see `open_data_set`.
        levels: that are wanted, see `sample_from_members`.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it is not what is expected, has no samples, is unfinished, or names a shard twice.
        DownloadError: a URL cannot be read.
    """

    def __init__(
        self,
        data: str,
        max_samples: int | None = None,
        allow_unfinished: bool | None = None,
        levels: Collection[str] = tuple(LEVELS),
    ):
        self.name, self._levels = data, levels
        self._data = open_data_set(data, allow_unfinished=allow_unfinished, at_least=max_samples)
        places = collections.Counter((unit.name, unit.first) for unit in self._data.units)
        if repeated := next((name for (name, _), times in places.items() if times > 1), None):
            raise ValueError(f"{data} names {repeated} twice; here every sample counts once")
        self._ends = list(itertools.accumulate(unit.samples for unit in self._data.units))
        self._length = min(self._ends[-1], max_samples or self._ends[-1])
        self._reader = self._readers()

    def _readers(self) -> Callable[[int], UnitReader]:
        """`_open` that keeps what it opened. Per instance; a reader that falls out closes its file."""
        return functools.lru_cache(maxsize=_OPEN_UNITS)(self._open)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_reader"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._reader = self._readers()

    def _open(self, number: int) -> UnitReader:
        return self._data.open(self._data.units[number])

    def __len__(self) -> int:
        return self._length

    def read(self, number: int, picture: bool = True) -> Sample:
        """One sample, without its picture's bytes where these are not wanted; ValueError where it is damaged."""
        unit = bisect.bisect_right(self._ends, number)
        reader = self._reader(unit)
        row = number - (self._ends[unit] - len(reader))
        try:
            members = reader.read(row, None if picture else _WORDS)
            return sample_from_members(members, reader.key(row), reader.name, picture, levels=self._levels)
        except BadSample as error:
            hint = "; a caption without a picture cannot be evaluated" if error.reason == "no-image" else ""
            advice = "Evaluation skips nothing: repair the data or take the sample out"
            raise ValueError(f"{error}{hint}. {advice}") from error


def open_picture(data: bytes | None, name: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The decoded picture, upright and RGB.

    Args:
        data: its encoded bytes, which may be anybody's, as those of the Hub.
        name: of the picture, in errors.
        max_image_pixels: width times height at most.

    Raises:
        ValueError: the bytes are no picture of an allowed format, are damaged, or it has too many pixels.
    """
    try:
        return decoded_picture(data or b"", max_image_pixels)
    except BadPicture as error:
        raise ValueError(f"picture {name} cannot be read: {error}") from error
