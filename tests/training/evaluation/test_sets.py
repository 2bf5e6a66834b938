"""The data sets of Table 7 in small, laid out as their archives are, against labels that the pictures carry in their
colours."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image
from scipy.io import savemat

from training.evaluation.results import averages
from training.evaluation.sets import PAPER_METRIC, TABLE_7, open_both_splits, open_set

pytest.importorskip("clip_benchmark")


def paint(path, label):
    """A picture of one colour that says which class it is of. PNG data, so that the colour stays what it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 8), (label, 7, 100)).save(path, "PNG")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def colours(data):
    """Of the pictures as a process that was started reads them."""
    data = pickle.loads(pickle.dumps(data))
    return [int(np.asarray(data.read(number))[0, 0, 0]) for number in range(len(data))]


def cifar(root, monkeypatch, library, folder, key):
    """Pickles as CIFAR's, with their own checksums in place of the published ones."""
    labels = [2, 0, 1, 1]
    pixels = np.zeros((4, 3, 32, 32), np.uint8)
    pixels[:, 0] = np.array(labels)[:, None, None]
    files = {
        library.test_list[0][0]: {"data": pixels.reshape(4, -1), key: labels},
        library.train_list[0][0]: {"data": 9 + pixels[:1].reshape(1, -1), key: [2]},
        library.meta["filename"]: {library.meta["key"]: ["aquarium_fish", "bear", "cat"]},
    }
    sums = {}
    for name, content in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        data = pickle.dumps(content)
        (root / folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    test, train, meta = library.test_list[0][0], library.train_list[0][0], library.meta["filename"]
    monkeypatch.setattr(library, "test_list", [[test, sums[test]]])
    monkeypatch.setattr(library, "train_list", [[train, sums[train]]])
    monkeypatch.setattr(library, "meta", library.meta | {"md5": sums[meta]})
    return ["aquarium fish", "bear", "cat"], labels


def cifar10(root, monkeypatch):
    return cifar(root, monkeypatch, torchvision.datasets.CIFAR10, "cifar-10-batches-py", "labels")


def cifar100(root, monkeypatch):
    return cifar(root, monkeypatch, torchvision.datasets.CIFAR100, "cifar-100-python", "fine_labels")


def dtd(root, monkeypatch):
    base = root / "dtd/dtd"
    lines = {"test1": ["woven/w1.jpg", "banded/b1.jpg", "woven/w2.jpg"], "train1": ["woven/w3.jpg"], "val1": []}
    for split, names in lines.items():
        write(base / f"labels/{split}.txt", "".join(f"{name}\n" for name in names))
        for name in names:
            paint(base / "images" / name, int(name.startswith("woven")))
    return ["banded", "woven"], [1, 0, 1]


def cars(root, monkeypatch):
    base = root / "stanford_cars"
    (base / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van 2012", "smart fortwo 2012"], object)
    savemat(base / "devkit/cars_meta.mat", {"class_names": names})
    labels = [2, 0, 1]
    rows = np.array(
        [(f"{number}.jpg", label + 1) for number, label in enumerate(labels)], dtype=[("fname", object), ("class", int)]
    )
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    for number, label in enumerate(labels):
        paint(base / f"cars_test/{number}.jpg", label)
    return list(names), labels


def food101(root, monkeypatch):
    base = root / "food-101"
    test = {"apple_pie": ["apple_pie/1", "apple_pie/2"], "baby_back_ribs": ["baby_back_ribs/3"]}
    write(base / "meta/test.json", json.dumps(test))
    for label, names in enumerate(test.values()):
        for name in names:
            paint(base / f"images/{name}.jpg", label)
    return ["apple pie", "baby back ribs"], [0, 0, 1]


def pets(root, monkeypatch):
    base = root / "oxford-iiit-pet"
    lines = ["Abyssinian_201 1 1 1", "american_bulldog_203 2 2 1", "Abyssinian_204 1 1 1"]
    write(base / "annotations/test.txt", "".join(f"{line}\n" for line in lines))
    for line in lines:
        paint(base / f"images/{line.split()[0]}.jpg", int(line.split()[1]) - 1)
    return ["Abyssinian", "American Bulldog"], [0, 1, 0]


def flowers(root, monkeypatch):
    base = root / "flowers-102"
    labels = list(range(101, -1, -1))
    base.mkdir()
    savemat(base / "imagelabels.mat", {"labels": np.array([[1, *(label + 1 for label in labels)]])})
    savemat(base / "setid.mat", {"trnid": np.array([[1]]), "valid": np.array([[1]]), "tstid": np.arange(2, 104)[None]})
    for number, label in enumerate(labels, 2):
        paint(base / f"jpg/image_{number:05d}.jpg", label)
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5: True)
    return None, labels


def aircraft(root, monkeypatch):
    base = root / "fgvc-aircraft-2013b/data"
    write(base / "variants.txt", "707-320\nF/A-18\n")
    write(base / "images_variant_test.txt", "0000002 F/A-18\n0000001 707-320\n")
    paint(base / "images/0000002.jpg", 1)
    paint(base / "images/0000001.jpg", 0)
    return ["707-320", "F/A-18"], [1, 0]


def sun397(root, monkeypatch):
    base = root / "SUN397"
    write(base / "ClassName.txt", "/a/abbey\n/a/apartment_building/outdoor\n")
    write(base / "Testing_01.txt", "/a/apartment_building/outdoor/sun_c.jpg\n/a/abbey/sun_b.jpg\n")
    paint(base / "a/abbey/sun_a.jpg", 0)
    paint(base / "a/abbey/sun_b.jpg", 0)
    paint(base / "a/apartment_building/outdoor/sun_c.jpg", 1)
    return ["abbey", "apartment building outdoor"], [1, 0]


def caltech101(root, monkeypatch):
    folders = ["BACKGROUND_Google", "Faces", "Faces_easy", "Leopards", "Motorbikes", *(f"k{n:02d}" for n in range(97))]
    for label, name in enumerate(folders):
        paint(root / f"caltech101/101_ObjectCategories/{name}/image_0001.jpg", label)
    return None, list(range(102))


def imagenet(root, monkeypatch):
    paint(root / "imagenet/val/n01443537/b.JPEG", 1)
    paint(root / "imagenet/val/n01440764/a.JPEG", 0)
    return ["tench", "goldfish"], [0, 1]


LAYOUTS = (cifar10, cifar100, dtd, cars, food101, pets, flowers, aircraft, sun397, caltech101, imagenet)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_pictures_and_labels_of_every_set(layout, tmp_path, monkeypatch):
    names, labels = layout(tmp_path, monkeypatch)
    data = open_set(layout.__name__, str(tmp_path))
    assert data.labels == labels
    assert colours(data) == labels
    if names is not None:
        assert data.class_names == names
    spec = TABLE_7[layout.__name__]
    assert data.name.startswith(f"{spec.title} (") and f"found {len(labels):,} in" in data.name
    assert "not the paper's split" in data.name and f"Table 7 has {spec.numbers[2]:,}" in data.name
    assert data.main_metric[0] == spec.metric and data.main_metric[1] != PAPER_METRIC
    assert data.described["dataset_type"] == layout.__name__


# Table 7 of the paper (arXiv 2204.14095, appendix B.1): classes, training pictures, test pictures, metric.
PAPERS_TABLE = {
    "CIFAR-10": ("10", "50,000", "10,000", "accuracy"),
    "CIFAR-100": ("100", "50,000", "10,000", "accuracy"),
    "Describable Textures": ("47", "3,760", "1,880", "accuracy"),
    "Stanford Cars": ("196", "8,144", "8,041", "accuracy"),
    "Food-101": ("101", "75,750", "25,250", "accuracy"),
    "Oxford-IIIT Pets": ("37", "3,680", "3,669", "mean per class"),
    "Oxford Flowers 102": ("102", "2,040", "6,149", "mean per class"),
    "FGVC Aircraft": ("100", "6,667", "3,333", "mean per class"),
    "SUN397": ("397", "19,850", "19,850", "accuracy"),
    "Caltech-101": ("102", "3,060", "6,085", "mean per class"),
    "ImageNet": ("1000", "1,281,167", "50,000", "accuracy"),
}


def test_table_7_has_the_papers_numbers():
    metrics = {"top_1": "accuracy", "mean_per_class": "mean per class"}
    found = {
        spec.title: (str(spec.numbers[0]), *(f"{size:,}" for size in spec.numbers[1:]), metrics[spec.metric])
        for spec in TABLE_7.values()
    }
    assert found == PAPERS_TABLE


@pytest.mark.parametrize("name", TABLE_7)
def test_missing_data_says_what_to_download_and_where_it_belongs(name, tmp_path):
    spec = TABLE_7[name]
    with pytest.raises(FileNotFoundError) as error:
        open_set(name, str(tmp_path))
    text = str(error.value)
    assert f"lacks {spec.title}" in text and "Download" in text and "http" in text
    assert str(tmp_path / spec.pictures.split("|")[0].format(part=spec.parts["test"])) in text


def test_class_names_are_clips(tmp_path, monkeypatch):
    flowers(tmp_path, monkeypatch)
    caltech101(tmp_path, monkeypatch)
    assert open_set("flowers", str(tmp_path)).class_names[:2] == ["pink primrose", "hard-leaved pocket orchid"]
    assert open_set("caltech101", str(tmp_path)).class_names[:3] == ["background", "off-center face", "centered face"]
    paint(tmp_path / "val/n03773504/a.JPEG", 0)
    paint(tmp_path / "val/n04008634/a.JPEG", 1)  # two classes that CLIP's list calls the same
    assert open_set("imagenet", str(tmp_path)).class_names == ["missile", "missile"]
    paint(tmp_path / "val/goldfish/a.JPEG", 1)
    with pytest.raises(ValueError, match=r"ImageNet under .* no WordNet ids .*'goldfish'.*Download"):
        open_set("imagenet", str(tmp_path))


def test_only_the_papers_numbers_count_as_the_papers(tmp_path, monkeypatch):
    names, labels = dtd(tmp_path, monkeypatch)
    spec = TABLE_7["dtd"]
    as_found = type(spec)(**vars(spec) | {"numbers": (2, 1, 3)})
    monkeypatch.setitem(TABLE_7, "dtd", as_found)
    data = open_set("dtd", str(tmp_path))
    assert (data.name, data.main_metric) == ("Describable Textures", ("top_1", PAPER_METRIC))
    training = open_set("dtd", str(tmp_path), "train", max_samples=1)
    assert training.labels == [0] and "not the paper's split" in training.name  # one class of two was found
    fewer = open_set("dtd", str(tmp_path), max_samples=2)
    assert fewer.labels == [1, 0] and "found 2 in 2 classes, Table 7 has 3 in 2" in fewer.name


def test_split_files(tmp_path, monkeypatch):
    caltech101(tmp_path, monkeypatch)
    paint(tmp_path / "caltech101/101_ObjectCategories/Faces/image_0002.jpg", 1)
    lines = [f"{path.parent.name}/{path.name}" for path in sorted(tmp_path.rglob("*_0001.jpg"))]
    split = tmp_path / "test.txt"
    split.write_text("\n".join(["Faces/image_0002.jpg", *lines[:1], *lines[2:-1], f"{lines[-1]}\tk96"]))
    data = open_set("caltech101", str(tmp_path), split_file=str(split))
    assert colours(data) == data.labels == [1, 0, *range(2, 102)]
    assert "split file test.txt; not the paper's split: found 102 in 102 classes" in data.name
    spec = TABLE_7["caltech101"]
    monkeypatch.setitem(TABLE_7, "caltech101", type(spec)(**vars(spec) | {"numbers": (102, 1, 102)}))
    assert open_set("caltech101", str(tmp_path), split_file=str(split)).name == "Caltech-101 (split file test.txt)"
    # As many pictures as Table 7 has, but no word on which: still not its split.
    (tmp_path / "caltech101/101_ObjectCategories/Faces/image_0002.jpg").unlink()
    assert "not the paper's split: found 102" in open_set("caltech101", str(tmp_path)).name

    for text, error, message in (
        ("nowhere/x.jpg", ValueError, "nowhere/x.jpg is not among the 102 pictures"),
        ("Faces/x.jpg\tFaces", FileNotFoundError, "1 of 1 pictures are not there, first Faces/x.jpg"),
        ("Faces/image_0001.jpg\tface", ValueError, "no class is called 'face'"),
        ("Faces/image_0001.jpg\nFaces/image_0001.jpg", ValueError, "txt:2: .*named twice"),
        ("\n", ValueError, "has no lines"),
    ):
        split.write_text(text)
        with pytest.raises(error, match=message):
            open_set("caltech101", str(tmp_path), split_file=str(split))
    with pytest.raises(FileNotFoundError, match="no split file"):
        open_set("caltech101", str(tmp_path), split_file=str(tmp_path / "none"))


def test_parts_to_learn_from_and_to_measure_on(tmp_path, monkeypatch):
    food101(tmp_path, monkeypatch)
    write(tmp_path / "food-101/meta/train.json", json.dumps({"apple_pie": ["apple_pie/4"], "baby_back_ribs": []}))
    paint(tmp_path / "food-101/images/apple_pie/4.jpg", 0)
    with pytest.raises(ValueError, match="1 of 2 class names have no picture"):
        open_both_splits("food101", str(tmp_path))
    train = {"apple_pie": ["apple_pie/4"], "baby_back_ribs": ["baby_back_ribs/5"]}
    write(tmp_path / "food-101/meta/train.json", json.dumps(train))
    paint(tmp_path / "food-101/images/baby_back_ribs/5.jpg", 1)
    train, test = open_both_splits("food101", str(tmp_path))
    assert [path.stem for path in train.files] == ["4", "5"] and [path.stem for path in test.files] == ["1", "2", "3"]
    assert colours(train) == train.labels == [0, 1] and "training" not in test.name
    with pytest.raises(ValueError, match="no data set 'mnist'"):
        open_both_splits("mnist", str(tmp_path))

    caltech101(tmp_path, monkeypatch)
    folder = tmp_path / "caltech101"
    with pytest.raises(ValueError, match="comes without a split.*caltech101/test.txt and caltech101/train.txt under"):
        open_both_splits("caltech101", str(tmp_path))
    pictures = sorted(path.relative_to(folder / "101_ObjectCategories") for path in folder.rglob("*.jpg"))
    for path in pictures:
        paint(folder / "101_ObjectCategories" / path.with_name("image_0002.jpg"), 0)
    write(folder / "train.txt", "\n".join(map(str, pictures)))
    write(
        folder / "test.txt",
        "\n".join([*(str(path.with_name("image_0002.jpg")) for path in pictures), str(pictures[3])]),
    )
    with pytest.raises(ValueError, match="1 pictures are in both parts, first .*Leopards/image_0001.jpg"):
        open_both_splits("caltech101", str(tmp_path))
    write(folder / "test.txt", "\n".join(str(path.with_name("image_0002.jpg")) for path in pictures))
    train, test = open_both_splits("caltech101", str(tmp_path))
    assert colours(train) == train.labels and "split file train.txt" in train.name and len(test) == 102


def test_a_file_of_names_for_a_set(tmp_path, monkeypatch):
    dtd(tmp_path, monkeypatch)
    names = tmp_path / "names"
    names.write_text("woven\twoven cloth\nbanded\tstripes\n")
    assert open_set("dtd", str(tmp_path), classes_file=str(names)).class_names == ["stripes", "woven cloth"]
    names.write_text("one\ntwo\nthree\n")
    with pytest.raises(ValueError, match="has 3 names, but the data has 2 classes"):
        open_set("dtd", str(tmp_path), classes_file=str(names))


def test_unknown_names_and_damaged_data(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no data set 'mnist'; Table 7 has cifar10, "):
        open_set("mnist", str(tmp_path))
    with pytest.raises(ValueError, match="expected test or train"):
        open_set("pets", str(tmp_path), "validation")
    cifar10(tmp_path, monkeypatch)
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(b"not what it was")  # the checksum refuses to unpickle it
    with pytest.raises(ValueError, match="CIFAR-10 under .* incomplete or damaged.*Download cifar-10-python.tar.gz"):
        open_set("cifar10", str(tmp_path))


def test_tables_of_several_data_sets_end_with_their_mean():
    assert averages({"pets": 0.5}) == {}
    assert averages({"pets": 0.5, "cars": 0.25}) == {"2 data sets": 0.375}
    assert averages({"pets": 0.5, "imagenet": 0.25}) == {"2 data sets": 0.375}
    found = averages({"pets": 0.5, "imagenet": 0.2, "cars": 0.25})
    assert found == pytest.approx({"3 data sets": 0.95 / 3, "2 data sets without ImageNet": 0.375})
