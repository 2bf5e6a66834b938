"""Where training data may lie: folders, lists, URLs, manifests and the Hub give the same batches."""

import collections
import hashlib
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.hub_server import Repository, client_environment, running_hub
from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import Served, make_sample, picture, write_jsonl, write_shards
from training.data import manifest_lines as manifest_lines_module
from training.data import sources
from training.data.manifest_lines import manifest_lines
from training.data.patience import Patience
from training.data.records import BadSample, members_from_sample
from training.data.remote import DownloadError, ShardCache
from training.data.samples import ShardSamples
from training.data.shards import ShardWriter, read_dataset_json
from training.data.sources import Manifest, open_data_set, shard_names
from training.evaluation.arguments import EvaluationArguments
from training.evaluation.tasks import open_labelled, open_samples
from training.prepare import audit
from training.prepare.formats.store import StoreRows


def test_sources_give_the_same_batches(shards, tmp_path, reader):
    expected = list(reader(shards).batches(0))
    listing = tmp_path / "list.txt"
    listing.write_text("# shards\n" + "\n".join(str(path) for path in sorted(shards.glob("*.tar"))) + "\n")
    with Served(shards) as served:
        pattern = f"{served.url}/part-{{000..005}}.tar"
        remote = tmp_path / "remote.txt"
        remote.write_text("\n".join(f"{served.url}/part-{n:03d}.tar" for n in range(6)))
        for data in (f"{shards}/part-*.tar", listing, served.url, pattern, remote):
            assert equal(list(reader(data).batches(0)), expected), data
        before = len(served.requests)
        assert equal(list(reader(served.url).batches(0)), expected)
        assert not [path for path in served.requests[before:] if path.endswith(".tar")]  # all in the cache
        assert equal(list(reader(served.url, workers=2).batches(0)), expected)
    assert reader(listing).fingerprint == reader(shards).fingerprint


def test_data_that_a_step_left_unfinished_is_refused_by_every_reader(tmp_path, reader):
    folder = write_shards(tmp_path / "scenes", range(16))
    content = read_dataset_json(folder)
    (folder / "dataset.json").write_text(json.dumps(content | {"unfinished": ["regions", "summary"]}))
    refused = pytest.raises(
        ValueError, match="scenes: regions, summary has begun and not ended.*set --allow-unfinished$"
    )
    (tmp_path / "list.txt").write_text("scenes/part-001.tar\n")
    for data in (folder, f"{folder}/part-*.tar", tmp_path / "list.txt"):
        with refused:
            reader(data)
        reader(data, allow_unfinished=True)
    given = {"model": "none", "data": str(folder)}
    with refused:
        open_samples(EvaluationArguments(**given))
    assert len(open_samples(EvaluationArguments(**given, allow_unfinished=True))) == 16
    with refused:
        open_labelled(EvaluationArguments(**given, task="zero-shot"))
    with refused:
        audit.run(audit.parse([str(folder)]))
    audit.run(audit.parse([str(folder), "--allow-unfinished", "--workers", "1"]))
    with pytest.raises(ValueError, match="scenes: regions, summary has begun and not ended.*where it was$"):
        StoreRows(folder)


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.parquet", "pairs.JSON"])
def test_a_table_is_told_how_it_becomes_shards(tmp_path, name):
    (tmp_path / name).write_text("image,caption\na.jpg,a\n")
    with pytest.raises(ValueError, match=f"{name} is a table.*prepare.pack --input .*{name} --output-dir"):
        shard_names(str(tmp_path / name))


def test_a_manifest_with_other_keys_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "pairs.jsonl").write_text('\n{"path": "a.jpg", "text": "a"}\n')
    with pytest.raises(ValueError, match="expected lines with 'image'.*the first has 'path', 'text'.*prepare.pack"):
        open_data_set(str(tmp_path / "pairs.jsonl"))


def test_manifest_gives_the_same_batches(shards, tmp_path, reader):
    folder = tmp_path / "loose"
    folder.mkdir()
    lines = []
    for number in range(44):
        sample = make_sample(number)
        (folder / f"{number:04d}.jpg").write_bytes(sample.image)
        record = json.loads(members_from_sample(sample).get("json", b"{}"))
        record.update(image=f"{number:04d}.jpg", key=sample.key, caption=sample.caption)
        if sample.roi is not None:
            np.save(folder / f"{number:04d}.npy", sample.roi)
            record["roi"] = f"{number:04d}.npy"
        lines.append(json.dumps(record))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n\n")
    loose = reader(folder / "data.jsonl")
    packed = reader(write_shards(tmp_path / "one", range(44), shard_size=44))
    assert equal(list(loose.batches(0)), list(packed.batches(0)))
    assert equal(list(reader(folder / "data.jsonl", workers=2).batches(0)), list(packed.batches(0)))
    # Bad lines are bad samples, not the end.
    lines[3], lines[7] = "{", json.dumps({"image": "none.jpg", "caption": "x"})
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = reader(folder / "data.jsonl")
    list(data.batches(0)), list(data.batches(1))
    assert {reason for _, _, reason, _ in data.state()["named"]} == {"bad-json", "no-image"}
    assert any("data.jsonl:4" in where for _, where, _, _ in data.state()["named"])


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_lines_of_a_manifest_are_those_that_are_not_blank(tmp_path, monkeypatch, block):
    monkeypatch.setattr("training.data.manifest_lines._BLOCK", block)
    text = b'{"a": 1}\n\n  \t\r\n{"b": 2}\r\n {"c": 3}\n\x0b\n[1,\xc2\xa02]\n\n{"last": 4}'
    for number, data in enumerate((text, text + b"\n", text + b"\n\n", b"\n", b"")):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(data)
        expected, position = [], 0
        for line in io.BytesIO(data):
            expected += [position] if line.strip() else []
            position += len(line)
        lines = manifest_lines(path)
        assert lines.offsets.tolist() == [*expected, len(data)]
        assert lines.digest == hashlib.sha256(data).hexdigest()[:16] and lines.kept_in is not None


def test_the_lines_of_a_manifest_are_looked_for_once_and_mapped(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"image": f"{n}.jpg", "caption": "a"}) for n in range(2000)))
    first = Manifest(path)
    looked, original = [], manifest_lines_module._looked_through
    monkeypatch.setattr(manifest_lines_module, "_looked_through", lambda one: looked.append(one) or original(one))
    again = Manifest(path)
    assert not looked and again.identity == first.identity and isinstance(again.offsets, np.memmap)
    sent = pickle.dumps(again)
    assert len(sent) < 2000 and np.array_equal(pickle.loads(sent).offsets, first.offsets)
    with open(path, "a") as file:
        file.write("\n{}")
    assert len(Manifest(path).offsets) == 2002 and looked
    # Without a place for the cache: in memory.
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", "/proc/nowhere")
    assert np.array_equal(Manifest(path).offsets, pickle.loads(pickle.dumps(Manifest(path))).offsets)


def test_a_remote_shard_without_index_is_fetched_once_to_be_counted(shards, tmp_path):
    """Also where it has been evicted since; a few samples take only the first shard."""
    folder = tmp_path / "bare"
    folder.mkdir()
    for path in shards.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    with Served(folder) as served:
        name = f"{served.url}/part-{{000..005}}.tar"

        def fetched():
            return [path for path in served.requests if path.endswith(".tar")]

        assert len(ShardSamples(name, 5)) == 5
        assert set(fetched()) == {"/part-000.tar"}
        assert open_data_set(name).samples == 44
        shutil.rmtree(ShardCache().folder)
        before = len(fetched())
        assert open_data_set(name).samples == 44 and len(fetched()) == before
        with open(folder / "part-002.tar", "ab") as file:
            file.write(bytes(512))
        assert open_data_set(name).samples == 44 and set(fetched()[before:]) == {"/part-002.tar"}


def test_processes_of_a_machine_begin_to_count_at_different_places(shards, monkeypatch):
    expected, counted = open_data_set(str(shards)).units, []
    original = sources._unit
    monkeypatch.setattr(sources, "_unit", lambda shard, *rest: counted.append(shard) or original(shard, *rest))
    for rank in range(3):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        counted.clear()
        assert open_data_set(str(shards)).units == expected
        assert counted[0] == expected[2 * rank].name


def test_a_store_of_regions_opens_few_shards_and_finds_every_key(tmp_path, monkeypatch):
    monkeypatch.setattr("training.prepare.formats.store._OPEN_SHARDS", 2)
    store = StoreRows(write_shards(tmp_path / "store", range(44)))
    assert len(store) == 44 and [store.key(row) for row in range(44)] == [f"{n:04d}" for n in range(44)]
    assert [store.find(f"{n:04d}") for n in range(44)] == list(range(44)) and store.find("none") is None
    assert store._reader.cache_info().currsize == 2
    monkeypatch.setattr("training.prepare.formats.store._hash", lambda key: 7)  # all keys of one hash
    same = StoreRows(tmp_path / "store")
    assert [same.find(f"{n:04d}") for n in (0, 20, 43)] == [0, 20, 43] and same.find("none") is None


def test_names_that_lead_nowhere(tmp_path, reader):
    for name in ("nothing", "no*thing.tar", "none.jsonl", "none.txt"):
        with pytest.raises(FileNotFoundError, match=name.replace("*", r"\*")):
            reader(tmp_path / name)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a folder with"):
        reader(tmp_path / "empty")
    with Served(tmp_path) as served:
        with pytest.raises(FileNotFoundError, match="dataset.json"):
            reader(f"{served.url}/empty")
        with pytest.raises(DownloadError, match="not found"):
            ShardCache(patience=Patience(1)).fetch(f"{served.url}/none.tar")
    assert shard_names("https://host/a{08..11}.tar") == [f"https://host/a{n:02d}.tar" for n in range(8, 12)]


READ_ALL = """
import hashlib, sys
from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPProcessor, PyramidCLIPTokenizer
from tests.training.prepare.small_data import FEATURES
from training.data.loader import TrainingReader, settings_for
processor = PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), PyramidCLIPTokenizer(), roi_feature_size=FEATURES)
settings = settings_for(processor, ("global", "roi", "caption"), roi_feature_size=FEATURES)
for data in sys.argv[1:]:
    try:
        for batch in TrainingReader([data], settings, processor.tokenizer, 8).batches(0):
            print(" ".join(batch["sample_keys"]), hashlib.sha256(batch["pixel_values"].numpy().tobytes()).hexdigest())
    except Exception as error:
        print(error)
    print("--")
"""


@pytest.mark.loopback
def test_shards_of_a_data_set_on_the_hub(shards, tmp_path, checkout):
    with running_hub() as hub:
        hub.repositories["tester/scenes"] = Repository()
        files = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
        del files["part-001.tar.index.json"]  # as other tools leave their tars: the reader makes the index
        hub.repositories["tester/scenes"].commit(files)
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYRAMIDCLIP_CACHE": str(tmp_path / "x")}
        environment |= client_environment(hub, tmp_path / "home")
        there = "hf://datasets/tester/scenes"
        # One process for all: each has to import torch.
        words = [there, f"{there}/part-{{000..001}}.tar", f"{there}/part-{{008..009}}.tar", str(shards)]
        ran = subprocess.run([sys.executable, "-c", READ_ALL, *words], capture_output=True, text=True, env=environment)
    whole, two, none, local = (part.strip().splitlines() for part in ran.stdout.split("--\n")[:-1])
    assert len(whole) == 44 // 8 and whole == local, ran.stderr
    assert len(two) == 2
    assert len(none) == 1 and f"{there}/part-008.tar: not found" in none[0]


@pytest.mark.parametrize("column", ["image", "roi"])
def test_devices_and_pipes_are_no_pictures(tmp_path, column):
    """Their size is 0, and reading one never ends."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "fine.jpg").write_bytes(picture(0))
    rows = [{"image": "fine.jpg", "caption": "x", column: name} for name in ("pipe.jpg", "zero.jpg", "/dev/zero")]
    data = sources.open_data_set(write_jsonl(tmp_path / "m.jsonl", rows))
    unit = data.open(data.units[0])
    for i in range(3):
        with pytest.raises(BadSample, match="is not a file with contents") as caught:
            unit.read(i)
        assert caught.value.reason == f"no-{column}"


def described_shards(folder, number):
    """A `dataset.json` for so many shards of 1000 samples; returns their names."""
    folder.mkdir()
    names = [f"{n:06d}.tar" for n in range(number)]
    entry = {"samples": 1000, "bytes": 10_240_000, "keys_digest": "0123456789abcdef"}
    content = {"format": 1, "made_by": {}, "counts": {}, "shards": dict.fromkeys(names, entry)}
    (folder / "dataset.json").write_text(json.dumps(content))
    return names


MANY = pytest.mark.parametrize("number", [1000, pytest.param(100_000, marks=pytest.mark.slow)])


@MANY
def test_opening_described_shards_looks_at_each_once_and_opens_none(tmp_path, monkeypatch, number):
    for name in described_shards(tmp_path / "data", number):
        with open(tmp_path / "data" / name, "wb") as file:
            file.truncate(10_240_000)
    os.utime(tmp_path / "data/dataset.json")
    looked, original, names = collections.Counter(), os.stat, {*os.listdir(tmp_path / "data")}

    def stat(path, *rest, **options):
        looked[str(path)] += os.path.basename(path) in names and str(path).endswith(".tar")
        return original(path, *rest, **options)

    monkeypatch.setattr(os, "stat", stat)
    monkeypatch.delattr(sources, "load_index")
    monkeypatch.delattr(sources, "read_index_header")
    for name in (tmp_path / "data", f"{tmp_path}/data/{{000000..{number - 1:06d}}}.tar"):
        looked.clear()
        tracemalloc.start()
        data = open_data_set(name)
        kept = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert data.samples == 1000 * number and len(data.units) == number
        assert sum(looked.values()) == number and max(looked.values()) == 1
        assert kept < 1000 * number  # bytes
    open_files = [os.path.realpath(entry) for entry in Path("/proc/self/fd").iterdir()]
    assert not [name for name in open_files if name.startswith(str(tmp_path))]


@MANY
def test_opening_described_shards_behind_a_url_is_one_request(tmp_path, number):
    names = described_shards(tmp_path / "data", number)
    with Served(tmp_path / "data") as served:
        data = open_data_set(served.url)
        assert [unit.name for unit in data.units] == [f"{served.url}/{name}" for name in names]
        assert {*served.requests} == {"/dataset.json"} and len(served.requests) <= 2


def test_a_shard_that_was_written_after_its_description_is_counted_anew(shards, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    assert open_data_set(copy).units[1].samples == 8
    size = (copy / "part-001.tar").stat().st_size
    with ShardWriter(copy / "part-001.tar") as writer:
        writer.write_members("one", {"jpg": picture(0), "txt": bytes(size)})
    with open(copy / "part-001.tar", "r+b") as file:
        file.truncate(size)  # the size says nothing, and the copy of an index lies beside it
    assert open_data_set(copy).units[1].samples == 1


def test_lists_and_ranges_are_looked_for_in_their_folders(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/0.tar", "a/1.tar"):
        (tmp_path / name).write_bytes(b"")
    os.mkfifo(tmp_path / "a/2.tar")
    (tmp_path / "list.txt").write_text("a/0.tar\na/{1..3}.tar\n")
    with pytest.raises(FileNotFoundError, match=r"2 of 4 tars are not there, first .*a/2\.tar"):
        shard_names(str(tmp_path / "list.txt"))
    with pytest.raises(FileNotFoundError, match=r"names .*a/3\.tar, which is not there"):
        shard_names(f"{tmp_path}/a/{{3..4}}.tar")
    with pytest.raises(ValueError, match=r"a/2\.tar, which is a device"):
        shard_names(f"{tmp_path}/a/{{0..2}}.tar")
