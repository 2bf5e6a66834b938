"""Caches that several machines share: what each keeps there under its own name."""

import os
from pathlib import Path

import pytest

from tests.training.prepare.small_data import write_shards
from training.data import machine, shard_index
from training.data.machine import is_on_network, is_shared, own_name
from training.data.remote import ShardCache
from training.data.shard_index import load_index
from training.prepare.summarize import SummaryCache, SummaryConfig, open_summarizer

MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
31 22 0:42 / /home rw,relatime shared:1 - nfs4 server:/home rw
32 31 8:3 / /home/local\\040disk rw - xfs /dev/sdb1 rw
"""


@pytest.fixture
def shared(monkeypatch):
    """A function: these folders lie on a network, which this process is on as the machine of that name."""

    def make(name, *folders):
        monkeypatch.setattr(machine, "_looked_up", lambda folder: any(str(one) in folder for one in folders))
        monkeypatch.setattr("socket.gethostname", lambda: name)

    return make


@pytest.mark.parametrize(
    ("path", "expected"), [("/home/me/.cache", True), ("/home/local disk/x", False), ("/scratch", False)]
)
def test_a_cache_on_a_network_is_known_by_its_mount(tmp_path, path, expected):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert is_on_network(Path(path), tmp_path / "mountinfo") == expected
    assert not is_on_network(Path(path), tmp_path / "none")


def test_the_name_of_a_machine_is_in_names_of_folders_that_several_share(tmp_path, shared):
    assert not is_shared(tmp_path)
    shared("node/07", tmp_path)
    assert own_name("summaries.sqlite", tmp_path) == "summaries-node_07.sqlite"
    assert own_name("shards", tmp_path / "below") == "shards-node_07"
    assert own_name("shards", "/scratch") == "shards"


def test_a_machine_fetches_into_its_own_folder_where_the_cache_is_everybodys(tmp_path, monkeypatch, shared):
    cache = Path(os.environ["PYRAMIDCLIP_CACHE"])
    assert ShardCache().folder == cache / "shards"
    shared("node-3", cache)
    assert ShardCache().folder == cache / "shards-node-3"  # somebody chose it
    monkeypatch.delenv("PYRAMIDCLIP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert ShardCache().folder == tmp_path / "home/.cache/pyramidclip/shards"
    shared("node-3", tmp_path / "home")
    own = ShardCache().folder.parent
    assert own.parent == tmp_path and own.stat().st_mode & 0o777 == 0o700
    own.rmdir()
    own.symlink_to(tmp_path)  # somebody else's trick
    assert ShardCache().folder == tmp_path / "home/.cache/pyramidclip/shards-node-3"


def test_machines_with_a_home_in_common_keep_an_index_each_of_their_own_disks(tmp_path, monkeypatch, shared):
    """The same path is another tar on each: one would build its index anew whenever the other had."""
    cache, data, built, original = tmp_path / "cache", tmp_path / "data", [], shard_index.build_index
    monkeypatch.setattr(shard_index, "build_index", lambda path: built.append(os.readlink(data)) or original(path))
    disks = [write_shards(tmp_path / f"disk-{n}" / "scenes", range(20 * n, 20 * n + 20)) for n in (0, 1)]
    for path in (path for disk in disks for path in disk.glob("*.index.json")):
        path.unlink()
    expected = [original(disk / "part-000.tar").keys for disk in disks]
    for _ in range(2):
        for number, disk in enumerate(disks):
            shared(f"node-{number}", cache)
            data.unlink(missing_ok=True)
            data.symlink_to(disk)
            assert load_index(data / "part-000.tar").keys == expected[number]
    assert built == list(map(str, disks))
    # A tar that all see has one index for all.
    for number in (0, 1):
        shared(f"node-{number}", cache, data)
        load_index(data / "part-000.tar")
    assert len(built) == 3


def test_a_database_on_a_network_is_one_machines(tmp_path, monkeypatch, shared):
    kept = []
    monkeypatch.setattr("training.prepare.summarize.ModelSummarizer", lambda config, device, cache: kept.append(cache))
    monkeypatch.setattr("training.prepare.summarize.checkpoint_expected", lambda *given: open(os.devnull))
    shared("node-3", tmp_path / "cache")
    open_summarizer(SummaryConfig(model="some/model"), "cpu", None)
    open_summarizer(SummaryConfig(model="some/model"), "cpu", tmp_path / "chosen.sqlite")
    assert [one.path for one in kept] == [tmp_path / "cache" / "summaries-node-3.sqlite", tmp_path / "chosen.sqlite"]
    assert isinstance(kept[0], SummaryCache)
