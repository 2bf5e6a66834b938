"""What the readers of region formats share: TSV rows, and numbers written as text."""

import base64
import binascii
import json

import numpy as np

from training.prepare.formats.tsv_index import BadRow
from training.prepare.steps.regions import Detections


class TsvRows:
    """What the readers of TSV files share. `lacks` names what the format does not have; `in_pixels` says that its boxes
    need the size of the picture."""

    lacks = ()
    in_pixels = True
    made_by = None  # these files do not say

    def __init__(self, index):
        self.index = index

    def __len__(self):
        return len(self.index)

    def key(self, row):
        return self.index.key(row)

    def find(self, key):
        return self.index.find(key)

    def place(self, row):
        """(path, line number) of a row."""
        return str(self.index.path), int(self.index.lines[row])

    @property
    def problems(self):
        """(path, line, key, reason, detail) of rows that are not in the index."""
        return [(str(self.index.path), *problem) for problem in self.index.problems]


def _detections(boxes, size, scores, labels, features, attributes):
    """Builds `Detections`; boxes are in pixels of a picture of `size`, or fractions where that is None. Raises
    `BadRow`."""
    if size is not None:
        if not min(size) > 0:
            raise BadRow("bad-size", f"width x height = {size[0]} x {size[1]}")
        boxes = boxes / np.array([*size, *size], np.float64)
    try:
        if not isinstance(features, np.ndarray):
            features = np.stack(features) if len(features) else np.zeros((0, 0), np.float32)
        return Detections(boxes, scores, labels, features, attributes or [])
    except ValueError as error:
        raise BadRow("bad-row", str(error)) from None


def _json(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRow("bad-json", str(error)[:200]) from None


def _integer(text, what):
    try:
        value = int(text)
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value <= 1_000_000:
        raise BadRow("bad-number", f"{what} is {str(text)[:40]!r}")
    return value


def _decoded(text):
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise BadRow("bad-base64", str(error)) from None


def _floats(text, dtype, count=None):
    """The numbers in a base64 text. Raises `BadRow` where they are not `count`."""
    data = _decoded(text)
    if len(data) % np.dtype(dtype).itemsize or (count is not None and len(data) != count * np.dtype(dtype).itemsize):
        raise BadRow(
            "bad-length",
            f"{len(data)} bytes of {np.dtype(dtype).name}, expected {count if count is not None else 'whole'} numbers",
        )
    return np.frombuffer(data, dtype)
