"""The ablations: rows become the right runs, verdicts are right, and killed runs continue to the same numbers."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from training import ablations
from training.ablations import AblationArguments, claim, jobs_of, main, make_plan
from training.emoji.runs import BLOCKS, Job, expand, result_path
from training.reports import ablations_page as page

CONFIGS = Path(ablations.__file__).parent / "configs"
BASE = {
    "model": "RN50",
    "model_config": {
        "projection_dim": 16,
        "vision_config": {"image_size": 32, "width": 4, "layers": [1, 1, 1, 1]},
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"},
    },
    "global_batch_size": 8,
    "learning_rate": 1e-3,
    "precision": "fp32",
    "dataloader_workers": 0,
    "log_every_steps": 2,
    "save_every_steps": 2,
}
VIT = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
FAMILIES = {
    "resnet": {"title": "ResNet", "steps": 6, "settings": {}},
    "vit": {
        "title": "ViT",
        "steps": 6,
        "settings": {"model": "ViT-B-32", "model_config": {"vision_config": {**VIT, "num_leff_layers": 2}}},
    },
}
SEEDS = {"components": [0, 1, 2], "peer_level": [0], "mismatched": [0], "front": [0]}
SMALL = ["--train", "24", "--validation", "10", "--per-object", "1"]


@pytest.fixture
def config(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "rows.yaml").write_text((CONFIGS / "ablations.yaml").read_text())
    runs = {"base": "base.yaml", "rows": "rows.yaml", "seeds": SEEDS, "families": FAMILIES}
    (tmp_path / "runs.yaml").write_text(yaml.safe_dump(runs))
    return tmp_path / "runs.yaml"


@pytest.fixture
def args(config, tmp_path):
    return AblationArguments(output_dir=str(tmp_path / "out"), config=str(config), train=24, validation=10)


def shipped():
    return make_plan(AblationArguments(config=str(CONFIGS / "ablations_runs.yaml")))


def test_the_shipped_plan_has_the_papers_rows_each_run_once():
    plan = shipped()
    jobs = jobs_of(plan, AblationArguments(config=str(CONFIGS / "ablations_runs.yaml")))
    # ResNet: 4 components in three seeds, 3 more rows of the peer level, 3 of the mismatched; the ViT has LeFF besides,
    # and 4 points of Figure 6 that are no row of another table.
    assert len(jobs) == len(set(jobs)) == (4 * 3 + 3 + 3) + (5 * 3 + 3 + 3 + 4)
    assert [job.seed for job in jobs] == sorted(job.seed for job in jobs)
    for family in plan["families"].values():
        rows = family["rows"]
        assert rows["peer_level"]["peer"] == rows["components"]["peer"]
        assert rows["mismatched"]["full"] == rows["components"]["leff"]
        for settings in family["runs"].values():
            assert math.isclose(sum(settings["loss_weights"].values()), 1)
        shared = [
            {name: value for name, value in settings.items() if name not in ("loss_weights", "label_smoothing")}
            for settings in family["runs"].values()
        ]
        for settings in shared:
            for name in BLOCKS:
                settings["model_config"]["vision_config"].pop(name, None)
        assert all(settings == shared[0] for settings in shared)
    resnet, vit = plan["families"]["resnet"], plan["families"]["vit"]
    assert resnet["rows"]["components"]["leff"] == "softened" and vit["rows"]["components"]["leff"] == "leff"


def test_leff_is_where_the_paper_has_it():
    plan = shipped()["families"]
    assert not any("num_leff_layers" in run["model_config"]["vision_config"] for run in plan["resnet"]["runs"].values())
    own = yaml.safe_load((CONFIGS / "ablations_runs.yaml").read_text())["families"]["vit"]["settings"]
    own = own["model_config"]["vision_config"]["num_leff_layers"]
    leff = {name: run["model_config"]["vision_config"]["num_leff_layers"] for name, run in plan["vit"]["runs"].items()}
    assert own == 3 and {name for name, number in leff.items() if number == own} == {
        "leff", "with_global_caption", "with_local_summary", "with_both",
    }  # fmt: skip
    assert set(leff.values()) == {0, 1, 2, own, 4}


def test_figure_6_has_the_same_share_of_fewer_blocks():
    plan = shipped()["families"]
    assert "front" not in plan["resnet"]["rows"]  # a ResNet has no such blocks
    rows, runs = plan["vit"]["rows"]["front"], plan["vit"]["runs"]
    assert (rows["m_0"], rows["m_9"]) == ("softened", "leff")
    visions = {row: runs[run]["model_config"]["vision_config"] for row, run in rows.items()}
    assert {row: vision["num_leff_layers"] for row, vision in visions.items()} == {
        "m_0": 0, "m_3": 1, "m_6": 2, "m_9": 3, "m_12": 4, "m_9_without_leff": 0,
    }  # fmt: skip
    assert {row for row, vision in visions.items() if "num_picture_layers" in vision} == {"m_9_without_leff"}
    assert visions["m_9_without_leff"]["num_picture_layers"] == 3


def test_rows_of_one_name_with_other_settings_are_two_runs():
    rows = {"a": {"x": {"label_smoothing": 0.0}, "y": {"label_smoothing": 0.1}}, "b": {"x": {"label_smoothing": 0.1}}}
    shared = {"model": "RN50", "model_config": {}}
    runs, table = expand({**rows, "c": {"x": {"label_smoothing": 0.2}}}, shared)
    assert table == {"a": {"x": "x", "y": "y"}, "b": {"x": "y"}, "c": {"x": "c_x"}}
    assert [run["label_smoothing"] for run in runs.values()] == [0.0, 0.1, 0.2]
    with pytest.raises(ValueError, match="must state num_leff_layers"):
        expand(rows, {"model": "ViT-B-32", "model_config": {"vision_config": {}}})


def test_filters(args, config):
    plan = make_plan(args)

    def names(**changes):
        return [job.name for job in jobs_of(plan, AblationArguments(config=str(config), **changes))]

    assert names(table=["peer_level"], families=["resnet"]) == [
        f"resnet-{row}-seed0" for row in ("clip", "clip_local_crop", "peer", "peer_and_regions")
    ]
    assert names(table=["mismatched"], families=["vit"], seeds=[4])[0] == "vit-leff-seed4"
    assert len(names(seeds=[0])) == 10 + 14  # of 3 blocks, m_9_without_leff has 2 in front, as has m_9
    with pytest.raises(
        ValueError, match="--table: there is no table5; known: components, peer_level, mismatched, front"
    ):
        names(table=["table5"])
    with pytest.raises(ValueError, match="--table: there is no front; known: components, peer_level, mismatched$"):
        names(table=["front"], families=["resnet"])
    assert names(rows=["softened", "leff"], families=["resnet"], seeds=[1]) == ["resnet-softened-seed1"]
    assert names(rows=["softened", "leff"], families=["vit"], seeds=[1]) == ["vit-softened-seed1", "vit-leff-seed1"]
    with pytest.raises(ValueError, match="--rows: there is no clip; known: peer, global_relation"):
        names(table=["components"], rows=["clip"])


def test_a_folder_keeps_its_settings(args, config, capsys):
    plan = claim(args)
    assert claim(args) == plan
    base = config.with_name("base.yaml")
    base.write_text(yaml.safe_dump({**BASE, "learning_rate": 5e-3}))
    with pytest.raises(
        ValueError, match=r"holds runs of other settings.*learning_rate: 0.001, now 0.005.*and \d+ more"
    ):
        claim(args)
    args.keep_settings = True
    assert claim(args) == plan
    args.steps = 7
    assert all(
        run["max_steps"] == 7 for family in make_plan(args)["families"].values() for run in family["runs"].values()
    )
    with pytest.raises(ValueError, match="has 6 steps, --steps asks for 7"):
        claim(args)
    args.scenes.mkdir()
    (args.scenes / "recipe.json").write_text(json.dumps({"train": 30, "validation": 10, "per_object": 3}))
    with pytest.raises(ValueError, match="--train 24: .*scenes was drawn with 30"):
        claim(args)
    args.train = None
    assert make_plan(args)["scenes"] == {"train": 30, "validation": 10, "per_object": 3}
    words = ["--config", str(config), "--output-dir", args.output_dir]
    assert main(words) == 2 and "other settings" in capsys.readouterr().err
    assert main([*words, "--parallel", "0"]) == 2 and "--parallel: expected at least 1" in capsys.readouterr().err
    base.write_text("model: ViT-B-32\n")
    words = ["--config", str(base), "--output-dir", args.output_dir]
    assert main(words) == 2 and "base.yaml has no base: expected a file as" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("claimed", "difference", "error", "expected"),
    [
        (page.GAIN, 2.1, 1.0, page.AGREES),
        (page.GAIN, 2.0, 1.0, page.NOISE),
        (page.GAIN, -2.1, 1.0, page.DISAGREES),
        (page.NO_GAIN, 2.1, 1.0, page.DISAGREES),
        (page.NO_GAIN, -2.1, 1.0, page.AGREES),
        (page.NO_GAIN, 0.0, 0.0, page.NOISE),
        (page.GAIN, 9.0, None, page.OPEN),
    ],
)
def test_verdicts(claimed, difference, error, expected):
    assert page.verdict(claimed, difference, error) == expected


def fake_result(job, zero_shot, image_to_text=0.2, text_to_image=0.1):
    pair = {f"image_to_text_R@{k}": image_to_text for k in (1, 5)} | {
        f"text_to_image_R@{k}": text_to_image for k in (1, 5)
    }
    return {
        "family": job.family, "run": job.run, "seed": job.seed, "steps": 6, "samples_seen": 48, "seconds": 4.8,
        "zero_shot": {"top_1": zero_shot, "top_5": zero_shot},
        "retrieval": {"global_caption": pair, "global_summary": pair},
    }  # fmt: skip


def test_differences_are_measured_against_the_seeds(args):
    """Deviations worked out by hand: rows {30, 32, 34} and {40, 41, 42} and {50} percent."""
    plan = make_plan(args)
    tops = {"peer": (0.30, 0.32, 0.34), "global_relation": (0.40, 0.41, 0.42), "clip": (0.31,)}
    results = [
        fake_result(Job("resnet", run, seed), value)
        for run, values in tops.items()
        for seed, value in enumerate(values)
    ]
    measured = page.Measured("resnet", plan["families"]["resnet"], results)
    assert measured.values("peer_level", "peer", "zero_shot") == pytest.approx([30, 32, 34])
    pooled = math.sqrt((2 * statistics.variance([30, 32, 34]) + 2 * statistics.variance([40, 41, 42])) / 4)
    assert measured.deviation("zero_shot") == pytest.approx(pooled) and pooled == pytest.approx(math.sqrt(2.5))
    steps = {step.title: step for step in page.steps_of(measured) if step.metric == "zero_shot"}
    first = steps["peer level \u2192 + global relation"]
    assert (first.ours, first.error) == pytest.approx((9, math.sqrt(2.5 * 2 / 3)))
    assert first.paper == pytest.approx(2.2) and first.verdict == page.AGREES
    second = steps["CLIP (global, caption) \u2192 peer level"]
    assert (second.ours, second.error) == pytest.approx((1, math.sqrt(2.5 * 4 / 3)))
    assert second.verdict == page.NOISE and len(steps) == 2
    one_seed = page.Measured("resnet", plan["families"]["resnet"], [r for r in results if r["seed"] == 0])
    assert {step.verdict for step in page.steps_of(one_seed)} == {page.OPEN}


def test_the_papers_numbers_are_in_its_text():
    """Each row of three figures stands in the paper's tables; those of Table 5 and 13 have the same rows."""
    paper = Path(__file__).parents[3] / "shared/reference/paper.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not beside the checkout (../shared/reference/paper.txt)")
    text = paper.read_text(encoding="utf-8")
    lines = [[cell.split("(")[0].strip() for cell in line.split("|")] for line in text.split("\n") if "|" in line]
    for family, tables in page.PAPER.items():
        for table, rows in tables.items():
            for name, figures in rows.items():
                if figures is None:  # a curve of Figure 6, without numbers
                    continue
                top, i2t, t2i = figures
                parts = [(top,), (i2t, t2i)] if table == "components" else [(top, i2t, t2i)]
                for part in parts:
                    sought = [str(number) for number in part]
                    width = range(len(sought))
                    found = any(
                        [line[at + k] for k in width] == sought
                        for line in lines
                        for at in range(len(line) - len(sought) + 1)
                    )
                    assert found, (family, table, name, sought)


def test_the_page_says_where_we_disagree(args, tmp_path):
    plan = make_plan(args)
    tops = {"peer": (0.5, 0.51, 0.52), "global_relation": (0.3, 0.31, 0.32), "local_relation": (0.4,)}
    results = [
        fake_result(Job("vit", run, seed), value) for run, values in tops.items() for seed, value in enumerate(values)
    ]
    written = page.write_page(plan, results, tmp_path).read_text(encoding="utf-8")
    line = "ViT, peer level \u2192 + global relation, zero-shot top-1: ours \u221220.0 ± 0.8, the paper +3.3 (gain)."
    assert line in written and line in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "51.0 ± 1.0" in written and "data:image/svg+xml" in written and "http://" not in written
    assert "ResNet</h3>" not in written and "Peer level</h2>" in written and "Mismatched" not in written
    page.write_page(plan, [], tmp_path)  # a folder without results has a page too
    assert "No step can be judged yet" in (tmp_path / "report.md").read_text(encoding="utf-8")


def start(config, folder, checkout):
    words = ["--config", str(config), "--output-dir", str(folder), "--data", str(folder.parent / "scenes"), *SMALL]
    words += ["--table", "components", "--families", "vit", "--seeds", "0", "--steps", "40"]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, "-m", "training.ablations", *words], cwd=checkout, env=environment, stderr=subprocess.PIPE
    )


def numbers(folder, job):
    """Everything of a result but times."""
    result = json.loads(result_path(folder, job).read_text())
    return {name: value for name, value in result.items() if name != "seconds"}


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_numbers(config, tmp_path, checkout):
    """Once without a stop; once killed with SIGKILL in the middle of two trainings, then stopped, then continued."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(config, whole, checkout).wait(timeout=400) == 0
    for stop in (signal.SIGKILL, signal.SIGTERM):
        before = set(broken.glob("runs/*/checkpoints/*"))
        process = start(config, broken, checkout)
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            if set(broken.glob("runs/*/checkpoints/*")) - before:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(stop)
        assert process.wait(timeout=130) == (-signal.SIGKILL if stop is signal.SIGKILL else 130)
        for path in broken.glob("runs/*/lock"):  # the trainings of a killed command save and end by themselves
            with ablations.locked(path, wait=True):
                pass
    again = start(config, broken, checkout)
    assert again.wait(timeout=400) == 0, again.stderr.read().decode()
    logs = "".join(path.read_text(errors="replace") for path in broken.glob("runs/*/log.txt"))
    assert "continuing from" in logs
    results = sorted(path.stem for path in whole.glob("results/*.json"))
    assert len(results) == 5 and results == sorted(path.stem for path in broken.glob("results/*.json"))
    for job in results:
        assert numbers(whole, job) == numbers(broken, job)
    assert not list(broken.glob("runs/*/checkpoints")) and (broken / "report.html").is_file()


def test_a_failed_run_does_not_stop_the_others(args, monkeypatch, capsys):
    """Processes that write a result, or fail, in place of trainings."""
    program = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True, parents=True)\n"
    program += "sys.exit('it broke') if 'relation' in p.name else p.write_text(sys.argv[2])"

    def start_run(args, job):
        folder = args.folder / "runs" / job.name
        folder.mkdir(parents=True)
        path = str(result_path(args.folder, job.name))
        with open(folder / "log.txt", "w") as log:
            return subprocess.Popen(
                [sys.executable, "-c", program, path, json.dumps(fake_result(job, 0.5))], stdout=log, stderr=log
            )

    monkeypatch.setattr(ablations, "start_run", start_run)
    monkeypatch.setattr(ablations, "prepare_scenes", lambda args, scenes: None)
    words = ["--config", args.config, "--output-dir", args.output_dir, *SMALL, "--seeds", "0", "--table", "components"]
    assert main([*words, "--families", "resnet"]) == ablations.EXIT_FAILED
    error = capsys.readouterr().err
    assert "it broke" in error and "resnet-global_relation-seed0, resnet-local_relation-seed0; the same" in error
    assert sorted(path.name for path in args.folder.glob("results/*.json")) == [
        "resnet-peer-seed0.json", "resnet-softened-seed0.json",
    ]  # fmt: skip
