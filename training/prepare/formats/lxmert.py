"""LXMERT's ten columns."""

from training.prepare.formats.tsv_index import BadRow
from training.prepare.formats.tsv_rows import TsvRows, _detections, _floats, _integer
from training.prepare.steps.regions import confident_attributes


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


def _name(names, i, what):
    if not 0 <= i < len(names):
        raise BadRow("bad-id", f"{what} {i}, but the list has {len(names)} names (ids count from 0)")
    return names[i]
