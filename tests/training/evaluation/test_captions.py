"""Annotation files with several captions a picture, in the three formats, and what is missing in them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from training.evaluation.captions import captioned_folder, open_captions, read_captions

CAPTIONS = {"b.jpg": ["a red box, on a table", "red"], "a.jpg": ["green", "the green one", "grass"], "c.jpg": ["blue"]}


def pictures(folder, names=tuple(CAPTIONS)):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), {"a": "green", "b": "red", "c": "blue"}[name[0]]).save(folder / name)
    return folder


def karpathy(path, captions=CAPTIONS, split="test", **more):
    images = [
        {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts], **more}
        for name, texts in captions.items()
    ]
    other = {"filename": "z.jpg", "split": "train", "sentences": [{"raw": "not in the test split"}], **more}
    path.write_text(json.dumps({"dataset": "flickr30k", "images": [other, *images]}))
    return str(path)


def coco(path, captions=CAPTIONS):
    images = [{"id": 7 * number, "file_name": name} for number, name in enumerate(captions)]
    texts = [{"image_id": image["id"], "caption": text} for image in images for text in captions[image["file_name"]]]
    path.write_text(json.dumps({"images": images, "annotations": texts[::-1]}))
    return str(path)


def lines(path, captions=CAPTIONS):
    path.write_text("image,caption\n" + "".join(f"{name},{text}\n" for name, one in captions.items() for text in one))
    return str(path)


@pytest.mark.parametrize(("write", "name"), [(karpathy, "k.json"), (coco, "c.json"), (lines, "t.txt")])
def test_formats_give_the_same(write, name, tmp_path):
    samples = captioned_folder(write(tmp_path / name), str(pictures(tmp_path / "p")))
    assert [(one.key, sorted(one.captions or [one.caption])) for one in samples] == [
        (name, sorted(texts)) for name, texts in CAPTIONS.items()
    ]
    assert samples[1].image == (tmp_path / "p/a.jpg").read_bytes()
    assert samples[0].caption == samples[0].captions[0] and samples[2].captions is None
    assert samples.name == Path(name).stem and len(captioned_folder(str(tmp_path / name), tmp_path / "p", None, 2)) == 2


def test_clip_benchmark_reads_the_same_lines(tmp_path):
    flickr = pytest.importorskip("clip_benchmark.datasets.flickr")
    peer = flickr.Flickr(str(pictures(tmp_path / "p")), lines(tmp_path / "t.txt"))
    assert read_captions(str(tmp_path / "t.txt")) == dict(peer.data) == CAPTIONS


def test_captions_without_pictures_are_refused(tmp_path):
    folder = str(pictures(tmp_path / "p", ("a.jpg", "c.jpg")))
    with pytest.raises(
        FileNotFoundError, match="1 of 3 pictures with captions are not in .*first b.jpg.*without pictures"
    ):
        captioned_folder(karpathy(tmp_path / "k.json"), folder)
    content = json.loads(Path(coco(tmp_path / "c.json")).read_text())
    content["images"].pop()
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="1 captions belong to no picture.*image_id 14"):
        read_captions(str(tmp_path / "c.json"))


def test_files_that_are_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="no captions file .*Karpathy"):
        read_captions(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match=r"no split 'val'; it has train \(1 pictures\), test \(3 pictures\)"):
        read_captions(karpathy(tmp_path / "k.json"), "val")
    with pytest.raises(ValueError, match="a.jpg has a caption without words"):
        read_captions(karpathy(tmp_path / "k.json", {"a.jpg": ["x", " "]}))
    with pytest.raises(ValueError, match="has no captions"):
        read_captions(coco(tmp_path / "c.json", {"a.jpg": []}))
    (tmp_path / "o.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected Karpathy's JSON"):
        read_captions(str(tmp_path / "o.json"))
    (tmp_path / "o.txt").write_text("image,caption\nno comma here\n")
    with pytest.raises(ValueError, match=":2: expected picture,caption"):
        read_captions(str(tmp_path / "o.txt"))
    twice = {"a.jpg": ["x"], "sub/a.jpg": ["y"]}
    with pytest.raises(ValueError, match="two of its names lead to the picture"):
        captioned_folder(coco(tmp_path / "c.json", twice), str(pictures(tmp_path / "p")))


def test_flickr30k_and_coco(tmp_path):
    for name, message in (("flickr30k", "lacks Flickr30K.*flickr30k-images"), ("mscoco", "lacks MS-COCO.*val2014.zip")):
        with pytest.raises(FileNotFoundError, match=message):
            open_captions(name, str(tmp_path))
    pictures(tmp_path / "flickr30k/flickr30k-images")
    lines(tmp_path / "flickr30k/flickr30k_val_karpathy.txt")
    assert open_captions("flickr30k", str(tmp_path), "val").name == "Flickr30K (val split)"
    karpathy(tmp_path / "flickr30k/dataset_flickr30k.json")
    data = open_captions("flickr30k", str(tmp_path))
    assert data.name == "Flickr30K (not the test split of 1,000 pictures: found 3)"
    assert data.described == {"dataset_type": "flickr30k", "dataset_split": "test"}
    pictures(tmp_path / "coco/val2014")
    karpathy(tmp_path / "coco/dataset_coco.json", filepath="val2014")
    assert [one.key for one in open_captions("mscoco", str(tmp_path))] == list(CAPTIONS)
    many = {f"a{number}.jpg": ["x"] for number in range(1000)}
    pictures(tmp_path / "flickr30k/flickr30k-images", many)
    karpathy(tmp_path / "flickr30k/dataset_flickr30k.json", many)
    assert open_captions("flickr30k", str(tmp_path)).name == "Flickr30K"


def test_a_table_s_quotes_are_no_words_and_a_manifest_is_told_its_flag(tmp_path):
    lines = ["image,caption", 'a.jpg,"a cat, ""Tom"", and a dog"', 'b.jpg,"Tom" and a dog', "c.jpg,a cat, a dog"]
    whole = {"a.jpg": ['a cat, "Tom", and a dog'], "b.jpg": ['"Tom" and a dog'], "c.jpg": ["a cat, a dog"]}
    for name in ("table.csv", "list.txt"):
        (tmp_path / name).write_text("\n".join(lines))
    assert read_captions(str(tmp_path / "table.csv")) == whole
    assert read_captions(str(tmp_path / "list.txt"))["a.jpg"] == ['"a cat, ""Tom"", and a dog"']
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.jpg", "caption": "a cat"}\n' * 2)
    with pytest.raises(ValueError, match="JSON, one object a line: as a manifest it is --data .*pairs.jsonl, without"):
        read_captions(str(tmp_path / "pairs.jsonl"))
