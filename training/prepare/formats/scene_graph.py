"""`predictions.tsv` of scene-graph-benchmark."""

import json

import numpy as np

from pyramidclip_hf.vinvl import VinVLConfig, phrase_attributes
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.formats.tsv_rows import TsvRows, _detections, _floats, _json


class SceneGraphRows(TsvRows):
    """`predictions.tsv` of scene-graph-benchmark: key, JSON of objects with rect, class, conf, feature and perhaps
    attributes. The size of a picture is in the `hw.tsv` of the data set it was run on, else in the picture."""

    name = "scene-graph-benchmark"

    def __init__(self, index, hw=None):
        super().__init__(index)
        self.sizes = TsvIndex(hw) if hw else None
        self.rule = VinVLConfig()
        first = next((objects for row in range(min(len(index), 100)) if (objects := self._objects_or_none(row))), [])
        for field, remedy in (
            ("feature", "TEST.OUTPUT_FEATURE True"),
            ("conf", "'conf' in TEST.TSV_SAVE_SUBSET"),
            ("class", "'class' in TEST.TSV_SAVE_SUBSET"),
            ("rect", "'rect' in TEST.TSV_SAVE_SUBSET"),
        ):
            if first and field not in first[0]:
                raise ValueError(
                    f"{index.path} was written without {field!r} (it has {sorted(first[0])}): extract with {remedy}"
                )
        if first and "attributes" not in first[0]:
            self.lacks = ("attributes",)

    def _objects_or_none(self, row):
        try:
            return self._objects(row)
        except BadRow:
            return None

    def _objects(self, row):
        record = _json(self.index.columns(row)[-1])
        objects = record.get("objects") if isinstance(record, dict) else None
        if not isinstance(objects, list):
            raise BadRow("bad-row", "expected JSON with a list `objects`")
        return objects

    def size(self, row):
        """(width, height) in pixels, or None where no hw.tsv was given. Raises `BadRow`."""
        if self.sizes is None:
            return None
        found = self.sizes.find(self.key(row))
        if found is None:
            raise BadRow("no-size", f"the key is not in {self.sizes.path}")
        return _size_of(self.sizes.columns(found)[-1])

    def read(self, row, size):
        """The `Detections` of a row in a picture of `size` (width, height). Raises `BadRow`."""
        objects = self._objects(row)
        try:
            boxes = np.array([item["rect"] for item in objects], np.float64).reshape(-1, 4)
            scores = [float(item["conf"]) for item in objects]
            labels = [str(item["class"]) for item in objects]
            features = [_floats(item["feature"], "<f4") for item in objects]
            attributes = [
                phrase_attributes(*_real_attributes(item.get("attributes", []), item.get("attr_scores", [])), self.rule)
                for item in objects
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise BadRow("bad-row", f"{type(error).__name__}: {error}") from None
        return _detections(boxes, size, scores, labels, features, attributes)


def _real_attributes(names, scores):
    """Without the paddings, whose score is 0."""
    pairs = [(n, float(s)) for n, s in zip(names, scores, strict=True) if float(s) > 0 and n != "__no_attribute__"]
    return [name for name, _ in pairs], [score for _, score in pairs]


def _size_of(text):
    """(width, height) from a row of hw.tsv: JSON [{"height", "width"}], the same without list, or "height width"."""
    try:
        record = json.loads(text) if text.strip()[:1] in b"[{" else None
        record = record[0] if isinstance(record, list) else record
        if isinstance(record, dict):
            return float(record["width"]), float(record["height"])
        height, width = text.split()
        return float(width), float(height)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BadRow("bad-size", f"{text[:60]!r}: {error}") from None
