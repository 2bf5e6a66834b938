"""The worked-out needs of a recipe, against a measured case."""

import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from tests.training.processes import run_in_processes
from tests.write_tables import OUTPUT, with_outputs
from training.loop.objective import ContrastiveObjective
from training.scale import flops_per_pair, main, memory_per_gpu, most_pairs
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import read_settings

PAIRS = 64
SMALL = {
    "vision_config": {
        "image_size": 64,
        "patch_size": 8,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
    },
    "text_config": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "pooling": "eos"},
}


def recipe(**changes):
    given = {
        "model": "ViT-B-32",
        "model_config": SMALL,
        "max_steps": 1,
        "global_batch_size": PAIRS,
        "precision": "fp32",
    }
    return PretrainingArguments(**{**given, **changes})


def measured(rank, world_size, checkpointing):
    """What torch's allocator has given out and not got back after one forward pass whose graph is kept.

    Read off the allocator, as a process's memory also moves with its threads and its heap.
    """
    torch.manual_seed(0)
    model = PyramidCLIPModel(PyramidCLIPConfig.from_architecture("ViT-B-32", **SMALL))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    objective = ContrastiveObjective(model, model.config.loss_weights, 0.2)
    ids = torch.randint(1, 40000, (PAIRS, 24))
    ids[:, -1] = 49407
    batch = {
        "pixel_values": torch.randn(PAIRS, 3, 64, 64),
        "local_pixel_values": torch.randn(PAIRS, 3, 64, 64),
        "roi_features": torch.randn(PAIRS, 10, 2052),
        "roi_mask": torch.ones(PAIRS, 10, dtype=torch.bool),
        "input_ids": ids,
        "summary_input_ids": ids,
        "tag_input_ids": ids,
    }
    objective.embed({name: tensor[:2] for name, tensor in batch.items()})[
        "pairs"
    ].sum().backward()  # gradients, thread pools
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        embeddings = objective.embed(batch)["pairs"]
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages()), embeddings.shape[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_memory_is_what_a_forward_pass_keeps(checkpointing):
    predicted = memory_per_gpu(recipe(gradient_checkpointing=checkpointing), 1).activations
    grown = run_in_processes(measured, 1, checkpointing)[0][0]
    assert predicted == pytest.approx(grown, rel=0.15), f"{predicted / 1e6:.0f} MB predicted, {grown / 1e6:.0f} "
    "MB measured"


def test_weights_gradients_and_optimizer_are_counted():
    memory = memory_per_gpu(recipe(), 1)
    model = PyramidCLIPModel(PyramidCLIPConfig.from_architecture("ViT-B-32", **SMALL)).train()
    assert memory.weights == sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    assert memory.gradients == 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.optimizer == 2 * memory.gradients
    assert memory.loss > 2 * 4 * 6 * 512 * 2 * PAIRS


def test_a_chunk_needs_the_activations_of_a_chunk():
    whole, chunk = memory_per_gpu(recipe(), 1), memory_per_gpu(recipe(per_device_chunk_size=PAIRS // 4), 1)
    assert chunk.activations == pytest.approx(whole.activations / 4, rel=0.02)


def test_arithmetic_of_one_linear_tower_is_counted_by_hand():
    """A text-only comparison: with the vision tower fixed, more tokens add what their matrix products cost."""
    short, long = flops_per_pair(recipe(), tokens=16), flops_per_pair(recipe(), tokens=32)
    # 4 layers, 16 more tokens: attention and MLP projections; of the last layer only the keys and values of all tokens.
    linear = 3 * 2 * 16 * (4 * 192**2 + 8 * 192**2) + 2 * 16 * 2 * 192**2
    attention = 3 * 4 * (32**2 - 16**2) * 192 + 4 * (32 - 16) * 192  # scores and weighted sum
    assert long - short == pytest.approx(3 * 3 * (linear + attention), rel=0.01)  # three texts, three passes
    cached = flops_per_pair(recipe(per_device_chunk_size=8), tokens=16)
    assert cached == pytest.approx(short * 4 / 3)


PAGE = Path(__file__).resolve().parents[2].joinpath("docs", "scale.md").read_text(encoding="utf-8")


def blocks_of_the_page():
    return [found.group(0) for found in OUTPUT.finditer(PAGE)]


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=[pytest.mark.slow] if number else [])
        for number, block in enumerate(blocks_of_the_page())
    ],
    ids=lambda block: block.split()[5],
)
def test_the_page_has_what_the_command_prints(block):
    """`python -m tests.write_tables` writes it."""
    assert block == with_outputs(block) and "memory per GPU" in block and "558,592 steps" in block


def test_the_page_has_three_blocks():
    assert len(blocks_of_the_page()) == 3


def test_a_recipe_takes_as_long_as_one_gpu_was_seen_to_take():
    """The pairs a second of the table below the blocks, which a clock said."""
    cells = [cell.strip() for cell in PAGE.split("\n| pairs a second |")[1].splitlines()[0].split("|")[:3]]
    seen = dict(zip(("RN50", "ViT-B-32", "ViT-B-16"), map(int, cells), strict=True))
    for block in blocks_of_the_page():
        [(name, found)] = re.findall(r"\n(\S+) on .* ([0-9]+) pairs/s per GPU", block, re.DOTALL)
        assert int(found) == pytest.approx(seen[name], rel=0.01), name


@pytest.mark.parametrize(
    "words", ["--gpus 0", "--gpus 8 --samples 0", "--gpus 8 --tokens -1", "--gpus 8 --teraflops 0"]
)
def test_numbers_that_nothing_can_be_worked_out_for_are_refused(words, capsys):
    assert main(["--config", "training/configs/rn50_143m_32_epochs.yaml", *words.split()]) == 2
    assert f"error: {words.split()[-2].removeprefix('--')}: expected a number" in capsys.readouterr().err


def test_batches_that_do_not_divide_are_refused(capsys):
    assert main(["--config", "training/configs/rn50_143m_32_epochs.yaml", "--gpus", "63"]) == 2
    assert "63" in capsys.readouterr().err


def test_the_most_pairs_that_fit_do_and_one_more_does_not():
    shallow = {name: {**part, "num_hidden_layers": 1, "num_leff_layers": 1} for name, part in SMALL.items()}
    del shallow["text_config"]["num_leff_layers"]
    args = recipe(model_config=shallow)
    exact = memory_per_gpu(args, 1).total
    assert most_pairs(args, 1, exact) == PAIRS and most_pairs(args, 1, exact - 1) == PAIRS - 1
    assert most_pairs(args, 1, 1 << 20) == 0


@pytest.mark.slow
def test_the_methods_of_table_2_have_needs_of_their_own():
    """DeFILIP has all kinds: more memory and arithmetic than CLIP, and chunks need less than all at once."""
    path = Path(__file__).parents[2] / "training/configs"
    small = {"vision_config": SMALL["vision_config"] | {"num_leff_layers": 0}, "text_config": SMALL["text_config"]}
    clip, slip, method = (
        PretrainingArguments(
            **read_settings(PretrainingArguments, path / "vit_b_32_15m_32_epochs.yaml", path / f"{name}.yaml")
            | {"model_config": small, "global_batch_size": 512}
        )
        for name in ("clip", "slip", "defilip")
    )
    clips, slips, needs = (memory_per_gpu(one, 8) for one in (clip, slip, method))
    assert clips.total < slips.total < needs.total and clips.loss < slips.loss < needs.loss
    assert flops_per_pair(clip) < flops_per_pair(slip) < flops_per_pair(method)
    method.per_device_chunk_size = 8
    assert memory_per_gpu(method, 8).total < needs.total
