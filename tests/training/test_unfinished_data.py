"""Data that a step of preparation left half done: each command refuses it, and names a flag only where it has one."""

import json

import pytest

from tests.training.prepare.small_data import write_shards
from training import evaluate, figures, finetune, linear_probe
from training.data.shards import read_dataset_json
from training.data.sources import open_data_set


@pytest.mark.parametrize(
    ("command", "words", "advice"),
    [
        (linear_probe, "--train-data DATA --test-fraction 0.5 --cpu", "where it was"),
        (finetune, "--train-data DATA --test-fraction 0.5 --precision fp32 --output-dir RUN", "where it was"),
        (figures, "tsne --data DATA --output PNG", "set --allow-unfinished"),
        (figures, "retrieval --data DATA --output PNG", "set --allow-unfinished"),
        (figures, "check --data DATA", "set --allow-unfinished"),
        (evaluate, "--data DATA", "set --allow-unfinished"),
    ],
)
def test_unfinished_data_is_refused_by_commands_with_the_flag_that_they_have(
    command, words, advice, tmp_path, tiny_model_folder, capsys, monkeypatch
):
    folder = write_shards(tmp_path / "scenes", range(8))
    (folder / "dataset.json").write_text(json.dumps(read_dataset_json(folder) | {"unfinished": ["regions"]}))
    model = ["--models" if "retrieval" in words else "--model", tiny_model_folder]
    places = {"DATA": str(folder), "RUN": str(tmp_path / "run"), "PNG": str(tmp_path / "x.png")}
    given = [places.get(word, word) for word in words.split()]
    assert command.main([*given, *model]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "scenes: regions has begun and not ended" in said and said.endswith(advice)
    if "allow" in advice:

        def opened(*given, **options):
            found = open_data_set(*given, **options)
            raise ValueError(f"{found.samples} samples were opened")

        monkeypatch.setattr("training.data.samples.open_data_set", opened)
        assert command.main([*given, *model, "--allow-unfinished"]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == "error: 8 samples were opened"
