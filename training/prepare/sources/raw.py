"""One pair as a source gives it, before it is checked, and a piece of a source."""

from dataclasses import dataclass, field

PICTURE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "svg")
MAX_PICTURE_BYTES = 256 << 20


@dataclass
class Raw:
    """One pair before it is checked. `picture` undecoded bytes; `members` the other members {suffix: bytes}; `fault`
    (reason, detail) where the row itself could not be read."""

    key: str
    where: str
    line: int | None = None
    picture: bytes | None = None
    members: dict = field(default_factory=dict)
    fault: tuple | None = None


@dataclass(frozen=True)
class Part:
    """A piece of the source that is worked on as a whole. `start` is a byte offset (JSONL, CSV) or row (Parquet,
    Hub), `rows` None where only reading tells, `first` the number of its first row in its file, `line` that row's
    line."""

    name: str
    path: str
    rows: int | None
    start: int = 0
    first: int = 0
    line: int = 1
    file_number: int = 0
