"""`--engine ray` on a cluster of two workers on this machine: the bytes of the local engine, whoever is killed."""

import importlib
import io
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

ray = pytest.importorskip("ray", reason="--engine ray needs the extra ray (make test-ray)")

import psutil  # noqa: E402

import pyramidclip_command  # noqa: E402
from pyramidclip_command import Failure  # noqa: E402
from pyramidclip_hf import commands, ray_engine  # noqa: E402
from pyramidclip_hf.embedding_files import EmbeddingJob  # noqa: E402
from pyramidclip_hf.handing_out import Phase  # noqa: E402
from pyramidclip_hf.ray_engine import RayOptions, run_on_ray, versions  # noqa: E402
from tests.training.prepare.small_data import (  # noqa: E402
    counts,
    lxmert_row,
    make_language_model,
    make_vinvl,
    picture,
    run_step,
    tree,
    write_jsonl,
    write_pictures,
    write_plain_shards,
    write_tar,
)
from tests.training.to_evaluate import save_tiny_model  # noqa: E402
from training.prepare import detect, import_features, pack, select, summarize  # noqa: E402

WITH_RAY = ["--engine", "ray", "--ray-workers", "2"]


@pytest.fixture(scope="module")
def cluster():
    """Two cores for Ray, and this process connected to them; each command asks for two workers there."""
    if ray.is_initialized():
        ray.shutdown()
    os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    path = os.pathsep.join([str(ray_engine._CHECKOUT), os.environ.get("PYTHONPATH", "")])
    ray.init(
        address="local", num_cpus=2, num_gpus=0, object_store_memory=100 << 20, include_dashboard=False,
        logging_level="ERROR", log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": path}},
    )  # fmt: skip
    yield
    ray.shutdown()


def both(tmp_path, module, flags, into="--output-dir"):
    """Runs a command with each engine; returns where the results are."""
    folders = [tmp_path / "local", tmp_path / "ray"]
    for folder, engine in zip(folders, ([], WITH_RAY)):
        assert run_step(module, [*map(str, flags), into, str(folder), *engine]) is not None
    assert tree(folders[0]) == tree(folders[1])
    return folders[1]


def test_packing_with_repeated_keys(cluster, tmp_path):
    write_pictures(tmp_path / "in", 60, (40, 30))
    rows = [{"image": f"{i}.jpg", "caption": f"caption {i}", "id": f"k{i % 50}"} for i in range(60)]
    table = write_jsonl(tmp_path / "in" / "table.jsonl", rows)
    out = both(tmp_path, pack, ["--input", table, "--samples-per-shard", "7", "--key-column", "id"])
    assert counts(out, "pack")["out"] == 50


def test_summarising(cluster, tmp_path):
    captions = [f"a cat sits on the red sofa and looks out of the window at bird number {i}" for i in range(12)]
    model = make_language_model(tmp_path / "t5", captions)
    for shard in range(6):
        rows = [(f"k{i}", {"jpg": picture(i, (8, 8)), "txt": captions[i].encode()}) for i in (2 * shard, 2 * shard + 1)]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", rows)
    flags = ["--model", model, "--num-beams", "2", "--max-new-tokens", "8", "--batch-size", "4", "--device", "cpu"]
    flags += ["--cache", tmp_path / "summaries.sqlite", "--input-dir", tmp_path / "in"]
    # A cache of its own for each engine, so that both generate.
    for name, engine in (("local", []), ("ray", WITH_RAY)):
        own = [
            str(tmp_path / f"{name}.sqlite") if word == tmp_path / "summaries.sqlite" else str(word) for word in flags
        ]
        run_step(summarize, [*own, "--output-dir", str(tmp_path / name), *engine])
    assert tree(tmp_path / "local") == tree(tmp_path / "ray")
    assert counts(tmp_path / "ray", "summary")["summaries"] == 12


def test_detecting(cluster, tmp_path):
    write_plain_shards(tmp_path / "in", 6, 2, (64, 48))
    flags = ["--detector", make_vinvl(tmp_path / "vinvl"), "--batch-size", "2", "--device", "cpu"]
    out = both(tmp_path, detect, [*flags, "--input-dir", tmp_path / "in"])
    assert counts(out, "regions")["in"] == 12


def test_importing_into_a_store(cluster, tmp_path):
    (tmp_path / "lxmert.tsv").write_text("".join(f"{lxmert_row(f'k{i}', 10, 16, i)}\n" for i in range(30)))
    for name, words in (("objects", "cat dog tree"), ("attributes", "red big")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{word}\n" for word in words.split()))
    flags = ["--input", tmp_path / "lxmert.tsv", "--made-by", "a detector", "--rows-per-shard", "4"]
    flags += ["--objects", tmp_path / "objects.txt", "--attributes", tmp_path / "attributes.txt"]
    out = both(tmp_path, import_features, flags, "--store-dir")
    assert counts(out, "regions")["out"] == 30


def test_selecting_and_its_dry_run(cluster, tmp_path, capsys):
    for shard in range(6):
        rows = [(f"k{i}", {"jpg": picture(i % 20, (24, 20)), "txt": b"words"}) for i in range(shard * 5, shard * 5 + 5)]
        write_tar(tmp_path / "in" / f"{shard:05d}.tar", rows)
    rules = ["twins: {rule: repeats, of: picture, most: 1}", "some: {rule: sample, number: 12}"]
    (tmp_path / "rules.yaml").write_text("\n  ".join(["rules:", *rules]))
    flags = ["--input", tmp_path / "in", "--rules", tmp_path / "rules.yaml", "--samples-per-shard", "4"]
    out = both(tmp_path, select, flags)
    assert counts(out, "select")["out"] == 12
    capsys.readouterr()
    dry = [*map(str, flags), "--output-dir", str(tmp_path / "dry"), "--dry-run", *WITH_RAY]
    assert run_step(select, dry) is None
    assert "twins: takes 10, leaves 20" in capsys.readouterr().out and (tmp_path / "dry" / "selection.html").exists()


def test_selecting_by_a_model(cluster, tmp_path):
    pytest.importorskip("faiss", reason="near duplicates by a model need the extra search")
    model = save_tiny_model(tmp_path / "model")
    write_plain_shards(tmp_path / "in", 6, 5, (40, 30))
    fits = f"fits: {{rule: similarity, model: {model}, best: 20}}"
    alike = f"alike: {{rule: near_duplicates, model: {model}, cosine: 0.99}}"
    (tmp_path / "rules.yaml").write_text("\n  ".join(["rules:", fits, alike]))
    out = both(tmp_path, select, ["--input", tmp_path / "in", "--rules", tmp_path / "rules.yaml", "--device", "cpu"])
    assert counts(out, "select")["rejected_fits"] == 10


# Which library multiplies is measured once a job, and the last bits hang on it; two jobs are compared here.
ALIKE = """
import sys
import pyramidclip_command
from pyramidclip_hf.embedding_files import EmbeddingJob
real = EmbeddingJob.remembered
EmbeddingJob.remembered = lambda self, name, choose: real(self, name, lambda: "torch")
"""


@pytest.fixture
def same_library(monkeypatch):
    real = EmbeddingJob.remembered
    monkeypatch.setattr(EmbeddingJob, "remembered", lambda self, name, choose: real(self, name, lambda: "torch"))


@pytest.mark.parametrize("what", ["files", "shards", "list", "texts"])
def test_embedding(what, cluster, tmp_path, capsys, monkeypatch, same_library):
    pytest.importorskip("pyarrow", reason="Parquet needs pyarrow")
    model = save_tiny_model(tmp_path / "model")
    write_pictures(tmp_path / "in", 20, (40, 30))
    (tmp_path / "in" / "3.jpg").write_bytes(b"no picture")
    paths = sorted(str(path) for path in (tmp_path / "in").iterdir())
    members = {path: {"jpg": open(path, "rb").read(), "txt": b"text"} for path in paths}
    for shard in range(3):
        rows = [(f"k{n}", members[paths[n]]) for n in range(shard * 7, min(shard * 7 + 7, 20))]
        write_tar(tmp_path / "shards" / f"{shard:05d}.tar", rows)
    (tmp_path / "lines.txt").write_text("".join(f"text {n}\n" for n in range(20)))
    texts, skipped = ["--texts", str(tmp_path / "lines.txt")], what != "texts"
    sources = {"files": [str(tmp_path / "in")], "shards": [str(tmp_path / "shards")], "list": ["-"], "texts": texts}
    found = []
    for engine in ([], WITH_RAY):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{path}\n" for path in paths)))
        output = tmp_path / "embeddings.parquet"
        words = ["embed", *sources[what], "--output", str(output), "--model", str(model), "--part-size", "6"]
        code = pyramidclip_command.main([*words, "--batch-size", "4", "--device", "cpu", "--overwrite", *engine])
        err = capsys.readouterr().err
        assert code == (pyramidclip_command.EXIT_SKIPPED if skipped else 0), err
        assert not skipped or "1 of 20 were skipped" in err
        found.append(output.read_bytes())
    assert found[0] == found[1]


def test_a_shard_to_embed_that_no_worker_sees(cluster, tmp_path, capsys, monkeypatch):
    """It was there where the command began: gone since, as for machines that do not share the folder."""
    model = save_tiny_model(tmp_path / "model")
    shard = write_tar(tmp_path / "0.tar", [("k", {"jpg": picture(1, (40, 30))})])
    real = commands._embed_on_ray

    def gone(*arguments):
        shard.unlink()
        return real(*arguments)

    monkeypatch.setattr(commands, "_embed_on_ray", gone)
    words = ["embed", str(shard), "--output", str(tmp_path / "out.npz"), "--model", model, "--device", "cpu"]
    assert pyramidclip_command.main([*words, *WITH_RAY]) == pyramidclip_command.EXIT_FAILED
    assert f"0: no worker can see it ({platform.node()}): there is no {shard}. What is read" in capsys.readouterr().err


def test_bad_input_says_what_the_local_engine_says(cluster, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [{"picture": "0.jpg", "caption": "a cat"}])
    told = []
    for engine in ([], WITH_RAY):
        with pytest.raises(ValueError, match="image") as refused:
            run_step(pack, ["--input", tmp_path / "in.jsonl", "--output-dir", tmp_path / "out", *engine])
        told.append(str(refused.value))
    assert told[0] == told[1] and "Traceback" not in told[0]


def test_flags_of_one_engine_for_the_other(tmp_path):
    table = write_jsonl(tmp_path / "in.jsonl", [{"image": "0.jpg", "caption": "a cat"}])
    flags = ["--input", table, "--output-dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="--ray-address and --ray-workers are of --engine ray"):
        run_step(pack, [*flags, "--ray-workers", "2"])
    with pytest.raises(ValueError, match="--part-count is of --engine local"):
        run_step(pack, [*flags, "--engine", "ray", "--part-count", "2"])
    with pytest.raises(ValueError, match="ray_workers is 0, expected 1 or more"):
        run_step(pack, [*flags, "--engine", "ray", "--ray-workers", "0"])


def test_other_versions_and_folders_that_a_machine_does_not_see(cluster, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "versions", lambda: versions() | {"numpy": "1.0"})
        with pytest.raises(Failure, match=r"has other versions \(numpy: [\d.]+ there, 1\.0 here\)"):
            run_on_ray("training.prepare.pack:worker_job", None, RayOptions(workers=1, with_gpu=False))
    monkeypatch.setattr(os, "getcwd", lambda: str(tmp_path / "nowhere"))
    with pytest.raises(Failure, match="does not see .*nowhere: start the command in a folder that all machines share"):
        run_on_ray("training.prepare.pack:worker_job", None, RayOptions(workers=1, with_gpu=False))
    with pytest.raises(Failure, match="the Ray cluster has no GPU"):
        run_on_ray("training.prepare.pack:worker_job", None, RayOptions(workers=1, with_gpu=True))


def test_a_cluster_without_the_package(cluster, tmp_path, monkeypatch):
    """A class that the driver alone can import stands for it."""
    (tmp_path / "only_here.py").write_text("class Worker:\n    def prepare(self, *words):\n        return 'there'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(ray_engine, "Worker", importlib.import_module("only_here").Worker)
    with pytest.raises(Failure, match="cannot start a worker .*No module named 'only_here'.*must be installed there"):
        run_on_ray("training.prepare.pack:worker_job", None, RayOptions(workers=1, with_gpu=False))


def open_pieces(folder):
    """For the workers: pieces that a machine does not see, or over which every worker dies."""
    return Pieces(folder)


class Pieces:
    def __init__(self, folder):
        self.folder = folder

    def phases(self):
        names = {path.name: 1 for path in sorted(self.folder.glob("*.todo"))}
        yield Phase("pieces", names, lambda name: (self.folder / f"{name}.done").exists(), self.do)

    def do(self, name, advance):
        if name.startswith("unseen"):
            raise FileNotFoundError(f"no {name}")
        if name.startswith("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        (self.folder / f"{name}.done").touch()

    def finish(self):
        return len(list(self.folder.glob("*.done")))

    def told(self, result):
        return f"{result} done"


def test_pieces_that_nobody_sees_and_over_which_all_die(cluster, tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.todo").touch()
    target, options = f"{__name__}:open_pieces", RayOptions(workers=1, with_gpu=False)
    (tmp_path / "unseen.todo").touch()
    with pytest.raises(Failure, match="unseen.todo: no worker can see it .*no unseen.todo. What is read and written"):
        run_on_ray(target, tmp_path, options)
    (tmp_path / "unseen.todo").rename(tmp_path / "deadly.todo")
    with pytest.raises(Failure, match="deadly.todo: 4 workers died over it|worker after worker died"):
        run_on_ray(target, tmp_path, options)
    (tmp_path / "deadly.todo").unlink()
    assert run_on_ray(target, tmp_path, options) == (3, "3 done")


def test_no_cluster_at_an_address(tmp_path):
    if ray.is_initialized():
        ray.shutdown()
    with pytest.raises(Failure, match="no Ray cluster at 127.0.0.1:1: .*refused"):
        run_on_ray(f"{__name__}:open_pieces", tmp_path, RayOptions(address="127.0.0.1:1", workers=1, with_gpu=False))


def named(process):
    """How a process calls itself; "" where it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def kill_a_worker(command, parts, ends, tmp_path, checkout):
    """Runs a command as it is typed, on a cluster of its own; SIGKILL for one of its two workers at the fifth part."""
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(
            [sys.executable, *command, *WITH_RAY], cwd=checkout, stdout=log, stderr=log, start_new_session=True
        )
    deadline, at_work = time.monotonic() + 400, []
    while not (at_work and len(list(parts[0].glob(parts[1]))) >= 5):
        assert started.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.005)
        children = psutil.Process(started.pid).children(recursive=True)
        at_work = [one for one in children if "ray::Worker.do" in named(one)]
    at_work[0].kill()
    assert not ends.exists(), "it finished before: the test proves nothing"
    assert started.wait(400) == 0, (tmp_path / "log").read_text()[-3000:]
    assert "died; " in (tmp_path / "log").read_text()


def test_a_worker_killed_in_the_middle_leaves_the_same_bytes(tmp_path, checkout):
    write_pictures(tmp_path / "in", 240, (300, 200))
    table = write_jsonl(tmp_path / "in" / "table.jsonl", [{"image": f"{i}.jpg", "caption": f"{i}"} for i in range(240)])
    flags = ["--input", str(table), "--samples-per-shard", "3"]
    run_step(pack, [*flags, "--output-dir", str(tmp_path / "whole")])
    command = ["-m", "training.prepare.pack", *flags, "--output-dir", str(tmp_path / "cut")]
    reports = tmp_path / "cut" / "reports"
    kill_a_worker(command, (reports / "pack", "0*.json"), reports / "pack.json", tmp_path, checkout)
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_a_worker_killed_while_it_embeds_shards_leaves_the_same_bytes(tmp_path, checkout, same_library):
    model = save_tiny_model(tmp_path / "model")
    write_plain_shards(tmp_path / "in", 8, 40, (600, 400))
    words = ["embed", str(tmp_path / "in"), "--model", model, "--part-size", "5", "--device", "cpu", "--workers", "1"]
    assert pyramidclip_command.main([*words, "--output", str(tmp_path / "whole.parquet")]) == 0
    output = tmp_path / "cut.parquet"
    command = ["-c", f"{ALIKE}sys.exit(pyramidclip_command.main())", *words, "--output", str(output)]
    kill_a_worker(command, (tmp_path / "cut.parquet.parts", "part-*.npz"), output, tmp_path, checkout)
    assert output.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
