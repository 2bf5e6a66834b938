"""What a format of region features is to the rest: how an input is opened, read, and told from others."""

from collections.abc import Sequence
from typing import Protocol

from training.prepare.formats.tsv import FormatOptions, Head, Place, Size
from training.prepare.formats.tsv_index import RowProblem
from training.prepare.steps.flags import FormatFlags
from training.prepare.steps.regions import Detections
from training.prepare.steps.rewriting import MadeBy


class RegionFormat(Protocol):
    """An input of region features that is open; its rows are numbered from 0.

    Attributes:
        name: what `dataset.json` and reports call the format.
        in_pixels: boxes are in pixels, so `read` needs the size of the picture; else they are fractions.
    """

    name: str
    in_pixels: bool

    @property
    def lacks(self) -> tuple[str, ...]:
        """What the input does not have: "attributes"."""
        ...

    @property
    def made_by(self) -> MadeBy | None:
        """The detector, where the input says it."""
        ...

    @property
    def problems(self) -> Sequence[RowProblem]:
        """Lines that are no rows."""
        ...

    def __len__(self) -> int: ...

    def key(self, row: int) -> str:
        """The key of a row."""
        ...

    def find(self, key: str) -> int | None:
        """The first row of a key, or None."""
        ...

    def place(self, row: int) -> Place:
        """Where a row lies."""
        ...

    def size(self, row: int) -> Size | None:
        """Width and height of the picture, where the input has them. Raises `BadRow`."""
        ...

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row in a picture of `size`. Raises `BadRow`."""
        ...


class FileFormat(Protocol):
    """A class that opens inputs of one format."""

    @property
    def options(self) -> type[FormatFlags] | None:
        """The dataclass of its flags; None where it has none."""
        ...

    def recognises(self, head: Head) -> bool:
        """Whether an input is of this format."""
        ...

    def open(self, head: Head, options: FormatOptions) -> RegionFormat:
        """The reader of an input. Raises `ValueError` where the format as written lacks what is needed."""
        ...
