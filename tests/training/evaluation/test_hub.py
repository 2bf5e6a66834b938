"""Data sets by the `datasets` library, on disk: Parquet, a folder of pictures with metadata, what it saved itself."""

import io
import pickle

import datasets
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from training.evaluation.hub import CaptionedRows, is_hub_data, labelled_hub


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def picture(number):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
    return file.getvalue()


def rows(labels, names=None, **columns):
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=names) if names else None}
    data = {"image": [{"bytes": picture(number), "path": None} for number in range(len(labels))], "label": labels}
    data |= columns
    features = {name: features.get(name) for name in data if features.get(name)}
    data = datasets.Dataset.from_dict(data)
    for name, feature in features.items():
        data = data.cast_column(name, feature)
    return data


def parquet(folder, data, split="test"):
    folder.mkdir(exist_ok=True)
    data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def reds(data):
    """Of the pictures as a process that was started reads them."""
    data = pickle.loads(pickle.dumps(data))
    return [int(np.asarray(data.read(number))[0, 0, 0]) for number in range(len(data))]


def test_class_labels_of_parquet(tmp_path):
    folder = parquet(tmp_path / "pets", rows([1, 0, 1], ["maine_coon", "pug"], note=["x", "y", "z"]))
    data = labelled_hub(folder)
    assert (data.name, data.class_names, data.labels, reds(data)) == (
        "pets",
        ["maine coon", "pug"],
        [1, 0, 1],
        [0, 1, 2],
    )
    assert data.described["dataset_split"] == "test"
    assert reds(labelled_hub(folder, max_samples=2)) == [0, 1]
    assert labelled_hub(f"{folder}/test-00000-of-00001.parquet").labels == [1, 0, 1]
    names = tmp_path / "names"
    names.write_text("a cat\na dog\n")
    assert labelled_hub(folder, classes_file=str(names)).class_names == ["a cat", "a dog"]
    with pytest.raises(FileNotFoundError, match="no split 'validation'.*--split"):
        labelled_hub(folder, split="validation")


def test_what_save_to_disk_wrote(tmp_path):
    saved = datasets.DatasetDict({"train": rows([0, 0], ["a", "b"]), "test": rows([1, 0], ["a", "b"])})
    saved.save_to_disk(tmp_path / "saved")
    assert is_hub_data(str(tmp_path / "saved"))
    assert labelled_hub(str(tmp_path / "saved")).labels == [1, 0]
    with pytest.raises(ValueError, match="1 of 2 class names have no picture: 'b'"):
        labelled_hub(str(tmp_path / "saved"), "train")
    saved["test"].save_to_disk(tmp_path / "one")
    assert labelled_hub(str(tmp_path / "one")).labels == [1, 0]


def test_labels_that_are_words_or_numbers(tmp_path):
    words = parquet(tmp_path / "words", rows(["tom_cat", "dog", "dog"]))
    assert (labelled_hub(words).class_names, labelled_hub(words).labels) == (["dog", "tom cat"], [1, 0, 0])
    numbers = parquet(tmp_path / "numbers", rows([1, 0, 1]))
    with pytest.raises(ValueError, match="numbers without names; --classes"):
        labelled_hub(numbers)
    names = tmp_path / "names"
    names.write_text("cat\ndog\n")
    assert labelled_hub(numbers, classes_file=str(names)).labels == [1, 0, 1]
    names.write_text("cat\ndog\nowl\n")
    with pytest.raises(ValueError, match="has 3 names, but the data has 2 classes"):
        labelled_hub(numbers, classes_file=str(names))
    hidden = parquet(tmp_path / "hidden", rows([-1, -1], ["a", "b"]))
    with pytest.raises(ValueError, match="rows without a label in label; .* may not be public"):
        labelled_hub(hidden)


def test_columns(tmp_path):
    data = rows([0, 1], ["a", "b"], fine=[1, 0], text=["a b", "c"], alt=["x", "y"])
    folder = parquet(tmp_path / "d", data.cast_column("fine", datasets.ClassLabel(names=["p", "q"])))
    assert labelled_hub(folder).labels == [0, 1]  # of two class columns the one with the usual name
    assert labelled_hub(folder, label_column="fine").class_names == ["p", "q"]
    assert [one.caption for one in CaptionedRows(folder)] == ["a b", "c"]
    assert [one.caption for one in CaptionedRows(folder, caption_column="alt")] == ["x", "y"]
    with pytest.raises(ValueError, match="--label-column nothing: there is no such column; there are image, label"):
        labelled_hub(folder, label_column="nothing")
    with pytest.raises(ValueError, match="--image-column text: the column holds"):
        labelled_hub(folder, image_column="text")
    bare = parquet(tmp_path / "bare", rows([0, 1], ["a", "b"]).remove_columns("label"))
    with pytest.raises(ValueError, match="--label-column is needed: the columns are image, and none would do"):
        labelled_hub(bare)


def test_captions(tmp_path):
    folder = parquet(tmp_path / "d", rows([0, 0], sentences=[["one", "two"], ["three"]]).remove_columns("label"))
    samples = CaptionedRows(folder)
    assert [one.captions or [one.caption] for one in samples] == [["one", "two"], ["three"]]
    assert samples[1].image == picture(1) and len(CaptionedRows(folder, max_samples=1)) == 1
    # A row for each caption, as many sets of the Hub have it: the rows of a picture are one sample.
    split = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture(n), "path": None} for n in (0, 1, 0)], "caption": ["a", "b", "c"]}
    ).cast_column("image", datasets.Image())
    found = CaptionedRows(parquet(tmp_path / "s", split))
    assert [(one.image, one.captions or [one.caption]) for one in found] == [
        (picture(0), ["a", "c"]),
        (picture(1), ["b"]),
    ]
    empty = parquet(tmp_path / "e", rows([0, 1], caption=["fine", " "]))
    with pytest.raises(ValueError, match="row 1: expected a caption in 'caption', got ' '"):
        list(CaptionedRows(empty))
    lost = datasets.Dataset.from_dict({"image": [None, {"bytes": picture(0), "path": None}], "caption": ["x", "y"]})
    lost = lost.cast_column("image", datasets.Image())
    with pytest.raises(ValueError, match="row 0: no picture"):
        list(CaptionedRows(parquet(tmp_path / "l", lost)))


def test_a_folder_of_pictures_with_metadata(tmp_path):
    (tmp_path / "d/test").mkdir(parents=True)
    for number in range(2):
        (tmp_path / f"d/test/{number}.png").write_bytes(picture(number))
    (tmp_path / "d/test/metadata.csv").write_text("file_name,text\n0.png,zero\n1.png,one\n")
    assert is_hub_data(str(tmp_path / "d"))
    assert [(one.caption, one.image == picture(n)) for n, one in enumerate(CaptionedRows(str(tmp_path / "d")))] == [
        ("zero", True),
        ("one", True),
    ]


def test_what_counts_as_a_data_set_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "training.evaluation.hub.read_dataset_json", lambda name: {"shards": {}} if "ours" in name else None
    )
    (tmp_path / "data").mkdir()
    assert is_hub_data("hf://datasets/owner/name") and is_hub_data("hf://datasets/owner/name@v1.0")
    assert is_hub_data("owner/name")
    for other in (
        "hf://datasets/owner/ours",
        "hf://datasets/owner/name/a.tar",
        "data/scenes",
        "./x/y",
        "/a/b",
        "a.tar",
    ):
        assert not is_hub_data(other), other
    assert not is_hub_data(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="owner/name: no split 'test' of a data set could be loaded"):
        labelled_hub("owner/name")


def test_pictures_of_others_start_no_program_and_have_a_limit(tmp_path, monkeypatch):
    """The bytes are whoever's: a format that Pillow hands to another program, and more pixels than are decoded."""
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: pytest.fail("started a program"))
    eps = io.BytesIO()
    Image.new("RGB", (40, 30)).save(eps, "EPS")
    column = [{"bytes": data, "path": None} for data in (eps.getvalue(), b"P6 12000 9000 255\n")]
    data = datasets.Dataset.from_dict({"image": column, "label": ["cat", "dog"]})
    pictures = labelled_hub(parquet(tmp_path / "d", data.cast_column("image", datasets.Image())))
    with pytest.raises(ValueError, match="row 0 cannot be read: .* are no JPEG, PNG"):
        pictures.read(0)
    with pytest.raises(ValueError, match="row 1 cannot be read: The picture has 12000 x 9000 pixels, more than"):
        pictures.read(1)
