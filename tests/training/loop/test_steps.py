"""Two steps of a run against the same two written out: AdamW, clipping, learning rate, bound of the scale, average."""

import math

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import MODEL_CONFIG, MemoryReader, logged, settings, use_memory
from training import pretrain
from training.loop.checkpoint import list_checkpoints
from training.loop.initial_model import initial_model
from training.loop.objective import ContrastiveObjective

BOUND = math.log(100)
# The cosine ends behind the second step: half way between is halfway down.
FINAL = 0.01
RATES, DECAY, BETAS, EPSILON, NORM, AVERAGE = (0.02, 0.015), 0.3, (0.8, 0.9), 1e-3, 0.05, 0.7
KEPT_SIZE = ("position_embedding.weight", "class_embedding", "logit_scale")  # of all others with two axes, decay


def given(folder):
    """A scale that begins above its bound, a norm that is clipped, a rate that falls, everything else uncommon."""
    config = {**MODEL_CONFIG, "logit_scale_init_value": BOUND + 0.1}
    return settings(
        folder,
        model_config=config,
        max_steps=2,
        learning_rate=RATES[0],
        warmup_fraction=0.0,
        final_learning_rate_fraction=FINAL / RATES[0],
        weight_decay=DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_epsilon=EPSILON,
        max_grad_norm=NORM,
        ema_decay=AVERAGE,
        log_every_steps=1,
    )


@torch.no_grad()
def replayed(folder):
    """(weights, average, first moments, gradient norms, scales before the bound) after both steps, by hand."""
    args = given(folder)
    model, _ = initial_model(args)
    objective = ContrastiveObjective(model, model.config.loss_weights, model.config.label_smoothing).train()
    weights = dict(model.named_parameters())
    average = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items() if p.requires_grad}
    norms, scales = [], []
    batches = MemoryReader(args).batches(0, 0)
    for step, rate in enumerate(RATES, start=1):
        batch = next(batches)
        batch.pop("sample_keys")
        names = list(moments)
        with torch.enable_grad():
            gradients = torch.autograd.grad(objective(batch).loss, [weights[name] for name in names])
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        norms.append(norm)
        for name, gradient in zip(names, gradients):
            gradient = gradient * min(1.0, NORM / norm)
            first, second = moments[name]
            first.copy_(BETAS[0] * first + (1 - BETAS[0]) * gradient)
            second.copy_(BETAS[1] * second + (1 - BETAS[1]) * gradient**2)
            weight = weights[name]
            if weight.ndim > 1 and not name.endswith(KEPT_SIZE):
                weight.mul_(1 - rate * DECAY)
            scaled = (second / (1 - BETAS[1] ** step)).sqrt() + EPSILON
            weight.sub_(rate * first / (1 - BETAS[0] ** step) / scaled)
        scales.append(weights["logit_scale"].item())
        weights["logit_scale"].clamp_(max=BOUND)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                average[name] = AVERAGE * average[name] + (1 - AVERAGE) * tensor
            else:
                average[name] = tensor.clone()
    return model.state_dict(), average, {name: first for name, (first, _) in moments.items()}, norms, scales


def test_two_steps_are_those_that_are_written_out(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    pretrain.run(given(tmp_path))
    weights, average, moments, norms, scales = replayed(tmp_path / "none")
    assert all(norm > 2 * NORM for norm in norms) and scales[0] > BOUND + 0.05  # the limits were met

    def close(found, wanted, name):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6, msg=lambda text: f"{name}: {text}")

    for folder, wanted in (("final", weights), ("final-average", average)):
        found = load_file(tmp_path / folder / "model.safetensors")
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            close(found[name], tensor, f"{folder} {name}")
    optimizer = torch.load(list_checkpoints(tmp_path)[-1] / "optimizer.pt", weights_only=True)
    found = sorted(entry["exp_avg"].double().norm().item() for entry in optimizer["state"].values())
    assert found == pytest.approx(
        sorted(first.double().norm().item() for first in moments.values()), rel=1e-4, abs=1e-9
    )
    # The log is read off the optimizer and the model, not off what they were told.
    assert logged(tmp_path, "learning_rate") == pytest.approx(RATES)
    assert logged(tmp_path, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert logged(tmp_path, "logit_scale") == pytest.approx([min(100, math.exp(scale)) for scale in scales], rel=1e-5)


def test_the_logged_rate_is_the_optimizers(tmp_path, monkeypatch):
    use_memory(monkeypatch)
    monkeypatch.setattr("training.loop.run.set_learning_rate", lambda optimizer, rate: None)
    pretrain.run(given(tmp_path))
    assert logged(tmp_path, "learning_rate") == pytest.approx((RATES[0], RATES[0]))  # as the optimizer was made
