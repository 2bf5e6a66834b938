"""Features of Oscar and VinVL."""

from pathlib import Path

import numpy as np

from training.prepare.formats.tsv_index import BadRow
from training.prepare.formats.tsv_rows import TsvRows, _decoded, _detections, _integer, _json

# Boxes stored twice (in pixels, and as part of the feature) may differ by this share of the picture.
BOX_AGREEMENT = 0.01


class OscarRows(TsvRows):
    """Features of Oscar and VinVL: key, number, base64 of (n, width + 6) float32 or float16, told by the length; or the
    caption form: key, JSON of num_boxes and features. Names and scores are in a second table. The last six columns are
    the box, as fractions, and its size."""

    name = "oscar"
    lacks = ("attributes",)
    in_pixels = False
    width = 2048

    def __init__(self, index, labels):
        super().__init__(index)
        self.labels = labels

    def size(self, row):
        """(width, height) where the table of names has them, else None: the boxes are fractions already."""
        record = self._names(row)
        try:
            return (float(record["image_w"]), float(record["image_h"])) if isinstance(record, dict) else None
        except (KeyError, TypeError, ValueError):
            return None

    def _names(self, row):
        found = self.labels.find(self.key(row))
        if found is None:
            raise BadRow("no-names", f"the key is not in {self.labels.path}")
        return _json(self.labels.columns(found)[-1])

    def read(self, row, size):
        """The `Detections` of a row; `size` (width, height) only checks the boxes. Raises `BadRow`."""
        table = self._table(row)
        record = self._names(row)
        objects = record.get("objects") if isinstance(record, dict) else record
        if not isinstance(objects, list):
            raise BadRow("bad-row", f"{self.labels.path}: expected a list of objects")
        if len(objects) != len(table):
            raise BadRow(
                "count-mismatch", f"{len(table)} features, but {len(objects)} names: which is whose is not known"
            )
        boxes = table[:, self.width : self.width + 4].astype(np.float64)
        try:
            scores = [float(item["conf"]) for item in objects]
            labels = [str(item["class"]) for item in objects]
            rects = np.array([item["rect"] for item in objects], np.float64).reshape(-1, 4)
        except (KeyError, TypeError, ValueError) as error:
            raise BadRow("bad-row", f"{self.labels.path}: {type(error).__name__}: {error}") from None
        if size is not None and len(rects):
            difference = np.abs(rects / np.array([*size, *size]) - boxes).max()
            if not difference <= BOX_AGREEMENT:
                raise BadRow("box-mismatch", f"boxes of features and names differ by {difference:.3f} of the picture")
        return _detections(boxes, None, scores, labels, table[:, : self.width], None)

    def _table(self, row):
        columns = self.index.columns(row)
        count, data = (columns[1], columns[-1]) if len(columns) > 2 else (None, None)
        if data is None:
            record = _json(columns[-1])
            if not isinstance(record, dict) or "features" not in record or "num_boxes" not in record:
                raise BadRow("bad-row", "expected JSON with num_boxes and features")
            count, data = record["num_boxes"], record["features"]
        count = _integer(count, "number of boxes")
        data = _decoded(data)
        wide = self.width + 6
        if count and len(data) == count * wide * 4:
            dtype = "<f4"
        elif count and len(data) == count * wide * 2:
            dtype = "<f2"
        elif not count and not data:
            dtype = "<f4"
        else:
            raise BadRow(
                "bad-length",
                f"{len(data)} bytes for {count} boxes: expected {wide} float32 "
                f"({4 * wide}) or float16 ({2 * wide}) each",
            )
        return np.frombuffer(data, dtype).reshape(count, wide).astype(np.float32)


def _labels_of(path, predictions):
    """The file with names and scores that belongs to Oscar features."""
    beside = path.with_name("predictions.tsv")
    if path.name.endswith(".feature.tsv"):
        beside = path.with_name(path.name.replace(".feature.tsv", ".label.tsv"))
    found = Path(predictions) if predictions else beside
    if not found.exists() or found == path:
        raise ValueError(
            f"{path} holds features without names and scores; they are in predictions.tsv (or *.label.tsv): "
            f"give it with --predictions ({found} is not there)"
        )
    return found
