"""`training.prepare.pack`: nothing is lost, pictures stay byte for byte, every row is accounted for."""

import csv
import io
import json
import struct
import zlib

import numpy as np
import pytest

from tests.training.prepare.small_data import (
    counts,
    picture,
    plain_picture,
    problems,
    read_tars,
    run_step,
    tree,
    write_jsonl,
    write_pictures,
    write_tar,
)
from training.data.shards import ShardReader
from training.data.sources import open_data_set
from training.prepare import pack


def run(output, *flags):
    return run_step(pack, ["--output_dir", str(output), "--device", "cpu", *map(str, flags)])


CAPTIONS = ["None", "null", "NA", "NaN", "", "a, b", 'say "hi"', "two\nlines", " blanks ", "ünïcödé 猫", "plain"]


def test_csv_keeps_every_word_that_spreadsheets_call_missing(tmp_path):
    data = write_pictures(tmp_path / "in", len(CAPTIONS))
    with open(tmp_path / "in" / "table.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption", "n"])
        writer.writerows([f"{i}.jpg", caption, "NA"] for i, caption in enumerate(CAPTIONS))
    run(tmp_path / "out", "--input", tmp_path / "in" / "table.csv", "--samples_per_shard", 3)
    samples = read_tars(tmp_path / "out")
    kept = [i for i, caption in enumerate(CAPTIONS) if caption]
    assert [members["txt"].decode() for members in samples.values()] == [CAPTIONS[i] for i in kept]
    assert [members["jpg"] for members in samples.values()] == [data[i] for i in kept]
    assert all(json.loads(members["json"])["n"] == "NA" for members in samples.values())
    assert problems(tmp_path / "out", "pack") == [("rejected", "000000000004", "no-caption", 6)]
    assert counts(tmp_path / "out", "pack") == {"in": 11, "out": 10, "rejected": 1}


def test_line_numbers_point_into_the_file(tmp_path):
    write_pictures(tmp_path / "in", 2)
    text = 'image,caption\n0.jpg,"a\nb"\n\nmissing.jpg,x\n1.jpg\n1.jpg,ok\n'
    (tmp_path / "in" / "t.csv").write_text(text)
    run(tmp_path / "out", "--input", tmp_path / "in" / "t.csv", "--samples_per_shard", 2)
    named = problems(tmp_path / "out", "pack")
    assert [(reason, text.split("\n")[line - 1]) for _, _, reason, line in named] == [
        ("no-image", "missing.jpg,x"),
        ("bad-row", "1.jpg"),
    ]
    assert counts(tmp_path / "out", "pack")["out"] == 2


def _png(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no-picture-format"),
        (b"words, no picture", "no-picture-format"),
        (picture(1, (400, 300))[:9000], "bad-picture"),
        (picture(1, (60, 40), "PNG")[:-3000], "bad-picture"),
        (plain_picture("WEBP")[:-20], "bad-picture"),
        (_png(40_000, 40_000), "picture-too-large"),
        (_png(9_000, 9_000), "picture-too-large"),
        (plain_picture("GIF"), "unsupported-format"),
        (plain_picture("BMP"), "unsupported-format"),
        (plain_picture("TIFF"), "unsupported-format"),
        (b"<!DOCTYPE html><html>", "no-picture-format"),
    ],
)
def test_each_bad_picture_is_named_and_the_rest_goes_on(tmp_path, data, reason):
    source = tmp_path / "in" / "a.tar"
    good = picture(0)
    write_tar(
        source,
        [
            ("one", {"jpg": good, "txt": b"a"}),
            ("two", {"jpg": data, "txt": b"b"}),
            ("three", {"jpg": good, "txt": b"c"}),
        ],
    )
    run(tmp_path / "out", "--input", source, "--max_image_pixels", 80_000_000)
    assert problems(tmp_path / "out", "pack") == [("rejected", "two", reason, None)]
    assert list(read_tars(tmp_path / "out")) == ["one", "three"]


def test_tars_keep_all_members_and_wrong_names_are_set_right(tmp_path):
    members = {
        "jpg": picture(0, form="PNG"),
        "txt": b"a cat",
        "json": b'{"width": 32, "sha": "x"}',
        "cls": b"7",
        "seg.png": b"mask",
    }
    write_tar(
        tmp_path / "in" / "00007.tar", [("000070001", members), ("000070002", {"jpeg": picture(2), "txt": b"dog"})]
    )
    run(tmp_path / "out", "--input", tmp_path / "in")
    samples = read_tars(tmp_path / "out")
    expected = {("png" if suffix == "jpg" else suffix): data for suffix, data in members.items()}
    assert samples == {"000070001": expected, "000070002": {"jpg": picture(2), "txt": b"dog"}}


def test_bad_tar_samples_are_named(tmp_path):
    good = {"jpg": picture(0), "txt": b"x"}
    write_tar(
        tmp_path / "in" / "a.tar",
        [
            ("no-caption", {"jpg": picture(1)}),
            ("blank", {"jpg": picture(1), "txt": b"  \n"}),
            ("no-picture", {"txt": b"x"}),
            ("bad-json", {**good, "json": b"{"}),
            ("bad-utf8", {"jpg": picture(1), "txt": b"\xff\xfe"}),
            ("two-pictures", {"jpg": picture(0), "png": picture(1, form="PNG"), "txt": b"x"}),
            ("../escape", good),
            ("/absolute", good),
            ("good", good),
        ],
    )
    run(tmp_path / "out", "--input", tmp_path / "in")
    assert [(key, reason) for _, key, reason, _ in problems(tmp_path / "out", "pack")] == [
        ("no-caption", "no-caption"),
        ("blank", "no-caption"),
        ("no-picture", "no-image"),
        ("bad-json", "bad-json"),
        ("bad-utf8", "bad-utf8"),
        ("two-pictures", "two-pictures"),
        ("../escape", "bad-key"),
        ("/absolute", "bad-key"),
    ]
    assert counts(tmp_path / "out", "pack") == {"in": 9, "out": 1, "rejected": 8}


def test_a_truncated_tar_gives_what_it_holds_and_says_so(tmp_path):
    path = write_tar(tmp_path / "in" / "a.tar", [(f"k{i}", {"jpg": picture(i), "txt": b"x"}) for i in range(5)])
    with ShardReader(path) as reader:
        end = int(reader.index.spans[3].max()) - 100
    path.write_bytes(path.read_bytes()[:end])
    run(tmp_path / "out", "--input", path)
    named = [(what, reason) for what, _, reason, _ in problems(tmp_path / "out", "pack")]
    assert ("kept", "truncated-shard") in named
    done = counts(tmp_path / "out", "pack")
    assert done["in"] == done["out"] + done["rejected"] and list(read_tars(tmp_path / "out")) == ["k0", "k1", "k2"]


def test_repeated_keys_are_named_wherever_they_are(tmp_path):
    def sample(i):
        return {"jpg": picture(i), "txt": str(i).encode()}

    write_tar(tmp_path / "in" / "a.tar", [("x", sample(0)), ("y", sample(1)), ("x", sample(2))])
    write_tar(tmp_path / "in" / "b.tar", [("z", sample(3)), ("y", sample(4)), ("w", sample(5))])
    run(tmp_path / "out", "--input", tmp_path / "in")
    assert {key: m["txt"] for key, m in read_tars(tmp_path / "out").items()} == {
        "x": b"0",
        "y": b"1",
        "z": b"3",
        "w": b"5",
    }
    text = (tmp_path / "out" / "reports" / "pack.problems.jsonl").read_text().splitlines()
    assert [(json.loads(line)["key"], json.loads(line)["detail"]) for line in text] == [
        ("x", "the key came before, at 00000:0"),
        ("y", "the key came before, at 00000:1"),
    ]
    run(tmp_path / "out2", "--input", tmp_path / "in", "--duplicates", "shard")
    assert counts(tmp_path / "out2", "pack")["rejected"] == 1


def test_repeats_in_buckets_are_those_of_a_dictionary(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    lists = {f"{n:05d}": [None if k == 0 else f"key{k}" for k in rng.integers(0, 60, 25)] for n in range(4)}
    for name, keys in lists.items():
        np.save(tmp_path / f"{name}.npy", np.array([pack._hash(key) for key in keys], np.uint64))
    first, expected = {}, {}
    for name, keys in lists.items():
        for position, key in enumerate(keys):
            if key is not None and key in first:
                expected.setdefault(name, {})[position] = first[key]
            first.setdefault(key, f"{name}:{position}")
    assert pack._repeated(tmp_path, list(lists)) == expected
    monkeypatch.setattr(pack, "_BUCKET", 9)
    assert pack._repeated(tmp_path, list(lists)) == expected


def test_jsonl_manifest_brings_its_levels(tmp_path):
    data = write_pictures(tmp_path / "in", 1)
    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 4), np.float16))
    (tmp_path / "in" / "r.npy").write_bytes(buffer.getvalue())
    region = {"box": [0, 0, 1, 1], "score": 0.5, "label": "cat", "attributes": ["red"]}
    row = {
        "image": "0.jpg",
        "caption": "c",
        "summary": "s",
        "tags": ["red cat"],
        "regions": [region],
        "roi": "r.npy",
        "x": float("nan"),
    }
    write_jsonl(
        tmp_path / "in" / "m.jsonl", [row, {"image": "https://x.invalid/a.jpg", "caption": "c"}, {"caption": "c"}]
    )
    with open(tmp_path / "in" / "m.jsonl", "a") as file:
        file.write("{broken\n[1]\n")
    run(tmp_path / "out", "--input", tmp_path / "in" / "m.jsonl")
    (members,) = read_tars(tmp_path / "out").values()
    assert members["jpg"] == data[0] and members["roi.npy"] == buffer.getvalue()
    expected = {"summary": "s", "tags": ["red cat"], "regions": [region], "x": None, "path": "0.jpg"}
    assert json.loads(members["json"]) == expected
    named = [(reason, line) for _, _, reason, line in problems(tmp_path / "out", "pack")]
    assert named == [("remote-picture", 2), ("no-image", 3), ("bad-row", 4), ("bad-row", 5)]


def test_parquet_with_picture_bytes(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": picture(i), "path": f"{i}.jpg"}, "text": f"t{i}"} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    run(tmp_path / "out", "--input", tmp_path / "p.parquet")
    assert [m["jpg"] for m in read_tars(tmp_path / "out").values()] == [picture(i) for i in range(5)]


@pytest.fixture
def hub_dataset():
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(11)], "text": [f"t{i}" for i in range(11)]}
    rows["id"] = [f"k{i}" for i in range(10)] + ["k2"]
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Value("string"), "id": datasets.Value("string")}
    )
    return datasets.Dataset.from_dict(rows, features=features)


def test_hub_dataset_on_disk(tmp_path, hub_dataset):
    hub_dataset.save_to_disk(tmp_path / "saved")
    run(tmp_path / "out", "--input", tmp_path / "saved", "--samples_per_shard", 4, "--key_column", "id")
    samples = read_tars(tmp_path / "out")
    assert [m["jpg"] for m in samples.values()] == [picture(i) for i in range(10)] and list(samples)[-1] == "k9"
    assert problems(tmp_path / "out", "pack") == [("rejected", "k2", "duplicate-key", 11)]


def test_hub_stream_is_cut_into_shards_and_continues_in_its_middle(tmp_path, hub_dataset, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: hub_dataset.to_iterable_dataset(num_shards=3))
    flags = ("--input", "somebody/something", "--samples_per_shard", 2)
    run(tmp_path / "whole", *flags)
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.tar"))
    assert names == [f"0000{part}-000{piece}.tar" for part in range(3) for piece in range(2)]
    assert [m["jpg"] for m in read_tars(tmp_path / "whole").values()] == [picture(i) for i in range(11)]

    written = []
    monkeypatch.setattr(pack.Packer, "_write", _stop_after(3, pack.Packer._write, written))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", *flags)
    with pytest.raises(ValueError, match="cut: pack has begun and not ended"):
        open_data_set(tmp_path / "cut")
    monkeypatch.setattr(pack.Packer, "_write", _stop_after(99, written[0], second := []))
    run(tmp_path / "cut", *flags)
    assert len(second) - 1 == 6 - 3
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def _stop_after(number, write, calls):
    """`write` that stops at call `number`; `calls` gets the function and then one entry a call."""
    calls.append(write)

    def stopping(self, *arguments):
        if len(calls) > number:
            raise KeyboardInterrupt
        calls.append(arguments[0])
        return write(self, *arguments)

    return stopping


def test_other_settings_are_refused_until_told_to_overwrite(tmp_path):
    write_pictures(tmp_path / "in", 6)
    table = write_jsonl(tmp_path / "in" / "t.jsonl", [{"image": f"{i}.jpg", "caption": f"c{i}"} for i in range(6)])
    out = tmp_path / "out"
    run(out, "--input", table, "--samples_per_shard", 1)
    before = tree(out)
    run(out, "--input", table, "--samples_per_shard", 1)
    assert tree(out) == before
    with pytest.raises(ValueError, match=r"samples_per_shard: then 1, now 4"):
        run(out, "--input", table, "--samples_per_shard", 4)
    run(out, "--input", table, "--samples_per_shard", 4, "--overwrite")
    run(tmp_path / "fresh", "--input", table, "--samples_per_shard", 4)
    assert tree(out) == tree(tmp_path / "fresh")


def test_wrong_input_is_told(tmp_path):
    write_pictures(tmp_path / "in", 1)
    table = write_jsonl(tmp_path / "in" / "t.jsonl", [{"picture": "0.jpg", "words": "c"}])
    with pytest.raises(ValueError, match="columns picture, words: give --image-column, --caption-column"):
        run(tmp_path / "o1", "--input", table)
    with pytest.raises(ValueError, match="there is no column nothing"):
        run(tmp_path / "o2", "--input", table, "--image_column", "picture", "--caption_column", "nothing")
    with pytest.raises(FileNotFoundError, match="matches no file"):
        run(tmp_path / "o3", "--input", tmp_path / "in" / "*.tar")
    with pytest.raises(ValueError, match="--input is missing"):
        run(tmp_path / "o4")
    tar = write_tar(tmp_path / "tars" / "a.tar", [("k", {"jpg": picture(0), "txt": b"x"})])
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path / "tars", "--input", tar)
    with pytest.raises(ValueError, match="choose another folder"):
        run(tmp_path / "tars", "--input", tmp_path / "tars")
    assert read_tars(tmp_path / "tars") == {"k": {"jpg": picture(0), "txt": b"x"}}
    with pytest.raises(ValueError, match="1 tars and 1 tables"):
        run(tmp_path / "o5", "--input", tar, table)


def test_lost_samples_stop_the_run(tmp_path, monkeypatch):
    table = write_jsonl(tmp_path / "t.jsonl", [{"image": "0.jpg", "caption": "c"}])
    monkeypatch.setattr(pack.Tally, "reject", lambda self, *a, **k: None)
    with pytest.raises(RuntimeError, match="1 in, but 0 out and 0 rejected"):
        run(tmp_path / "out", "--input", table)
