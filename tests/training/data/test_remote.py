"""The cache of remote shards: interrupted downloads, its limit, a missing package."""

import sys

import fsspec  # noqa: F401  its registry is looked into
import pytest

from tests.training.prepare.small_data import Served
from training.data.remote import DownloadError, ShardCache
from training.data.shards import ShardReader
from training.data.sources import open_data_set


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
