"""All levels of a training step: pictures in one pass, texts of several lengths in one pass, against one at a time."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.modeling_pyramidclip_resnet import halved
from pyramidclip_hf.modeling_pyramidclip_text import PyramidCLIPLayerNorm, PyramidCLIPQuickGELU
from tests.plain_forms import lively, plain_form
from tests.pyramidclip_hf.tiny import BOTH, make_batch, tiny

POOLINGS = pytest.mark.parametrize("pooling", ["max", "eos"])


def batch_of_three_lengths(model):
    batch = make_batch(model)
    shorter = {"tag_input_ids": 5, "input_ids": 9}
    for name, length in shorter.items():
        batch[name] = batch[name][:, :length].clone()
        batch[name][:, -1].masked_fill_((batch[name] != 49).all(1), 49)
    batch["roi_mask"][1, 0] = True  # the plain form knows no rows without regions
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def one_at_a_time(plain, batch, length):
    """Each level through the plain form by itself; under "max" it takes texts of the full length."""
    embeds = {level: plain.encode_image(batch[LEVELS[level].input]) for level in ("global", "local")}
    embeds["roi"] = plain.encode_rois(batch["roi_features"], batch["roi_mask"])
    for level in ("summary", "caption", "tags"):
        ids = batch[LEVELS[level].input]
        embeds[level] = plain.encode_text(nn.functional.pad(ids, (0, length - ids.shape[1])))
    return embeds


def weighed(embeds):
    draw = torch.Generator().manual_seed(5)
    shape = next(iter(embeds.values())).shape
    return sum((embeds[level] * torch.randn(shape, generator=draw, dtype=torch.float64)).sum() for level in LEVELS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@POOLINGS
@BOTH
def test_values_gradients_and_statistics_are_those_of_one_level_at_a_time(tower, pooling, attention):
    model = lively(tiny(tower, pooling)).double()
    plain = plain_form(model).double().train()
    model.set_attn_implementation(attention)
    batch = batch_of_three_lengths(model.train())
    wanted = one_at_a_time(plain, batch, model.config.text_config.max_position_embeddings)
    found = model.encode_levels(tuple(LEVELS), **batch)
    for level in LEVELS:
        torch.testing.assert_close(found[level], wanted[level], rtol=1e-9, atol=1e-9)
    weighed(wanted).backward()
    weighed(found).backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(trained) >= {name for name in gradients if "patch_embedding" not in name and name != "logit_scale"}
    for name, gradient in trained.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-8, atol=1e-8, msg=lambda text, n=name: n + text)
    kept = dict(plain.named_buffers())
    for name, buffer in model.named_buffers():
        if "running" in name or "num_batches" in name:
            torch.testing.assert_close(buffer, kept[name], rtol=1e-9, atol=1e-9)


def test_a_step_passes_each_tower_once():
    model = tiny(pooling="eos").train()
    batch = batch_of_three_lengths(model.double())
    calls = {"text": 0, "vision": 0}
    for name in calls:
        getattr(model, f"{name}_model").register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    model.encode_levels(tuple(LEVELS), **batch)
    assert calls == {"text": 1, "vision": 2}  # both views, and the regions


def test_packed_texts_without_an_end_token_pool_their_own_last_position():
    model = tiny(pooling="eos")
    batch = make_batch(model)
    batch["tag_input_ids"] = batch["tag_input_ids"][:, :4].masked_fill(batch["tag_input_ids"][:, :4] == 49, 7)
    found = model.encode_levels(("caption", "tags"), **batch)
    for level in found:
        torch.testing.assert_close(found[level], model.encode_levels((level,), **batch)[level])


def test_packed_texts_longer_than_there_are_positions_are_refused():
    model = tiny(pooling="eos")
    batch = make_batch(model)
    batch["input_ids"] = nn.functional.pad(batch["input_ids"], (0, 1))
    with pytest.raises(ValueError, match="holds 13 tokens, the model has 12 positions"):
        model.encode_levels(("caption", "tags"), **batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quick_gelu_is_its_formula_at_every_size(dtype):
    inputs = torch.cat([torch.linspace(-90, 90, 3601), torch.tensor([-1e4, 1e4, 0.0])]).to(dtype).requires_grad_()
    wanted = inputs * torch.sigmoid(1.702 * inputs)
    found = PyramidCLIPQuickGELU()(inputs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), inputs)[0] for value in (found, wanted)))
    with torch.no_grad():
        assert torch.equal(PyramidCLIPQuickGELU()(inputs), found)


def test_derivatives_of_the_own_functions_can_be_derived():
    draw = torch.Generator().manual_seed(0)
    flat = torch.randn(9, generator=draw, dtype=torch.float64, requires_grad=True)
    maps = torch.randn(1, 2, 4, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((PyramidCLIPQuickGELU(), flat), (halved, maps)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)
        mapped = torch.func.vmap(torch.func.grad(lambda one, function=function: function(one).sum()))(inputs[None])
        torch.testing.assert_close(mapped[0], torch.autograd.grad(function(inputs).sum(), inputs)[0])


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [6, 7])
def test_halving_has_the_pooling_s_gradient_and_layout(side, memory_format):
    inputs = torch.randn(2, 3, side, 4).contiguous(memory_format=memory_format).requires_grad_()
    found, wanted = halved(inputs), nn.functional.avg_pool2d(inputs, 2)
    weights = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((value * weights).sum(), inputs)[0] for value in (found, wanted)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].is_contiguous(memory_format=memory_format)


def test_layer_norm_returns_what_came():
    norm, inputs = PyramidCLIPLayerNorm(8), torch.randn(4, 8) * 3 + 1
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(inputs).dtype == torch.float32
        half = norm(inputs.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), nn.functional.layer_norm(inputs, (8,)), rtol=2e-2, atol=2e-2)


@POOLINGS
@BOTH
def test_under_autocast_the_residual_stream_is_half_and_gradients_point_where_those_of_fp32_do(tower, pooling):
    model = tiny(tower, pooling).train()
    for module in model.modules():  # bf16 statistics of few numbers say nothing of the stream
        if isinstance(module, _BatchNorm):
            module.eval()
    batch = {name: value for name, value in make_batch(model).items() if name != "roi_mask"}
    dtypes = set()
    for layer in model.text_model.encoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    gradients = []
    for half in (False, True):
        model.zero_grad()
        dtypes.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            embeds = model.encode_levels(tuple(LEVELS), **batch)
        weighed({level: embed.double() for level, embed in embeds.items()}).backward()
        assert dtypes == {torch.bfloat16 if half else torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # Under "max" half precision now and then finds its maximum at another position, with a stream in fp32 as well.
    assert torch.cosine_similarity(*gradients, dim=0) > {"eos": 0.9995, "max": 0.975}[pooling]
