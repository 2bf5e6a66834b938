"""Stores of regions that `import_features --store-dir` wrote: tars of KEY.json and KEY.roi.npy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyramidclip_hf.files import visible
from training.data.records import BadSample, sample_from_members
from training.data.shards import ShardReader, read_dataset_json, refuse_unfinished
from training.prepare.formats.tsv import FormatOptions, Head, Place, Size
from training.prepare.formats.tsv_index import BadRow, RowProblem
from training.prepare.steps.regions import Detections
from training.prepare.steps.rewriting import MadeBy
from training.prepare.steps.work import contents_of


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
        self.readers = [ShardReader(path) for path in visible(folder, "*.tar")]
        if not self.readers:
            raise ValueError(
                f"{folder} has no *.tar: expected a store that import_features wrote, but {contents_of(folder)}"
            )
        described = read_dataset_json(folder) or {}
        refuse_unfinished(folder, described)
        self.made_by: MadeBy | None = described.get("made_by", {}).get("regions")
        self.rows = [(reader, i) for reader in self.readers for i in range(len(reader))]
        self.by_key = {reader.keys[i]: row for row, (reader, i) in reversed(list(enumerate(self.rows)))}

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """A folder."""
        return head.path.is_dir()

    @classmethod
    def open(cls, head: Head, options: FormatOptions) -> "StoreRows":
        """The reader of a folder."""
        return cls(head.path)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """The key of a row."""
        reader, i = self.rows[row]
        return reader.keys[i]

    def find(self, key: str) -> int | None:
        """The first row of a key, or None."""
        return self.by_key.get(key)

    def place(self, row: int) -> Place:
        """The tar."""
        return Place(self.rows[row][0].name, None)

    def size(self, row: int) -> None:
        """None: the boxes are fractions, and the picture is not in the store."""

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row. Raises `BadRow`."""
        reader, i = self.rows[row]
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
