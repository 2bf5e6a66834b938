"""How the preparation commands run: killed and continued, on several processes, in parts."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pyramidclip_hf.files import contents_of
from tests.training.prepare.small_data import (
    counts,
    lxmert_row,
    make_language_model,
    make_vinvl,
    picture,
    problems,
    run_step,
    tree,
    write_jsonl,
    write_pictures,
    write_plain_shards,
    write_tar,
)
from training.data.shards import read_dataset_json
from training.prepare import detect, import_features, pack, summarize
from training.prepare.steps.work import Stage, Tally, Worker


def command(module, *flags, checkout, launch=()):
    """(arguments, environment) of one preparation command in a process of its own."""
    started = [sys.executable, *launch, "-m", f"training.prepare.{module}", *map(str, flags)]
    return started, {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}


def kill_after(reports, number, process):
    """SIGKILL for `process` and its group once `number` shards are done; says whether it was still at work."""
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(list(reports.glob("0*.json"))) >= number:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.002)
    return False


def run_killed(module, flags, reports, number, checkout):
    started, environment = command(module, *flags, checkout=checkout)
    process = subprocess.Popen(
        started, env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert kill_after(reports, number, process), "it finished before it could be killed: the test proves nothing"


def run_whole(module, flags, checkout, launch=()):
    started, environment = command(module, *flags, checkout=checkout, launch=launch)
    done = subprocess.run(started, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def table(tmp_path):
    """120 pairs of which some are bad: a key twice, a picture that breaks off, one that is missing."""
    data = write_pictures(tmp_path / "in", 120, (160, 120))
    rows = [{"image": f"{i}.jpg", "caption": f"caption {i}", "id": f"k{i % 110}"} for i in range(120)]
    (tmp_path / "in" / "7.jpg").write_bytes(data[7][:4000])
    (tmp_path / "in" / "60.jpg").unlink()
    return write_jsonl(tmp_path / "in" / "table.jsonl", rows)


def test_killed_packing_continues_to_the_same_bytes(tmp_path, table, checkout):
    flags = ["--input", table, "--samples_per_shard", 2, "--key_column", "id", "--device", "cpu"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_step(pack, [*map(str, flags), "--output_dir", str(whole)])
    run_killed("pack", [*flags, "--output_dir", cut], cut / "reports" / "pack", 5, checkout)
    assert read_dataset_json(cut)["unfinished"] == ["pack"] and len(list(cut.glob("*.tar"))) < 60
    run_step(pack, [*map(str, flags), "--output_dir", str(cut)])
    assert tree(cut) == tree(whole)
    assert {k: counts(whole, "pack")[k] for k in ("in", "out", "rejected")} == {"in": 120, "out": 108, "rejected": 12}
    assert {reason for _, _, reason, _ in problems(whole, "pack")} == {"duplicate-key", "bad-picture", "no-image"}


def test_killed_summarising_continues_to_the_same_bytes(tmp_path, checkout):
    """In place, with a model, an empty cache for the undisturbed run and the killed run's own for the continued one."""
    words = "a cat sits on the red sofa and looks out of the window at the birds".split()
    captions = [" ".join(words[i % 5 :] * (1 + i % 4)) + f" number {i // 2}" for i in range(24)]
    model = make_language_model(tmp_path / "t5", captions)
    for folder in ("whole", "cut"):
        for shard in range(12):
            rows = [
                (f"k{i}", {"jpg": picture(i, (8, 8)), "txt": captions[i].encode()}) for i in (2 * shard, 2 * shard + 1)
            ]
            write_tar(tmp_path / folder / f"{shard:05d}.tar", rows)
    flags = ["--model", model, "--num_beams", "2", "--max_new_tokens", "12", "--batch_size", "4", "--device", "cpu"]
    cut = [*flags, "--input_dir", str(tmp_path / "cut"), "--cache", str(tmp_path / "a.sqlite")]
    reports = tmp_path / "cut" / "reports" / "summary"
    run_killed("summarize", cut, reports, 3, checkout)
    assert len(list(reports.glob("0*.json"))) < 12
    run_step(summarize, cut)
    run_step(summarize, [*flags, "--input_dir", str(tmp_path / "whole"), "--cache", str(tmp_path / "b.sqlite")])
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")
    assert counts(tmp_path / "whole", "summary")["summaries"] == 24


def killed_and_whole(name, module, flags, tmp_path, checkout, into):
    """Runs one command in place on cut/, killed once and continued, and undisturbed on whole/, then compares."""
    reports = tmp_path / "cut" / "reports" / "regions"
    run_killed(name, [*flags, into, tmp_path / "cut"], reports, 5, checkout)
    assert not (tmp_path / "cut" / "reports" / "regions.json").exists()
    for folder in ("cut", "whole"):
        run_step(module, [*map(str, flags), into, str(tmp_path / folder)])
    assert tree(tmp_path / "cut") == tree(tmp_path / "whole")


def test_killed_detection_continues_to_the_same_bytes(tmp_path, checkout):
    for folder in ("cut", "whole"):
        write_plain_shards(tmp_path / folder, 40, 2, (64, 48))
    flags = ["--detector", make_vinvl(tmp_path / "vinvl"), "--batch_size", "2", "--device", "cpu"]
    killed_and_whole("detect", detect, flags, tmp_path, checkout, "--input_dir")
    assert counts(tmp_path / "whole", "regions")["in"] == 80


def test_killed_import_continues_to_the_same_bytes(tmp_path, checkout):
    for folder in ("cut", "whole"):
        write_plain_shards(tmp_path / folder, 80, 3, (100, 50))
    table = tmp_path / "lxmert.tsv"
    table.write_text("".join(f"{lxmert_row(f'k{i}', count=10, width=512, seed=i)}\n" for i in range(240)))
    for name, words in (("objects", "cat dog tree"), ("attributes", "red big")):
        (tmp_path / f"{name}.txt").write_text("".join(f"{word}\n" for word in words.split()))
    flags = ["--input", table, "--made_by", "a detector", "--device", "cpu"]
    flags += ["--objects", tmp_path / "objects.txt", "--attributes", tmp_path / "attributes.txt"]
    killed_and_whole("import_features", import_features, flags, tmp_path, checkout, "--merge_into")
    assert counts(tmp_path / "whole", "regions")["rows"] == 240


def test_parts_that_never_meet_give_what_one_process_gives(tmp_path, table):
    flags = ["--input", str(table), "--samples_per_shard", "7", "--key_column", "id", "--device", "cpu"]
    run_step(pack, [*flags, "--output_dir", str(tmp_path / "one")])
    for part in (2, 0, 1):
        total = run_step(
            pack, [*flags, "--output_dir", str(tmp_path / "three"), "--part_index", str(part), "--part_count", "3"]
        )
        assert (total is None) == (part != 1)
    assert tree(tmp_path / "three") == tree(tmp_path / "one")
    with pytest.raises(ValueError, match="part_index 3 of part_count 3"):
        run_step(pack, [*flags, "--output_dir", str(tmp_path / "x"), "--part_index", "3", "--part_count", "3"])


@pytest.mark.slow
def test_launched_processes_give_what_one_gives(tmp_path, table, checkout):
    """Started by torchrun, which is what `accelerate launch` starts processes with; on a CPU it starts one only."""
    flags = ["--input", table, "--samples_per_shard", 7, "--key_column", "id"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = run_whole("pack", [*flags, "--output_dir", tmp_path / "two"], checkout, launch)
    assert "120 in = 108 out + 12 rejected" in out and "pack (process 1 of 2)" in out and "shards=9/9" in out
    run_step(pack, [*map(str, flags), "--output_dir", str(tmp_path / "one")])
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_work_is_shared_without_gaps():
    items = [f"s{i}" for i in range(11)]
    shares = [Worker(index, 4).share(items) for index in range(4)]
    assert sorted(sum(shares, [])) == sorted(items) and max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sorted(Worker(2, 4).shared_after_own(items)) == sorted(items)
    assert Worker(2, 4).shared_after_own(items)[:3] == shares[2]


def test_a_report_counts_only_with_its_settings(tmp_path):
    stage = Stage(tmp_path, "s", {"a": 1})
    tally = Tally()
    tally.count("in")
    with pytest.raises(RuntimeError, match="1 in, but 0 out and 0 rejected: samples were lost"):
        stage.save("x", tally)
    tally.reject("path", "key", "reason", line=3)
    stage.save("x", tally)
    stage = Stage(tmp_path, "s", {"a": 1.5})  # nothing is lost with what took nothing
    tally.count("in")
    tally.count("out")
    stage.save("x", tally)
    assert stage.report("x")["problems"] == [
        {"what": "rejected", "path": "path", "line": 3, "key": "key", "reason": "reason"}
    ]
    assert Stage(tmp_path, "s", {"a": 2}, overwrite=True).report("x") is None
    with pytest.raises(ValueError, match="a: then 2, now 1"):
        Stage(tmp_path, "s", {"a": 1})


def test_what_killed_processes_left_goes_when_all_is_done(tmp_path):
    stage, reports = Stage(tmp_path, "s", {"a": 1}), tmp_path / "reports" / "s"
    (reports / "keys-0").mkdir()
    names = [".x.json.0f.partial", ".x.rejected.jsonl.0f.partial", "keys-0/.x.npy.0f.partial"]
    leftovers = [*(reports / name for name in names), tmp_path / ".x.tar.index.json.0f.partial"]
    for path in leftovers:
        path.touch()
    assert stage.finish(["x"]) is None and all(path.exists() for path in leftovers)
    stage.save("x", Tally())
    assert stage.finish(["x"]) is not None and not any(path.exists() for path in leftovers)


def test_what_a_folder_holds_is_counted_whole(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg", "plain", "other"):
        (tmp_path / name).touch()
    assert contents_of(tmp_path) == "it holds 3 *.jpg, 2 without an ending"
    for name in ("d.heic", "e.avif"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    told = contents_of(tmp_path)
    assert told.startswith("it holds 3 *.jpg, 2 without an ending, 1 ") and told.endswith(", 2 others")
