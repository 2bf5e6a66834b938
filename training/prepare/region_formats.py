"""Region features that other programs stored: scene-graph-benchmark, Oscar/VinVL, LXMERT, and stores written here.

Each reader gives the `Detections` of one row. What a row lacks makes it a `BadRow`; what a whole format lacks is
refused with the reason, or listed in `lacks`; nothing is made up. Nothing is unpickled.
"""

import base64
import binascii
import json
from pathlib import Path

import numpy as np

from pyramidclip_hf.vinvl import VinVLConfig, phrase_attributes
from training.data.records import BadSample, sample_from_members
from training.data.shards import ShardReader, read_dataset_json
from training.prepare.regions import Detections, confident_attributes
from training.prepare.tsv_index import BadRow, TsvIndex

# Boxes stored twice (in pixels, and as part of the feature) may differ by this share of the picture.
BOX_AGREEMENT = 0.01
_UNREADABLE = {
    ".pth": "torch.save of pickled objects",
    ".pt": "torch.save of pickled objects",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".npz": "the arrays of bottom-up-attention.pytorch, whose names and scores are a pickled dictionary",
    ".npy": "the pairs of MMF, whose boxes and names are a pickled dictionary",
}


def open_format(
    path, key_pattern=None, predictions=None, hw=None, objects=None, attributes=None, attribute_threshold=0.1
):
    """The reader for `path`, told by its content.

    Raises `ValueError` for files that need unpickling, for formats that lack the scores or names that the best regions
    are chosen and named by, and where a companion file is missing; `FileNotFoundError`.
    """
    path = Path(path)
    if path.suffix in _UNREADABLE:
        raise ValueError(
            f"{path} is not read: {path.suffix} files are {_UNREADABLE[path.suffix]}, "
            f"and unpickling runs whatever code "
            "the file holds. Write it as TSV (LXMERT's columns, docs/prepare.md) with the program that made it"
        )
    if path.is_dir():
        return StoreRows(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    index = TsvIndex(path, key_pattern)
    if not len(index):
        raise ValueError(f"{path} has no row that begins with a key and a tab")
    columns = index.columns(0)
    if len(columns) == 10:
        return LxmertRows(index, objects, attributes, attribute_threshold)
    if len(columns) == 6:
        raise ValueError(
            f"{path} has the six columns of bottom-up-attention: boxes and features, "
            f"but no scores and no class names, so "
            "neither the most confident regions nor the tags can be had from it. Extract again with LXMERT's columns"
        )
    record = _json(columns[-1]) if len(columns) == 2 else None
    if isinstance(record, dict) and "objects" in record:
        return SceneGraphRows(index, hw)
    if len(columns) >= 3 or (isinstance(record, dict) and "features" in record):
        return OscarRows(index, TsvIndex(_labels_of(path, predictions), key_pattern))
    raise ValueError(
        f"{path}: its first row has {len(columns)} columns and is none of: "
        f"scene-graph-benchmark predictions.tsv (key, JSON with "
        "objects), Oscar features.tsv (key, number, base64), Oscar caption features "
        "(key, JSON with features), LXMERT (10 columns)"
    )


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


class LxmertRows(TsvRows):
    """LXMERT's ten columns: img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes,
    features. Ids count the lines of bottom-up-attention's name lists from 0."""

    name = "lxmert"

    def __init__(self, index, objects, attributes, threshold):
        super().__init__(index)
        if not objects or not attributes:
            raise ValueError(
                f"{index.path} has LXMERT's columns, where classes and attributes are numbers: give their names with "
                "--objects FILE --attributes FILE (one name a line)"
            )
        self.objects, self.attributes, self.threshold = objects, attributes, threshold

    def size(self, row):
        """(width, height) in pixels; the file has the height first. Raises `BadRow`."""
        columns = self._columns(row)
        return _integer(columns[2], "img_w"), _integer(columns[1], "img_h")

    def _columns(self, row):
        columns = self.index.columns(row)
        if len(columns) != 10:
            raise BadRow("bad-row", f"{len(columns)} columns, expected 10")
        return columns

    def read(self, row, size):
        """The `Detections` of a row. Raises `BadRow`."""
        columns = self._columns(row)
        count = _integer(columns[7], "num_boxes")
        object_ids, attribute_ids = _floats(columns[3], "<i8", count), _floats(columns[5], "<i8", count)
        scores, attribute_scores = _floats(columns[4], "<f4", count), _floats(columns[6], "<f4", count)
        boxes, features = _floats(columns[8], "<f4", 4 * count), _floats(columns[9], "<f4")
        if count and len(features) % count:
            raise BadRow("bad-length", f"{len(features)} numbers of features for {count} boxes")
        labels = [_name(self.objects, i, "object") for i in object_ids.tolist()]
        names = [_name(self.attributes, i, "attribute") for i in attribute_ids.tolist()]
        attributes = [confident_attributes([n], [s], self.threshold) for n, s in zip(names, attribute_scores.tolist())]
        features = features.reshape(count, len(features) // max(count, 1))
        return _detections(boxes.reshape(count, 4), size, scores, labels, features, attributes)


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


class ManyRows:
    """Several files of one format as one, in order: big sets are extracted in pieces."""

    def __init__(self, parts):
        self.parts = parts
        if len({part.name for part in parts}) > 1:
            raise ValueError(f"the inputs have different formats: {', '.join(part.name for part in parts)}")
        self.name, self.in_pixels = parts[0].name, parts[0].in_pixels
        makers = [part.made_by for part in parts]
        if any(made_by != makers[0] for made_by in makers):
            raise ValueError(f"the inputs were made by different detectors: {makers}")
        self.made_by = makers[0]
        self.lacks = tuple(dict.fromkeys(lack for part in parts for lack in part.lacks))
        self.problems = [problem for part in parts for problem in part.problems]
        self.starts = np.cumsum([0] + [len(part) for part in parts]).tolist()

    def __len__(self):
        return self.starts[-1]

    def find(self, key):
        """The row of a key, in the first file that has it, or None."""
        for part, start in zip(self.parts, self.starts):
            row = part.find(key)
            if row is not None:
                return start + row
        return None

    def _own(self, row):
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[number], row - self.starts[number]

    def key(self, row):
        part, row = self._own(row)
        return part.key(row)

    def place(self, row):
        """(path, line number) of a row."""
        part, row = self._own(row)
        return part.place(row)

    def size(self, row):
        """As the file's own."""
        part, row = self._own(row)
        return part.size(row)

    def read(self, row, size):
        """As the file's own."""
        part, row = self._own(row)
        return part.read(row, size)


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


def _name(names, i, what):
    if not 0 <= i < len(names):
        raise BadRow("bad-id", f"{what} {i}, but the list has {len(names)} names (ids count from 0)")
    return names[i]


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
