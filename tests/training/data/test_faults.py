"""Bad samples, truncated and replaced shards, killed workers."""

import json
import os
import pickle
import shutil
import signal

import pytest

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import jpeg, write_shards
from training.data.batches import DataError
from training.data.loader import WorkerDied
from training.data.shard_index import index_path
from training.data.shards import ShardReader


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
