"""What the formats share: how an input is looked at, their flags, TSV rows, and numbers written as text."""

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from training.prepare.formats.tsv_index import BadRow, RowProblem, TsvIndex
from training.prepare.steps.regions import Detections
from training.prepare.steps.rewriting import MadeBy

Options = TypeVar("Options")
# Width and height of a picture, in pixels.
Size = tuple[float, float]


@dataclass(frozen=True)
class Head:
    """The beginning of an input, from which a format is told.

    Attributes:
        path: file or folder.
        key_pattern: whose group is the key within a row's name.
        index: the rows of a file; None for a folder.
        columns: of the first row.
        record: what JSON the last of two columns is.
    """

    path: Path
    key_pattern: str | None = None
    index: TsvIndex | None = None
    columns: Sequence[bytes] = ()
    record: object = None

    @property
    def rows(self) -> TsvIndex:
        """The rows of a file. Raises `ValueError` for a folder."""
        if self.index is None:
            raise ValueError(f"{self.path} is a folder: expected a file")
        return self.index

    def has_field(self, name: str) -> bool:
        """Whether the first row is two columns, of which the last is a JSON object with this field."""
        return isinstance(self.record, dict) and name in self.record


class FormatOptions:
    """The flags of all formats, of which each takes its own.

    Args:
        *parsed: instances of the formats' `options` classes; the defaults stand in for one that is missing.
        number: of the input, from 0, where there are several.
    """

    def __init__(self, *parsed: object, number: int = 0):
        self.parsed, self.number = parsed, number

    def of(self, kind: type[Options]) -> Options:
        """The flags of one format."""
        return next((found for found in self.parsed if isinstance(found, kind)), None) or kind()

    def companion(self, files: Sequence[str]) -> str | None:
        """The file that belongs to this input: one an input, or one for all; None where none was given."""
        return files[min(self.number, len(files) - 1)] if files else None


class Place(NamedTuple):
    """Where a row lies, for reports; a tar has no lines."""

    path: str
    line: int | None


class TsvRows:
    """What the readers of TSV files share; the rest is in `RegionFormat`."""

    lacks: tuple[str, ...] = ()
    in_pixels = True
    made_by: MadeBy | None = None  # these files do not say

    def __init__(self, index: TsvIndex):
        self.index = index

    def __len__(self) -> int:
        return len(self.index)

    def key(self, row: int) -> str:
        """The key of a row."""
        return self.index.key(row)

    def find(self, key: str) -> int | None:
        """The row of a key, or None."""
        return self.index.find(key)

    def place(self, row: int) -> Place:
        """Where a row lies."""
        return Place(str(self.index.path), self.index.line(row))

    @property
    def problems(self) -> Sequence[RowProblem]:
        """The lines that are not in the index."""
        return self.index.problems


def detections_of(
    boxes: np.ndarray,
    size: Size | None,
    scores: ArrayLike,
    labels: Sequence[str],
    features: np.ndarray | Sequence[np.ndarray],
    attributes: Sequence[Sequence[str]] = (),
) -> Detections:
    """Builds `Detections`.

    Args:
        boxes: (n, 4), in pixels of a picture of `size`, or fractions where that is None.
        size: of the picture.
        scores: (n,).
        labels: n nouns.
        features: (n, F), or n rows.
        attributes: n lists of words, or none.

    Raises:
        BadRow: they do not fit together.
    """
    if size is not None:
        if not min(size) > 0:
            raise BadRow("bad-size", f"width x height = {size[0]} x {size[1]}")
        boxes = boxes / np.array([*size, *size], np.float64)
    try:
        if not isinstance(features, np.ndarray):
            features = np.stack(features) if len(features) else np.zeros((0, 0), np.float32)
        return Detections(boxes, scores, labels, features, attributes)
    except ValueError as error:
        raise BadRow("bad-row", str(error)) from None


# Any: whatever JSON holds.
def json_of(text: bytes | str) -> Any:
    """A column as JSON. Raises `BadRow`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad-json", str(error)[:200]) from None


def integer_of(text: Any, what: str) -> int:
    """A count or a side in pixels. Raises `BadRow`."""
    try:
        value = int(text)
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value <= 1_000_000:
        raise BadRow("bad-number", f"{what} is {str(text)[:40]!r}")
    return value


def base64_of(text: Any) -> bytes:
    """The bytes behind base64. Raises `BadRow`."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadRow("bad-base64", str(error)) from None


def numbers_of(text: Any, dtype: DTypeLike, count: int | None = None) -> np.ndarray:
    """The numbers (n,) in a base64 text. Raises `BadRow` where they are not `count`."""
    data = base64_of(text)
    kind = np.dtype(dtype)
    if len(data) % kind.itemsize or (count is not None and len(data) != count * kind.itemsize):
        wanted = count if count is not None else "whole"
        raise BadRow("bad-length", f"{len(data)} bytes of {kind.name}, expected {wanted} numbers")
    return np.frombuffer(data, kind)
