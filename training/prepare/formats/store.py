"""Stores of regions that `import_features --store_dir` wrote."""

from pathlib import Path

import numpy as np

from training.data.records import BadSample, sample_from_members
from training.data.shards import ShardReader, read_dataset_json
from training.prepare.formats.tsv_index import BadRow
from training.prepare.steps.regions import Detections


class StoreRows:
    """A store of regions that `import_features --store_dir` wrote: tars of KEY.json and KEY.roi.npy."""

    name, lacks, in_pixels, problems = "store", (), False, ()

    def __init__(self, folder):
        self.readers = [ShardReader(path) for path in sorted(Path(folder).glob("*.tar"))]
        if not self.readers:
            raise ValueError(f"{folder} has no *.tar: expected a store that import_features wrote")
        self.made_by = (read_dataset_json(folder) or {}).get("made_by", {}).get("regions")
        self.rows = [(reader, i) for reader in self.readers for i in range(len(reader))]
        self.by_key = {reader.keys[i]: row for row, (reader, i) in reversed(list(enumerate(self.rows)))}

    def __len__(self):
        return len(self.rows)

    def key(self, row):
        reader, i = self.rows[row]
        return reader.keys[i]

    def find(self, key):
        return self.by_key.get(key)

    def place(self, row):
        """(path, None): a tar has no lines."""
        return self.rows[row][0].name, None

    def size(self, row):
        """None: the boxes are fractions, and the picture is not in the store."""
        return None

    def read(self, row, size):
        """The `Detections` of a row. Raises `BadRow`."""
        reader, i = self.rows[row]
        try:
            sample = sample_from_members(reader.read(i), reader.keys[i], reader.name, require_image=False)
        except BadSample as bad:
            raise BadRow(bad.reason, bad.detail) from None
        regions = sample.regions or []
        if any(region.score is None for region in regions):
            raise BadRow("no-score", "regions without confidence")
        features = sample.roi if sample.roi is not None else np.zeros((0, 0), np.float32)
        return Detections(
            [r.box for r in regions],
            [r.score for r in regions],
            [r.label for r in regions],
            features,
            [r.attributes for r in regions],
        )
