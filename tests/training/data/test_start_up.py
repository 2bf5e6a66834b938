"""What opening data asks of a file system where many processes do it: counted, on simulated processes."""

import builtins
import collections
import json
import os
import shutil
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.training.data.same_batches import equal
from tests.training.prepare.small_data import Served, write_shards
from training.data import sources
from training.data.loader import TrainingReader, fingerprint_of
from training.data.order import SampleOrder, batch_positions
from training.data.shard_index import index_path
from training.data.shards import DATASET_FORMAT
from training.data.sources import open_data_set
from training.loop.task import plan_steps


class Threads:
    """Threads that stand for the processes of a job, eight a machine; `crew(n)` is one of them."""

    def __init__(self, processes):
        self.processes, self.barrier, self.told = processes, threading.Barrier(processes), [None] * processes

    def crew(self, number):
        crew, job = sources.Alone(), self
        crew.number, crew.processes, crew.first_of_machine = number, self.processes, number % 8 == 0

        def share(work):
            try:
                found = work(), None
            except Exception as error:
                found = None, error
            job.told[number] = found
            job.barrier.wait(timeout=300)
            told = list(job.told)
            job.barrier.wait(timeout=300)
            for _, error in told:
                if error is not None:
                    raise error
            return [one for one, _ in told]

        crew.share = share
        return crew

    def run(self, work):
        """[work(crew of each process)]."""
        with ThreadPoolExecutor(self.processes) as pool:
            return list(pool.map(lambda number: work(self.crew(number)), range(self.processes)))


@pytest.fixture
def asked(monkeypatch):
    """(operation, path) -> how often, of everything below the folder `asked.folder`."""

    class Asked(collections.Counter):
        folder = "/"

        def of(self, ending):
            """Operation -> the most of it on one path with this ending, and how many paths were asked for."""
            found = collections.defaultdict(list)
            for (operation, path), times in self.items():
                if path.endswith(ending):
                    found[operation].append(times)
            return {operation: (max(times), len(times)) for operation, times in found.items()}

    counted, lock = Asked(), threading.Lock()

    def counting(module, name):
        original = getattr(module, name)

        def call(path, *arguments, **options):
            text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
            if text.startswith(str(counted.folder)):
                with lock:
                    counted[name, text] += 1
            return original(path, *arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "stat"), (os, "lstat"), (os, "open"), (builtins, "open"), (os, "scandir")):
        counting(module, name)
    return counted


SAMPLES, SIZE = 9534, 9534 * 105 * 1024  # 143M pairs in 15,000 shards of a gigabyte


def many_shards(folder, number, described=False, indexed=False):
    """Shards of the size of the paper's data that take no room, with what is known of them."""
    folder.mkdir()
    entries = {}
    for n in range(number):
        path = folder / f"{n:05d}.tar"
        with open(path, "wb") as file:
            file.truncate(SIZE)
        entry = {"samples": SAMPLES, "bytes": SIZE, "keys_digest": f"{n:016x}"}
        entries[path.name] = entry
        if indexed:
            header = {"format": 1, "tar_bytes": SIZE, "mtime_ns": 0, "truncated": False, **entry}
            index_path(path).write_text(f'{{"header": {json.dumps(header)},\n"suffixes": []}}')
    if described:
        (folder / "dataset.json").write_text(json.dumps({"format": DATASET_FORMAT, "shards": entries}))
    return folder


def start(folder, crew, batch=8192):
    """What a process works out before its first batch: data, plan, and where its first and last samples lie."""
    data = open_data_set(str(folder), crew=crew)
    order = SampleOrder([[unit.samples for unit in data.units]], seed=0, global_batch_size=batch)
    plan = plan_steps(data.samples, batch, epochs=32)
    first = batch_positions(0, batch, crew.number, crew.processes)
    last = batch_positions(plan.steps_per_epoch - 1, batch, crew.number, crew.processes)
    places = [order.locate(epoch, position) for epoch in (0, 31) for position in (first[0], last[-1])]
    return fingerprint_of([data]), plan.samples, len(set(places))


@pytest.mark.parametrize("known", ["described", "indexed"])
def test_each_shard_is_looked_at_once_in_the_whole_job(tmp_path, asked, known):
    folder = many_shards(tmp_path / "data", 300, **{known: True})
    asked.clear()
    asked.folder = folder
    assert len(set(Threads(16).run(lambda crew: start(folder, crew)))) == 1
    assert asked.of(".tar") == {"stat": (1, 300)}  # and never opened
    indexes = {"stat": (1, 300), "open": (1, 300)} if known == "indexed" else {}
    assert asked.of(".index.json") == indexes
    # Once a machine: the names, and what is said of them.
    assert (
        asked.of("data")["scandir"] == (2, 1) and max(times for times, _ in asked.of("dataset.json").values()) <= 2 * 3
    )


@pytest.mark.slow
@pytest.mark.parametrize("known", ["described", "indexed"])
def test_the_plan_of_143_million_pairs_for_64_processes_takes_less_than_a_minute(tmp_path, asked, known, capsys):
    """The processes are threads here, so that this is the time of all of them one after another."""
    folder = many_shards(tmp_path / "data", 15_000, **{known: True})
    asked.clear()
    asked.folder = folder
    began, spent = time.monotonic(), time.process_time()
    ((_, samples, _),) = set(Threads(64).run(lambda crew: start(folder, crew)))
    seconds, spent = time.monotonic() - began, time.process_time() - spent
    with capsys.disabled():
        print(f" {seconds:.1f} s, {spent:.1f} s of processor")
    assert samples == 15_000 * SAMPLES > 143_000_000 and spent < 60
    assert asked.of(".tar") == {"stat": (1, 15_000)}
    assert sum(asked.values()) < 4 * 15_000


def test_shards_of_which_nothing_is_known_are_read_once_by_somebody(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "scenes", range(44))
    for path in [*folder.glob("*.index.json"), folder / "dataset.json"]:
        path.unlink()
    read, original = [], sources.load_index
    monkeypatch.setattr(sources, "load_index", lambda path: read.append(path) or original(path))
    found = Threads(4).run(lambda crew: open_data_set(str(folder), crew=crew).units)
    assert sorted(read) == sorted(map(str, folder.glob("*.tar")))
    assert found == [open_data_set(str(folder)).units] * 4


def bare_shards(folder):
    """Shards as img2dataset leaves them: no index, no dataset.json; statistics not yet."""
    folder = write_shards(folder, range(44))
    for path in [*folder.glob("*.index.json"), folder / "dataset.json"]:
        path.unlink()
    return folder


def with_statistics(folder, more=0):
    """What img2dataset writes beside each tar; `more` samples than there are."""
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            pictures = sum(name.endswith(".jpg") for name in tar.getnames())
        told = {"count": pictures + 5, "successes": pictures + more, "failed_to_download": 5, "failed_to_resize": 0}
        path.with_name(f"{path.stem}_stats.json").write_text(json.dumps(told))
    return folder


def test_what_was_counted_once_is_counted_by_the_first_line_of_its_index(tmp_path, monkeypatch):
    folder = bare_shards(tmp_path / "scenes")
    read, original = [], sources.load_index
    monkeypatch.setattr(sources, "load_index", lambda path: read.append(path) or original(path))
    first, tars = open_data_set(folder).units, sorted(map(str, folder.glob("*.tar")))
    assert sorted(read) == tars
    read.clear()
    assert open_data_set(folder).units == first and not read
    os.utime(tars[2], ns=(0, 0))  # who changed it, may have changed more
    assert open_data_set(folder).units == first and read == [tars[2]]


def test_shards_that_img2dataset_counted_are_not_read_at_the_start(tmp_path, asked, reader):
    folder = bare_shards(tmp_path / "scenes")
    plain = list(reader(folder).batches(0))
    shutil.rmtree(tmp_path / "cache")
    with_statistics(folder)
    asked.clear()
    asked.folder = folder
    begun = reader(folder)
    assert asked.of(".tar") == {"stat": (1, 6)}  # and never opened
    assert equal(list(begun.batches(0)), plain)
    # The indexes are cached by now; what the data are known by, which a run that continues compares, is the same.
    assert reader(folder).fingerprint == begun.fingerprint


def test_statistics_of_other_tars_are_refused_when_these_are_read(tmp_path):
    folder = with_statistics(bare_shards(tmp_path / "scenes"), more=1)
    data = open_data_set(folder)
    with pytest.raises(sources.ShardReplaced, match=r"has 8 samples, 9 says .*part-000_stats.json.*remove it"):
        data.open(data.units[0])
    for path in folder.glob("*.tar"):
        os.utime(path, ns=(2**62, 2**62))  # written since
    assert open_data_set(folder).samples == 44


@pytest.mark.parametrize(
    "told", ["", "[]", '{"successes": "8"}', '{"successes": 1e9}', '{"successes": 99999999}', "{}"]
)
def test_statistics_that_are_none_count_nothing(tmp_path, told):
    folder = bare_shards(tmp_path / "scenes")
    (folder / "part-000_stats.json").write_text(told)
    assert open_data_set(folder).samples == 44


@pytest.mark.loopback
def test_statistics_behind_a_url_spare_fetching_the_shards(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path / "cache"))
    folder = with_statistics(bare_shards(tmp_path / "scenes"))
    with Served(folder) as served:
        data = open_data_set(f"{served.url}/part-{{000..005}}.tar")
        assert data.samples == 44 and not [path for path in served.requests if path.endswith(".tar")]
        assert len(data.open(data.units[0])) == 8


def test_another_copy_on_one_machine_ends_all(tmp_path, monkeypatch):
    folder = many_shards(tmp_path / "data", 9, described=True)
    original = sources.shard_names
    here = threading.local()
    monkeypatch.setattr(sources, "shard_names", lambda name: original(name)[getattr(here, "lacks", 0) :])

    def attempt(crew):
        here.lacks = int(crew.number >= 8)  # the second machine
        try:
            open_data_set(str(folder), crew=crew)
        except ValueError as error:
            return str(error)

    (told,) = set(Threads(16).run(attempt))
    assert "not the same on all machines: process 0 sees 9 shards, process 8 8" in told


def test_a_shard_that_is_gone_ends_all_with_its_name(tmp_path):
    folder = many_shards(tmp_path / "data", 9, described=True)
    (folder / "00004.tar").unlink()

    def attempt(crew):
        with pytest.raises(FileNotFoundError, match="00004.tar, which is not there"):
            open_data_set(f"{folder}/{{00000..00008}}.tar", crew=crew)

    Threads(3).run(attempt)


def test_counts_of_a_local_dataset_json_are_those_of_the_shards(tmp_path):
    folder = write_shards(tmp_path / "scenes", range(44))
    expected = open_data_set(str(folder)).units
    bare = Path(shutil.copytree(folder, tmp_path / "copy" / "scenes"))
    (bare / "dataset.json").unlink()
    counted = open_data_set(str(bare)).units
    assert [(unit.samples, unit.identity) for unit in counted] == [(unit.samples, unit.identity) for unit in expected]
    # One that is of another length than it says is counted anew.
    path = bare / Path(expected[1].name).name
    shutil.copyfile(folder / "dataset.json", bare / "dataset.json")
    shutil.copyfile(expected[0].name, path)
    shutil.copyfile(index_path(expected[0].name), index_path(path))
    if path.stat().st_size != expected[1].identity.size:
        assert open_data_set(str(bare)).units[1].identity.digest == expected[0].identity.digest


def test_the_first_process_alone_looks_at_pairs(tmp_path, reader):
    folder = write_shards(tmp_path / "scenes", range(44))
    opened, original = collections.Counter(), TrainingReader.look
    job = Threads(2)

    def look(crew):
        data = reader(folder, crew=crew)
        for one in data.data_sets:
            one.open = lambda *given, open=one.open: opened.update([crew.number]) or open(*given)
        return original(data)

    first, second = job.run(look)
    assert first == second and opened.keys() == {0}
