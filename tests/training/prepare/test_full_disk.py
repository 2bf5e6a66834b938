"""A disk that is full, wherever in a preparation command it is: one line that names the file, and the rest is kept."""

import errno
import re
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from tests.training.prepare.conftest import detr
from tests.training.prepare.small_data import (
    picture,
    tree,
    write_jsonl,
    write_pictures,
    write_shards,
    write_tar,
)
from training.emoji import scenes
from training.prepare import audit, detect, import_features, pack, summarize
from training.prepare.summarize import SummaryCache


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many kB at `folder`."""
    folder.mkdir(exist_ok=True)
    options = ["-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield
    finally:
        # Lazily: a database may still be open.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def plain(tmp_path):
    for number in range(2):
        samples = [(f"k{number}{i}", {"jpg": picture(i, (8, 8)), "txt": b"word " * 40}) for i in range(4)]
        write_tar(tmp_path / "plain" / f"{number}.tar", samples)
    return tmp_path / "plain"


def packing(tmp_path):
    write_pictures(tmp_path / "pictures", 12)
    rows = [{"image": f"pictures/{n}.jpg", "caption": f"picture {n}"} for n in range(12)]
    table = write_jsonl(tmp_path / "pairs.jsonl", rows)
    return pack, ["--input", table, "--output-dir", tmp_path / "disk/out"], range(4, 90, 6)


def auditing(tmp_path):
    shards = write_shards(tmp_path / "shards", range(16))
    return audit, [shards, "--output-dir", tmp_path / "disk/out", "--workers", 1], (12, 60, 400)


def summarizing(tmp_path):
    words = ["--input-dir", plain(tmp_path), "--output-dir", tmp_path / "disk/out", "--model", "first-clause"]
    return summarize, words, range(4, 90, 6)


def importing(tmp_path):
    """The index of a table of features is on the full disk."""
    (tmp_path / "predictions.tsv").write_text("".join(f'key-{n}\t{{"objects": []}}\n' for n in range(4000)))
    (tmp_path / "x.hw.tsv").write_text("".join(f'key-{n}\t[{{"height": 8, "width": 8}}]\n' for n in range(4000)))
    words = ["--input", tmp_path / "predictions.tsv", "--hw", tmp_path / "x.hw.tsv", "--made-by", "a detector"]
    return import_features, [*words, "--store-dir", tmp_path / "out", "--device", "cpu"], (4, 60, 120)


def detecting(tmp_path):
    words = [
        "--input-dir",
        plain(tmp_path),
        "--output-dir",
        tmp_path / "disk/out",
        "--detector",
        detr(tmp_path / "detector"),
    ]
    return detect, [*words, "--device", "cpu"], (4, 8, 16, 32, 64, 2000)


def drawing(tmp_path):
    words = ["--train", 5, "--validation", 3, "--per-object", 1, "--picture-size", 32, "--workers", 1]
    return scenes, ["--output-dir", tmp_path / "disk/out", *words], (4, 16, 40, 80, 2000)


def drawing_in_processes(tmp_path):
    module, words, _ = drawing(tmp_path)
    return module, [*words, "--workers", 2], (40, 2000)


def drawing_annotated(tmp_path):
    module, words, _ = drawing(tmp_path)
    return module, [*words, "--format", "coco"], (4, 12, 20, 2000)


def drawing_a_sheet(tmp_path):
    return scenes, ["--contact-sheet", tmp_path / "disk/sheet.png"], (4, 2000)


@pytest.mark.parametrize(
    "job",
    [
        packing,
        pytest.param(auditing, marks=pytest.mark.slow),
        summarizing,
        importing,
        detecting,
        drawing,
        pytest.param(drawing_in_processes, marks=pytest.mark.slow),
        drawing_annotated,
        drawing_a_sheet,
    ],
)
def test_a_full_disk_is_one_line_with_the_file(job, tmp_path, monkeypatch, capfd):
    module, words, sizes = job(tmp_path)
    cache = tmp_path / "disk" if job is importing else tmp_path
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(cache / "cache"))
    codes = []
    for size in sizes:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        capfd.readouterr()
        with small_disk(tmp_path / "disk", size):
            codes.append(module.main([*map(str, words)]))
            said = [
                line for line in capfd.readouterr().err.splitlines() if line and not re.match(r"[a-z ]+: +\d+%", line)
            ]
            if codes[-1]:
                assert codes[-1] == 1, said
                assert re.search(rf"{tmp_path}/disk/\S+[^/]* The disk is full\.$", said[-1]), said
                assert not any("Traceback" in line for line in said), said
                assert not [name for name in tree(tmp_path / "disk") if name.endswith(".partial")]
    assert codes[0] == 1 and (job is importing or codes[-1] == 0)


@pytest.mark.parametrize("kilobytes", [4, 12, 24])
def test_a_full_disk_below_the_database_of_summaries_names_it(tmp_path, kilobytes):
    with small_disk(tmp_path / "disk", kilobytes):
        with pytest.raises(OSError) as caught:
            SummaryCache(tmp_path / "disk/cache.sqlite").put([(bytes([n]), "word " * 999) for n in range(20)])
        assert caught.value.errno == errno.ENOSPC and caught.value.filename == f"{tmp_path}/disk/cache.sqlite"
