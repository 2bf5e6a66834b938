"""Weights of a block in half precision by one operation: against autocast, which casts each by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyramidclip_hf import modeling_pyramidclip_text as blocks
from pyramidclip_hf.levels_pyramidclip import LEVELS
from tests.pyramidclip_hf.tiny import BOTH, make_batch, tiny


def trained(tower="vit", pooling="eos"):
    """In training mode, but for BatchNorm, whose statistics of few numbers in half precision say little."""
    model = tiny(tower, pooling).train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def gradients_of(model, **options):
    """Parameter -> gradient, of a sum over all levels under autocast; texts are of two lengths."""
    batch = make_batch(model)
    batch["tag_input_ids"] = batch["tag_input_ids"][:, :9]
    draw = torch.Generator().manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        embeds = model.encode_levels(tuple(LEVELS), **batch)
    weighed = [(embed.float() * torch.randn(embed.shape, generator=draw)).sum() for embed in embeds.values()]
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    found = torch.autograd.grad(torch.stack(weighed).sum(), parameters, allow_unused=True, **options)
    return {name: gradient for name, gradient in zip(names, found) if gradient is not None}


def cosine(found, wanted):
    assert found.keys() == wanted.keys()
    return torch.cosine_similarity(*(torch.cat([g.flatten() for g in one.values()]) for one in (found, wanted)), dim=0)


@pytest.mark.parametrize("checkpointed", [False, True])
@BOTH
def test_gradients_are_those_of_autocast_by_itself(tower, checkpointed, monkeypatch):
    model = trained(tower)
    found = gradients_of(model)
    if checkpointed:
        model.gradient_checkpointing_enable()
        assert cosine(gradients_of(model), found) > 0.99999
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    monkeypatch.setattr(blocks, "casts_weights", lambda module, states: False)
    assert cosine(found, gradients_of(model)) > 0.9998


def test_frozen_weights_get_none_and_the_others_the_same():
    model = trained()
    wanted = gradients_of(model)
    layer = model.text_model.encoder.layers[0]
    for parameter in (layer.self_attn.k_proj.weight, layer.mlp.fc1.weight, *layer.layer_norm2.parameters()):
        parameter.requires_grad_(False)
    for parameter in model.vision_model.encoder.layers[-1].parameters():
        parameter.requires_grad_(False)
    found = gradients_of(model)
    assert 0 < len(found) < len(wanted)
    for name, gradient in found.items():
        assert torch.equal(gradient, wanted[name]), name


def test_parameters_are_what_they_were_also_after_an_error():
    model = trained()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    gradients_of(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    failing = model.text_model.encoder.layers[1].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradients_of(model)
    failing.remove()
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before


def test_hooks_on_the_three_projections_are_called():
    model = trained()
    wanted = gradients_of(model)
    attention, seen = model.text_model.encoder.layers[0].self_attn, []
    attention.k_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    assert cosine(gradients_of(model), wanted) > 0.9998
    assert seen == [torch.bfloat16]


class Adapter(nn.Module):
    """What PEFT puts in the place of a linear layer."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.more = base_layer, copy.deepcopy(base_layer)

    def forward(self, states):
        return self.base_layer(states) + self.more(states)


def test_an_adapter_in_the_place_of_a_projection_is_used(monkeypatch):
    model = trained()
    attention = model.text_model.encoder.layers[0].self_attn
    attention.v_proj = Adapter(attention.v_proj)
    found = gradients_of(model)
    assert any("v_proj.more" in name for name in found)
    monkeypatch.setattr(blocks, "casts_weights", lambda module, states: False)
    assert cosine(found, gradients_of(model)) > 0.9998


def test_gradients_can_be_derived_again():
    model = trained()
    wanted = gradients_of(model)
    found = gradients_of(model, create_graph=True)
    assert all(gradient.requires_grad for gradient in found.values())
    assert cosine(found, wanted) > 0.9998


@pytest.mark.parametrize("training", [False, True])
def test_what_does_not_train_is_left_alone(training, monkeypatch):
    """Threads may share such a model, and each would find the other's tensors in it."""
    monkeypatch.setattr(blocks, "weights_in_half", lambda *_: pytest.fail("cast"))
    model = tiny().train(training)
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(not training):
        model.encode_levels(tuple(LEVELS), **make_batch(model))
    model.train()
    model.encode_levels(tuple(LEVELS), **make_batch(model))  # without autocast


def test_weights_of_other_types_are_left_to_autocast():
    model = trained().double()
    found = gradients_of(model)
    assert {gradient.dtype for gradient in found.values()} == {torch.float64}
