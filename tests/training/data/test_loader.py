"""The loader: contents of batches, the same bytes with workers, processes and from anywhere, real faults."""

import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

import fsspec  # noqa: F401  its registry is looked into
import numpy as np
import pytest
import torch
from PIL import Image

from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPProcessor, PyramidCLIPTokenizer
from pyramidclip_hf.configuration_pyramidclip import LEVELS
from tests.hub_server import Repository, client_environment, running_hub
from tests.training.prepare.small_data import FEATURES, Served, jpeg, make_sample, write_shards
from training.data.batches import BatchReport, DataError
from training.data.loader import TrainingReader, WorkerDied, settings_for
from training.data.records import members_from_sample
from training.data.remote import DownloadError, ShardCache
from training.data.shard_index import index_path
from training.data.shards import ShardReader, ShardWriter
from training.data.sources import open_data_set, shard_names
from training.data.views import view_boxes

ALL = tuple(LEVELS)


@pytest.fixture(scope="module")
def processor():
    return PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), PyramidCLIPTokenizer(), roi_feature_size=FEATURES)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("data") / "scenes", range(44))


@pytest.fixture
def reader(processor):
    """Makes readers and ends their workers."""
    made = []

    def make(data, levels=ALL, batch=8, settings=None, **options):
        changes = {"roi_feature_size": FEATURES, **(settings or {})}
        made.append(
            TrainingReader(
                [str(one) for one in (data if isinstance(data, list) else [data])],
                settings_for(processor, levels, **changes),
                processor.tokenizer,
                batch,
                **options,
            )
        )
        return made[-1]

    yield make
    for one in made:
        one.close()


def equal(first, second):
    """Whether two lists of batches have the same bytes."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
        for a, b in zip(first, second)
    )


def test_batch_holds_what_the_samples_say(shards, reader, processor):
    data = reader(shards, seed=3)
    batches = list(data.batches(1))
    assert len(batches) == data.batches_per_epoch == 44 // 8
    assert len({key for batch in batches for key in batch["sample_keys"]}) == 40
    for batch in batches[:2]:
        samples = [make_sample(int(key)) for key in batch["sample_keys"]]
        encoded = processor(
            text=[s.caption for s in samples],
            summary=[s.summary for s in samples],
            tags=[s.tags for s in samples],
            padding="max_length",
            return_tensors="pt",
        )
        for key in ("input_ids", "summary_input_ids", "tag_input_ids", "has_summary", "has_tags"):
            assert torch.equal(batch[key], encoded[key]), key
            assert batch[key].dtype == encoded[key].dtype
        assert batch["input_ids"].shape == (8, 77)
        for row, sample in enumerate(samples):
            count = len(sample.regions or ())
            assert batch["roi_mask"][row].tolist() == [True] * count + [False] * (batch["roi_mask"].shape[1] - count)
            scores = [region.score for region in sample.regions or ()]
            order = sorted(range(count), key=lambda i: -scores[i])
            for place, i in enumerate(order):
                expected = np.concatenate([sample.roi[i].astype(np.float32), np.float32(sample.regions[i].box)])
                assert np.array_equal(batch["roi_features"][row, place].numpy(), expected)
            assert not batch["roi_features"][row, count:].any()
        assert max(len(s.regions or ()) for s in samples) == batch["roi_mask"].shape[1]


def test_pixels_are_the_processors_normalisation_of_the_crop(shards, reader, processor):
    data = reader(shards, batch=4, seed=3)
    batch = next(data.batches(0))
    for row, key in enumerate(batch["sample_keys"]):
        picture = Image.open(io.BytesIO(jpeg(int(key))))
        boxes = view_boxes(60, 48, data.maker.settings.views, 3, 0, int(key))
        for level, name in (("global", "pixel_values"), ("local", "local_pixel_values")):
            crop = picture.crop(tuple(round(v) for v in boxes[level])).resize((32, 32), Image.BICUBIC)
            expected = processor.image_processor(crop, return_tensors="pt")["pixel_values"][0]
            # One of 255 levels of rounding between PIL's and torch's filter.
            assert (batch[name][row] - expected).abs().max() < 1.01 / 255 / 0.26
            assert (batch[name][row] - expected).abs().mean() < 0.002


def test_only_named_levels_are_made(shards, reader, monkeypatch):
    clip = next(reader(shards, levels=("global", "caption")).batches(0))
    assert set(clip) == {"pixel_values", "input_ids", "sample_keys"}
    everything = next(reader(shards).batches(0))
    assert torch.equal(clip["pixel_values"], everything["pixel_values"])
    no_pictures = next(reader(shards, levels=("roi", "tags")).batches(0))
    assert set(no_pictures) == {"roi_features", "roi_mask", "tag_input_ids", "has_tags", "sample_keys"}


def test_eos_pooling_pads_to_the_longest(shards, reader):
    batch = next(reader(shards, settings={"pooling": "eos"}).batches(0))
    lengths = (batch["input_ids"] != 0).sum(1)
    assert batch["input_ids"].shape[1] == lengths.max() < 20
    short = next(reader(shards, settings={"pooling": "eos", "max_length": 4}).batches(0))
    assert short["input_ids"].shape[1] == 4 and (short["input_ids"].max(1).values == 49407).all()


def test_most_confident_regions_are_kept(shards, reader):
    full, two = (next(reader(shards, settings={"max_regions": n}).batches(0)) for n in (10, 2))
    assert two["roi_features"].shape[1] == 2
    assert torch.equal(full["roi_features"][:, :2], two["roi_features"])


@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_change_no_byte(shards, reader, start_method):
    alone = reader(shards, seed=1)
    expected = [batch for epoch in range(2) for batch in alone.batches(epoch)]
    with_workers = reader(shards, seed=1, workers=2, start_method=start_method)
    assert equal([batch for epoch in range(2) for batch in with_workers.batches(epoch)], expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_continues_from_any_position(shards, reader, workers):
    expected = list(reader(shards).batches(3))
    resumed = reader(shards, workers=workers)
    assert equal(list(resumed.batches(3, 16)), expected[2:])
    assert equal(list(resumed.batches(3, 8)), expected[1:])  # not in turn: started anew
    with pytest.raises(ValueError, match="multiple of the global batch of 8"):
        next(resumed.batches(0, 12))


def test_epochs_and_seeds_differ(shards, reader):
    keys = [
        [b["sample_keys"] for b in reader(shards, seed=seed).batches(epoch)] for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert keys[0] != keys[1] and keys[0] != keys[2]
    # The same sample is cropped anew each epoch.
    data = reader(shards, batch=44)
    first, second = (next(data.batches(epoch)) for epoch in (0, 1))
    a, b = first["sample_keys"].index("0007"), second["sample_keys"].index("0007")
    assert not torch.equal(first["local_pixel_values"][a], second["local_pixel_values"][b])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batches_of_one(shards, reader, processes):
    alone = list(reader(shards, settings={"pooling": "max"}).batches(0))
    parts = [list(reader(shards, process_index=i, num_processes=processes).batches(0)) for i in range(processes)]
    for number, whole in enumerate(alone):
        for index in range(processes):
            part = parts[index][number]
            assert part["sample_keys"] == whole["sample_keys"][index::processes]
            for key in ("pixel_values", "local_pixel_values", "input_ids", "has_tags"):
                assert torch.equal(part[key], whole[key][index::processes])


def test_overfit_batches_repeat(shards, reader):
    data = reader(shards, overfit_batches=2)
    epochs = [list(data.batches(epoch)) for epoch in range(3)]
    assert len(epochs[0]) == 2 and equal(epochs[0], epochs[1]) and equal(epochs[0], epochs[2])
    assert equal(epochs[0], list(reader(shards).batches(0))[:2])


def test_several_captions(tmp_path, reader, processor):
    def several(members):
        return {**members, "json": json.dumps({"captions": ["one", "two", "three"]}).encode()}

    folder = write_shards(tmp_path / "data", range(16), spoil=dict.fromkeys(range(16), several))
    data = reader(folder, levels=("global", "caption"), batch=16)
    texts = [
        processor.tokenizer.batch_decode(next(data.batches(epoch))["input_ids"], skip_special_tokens=True)
        for epoch in range(4)
    ]
    assert {text.strip() for epoch in texts for text in epoch} == {"one", "two", "three"}
    assert equal(list(data.batches(2)), list(reader(folder, levels=("global", "caption"), batch=16).batches(2)))


def test_fewer_samples_than_a_global_batch(shards, reader):
    with pytest.raises(ValueError, match=r"44 samples / 64 in a global batch = 0\.69"):
        reader(shards, batch=64)
    with pytest.raises(ValueError, match="global batch of 8 over 3 processes"):
        reader(shards, num_processes=3)
    with pytest.raises(ValueError, match="no training data"):
        reader([])


def test_several_data_sets_one_after_another(shards, tmp_path, reader):
    other = write_shards(tmp_path / "other", range(100, 124))
    visits = set()
    data = reader([shards, other], batch=4)
    for epoch in range(6):
        kinds = [int(key) >= 100 for batch in data.batches(epoch) for key in batch["sample_keys"]]
        assert sum(a != b for a, b in zip(kinds, kinds[1:])) == 1
        visits.add(kinds[0])
    assert visits == {True, False}


# Where data may lie


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
    loose = reader(folder / "data.jsonl", window_shards=100)
    packed = reader(write_shards(tmp_path / "one", range(44), shard_size=44), window_shards=100)
    assert equal(list(loose.batches(0)), list(packed.batches(0)))
    assert equal(list(reader(folder / "data.jsonl", window_shards=100, workers=2).batches(0)), list(packed.batches(0)))
    # Bad lines are bad samples, not the end.
    lines[3], lines[7] = "{", json.dumps({"image": "none.jpg", "caption": "x"})
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = reader(folder / "data.jsonl")
    list(data.batches(0)), list(data.batches(1))
    assert {reason for _, _, reason, _ in data.state()["named"]} == {"bad-json", "no-image"}
    assert any("data.jsonl:4" in where for _, where, _, _ in data.state()["named"])


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
            ShardCache(attempts=1).fetch(f"{served.url}/none.tar")
    assert shard_names("https://host/a{08..11}.tar") == [f"https://host/a{n:02d}.tar" for n in range(8, 12)]


def test_fingerprint_follows_the_data_not_its_place(shards, tmp_path, reader):
    first = reader(shards).fingerprint
    moved = shutil.copytree(shards, tmp_path / "moved")
    assert reader(moved).fingerprint == first
    for path in moved.glob("*.index.json"):
        path.unlink()
    assert reader(moved).fingerprint == first
    with ShardWriter(moved / "part-005.tar") as writer:
        for number in (40, 41, 42, 99):
            writer.write(make_sample(number))
    assert reader(moved).fingerprint != first
    assert reader([shards, moved]).fingerprint not in (first, reader(moved).fingerprint)


def test_description(shards, reader):
    (described,) = reader(shards).description
    assert described == {"name": str(shards), "samples": 44, "shards": 6, "made_by": {"regions": "detector 1"}}


def test_regions_of_two_detectors_are_refused(shards, tmp_path, reader):
    other = write_shards(tmp_path / "other", range(8), made_by="detector 2")
    with pytest.raises(ValueError, match="2 detectors.*detector 1.*detector 2"):
        reader([shards, other])
    reader([shards, other], levels=("global", "caption"))
    reader([shards, other], settings={"allow_mixed_regions": True})
    with pytest.raises(ValueError, match="width 8, the model takes 2048"):
        reader(shards, settings={"roi_feature_size": 2048})
    mixed = reader(shards, settings={"roi_feature_size": 2048, "allow_mixed_regions": True})
    assert not any(batch["roi_mask"].any() for batch in mixed.batches(0))
    (other / "dataset.json").unlink()  # nobody says: every sample is checked
    data = reader(other, settings={"roi_feature_size": 2048})
    with pytest.raises(DataError, match="roi-width"):
        list(data.batches(0))


# Faults


def spoilers():
    """number -> what is done to its members, and the reason it is then counted by."""

    def cut_picture(members):
        return {**members, "jpg": members["jpg"][: len(members["jpg"]) // 2]}

    def large_picture(members):
        return {**members, "jpg": jpeg(0, (2000, 900))}

    return {
        3: (cut_picture, "bad-picture"),
        9: (lambda members: {**members, "jpg": b"<html>404</html>"}, "no-picture-format"),
        14: (lambda members: {k: v for k, v in members.items() if k != "txt"}, "no-caption"),
        20: (lambda members: {**members, "json": b"{broken"}, "bad-json"),
        26: (lambda members: {k: v for k, v in members.items() if k != "jpg"}, "no-image"),
        30: (large_picture, "picture-too-large"),
    }


@pytest.fixture
def spoilt(tmp_path):
    return write_shards(tmp_path / "spoilt", range(44), spoil={n: how for n, (how, _) in spoilers().items()})


OPTIONS = {"settings": {"max_image_pixels": 1_000_000}}


def test_bad_samples_are_replaced_counted_and_named(spoilt, tmp_path, reader):
    log = tmp_path / "bad.jsonl"
    data = reader(spoilt, batch=11, bad_log=log, **OPTIONS)
    batches = list(data.batches(0))
    assert all(len(batch["sample_keys"]) == 11 == len(batch["pixel_values"]) for batch in batches)
    keys = {key for batch in batches for key in batch["sample_keys"]}
    assert not keys & {f"{number:04d}" for number in spoilers()}
    counted = {name[4:]: n for name, n in data.state()["counts"].items() if name.startswith("bad/")}
    assert set(counted) == {reason for _, reason in spoilers().values()}
    named = {(key, reason): where for key, where, reason, _ in data.state()["named"]}
    for number, (_, reason) in spoilers().items():
        assert named[f"{number:04d}", reason].endswith(f"part-{number // 8:03d}.tar")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) == data.state()["counts"]["bad"] >= 6
    assert {(line["key"], line["reason"]) for line in lines} == set(named)
    report = data.report()
    assert (
        "44 samples" in report[0]
        and "no-caption" in report[0]
        and any("part-003.tar: 0026: no-image" in r for r in report)
    )
    # With workers and continued the same, counts as well.
    other = reader(spoilt, batch=11, workers=2, **OPTIONS)
    assert equal(list(other.batches(0)), batches) and other.state() == data.state()
    resumed = reader(spoilt, batch=11, workers=2, **OPTIONS)
    first = reader(spoilt, batch=11, **OPTIONS)
    half = [batch for _, batch in zip(range(2), first.batches(0))]
    resumed.load_state(pickle.loads(pickle.dumps(first.state())))
    assert equal(half + list(resumed.batches(0, 22)), batches) and resumed.state() == data.state()
    assert data.metrics()["data/bad_fraction"] == pytest.approx(counted_share(data))


def counted_share(data):
    counts = data.state()["counts"]
    return counts["bad"] / (counts["bad"] + counts["samples"])


@pytest.mark.parametrize("workers", [0, 2])
def test_stops_above_max_bad_fraction(spoilt, reader, workers):
    data = reader(spoilt, max_bad_fraction=0.004, workers=workers, **OPTIONS)
    with pytest.raises(DataError, match=r"max_bad_fraction is 0\.4%.*The first: .*part-00") as caught:
        list(data.batches(0))
    assert "audit" in str(caught.value)
    list(reader(spoilt, max_bad_fraction=0.02, workers=workers, **OPTIONS).batches(0))


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_but_bad_samples(tmp_path, reader, workers):
    folder = write_shards(tmp_path / "bad", range(16), spoil={n: lambda m: {**m, "jpg": b"x"} for n in range(16)})
    with pytest.raises(DataError, match="drawn in place of it"):
        next(reader(folder, workers=workers, max_bad_fraction=1.0).batches(0))


@pytest.mark.parametrize("with_index", [True, False])
def test_truncated_shard(shards, tmp_path, reader, with_index):
    folder = shutil.copytree(shards, tmp_path / "copy")
    path = folder / "part-002.tar"
    offset = ShardReader(path).index.spans[5, 0, 0]
    if not with_index:
        index_path(path).unlink()
    os.truncate(path, int(offset) + 10)
    data = reader(folder)
    assert data.fingerprint != reader(shards).fingerprint
    assert data.samples == (44 if with_index else 42)
    keys = {key for epoch in range(3) for batch in data.batches(epoch) for key in batch["sample_keys"]}
    lost = {"0021", "0022", "0023"}
    assert keys == {f"{n:04d}" for n in range(44)} - lost
    found = {(key, reason) for key, _, reason, _ in data.state()["named"]}
    assert found == {(key, "truncated-shard") for key in (lost if with_index else {"0021"})}


def test_killed_worker(shards, reader):
    data = reader(shards, workers=2, prefetch=1)
    batches = data.batches(0)
    next(batches)
    for process in data._pipeline._workers:
        os.kill(process.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied, match=r"worker died.*dataloader_workers \(now 2\).*--resume latest"):
        list(batches)
    # What was not yet taken comes again.
    assert equal(list(data.batches(0, 8)), list(reader(shards).batches(0, 8)))


def test_shard_replaced_while_running(shards, tmp_path, reader):
    folder = shutil.copytree(shards, tmp_path / "copy")
    data = reader(folder)
    write_shards(folder, range(200, 212), shard_size=2)
    with pytest.raises(ValueError, match="was replaced meanwhile"):
        list(data.batches(0))


# The cache of remote shards


def test_broken_downloads_are_tried_again(shards, tmp_path):
    cache = ShardCache(tmp_path / "fetched", attempts=3, backoff=0.01)
    with Served(shards) as served:
        served.cut = 2
        path = cache.fetch(f"{served.url}/part-001.tar")
        assert path.read_bytes() == (shards / "part-001.tar").read_bytes()
        assert len([r for r in served.requests if r.endswith(".tar")]) >= 3
        served.cut = 100
        with pytest.raises(DownloadError, match="part-002.tar.*tried 3 times"):
            cache.fetch(f"{served.url}/part-002.tar")
    assert [p.name for p in cache.folder.glob("*.tar")] == [path.name]
    assert not list(cache.folder.glob("*.partial"))


def test_cache_stays_within_its_limit(shards, tmp_path):
    size = (shards / "part-000.tar").stat().st_size
    cache = ShardCache(tmp_path / "fetched", max_bytes=int(2.5 * size))
    with Served(shards) as served:
        urls = [f"{served.url}/part-{n:03d}.tar" for n in range(4)]
        first = ShardReader(urls[0], cache)
        ShardReader(urls[1], cache)
        ShardReader(urls[0], cache)  # used again: part-001 is now the oldest
        ShardReader(urls[2], cache)
        assert cache.path_of(urls[0]).exists() and not cache.path_of(urls[1]).exists()
        ShardReader(urls[3], cache)
        assert not cache.path_of(urls[0]).exists()
        assert sum(p.stat().st_size for p in cache.folder.glob("*.tar")) <= cache.max_bytes
        assert first.read(3) == ShardReader(shards / "part-000.tar").read(3)  # evicted, but open
        with pytest.raises(ValueError, match="the cache holds"):
            ShardCache(tmp_path / "small", max_bytes=100).fetch(urls[0])
        assert open_data_set(served.url).samples == 44


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    with pytest.raises(ImportError, match=r"pyramidclip-hf\[train\]"):
        ShardCache(tmp_path).fetch("http://127.0.0.1:9/a.tar")


def test_report_of_nothing_bad(shards, reader):
    data = reader(shards)
    list(data.batches(0))
    assert data.report() == ["data: 40 samples, none bad"]
    assert data.metrics()["data/truncated_caption"] == 0
    assert isinstance(data.maker.batch(0, [0])["report"], BatchReport)


READ_ALL = """
import hashlib, sys
from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPProcessor, PyramidCLIPTokenizer
from tests.training.prepare.small_data import FEATURES
from training.data.loader import TrainingReader, settings_for
processor = PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), PyramidCLIPTokenizer(), roi_feature_size=FEATURES)
settings = settings_for(processor, ("global", "roi", "caption"), roi_feature_size=FEATURES)
reader = TrainingReader([sys.argv[1]], settings, processor.tokenizer, 8)
for batch in reader.batches(0):
    print(" ".join(batch["sample_keys"]), hashlib.sha256(batch["pixel_values"].numpy().tobytes()).hexdigest())
"""


@pytest.mark.loopback
def test_shards_of_a_data_set_on_the_hub(shards, tmp_path, checkout):
    def read(data, **environment):
        environment = os.environ | {"PYTHONPATH": str(checkout), "PYRAMIDCLIP_CACHE": str(tmp_path / "x")} | environment
        ran = subprocess.run([sys.executable, "-c", READ_ALL, data], capture_output=True, text=True, env=environment)
        return ran.stdout.splitlines(), ran.stderr

    with running_hub() as hub:
        hub.repositories["tester/scenes"] = Repository()
        files = {path.name: path.read_bytes() for path in shards.iterdir() if path.is_file()}
        del files["part-001.tar.index.json"]  # as other tools leave their tars: the reader makes the index
        hub.repositories["tester/scenes"].commit(files)
        environment = client_environment(hub, tmp_path / "home")
        lines, errors = read("hf://datasets/tester/scenes", **environment)
        assert len(lines) == 44 // 8, errors
        one, errors = read("hf://datasets/tester/scenes/part-{000..001}.tar", **environment)
        assert len(one) == 2, errors
        nothing, errors = read("hf://datasets/tester/scenes/part-{008..009}.tar", **environment)
        assert nothing == [] and "hf://datasets/tester/scenes/part-008.tar: not found" in errors
    assert lines == read(str(shards))[0]
