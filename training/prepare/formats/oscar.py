"""Features of Oscar and VinVL, with their names and scores in a second table."""

from pathlib import Path
from typing import Any

import numpy as np

from training.prepare.formats.tsv import (
    FormatOptions,
    Head,
    Size,
    TsvRows,
    base64_of,
    detections_of,
    integer_of,
    json_of,
)
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.steps.flags import OscarOptions
from training.prepare.steps.regions import Detections

# Boxes stored twice (in pixels, and as part of the feature) may differ by this share of the picture.
BOX_AGREEMENT = 0.01


class OscarRows(TsvRows):
    """Rows of key, number, and base64 of (n, width + 6) float32 or float16, told by the length.

    Or the caption form: key, JSON of num_boxes and features. The last six of the width + 6 numbers are the box, as
    fractions, and its size.
    """

    name = "oscar"
    options = OscarOptions
    lacks = ("attributes",)
    in_pixels = False
    width = 2048

    def __init__(self, index: TsvIndex, labels: TsvIndex):
        super().__init__(index)
        self.labels = labels

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Key, number and base64, or key and an object with `features`."""
        return 3 <= len(head.columns) < 10 or (head.has_field("features") and not head.has_field("objects"))

    @classmethod
    def open(cls, head: Head, options: FormatOptions) -> "OscarRows":
        """The reader of an input and of the table that belongs to it. Raises `ValueError` where that is missing."""
        labels = _labels_of(head.path, options.companion(options.of(OscarOptions).predictions))
        return cls(head.rows, TsvIndex(labels, head.key_pattern))

    def size(self, row: int) -> Size | None:
        """Where the table of names has it, else None: the boxes are fractions already. Raises `BadRow`."""
        record = self._names(row)
        try:
            return (float(record["image_w"]), float(record["image_h"])) if isinstance(record, dict) else None
        except (KeyError, TypeError, ValueError):
            return None

    # Any: JSON that is checked where it is used.
    def _names(self, row: int) -> Any:
        found = self.labels.find(self.key(row))
        if found is None:
            raise BadRow("no-names", f"the key is not in {self.labels.path}")
        return json_of(self.labels.columns(found)[-1])

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row; `size` only checks the boxes. Raises `BadRow`."""
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
        return detections_of(boxes, None, scores, labels, table[:, : self.width])

    def _table(self, row: int) -> np.ndarray:
        """(n, width + 6) float32."""
        columns = self.index.columns(row)
        count, data = self._counted(columns) if len(columns) > 2 else self._caption_form(columns)
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

    def _counted(self, columns: list[bytes]) -> tuple[int, bytes]:
        return integer_of(columns[1], "number of boxes"), base64_of(columns[-1])

    def _caption_form(self, columns: list[bytes]) -> tuple[int, bytes]:
        record = json_of(columns[-1])
        if not isinstance(record, dict) or "features" not in record or "num_boxes" not in record:
            raise BadRow("bad-row", "expected JSON with num_boxes and features")
        return integer_of(record["num_boxes"], "number of boxes"), base64_of(record["features"])


def _labels_of(path: Path, predictions: str | None) -> Path:
    """The file with names and scores that belongs to Oscar features. Raises `ValueError` where it is not there."""
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
