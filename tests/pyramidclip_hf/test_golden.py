"""Outputs, running statistics and parameter counts against the published reference implementation."""

import hashlib

import pytest
import torch

from conversion.key_map import to_original
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from tests.golden import FIXTURES, NAMES, OUTPUTS, golden_batch, golden_model, golden_vectors

TOLERANCE = 1e-4
# Of each file with what the reference computed: nobody is to adjust its numbers.
SHA256 = {
    "preprocess_golden.npz": "7ab725f9b4e033f437753544fb17d4347de6257880dd9dd4ce84d5d0129b6df6",
    "tiny-resnet.json": "cef2b5822f3af3e7ecaf2551e1bda563311e2271fff1dd0ea0bdea4a95d425b0",
    "tiny-resnet.npz": "c045dca54360fbcf9d332197289baec96bd5fb5f4cd51beee2f67053842148c7",
    "tiny-vit.json": "cf3ac5009b89cb8cf4bcdd1ae118140ddd64ca74e2c3549c554664cd95ca756e",
    "tiny-vit.npz": "7cfe1830f6d41d021b645e345c64fdd81853dd5eea510deda47eca4df6a20e62",
    "tokenizer_golden.json": "1356dd4ccdf8a912ca8ce5e5053845c4352473cd00ba0958f087659fea4333fd",
}


def test_the_numbers_are_those_that_the_reference_wrote():
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FIXTURES.iterdir()}
    assert found == SHA256


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
