"""Shards: written, indexed, read; damaged ones."""

import io
import json
import os
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from pyramidclip_command import Failure
from training.data.records import BadSample, Region, Sample
from training.data.shard_index import ShardIndex, build_index, index_path, load_index, read_index_header
from training.data.shards import ShardReader, ShardWriter, read_dataset_json, write_dataset_json
from training.data.sources import open_data_set


def sample(i):
    regions = [Region((0.0, 0.0, 0.5, 0.5), 0.5, "dog", ["red"])] * (i % 3)
    roi = np.full((i % 3, 8), i, np.float16) if i % 3 else None
    return Sample(f"{i:05d}", bytes([i]) * (400 + 100 * i), "jpg", f"caption {i}", None, None, regions or None, roi)


def write(path, count=7):
    with ShardWriter(path) as writer:
        for i in range(count):
            writer.write(sample(i))
    return path


def test_reads_what_tarfile_reads_and_webdataset_groups(tmp_path):
    path = write(tmp_path / "a.tar")
    with ShardReader(path) as reader, tarfile.open(path) as tar:
        assert len(reader) == 7 and reader.keys == [f"{i:05d}" for i in range(7)] and not reader.truncated
        names = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        ours = {f"{key}.{s}": data for i, key in enumerate(reader.keys) for s, data in reader.read(i).items()}
    assert names == ours
    webdataset = pytest.importorskip("webdataset")
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    for i, item in enumerate(theirs):
        assert {k: v for k, v in item.items() if not k.startswith("__")} == ShardReader(path).read(i)


def test_written_index_is_the_built_one_and_bytes_repeat(tmp_path):
    first, second = write(tmp_path / "a.tar"), write(tmp_path / "b" / "a.tar")
    assert first.read_bytes() == second.read_bytes()
    assert index_path(first).read_bytes() == index_path(second).read_bytes()
    written, built = load_index(first), build_index(first)
    assert written.keys == built.keys and written.suffixes == built.suffixes
    assert np.array_equal(written.spans, built.spans) and not built.truncated
    header = read_index_header(index_path(first))
    assert header["samples"] == 7 and header["keys_digest"] == built.keys_digest()


def test_long_and_odd_names(tmp_path):
    keys = ["x" * 150, "ünï/çödé", "deep/er/" + "k" * 120]
    with ShardWriter(tmp_path / "a.tar") as writer:
        for key in keys:
            writer.write_members(key, {"jpg": key.encode(), "txt": b"t"})
    assert load_index(tmp_path / "a.tar").mtime_ns == 0  # the one beside it was taken
    reader = ShardReader(tmp_path / "a.tar")
    index_path(tmp_path / "a.tar").unlink()
    rebuilt = ShardReader(tmp_path / "a.tar")
    for i, key in enumerate(keys):
        assert reader.keys[i] == rebuilt.keys[i] == key
        assert reader.read(i)["jpg"] == rebuilt.read(i)["jpg"] == key.encode()


@pytest.mark.parametrize("folder", ["", "in/"])
def test_what_macos_puts_between_the_members_of_a_tar_is_no_data(tmp_path, folder):
    names = [f"{i}.{suffix}" for i in range(5) for suffix in ("jpg", "txt")]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for path in (f"{folder}{mark}{name}" for name in names for mark in ("._", "")):
            info = tarfile.TarInfo(path)
            info.size = len(path)
            tar.addfile(info, io.BytesIO(path.encode()))
    with ShardReader(tmp_path / "0.tar") as reader:
        assert reader.keys == [f"{folder}{i}" for i in range(5)]
        assert reader.read(3) == {suffix: f"{folder}3.{suffix}".encode() for suffix in ("jpg", "txt")}
    if not folder:  # in folders, webdataset takes the hidden ones for one more sample
        webdataset = pytest.importorskip("webdataset")
        theirs = list(webdataset.WebDataset(str(tmp_path / "0.tar"), shardshuffle=False))
        assert [item["__key__"] for item in theirs if "jpg" in item] == reader.keys


def test_a_hidden_tar_is_no_shard(tmp_path):
    write(tmp_path / "a.tar")
    (tmp_path / "._a.tar").write_bytes(b"\0\5\x16\7")
    assert list(write_dataset_json(tmp_path, {}, None, {})["shards"]) == ["a.tar"]


@pytest.mark.parametrize("key", ["a.b", "../up", "/abs", "a/../b", "", "a//b", "a\\b"])
def test_writer_refuses_keys(tmp_path, key):
    with pytest.raises(ValueError, match="key"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write_members(key, {"jpg": b""})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writer_leaves_nothing_under_the_name(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(sample(0))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="already"), ShardWriter(tmp_path / "a.tar") as writer:
        writer.write(sample(0))
        writer.write(sample(0))


def test_a_shard_is_written_by_one_at_a_time(tmp_path, monkeypatch):
    whole, path = write(tmp_path / "whole.tar").read_bytes(), tmp_path / "a.tar"
    with monkeypatch.context() as patch, ShardWriter(path) as first:
        patch.setattr("training.data.shards.WAIT_FOR_OTHERS", 0)
        first.write(sample(0))
        with pytest.raises(Failure, match=r"a.tar.partial is being written by another process: .* own --part-index"):
            write(path)
        for i in range(1, 7):
            first.write(sample(i))
    assert path.read_bytes() == whole
    # Who comes a little too early waits, and writes the same once more.
    with ThreadPoolExecutor(1) as pool:
        with ShardWriter(path) as first:
            first.write(sample(0))
            second = pool.submit(write, path)
            time.sleep(0.1)
            assert not second.done()
        assert second.result().read_bytes() == whole and index_path(path).is_file()
    path.with_name("a.tar.partial").write_bytes(bytes(100_000))  # of a killed one
    assert write(path).read_bytes() == whole and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_shard(tmp_path, with_index):
    path = write(tmp_path / "a.tar")
    whole = ShardReader(path)
    offset, size = whole.index.spans[4, whole.index.suffixes.index("jpg")]
    expected = [whole.read(i) for i in range(4)]
    if not with_index:
        index_path(path).unlink()
    os.truncate(path, int(offset + size // 2))
    reader = ShardReader(path)
    assert reader.truncated
    assert len(reader) == (7 if with_index else 5)
    assert [reader.read(i) for i in range(4)] == expected
    for i in range(4, len(reader)):
        with pytest.raises(BadSample) as caught:
            reader.read(i)
        assert caught.value.reason == "truncated-shard" and caught.value.key == f"{i:05d}"


def test_empty_and_foreign_files(tmp_path):
    (tmp_path / "empty.tar").write_bytes(b"")
    reader = ShardReader(tmp_path / "empty.tar")
    assert len(reader) == 0 and reader.truncated
    write(tmp_path / "a.tar")
    with tarfile.open(tmp_path / "z.tar", "w:gz") as tar:
        tar.add(tmp_path / "a.tar", "a")
    with pytest.raises(ValueError, match="uncompressed"):
        ShardReader(tmp_path / "z.tar")
    with pytest.raises(FileNotFoundError):
        ShardReader(tmp_path / "none.tar")


def test_stale_index_is_not_believed(tmp_path):
    path = write(tmp_path / "a.tar", 7)
    stale = index_path(path).read_bytes()
    write(path, 9)
    index_path(path).write_bytes(stale)
    assert len(ShardReader(path)) == 9
    # Same size, other members.
    with ShardWriter(path) as writer:
        for i in range(7):
            other = sample(i)
            other.key = f"{i + 50:05d}"
            writer.write(other)
    index_path(path).write_bytes(stale)
    assert ShardReader(path).keys[0] == "00050"
    index_path(path).write_text("{}")
    assert ShardReader(path).keys[0] == "00050"


def test_without_a_place_for_the_cache_an_index_is_built_in_memory(tmp_path, monkeypatch):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("k.txt")
        info.size = 5
        tar.addfile(info, io.BytesIO(b"words"))
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", "/proc/nowhere")
    assert load_index(path).dumps() == build_index(path).dumps()
    assert [one.name for one in tmp_path.iterdir() if one.suffix] == ["a.tar"]


def test_cached_index_follows_size_and_time(tmp_path):
    path = write(tmp_path / "a.tar")
    index_path(path).unlink()
    assert len(ShardReader(path)) == 7
    cached = list((tmp_path / "cache" / "indexes").iterdir())
    assert len(cached) == 1
    text = cached[0].read_text().replace('"truncated": false', '"truncated": true')
    cached[0].write_text(text)
    assert ShardReader(path).truncated  # taken from the cache
    os.utime(path, ns=(1, 1))
    assert not ShardReader(path).truncated  # another time: built anew


def test_hostile_members_write_nothing(tmp_path):
    path = tmp_path / "deep" / "a.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind in (
            ("../../up.jpg", tarfile.REGTYPE),
            ("/abs.jpg", tarfile.REGTYPE),
            ("l.jpg", tarfile.SYMTYPE),
            ("d.jpg", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type = kind
            info.linkname = "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            tar.addfile(info)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    reader = ShardReader(path)
    assert reader.keys == ["../../up", "/abs"]
    reader.read(0), reader.read(1)
    after = [p for p in sorted(str(p) for p in tmp_path.rglob("*")) if "/cache" not in p]
    assert after == before


def test_dataset_json(tmp_path):
    write(tmp_path / "a.tar", 3)
    write(tmp_path / "b.tar", 4)
    assert read_dataset_json(tmp_path) is None
    written = write_dataset_json(tmp_path, {"regions": "det-1"}, 8, {"regions": 7}, attribution="me")
    assert read_dataset_json(tmp_path) == written
    assert written["counts"] == {"samples": 7, "regions": 7} and written["attribution"] == "me"
    assert written["shards"]["b.tar"]["samples"] == 4
    (tmp_path / "dataset.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="99"):
        read_dataset_json(tmp_path)


def test_an_index_that_places_nothing_is_built_anew(tmp_path):
    path = write(tmp_path / "a.tar", 2)
    index = load_index(path)
    index.spans[0] = -1
    index_path(path).write_text(index.dumps())
    assert (load_index(path).spans[0, :, 0] >= 0).any()


@pytest.mark.parametrize("bit", [0, 148, 124, 257])
def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path, bit):
    path = write(tmp_path / "a.tar")
    header = int(ShardReader(path).index.spans[4].max(0)[0]) - 512
    index_path(path).unlink()
    whole = build_index(path)
    data = bytearray(path.read_bytes())
    data[header + bit] ^= 1
    path.write_bytes(data)
    assert not whole.truncated and len(whole.keys) == 7
    damaged = build_index(path)
    assert damaged.truncated and 4 <= len(damaged.keys) <= 5 and damaged.keys == whole.keys[: len(damaged.keys)]


def test_two_tars_in_one_file_are_said_to_end_early(tmp_path):
    first, second = write(tmp_path / "a.tar").read_bytes(), write(tmp_path / "b.tar").read_bytes()
    (tmp_path / "both.tar").write_bytes(first + second)
    assert build_index(tmp_path / "both.tar").truncated


def test_a_fifo_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "a.tar")
    with pytest.raises(FileNotFoundError, match="no shard at"):
        ShardReader(tmp_path / "a.tar")


def captions(path, texts):
    with ShardWriter(path) as writer:
        for i, text in enumerate(texts):
            writer.write_members(f"{i:05d}", {"jpg": b"a picture", "txt": text.encode()})


@pytest.mark.parametrize("changed", [range(20), [0], [7], [19]])
@pytest.mark.parametrize("beside", [True, False])
def test_captions_that_another_tool_changed_are_never_read_by_the_old_index(tmp_path, changed, beside):
    """Captions are padded to 512 bytes, so the tar keeps its size, and tars made to be equal have one time."""
    path = tmp_path / "a.tar"
    captions(path, [f"caption {i}" for i in range(20)])
    if not beside:
        index_path(path).unlink()
        os.utime(path, ns=(0, 0))
        load_index(path)
    old = index_path(path).read_bytes() if beside else None
    new = [f"caption {i}" + " that is right" * (i in changed) for i in range(20)]
    captions(path, new)
    index_path(path).unlink() if old is None else index_path(path).write_bytes(old)
    os.utime(path, ns=(0, 0))
    with ShardReader(path) as reader:
        assert [reader.read(i)["txt"].decode() for i in range(20)] == new


def test_a_change_that_opening_does_not_see_is_a_bad_sample(tmp_path):
    path = tmp_path / "a.tar"
    captions(path, ["old"] * 200)
    old = index_path(path).read_bytes()
    captions(path, ["other" if i == 5 else "old" for i in range(200)])
    index_path(path).write_bytes(old)
    with ShardReader(path) as reader:
        assert reader.read(4)["txt"] == b"old"
        with pytest.raises(BadSample, match="remove the .index.json") as caught:
            reader.read(5)
    assert caught.value.reason == "stale-index" and caught.value.key == "00005"


def test_names_that_headers_replace_or_cut_are_still_found(tmp_path):
    names = ["ünï/çödé", "d" * 60 + "/" + "k" * 60, "x" * 150, "\u732b" * 60]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / f"{form}.tar", "w", format=form) as tar:
            for name in names:
                info = tarfile.TarInfo(f"{name}.JPG")
                info.size = 3
                tar.addfile(info, io.BytesIO(b"abc"))
        for _ in range(2):
            with ShardReader(tmp_path / f"{form}.tar") as reader:
                assert reader.keys == names and all(reader.read(i) == {"jpg": b"abc"} for i in range(4))


def test_an_index_that_is_a_fifo_or_device_is_not_read(tmp_path):
    path = write(tmp_path / "a.tar")
    index_path(path).unlink()
    os.mkfifo(index_path(path))
    assert len(open_data_set(path).units) == 1
    index_path(path).unlink()
    index_path(path).symlink_to("/dev/zero")
    with ShardReader(path) as reader:
        assert len(reader) == 7
    os.mkfifo(tmp_path / "dataset.json")
    with pytest.raises(ValueError, match="device or FIFO"):
        read_dataset_json(tmp_path)


@pytest.mark.parametrize("changed", [
    {"samples": 3_000_000_000}, {"samples": -1}, {"samples": "7"}, {"samples": True}, {"tar_bytes": None},
    {"keys_digest": 5},
])  # fmt: skip
def test_counts_that_no_tar_has_are_refused(tmp_path, changed):
    path = write(tmp_path / "a.tar")
    text = index_path(path).read_text()
    header = json.loads(text)["header"]
    index_path(path).write_text(text.replace(json.dumps(header), json.dumps(header | changed)))
    with pytest.raises(ValueError, match="is not a shard index"):
        read_index_header(index_path(path))
    assert len(load_index(path).keys) == 7


def test_a_dataset_json_of_another_form_is_refused(tmp_path):
    for key in ("made_by", "shards", "counts"):
        (tmp_path / "dataset.json").write_text(json.dumps({"format": 1, key: [1]}))
        with pytest.raises(ValueError, match=f"{key} is a list, expected a mapping"):
            read_dataset_json(tmp_path)


def flipped(path, reader, i, suffix):
    """Flips the last bit of a member."""
    offset, size = reader.index.spans[i, reader.index.suffixes.index(suffix)]
    data = bytearray(path.read_bytes())
    data[offset + size - 1] ^= 1
    path.write_bytes(data)


def test_a_bit_that_flips_in_a_member_is_noticed_when_that_is_read(tmp_path):
    path = write(tmp_path / "a.tar")
    with ShardReader(path) as whole:
        expected = [whole.read(i) for i in range(7)]
        flipped(path, whole, 3, "txt")
    with ShardReader(path) as reader:
        assert [reader.read(i) for i in (0, 1, 2, 4, 5, 6)] == [expected[i] for i in (0, 1, 2, 4, 5, 6)]
        assert reader.read(3, ("jpg",)) == {"jpg": expected[3]["jpg"]}
        with pytest.raises(BadSample, match=r"\.txt is not what was written") as caught:
            reader.read(3)
    assert caught.value.reason == "damaged-member"


def test_checksums_are_of_what_lies_in_the_tar(tmp_path):
    """Against the members as tarfile reads them."""
    path = write(tmp_path / "a.tar")
    index = load_index(path)
    with tarfile.open(path) as tar:
        for i, key in enumerate(index.keys):
            for s, suffix in enumerate(index.suffixes):
                there = index.spans[i, s, 0] >= 0
                data = tar.extractfile(f"{key}.{suffix}").read() if there else b""
                assert index.sums[i, s] == (xxhash.xxh3_64(data).intdigest() % 2**32 if there else 0)
    assert np.array_equal(ShardIndex.loads(index.dumps()).sums, index.sums)


@pytest.mark.parametrize("sums", ["zz", "00" * 4, 7, None, ["0"]])
def test_checksums_of_another_form_are_no_index(tmp_path, sums):
    text = index_path(write(tmp_path / "a.tar")).read_text()
    header, _, body = text.partition("\n")
    with pytest.raises(ValueError):
        ShardIndex.loads(header + "\n" + json.dumps({**json.loads("{" + body), "sums": sums})[1:])


def test_a_tar_of_others_is_known_by_a_time_that_no_tool_sets_back(tmp_path):
    """Other captions in the same places, with size and time of the old tar."""
    path = write(tmp_path / "a.tar")
    index_path(path).unlink()
    built = load_index(path)
    cached = next((tmp_path / "cache" / "indexes").iterdir())
    before, stat = cached.read_bytes(), os.stat(path)
    flipped(path, ShardReader(path), 2, "txt")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    again = load_index(path)
    assert (again.tar_bytes, again.mtime_ns) == (built.tar_bytes, built.mtime_ns)
    assert again.ctime_ns > built.ctime_ns and cached.read_bytes() != before


def test_a_shard_that_ends_early_is_said_when_its_data_set_is_opened(tmp_path, capsys):
    for name in ("a", "b", "c"):
        write(tmp_path / f"{name}.tar")
    assert open_data_set(tmp_path).samples == 21 and not capsys.readouterr().err
    offset = ShardReader(tmp_path / "b.tar").index.spans[4, 0, 0]
    os.truncate(tmp_path / "b.tar", int(offset))
    index_path(tmp_path / "c.tar").unlink()
    os.truncate(tmp_path / "c.tar", int(offset))
    data = open_data_set(tmp_path)
    assert [unit.truncated for unit in data.units] == [False, True, True]
    assert "2 of 3 shards end early or have a damaged header, first" in capsys.readouterr().err
