"""What evaluation reads: order, labels, and what it refuses."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image

from training.data.labelled import check_class_names, labelled_folder, labelled_shards, open_pictures
from training.data.records import Sample
from training.data.shards import ShardWriter, write_dataset_json


def picture(colour, suffix="PNG"):
    file = io.BytesIO()
    Image.new("RGB", (12, 10), colour).save(file, suffix)
    return file.getvalue()


def sample(key, **fields):
    return Sample(key=key, image=picture("red"), image_suffix="png", **fields)


def write_shards(folder, samples, shard_size=3, **described):
    for start in range(0, len(samples), shard_size):
        with ShardWriter(folder / f"part-{start:03d}.tar") as writer:
            for one in samples[start : start + shard_size]:
                writer.write(one)
    write_dataset_json(folder, {}, None, {}, **described)
    return str(folder)


def test_missing_data_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere.*shards \(\*.tar.*sub-folder of pictures"):
        open_pictures(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="one sub-folder of pictures for each class, found none"):
        labelled_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "message"), [(["a", " "], "number 2 is empty"), (["a", "b", "A "], "class names repeat: 'A', 'a'")]
)
def test_class_names_are_checked(names, message):
    with pytest.raises(ValueError, match=message):
        check_class_names(names, "here")


@pytest.fixture
def image_folder(tmp_path):
    for name, count in (("sea_lion", 3), ("dog", 2)):
        (tmp_path / "animals" / name / "deeper").mkdir(parents=True)
        for i in range(count):
            (tmp_path / "animals" / name / ("deeper" if i else "") / f"{i}.png").write_bytes(picture((i, 0, 0)))
    (tmp_path / "animals" / "dog" / "notes.txt").write_text("no picture")
    return tmp_path / "animals"


def test_folder_of_classes(image_folder, tmp_path):
    data = labelled_folder(str(image_folder))
    assert (data.name, data.class_names, data.labels) == ("animals", ["dog", "sea lion"], [0, 0, 1, 1, 1])
    assert [np.asarray(data.read(i))[0, 0, 0] for i in range(5)] == [0, 1, 0, 1, 2]
    assert len(labelled_folder(str(image_folder), max_samples=3)) == 3
    (tmp_path / "names").write_text("sea_lion\teared seal\ndog\thound\n")
    assert labelled_folder(str(image_folder), str(tmp_path / "names")).class_names == ["hound", "eared seal"]
    (tmp_path / "names").write_text("hound\nseal\n")
    assert labelled_folder(str(image_folder), str(tmp_path / "names")).class_names == ["hound", "seal"]


def test_pictures_beside_the_classes_are_counted(image_folder, capsys):
    (image_folder / "loose.PNG").write_bytes(picture("blue"))
    assert len(labelled_folder(str(image_folder))) == 5
    assert "passed over: 1 .png beside the folders of classes, 1 .txt" in capsys.readouterr().err


def test_hidden_files_and_folders_are_no_data(image_folder):
    clean = labelled_folder(str(image_folder))
    (image_folder / "dog" / "._0.png").write_bytes(b"\0\5\x16\7")
    for hidden in (".ipynb_checkpoints", "dog/.thumbs", "__MACOSX", "dog/@eaDir/0.png"):
        (image_folder / hidden).mkdir(parents=True)
        (image_folder / hidden / "1-checkpoint.png").write_bytes(picture("blue"))
    found = labelled_folder(str(image_folder))
    assert (found.class_names, found.labels, found.files) == (clean.class_names, clean.labels, clean.files)
    (image_folder / "._000.tar").write_bytes(b"\0\5\x16\7")
    assert open_pictures(str(image_folder)).files == clean.files


def test_folder_and_names_that_do_not_fit(image_folder, tmp_path):
    (tmp_path / "names").write_text("one\ntwo\nthree\n")
    with pytest.raises(ValueError, match="has 3 names, but the data has 2 classes"):
        labelled_folder(str(image_folder), str(tmp_path / "names"))
    (tmp_path / "names").write_text("dog\thound\ncat\tcat\n")
    with pytest.raises(ValueError, match=r"without a name: \['sea_lion'\]; names of absent folders: \['cat'\]"):
        labelled_folder(str(image_folder), str(tmp_path / "names"))
    (image_folder / "cat").mkdir()
    with pytest.raises(ValueError, match="1 of 3 class names have no picture: 'cat'"):
        labelled_folder(str(image_folder))
    assert len(labelled_folder(str(image_folder), max_samples=1).labels) == 1
    (image_folder / "cat" / "x.jpg").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="picture .*x.jpg cannot be read"):
        labelled_folder(str(image_folder)).read(0)


def test_splits_are_not_taken_for_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "1.png").write_bytes(picture("red"))
    with pytest.raises(ValueError, match="are splits, not classes; name one"):
        labelled_folder(str(tmp_path))
    assert labelled_folder(str(tmp_path / "test")).class_names == ["cat"]


def test_manifest_with_classes(tmp_path):
    for name in ("1.png", "2.png"):
        (tmp_path / name).write_bytes(picture("red" if name[0] == "1" else "blue"))
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text('{"image": "2.png", "class_name": "b"}\n{"image": "1.png", "class_name": "a"}\n')
    found = labelled_shards(str(manifest))
    assert (found.name, found.class_names, found.labels) == ("pairs", ["a", "b"], [1, 0])
    assert found.read(1).getpixel((0, 0)) == (255, 0, 0)


def test_shards_with_classes(tmp_path):
    samples = [sample(f"k{i}", extra={"class_name": name}) for i, name in enumerate(["b", "a", "b", "a"])]
    data = write_shards(tmp_path / "objects", samples, classes=["b", "a"])
    found = pickle.loads(pickle.dumps(labelled_shards(data)))  # as processes that are started get it
    assert (found.name, found.class_names, found.labels) == ("objects", ["b", "a"], [0, 1, 0, 1])
    assert found.read(3).size == (12, 10)
    (tmp_path / "names").write_text("a\nb\nc\n")
    with pytest.raises(ValueError, match="1 of 3 class names have no picture: 'c'"):
        labelled_shards(data, str(tmp_path / "names"))
    (tmp_path / "names").write_text("a\n")
    with pytest.raises(ValueError, match=r"not among the 1 names: \['b'\]"):
        labelled_shards(data, str(tmp_path / "names"))
    (tmp_path / "names").write_text("a\tan ant\nb\ta bee\n")
    found = labelled_shards(data, str(tmp_path / "names"))
    assert (found.class_names, found.labels) == (["a bee", "an ant"], [0, 1, 0, 1])
    # A part of the data is spread over all of it, and need not have every class.
    assert (
        labelled_shards(data, max_samples=2).labels == [0, 0] and len(labelled_shards(data, max_samples=9).labels) == 4
    )


def test_some_shards_with_classes_by_a_glob_or_a_list(tmp_path):
    samples = [sample(f"k{i}", extra={"class_name": name}) for i, name in enumerate("bcaab")]
    data = write_shards(tmp_path / "objects", samples, shard_size=2, classes=["c", "b", "a"])
    found = open_pictures(f"{data}/part-00[02].tar")
    # As for a single tar, the classes are those met: the shards left out may hold the others.
    assert (found.class_names, found.labels) == (["a", "b", "c"], [1, 2, 0, 0])
    (tmp_path / "some.txt").write_text("objects/part-004.tar\nobjects/part-002.tar\n")
    assert open_pictures(str(tmp_path / "some.txt")).labels == [1, 0, 0]
    assert open_pictures(str(tmp_path / "some.txt")).read(0).size == (12, 10)


def test_shards_without_classes(tmp_path):
    data = write_shards(tmp_path / "objects", [sample("k0", extra={"class_name": "a"}), sample("k1", caption="x")])
    with pytest.raises(ValueError, match="sample 'k1' has no class_name"):
        labelled_shards(data)
    data = write_shards(tmp_path / "numbers", [sample("k0", extra={"class_name": 3})])
    with pytest.raises(ValueError, match="sample 'k0': class_name is 3, expected a string"):
        labelled_shards(data)
