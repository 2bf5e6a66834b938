"""Readers of VOC and COCO: what they give, and what they say to every fault that real files have."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.annotations import mask_of, open_annotations
from training.data.shared_files import refuse_shared_files

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


def picture(path, width=40, height=30, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def coco(folder, annotations, images=2, **changes):
    """A COCO file of pictures 1, 2, ... of 40 x 30; its source string."""
    entries = [{"id": n, "file_name": f"{n}.png", "width": 40, "height": 30} for n in range(1, images + 1)]
    for n in range(1, images + 1):
        picture(folder / "pictures" / f"{n}.png", seed=n)
    document = {"images": entries, "annotations": annotations, "categories": CATEGORIES} | changes
    (folder / "a.json").write_text(json.dumps(document))
    return [f"{folder / 'a.json'}:pictures"]


def thing(number=1, image=1, box=(4, 5, 10, 12), category=3, **more):
    return {"id": number, "image_id": image, "bbox": list(box), "category_id": category, "iscrowd": 0} | more


def voc(folder, objects, name="000001", listed="", size=True, head=""):
    """A VOC folder of one picture of 40 x 30; its source string."""
    picture(folder / "JPEGImages" / f"{name}.jpg")
    nodes = "".join(
        f"<object><name>{label}</name>{more}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for label, (x1, y1, x2, y2), more in objects
    )
    sides = "<size><width>40</width><height>30</height></size>" if size else ""
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "Annotations" / f"{name}.xml").write_text(f"{head}<annotation>{sides}{nodes}</annotation>")
    (folder / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
    with open(folder / "ImageSets" / "Main" / "trainval.txt", "a") as file:
        file.write((listed or name) + "\n")
    return f"{folder}:trainval"


def told(data):
    return "\n".join(data.told())


def test_coco(tmp_path):
    square = [[4, 5, 14, 5, 14, 17, 4, 17]]
    lengths = {"size": [30, 40], "counts": [0, 30, 1170]}
    crowd = thing(3, 1, (0, 0, 1, 30), iscrowd=1, segmentation=lengths)
    sources = coco(tmp_path, [thing(1, area=99.0, segmentation=square), thing(2, 2, category=7), crowd])
    data = open_annotations(sources, training=False)
    assert data.kind == "coco" and data.class_names == ["cat", "dog"] and data.class_ids == [3, 7]
    (first, second), (other,) = (one.objects for one in data.pictures)
    assert first.box == (4.0, 5.0, 14.0, 17.0) and first.area == 99.0 and first.label == 0
    assert second.crowd and other.label == 1 and other.area == 120.0
    filled = np.zeros((30, 40), bool)
    filled[5:17, 4:14] = True
    assert np.array_equal(mask_of(first, 40, 30) > 0, filled)
    assert mask_of(second, 40, 30)[:, 0].all() and mask_of(second, 40, 30).sum() == 30
    assert [len(one.objects) for one in open_annotations(sources, training=True).pictures] == [1, 1]  # no crowd


def test_voc_of_two_years(tmp_path):
    """Pixels are numbered from 1, and the last belongs to the box."""
    first = voc(tmp_path / "VOC2007", [("dog", (1, 1, 40, 30), ""), ("cat", (3, 4, 5, 6), "<difficult>1</difficult>")])
    other = voc(tmp_path / "VOC2012", [("bird", (2.5, 3, 9.25, 8), "")], size=False)
    data = open_annotations([first, other], training=True)
    assert data.class_names == ["bird", "cat", "dog"] and len(data) == 2 and not data.has_masks
    dog, cat = data.pictures[0].objects
    assert dog.box == (0, 0, 40, 30) and not dog.difficult and cat.box == (2, 3, 5, 6) and cat.difficult
    assert data.pictures[1].objects[0].box == (1.5, 2, 9.25, 8)
    assert (data.pictures[1].width, data.pictures[1].height) == (40, 30)  # read off the picture
    assert "1 boxes with fractions: 000001.xml, object 0: [2.5, 3.0, 9.25, 8.0], taken as they are" in told(data)


def test_faults_that_are_counted_and_named(tmp_path):
    many = [thing(n, 1) for n in range(10, 210)]
    found = [thing(0), thing(5), thing(5), thing(918, box=(4, 5, 10, 0)), thing(6, box=(-0.5, 0, 41, 30))]
    polygons = [thing(7, segmentation=[[1, 2, 3, 4], [4, 5, 14, 5, 14, 17]])]
    data = open_annotations(coco(tmp_path, many + found + polygons, images=3), training=True)
    lines = told(data)
    assert "3 annotation ids: a.json, annotation 0: repeated, 0 or missing; numbered anew" in lines
    assert "1 boxes without area: a.json, annotation 918: [4.0, 5.0, 14.0, 5.0], left out" in lines
    assert "2 pictures without objects: 2.png: left out of training; 3.png: left out of training" in lines
    assert "1 categories without objects: a: 'dog', never learnt" in lines
    assert "1 polygons: a.json, annotation 7: a polygon of fewer than three points, left out" in lines
    assert data.pictures[0].objects[203].box == (0.0, 0.0, 40.0, 30.0)  # clipped by half a pixel
    assert len(open_annotations(coco(tmp_path, many, images=3), training=False)) == 3


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        ([thing(box=(4, 5, 90, 12))], {}, r"annotation 1: box .* leaves its picture of 40 x 30 by 54.0 pixels"),
        ([thing(box=(4, 5, -3, 12))], {}, r"annotation 1: box .* is no box"),
        ([thing(box=(4, 5, float("nan"), 12))], {}, "is no box"),
        (
            [thing(n, box=(1, 1, 0, 2)) for n in range(1, 4)] + [thing(9), thing(9)],
            {},
            r"3 of 5 boxes have no area.*The first: .*annotation 1, \[1.0, 1.0, 1.0, 3.0\]",
        ),
        ([thing(category=99)], {}, "category 99 is not in the file"),
        ([thing(image=99)], {}, "its picture 99"),
        ([thing()], {"categories": [*CATEGORIES, {"id": 9, "name": "cat"}]}, "repeat an id or a name"),
        ([thing()], {"categories": "none"}, "expected lists images, annotations and categories"),
        ([{"id": 1}], {}, "lacks a field"),
        ([], {}, "none of 2 pictures shows an object"),
        ([thing(segmentation={"size": [9, 9], "counts": [81]})], {}, r"run lengths for \[9, 9\]"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, annotations, changes, message):
    with pytest.raises(ValueError, match=message):
        open_annotations(coco(tmp_path, annotations, **changes), training=True)


def test_files_that_are_missing_or_lead_elsewhere(tmp_path):
    sources = coco(tmp_path, [thing()])
    with pytest.raises(FileNotFoundError, match="expected COCO's annotations"):
        open_annotations([f"{tmp_path / 'b.json'}:pictures"], training=True)
    with pytest.raises(FileNotFoundError, match="expected the pictures of"):
        open_annotations([f"{tmp_path / 'a.json'}:none"], training=True)
    Path(tmp_path, "pictures", "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1.png is no file, but the annotations name it"):
        open_annotations(sources, training=True)
    outside = [{"id": 1, "file_name": "../1.png", "width": 40, "height": 30}]
    with pytest.raises(ValueError, match="leads out of"):
        open_annotations(with_pictures(tmp_path, outside), training=True)
    with pytest.raises(FileNotFoundError, match=r"ImageSets/Main/trainval.txt is no file|expected a VOC folder"):
        open_annotations([f"{tmp_path}:trainval"], training=True)
    with pytest.raises(FileNotFoundError, match="lists 000009"):
        open_annotations([voc(tmp_path / "v", [("a", (1, 1, 2, 2), "")], listed="000009")], training=True)
    with pytest.raises(ValueError, match="expected VOC_FOLDER:SPLIT"):
        open_annotations([str(tmp_path)], training=True)
    with pytest.raises(ValueError, match="sources of one kind"):
        open_annotations([*sources, "VOC2007:test"], training=True)


def with_pictures(folder, images):
    document = {"images": images, "annotations": [thing()], "categories": CATEGORIES}
    (folder / "a.json").write_text(json.dumps(document))
    return [f"{folder / 'a.json'}:pictures"]


def test_voc_files_of_strangers(tmp_path):
    with pytest.raises(ValueError, match="DOCTYPE"):
        open_annotations([voc(tmp_path / "a", [], head='<!DOCTYPE x [<!ENTITY y "z">]>')], training=True)
    with pytest.raises(ValueError, match="is no XML"):
        open_annotations([voc(tmp_path / "b", [], head="<annotation>")], training=True)
    with pytest.raises(ValueError, match="xmin is 'x', expected a number"):
        open_annotations([voc(tmp_path / "c", [("cat", ("x", 1, 2, 3), "")])], training=True)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "cp037"])
def test_a_doctype_is_seen_in_whatever_letters_it_is_written(tmp_path, encoding):
    source = voc(tmp_path, [("cat", (1, 1, 9, 9), "")])
    path = tmp_path / "Annotations" / "000001.xml"
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    hidden = '<!DOCTYPE x [<!ENTITY y "zzzzzzzz">]>' + path.read_text().replace("cat", "&y;")
    as_utf16 = encoding.startswith("utf-16")
    path.write_bytes((head + hidden).encode(encoding) if as_utf16 else head.encode() + hidden.encode(encoding))
    with pytest.raises(ValueError, match="DOCTYPE|is no XML"):
        open_annotations([source], training=True)


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1", "gb2312"])
def test_names_in_other_letters_than_utf_8_are_read(tmp_path, encoding):
    name = "猫" if encoding == "gb2312" else "Bär"
    source = voc(tmp_path, [(name, (1, 1, 9, 9), "")], head=f'<?xml version="1.0" encoding="{encoding}"?>')
    path = tmp_path / "Annotations" / "000001.xml"
    path.write_bytes(path.read_text().encode(encoding))
    assert open_annotations([source], training=True).class_names == [name]


def test_annotations_that_would_cost_without_end_are_refused(tmp_path):
    with pytest.raises(ValueError, match="leads out of"):
        open_annotations([voc(tmp_path / "v", [("a", (1, 1, 2, 2), "")], listed="../other")], training=True)
    sources = coco(tmp_path / "c", [thing(segmentation=[[1, 1, 9e9, 1, 5, 5]]), thing(2, area=10**400)])
    data = open_annotations(sources, training=True)
    assert "1 polygons: a.json, annotation 1: " in told(data)
    assert [one.segmentation for one in data.pictures[0].objects] == [None, None]
    assert data.pictures[0].objects[1].area == 120
    for counts in ([1, 2], [-1, 1201], [600, 600.0], 7, "\u00e9"):
        with pytest.raises(ValueError, match="annotation 1: run lengths"):
            open_annotations(coco(tmp_path / "r", [thing(segmentation={"size": [30, 40], "counts": counts})]), True)
    (tmp_path / "c" / "a.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON .nested too deep"):
        open_annotations(sources, training=True)


def test_training_and_test_data_have_one_set_of_categories(tmp_path):
    train = coco(tmp_path / "a", [thing()], images=1)
    data = open_annotations(train, training=True)
    other = coco(tmp_path / "b", [thing(category=4)], categories=[{"id": 4, "name": "cow"}])
    with pytest.raises(ValueError, match=r"Only here: \['cow'\]; only there: \['cat', 'dog'\]"):
        open_annotations(other, training=False, class_names=data.class_names)
    with pytest.raises(ValueError, match="has no area, and would count as missed"):
        open_annotations(coco(tmp_path / "c", [thing(box=(4, 5, 0, 3))]), training=False)
    same = open_annotations(coco(tmp_path / "d", [thing(2, 2)]), training=False)
    with pytest.raises(ValueError, match=r"1 of 2 pictures of a are trained on"):
        refuse_shared_files([one.path for one in data.pictures], [one.path for one in same.pictures], same.name)


def test_the_fingerprint_is_of_boxes_and_not_of_places(tmp_path):
    one, moved, other = (
        open_annotations(coco(tmp_path / name, [thing(box=box)]), training=True).fingerprint
        for name, box in (("a", (4, 5, 10, 12)), ("b", (4, 5, 10, 12)), ("c", (4, 5, 10, 13)))
    )
    assert one == moved != other
