"""Parameter groups, the schedule, AdamW against a form written out here, and the moving average."""

import pytest
import torch
from torch import nn

from tests.training.tiny import RESNET, VIT, tiny_batch, tiny_model
from training.loop.objective import ContrastiveObjective
from training.loop.optim import MovingAverage, build_optimizer, learning_rate_at, parameter_groups, set_learning_rate


@pytest.mark.parametrize("tower", [VIT, RESNET])
def test_decay_spares_norms_biases_positions_class_token_and_scale(tower):
    objective = ContrastiveObjective(tiny_model(tower), {"roi_tags": 1, "global_caption": 1}, 0.2)
    decayed, spared = parameter_groups(objective, 0.2)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.2, 0.0)
    names = {id(p): name.removeprefix("model.") for name, p in objective.named_parameters()}
    norms = {
        f"{module_name}.{name}".removeprefix("model.")
        for module_name, module in objective.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.modules.batchnorm._BatchNorm))
        for name, _ in module.named_parameters()
    }
    expected = {
        name
        for name in names.values()
        if name in norms or name.endswith("bias") or "position_embedding" in name or "class_embedding" in name
    } | {"logit_scale"}
    trainable = {names[id(p)] for p in objective.parameters() if p.requires_grad}
    assert {names[id(p)] for p in spared["params"]} == expected & trainable
    assert {names[id(p)] for p in decayed["params"]} == trainable - expected
    assert "text_model.embeddings.token_embedding.weight" in trainable - expected
    assert ("vision_model.embeddings.patch_embedding.weight" in trainable) is False


def test_the_optimizer_is_adamw():
    objective = ContrastiveObjective(tiny_model(dtype=torch.float32), {"global_caption": 1}, 0.2)
    optimizer = build_optimizer(objective, 0.01, 0.2, (0.9, 0.98), 1e-6)
    batch = tiny_batch(dtype=torch.float32)
    weights = {name: p.detach().clone().double() for name, p in objective.named_parameters() if p.requires_grad}
    moments = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in weights.items()}
    for step in (1, 2, 3):
        optimizer.zero_grad()
        objective(batch).loss.backward()
        for name, p in objective.named_parameters():
            if p.requires_grad:
                gradient, (first, second) = p.grad.double(), moments[name]
                first.lerp_(gradient, 0.1)
                second.lerp_(gradient**2, 0.02)
                decay = 0.2 if p.dim() > 1 and "position" not in name else 0.0
                weights[name] *= 1 - 0.01 * decay
                weights[name] -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.98**step)).sqrt() + 1e-6)
        optimizer.step()
    for name, p in objective.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.double(), weights[name], atol=1e-5, rtol=1e-4, msg=name)


def test_weights_in_half_precision_are_refused():
    model = tiny_model(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="must be float32 .* found torch.bfloat16; precision"):
        build_optimizer(model, 1e-3, 0.2, (0.9, 0.98), 1e-6)


def test_nothing_to_train_is_an_error():
    model = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is left to train"):
        parameter_groups(model, 0.2)


def test_the_schedule_is_a_function_of_the_step():
    rates = [learning_rate_at(step, 100, 2.0, 0.1, 0.25) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert learning_rate_at(100, 100, 2.0, 0.1, 0.25) == pytest.approx(0.5)  # a quarter of the peak
    assert rates[55] == pytest.approx((2.0 + 0.5) / 2)  # half way from 10 to 100
    assert 0.5 < rates[-1] < 0.501
    # No step of a run is taken at rate 0.
    assert [learning_rate_at(step, 2, 3.0, 0.0) for step in (0, 1)] == pytest.approx([3.0, 1.5])
    assert all(later <= earlier for earlier, later in zip(rates[10:], rates[11:]))
    assert learning_rate_at(0, 1, 3.0, 0.0) == 3.0
    assert learning_rate_at(500, 100, 2.0, 0.1, 0.25) == pytest.approx(0.5)
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)])
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def test_the_moving_average_covers_buffers_and_comes_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    average = MovingAverage(model, 0.75)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model[0].weight += 1
        model(torch.randn(5, 2))
    average.update(model)
    for name in ("0.weight", "1.running_mean"):
        torch.testing.assert_close(average.tensors[name], 0.75 * start[name] + 0.25 * model.state_dict()[name])
    assert average.tensors["1.num_batches_tracked"] == 1
    other = MovingAverage(model, 0.75)
    other.load_state_dict(average.tensors)
    assert all(torch.equal(other.tensors[name], tensor) for name, tensor in average.tensors.items())


def test_the_average_is_in_the_model_inside_and_its_own_weights_again_afterwards():
    model = torch.nn.BatchNorm1d(3)
    average = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    average.update(model)
    with pytest.raises(KeyError), average.swapped_into(model):
        assert model.weight.tolist() == [2.0, 2.0, 2.0]
        raise KeyError
    assert model.weight.tolist() == [3.0, 3.0, 3.0]
