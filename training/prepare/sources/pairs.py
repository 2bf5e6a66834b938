"""One pair as a source gives it, before it is checked; a piece of a source; and what a source is told to read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "svg")
MAX_PICTURE_BYTES = 256 << 20
# The reason of a row whose picture is a URL. What else it says is there all the same.
REMOTE_PICTURE = "remote-picture"


class Fault(NamedTuple):
    """Why something cannot be used: one machine-readable word, and a sentence for people."""

    reason: str
    detail: str


@dataclass
class RawPair:
    """One pair before it is checked.

    Attributes:
        key: its unique name; None where the row has none.
        where: the file or data set it comes from.
        line: its line there, from 1; None in tars.
        picture: undecoded bytes.
        members: the other members {suffix: bytes}.
        fault: why the row itself could not be read.
        is_note: this is no pair but a fault of the file around it, of which the other pairs go on.
    """

    key: str | None
    where: str
    line: int | None = None
    picture: bytes | None = None
    members: dict[str, bytes] = field(default_factory=dict)
    fault: Fault | None = None
    is_note: bool = False


@dataclass(frozen=True)
class SourcePart:
    """A piece of a source that is worked on as a whole.

    Attributes:
        name: of the shard that it becomes.
        path: the file or data set.
        rows: how many; None where only reading tells.
        start: where it begins: a byte offset (JSONL, CSV) or a row (Parquet, Hub).
        first: number of its first row in its file.
        line: that row's line.
        file_number: number of the file among those of the source.
    """

    name: str
    path: str
    rows: int | None
    start: int = 0
    first: int = 0
    line: int = 1
    file_number: int = 0


class PairSource(Protocol):
    """Where pairs come from. A new kind is a class of this form in a file of its own, and a line in `open_source`.

    Attributes:
        name: what `dataset.json` calls it.
        has_keys: the source names its pairs, so names may come twice; else they are numbered.
        is_stream: a part without `rows` is cut into shards of `samples_per_shard` while it is read; else it is one.
    """

    name: str
    has_keys: bool
    is_stream: bool

    def parts(self) -> list[SourcePart]:
        """The pieces, in order; the same each time."""
        ...

    def keys(self, part: SourcePart) -> list[str | None]:
        """The keys of a part, in order; None for a row without one."""
        ...

    def read(self, part: SourcePart, skip: int = 0) -> Iterator[RawPair]:
        """Yields the pairs of a part in order, from row `skip` on."""
        ...
