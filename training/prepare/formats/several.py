"""Several files of one format as one: big sets are extracted in pieces."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

from training.prepare.formats.protocols import RegionFormat
from training.prepare.formats.tsv import Place, Size
from training.prepare.formats.tsv_index import BadRow
from training.prepare.steps.regions import Detections


class JoinedRows:
    """The rows of files, in order; a key counts where it comes first. What reading an odd row may raise is `BadRow`.

    Raises:
        ValueError: the files have different formats, or were made by different detectors.
    """

    def __init__(self, pieces: Sequence[RegionFormat]):
        self.pieces = pieces
        if len({piece.name for piece in pieces}) > 1:
            raise ValueError(f"the inputs have different formats: {', '.join(piece.name for piece in pieces)}")
        makers = [piece.made_by for piece in pieces]
        if any(made_by != makers[0] for made_by in makers):
            raise ValueError(f"the inputs were made by different detectors: {makers}")
        self.name, self.in_pixels, self.made_by = pieces[0].name, pieces[0].in_pixels, makers[0]
        self.lacks = tuple(dict.fromkeys(lack for piece in pieces for lack in piece.lacks))
        self.problems = [problem for piece in pieces for problem in piece.problems]
        self.starts = [0, *accumulate(len(piece) for piece in pieces)]

    def __len__(self) -> int:
        return self.starts[-1]

    def find(self, key: str) -> int | None:
        """The row of a key, in the first file that has it, or None."""
        for piece, start in zip(self.pieces, self.starts):
            row = piece.find(key)
            if row is not None:
                return start + row
        return None

    def _own(self, row: int) -> tuple[RegionFormat, int]:
        number = bisect_right(self.starts, row) - 1
        return self.pieces[number], row - self.starts[number]

    def key(self, row: int) -> str:
        """The key of a row."""
        piece, row = self._own(row)
        return piece.key(row)

    def place(self, row: int) -> Place:
        """Where a row lies."""
        piece, row = self._own(row)
        return piece.place(row)

    def size(self, row: int) -> Size | None:
        """As the file's own."""
        piece, row = self._own(row)
        with _odd_rows():
            return piece.size(row)

    def read(self, row: int, size: Size | None) -> Detections:
        """As the file's own."""
        piece, row = self._own(row)
        with _odd_rows():
            return piece.read(row, size)


@contextmanager
def _odd_rows() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadRow("bad-row", f"{type(error).__name__}: {error}"[:200]) from None
