"""Bad samples, truncated and replaced shards, killed workers."""

import errno
import json
import os
import pickle
import shutil
import signal
import threading

import pytest

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import Served, jpeg, write_shards
from training.data.batches import DataError, StoreError
from training.data.loader import WorkerDied
from training.data.patience import Patience
from training.data.remote import ShardCache
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


def test_json_of_another_meaning_harms_only_who_asks_for_its_level(tmp_path, reader):
    odd = {0: {"tags": "cat, dog"}, 1: {"summary": 5}, 2: {"regions": "DE-BE"}}
    spoil = {
        number: lambda members, extra=extra: {
            **{suffix: data for suffix, data in members.items() if suffix != "roi.npy"},
            "json": json.dumps(extra).encode(),
        }
        for number, extra in odd.items()
    }
    folder = write_shards(tmp_path / "odd", range(8), spoil=spoil)
    data = reader(folder, levels=("global", "caption"))
    assert data.look().pairs == 8 and len(list(data.batches(0))) == 1 and not data.state()["counts"].get("bad")
    asking = reader(folder, max_bad_fraction=1.0)
    list(asking.batches(0))
    assert {reason for _, _, reason, _ in asking.state()["named"]} == {"bad-tags", "bad-summary", "bad-regions"}


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("same_size", [False, True])
def test_shard_replaced_while_running(shards, tmp_path, reader, workers, same_size):
    folder = shutil.copytree(shards, tmp_path / "copy")
    data = reader(folder, workers=workers, max_bad_fraction=1.0)
    write_shards(tmp_path / "other", range(200, 208 if same_size else 203))
    for path in (tmp_path / "other").glob("part-*"):
        path.replace(folder / path.name)
    keys = {key for batch in data.batches(0) for key in batch["sample_keys"]}
    assert keys <= {f"{number:04d}" for number in range(8, 44)}
    assert {reason for _, _, reason, _ in data.state()["named"]} == {"shard-replaced"}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_while_running_is_bad_samples(shards, tmp_path, reader, workers):
    folder = shutil.copytree(shards, tmp_path / "copy")
    data = reader(folder, workers=workers, max_bad_fraction=1.0)
    (folder / "part-002.tar").unlink()
    keys = {key for batch in data.batches(0) for key in batch["sample_keys"]}
    assert keys <= {f"{number:04d}" for number in range(44) if not 16 <= number < 24}
    named = {(where, reason) for _, where, reason, _ in data.state()["named"]}
    assert named == {(str(folder / "part-002.tar"), "no-shard")}
    few = reader(folder / "part-0*.tar", workers=workers, max_bad_fraction=0.001)
    (folder / "part-001.tar").unlink()
    with pytest.raises(DataError, match=r"\d+ no-shard"):
        list(few.batches(0))


def test_a_store_that_is_away_for_a_while_is_waited_for(shards, tmp_path, reader):
    """The whole folder is gone for half a second, as a file system that is mounted again; nothing is lost."""
    folder = shutil.copytree(shards, tmp_path / "copy")
    expected = list(reader(shards).batches(0))
    data = reader(folder, cache=ShardCache(tmp_path / "cache", patience=Patience(50, pause=0.05)))
    folder.rename(tmp_path / "away")
    threading.Timer(0.5, lambda: (tmp_path / "away").rename(folder)).start()
    assert equal(list(data.batches(0)), expected)
    assert "bad" not in data.state()["counts"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_store_that_stays_away_ends_the_run_with_its_name(shards, tmp_path, reader, workers):
    folder = shutil.copytree(shards, tmp_path / "copy")
    patience = Patience(3, pause=0.05)
    data = reader(folder, workers=workers, cache=ShardCache(tmp_path / "cache", patience=patience))
    shutil.rmtree(folder)
    with pytest.raises(StoreError, match=r"^\S*/copy/part-00\d\.tar: .*its folder is not there either; tried"):
        list(data.batches(0))


def test_a_stale_handle_is_opened_again(shards, reader):
    """A shard is open, its server starts anew: the old handle never works again, a new one does."""
    expected = list(reader(shards).batches(0))
    data = reader(shards)
    batches = data.batches(0)
    got = [next(batches)]
    folder = os.open(shards, os.O_RDONLY)  # of which no byte can be read
    for one in data.maker._readers.values():
        os.dup2(folder, one._file)
    os.close(folder)
    got += list(batches)
    assert equal(got, expected) and "bad" not in data.state()["counts"]


@pytest.mark.parametrize("code", [errno.ESTALE, errno.EIO])
def test_an_open_that_fails_for_a_while_is_tried_again(shards, tmp_path, reader, monkeypatch, code):
    expected, opened, tries = list(reader(shards).batches(0)), os.open, []

    def failing(path, *rest, **options):
        if str(path).endswith("part-003.tar") and len(tries) < 3:
            tries.append(path)
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *rest, **options)

    data = reader(shards, cache=ShardCache(tmp_path / "cache", patience=Patience(5, pause=0.01)))
    monkeypatch.setattr("training.data.shards.os.open", failing)
    assert equal(list(data.batches(0)), expected)
    assert len(tries) == 3 and "bad" not in data.state()["counts"]


def test_a_remote_shard_that_is_gone_is_bad_samples_and_a_server_that_is_gone_ends_the_run(shards, tmp_path, reader):
    folder = shutil.copytree(shards, tmp_path / "copy")
    with Served(folder) as served:
        cache = ShardCache(tmp_path / "cache", patience=Patience(2, pause=0.01))
        data = reader(served.url, cache=cache, max_bad_fraction=1.0)
        (folder / "part-002.tar").unlink()
        list(data.batches(0))
        assert {reason for _, _, reason, _ in data.state()["named"]} == {"no-shard"}
        (folder / "part-004.tar").write_bytes(b"<html>".ljust(2048))
        shutil.rmtree(tmp_path / "cache")
        data = reader(served.url, cache=cache, max_bad_fraction=1.0)
        list(data.batches(0))
        assert {reason for _, _, reason, _ in data.state()["named"]} == {"no-shard", "not-a-tar"}
        shutil.rmtree(tmp_path / "cache")
        other = reader(served.url, cache=cache, max_bad_fraction=1.0)
    with pytest.raises(StoreError, match=r"part-00\d.tar: .*tried 2 times"):
        list(other.batches(0))
