"""Stores of regions that `import_features --store-dir` wrote: tars of KEY.json and KEY.roi.npy."""

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyramidclip_hf.files import contents_of, visible
from training.data.records import BadSample, sample_from_members
from training.data.shards import ShardReader, read_dataset_json, refuse_unfinished
from training.prepare.formats.tsv import FormatOptions, Head, Place, Size
from training.prepare.formats.tsv_index import BadRow, RowProblem
from training.prepare.steps.regions import Detections
from training.prepare.steps.rewriting import MadeBy

# So many shards are open at a time.
_OPEN_SHARDS = 64


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


class StoreRows:
    """A store of regions; it says which detector made them.

    Raises:
        ValueError: the folder has no tar, or its store was begun and not ended.
    """

    name = "store"
    options = None
    lacks: tuple[str, ...] = ()
    in_pixels = False
    problems: Sequence[RowProblem] = ()

    def __init__(self, folder: Path):
        self.paths = list(visible(folder, "*.tar"))
        if not self.paths:
            raise ValueError(
                f"{folder} has no *.tar: expected a store that import_features wrote, but {contents_of(folder)}"
            )
        described = read_dataset_json(folder) or {}
        refuse_unfinished(folder, described)
        self.made_by: MadeBy | None = described.get("made_by", {}).get("regions")
        # Per instance; a reader that falls out closes its file.
        self._reader = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._open)
        hashes = [self._hashes(number) for number in range(len(self.paths))]
        self._ends = np.cumsum([len(some) for some in hashes])
        joined = np.concatenate(hashes)
        # Sixteen bytes a row, whatever its key. Stable: of rows with one key the first comes first.
        self._order = np.argsort(joined, kind="stable")
        self._sorted = joined[self._order]

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """A folder."""
        return head.path.is_dir()

    @classmethod
    def open(cls, head: Head, options: FormatOptions) -> "StoreRows":
        """The reader of a folder."""
        return cls(head.path)

    def _open(self, number: int) -> ShardReader:
        return ShardReader(self.paths[number])

    def _hashes(self, number: int) -> np.ndarray:
        with ShardReader(self.paths[number]) as reader:
            return np.array([_hash(key) for key in reader.keys], np.uint64)

    def _at(self, row: int) -> tuple[ShardReader, int]:
        """The shard of a row, and its number there."""
        number = int(np.searchsorted(self._ends, row, "right"))
        reader = self._reader(number)
        return reader, row - (int(self._ends[number]) - len(reader))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, row: int) -> str:
        """The key of a row."""
        reader, i = self._at(row)
        return reader.keys[i]

    def find(self, key: str) -> int | None:
        """The first row of a key, or None."""
        wanted = np.uint64(_hash(key))
        low, high = (int(np.searchsorted(self._sorted, wanted, side)) for side in ("left", "right"))
        return next((row for row in self._order[low:high].tolist() if self.key(row) == key), None)

    def place(self, row: int) -> Place:
        """The tar."""
        return Place(self._at(row)[0].name, None)

    def size(self, row: int) -> None:
        """None: the boxes are fractions, and the picture is not in the store."""

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row. Raises `BadRow`."""
        reader, i = self._at(row)
        try:
            sample = sample_from_members(reader.read(i), reader.keys[i], reader.name, require_image=False)
        except BadSample as bad:
            raise BadRow(bad.reason, bad.detail) from None
        regions = sample.regions or []
        scores = [region.score for region in regions if region.score is not None]
        if len(scores) < len(regions):
            raise BadRow("no-score", "regions without confidence")
        features = sample.roi if sample.roi is not None else np.zeros((0, 0), np.float32)
        labels = [region.label for region in regions]
        return Detections([r.box for r in regions], scores, labels, features, [r.attributes for r in regions])
