"""Configurations: defaults, the named architectures, saving, and what is refused."""

import inspect
import json
from dataclasses import fields

import pytest
from transformers import CLIPConfig

from pyramidclip_hf import (
    ARCHITECTURES,
    PyramidCLIPConfig,
    PyramidCLIPModel,
    PyramidCLIPOutput,
    PyramidCLIPProcessor,
    PyramidCLIPTextConfig,
    PyramidCLIPVisionConfig,
)
from pyramidclip_hf.levels_pyramidclip import LEVELS, TERMS

# CLIP's published dimensions, from the paper "Learning Transferable Visual Models", tables 19 and 20:
# embedding, pixels, vision width (ResNet: pooled), vision depth, vision heads, text width, text heads.
PUBLISHED = {
    "RN50": (1024, 224, 2048, (3, 4, 6, 3), 32, 512, 8),
    "RN101": (512, 224, 2048, (3, 4, 23, 3), 32, 512, 8),
    "RN50x4": (640, 288, 2560, (4, 6, 10, 6), 40, 640, 10),
    "RN50x16": (768, 384, 3072, (6, 8, 18, 8), 48, 768, 12),
    "RN50x64": (1024, 448, 4096, (3, 15, 36, 10), 64, 1024, 16),
    "ViT-B-32": (512, 224, 768, 12, 12, 512, 8),
    "ViT-B-16": (512, 224, 768, 12, 12, 512, 8),
    "ViT-L-14": (768, 224, 1024, 24, 16, 768, 12),
    "ViT-L-14-336": (768, 336, 1024, 24, 16, 768, 12),
}


def test_model_output_and_processor_have_what_the_table_of_levels_names():
    inputs = set(inspect.signature(PyramidCLIPModel.forward).parameters)
    arguments = set(inspect.signature(PyramidCLIPProcessor.__call__).parameters)
    outputs = {field.name for field in fields(PyramidCLIPOutput)}
    for level in LEVELS.values():
        assert {level.input, level.mask} - {None} <= inputs
        assert level.argument in arguments and level.output in outputs
    for name in ("input", "output", "argument"):
        assert len({getattr(level, name) for level in LEVELS.values()}) == len(LEVELS)


def test_each_term_pairs_an_image_level_with_a_text_level():
    for image, text in TERMS.values():
        assert LEVELS[image].kind != "text" and LEVELS[text].kind == "text"


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_architectures(name):
    config = PyramidCLIPConfig.from_architecture(name)
    vision, text = config.vision_config, config.text_config
    depth = vision.num_hidden_layers if vision.tower == "vit" else tuple(vision.layers)
    found = (config.projection_dim, vision.image_size, vision.hidden_size, depth, vision.num_attention_heads,
             text.hidden_size, text.num_attention_heads)  # fmt: skip
    assert found == PUBLISHED[name]
    assert text.num_hidden_layers == 12 and text.max_position_embeddings == 77 and text.pooling == "max"
    assert vision.num_leff_layers == vision.num_picture_layers == (9 if vision.tower == "vit" else 0)
    assert set(PUBLISHED) == set(ARCHITECTURES)


def test_an_architecture_takes_overrides():
    config = PyramidCLIPConfig.from_architecture(
        "ViT-B-32", text_config={"pooling": "eos"}, vision_config={"num_leff_layers": 0}, label_smoothing=0.0
    )
    assert config.text_config.pooling == "eos" and config.text_config.hidden_size == 512
    assert config.vision_config.num_leff_layers == 0 and config.label_smoothing == 0
    with pytest.raises(ValueError, match="Unknown architecture 'ViT-B16'.*ViT-B-16"):
        PyramidCLIPConfig.from_architecture("ViT-B16")


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16"])
def test_round_trip_and_towers(name, tmp_path):
    config = PyramidCLIPConfig.from_architecture(name, loss_weights={"global_caption": 1.0})
    config.save_pretrained(tmp_path)
    assert PyramidCLIPConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert PyramidCLIPVisionConfig.from_pretrained(tmp_path).to_dict() == config.vision_config.to_dict()
    assert PyramidCLIPTextConfig.from_pretrained(tmp_path).to_dict() == config.text_config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["loss_weights"] == {"global_caption": 1.0}


def test_towers_follow_the_projection_dim():
    config = PyramidCLIPConfig(projection_dim=24)
    assert config.text_config.projection_dim == config.vision_config.projection_dim == 24


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: PyramidCLIPConfig.from_dict(CLIPConfig().to_dict()),
            "configuration is of the kind 'clip', expected 'pyramidclip'",
        ),
        (lambda: PyramidCLIPConfig(projektion_dim=3), "no field projektion_dim .did you mean projection_dim"),
        (lambda: PyramidCLIPTextConfig(poolin="max"), "no field poolin .did you mean pooling"),
        (lambda: PyramidCLIPConfig(vision_config={"imagesize": 32}), "no field imagesize .did you mean image_size"),
        (lambda: PyramidCLIPTextConfig(hidden_size=32, num_attention_heads=5), "text_config: num_attention_heads"),
        (lambda: PyramidCLIPVisionConfig(hidden_size=32, num_attention_heads=5), "vision_config: num_attention_heads"),
        (lambda: PyramidCLIPVisionConfig(image_size=30, patch_size=8), r"image_size \(30\) .* patch_size \(8\)"),
        (lambda: PyramidCLIPVisionConfig(tower="resnet", image_size=100), r"image_size \(100\)"),
        (lambda: PyramidCLIPVisionConfig(tower="resnet", layers=(1, 2)), "layers must hold four"),
        (lambda: PyramidCLIPVisionConfig(tower="resnet", hidden_size=64), "hidden_size = 32"),
        (lambda: PyramidCLIPVisionConfig(tower="resnet", num_leff_layers=1), "num_leff_layers"),
        (lambda: PyramidCLIPVisionConfig(num_leff_layers=13), "num_leff_layers"),
        (lambda: PyramidCLIPVisionConfig(tower="resnet", num_picture_layers=1), "num_picture_layers is for the ViT"),
        (lambda: PyramidCLIPVisionConfig(num_picture_layers=8), r"num_picture_layers \(8\) .* num_leff_layers \(9\)"),
        (lambda: PyramidCLIPVisionConfig(num_picture_layers=13), r"num_picture_layers \(13\) .*num_hidden_layers"),
        (lambda: PyramidCLIPVisionConfig(roi_feature_size=0), "roi_feature_size"),
        (lambda: PyramidCLIPTextConfig(eos_token_id=49408), "eos_token_id"),
        (lambda: PyramidCLIPTextConfig(pad_token_id=None), "pad_token_id"),
        (lambda: PyramidCLIPTextConfig(pooling="mean"), "pooling"),
        (lambda: PyramidCLIPConfig(loss_weights={"global": 1.0}), "unknown terms"),
        (lambda: PyramidCLIPConfig(loss_weights={"global_caption": 10**400}), "must be finite"),
        (lambda: PyramidCLIPConfig(loss_weights={"global_caption": "much"}), "must be finite .*'much'"),
        (lambda: PyramidCLIPConfig(label_smoothing=1.0), "label_smoothing"),
        (lambda: PyramidCLIPConfig(projection_dim=0), "projection_dim"),
    ],
)
def test_wrong_values_are_refused_by_name(build, message):
    with pytest.raises(Exception, match=message) as caught:
        build()
    # transformers raises its own class for a failed check, from the ValueError that names the field.
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, (ValueError, TypeError))
