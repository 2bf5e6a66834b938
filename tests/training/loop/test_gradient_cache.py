"""Gradient caching against the whole batch at once, in fp64."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from pyramidclip_hf.loss_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.training.processes import run_in_processes
from tests.training.tiny import RESNET, VIT, rows_of, tiny_batch, tiny_model
from training.loop.gradient_cache import GradientCache, RandomState
from training.loop.objective import ContrastiveObjective

NO_BATCH_NORM = {**VIT, "num_leff_layers": 0}


def objective_of(tower, pooling, weights):
    """Its BatchNorms use running statistics: those of a batch are not those of a chunk."""
    return ContrastiveObjective(tiny_model(tower, pooling=pooling), weights, 0.2).train(tower == NO_BATCH_NORM)


def whole_batch(tower, pooling, weights):
    """Gradients of one process with everything at once: what caching must reproduce."""
    objective = objective_of(tower, pooling, weights)
    losses = objective(tiny_batch(image_size=tower["image_size"]))
    losses.loss.backward()
    named = objective.model.named_parameters()
    return losses.shares.numpy(), {name: p.grad.numpy() for name, p in named if p.grad is not None}


def cached(rank, world_size, tower, pooling, weights, chunk_size):
    accelerator = Accelerator(
        cpu=True, mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    objective = objective_of(tower, pooling, weights)
    wrapped = accelerator.prepare(objective)
    assert (wrapped is objective) == (world_size == 1)
    cache = GradientCache(accelerator, wrapped, chunk_size)
    for _ in range(2):  # twice: DDP only notices a parameter without gradient at the next forward
        objective.zero_grad()
        losses = cache.forward_backward(rows_of(tiny_batch(image_size=tower["image_size"]), rank, world_size))
    return (
        losses.shares.numpy(),
        {n: p.grad.numpy().copy() for n, p in objective.model.named_parameters() if p.grad is not None},
    )


CASES = ((DEFAULT_LOSS_WEIGHTS, 3), ({"roi_tags": 1.0}, 2), ({"global_caption": 0.5, "local_summary": 2.0}, 6))


def cached_cases(rank, world_size, tower, pooling):
    return [cached(rank, world_size, tower, pooling, weights, chunk_size) for weights, chunk_size in CASES]


@pytest.mark.parametrize(
    ("world_size", "tower", "pooling"),
    [
        (1, NO_BATCH_NORM, "eos"),
        (2, NO_BATCH_NORM, "eos"),
        (2, NO_BATCH_NORM, "max"),
        (1, VIT, "max"),
        (2, RESNET, "eos"),
    ],
)
def test_gradients_equal_the_whole_batch(world_size, tower, pooling):
    if world_size == 1:
        results = [cached_cases(0, 1, tower, pooling)]
    else:
        results = run_in_processes(cached_cases, world_size, tower, pooling)
    expected = [whole_batch(tower, pooling, weights) for weights, _ in CASES]
    for case, (losses, gradients) in enumerate(expected):
        np.testing.assert_allclose(sum(result[case][0] for result in results), losses, rtol=1e-12)
        floor = 1e-4 * max(np.linalg.norm(gradient) for gradient in gradients.values())
        for result in results:
            assert set(result[case][1]) == set(gradients)
            for name, gradient in result[case][1].items():
                scale = max(np.linalg.norm(gradients[name]), floor)
                assert np.linalg.norm(gradient - gradients[name]) / scale < 1e-10, name
            assert gradients["logit_scale"] != 0


def test_pairs_that_share_a_text_are_the_same_with_and_without_caching():
    batch = tiny_batch()
    batch["input_ids"][7] = batch["input_ids"][1]
    objectives = [
        ContrastiveObjective(tiny_model(NO_BATCH_NORM), {"global_caption": 1.0}, 0.2, multi_positive=shared)
        for shared in (True, True, False)
    ]
    whole = objectives[0](batch)
    whole.loss.backward()
    caching = GradientCache(Accelerator(cpu=True, mixed_precision="no"), objectives[1], 3)
    np.testing.assert_allclose(caching.forward_backward(batch).shares, whole.shares, rtol=1e-12)
    scale, cached_scale = (objective.model.logit_scale.grad for objective in objectives[:2])
    torch.testing.assert_close(cached_scale, scale, rtol=1e-10, atol=0)
    assert (objectives[2](batch).loss - whole.loss).abs() > 1e-4


def test_random_numbers_are_replayed():
    """With dropout, the loss that is reported belongs to the graph that is differentiated."""

    def step(dropout):
        objective = ContrastiveObjective(
            tiny_model(NO_BATCH_NORM, attention_dropout=dropout), {"global_caption": 1}, 0.2
        )
        drawn = []
        original = objective.embed

        def recording(batch):
            embeds = original(batch)
            drawn.append(embeds["pairs"][:, objective.levels.index("caption")].detach().clone())
            return embeds

        objective.embed = recording
        torch.manual_seed(3)
        GradientCache(Accelerator(cpu=True, mixed_precision="no"), objective, 3).forward_backward(tiny_batch())
        return drawn, torch.rand(1)

    drawn, after = step(0.5)
    without, _ = step(0.0)
    assert len(drawn) == 8  # four chunks, twice
    for first, second in zip(drawn[:4], drawn[4:]):
        assert torch.equal(first, second)
    assert not torch.equal(drawn[0], without[0])  # dropout did something
    torch.manual_seed(3)
    assert not torch.equal(torch.rand(1), after)  # and the generator moved on, once


class Numbers:
    """The generator of a device kind that this machine does not have: a state of one number."""

    def __init__(self):
        self.state = 0

    def get_rng_state(self):
        return torch.tensor([self.state])

    def set_rng_state(self, state):
        self.state = int(state)

    def draw(self):
        self.state += 1
        return self.state


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_generator_of_every_device_kind_is_replayed(kind, monkeypatch):
    numbers = Numbers()
    monkeypatch.setattr(torch, "get_device_module", {kind: numbers}.__getitem__)
    first = RandomState(torch.device(kind))
    drawn = numbers.draw(), torch.rand(1)
    second = RandomState(torch.device(kind))
    drawn_again = numbers.draw(), torch.rand(1)
    with first.replayed():
        assert (numbers.draw(), torch.rand(1)) == drawn
    assert numbers.state == 2  # as if nothing had been replayed
    with pytest.raises(KeyError), second.replayed():
        assert (numbers.draw(), torch.rand(1)) == drawn_again
        raise KeyError
    assert numbers.state == 2


def test_running_statistics_are_recorded_once_for_each_chunk():
    objective = ContrastiveObjective(tiny_model(VIT), {"global_caption": 1.0}, 0.2)
    GradientCache(Accelerator(cpu=True, mixed_precision="no"), objective, 3).forward_backward(tiny_batch())
    norm = objective.model.vision_model.encoder.layers[0].mlp.norm1
    assert norm.num_batches_tracked == 4 and norm.track_running_stats
    by_hand = tiny_model(VIT).train()
    for chunk in tiny_batch()["pixel_values"].split(3):
        by_hand.encode_image(chunk)
    assert torch.equal(norm.running_mean, by_hand.vision_model.encoder.layers[0].mlp.norm1.running_mean)


def test_a_chunk_that_does_not_divide_the_batch_is_refused():
    objective = ContrastiveObjective(tiny_model(), {"global_caption": 1.0}, 0.2)
    with pytest.raises(ValueError, match="chunk size 5 must divide the 12 pairs"):
        GradientCache(Accelerator(cpu=True, mixed_precision="no"), objective, 5).forward_backward(tiny_batch())
