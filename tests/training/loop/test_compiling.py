"""Blocks that compile themselves: what they compute, and how often they are compiled."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.training.processes import run_in_processes
from tests.training.tiny import RESNET, TEXT, VIT, rows_of, tiny_batch, tiny_model
from training.loop.compiling import GRAPHS, begin_step, compile_blocks
from training.loop.gradient_cache import GradientCache
from training.loop.objective import ContrastiveObjective

DEEP = {**VIT, "num_hidden_layers": 6, "num_leff_layers": 3}
WAYS = ("whole", "cached", "checkpointed", "bf16", "replayed", "replayed, bf16")
# Under "max" half precision finds other maxima in another order of rounding, which says nothing of the blocks.
FORMS = [
    *((tower, "eos", way) for tower in (DEEP, RESNET) for way in WAYS),
    *((DEEP, "max", way) for way in WAYS if "bf16" not in way),
]


def step(way, tower, pooling, compiled, batches):
    """Losses and gradients of every batch, and how many graphs were compiled after each of them."""
    torch._dynamo.reset()
    graphs: list[int] = []

    def counting(graph, inputs, mode=None):
        graphs.append(mode)
        return graph.forward

    in_half = "bf16" in way
    dtype = torch.float32 if in_half else torch.float64
    model = tiny_model(tower, dtype=dtype, pooling=pooling, num_hidden_layers=4)
    if compiled:
        compile_blocks(model, graphs="replayed" in way, backend=counting, fullgraph=True)
    if way == "checkpointed":
        model.activation_checkpointing_enable()
    half = torch.bfloat16 if in_half else None
    objective = ContrastiveObjective(model, DEFAULT_LOSS_WEIGHTS, 0.2, autocast_dtype=half)
    wrapped = Accelerator(cpu=True).prepare(objective) if "processes" in way else objective
    results, counts = [], []
    for batch in batches:
        objective.zero_grad()
        if "replayed" in way:
            begin_step()
        batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
        if way == "cached":
            losses = GradientCache(Accelerator(cpu=True), objective, 6).forward_backward(batch)
        else:
            losses = wrapped(batch)
            losses.loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((losses.loss.item(), torch.cat(gradients).clone().numpy()))
        counts.append(len(graphs))
    if "replayed" in way:
        assert not compiled or set(graphs) == {GRAPHS}
        objective.eval()
        with torch.no_grad():
            objective(batch)  # no backward pass says when a graph's results may go
        assert not compiled or set(graphs[counts[-1] :]) == {None}
    return results, counts


def batches_of(tower, lengths):
    """Batches whose captions have the given numbers of tokens."""
    for seed, length in enumerate(lengths):
        batch = tiny_batch(image_size=tower["image_size"], seed=seed)
        batch["input_ids"] = batch["input_ids"][:, :length].clone()
        batch["input_ids"][:, -1] = TEXT["eos_token_id"]
        yield batch


def both_forms(rank, world_size, way, tower, pooling):
    batches = list(batches_of(tower, [7, 6]))
    return [step(way, tower, pooling, compiled, batches) for compiled in (False, True)]


def both_forms_of_rows(rank, world_size, way):
    batches = [rows_of(batch, rank, world_size) for batch in batches_of(DEEP, [7, 6])]
    return [step(way, DEEP, "eos", compiled, batches)[0] for compiled in (False, True)]


def counts_over(rank, world_size, way, lengths):
    return step(way, DEEP, "eos", True, batches_of(DEEP, lengths))[1]


@pytest.mark.slow
@pytest.mark.parametrize(("tower", "pooling", "way"), FORMS)
def test_compiled_blocks_compute_the_same_in_every_way_of_training(tower, pooling, way):
    (plain, _), (compiled, counts) = run_in_processes(both_forms, 1, way, tower, pooling, timeout=500)[0]
    assert counts[0] > 0
    for (loss, gradient), (wanted, expected) in zip(compiled, plain, strict=True):
        assert loss == pytest.approx(wanted, rel=1e-2 if "bf16" in way else 1e-9)
        cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
        assert cosine == pytest.approx(1, abs=1e-2 if "bf16" in way else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["processes", "processes, bf16"])
def test_two_processes_under_ddp_agree_on_what_plain_blocks_compute(way):
    found = run_in_processes(both_forms_of_rows, 2, way, timeout=500)
    gradients = []
    for plain, compiled in found:
        for (loss, gradient), (wanted, expected) in zip(compiled, plain, strict=True):
            assert loss == pytest.approx(wanted, rel=1e-2 if "bf16" in way else 1e-9)
            cosine = gradient @ expected / np.linalg.norm(gradient) / np.linalg.norm(expected)
            assert cosine == pytest.approx(1, abs=1e-2 if "bf16" in way else 1e-12)
        gradients.append(compiled[-1][1])
    assert np.array_equal(*gradients)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["whole", "bf16"])
def test_ten_batches_of_texts_of_other_lengths_compile_nothing_new(way):
    lengths = [7, 6, 5, 8, 4, 7, 3, 8, 5, 6]
    counts = run_in_processes(counts_over, 1, way, lengths, timeout=600)[0]
    # For 6 blocks of pictures, 3 of regions and 4 of texts: LeFF; pictures, regions, the last block of each; texts and
    # their last block; one more once torch has seen that regions are not as many as patches.
    assert counts[0] <= 8
    assert counts[-1] == counts[0], counts
