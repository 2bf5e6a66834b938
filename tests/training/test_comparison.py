"""The comparison of methods: its runs, what follows from costs and search, the page, a stopped command."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from training import ablations
from training.ablations import AblationArguments, claim, main, make_plan, training_path
from training.emoji import comparison
from training.emoji.comparison import (
    by_tokens,
    cost_jobs,
    gathered_costs,
    rate_beyond,
    scheduled,
    search_jobs,
    steps_in_the_same_time,
    table_jobs,
)
from training.emoji.runs import Job, name_parts, read_results, result_path
from training.reports import comparison_page as page
from training.settings.pretraining import PretrainingArguments

CONFIGS = Path(ablations.__file__).parent / "configs"
METHODS = ["clip", "slip", "filip", "declip", "defilip", "pyramidclip"]
COMBINATIONS = ["pyramidclip_simclr", "pyramidclip_mlm", "pyramidclip_tokens"]
WAYS = ("image_to_text", "text_to_image")
SMALL = ["--train", "24", "--validation", "10", "--per-object", "1"]


@pytest.fixture
def config(tmp_path):
    """The shipped file with tiny towers, few steps and one round."""
    content = yaml.safe_load((CONFIGS / "comparison.yaml").read_text())
    base = yaml.safe_load((CONFIGS / "demo.yaml").read_text())
    base["model_config"] = {
        "projection_dim": 16,
        "vision_config": {"image_size": 32, "width": 4, "layers": [1, 1, 1, 1]},
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"},
    }
    base |= {"global_batch_size": 8, "dataloader_workers": 0, "save_every_steps": 2}
    vision = content["families"]["vit"]["settings"]["model_config"]["vision_config"]
    vision |= {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_attention_heads": 2}
    for table in ("methods", "combinations"):
        for row in content[table].values():
            names = row["extends"] if isinstance(row["extends"], list) else [row["extends"]]
            row["extends"] = [str(CONFIGS / name) for name in names]
    for family in content["families"].values():
        family["steps"] = 4
    content["base"] = "base.yaml"
    content["costs"] = {"rounds": 1, "warm": 1, "steps": 1, "pairs": 4}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "comparison.yaml"


@pytest.fixture
def args(config, tmp_path):
    return AblationArguments(
        output_dir=str(tmp_path / "out"),
        config=str(config),
        table=["comparison"],
        train=24,
        validation=10,
        per_object=1,
    )


@pytest.fixture(scope="module")
def plan():
    """The shipped one, with lengths that the tests know."""
    plan = make_plan(AblationArguments(table=["comparison"]))
    plan["families"]["resnet"] |= {"steps": 200, "search_steps": 100}
    return plan


def made_costs(plan, seconds=None):
    """Made up: a step of each row takes as long as told, else a second."""
    cost = {"rounds": [1.0], "megabytes": 100.0, "start_seconds": 10.0, "picture_milliseconds": 1.0,
            "text_milliseconds": 0.5, "pair_microseconds": 0.01}  # fmt: skip
    return {
        family: {row: {**cost, "seconds": (seconds or {}).get(row, 1.0)} for row in own["rows"]}
        for family, own in plan["families"].items()
    }


def made_result(family, row, run, seed, top, recall=0.2, **more):
    name, steps, rate = run.rsplit("_", 2)
    assert name == row
    return {
        "family": family, "row": row, "run": run, "seed": seed, "steps": int(steps), "learning_rate": float(rate),
        "zero_shot": {"top_1": top, "top_5": top},
        "retrieval": {"global_caption": {f"{way}_R@{k}": recall for way in WAYS for k in (1, 5, 10)}}, **more,
    }  # fmt: skip


def searched(plan, tops, families=("resnet", "vit")):
    """Results of a search: (family, row, rate) -> what `tops` makes of it."""
    return [
        made_result(job.family, training["row"], job.run, job.seed,
                    tops(job.family, training["row"], training["settings"]["learning_rate"]))
        for job, training in search_jobs(plan, [], families, METHODS).items()
    ]  # fmt: skip


def in_the_middle(family, row, rate):
    return 0.5 - abs(math.log2(rate / {"resnet": 1e-3, "vit": 2e-3}[family])) / 10


def test_the_shipped_rows_differ_by_their_recipes_alone(plan):
    assert plan["tables"] == {"methods": METHODS, "combinations": COMBINATIONS}
    named = {"loss_weights", "objective", "label_smoothing", "synonyms", "model_config"}
    crops = {"global_crop_area", "local_crop_area", "view_crop_area"}
    for family in plan["families"].values():
        rows = family["rows"]
        assert list(rows) == METHODS + COMBINATIONS
        for settings in rows.values():
            shared = {name: value for name, value in settings.items() if name not in named | crops}
            assert shared == {name: value for name, value in rows["clip"].items() if name not in named | crops}
            PretrainingArguments(**settings, max_steps=1, output_dir="x", train_data=["y"])
            vision = settings["model_config"]["vision_config"]
            assert vision.get("num_leff_layers", 0) == (3 if "ViT" in settings["model"] and "global_summary" in
                                                        settings["loss_weights"] else 0)  # fmt: skip
        assert [row for row, settings in rows.items() if by_tokens(settings)] == ["filip"]
        for row, further in zip(COMBINATIONS, ("views_simclr", "caption_mlm", "local_caption_tokens")):
            assert list(rows[row]["objective"]) == [further]
            assert {**rows[row], "objective": None} == {**rows["pyramidclip"], "objective": None}
        assert set(rows["defilip"]["objective"]) == {*rows["declip"]["objective"], "view1_caption_tokens"}
        assert rows["slip"]["objective"]["views_simclr"]["hidden"] == 1024


@pytest.mark.parametrize(
    ("steps", "reference", "own"), [(200, 1.0, 0.5), (200, 0.93, 1.31), (3, 1.0, 100.0), (7, 2, 2)]
)
def test_steps_in_the_same_time_take_that_time(steps, reference, own):
    found = steps_in_the_same_time(steps, reference, own)
    budget = steps * reference
    best = min(range(1, 3 * steps * math.ceil(reference / own) + 2), key=lambda count: abs(count * own - budget))
    assert found == best


def test_equal_time_follows_from_the_costs(plan):
    costs = made_costs(plan, {"clip": 0.4, "slip": 1.6, "pyramidclip": 0.8, "pyramidclip_mlm": 1.0})
    schedule = scheduled(plan, costs, searched(plan, in_the_middle))
    for family, own in plan["families"].items():
        runs = schedule["runs"][family]
        assert {place["steps"] for place in runs["samples"].values()} == {own["steps"]}
        assert runs["time"]["clip"]["steps"] == 2 * own["steps"]
        assert runs["time"]["slip"]["steps"] == own["steps"] // 2
        assert runs["time"]["pyramidclip_mlm"]["steps"] == round(0.8 * own["steps"])
        assert runs["time"]["pyramidclip"] == runs["samples"]["pyramidclip"]
        assert {place["rate"] for rows in runs.values() for place in rows.values()} == {own["rates"][1]}
    jobs = table_jobs(plan, schedule, ["resnet", "vit"], METHODS + COMBINATIONS)
    # Both budgets of each row but PyramidCLIP's, whose two are one run; methods in three seeds, combinations in one.
    assert len(jobs) == 2 * ((2 * 6 - 1) * 3 + 2 * 3)
    seeds = [job.seed for job in jobs]
    assert seeds == sorted(seeds) and {training["row"] for job, training in jobs.items() if job.seed == 0} == {
        *METHODS, *COMBINATIONS,
    }  # fmt: skip
    for job, training in jobs.items():
        assert training["settings"]["seed"] == job.seed and name_parts(job.name) == (job.family, job.run, job.seed)
        assert str(training["settings"]["max_steps"]) in job.run
    only = table_jobs(plan, schedule, ["vit"], ["clip"], [5])
    assert {(job.family, job.seed) for job in only} == {("vit", 5)} and len(only) == 2


def test_the_search_goes_beyond_the_end_of_its_grid_once():
    rates = [1.0, 2.0, 4.0]
    assert rate_beyond(rates, {1.0: 5, 2.0: 7, 4.0: 6}) is None
    assert rate_beyond(rates, {1.0: 5, 2.0: 6, 4.0: 7}) == 8.0
    assert rate_beyond(rates, {1.0: 8, 2.0: 6, 4.0: 7}) == 0.5
    assert rate_beyond(rates, {1.0: 8, 2.0: 6}) is None and rate_beyond([1.0], {1.0: 3}) is None


def test_the_search_goes_by_all_ranks():
    recall = {f"{way}_R@{k}": base + k / 100 for way, base in zip(WAYS, (0.1, 0.2)) for k in (1, 5, 10)}
    result = {"zero_shot": {"top_1": 0.4, "top_5": 0.6}, "retrieval": {"global_caption": recall}}
    by_hand = ((0.4 + 0.6) / 2 + (0.11 + 0.15 + 0.20) / 3 + (0.21 + 0.25 + 0.30) / 3) / 3
    assert page.criterion(result) == pytest.approx(100 * by_hand)


def test_each_method_gets_the_best_rate_of_its_search(plan):
    def tops(family, row, rate):
        wanted = {"clip": 4e-3, "slip": 0.5e-3}.get(row, 1e-3)
        return 0.5 - abs(math.log2(rate / wanted)) / 20

    results = searched(plan, tops, ["resnet"])
    first = search_jobs(plan, results, ["resnet"], METHODS)
    new = [job for job in first if job.run not in {result["run"] for result in results}]
    assert set(new) == {Job("resnet", "clip_100_0.004", 100), Job("resnet", "slip_100_0.00025", 100)}
    costs = made_costs(plan)
    assert set(METHODS) - set(scheduled(plan, costs, results)["runs"]["resnet"]["samples"]) == {"clip", "slip"}
    assert "clip" in scheduled(plan, costs, results, foreseen=True)["runs"]["resnet"]["samples"]
    for job in new:
        training = first[job]
        top = tops("resnet", training["row"], training["settings"]["learning_rate"])
        results.append(made_result("resnet", training["row"], job.run, job.seed, top))
    assert search_jobs(plan, results, ["resnet"], METHODS) == first  # and no further
    schedule = scheduled(plan, costs, results)
    rates = {row: place["rate"] for row, place in schedule["runs"]["resnet"]["samples"].items()}
    assert rates == {**dict.fromkeys(METHODS + COMBINATIONS, 1e-3), "clip": 4e-3, "slip": 0.5e-3}
    assert [row for row, search in schedule["searches"]["resnet"].items() if search["at_the_end"]] == ["clip"]
    diverged = {"family": "resnet", "row": "clip", "run": "clip_100_0.002", "seed": 100, "steps": 100,
                "learning_rate": 2e-3, "diverged": "no number"}  # fmt: skip
    others = [result for result in results if result["run"] != "clip_100_0.002"]
    assert scheduled(plan, costs, [*others, diverged])["searches"]["resnet"]["clip"]["tried"][2e-3] == 0


def test_costs_are_medians_over_all_rounds(plan):
    rounds = plan["costs"]["rounds"]
    results = []
    for job, training in cost_jobs(plan, ["resnet"]).items():
        assert training["settings"]["dataloader_workers"] == 0 and training["settings"]["seed"] == 0
        steps = [1.0 + job.seed, 2.0, 9.0]
        results.append({"family": "resnet", "row": training["row"], "run": job.run, "seed": job.seed,
                        "costs": {"steps": steps, "megabytes": 50.0 + job.seed, "load": 0.5 + job.seed}})  # fmt: skip
    gathered = gathered_costs(plan, results)
    assert list(gathered["families"]) == ["resnet"] and gathered["load"] == {"least": 0.5, "most": rounds - 0.5}
    every = [step for number in range(rounds) for step in (1.0 + number, 2.0, 9.0)]
    assert gathered["families"]["resnet"]["clip"]["seconds"] == statistics.median(every)
    assert gathered["families"]["resnet"]["clip"]["megabytes"] == 51.0
    assert gathered_costs(plan, results[:-1])["families"] == {}


def test_the_page_has_both_budgets_the_search_and_the_papers_table(plan, tmp_path):
    """ResNet, deviations by hand: CLIP 20, 22, 24; SLIP 30, 31, 32; PyramidCLIP 40, 41, 42; a combination 50."""
    costs = made_costs(plan, {"clip": 0.5, "pyramidclip_simclr": 1.25})
    results = searched(plan, in_the_middle)
    schedule = scheduled(plan, costs, results)
    runs = schedule["runs"]["resnet"]["samples"]
    tops = {"clip": (0.20, 0.22, 0.24), "slip": (0.30, 0.31, 0.32), "pyramidclip": (0.40, 0.41, 0.42),
            "pyramidclip_simclr": (0.50,)}  # fmt: skip
    results += [
        made_result("resnet", row, runs[row]["run"], seed, top)
        for row, values in tops.items()
        for seed, top in enumerate(values)
    ]
    tokens = {"zero_shot": {"top_1": 0.615}, "retrieval": results[-1]["retrieval"]}
    results[-1]["tokens"] = tokens
    compared = page.Compared("resnet", plan, results, schedule)
    pooled = math.sqrt((2 * 4 + 2 * 1 + 2 * 1) / 6)
    assert compared.deviation("zero_shot") == pytest.approx(pooled)
    assert compared.difference("samples", "clip", "slip", "zero_shot") == pytest.approx((9, pooled * math.sqrt(2 / 3)))
    assert compared.difference("time", "clip", "slip", "zero_shot") is None
    found = {(one.budget, one.before, one.after): one for one in page.directions(compared)}
    slip = found["samples", "clip", "slip"]  # better here, worse in Table 2
    assert slip.paper == pytest.approx(28.5 - 37.2) and slip.verdict == page.DISAGREES
    assert found["samples", "clip", "pyramidclip"].verdict == page.AGREES
    assert not any(one.before == "filip" for one in found.values())
    written = page.write_comparison(plan, costs, results, schedule, tmp_path).read_text(encoding="utf-8")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in (written, markdown):
        for words in ("22.0 ± 2.0", "31.0 ± 1.0", "by its tokens", "61.5", "1.25 x", "have nothing in common", "47.8",
                      "Equal time", "HiDeCLIP", "1 disagree"):  # fmt: skip
            assert words in text, words
    line = next(line for line in markdown.splitlines() if line.startswith("| PyramidCLIP + SimCLR") and "1.25" in line)
    assert f"+9.0 ± {pooled * math.sqrt(4 / 3):.1f}" in line
    assert "https://arxiv.org" in written and "<script" not in written
    page.write_comparison(plan, costs, [], scheduled(plan, costs, []), tmp_path)
    assert "No direction can be judged yet" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_table_2_is_in_the_papers_text():
    paper = Path(__file__).parents[3] / "shared/reference/paper.txt"
    if not paper.is_file():
        pytest.skip("the paper's text is not beside the checkout (../shared/reference/paper.txt)")
    part = paper.read_text(encoding="utf-8").partition("Fair Comparison against SoTA")[2][:600]
    numbers = [cell.strip(" †") for line in part.splitlines() for cell in line.split("|")]
    figures = [f"{value:.1f}" for family in page.TABLE_2.values() for value in family.values()]
    at = -1
    for figure in figures:  # in the paper's order
        at = numbers.index(figure, at + 1)


def test_a_folder_is_of_one_kind(args, capsys):
    plan = claim(args)
    assert claim(args) == plan and ablations.steps_of(plan) == [4]
    words = ["--output-dir", args.output_dir, *SMALL]
    assert main(words) == 2 and "holds the comparison: choose another --output-dir" in capsys.readouterr().err
    assert main([*words, "--table", "comparison", "front"]) == 2 and "give it alone" in capsys.readouterr().err
    assert main([*words, "--dry-run"]) == 2 and "--dry-run is for --table comparison" in capsys.readouterr().err
    config = ["--config", args.config, "--table", "comparison"]
    assert main([*words, *config, "--rows", "align"]) == 2 and "--rows: there is no align" in capsys.readouterr().err
    assert main([*words, *config, "--steps", "9"]) == 2 and "steps: 4, now 9" in capsys.readouterr().err
    assert AblationArguments(table=["comparison"]).folder == Path("runs/comparison")
    assert AblationArguments(table=["front"]).folder == AblationArguments().folder == Path("runs/ablations")


def run_in_this_process(args, jobs, after_each):
    """`run_jobs` without processes; the order of the names is kept."""
    for job in jobs:
        if not result_path(args.folder, job.name).is_file():
            RAN.append(job.name)
            assert ablations.run_here(args, job.name) == 0
            after_each()
    return []


RAN: list[str] = []


def test_all_stages_at_tiny_size(args, config, monkeypatch, capsys):
    """One family and one row, which is measured by its tokens; then again, and nothing is left to do."""
    RAN.clear()
    monkeypatch.setattr(ablations, "run_jobs", run_in_this_process)
    monkeypatch.setattr(ablations, "end_with_parent", lambda: None)
    content = yaml.safe_load(config.read_text())
    content["families"] = {"vit": {**content["families"]["vit"], "rates": [1e-3]}}
    content["methods"] = {row: content["methods"][row] for row in ("clip", "filip", "pyramidclip")}
    content["combinations"] = {}
    config.write_text(yaml.safe_dump(content))
    words = ["--output-dir", args.output_dir, "--config", str(config), "--table", "comparison", *SMALL]
    words += ["--parallel", "1"]
    assert main([*words, "--dry-run"]) == 0
    assert [f"vit-{row}_costs-seed0" for row in content["methods"]] == RAN
    assert "runs are left, about" in capsys.readouterr().out
    measured = json.loads((args.folder / "costs.json").read_text())["families"]["vit"]
    assert all(cost["seconds"] > 0 and cost["picture_milliseconds"] > 0 for cost in measured.values())
    assert [row for row, cost in measured.items() if "token_pair_microseconds" in cost] == ["filip"]
    same_time = max(1, round(4 * measured["pyramidclip"]["seconds"] / measured["filip"]["seconds"]))
    assert main([*words, "--rows", "filip", "--seeds", "0"]) == 0
    results = {(r["run"], r["seed"]): r for r in read_results(args.folder) if "costs" not in r}
    assert set(results) == {("filip_2_0.001", 100), ("filip_4_0.001", 0), (f"filip_{same_time}_0.001", 0)}
    found = results["filip_4_0.001", 0]
    assert set(found["retrieval"]) == {"global_caption"} and "scale" not in found and "tokens" not in found
    settings = json.loads(training_path(args.folder, "vit-filip_4_0.001-seed0").read_text())["settings"]
    assert (settings["max_steps"], settings["learning_rate"], settings["loss_weights"]) == (4, 0.001, {})
    ran = len(RAN)
    assert main([*words, "--rows", "filip", "--seeds", "0"]) == 0 and len(RAN) == ran
    assert "FILIP" in (args.folder / "report.html").read_text(encoding="utf-8")


def test_a_rate_at_which_the_loss_is_no_number_is_a_result_of_the_search(args, monkeypatch):
    def fails(settings):
        raise ablations.NonFiniteLoss("the loss is nan")

    monkeypatch.setattr(ablations.pretrain, "run", fails)
    settings = {**make_plan(args)["families"]["resnet"]["rows"]["clip"], "max_steps": 2, "learning_rate": 1.0}
    settings |= {"output_dir": str(args.folder), "train_data": ["x"]}
    found = ablations.train_and_score(args, settings, searches=True)
    assert found == {"steps": 2, "learning_rate": 1.0, "diverged": "the loss is nan"} and page.criterion(found) == 0
    with pytest.raises(ablations.NonFiniteLoss):
        ablations.train_and_score(args, settings, searches=False)


def without_times(folder, name):
    result = json.loads(result_path(folder, name).read_text())
    return {key: value for key, value in result.items() if key not in ("seconds", "costs")}


@pytest.mark.slow
def test_killed_and_continued_gives_the_same_numbers(config, tmp_path, checkout):
    """Killed in the middle of trainings, stopped, then continued; beside it without a stop, with the same costs."""

    def start(folder, *more):
        words = ["--config", str(config), "--output-dir", str(folder), "--data", str(tmp_path / "scenes"), *SMALL]
        words += ["--table", "comparison", "--seeds", "0", "--rows", "defilip", "pyramidclip_tokens"]
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        command = [sys.executable, "-m", "training.ablations", *words, *more]
        return subprocess.Popen(command, cwd=checkout, env=environment, stderr=subprocess.PIPE)

    content = yaml.safe_load(config.read_text())
    content["families"] = {"resnet": {**content["families"]["resnet"], "steps": 60, "rates": [1e-3]}}
    content["methods"] = {row: content["methods"][row] for row in ("clip", "defilip", "pyramidclip")}
    content["combinations"] = {"pyramidclip_tokens": content["combinations"]["pyramidclip_tokens"]}
    config.write_text(yaml.safe_dump(content))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, "--dry-run").wait(timeout=600) == 0
    shutil.copytree(whole, broken)
    for stop in (signal.SIGKILL, signal.SIGTERM):
        before = set(broken.glob("runs/*/checkpoints/*"))
        process = start(broken)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            if set(broken.glob("runs/*/checkpoints/*")) - before:
                break
            time.sleep(0.05)
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(stop)
        assert process.wait(timeout=130) == (-signal.SIGKILL if stop is signal.SIGKILL else 130)
        for path in broken.glob("runs/*/lock"):
            with ablations.locked(path, wait=True):
                pass
    assert start(whole).wait(timeout=900) == 0
    again = start(broken)
    assert again.wait(timeout=900) == 0, again.stderr.read().decode()
    names = sorted(path.stem for path in whole.glob("results/*.json"))
    assert names == sorted(path.stem for path in broken.glob("results/*.json"))
    assert all(without_times(whole, name) == without_times(broken, name) for name in names)
    with_tokens = {name for name in names if "tokens" in without_times(whole, name)}
    assert with_tokens and all("resnet-defilip_" in name and name.endswith("seed0") for name in with_tokens)
    logs = "".join(path.read_text(errors="replace") for path in broken.glob("runs/*/log.txt"))
    assert "continuing from" in logs


def test_names_of_the_page_are_those_of_the_plan(plan):
    assert {*METHODS, *COMBINATIONS} == set(page.TITLES) and page.REFERENCE in METHODS and page.PLAIN in METHODS
    assert comparison.run_name("clip", 100, 5e-5) == "clip_100_5e-05"
    assert name_parts("resnet-clip_100_5e-05-seed100") == ("resnet", "clip_100_5e-05", 100)
