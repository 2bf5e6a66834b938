"""All kinds of terms in one objective: over processes, in chunks, and with the parameters that they reach."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from tests.training.loop.terms.dense_terms import choice, simclr, simsiam, tokens
from tests.training.processes import run_in_processes
from tests.training.tiny import RESNET, VIT, rows_of, tiny_model, tiny_run_batch
from training.loop.distributed import sum_over_processes
from training.loop.gradient_cache import GradientCache
from training.loop.objective import ContrastiveObjective
from training.loop.terms.encoding import encode, token_mask
from training.loop.terms.table import RUN_PAIRS, read_objective
from training.loop.terms.term import Wanted

NO_BATCH_NORM = {**VIT, "num_leff_layers": 0}
HEADS = {
    "views_simclr": {"weight": 0.7, "hidden": 6, "out": 4},
    "views_simsiam": {"weight": 0.3, "width": 6, "bottleneck": 4},
    "views_nn": {"weight": 0.2, "size": 32},
    "caption_mlm": {"weight": 0.4},
    "global_caption_tokens": {"weight": 0.5, "width": 5},
    "local_tags_tokens": {"weight": 0.6, "width": 5},
    "view1_caption": 0.1,
    "view2_caption_aug": 0.2,
}
PAIRS = {"global_caption": 0.5, "roi_tags": 0.25}
MAPPINGS = {
    "all": (PAIRS, HEADS),
    "slip": ({"global_caption": 1.0}, {"views_simclr": HEADS["views_simclr"]}),
    "filip": ({}, {"global_caption_tokens": HEADS["global_caption_tokens"]}),
    "simsiam": ({}, {"views_simsiam": HEADS["views_simsiam"]}),
    "simclr": ({}, {"views_simclr": HEADS["views_simclr"]}),
    "nn": ({}, {"views_nn": HEADS["views_nn"]}),
    "mlm": ({}, {"caption_mlm": HEADS["caption_mlm"]}),
    "masked": ({}, {"view1_caption": 1.0, "caption_mlm": {"weight": 0.5, "caption": "masked"}}),
}
SMOOTHING = 0.1


def past_texts():
    return F.normalize(torch.randn(20, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64), dim=1)


def objective_of(mapping, tower=VIT, pooling="eos"):
    pairs, further = MAPPINGS[mapping]
    model = tiny_model(tower, pooling=pooling)
    torch.manual_seed(1)
    found = read_objective(further, model.config)
    objective = ContrastiveObjective(model, pairs, SMOOTHING, further=found.terms, run_pairs=found.pairs).double()
    for term in objective.further:
        if term.name == "views_nn":
            term.queue.push(past_texts())
    return objective


def gradients(objective):
    return {name: p.grad.numpy().copy() for name, p in objective.named_parameters() if p.grad is not None}


def text_tokens(model, ids, masked_word=None):
    """Hidden states of texts by the tower's own parts, with a vector in place of masked words."""
    words = model.text_model.embeddings.token_embedding(ids.clamp(min=0))
    if masked_word is not None:
        words = torch.where(ids[..., None] == -1, masked_word, words)
    states = words + model.text_model.embeddings.position_embedding.weight[: ids.shape[1]]
    causal = torch.full((ids.shape[1], ids.shape[1]), float("-inf"), dtype=states.dtype).triu(1)
    return model.text_model.final_layer_norm(model.text_model.encoder(states, causal[None, None], is_causal=False))


def picture_tokens(model, pixels):
    states = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    return model.vision_model.post_layernorm(states) if model.config.vision_config.tower == "vit" else states


def dense(objective, batch):
    """The weighted sum of all terms in plain forms, and each."""
    model, scale, found = objective.model, objective.model.logit_scale.exp(), {}
    inputs = {"global": "pixel_values", "local": "local_pixel_values", "view1": "view1_pixel_values",
              "view2": "view2_pixel_values", "caption": "input_ids", "tags": "tag_input_ids",
              "caption_aug": "augmented_input_ids"}  # fmt: skip
    masked = dict(objective.heads.items()).get("caption_mlm")

    def embed(level):
        if level == "roi":
            return F.normalize(model.encode_rois(batch["roi_features"], batch["roi_mask"]), dim=1)
        if level == "masked":
            states = text_tokens(model, batch["masked_input_ids"], masked.masked_word)
            ends = batch["masked_input_ids"].eq(39).int().argmax(1)
            return F.normalize(model.text_projection(states[torch.arange(len(ends)), ends]), dim=1)
        encode = model.encode_image if "pixel" in inputs[level] else model.encode_text
        return F.normalize(encode(batch[inputs[level]]), dim=1)

    everyone = torch.ones(len(batch["input_ids"]), dtype=torch.bool)
    there = {"roi": batch["roi_mask"].any(1), "tags": batch["has_tags"]}
    for name, (image, text) in objective.pairs.items():
        keep = there.get(image, everyone) & there.get(text, everyone)
        logits = scale * embed(image)[keep] @ embed(text)[keep].T
        rows = range(len(logits))
        found[name] = (choice(logits, rows, SMOOTHING) + choice(logits.T, rows, SMOOTHING)) / 2
    for name, term in objective.heads.items():
        views = [batch["view1_pixel_values"], batch["view2_pixel_values"]]
        if name == "views_simclr":
            pooled = [term.head(model.vision_model(pixel_values=view).pooler_output) for view in views]
            found[name] = simclr(*pooled, 0.1, SMOOTHING)
        elif name == "views_simsiam":
            found[name] = simsiam(term.projector, term.predictor, *(model.encode_image(view) for view in views))
        elif name == "views_nn":
            past, total = past_texts(), 0.0
            for image in ("view1", "view2"):
                for text in ("caption", "caption_aug"):
                    nearest = past[(embed(text).detach() @ past.T).argmax(1)]
                    total = total + choice(scale * embed(image) @ nearest.T, range(len(nearest)), SMOOTHING) / 4
            found[name] = total
        elif name == "caption_mlm":
            states, losses = text_tokens(model, batch["masked_input_ids"], term.masked_word), []
            for row, (positions, labels) in enumerate(zip(batch["masked_positions"], batch["masked_labels"])):
                losses += [
                    F.cross_entropy(term.head(states[row, position])[None], label[None])
                    for position, label in zip(positions, labels)
                    if label != -100
                ]
            found[name] = torch.stack(losses).mean()
        else:
            image, text = name.split("_")[:2]
            images = F.normalize(term.image_projection(picture_tokens(model, batch[inputs[image]])), dim=-1)
            texts = F.normalize(term.text_projection(text_tokens(model, batch[inputs[text]])), dim=-1)
            mask = token_mask(batch[inputs[text]], 39)
            here = there.get(text, everyone)
            found[name] = tokens(images, texts, mask, here, term.logit_scale.exp(), SMOOTHING)
    weights = {**objective.pair_weights, **{name: term.weight for name, term in objective.heads.items()}}
    return sum(weights[name] * loss for name, loss in found.items()), found


def one_step(rank, world_size, mapping, tower=VIT, image_size=16):
    objective = objective_of(mapping, tower).eval()
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if world_size > 1 else objective
    batch = rows_of(tiny_run_batch(image_size=image_size), rank, world_size)
    for _ in range(2):  # DDP only notices a parameter without gradient at the next forward
        objective.zero_grad()
        losses = wrapped(batch)
        losses.loss.backward()
    held = {name for name, parameter in objective.named_parameters() if not parameter.requires_grad}
    objective.after_step(True)
    queues = [term.queue.rows.numpy() for term in objective.further if term.name == "views_nn"]
    return sum_over_processes(losses.shares).numpy(), gradients(objective), held, queues


def steps(rank, world_size, *rest):
    return {mapping: one_step(rank, world_size, mapping, *rest) for mapping in MAPPINGS}


def assert_same_gradients(found, expected, tolerance):
    floor = 1e-6 * max(np.linalg.norm(gradient) for gradient in expected.values())
    for name, gradient in found.items():
        scale = max(np.linalg.norm(expected[name]), floor)
        assert np.linalg.norm(gradient - expected[name]) / scale < tolerance, name


@pytest.mark.parametrize(
    ("world_size", "tower", "image_size"), [(1, VIT, 16), (2, VIT, 16), (3, VIT, 16), (1, RESNET, 32)]
)
def test_loss_and_gradients_are_those_of_plain_forms(world_size, tower, image_size):
    arguments = (tower, image_size)
    results = [steps(0, 1, *arguments)] if world_size == 1 else run_in_processes(steps, world_size, *arguments)
    for mapping in MAPPINGS:
        objective = objective_of(mapping, tower).eval()
        for parameter in objective.model.parameters():
            parameter.requires_grad_(True)
        objective.train(False)
        loss, terms = dense(objective, tiny_run_batch(image_size=image_size))
        loss.backward()
        expected = gradients(objective)
        for result in results:
            shares, found, held, queues = result[mapping]
            np.testing.assert_allclose(shares[0], loss.item(), rtol=1e-6)
            np.testing.assert_allclose(shares[1:], [terms[name].item() for name in objective.terms], rtol=1e-6)
            assert_same_gradients(found, expected, 1e-6)
            # What the mapping does not reach has no gradient, and what it reaches has one.
            reached = {name for name, gradient in expected.items() if np.any(gradient)}
            patches = "model.vision_model.embeddings.patch_embedding.weight"
            assert reached - {patches} <= set(found), (mapping, reached - set(found))
            assert set(found).isdisjoint(held)
            assert set(found) | held == dict(objective.named_parameters()).keys()  # else DDP would wait for it
            for queue, first in zip(queues, results[0][mapping][3], strict=True):
                np.testing.assert_array_equal(queue, first)


def test_each_picture_is_a_batch_of_its_own_to_batch_norm():
    objective = objective_of("simclr", RESNET)
    model, batch = objective.model.train(), tiny_run_batch(image_size=32)
    wanted = [Wanted(view, "pooled") for view in ("view1", "view2")]
    found = encode(model, wanted, batch)
    for one in wanted:
        expected = model.vision_model(pixel_values=batch[f"{one.level}_pixel_values"]).pooler_output
        torch.testing.assert_close(found[one], expected)


def test_the_queue_does_not_depend_on_the_number_of_processes():
    alone = one_step(0, 1, "nn")[3][0]
    for world_size in (2, 3):
        for result in run_in_processes(one_step, world_size, "nn"):
            np.testing.assert_allclose(result[3][0], alone, atol=1e-12)


def cached(rank, world_size, mapping, chunk_size):
    accelerator = Accelerator(
        cpu=True, mixed_precision="no", kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
    )
    objective = objective_of(mapping, NO_BATCH_NORM).train(world_size == 1)
    wrapped = accelerator.prepare(objective)
    cache = GradientCache(accelerator, wrapped, chunk_size)
    for _ in range(2):
        objective.zero_grad()
        losses = cache.forward_backward(rows_of(tiny_run_batch(), rank, world_size))
    return sum_over_processes(losses.shares).numpy(), gradients(objective), objective


def cached_values(*arguments):
    return cached(*arguments)[:2]


@pytest.mark.parametrize("mapping", ["all", "filip", "masked"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_with_caching_they_are_those_of_the_whole_batch(mapping, world_size):
    """The heads' BatchNorm included, which sees the whole batch."""
    whole = objective_of(mapping, NO_BATCH_NORM).train(world_size == 1)
    for _ in range(2):
        whole.zero_grad()
        losses = whole(tiny_run_batch())
        losses.loss.backward()
    if world_size == 1:
        shares, found, objective = cached(0, 1, mapping, 3)
        results = [(shares, found)]
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(dict(objective.named_buffers())[name], buffer, msg=name)
    else:
        results = run_in_processes(cached_values, world_size, mapping, 3)
    for shares, found in results:
        np.testing.assert_allclose(shares, losses.shares.numpy(), rtol=1e-7)
        assert set(found) == set(gradients(whole))
        assert_same_gradients(found, gradients(whole), 1e-7)


def test_the_saved_model_has_no_heads(tmp_path):
    objective = objective_of("all")
    objective.model.save_pretrained(tmp_path)
    assert not any("head" in name or "masked_word" in name for name, _ in objective.model.named_parameters())
    assert {name.split(".")[0] for name in objective.kept["heads"].state_dict()} == {
        name for name in HEADS if name not in RUN_PAIRS and name != "views_nn"
    }
    assert set(objective.kept) == {"heads", "views_nn_queue"}
