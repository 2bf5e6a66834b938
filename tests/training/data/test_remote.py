"""The cache of remote shards: interrupted downloads, stores that stumble, its limit, a missing package."""

import itertools
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec  # noqa: F401  its registry is looked into
import pytest

from tests.training.prepare.small_data import Served, write_tar
from training.data import remote
from training.data.patience import Patience
from training.data.remote import DownloadError, NotThere, ShardCache
from training.data.shards import ShardReader, write_dataset_json
from training.data.sources import open_data_set


def test_broken_downloads_are_tried_again(shards, tmp_path):
    cache = ShardCache(tmp_path / "fetched", patience=Patience(3, pause=0.01))
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


class Scripted(BaseHTTPRequestHandler):
    """Answers as `script` says: {path: function of the handler}; an entry may be a list of such, one for each GET."""

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(None)

    def do_GET(self):
        self.server.asked.append((time.monotonic(), self.path))
        self.answer(self.wfile)

    def answer(self, body):
        answer = self.server.script[self.path]
        if not callable(answer):
            answer = answer.pop(0) if body else answer[0]
        status, headers, pieces = answer(self)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        for piece in pieces if body else ():
            try:
                body.write(piece)
            except ConnectionError:
                return
        self.close_connection = True


def whole(data, announced=None):
    size = len(data) if announced is None else announced
    return lambda handler: (200, {"Content-Length": size}, [data])


def refusal(status, **headers):
    return lambda handler: (status, {"Content-Length": 0, **headers}, [])


@pytest.fixture
def server():
    """Serves `server.script` at `server.url`; `server.asked` has (time, path) of each GET."""
    one = ThreadingHTTPServer(("127.0.0.1", 0), Scripted)
    one.script, one.asked, one.url = {}, [], f"http://127.0.0.1:{one.server_address[1]}"
    threading.Thread(target=one.serve_forever, daemon=True).start()
    yield one
    one.shutdown()
    one.server_close()


@pytest.fixture
def tar(shards):
    return (shards / "part-000.tar").read_bytes()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_store_that_stumbles_is_asked_again_and_called_by_its_status(server, tar, tmp_path, status):
    """Whether it is the question for the size that fails, or the download."""
    cache = ShardCache(tmp_path, patience=Patience(3, pause=0.01))
    server.script["/later.tar"] = [refusal(status), refusal(status), whole(tar)]
    assert cache.fetch(f"{server.url}/later.tar").read_bytes() == tar
    server.script["/never.tar"] = refusal(status)
    with pytest.raises(DownloadError, match=rf"never\.tar: HTTP status {status}.*tried 3 times") as caught:
        cache.fetch(f"{server.url}/never.tar")
    assert not isinstance(caught.value, NotThere)


def test_no_pause_is_shorter_than_the_server_asks_for(server, tar, tmp_path):
    server.script["/a.tar"] = [refusal(429, **{"Retry-After": "0.4"}), whole(tar)]
    ShardCache(tmp_path, patience=Patience(2, pause=0.001)).fetch(f"{server.url}/a.tar")
    (first, _), (second, _) = server.asked
    assert second - first >= 0.4


def test_a_refused_connection_is_tried_again_until_the_time_is_over(tmp_path):
    cache = ShardCache(tmp_path, patience=Patience(100, seconds=0.3, pause=0.1))
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"Connect.*tried [23] times"):
        cache.fetch("http://127.0.0.1:9/a.tar")
    assert time.monotonic() - started < 3


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_what_a_store_does_not_have_is_said_at_once(server, tmp_path, status):
    server.script["/a.tar"] = refusal(status)
    with pytest.raises(NotThere, match="not found" if status in (404, 410) else f"refused with HTTP status {status}"):
        ShardCache(tmp_path, patience=Patience(5, pause=60)).fetch(f"{server.url}/a.tar")


def test_small_files_are_read_to_their_end_and_of_an_index_its_beginning(server):
    """Over a network what has arrived is less than what was asked for."""
    data = bytes(range(256)) * 2000

    def slowly(handler):
        asked.append(handler.headers.get("Range"))
        return 200, {"Content-Length": len(data)}, (_after(0.02, piece) for piece in _pieces(data, 8))

    asked = []
    server.script["/dataset.json"] = slowly
    assert remote.read_small(f"{server.url}/dataset.json") == data and asked == [None]
    # Also where the server knows no ranges.
    assert remote.read_small(f"{server.url}/dataset.json", first=4096) == data[:4096] and asked[1] == "bytes=0-4095"


def test_a_shard_is_counted_by_the_beginning_of_its_index(server, shards, tmp_path):
    def part(handler):
        asked.append(handler.headers["Range"])
        return 206, {"Content-Length": 4096}, [index[:4096]]

    asked, index = [], (shards / "part-000.tar.index.json").read_bytes().ljust(5000)
    for number in range(3):
        server.script[f"/{number}.tar.index.json"] = part
    server.script["/dataset.json"] = refusal(404)
    data = open_data_set(f"{server.url}/{{0..2}}.tar")
    assert data.samples == 24 and asked == ["bytes=0-4095"] * 3
    assert sorted(path for _, path in server.asked if path != "/dataset.json") == [
        f"/{n}.tar.index.json" for n in range(3)
    ]


def test_shards_that_nothing_counts_are_fetched_once_within_the_bound_and_said(shards, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in shards.glob("*.tar"):
        shutil.copy(path, bare)
    count, size = len(list(bare.iterdir())), max(path.stat().st_size for path in bare.iterdir())
    cache = ShardCache(tmp_path / "fetched", max_bytes=int(2.5 * size), patience=Patience(1))
    for begun in range(2):
        with Served(bare) as served:
            # The same place each time, as a store's is.
            cache.path_of = lambda url: cache.folder / url.rpartition("/")[2]
            names = f"{served.url}/part-{{000..{count - 1:03d}}}.tar"
            assert open_data_set(names, cache).samples == open_data_set(str(shards)).samples
            fetched = [path for path in served.requests if path.endswith(".tar")]
            assert sorted(fetched) == ([] if begun else sorted(f"/{path.name}" for path in bare.iterdir()))
        assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= cache.max_bytes
        said = [line for line in capsys.readouterr().err.splitlines() if "fetched whole" in line]
        assert len(said) == (not begun) and all("part-000.tar and others" in line for line in said)


def test_a_slow_steady_download_may_take_its_time_and_silence_may_not(server, tar, tmp_path, monkeypatch):
    """The limit is between two pieces: here 0.5 s, of a download of more than a second."""
    monkeypatch.setattr(remote, "_SILENCE", 0.5)

    def steady(handler):
        pieces = itertools.batched(tar, len(tar) // 12 + 1) if hasattr(itertools, "batched") else _pieces(tar, 12)
        return 200, {"Content-Length": len(tar)}, (_after(0.1, bytes(piece)) for piece in pieces)

    def silent(handler):
        return 200, {"Content-Length": len(tar)}, (_after(wait, tar[:512]) for wait in (0, 1.5))

    server.script.update({"/steady.tar": steady, "/silent.tar": silent})
    cache = ShardCache(tmp_path, patience=Patience(1))
    started = time.monotonic()
    assert cache.fetch(f"{server.url}/steady.tar").read_bytes() == tar
    assert time.monotonic() - started > 1
    with pytest.raises(DownloadError, match="Timeout"):
        cache.fetch(f"{server.url}/silent.tar")


def _pieces(data, number):
    step = len(data) // number + 1
    return (data[first : first + step] for first in range(0, len(data), step))


def _after(seconds, data):
    time.sleep(seconds)
    return data


def endless(handler):
    return 200, {}, itertools.repeat(b"\0" * 65536)


def lying(handler):
    """A size for those who ask, and no end for those who read."""
    size = {"Content-Length": 2048} if handler.command == "HEAD" else {}
    return 200, size, itertools.repeat(b"\0" * 65536)


@pytest.mark.parametrize(
    ("answer", "message"), [(endless, "has more than 100000 bytes"), (lying, "more than the 2048")]
)
def test_no_server_makes_the_cache_larger_than_its_bound(server, tmp_path, answer, message):
    server.script["/a.tar"] = answer
    cache, largest = ShardCache(tmp_path, max_bytes=100_000, patience=Patience(1)), []
    original = remote.ShardCache._make_room

    def watched(self, own, wanted):
        original(self, own, wanted)
        largest.append(sum(path.stat().st_size for path in tmp_path.iterdir()))

    remote.ShardCache._make_room, before = watched, original
    try:
        with pytest.raises((ValueError, NotThere), match=message):
            cache.fetch(f"{server.url}/a.tar")
    finally:
        remote.ShardCache._make_room = before
    assert max(largest) <= 100_000 and not list(tmp_path.glob("*.tar")) and not list(tmp_path.glob(".*.partial"))


def test_downloads_side_by_side_keep_the_bound_together(server, tar, tmp_path):
    """Room for two and a half: the third waits until one of the first is whole, and evicts it."""
    go = threading.Event()

    def begun():
        yield tar[:512]
        go.wait(30)
        yield tar[512:]

    def held(handler):
        return 200, {"Content-Length": len(tar)}, begun()

    server.script.update({f"/{name}.tar": held for name in "abc"})
    cache = ShardCache(tmp_path / "c", max_bytes=int(2.5 * len(tar)), patience=Patience(50, pause=0.05))
    threads = [threading.Thread(target=cache.fetch, args=(f"{server.url}/{name}.tar",)) for name in "abc"]
    for thread in threads:
        thread.start()
    while len(server.asked) < 2:
        time.sleep(0.01)
    time.sleep(0.3)
    used = sum(path.stat().st_size for path in (tmp_path / "c").iterdir())
    go.set()
    for thread in threads:
        thread.join()
    assert used == 2 * len(tar) and len(list((tmp_path / "c").glob("*.tar"))) == 2


def test_a_download_that_is_done_while_another_looks_for_room_is_counted(tmp_path, monkeypatch):
    """Its file is renamed between the look at those that are on their way and at those that are there."""
    done, own, listed = tmp_path / ".a.tar.1.partial", tmp_path / ".b.tar.2.partial", Path.glob
    done.write_bytes(bytes(60))
    own.touch()

    def glob(folder, pattern):
        found = list(listed(folder, pattern))
        if done.exists():
            done.rename(tmp_path / "a.tar")
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    ShardCache(tmp_path, max_bytes=100, patience=Patience(1))._make_room(own, 60)
    assert own.stat().st_size == 60 and not (tmp_path / "a.tar").exists()


def test_a_page_that_is_no_tar_does_not_stay(server, tar, tmp_path):
    page = b"<html>maintenance".ljust(2048)
    server.script["/a.tar"] = [whole(page), whole(tar)]
    cache = ShardCache(tmp_path, patience=Patience(1))
    url = f"{server.url}/a.tar"
    with pytest.raises(NotThere, match=rf"{url} is no tar .*begins with b'<html>maintenance"):
        cache.fetch(url)
    assert not list(tmp_path.glob("*.tar"))
    assert cache.fetch(url).read_bytes() == tar
    # One that an earlier version kept, or that was damaged since, is fetched again.
    cache.path_of(url).write_bytes(page)
    server.script["/a.tar"] = whole(tar)
    assert len(ShardReader(url, cache)) == 8


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


def test_each_machine_fetches_what_its_processes_read_and_each_shard_once(tmp_path, reader, monkeypatch):
    folder = tmp_path / "many"
    for shard in range(20):
        write_tar(folder / f"{shard:02d}.tar", [(f"{shard}-{n}", {"txt": b"a", "jpg": b"?"}) for n in range(32)])
    write_dataset_json(folder, {}, None, {})
    fetched = []
    for node in range(2):
        cache = ShardCache(tmp_path / f"node-{node}")
        with Served(folder) as served:
            given = {"process_index": node, "num_processes": 2, "window_samples": 256, "cache": cache}
            read = reader(served.url, ("caption",), 256, **given)
            list(read.batches(0))
            read.maker._fetching.join()
            requests = [path for path in served.requests if path.endswith(".tar")]
        assert len(requests) == len({*requests})
        fetched.append({*requests})
    assert len(fetched[0] | fetched[1]) == 20
    # The second epoch's begin as well, of which the first has half.
    assert max(map(len, fetched)) < 20

    shares = []
    monkeypatch.setattr(read.maker, "_fetch", shares.append)
    for worker in (SimpleNamespace(id=number, num_workers=2) for number in range(2)):
        monkeypatch.setattr("torch.utils.data.get_worker_info", lambda worker=worker: worker)
        read.maker._windows = {}
        read.maker._look_ahead(0, range(256, 384))
    assert not {*shares[0]} & {*shares[1]} and abs(len(shares[0]) - len(shares[1])) <= 1


def test_missing_package_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.setitem(sys.modules, "fsspec.implementations.http", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "http", raising=False)
    with pytest.raises(ImportError, match=r"pyramidclip-hf\[train\]"):
        ShardCache(tmp_path).fetch("http://127.0.0.1:9/a.tar")
