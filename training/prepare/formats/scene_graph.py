"""`predictions.tsv` of scene-graph-benchmark."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from pyramidclip_hf.vinvl import VinVLConfig, phrase_attributes
from training.prepare.formats.tsv import FormatOptions, Head, Size, TsvRows, detections_of, json_of, numbers_of
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.steps.flags import SceneGraphOptions
from training.prepare.steps.regions import Detections


class SceneGraphRows(TsvRows):
    """Rows of key, and JSON of objects with rect, class, conf, feature and perhaps attributes.

    The size of a picture is in the `hw.tsv` of the data set it was run on, else in the picture.

    Raises:
        ValueError: the program was told to leave out what is needed; it says how to have it written.
    """

    name = "scene-graph-benchmark"
    options = SceneGraphOptions

    def __init__(self, index: TsvIndex, hw: str | None = None):
        super().__init__(index)
        self.sizes = TsvIndex(hw) if hw else None
        self.rule = VinVLConfig()
        first = next((objects for row in range(min(len(index), 100)) if (objects := self._objects_or_none(row))), [])
        for name, remedy in (
            ("feature", "TEST.OUTPUT_FEATURE True"),
            ("conf", "'conf' in TEST.TSV_SAVE_SUBSET"),
            ("class", "'class' in TEST.TSV_SAVE_SUBSET"),
            ("rect", "'rect' in TEST.TSV_SAVE_SUBSET"),
        ):
            if first and name not in first[0]:
                raise ValueError(
                    f"{index.path} was written without {name!r} (it has {sorted(first[0])}): extract with {remedy}"
                )
        if first and "attributes" not in first[0]:
            self.lacks = ("attributes",)

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Key and an object with `objects`."""
        return head.has_field("objects")

    @classmethod
    def open(cls, head: Head, options: FormatOptions) -> "SceneGraphRows":
        """The reader of an input."""
        return cls(head.rows, options.companion(options.of(SceneGraphOptions).hw))

    def _objects_or_none(self, row: int) -> list[Any] | None:
        try:
            return self._objects(row)
        except BadRow:
            return None

    # Any: JSON that is checked where it is used.
    def _objects(self, row: int) -> list[Any]:
        record = json_of(self.index.columns(row)[-1])
        objects = record.get("objects") if isinstance(record, dict) else None
        if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
            raise BadRow("bad-row", "expected JSON with a list of objects `objects`")
        return objects

    def size(self, row: int) -> Size | None:
        """From `hw.tsv`; None where none was given. Raises `BadRow`."""
        if self.sizes is None:
            return None
        found = self.sizes.find(self.key(row))
        if found is None:
            raise BadRow("no-size", f"the key is not in {self.sizes.path}")
        return _size_of(self.sizes.columns(found)[-1])

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row in a picture of `size`. Raises `BadRow`."""
        objects = self._objects(row)
        try:
            boxes = np.array([item["rect"] for item in objects], np.float64).reshape(-1, 4)
            scores = [float(item["conf"]) for item in objects]
            labels = [str(item["class"]) for item in objects]
            features = [numbers_of(item["feature"], "<f4") for item in objects]
            attributes = [
                phrase_attributes(*_real_attributes(item.get("attributes", []), item.get("attr_scores", [])), self.rule)
                for item in objects
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise BadRow("bad-row", f"{type(error).__name__}: {error}") from None
        return detections_of(boxes, size, scores, labels, features, attributes)


def _real_attributes(names: Sequence[str], scores: Sequence[Any]) -> tuple[list[str], list[float]]:
    """Without the paddings, whose score is 0."""
    pairs = [(n, float(s)) for n, s in zip(names, scores, strict=True) if float(s) > 0 and n != "__no_attribute__"]
    return [name for name, _ in pairs], [score for _, score in pairs]


def _size_of(text: bytes) -> Size:
    """(width, height) from a row of hw.tsv: JSON [{"height", "width"}], the same without list, or "height width"."""
    try:
        record = json.loads(text) if text.strip()[:1] in b"[{" else None
        record = record[0] if isinstance(record, list) else record
        if isinstance(record, dict):
            return float(record["width"]), float(record["height"])
        height, width = text.split()
        return float(width), float(height)
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise BadRow("bad-size", f"{text[:60]!r}: {error}") from None
