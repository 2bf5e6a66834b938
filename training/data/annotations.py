"""Pictures with boxes, and perhaps masks: PASCAL VOC folders and COCO files, brought to one form and checked.

    open_annotations(["VOC2007:trainval", "VOC2012:trainval"], training=True)
    open_annotations(["instances_train2017.json:train2017"], training=True)

Real data has faults. Each is counted and named in `AnnotatedPictures.faults`; what would make numbers wrong in silence
is an error that says what to do. Boxes are x1, y1, x2, y2 in pixels, from 0, the right and lower edge outside.
"""

import collections
import hashlib
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyramidclip_hf.files import json_text, parse_json, read_regular, read_utf8
from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS, open_undecoded
from training.data.records import Fault

# A box may leave its picture by rounding, so far.
OUTSIDE = 1.0
# More boxes without area than this share are no accident.
MOST_EMPTY = 0.01
NAMED_FAULTS = 5
_MAX_XML_BYTES, _MAX_JSON_BYTES = 8 << 20, 4 << 30
# Of a file's own word for its letters; others could hide a DOCTYPE from a look at its bytes.
_ENCODING = re.compile(rb"""^<\?xml[^>]{0,80}encoding=["']([\w.-]{1,40})["']""")
_ENCODINGS = ("utf", "ascii", "us-ascii", "iso-8859", "latin", "windows-125", "cp125", "gb", "big5", "euc", "shift")
# A point of a polygon lies in its picture; one far outside would cost time and memory without end.
_FARTHEST_POINT = 10_000.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """An object of a picture.

    Attributes:
        box: in pixels.
        label: number of its class, from 0.
        crowd: several objects in one box (COCO): never learnt, forgiven in the test.
        difficult: as VOC marks it: learnt, and neither right nor wrong in the test.
        area: square pixels, by which COCO tells small from large.
        segmentation: COCO's polygons or run lengths; None where there is no mask.
    """

    box: Box
    label: int
    crowd: bool = False
    difficult: bool = False
    area: float = 0.0
    segmentation: Any = None


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture and its objects.

    Attributes:
        number: the file's own id, or its place in a list.
        path: of the picture.
        width: in pixels, after EXIF rotation.
        height: the same.
        objects: in the file's order.
    """

    number: int | str
    path: Path
    width: int
    height: int
    objects: tuple[Annotation, ...]


@dataclass
class AnnotatedPictures:
    """A data set.

    Attributes:
        name: as results call it.
        kind: "voc" or "coco": whose metric is its custom.
        class_names: of the labels.
        class_ids: COCO's numbers of them, of a VOC folder from 1.
        pictures: in the file's order.
        faults: what was found, and passed over.
        max_image_pixels: of a picture, at most.
    """

    name: str
    kind: str
    class_names: list[str]
    class_ids: list[int]
    pictures: list[AnnotatedPicture]
    faults: list[Fault] = field(default_factory=list)
    max_image_pixels: int = MAX_IMAGE_PIXELS

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def has_masks(self) -> bool:
        """Whether each object has one."""
        return all(one.segmentation is not None for picture in self.pictures for one in picture.objects)

    @property
    def objects(self) -> int:
        """How many there are."""
        return sum(len(picture.objects) for picture in self.pictures)

    @property
    def fingerprint(self) -> str:
        """Equal where names and sizes of files, boxes and classes are, wherever they lie."""
        digest = hashlib.sha256(json_text([self.class_names, self.class_ids]).encode())
        for one in self.pictures:
            shapes = [[*thing.box, thing.label, thing.crowd, thing.segmentation] for thing in one.objects]
            digest.update(json_text([one.path.name, one.path.stat().st_size, shapes], default=str).encode())
        return digest.hexdigest()[:32]

    def told(self) -> list[str]:
        """Lines about the faults: how many of which kind, and the first of each by name."""
        by_reason: dict[str, list[Fault]] = collections.defaultdict(list)
        for fault in self.faults:
            by_reason[fault.reason].append(fault)
        lines = []
        for reason, found in sorted(by_reason.items()):
            shown = "; ".join(f"{one.where}: {one.detail}" for one in found[:NAMED_FAULTS])
            lines.append(f"{self.name}: {len(found)} {reason}: {shown}{'; ...' if len(found) > NAMED_FAULTS else ''}")
        return lines


def open_annotations(
    sources: Sequence[str], training: bool, class_names: Sequence[str] | None = None
) -> AnnotatedPictures:
    """The pictures that `sources` name, as one data set.

    Args:
        sources: `VOC_FOLDER:SPLIT` or `FILE.json:PICTURE_FOLDER`, all of one kind.
        training: what cannot be learnt from is left out; else all pictures stay, and a box without area is an error.
        class_names: of the training data, whose numbers the labels get; None: those of the data.

    Raises:
        FileNotFoundError: a file, a split or a picture is not there.
        ValueError: annotations cannot be right, or classes differ; the message says where and what to do.
    """
    if not sources:
        raise ValueError("no annotated pictures named: expected VOC_FOLDER:SPLIT or FILE.json:PICTURE_FOLDER")
    kinds = {_kind(source) for source in sources}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(sources)}: expected sources of one kind, all VOC or all COCO")
    (kind,) = kinds
    faults: list[Fault] = []
    name = "+".join(dict.fromkeys(_name_of(source) for source in sources))
    read = _read_voc if kind == "voc" else _read_coco
    parts = [read(*_split_source(source), faults) for source in sources]
    if kind == "voc":  # whose classes have names and no numbers
        everything = sorted({label for classes, _ in parts for label in classes})
        parts = [({label: number for number, label in enumerate(everything, 1)}, raw) for _, raw in parts]
    ids = _classes(parts, sources, class_names)
    names = list(ids)
    pictures = []
    for _, raw in parts:
        for one in raw:
            pictures.append(_checked(one, names, faults, training))
    pictures = _kept(pictures, faults, training, name)
    data = AnnotatedPictures(name, kind, names, list(ids.values()), pictures, faults)
    _check_counts(data, training)
    return data


@dataclass
class _Raw:
    """A picture as its file has it; objects: (where, class name, box, flags)."""

    number: int | str
    path: Path
    size: tuple[int, int]
    objects: list[tuple[str, str, Box, dict[str, Any]]]


def _kind(source: str) -> str:
    return "coco" if source.rpartition(":")[0].endswith(".json") else "voc"


def _split_source(source: str) -> tuple[Path, str]:
    place, _, rest = source.rpartition(":")
    if not place or not rest:
        raise ValueError(f"{source}: expected VOC_FOLDER:SPLIT (VOC2007:trainval) or FILE.json:PICTURE_FOLDER")
    return Path(place), rest


def _name_of(source: str) -> str:
    place, rest = _split_source(source)
    return place.stem if place.suffix == ".json" else f"{place.name} {rest}"


def _classes(
    parts: Sequence[tuple[Mapping[str, int], list[_Raw]]], sources: Sequence[str], wanted: Sequence[str] | None
) -> dict[str, int]:
    """Class name -> its number in the files, in the order of the labels."""
    found: dict[str, int] = {}
    for (classes, _), source in zip(parts, sources):
        for name, number in classes.items():
            if found.setdefault(name, number) != number:
                raise ValueError(f"{source}: category {name!r} has number {number}, another file says {found[name]}")
    if not found:
        raise ValueError(f"{', '.join(sources)}: no category has a name: nothing to learn")
    if wanted is None:
        return dict(sorted(found.items(), key=lambda item: item[1]))
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise ValueError(
            f"{', '.join(sources)}: its categories are not those of the training data. Only here: {extra[:10]}; only "
            f"there: {sorted(set(wanted) - set(found))[:10]}. Name them alike, or take data of the same categories"
        )
    return {name: found.get(name, number + 1) for number, name in enumerate(wanted)}


##################################################################################################
#  VOC                                                                                           #
##################################################################################################


def _read_voc(folder: Path, split: str, faults: list[Fault]) -> tuple[dict[str, int], list[_Raw]]:
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        raise FileNotFoundError(
            f"{listing} is no file: expected a VOC folder with Annotations/, JPEGImages/ and ImageSets/Main/{split}.txt"
        )
    names = [line.split()[0] for line in read_utf8(listing).splitlines() if line.strip()]
    raw, classes = [], set()
    for name in names:
        one = _voc_picture(folder, name, faults)
        classes |= {label for _, label, _, _ in one.objects}
        raw.append(one)
    return {name: number + 1 for number, name in enumerate(sorted(classes))}, raw


def _voc_picture(folder: Path, name: str, faults: list[Fault]) -> _Raw:
    path = _inside(folder / "Annotations", f"{name}.xml", folder / "ImageSets")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file, but ImageSets/Main lists {name}: add it, or take the name out")
    text = _xml_text(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError(f"{path}: has a DOCTYPE, which no annotation needs and which could hide anything: remove it")
    try:
        root = ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"{path}: is no XML ({error})") from error
    picture = _inside(folder / "JPEGImages", root.findtext("filename") or f"{name}.jpg", path)
    if not picture.is_file():  # some tools write another name into the file than the picture has
        picture = _inside(folder / "JPEGImages", f"{name}.jpg", path)
    size = root.find("size")
    objects = [_voc_object(path, number, node, faults) for number, node in enumerate(root.iter("object"))]
    sides = (0, 0) if size is None else (_whole(path, size, "width"), _whole(path, size, "height"))
    return _Raw(name, picture, sides, objects)


def _xml_text(path: Path) -> str:
    """The text of a file, decoded here: what expat is given as text, it decodes no other way."""
    data = read_regular(path, _MAX_XML_BYTES)
    said = _ENCODING.match(data.removeprefix(b"\xef\xbb\xbf"))
    encoding = said[1].decode().lower() if said else "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    if encoding == "utf-8":
        encoding = "utf-8-sig"
    try:
        if not encoding.startswith(_ENCODINGS):
            raise LookupError(f"encoding {encoding}")
        text = data.decode(encoding)
        if "\0" in text:  # which expat takes for UTF-16 whatever it is told
            raise UnicodeError("it has NUL letters")
        return text
    except (LookupError, UnicodeError) as error:
        raise ValueError(f"{path}: is no XML ({error}): save it as UTF-8") from error


def _voc_object(path: Path, number: int, node: ET.Element, faults: list[Fault]) -> tuple[str, str, Box, dict[str, Any]]:
    where = f"{path.name}, object {number}"
    label, corners = (node.findtext("name") or "").strip(), node.find("bndbox")
    if not label or corners is None:
        raise ValueError(f"{path}: object {number} has no {'name' if not label else 'bndbox'}")
    numbers = []
    for side in ("xmin", "ymin", "xmax", "ymax"):
        text = corners.findtext(side)
        try:
            numbers.append(float(text or ""))
        except ValueError as error:
            raise ValueError(f"{path}: object {number}: {side} is {text!r}, expected a number") from error
    if any(value != round(value) for value in numbers if math.isfinite(value)):
        faults.append(Fault(path.stem, where, "boxes with fractions", f"{numbers}, taken as they are"))
    flags = {"difficult": (node.findtext("difficult") or "0").strip() == "1"}
    # The first pixel is 1, and the last one belongs to the box.
    return where, label, (numbers[0] - 1, numbers[1] - 1, numbers[2], numbers[3]), flags


def _whole(path: Path, node: ET.Element, name: str) -> int:
    text = node.findtext(name) or "0"
    try:
        return int(float(text))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: size/{name} is {text!r}, expected a number of pixels") from error


def _inside(folder: Path, name: str, told_by: Path) -> Path:
    """The file of that name in the folder; ValueError where the name leads elsewhere."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"{told_by}: the picture's name {name!r} leads out of {folder}")
    return folder / path


##################################################################################################
#  COCO                                                                                          #
##################################################################################################


def _read_coco(file: Path, pictures: str, faults: list[Fault]) -> tuple[dict[str, int], list[_Raw]]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is no file: expected COCO's annotations, such as instances_train2017.json")
    folder = Path(pictures) if os.path.isabs(pictures) or Path(pictures).is_dir() else file.parent / pictures
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: expected the pictures of {file}")
    try:
        document = parse_json(read_regular(file, _MAX_JSON_BYTES))
    except ValueError as error:
        raise ValueError(f"{file}: is no JSON ({error})") from error
    parts = [document.get(name) if isinstance(document, dict) else None for name in
             ("images", "annotations", "categories")]  # fmt: skip
    if not all(isinstance(part, list) for part in parts):
        raise ValueError(f"{file}: expected lists images, annotations and categories, as COCO's instances have")
    images, annotations, categories = (part or [] for part in parts)
    try:
        return _coco_parts(file, folder, images, annotations, categories, faults)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"{file}: an entry lacks a field or has one of another kind: {error!r}") from error


def _coco_parts(
    file: Path, folder: Path, images: list[Any], annotations: list[Any], categories: list[Any], faults: list[Fault]
) -> tuple[dict[str, int], list[_Raw]]:
    names = {int(one["id"]): str(one["name"]) for one in sorted(categories, key=lambda one: int(one["id"]))}
    if len(set(names.values())) < len(categories):
        raise ValueError(f"{file}: categories repeat an id or a name, so results could not be told apart: rename them")
    raw: dict[int, _Raw] = {}
    for one in images:
        if int(one["id"]) in raw:
            raise ValueError(f"{file}: two pictures have the id {one['id']}: give each its own")
        path = _inside(folder, str(one["file_name"]), file)
        raw[int(one["id"])] = _Raw(int(one["id"]), path, (int(one["width"]), int(one["height"])), [])
    ids: collections.Counter[Any] = collections.Counter(one.get("id") for one in annotations)
    for one in annotations:
        where = f"{file.name}, annotation {one.get('id')}"
        if one["image_id"] not in raw or one["category_id"] not in names:
            raise ValueError(
                f"{where}: its picture {one['image_id']} or category {one['category_id']} is not in the file: without "
                "them it would be left out in silence. Add them, or take the annotation out"
            )
        if not one.get("id") or ids[one["id"]] > 1:
            told = "repeated, 0 or missing; numbered anew, as metrics go wrong in silence with such"
            faults.append(Fault(str(one["image_id"]), where, "annotation ids", told))
        x, y, width, height = (float(value) for value in one["bbox"])
        flags = {name: one.get(name) for name in ("iscrowd", "area", "segmentation")}
        raw[one["image_id"]].objects.append((where, names[one["category_id"]], (x, y, x + width, y + height), flags))
    return {name: number for number, name in names.items()}, list(raw.values())


def _mask_fault(segmentation: Any, size: tuple[int, int]) -> tuple[Any, str]:
    """(what of a segmentation can be used, what is wrong with the rest); ("", "") and the like where nothing is."""
    if not segmentation:
        return None, ""
    if isinstance(segmentation, dict):
        if segmentation.get("size") != [size[1], size[0]]:
            return None, f"run lengths for {segmentation.get('size')} in a picture of height, width {[*size[::-1]]}"
        counts = segmentation.get("counts")
        if isinstance(counts, list) and (
            not all(type(one) is int and one >= 0 for one in counts) or sum(counts) != size[0] * size[1]
        ):
            return None, f"run lengths that are not those of {size[0] * size[1]} pixels"
        if not isinstance(counts, list) and not (isinstance(counts, str) and counts.isascii()):
            return None, f"run lengths in a {type(counts).__name__}"
        return segmentation, ""
    if not isinstance(segmentation, list):
        return None, f"a {type(segmentation).__name__}, expected polygons or run lengths"
    good = [one for one in segmentation if _is_polygon(one)]
    short = any(not isinstance(one, list) or len(one) < 6 or len(one) % 2 for one in segmentation)
    wrong = "a polygon of fewer than three points" if short else "a polygon with a point far outside"
    return good or None, "" if len(good) == len(segmentation) else wrong


def _is_polygon(points: Any) -> bool:
    return (
        isinstance(points, list)
        and len(points) >= 6
        and len(points) % 2 == 0
        and all(type(value) in (int, float) and abs(value) <= _FARTHEST_POINT for value in points)
    )


##################################################################################################
#  What is checked of both                                                                       #
##################################################################################################


def _checked(raw: _Raw, names: Sequence[str], faults: list[Fault], training: bool) -> AnnotatedPicture:
    """A picture with its objects, those without area left out."""
    if not raw.path.is_file():
        raise FileNotFoundError(f"{raw.path} is no file, but the annotations name it: add it, or take it out of them")
    width, height = raw.size
    if min(width, height) < 1:  # VOC files of some tools lack it
        try:
            with open_undecoded(raw.path) as picture:
                turned = picture.getexif().get(0x0112, 1) >= 5
                width, height = picture.size[::-1] if turned else picture.size
        except Exception as error:  # on damaged data, Pillow's readers raise almost anything
            raise ValueError(f"{raw.path}: no picture whose size can be read: {error}") from error
    numbers = {name: number for number, name in enumerate(names)}
    objects = []
    for where, name, box, flags in raw.objects:
        found = _checked_box(where, box, width, height)
        if found[2] <= found[0] or found[3] <= found[1]:
            if not training:
                raise ValueError(f"{where}: box {box} has no area, and would count as missed: repair or remove it")
            faults.append(Fault(str(raw.number), where, "boxes without area", f"{list(box)}, left out"))
            continue
        segmentation, wrong = _mask_fault(flags.get("segmentation"), (width, height))
        if wrong and isinstance(flags.get("segmentation"), dict):
            raise ValueError(f"{where}: {wrong}; another picture, or another size of it")
        if wrong:
            faults.append(Fault(str(raw.number), where, "polygons", wrong + ", left out"))
        area = flags.get("area")
        if not isinstance(area, (int, float)) or not 0 < area < width * height * 2:
            area = (found[2] - found[0]) * (found[3] - found[1])
        crowd, difficult = bool(flags.get("iscrowd")), bool(flags.get("difficult"))
        objects.append(Annotation(found, numbers[name], crowd, difficult, float(area), segmentation))
    return AnnotatedPicture(raw.number, raw.path, width, height, tuple(objects))


def _checked_box(where: str, box: Box, width: int, height: int) -> Box:
    """The box, clipped where it leaves the picture by rounding alone."""
    if not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
        raise ValueError(f"{where}: box {box} is no box (x1, y1, x2, y2): repair or remove it")
    outside = max(-box[0], -box[1], box[2] - width, box[3] - height)
    if outside > OUTSIDE:
        raise ValueError(
            f"{where}: box {box} leaves its picture of {width} x {height} by {outside:.1f} pixels: repair or remove "
            "it; boxes of another size of the picture look like this"
        )
    return max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3])


def _kept(pictures: list[AnnotatedPicture], faults: list[Fault], training: bool, name: str) -> list[AnnotatedPicture]:
    """All for a test; for training those with something to learn, crowds left out."""
    if not training:
        return pictures
    kept = []
    for one in pictures:
        objects = tuple(thing for thing in one.objects if not thing.crowd)
        if objects:
            kept.append(AnnotatedPicture(one.number, one.path, one.width, one.height, objects))
        else:
            faults.append(Fault(str(one.number), one.path.name, "pictures without objects", "left out of training"))
    if not kept:
        raise ValueError(f"{name}: none of {len(pictures)} pictures shows an object: nothing to learn")
    return kept


def _check_counts(data: AnnotatedPictures, training: bool) -> None:
    without = [fault for fault in data.faults if fault.reason == "boxes without area"]
    empty = len(without)
    if empty > MOST_EMPTY * (data.objects + empty):
        raise ValueError(
            f"{data.name}: {empty} of {data.objects + empty} boxes have no area, more than {MOST_EMPTY:.0%}: corners "
            f"where widths should be, or the reverse? The first: {without[0].where}, {without[0].detail}"
        )
    met = {thing.label for one in data.pictures for thing in one.objects}
    for number, name in enumerate(data.class_names):
        if number not in met:
            told = "never learnt" if training else "left out of the mean"
            data.faults.append(Fault(None, data.name, "categories without objects", f"{name!r}, {told}"))


def mask_of(thing: Annotation, width: int, height: int) -> np.ndarray:
    """(height, width) uint8, 1 on the object; its box where it has no mask (a crowd without one).

    Raises:
        ImportError: pycocotools is missing.
    """
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError('masks need pycocotools: pip install -e ".[detection]"') from error
    if thing.segmentation is None:
        filled = np.zeros((height, width), np.uint8)
        x1, y1, x2, y2 = (int(round(value)) for value in thing.box)
        filled[y1:y2, x1:x2] = 1
        return filled
    coded = thing.segmentation
    if isinstance(coded, list):
        coded = coco_mask.merge(coco_mask.frPyObjects(coded, height, width))
    elif isinstance(coded["counts"], list):
        coded = coco_mask.frPyObjects(coded, height, width)
    return coco_mask.decode(coded)
