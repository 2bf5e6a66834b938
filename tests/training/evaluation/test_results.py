"""Result files, read back by the library that they are written for."""

import csv
import json
import re

import pytest
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from training import evaluate, linear_probe
from training.evaluation.results import hub_identifier, make_place, read_json, results_table, write_csv, write_json


def results():
    shared = {"task_type": "image-text-retrieval", "dataset_type": "shards", "dataset_name": "scenes"}
    return [
        EvalResult(**shared, dataset_config="roi_tags", metric_type="text_to_image_R@1", metric_value=0.123456789),
        EvalResult(**shared, dataset_config="roi_tags", metric_type="text_to_image_mean_rank", metric_value=1.5),
        EvalResult(**shared, dataset_config="global_caption", metric_type="images", metric_value=500),
    ]


def test_json_is_a_model_index(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(results(), path, "my-model", {"seconds": 3})
    name, found = model_index_to_eval_results(json.loads(path.read_text())["model-index"])
    assert (name, found) == ("my-model", results())
    assert read_json(path) == ("my-model", results(), {"seconds": 3})
    card = ModelCardData(model_name="my-model", eval_results=found)  # and as the metadata of a model card
    assert ModelCard(f"---\n{card.to_yaml()}\n---\n").data.eval_results == results()


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("imagenet", "imagenet"), ("owner/my.set-2", "owner/my.set-2"), ("SUN397 (split a.txt)", "SUN397-split-a.txt"),
        ("a/b/c", "a-b-c"), ("my.org/x", "my-org/x"), ("", "local"), ("日本", "local"), ("/", "local"),
    ],
)  # fmt: skip
def test_the_hub_takes_the_name_of_a_data_set(title, expected):
    assert hub_identifier(title) == expected and re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", expected, re.ASCII)


def test_csv_keeps_every_digit(tmp_path):
    write_csv(results(), tmp_path / "results.csv")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["value"]) for row in rows] == [0.123456789, 1.5, 500]
    assert rows[0]["config"] == "roi_tags" and rows[0]["split"] == ""


def test_table_is_aligned():
    lines = results_table(results()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].endswith("12.35 %") and lines[2].endswith(" 1.50") and lines[3].endswith(" 500")
    assert "split" not in lines[0]


def test_other_json_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a result file"):
        read_json(tmp_path / "other.json")


def test_files_that_cannot_be_are_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    make_place(None, tmp_path / "new" / "r.json", tmp_path / "file")
    assert (tmp_path / "new").is_dir()
    for path in (tmp_path, tmp_path / "file" / "r.json"):
        with pytest.raises(OSError, match="folder|exists|directory"):
            make_place(path)


@pytest.mark.parametrize("module", [evaluate, linear_probe])
def test_commands_say_it_before_a_model_is_loaded(tmp_path, module, capsys):
    (tmp_path / "file").write_text("")
    there = str(tmp_path)
    data = ["--data", there] if module is evaluate else ["--train-data", there, "--test-data", there]
    assert module.main(["--model", "no-such-model", *data, "--output", str(tmp_path / "file" / "r.json")]) == 2
    assert "--output" in capsys.readouterr().err
