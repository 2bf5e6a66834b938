"""The picture tower as a backbone: the same numbers, from any saved model, in detectors of transformers."""

import pytest
import torch
from torch import nn
from transformers import AutoBackbone, AutoConfig, DetrConfig, DetrForObjectDetection

from pyramidclip_hf import (
    PyramidCLIPBackbone,
    PyramidCLIPBackboneConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPVisionModel,
    PyramidCLIPVisionModelWithProjection,
)
from pyramidclip_hf.hub import export_remote_code
from pyramidclip_hf.modeling_pyramidclip_resnet import resize_position_table
from tests.pyramidclip_hf.tiny import BOTH, TOWERS, tiny


def pixels(height, width, seed=0):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@BOTH
def test_maps_are_those_that_the_tower_computes(tower, tmp_path):
    """Compared with what hooks catch in the tower of the whole model, at another size than it was made for."""
    model = tiny(tower)
    model.save_pretrained(tmp_path)
    names = ["stem", "stage2", "stage3"]
    backbone = PyramidCLIPBackbone.from_pretrained(tmp_path, out_features=names)
    pictures = pixels(48, 96)
    vision = model.vision_model
    caught = []
    if tower == "vit":
        layers = [vision.pre_layernorm, *vision.encoder.layers]
    else:
        layers = [vision.trunk.stem, *vision.trunk.stages]
    hooks = [layer.register_forward_hook(lambda module, given, out: caught.append(out)) for layer in layers]
    if tower == "vit":
        vision(pictures, interpolate_pos_encoding=True)
        caught = [one[:, 1:].reshape(2, 6, 12, -1).movedim(3, 1) for one in caught]
    else:
        vision.trunk(pictures)
    for hook in hooks:
        hook.remove()
    found = backbone(pictures).feature_maps
    wanted = [caught[0], caught[2], caught[3]]
    assert len(found) == 3 and all(torch.equal(one, other) for one, other in zip(found, wanted))
    assert backbone.channels == [one.shape[1] for one in found]
    assert [(48 // stride, 96 // stride) for stride in backbone.strides] == [tuple(one.shape[2:]) for one in found]


@torch.no_grad()
def test_positions_of_a_vit_are_interpolated(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    backbone = PyramidCLIPBackbone.from_pretrained(tmp_path, out_features=["stem"])
    table = model.vision_model.embeddings.position_embedding.weight
    patches = model.vision_model.embeddings.patch_embedding(pixels(40, 24)).flatten(2).transpose(1, 2)
    wanted = backbone.pre_layernorm(patches + resize_position_table(table, 5, 3)[1:]).transpose(1, 2)
    torch.testing.assert_close(backbone(pixels(40, 24)).feature_maps[0].flatten(2), wanted)


@BOTH
@pytest.mark.parametrize("kind", ["dual", "classifier", "tower", "projected", "itself"])
def test_any_saved_model_is_a_backbone(tower, kind, tmp_path, caplog):
    model = tiny(tower)
    saved = {
        "dual": lambda: model,
        "classifier": lambda: PyramidCLIPForImageClassification(model.config),
        "tower": lambda: PyramidCLIPVisionModel(model.config.vision_config),
        "projected": lambda: PyramidCLIPVisionModelWithProjection(model.config.vision_config),
        "itself": lambda: PyramidCLIPBackbone(PyramidCLIPBackboneConfig(**TOWERS[tower])),
    }[kind]()
    saved.save_pretrained(tmp_path)
    backbone, info = PyramidCLIPBackbone.from_pretrained(tmp_path, output_loading_info=True)
    assert "instantiate a model of type" not in caplog.text
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    weights = saved.state_dict()
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, weights.get(name, weights.get(f"vision_model.{name}"))), name


def test_auto_classes(tmp_path):
    backbone = PyramidCLIPBackbone(PyramidCLIPBackboneConfig(**TOWERS["resnet"], out_indices=[2, 4])).eval()
    backbone.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is PyramidCLIPBackboneConfig and config.out_features == ["stage2", "stage4"]
    assert type(AutoBackbone.from_config(config)) is PyramidCLIPBackbone
    again = PyramidCLIPBackbone.from_pretrained(tmp_path)
    assert again.out_indices == [2, 4]
    assert all(map(torch.equal, again(pixels(64, 64)).feature_maps, backbone(pixels(64, 64)).feature_maps))


def test_its_code_goes_to_the_hub_with_it(tmp_path):
    written = export_remote_code(PyramidCLIPBackbone(PyramidCLIPBackboneConfig(**TOWERS["vit"])), None, tmp_path)
    assert "modeling_pyramidclip_backbone.py" in {path.name for path in written}
    assert "modeling_pyramidclip.py" not in {path.name for path in written}


@pytest.mark.parametrize("last", ["stage1", "stage3"])
@BOTH
def test_nothing_behind_the_last_map_is_computed(tower, last):
    backbone = PyramidCLIPBackbone(PyramidCLIPBackboneConfig(**TOWERS[tower], out_features=[last])).train()
    backbone(pixels(64, 64)).feature_maps[0].sum().backward()
    stages = backbone.encoder.layers if tower == "vit" else backbone.trunk.stages
    reached = [any(p.grad is not None for p in stage.parameters()) for stage in stages]
    assert reached == [number < int(last[-1]) for number in range(len(stages))]


@BOTH
def test_in_a_detector_of_transformers_all_of_it_learns(tower):
    """DETR freezes a backbone with "resnet" in the name of its type unless its parameters are named as it expects."""
    pytest.importorskip("scipy", reason="DETR matches with scipy")
    torch.manual_seed(0)
    chosen = PyramidCLIPBackboneConfig(**TOWERS[tower] | {"freeze_patch_embedding": False})
    config = DetrConfig(
        backbone_config=chosen, use_timm_backbone=False, backbone=None, use_pretrained_backbone=False, d_model=16,
        encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, num_queries=4, num_labels=3,
    )  # fmt: skip
    detector = DetrForObjectDetection(config).train()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3]])}] * 2
    detector(pixels(64, 64), labels=labels).loss.backward()
    trunk = detector.model.backbone.model
    left = [name for name, p in trunk.named_parameters() if p.grad is None and "norm" not in name]
    assert not left
    assert any(isinstance(module, nn.Conv2d) and module.weight.grad.abs().sum() > 0 for module in trunk.modules())


@BOTH
def test_wrong_pictures(tower):
    backbone = PyramidCLIPBackbone(PyramidCLIPBackboneConfig(**TOWERS[tower]))
    with pytest.raises(ValueError, match=r"non-empty \(batch_size, 3, height, width\)"):
        backbone(torch.zeros(3, 64, 64))
    with pytest.raises(ValueError, match="pixel_values must be floats of the processor, got torch.uint8"):
        backbone(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    if tower == "vit":
        with pytest.raises(ValueError, match=r"\(60 x 64\) must be multiples of the ViT's patch_size 8"):
            backbone(torch.zeros(1, 3, 60, 64))
    else:
        with pytest.raises(ValueError, match="16 x 64, smaller than one place of 32 x 32"):
            backbone(torch.zeros(1, 3, 16, 64))
        with pytest.raises(ValueError, match="has no positions"):
            backbone.resize_image_positions(64)


def test_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        PyramidCLIPBackboneConfig(**TOWERS["resnet"], out_features=["stage5"])
