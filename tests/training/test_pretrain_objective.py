"""Whole runs with terms of other kinds: what is kept, bit-equal continuing with a queue that wraps, and refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from tests.training.processes import run_in_processes
from tests.training.runs import (
    MemoryReader,
    assert_equal_runs,
    expect_killed,
    logged,
    resumable_settings,
    run_settings,
    settings,
    use_memory,
)
from tests.training.tiny import tiny_run_batch
from training import pretrain
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import read_metrics

# Eight pairs a step and two texts of each: the queue wraps in the second step, in the middle of its batch.
OBJECTIVE = {
    "views_simclr": {"weight": 0.5, "hidden": 6, "out": 4},
    "views_simsiam": {"weight": 0.2, "width": 6, "bottleneck": 4},
    "views_nn": {"weight": 0.2, "size": 23},
    "caption_mlm": 0.2,
    "global_caption_tokens": {"weight": 0.2, "width": 5},
    "view1_caption": 0.1,
}
KEPT = ("moving_average", "heads", "views_nn_queue")


class RunReader(MemoryReader):
    """With the inputs that all kinds of terms read."""

    def __init__(self, args, samples=40):
        super().__init__(args, samples)
        self.data = tiny_run_batch(samples, dtype=torch.float32)


@pytest.fixture(autouse=True)
def made_up_data(monkeypatch):
    use_memory(monkeypatch, RunReader)


def arguments(folder, **changes):
    return resumable_settings(folder, objective=OBJECTIVE, **changes)


@pytest.mark.parametrize(("world_size", "chunk"), [(1, None), (2, 2)])
def test_a_killed_run_continues_bit_for_bit_with_its_heads_and_its_queue(tmp_path, world_size, chunk):
    undisturbed, disturbed = tmp_path / "a", tmp_path / "b"
    run_in_processes(run_settings, world_size, arguments(undisturbed, per_device_chunk_size=chunk))
    for step in (3, 5, 6, 8):
        last = list_checkpoints(disturbed)
        given = arguments(disturbed, per_device_chunk_size=chunk, resume="latest" if last else None)
        expect_killed(given, world_size, step, "step")
    run_in_processes(run_settings, world_size, arguments(disturbed, per_device_chunk_size=chunk, resume="latest"))
    assert_equal_runs(undisturbed, disturbed, KEPT)
    queue = load_file(list_checkpoints(undisturbed)[-1] / "views_nn_queue.safetensors")
    assert (int(queue["filled"]), int(queue["pointer"])) == (23, 9 * 16 % 23)


def test_what_a_run_leaves(tmp_path, caplog):
    args = settings(tmp_path, objective=OBJECTIVE, loss_weights={"global_caption": 1.0}, label_smoothing=0.0)
    pretrain.run(args)
    metrics = [line for line in read_metrics(tmp_path / "metrics.jsonl") if "loss/total" in line][-1]
    for name, value in {"views_simclr": 15, "views_nn": 8, "caption_mlm": 40, "global_caption_tokens": 8}.items():
        assert metrics[f"chance/{name}"] == pytest.approx(torch.tensor(float(value)).log().item())
    assert "chance/views_simsiam" not in metrics and "empty_steps/views_simsiam" not in metrics
    weights = {**{name: one if isinstance(one, float) else one["weight"] for name, one in OBJECTIVE.items()}}
    total = metrics["loss/global_caption"] + sum(weight * metrics[f"loss/{name}"] for name, weight in weights.items())
    assert metrics["loss/total"] == pytest.approx(total, rel=1e-5)
    identity = json.loads((list_checkpoints(tmp_path)[-1] / "run.json").read_text())["identity"]
    assert identity["objective"]["further"]["views_nn"] == {
        "weight": 0.2, "size": 23, "images": ["view1", "view2"], "texts": ["caption", "caption_aug"],
    }  # fmt: skip
    model = PyramidCLIPModel.from_pretrained(tmp_path / "final")
    assert model.config.further_loss_terms == sorted(OBJECTIVE)
    batch = {
        name: value
        for name, value in tiny_run_batch(dtype=torch.float32).items()
        if name in ("pixel_values", "input_ids")
    }
    assert set(model(**batch, return_loss=True).loss_terms) == {"global_caption"}


def test_the_first_step_of_a_queue_is_empty_and_said_so(tmp_path):
    args = settings(tmp_path, objective={"views_nn": {"size": 16}}, log_every_steps=1, max_steps=2)
    pretrain.run(args)
    assert logged(tmp_path, "empty_steps/views_nn") == [1]
    assert logged(tmp_path, "loss/views_nn")[0] == 0 < logged(tmp_path, "loss/views_nn")[1]


def test_a_model_without_a_term_of_its_own_says_so(tmp_path):
    args = settings(tmp_path, loss_weights={}, objective={"global_caption_tokens": {"width": 5}}, max_steps=1)
    pretrain.run(args)
    model = PyramidCLIPModel.from_pretrained(tmp_path / "final")
    assert model.config.loss_weights == {}
    batch = tiny_run_batch(dtype=torch.float32)
    with pytest.raises(ValueError, match="this model was trained with global_caption_tokens, which need heads"):
        model(pixel_values=batch["pixel_values"], input_ids=batch["input_ids"], return_loss=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": {"views_nn": {"size": 15}}}, "a queue of 15 texts has no room for .* 2 x 8 = 16"),
        (
            {"loss_weights": {}, "objective": {"views_simclr": 1.0}, "validation_data": "somewhere"},
            "no term of objective .views_simclr. brings pictures and texts together",
        ),
        ({"objective": {"views": 1}}, "objective: expected terms such as"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.run(settings(tmp_path, **changes))


def test_a_batch_without_the_inputs_of_a_kind_names_them(tmp_path, monkeypatch):
    use_memory(monkeypatch, MemoryReader)
    with pytest.raises(RuntimeError, match=r"these terms need inputs .*'views_simclr': \['view1_pixel"):
        pretrain.run(settings(tmp_path, objective={"views_simclr": 1.0}))
