"""LXMERT's ten columns, as bottom-up-attention's TSV files have them."""

from collections.abc import Sequence

from training.prepare.formats.tsv import FormatOptions, Head, Size, TsvRows, detections_of, integer_of, numbers_of
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.steps.flags import LxmertOptions, read_names
from training.prepare.steps.regions import Detections, confident_attributes


class LxmertRows(TsvRows):
    """Rows of ten columns, whose ids count the lines of bottom-up-attention's name lists from 0.

    They are img_id, img_h, img_w, objects_id, objects_conf, attrs_id, attrs_conf, num_boxes, boxes, features.
    """

    name = "lxmert"
    options = LxmertOptions

    def __init__(self, index: TsvIndex, objects: Sequence[str], attributes: Sequence[str], threshold: float):
        super().__init__(index)
        self.objects, self.attributes, self.threshold = objects, attributes, threshold

    @classmethod
    def recognises(cls, head: Head) -> bool:
        """Ten columns."""
        return len(head.columns) == 10

    @classmethod
    def open(cls, head: Head, options: FormatOptions) -> "LxmertRows":
        """The reader of an input. Raises `ValueError` where the lists of names are missing."""
        own = options.of(LxmertOptions)
        if not own.objects or not own.attributes:
            raise ValueError(
                f"{head.path} has LXMERT's columns, where classes and attributes are numbers: give their names with "
                "--objects FILE --attributes FILE (one name a line)"
            )
        return cls(head.rows, read_names(own.objects), read_names(own.attributes), own.attribute_threshold)

    def size(self, row: int) -> Size:
        """The file has the height first. Raises `BadRow`."""
        columns = self._columns(row)
        return integer_of(columns[2], "img_w"), integer_of(columns[1], "img_h")

    def _columns(self, row: int) -> list[bytes]:
        columns = self.index.columns(row)
        if len(columns) != 10:
            raise BadRow("bad-row", f"{len(columns)} columns, expected 10")
        return columns

    def read(self, row: int, size: Size | None) -> Detections:
        """The detections of a row in a picture of `size`. Raises `BadRow`."""
        columns = self._columns(row)
        count = integer_of(columns[7], "num_boxes")
        object_ids, attribute_ids = numbers_of(columns[3], "<i8", count), numbers_of(columns[5], "<i8", count)
        scores, attribute_scores = numbers_of(columns[4], "<f4", count), numbers_of(columns[6], "<f4", count)
        boxes, features = numbers_of(columns[8], "<f4", 4 * count), numbers_of(columns[9], "<f4")
        if count and len(features) % count:
            raise BadRow("bad-length", f"{len(features)} numbers of features for {count} boxes")
        labels = [_name(self.objects, i, "object") for i in object_ids.tolist()]
        names = [_name(self.attributes, i, "attribute") for i in attribute_ids.tolist()]
        attributes = [confident_attributes([n], [s], self.threshold) for n, s in zip(names, attribute_scores.tolist())]
        features = features.reshape(count, len(features) // max(count, 1))
        return detections_of(boxes.reshape(count, 4), size, scores, labels, features, attributes)


def _name(names: Sequence[str], i: int, what: str) -> str:
    if not 0 <= i < len(names):
        raise BadRow("bad-id", f"{what} {i}, but the list has {len(names)} names (ids count from 0)")
    return names[i]
