"""Outputs, running statistics and parameter counts against the published reference implementation."""

import pytest
import torch

from conversion.key_map import to_original
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from tests.golden import NAMES, OUTPUTS, golden_batch, golden_model, golden_vectors

TOLERANCE = 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_eval_mode_meets_the_reference(name, attention):
    model, wanted = golden_model(name), golden_vectors(name)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        embeds = model.encode_levels(tuple(OUTPUTS), **golden_batch(name))
    for level, key in OUTPUTS.items():
        torch.testing.assert_close(embeds[level], wanted[key], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_train_mode_and_running_statistics_meet_the_reference(name, checkpointing):
    model, wanted = golden_model(name).train(), golden_vectors(name)
    if checkpointing:
        model.activation_checkpointing_enable()
    embeds = model.encode_levels(tuple(OUTPUTS), **golden_batch(name))
    sum(embed.square().sum() for embed in embeds.values()).backward()
    for level, key in OUTPUTS.items():
        torch.testing.assert_close(embeds[level].detach(), wanted[f"train.{key}"], atol=TOLERANCE, rtol=0)
    state = to_original(model.state_dict(), model.config)
    statistics = {key.removeprefix("after_train."): value for key, value in wanted.items() if "after_train." in key}
    assert len(statistics) > 10
    for key, value in statistics.items():
        torch.testing.assert_close(state[key], value, atol=TOLERANCE, rtol=0, msg=key)


@pytest.mark.parametrize(
    ("architecture", "count"), [("RN50", 106_213_729), ("ViT-B-32", 153_226_497), ("ViT-B-16", 151_569_921)]
)
def test_parameter_counts_equal_the_reference(architecture, count):
    with torch.device("meta"):
        model = PyramidCLIPModel(PyramidCLIPConfig.from_architecture(architecture))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
