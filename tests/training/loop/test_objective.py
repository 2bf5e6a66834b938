"""The objective across processes, against one process with the whole batch and a dense loss written out here."""

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS, TERMS, Level
from tests.training.processes import run_in_processes
from tests.training.tiny import RESNET, VIT, rows_of, tiny_batch, tiny_model
from training.loop.distributed import StopVote, any_process, check_equal_batches, gather_rows, sum_over_processes
from training.loop.objective import ContrastiveObjective

SMOOTHING = 0.2
MAPPINGS = {**{name: {name: 1.0} for name in TERMS}, "six": DEFAULT_LOSS_WEIGHTS, "nine": dict.fromkeys(TERMS, 0.3)}


def dense_loss(model, batch, weights):
    """Softened cross-entropy with an N x N target matrix, on the samples that have both levels."""
    everything = {level: model.encode_levels((level,), **batch)[level] for level in LEVELS}  # each by itself
    present = {"roi": batch["roi_mask"].any(1), "summary": batch["has_summary"], "tags": batch["has_tags"]}
    everyone = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    total, terms = 0.0, {}
    for name, weight in weights.items():
        image, text = TERMS[name]
        keep = present.get(image, everyone) & present.get(text, everyone)
        count = int(keep.sum())
        images, texts = F.normalize(everything[image][keep], dim=1), F.normalize(everything[text][keep], dim=1)
        logits = model.logit_scale.exp() * images @ texts.T
        target = torch.full_like(logits, SMOOTHING / (count - 1)).fill_diagonal_(1 - SMOOTHING)
        loss = -(target * logits.log_softmax(1)).sum(1).mean() / 2 - (target * logits.log_softmax(0)).sum(0).mean() / 2
        terms[name] = loss.item()
        total = total + weight * loss
    return total, terms


def gradients(model):
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def reference(tower, image_size, weights, pooling):
    model = tiny_model(tower, pooling=pooling).eval()
    loss, terms = dense_loss(model, tiny_batch(image_size=image_size), weights)
    loss.backward()
    return loss.item(), terms, gradients(model)


def one_step(rank, world_size, tower, image_size, weights, pooling):
    objective = ContrastiveObjective(tiny_model(tower, pooling=pooling), weights, SMOOTHING).eval()
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if world_size > 1 else objective
    batch = rows_of(tiny_batch(image_size=image_size), rank, world_size)
    wrapped(batch).loss.backward()
    objective.zero_grad()
    losses = wrapped(batch)  # a second step: DDP only notices a parameter without gradient at the next forward
    losses.loss.backward()
    total = sum_over_processes(losses.shares)
    return total.numpy(), losses.counts.numpy(), gradients(objective.model), objective.terms


def all_mappings(rank, world_size, tower, image_size, pooling):
    return {name: one_step(rank, world_size, tower, image_size, weights, pooling) for name, weights in MAPPINGS.items()}


def assert_same_gradients(found, expected, tolerance):
    # The key projections' biases have gradient 0 (a softmax ignores them), so only their rounding can be compared.
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in expected.values())
    for name, gradient in found.items():
        scale = max(np.linalg.norm(expected[name]), floor)
        assert np.linalg.norm(gradient - expected[name]) / scale < tolerance, name


@pytest.mark.parametrize(
    ("world_size", "tower", "image_size", "pooling"),
    [
        (1, VIT, 16, "eos"),
        (2, VIT, 16, "eos"),
        (3, VIT, 16, "eos"),
        (2, RESNET, 32, "eos"),
        (2, VIT, 16, "max"),
        (2, RESNET, 32, "max"),
    ],
)
def test_loss_and_gradients_equal_one_process_with_the_whole_batch(world_size, tower, image_size, pooling):
    if world_size == 1:
        results = [all_mappings(0, 1, tower, image_size, pooling)]
    else:
        results = run_in_processes(all_mappings, world_size, tower, image_size, pooling)
    for mapping, weights in MAPPINGS.items():
        loss, terms, expected = reference(tower, image_size, weights, pooling)
        for result in results:
            shares, counts, found, names = result[mapping]
            np.testing.assert_allclose(shares[0], loss, rtol=1e-6)
            np.testing.assert_allclose(shares[1:], [terms[name] for name in names], rtol=1e-6)
            assert "logit_scale" in found
            assert_same_gradients(found, expected, 1e-6)
            # What the mapping does not reach has no gradient, and what it reaches has one.
            reached = {name for name, gradient in expected.items() if np.any(gradient)}
            assert reached <= set(found), reached - set(found)
    assert len(set(results[0]["nine"][1].tolist())) > 2  # the terms ran on different numbers of pairs


def test_a_level_that_nobody_has_gives_zero_and_keeps_every_gradient():
    def step(rank, world_size):
        objective = ContrastiveObjective(tiny_model(), DEFAULT_LOSS_WEIGHTS, SMOOTHING).eval()
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
        batch = rows_of(tiny_batch(), rank, world_size)
        batch["roi_mask"] = torch.zeros_like(batch["roi_mask"])
        for _ in range(2):
            losses = wrapped(batch)
            losses.loss.backward()
        return dict(zip(objective.terms, losses.shares[1:].tolist())), len(gradients(objective)), losses.counts.tolist()

    for shares, count, counts in run_in_processes(step, 2):
        assert shares["roi_summary"] == shares["roi_caption"] == 0.0 and shares["local_caption"] > 0
        assert counts[list(DEFAULT_LOSS_WEIGHTS).index("roi_summary")] == 0
        trainable = ContrastiveObjective(tiny_model(), DEFAULT_LOSS_WEIGHTS, SMOOTHING).parameters()
        assert count == sum(p.requires_grad for p in trainable)


def test_a_level_that_one_process_lacks():
    """Its columns have no row of that process; the other's make up the log-sum-exp alone."""

    def lacking():
        batch = tiny_batch()
        half = len(batch["has_tags"]) // 2
        batch["has_tags"][:half] = False
        batch["has_tags"][half:] = True
        return batch

    def step(rank, world_size):
        objective = ContrastiveObjective(tiny_model(), DEFAULT_LOSS_WEIGHTS, SMOOTHING).eval()
        wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
        losses = wrapped(rows_of(lacking(), rank, world_size))
        losses.loss.backward()
        return sum_over_processes(losses.shares).numpy(), gradients(objective.model)

    model = tiny_model().eval()
    loss, _ = dense_loss(model, lacking(), DEFAULT_LOSS_WEIGHTS)
    loss.backward()
    for shares, found in run_in_processes(step, 2):
        np.testing.assert_allclose(shares[0], loss.item(), rtol=1e-6)
        assert_same_gradients(found, gradients(model), 1e-6)


def repeated_texts():
    """A batch in which some tags are the same on different processes, one of them with other numbers behind its end
    token, which the model does not read either."""
    batch = tiny_batch()
    batch["tag_input_ids"][8] = batch["tag_input_ids"][3]
    batch["tag_input_ids"][11] = batch["tag_input_ids"][3]
    batch["tag_input_ids"][[5, 9], 4] = 39
    batch["tag_input_ids"][9, :4] = batch["tag_input_ids"][5, :4]
    return batch


def multi_positive_step(rank, world_size):
    objective = ContrastiveObjective(tiny_model(), {"local_tags": 1.0}, SMOOTHING, multi_positive=True).eval()
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if world_size > 1 else objective
    losses = wrapped(rows_of(repeated_texts(), rank, world_size))
    losses.loss.backward()
    return sum_over_processes(losses.shares).numpy(), gradients(objective.model)


@pytest.mark.parametrize("world_size", [1, 2])
def test_equal_texts_of_different_processes_are_positives(world_size):
    batch, model = repeated_texts(), tiny_model().eval()
    keep = batch["has_tags"]
    texts = [tuple(row[: row.index(39)]) for row in batch["tag_input_ids"].tolist()]
    same = torch.tensor([[a == b for b in texts] for a in texts])[keep][:, keep]
    assert same.sum() > len(same)
    target = same * (1 - SMOOTHING) / same.sum(1) + ~same * SMOOTHING / (~same).sum(1, keepdim=True)
    embeds = model.encode_levels(("local", "tags"), **batch)
    images, texts = (F.normalize(embeds[level][keep], dim=1) for level in ("local", "tags"))
    logits = model.logit_scale.exp() * images @ texts.T
    loss = sum(-(target * z.log_softmax(1)).sum(1).mean() / 2 for z in (logits, logits.T))
    loss.backward()
    results = [multi_positive_step(0, 1)] if world_size == 1 else run_in_processes(multi_positive_step, world_size)
    for shares, found in results:
        np.testing.assert_allclose(shares, loss.item(), rtol=1e-6)
        assert_same_gradients(found, gradients(model), 1e-6)


def test_a_further_level_and_its_terms_are_entries_in_the_tables(monkeypatch):
    monkeypatch.setitem(LEVELS, "ocr", Level("text", "words", "ocr_input_ids", "ocr_embeds", "ocr", "has_ocr"))
    monkeypatch.setitem(TERMS, "global_ocr", ("global", "ocr"))
    batch = tiny_batch()
    batch |= {"ocr_input_ids": batch["tag_input_ids"], "has_ocr": batch["has_tags"]}
    found, expected = (
        ContrastiveObjective(tiny_model(), {term: 1.0}, SMOOTHING).eval()(batch)
        for term in ("global_ocr", "global_tags")
    )
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.counts, expected.counts)


@pytest.mark.parametrize("freeze", ["vision", "text"])
def test_a_frozen_tower_keeps_its_weights_and_running_statistics(freeze):
    model = tiny_model(dtype=torch.float32)
    objective = ContrastiveObjective(model, DEFAULT_LOSS_WEIGHTS, SMOOTHING, freeze).train()
    assert model.vision_model.training == (freeze == "text") and model.text_model.training == (freeze == "vision")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    objective(tiny_batch(dtype=torch.float32)).loss.backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    held = ("vision_model.", "visual_projection.") if freeze == "vision" else ("text_model.", "text_projection.")
    assert changed and not [name for name in changed if name.startswith(held)]
    assert any("running_mean" in name for name in changed) == (freeze == "text")


def test_a_tower_that_does_not_exist_cannot_be_frozen():
    with pytest.raises(ValueError, match="expected one of none, vision, text, got 'audio'"):
        ContrastiveObjective(tiny_model(), {"global_caption": 1}, 0.0, "audio")


def test_half_precision_stays_inside_the_encoders():
    model = tiny_model(dtype=torch.float32)
    objective = ContrastiveObjective(model, {"global_caption": 1}, 0.0, autocast_dtype=torch.bfloat16)
    batch = tiny_batch(dtype=torch.float32)
    embeddings = objective.embed(batch)["pairs"]
    assert embeddings.dtype == torch.float32
    torch.testing.assert_close(
        embeddings.norm(dim=-1), torch.ones(12, 2), atol=1e-6, rtol=0
    )  # bf16 would be off by 1e-3
    plain = ContrastiveObjective(model, {"global_caption": 1}, 0.0).embed(batch)["pairs"]
    assert 1e-4 < (embeddings - plain).abs().max() < 0.1
    assert objective(batch).loss.dtype == torch.float32


def collectives(rank, world_size):
    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_rows(rows)
    (gathered * torch.arange(1.0, 1 + len(gathered))[:, None] * (rank + 1)).sum().backward()
    flags = gather_rows(torch.tensor([rank == 1, False]))
    vote, outcomes = StopVote(timedelta(minutes=1)), []
    for step in range(4):
        outcomes.append(vote.cast(rank == 1 and step == 1))
    outcomes.append(vote.outcome())
    try:
        check_equal_batches(4 - (rank == 1), torch.device("cpu"))
        unequal = ""
    except ValueError as error:
        unequal = str(error)
    return gathered.detach().numpy(), rows.grad.numpy(), flags.tolist(), outcomes, any_process(rank == 1), unequal


def test_collectives():
    for rank, (gathered, gradient, flags, outcomes, any_flag, unequal) in enumerate(run_in_processes(collectives, 3)):
        np.testing.assert_array_equal(gathered[:, 0], [0, 0, 1, 1, 2, 2])
        # Row r of the gathered tensor has weight (r + 1) on process 0, twice that on 1, three times on 2: six in all.
        np.testing.assert_array_equal(gradient[:, 0], [6 * (2 * rank + 1), 6 * (2 * rank + 2)])
        assert flags == [False, False, True, False, False, False]
        assert outcomes == [False, False, True, False, False]  # cast at step 1, known everywhere one step later
        assert any_flag
        assert "process 0 has 4 and others differ: {1: 3}" in unequal


class DevicesOfTensors(TorchDispatchMode):
    """The operations that read or write a tensor elsewhere than on the GPU."""

    def __init__(self):
        super().__init__()
        self.elsewhere, self.count = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.count += len(tensors)
        if any(tensor.device.type != "cuda" for tensor in tensors):
            self.elsewhere.append(str(function))
        return result


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no cuda tensors, not even fake ones")
@pytest.mark.parametrize(("tower", "pooling"), [(VIT, "max"), (RESNET, "eos")])
def test_nothing_is_copied_to_a_gpu_while_the_loss_is_computed(tower, pooling):
    """Such a copy waits until the GPU has done what came before. Tensors that only have a shape and a device show it
    without a GPU.
    """
    objective = ContrastiveObjective(
        tiny_model(tower, pooling=pooling), DEFAULT_LOSS_WEIGHTS, SMOOTHING, multi_positive=True
    )
    batch = tiny_batch(image_size=tower["image_size"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        objective = objective.to("cuda")
        batch = {name: value.to("cuda") for name, value in batch.items()}
        with DevicesOfTensors() as devices:
            losses = objective(batch)
        assert losses.loss.device.type == "cuda"
        assert devices.count > 500 and not devices.elsewhere
        with devices:
            torch.ones(2).to("cuda")
        assert "aten._to_copy.default" in devices.elsewhere
