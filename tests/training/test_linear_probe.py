"""The linear probe against a plain solver, one picture at a time, and one process against two."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info

from tests.training.processes import run_in_processes
from tests.training.to_evaluate import COUNTS, write_pictures
from training.linear_probe import LinearProbeArguments, all_cores, c_of, fit, main, metric_of, probe, sweep
from training.transfer import features as kept


def value_of(results, metric):
    return next(result.metric_value for result in results if result.metric_type == metric)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_fit_minimises_the_penalised_loss(classes):
    """Against the objective written out here and minimised in fp64 by torch."""
    rng = np.random.default_rng(0)
    labels = np.arange(60) % classes
    features = (rng.normal(size=(60, 5)) + labels[:, None] * 0.5).astype(np.float32)
    c, rows = 0.7, torch.from_numpy(features).double()
    width = 1 if classes == 2 else classes  # two classes: one weight vector, as scikit-learn has it
    weight = torch.zeros(5, width, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(width, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def logits():
        found = rows @ weight + bias
        return torch.cat([torch.zeros_like(found), found], dim=1) if classes == 2 else found

    def loss():
        solver.zero_grad()
        data = torch.nn.functional.cross_entropy(logits(), torch.from_numpy(labels), reduction="sum")
        total = c * data + weight.square().sum() / 2
        total.backward()
        return total

    solver.step(loss)
    fitted = fit(features, labels, c)
    scores = torch.from_numpy(fitted.scores(features)).double()
    if classes == 2:  # (-d, d) for a log-odds of d
        scores = scores / 2
    assert (scores.softmax(1) - logits().detach().softmax(1)).abs().max() < 5e-3
    assert fitted.converged and 1 < fitted.iterations < 1000


def test_the_sweep_finds_the_peak_of_the_whole_grid():
    for peak in (0, 5, 31, 48, 63, 96):
        best, tried = sweep(lambda step, peak=peak: -abs(step - peak))
        assert best == peak and len(tried) <= 15
    assert sweep(lambda step: 0.5)[0] == 0  # among equals the strongest penalty
    assert [c_of(step) for step in (0, 48, 56, 96)] == pytest.approx([1e-6, 1, 10, 1e6])


def test_colours_are_told_apart_and_the_results_are_written(probe_args, tmp_path, capsys):
    probe_args.csv = str(tmp_path / "probe.csv")
    results = probe(probe_args)
    assert value_of(results, "top_1") == value_of(results, "mean_per_class") == 1.0
    assert "100.00 %" in capsys.readouterr().out and "top_1" in (tmp_path / "probe.csv").read_text()
    details = json.loads((tmp_path / "probe.json").read_text())["details"]
    assert details["pictures"] == {"train": 18, "validation": 6, "test": 24} and details["feature_size"] == 16
    scores = {row["c"]: row["top_1"] for row in details["sweep"]}
    assert details["c"] == min(c for c, score in scores.items() if score == max(scores.values()))
    probe_args.c, probe_args.validation_fraction, probe_args.features = 2.0, 0.0, "projected"
    assert value_of(probe(probe_args), "top_1") == 1.0
    assert json.loads((tmp_path / "probe.json").read_text())["details"]["sweep"] == []


def test_two_processes_give_what_one_gives(probe_args, tmp_path):
    def probed(rank, world_size, probe_args):
        results = probe(probe_args)
        return None if results is None else [(result.metric_type, result.metric_value) for result in results]

    probe_args.train_data = write_pictures(tmp_path / "train", COUNTS, seed=5, size=(9, 30))
    probe_args.max_iterations = 40
    outcomes = []
    for world_size in (1, 2):
        probe_args.cache_dir = str(tmp_path / f"cache-{world_size}")
        outcomes.append(run_in_processes(probed, world_size, probe_args))
        outcomes[-1].append(json.loads((tmp_path / "probe.json").read_text())["details"]["sweep"])
    (alone, swept), (first, second, swept_by_two) = outcomes
    assert alone == first and second is None and swept == swept_by_two
    kept = [sorted((tmp_path / f"cache-{n}").iterdir()) for n in (1, 2)]
    assert [path.name for path in kept[0]] == [path.name for path in kept[1]] and len(kept[0]) == 2
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(*kept))


def test_fitting_has_all_cores_of_a_launcher_s_single_thread(monkeypatch):
    def threads():
        return [pool["num_threads"] for pool in threadpool_info()]

    monkeypatch.setattr("training.linear_probe.os.sched_getaffinity", lambda process: range(3))
    before = threads()
    for processes, told, expected in ((1, "1", 0), (2, "4", 0), (2, "1", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", told)
        with all_cores(processes) as cores:
            assert cores == expected and (threads() == before if not cores else 3 in threads())
        assert threads() == before


def test_a_fit_that_did_not_converge_is_said(probe_args, tmp_path, capsys):
    probe_args.c, probe_args.max_iterations, probe_args.validation_fraction = 1e4, 2, 0.0
    probe(probe_args)
    assert "had not converged after 2 iterations" in capsys.readouterr().err
    assert json.loads((tmp_path / "probe.json").read_text())["details"]["converged"] is False


def test_features_that_hardly_differ_are_said_and_standardised_on_demand(probe_args, tmp_path, capsys, monkeypatch):
    original = kept.picture_features
    monkeypatch.setattr(kept, "picture_features", lambda *arguments: original(*arguments) * 1e-5 + 3)
    probe_args.cache_dir = "none"
    assert value_of(probe(probe_args), "top_1") == pytest.approx(1 / 3)
    assert "hardly differ" in capsys.readouterr().err
    probe_args.standardize = True
    assert value_of(probe(probe_args), "top_1") > 0.9
    assert "hardly differ" not in capsys.readouterr().err


def lay_out_pets_and_food(root, train, test):
    """Pictures of classes as Oxford-IIIT Pets, and the same as Food-101."""
    pets, food = root / "oxford-iiit-pet", root / "food-101"
    for folder in (pets / "annotations", pets / "images", food / "meta"):
        folder.mkdir(parents=True)
    classes = {name: number for number, name in enumerate(sorted(COUNTS), 1)}
    for split, of_food, folder in (("trainval", "train", train), ("test", "test", test)):
        lines, listed = [], {name: [] for name in COUNTS}
        for path in sorted(Path(folder).rglob("*.png")):
            kind, name = path.parent.name, f"{path.parent.name}_{split}{path.stem}"
            lines.append(f"{name} {classes[kind]} 1 1")
            listed[kind].append(f"{kind}/{name}")
            (food / "images" / kind).mkdir(parents=True, exist_ok=True)
            for copy in (pets / "images" / f"{name}.jpg", food / "images" / kind / f"{name}.jpg"):
                copy.write_bytes(path.read_bytes())
        (pets / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        (food / "meta" / f"{of_food}.json").write_text(json.dumps(listed))


def test_the_paper_s_data_sets(probe_args, tmp_path):
    lay_out_pets_and_food(tmp_path / "data", probe_args.train_data, probe_args.test_data)
    named = LinearProbeArguments(
        model=probe_args.model,
        train_data=str(tmp_path / "data"),
        dataset=["pets"],
        cpu=True,
        cache_dir=probe_args.cache_dir,
    )
    assert metric_of(named, "pets") == "mean_per_class" and metric_of(probe_args, None) == "top_1"
    found = probe(named)
    assert "Oxford-IIIT Pets (not the paper's split: found 24 in 3 classes" in found[0].dataset_name
    plain = LinearProbeArguments(
        model=probe_args.model, train_data=probe_args.train_data, test_data=probe_args.test_data, cpu=True,
        cache_dir=probe_args.cache_dir,
        metric="mean_per_class",
    )  # fmt: skip
    for metric in ("top_1", "mean_per_class"):
        assert value_of(found, metric) == pytest.approx(value_of(probe(plain), metric), abs=1e-6)


def test_several_data_sets_end_with_the_mean_of_the_metrics_they_are_known_by(probe_args, tmp_path, capsys):
    for number in range(4):  # what a classifier gets wrong, so that the two metrics differ
        (tmp_path / "test/blue" / f"{number:02d}.png").rename(tmp_path / "test/green" / f"1{number}.png")
    lay_out_pets_and_food(tmp_path / "data", probe_args.train_data, probe_args.test_data)
    changes = {"train_data": str(tmp_path / "data"), "test_data": None}
    several = dataclasses.replace(probe_args, **changes, dataset=["pets", "food101"])
    found = probe(several)
    assert "2 data sets" in capsys.readouterr().out
    told = json.loads((tmp_path / "probe.json").read_text())["details"]["data_sets"]
    assert {name: one["metric"] for name, one in told.items()} == {"pets": "mean_per_class", "food101": "top_1"}
    alone = []
    for name, metric in (("pets", "mean_per_class"), ("food101", "top_1")):
        one = probe(dataclasses.replace(several, dataset=[name]))
        assert json.loads((tmp_path / "probe.json").read_text())["details"]["c"] == told[name]["c"]
        of_it = [result.metric_value for result in found if result.dataset_name == one[0].dataset_name]
        assert of_it == [result.metric_value for result in one]
        alone.append(value_of(one, metric))
    assert alone[0] != alone[1]
    assert value_of(found, "mean_of_main_metrics") == pytest.approx(sum(alone) / 2)


def test_a_slow_type_is_said(probe_args, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    for dtype in ("float32", "bfloat16"):
        probe(dataclasses.replace(probe_args, dtype=dtype, c=1.0, validation_fraction=0.0))
    assert capsys.readouterr().err.count("--dtype bfloat16: this processor has no bfloat16 arithmetic") == 1


def test_what_is_wrong_is_said(probe_args, tmp_path, capsys, monkeypatch):
    words = ["--model", probe_args.model, "--train-data", probe_args.train_data, "--cpu", "--cache-dir", "none"]

    def error_of(*more):
        assert main([*words, *more]) == 2
        return capsys.readouterr().err

    assert "nothing to measure on: give test_data, or test_fraction" in error_of()
    assert "train is trained on: what is measured there says nothing" in error_of("--test-data", probe_args.train_data)
    both = "--test-data", probe_args.test_data, "--validation-data", probe_args.test_data
    assert "test is trained on: what is measured there says nothing" in error_of(*both)
    assert "sweeping C needs validation data" in error_of("--test-fraction", "0.2", "--validation-fraction", "0")
    assert "c: expected a positive number" in error_of("--test-fraction", "0.2", "--c", "-1")
    other = write_pictures(tmp_path / "other", {"blue": 2, "green": 2})
    assert "not in it: ['dark red']" in error_of("--test-data", other)
    assert "no such file or folder" in error_of("--test-data", str(tmp_path / "nowhere"))
    told = error_of("--test-fraction", "0.2", "--max-image-pixels", "99")
    assert "24 of 24 pictures cannot be read: " in told and "more than max_image_pixels=99" in told
    assert "max_image_pixels: expected a number of at least 1" in error_of("--max-image-pixels", "0")
    assert "dataset: expected one of cifar10, " in error_of("--dataset", "mnist")
    assert "pets has its own test part: leave out" in error_of("--dataset", "pets", "--test-fraction", "0.2")
    assert "classes is for one data set" in error_of("--dataset", "pets", "cars", "--classes", "names")
    assert "dataset names pets more than once" in error_of("--dataset", "pets", "pets")
    assert "--device cuda:0 and --cpu contradict" in error_of("--test-fraction", "0.2", "--device", "cuda:0")
    assert "lacks Oxford-IIIT Pets" in error_of("--dataset", "pets")
    (tmp_path / "test" / "green" / "03.png").write_bytes(b"no picture")
    (tmp_path / "test" / "blue" / "01.png").write_bytes(b"no picture")
    told = error_of("--test-data", probe_args.test_data)
    assert "2 of 24 pictures cannot be read: " in told and "03.png cannot be read" in told
    assert "features of train" not in told  # the data to measure on comes first
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    assert 'pip install -e ".[eval]"' in error_of("--test-fraction", "0.2")
