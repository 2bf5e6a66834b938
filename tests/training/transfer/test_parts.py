"""Parts of labelled data: one set of classes, held-out shares, and what identifies them."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.training.prepare.small_data import picture, write_tar
from tests.training.to_evaluate import write_pictures
from training.data.labelled import open_pictures
from training.evaluation.sets import TABLE_7, Listing
from training.transfer.classifier import distinct_labels
from training.transfer.parts import (
    content_digest,
    fingerprint,
    held_out,
    open_parts,
    with_classes_of,
)

COUNTS = {"blue": 8, "green": 5, "dark_red": 3}


def parts_of(train, dataset=None, **changes):
    chosen = {"train_data": train, "classes": None, "seed": 0, "max_image_pixels": 10**8}
    for name in ("validation", "test"):
        chosen |= {f"{name}_data": None, f"{name}_fraction": 0.0}
    return open_parts(SimpleNamespace(**chosen | changes), dataset)


def test_a_held_out_share_has_every_class_and_depends_on_the_seed_alone():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [40, 20, 2]))
    kept, out = held_out(labels, 0.25, seed=3)
    assert sorted([*kept, *out]) == list(range(62))
    assert np.bincount(labels[out]).tolist() == [10, 5, 1]
    again, other = held_out(labels, 0.25, seed=3)[1], held_out(labels, 0.25, seed=4)[1]
    assert np.array_equal(out, again) and not np.array_equal(out, other)
    assert np.bincount(labels[held_out(labels, 0.99, seed=0)[0]]).tolist() == [1, 1, 1]  # something is left to learn
    with pytest.raises(ValueError, match="class number 1 has a single picture.*--validation-data"):
        held_out([0, 0, 1], 0.5, seed=0)


def test_held_out_parts_share_no_picture(tmp_path):
    parts = parts_of(write_pictures(tmp_path / "a", COUNTS), validation_fraction=0.25, test_fraction=0.25)
    assert sorted(np.concatenate([part.numbers for part in parts.values()])) == list(range(16))
    for part in parts.values():
        assert part.pictures.labels == part.labels.tolist()
        for place, number in enumerate(part.numbers):
            assert np.array_equal(np.asarray(part.pictures.read(place)), np.asarray(part.data.read(int(number))))


def test_class_numbers_are_those_of_the_training_data(tmp_path):
    train = write_pictures(tmp_path / "a", COUNTS)
    test = write_pictures(tmp_path / "b", {"blue": 1, "green": 2, "dark_red": 3})
    (tmp_path / "b" / "dark_red").rename(tmp_path / "b" / "a_dark_red")  # sorts first
    names = tmp_path / "names"
    names.write_text("a_dark_red\tred\nblue\tblue\ngreen\tgreen\n")
    (tmp_path / "names_a").write_text("dark_red\tred\nblue\tblue\ngreen\tgreen\n")
    reference = open_pictures(train, str(tmp_path / "names_a"))
    aligned = with_classes_of(open_pictures(test, str(names)), reference)
    assert aligned.class_names == reference.class_names == ["blue", "red", "green"]
    assert [aligned.class_names[label] for label in aligned.labels] == ["red"] * 3 + ["blue"] + ["green"] * 2


def test_names_that_repeat_keep_their_numbers(tmp_path):
    """CLIP's list for ImageNet calls two classes "missile" and two "sunglasses"."""
    data = open_pictures(write_pictures(tmp_path / "a", COUNTS))
    data = dataclasses.replace(data, class_names=["missile", "tree", "missile"])
    assert with_classes_of(data, data).labels == data.labels
    assert distinct_labels(data.class_names) == ["missile (0)", "tree", "missile (2)"]


def test_one_class_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="one has one class, 'blue': a classifier needs two or more"):
        parts_of(write_pictures(tmp_path / "one", {"blue": 3}))


def test_other_classes_are_refused_by_name(tmp_path):
    train = write_pictures(tmp_path / "a", COUNTS)
    test = write_pictures(tmp_path / "b", {"blue": 1, "green": 2})
    with pytest.raises(ValueError, match=r"same classes.*b has 2, a 3; only in b: \[\]; not in it: \['dark red'\]"):
        parts_of(train, test_data=test)
    with pytest.raises(ValueError, match="test_data or test_fraction, not both"):
        parts_of(train, test_data=train, test_fraction=0.1)


def test_what_is_learnt_from_is_not_measured_on(tmp_path):
    """Under another name, in another place, in one picture alone; pictures of the same size are no sign."""
    train, test = (write_pictures(tmp_path / name, COUNTS, seed) for seed, name in enumerate("ab"))
    with pytest.raises(ValueError, match=f"{train} is trained on: .*hold out a share of these"):
        parts_of(train, test_data=train)
    shutil.copytree(train, tmp_path / "copy")
    with pytest.raises(ValueError, match=f"16 of 16 pictures of {tmp_path / 'copy'} are trained on"):
        parts_of(train, validation_data=str(tmp_path / "copy"))
    shutil.copy(Path(train, "blue", "01.png"), Path(test, "blue", "another.png"))
    with pytest.raises(ValueError, match=r"1 of 17 pictures of .* are trained on, the first .*another\.png"):
        parts_of(train, test_data=test)
    Path(test, "blue", "another.png").write_bytes(Path(train, "blue", "01.png").read_bytes()[:-1] + b"!")
    assert len(parts_of(train, test_data=test)["test"].numbers) == 17


def test_shards_that_are_learnt_from_are_not_measured_on(tmp_path):
    samples = [(f"k{number}", {"jpg": picture(number), "json": json.dumps({"class_name": name}).encode()})
               for number, name in enumerate(["cat", "dog"] * 2)]  # fmt: skip
    write_tar(tmp_path / "a" / "0.tar", samples[:2])
    write_tar(tmp_path / "a" / "1.tar", samples[2:])
    write_tar(tmp_path / "b" / "7.tar", samples[2:])
    with pytest.raises(ValueError, match=f"1 of 1 shards of {tmp_path / 'b'} are trained on, the first"):
        parts_of(str(tmp_path / "a"), test_data=str(tmp_path / "b"))


def test_a_named_set_has_both_parts(tmp_path):
    """CIFAR-10's pictures have no files of their own, so what they show identifies them."""
    pytest.importorskip("torchvision")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    held = {"train": (pixels[:4], [0, 1, 0, 1]), "test": (pixels[4:], [1, 0])}

    def read(root, split):
        return Listing(["cat", "dog"], ["cat", "dog"], list(held[split][0]), held[split][1])

    spec = dataclasses.replace(TABLE_7["cifar10"], pictures="", read=read)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLE_7, "cifar10", spec)
        parts = parts_of(str(tmp_path), dataset="cifar10", validation_fraction=0.5)
        before = content_digest(parts["train"])
        pixels[0] += 1
        after = content_digest(parts_of(str(tmp_path), dataset="cifar10", validation_fraction=0.5)["train"])
    assert {name: len(part.numbers) for name, part in parts.items()} == {"train": 2, "test": 2, "validation": 2}
    assert parts["test"].labels.tolist() == [1, 0] and before != after
    assert np.array_equal(np.asarray(parts["test"].pictures.read(1)), pixels[5])


def test_what_identifies_pictures(tmp_path):
    """The digest sees each byte, whatever the file's size and time say; the fingerprint sees names and sizes."""
    folder = write_pictures(tmp_path / "a", COUNTS)
    part = parts_of(folder)["train"]
    before = content_digest(part), fingerprint(part)
    assert (content_digest(parts_of(folder)["train"]), fingerprint(parts_of(folder)["train"])) == before
    path = tmp_path / "a" / "green" / "02.png"
    data, times = path.read_bytes(), path.stat()
    path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content_digest(part) != before[0] and fingerprint(part) == before[1]
    path.write_bytes(data)
    assert content_digest(part) == before[0]
    path.rename(path.with_name("zz.png"))  # pictures would come in another order
    renamed = parts_of(folder)["train"]
    assert content_digest(renamed) != before[0] and fingerprint(renamed) != before[1]
    assert fingerprint(parts_of(folder, test_fraction=0.3)["train"]) != fingerprint(parts_of(folder)["train"])


def test_a_manifest_is_identified_by_its_pictures(tmp_path):
    folder = write_pictures(tmp_path / "a", {"blue": 2, "green": 2})
    paths = sorted((tmp_path / "a").rglob("*.png"))
    lines = [{"image": str(path), "class_name": path.parent.name} for path in paths]
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    part = parts_of(str(manifest))["train"]
    before = content_digest(part), fingerprint(part)
    assert part.labels.tolist() == parts_of(folder)["train"].labels.tolist()
    Image.new("RGB", (9, 9), "red").save(paths[1])
    part = parts_of(str(manifest))["train"]
    assert content_digest(part) != before[0] and fingerprint(part) == before[1]
