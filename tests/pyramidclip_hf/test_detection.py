"""The detector: equal to torchvision's from the same parts, its own rules against plain forms, its refusals."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

pytest.importorskip("torchvision", reason="the detector is made of torchvision's parts")

import torchvision
from huggingface_hub.errors import StrictDataclassClassValidationError
from torchvision.models.detection import image_list, roi_heads, rpn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from transformers import AutoModelForObjectDetection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pyramidclip_hf.configuration_detection import PyramidCLIPDetectionConfig
from pyramidclip_hf.modeling_detection import (
    Objects,
    PyramidCLIPForObjectDetection,
    grid_anchors,
    normalised,
    sampled,
    scaled_size,
)

TOWER = {"tower": "resnet", "image_size": 64, "layers": (1, 1, 1, 1), "width": 4, "num_attention_heads": 4}
SIZES = {"anchor_sizes": [16, 32], "roi_size": 8, "roi_samples": 16, "rpn_samples": 32, "num_labels": 3,
         "train_proposals": [100, 30], "test_proposals": [100, 20], "short_side": 64, "long_side": 128}  # fmt: skip


def tiny(**changes):
    torch.manual_seed(0)
    model = PyramidCLIPForObjectDetection(PyramidCLIPDetectionConfig(vision_config=TOWER, **SIZES | changes))
    for layer in (model.regions.box_predictor.cls_score, model.regions.box_predictor.bbox_pred, model.proposals.head):
        for weight in layer.parameters():  # as drawn, everything is found everywhere
            nn.init.normal_(weight, std=0.3 if weight.dim() < 4 else 0.05)
    return model


def targets(masks=False):
    boxes = [torch.tensor([[3.0, 5, 40, 44], [20, 10, 60, 60]]), torch.tensor([[8.0, 8, 30, 50]])]
    labels = [torch.tensor([2, 0]), torch.tensor([1])]
    made = [torch.zeros(len(one), 64, 64) for one in boxes]
    for mask, some in zip(made, boxes):
        for one, (x1, y1, x2, y2) in zip(mask, some.int().tolist()):
            one[y1:y2, x1:x2] = 1
    return [Objects(box, label, mask if masks else None) for box, label, mask in zip(boxes, labels, made)]


class Trunk(nn.Module):
    out_channels = 64

    def __init__(self, model):
        super().__init__()
        self.trunk = model.trunk

    def forward(self, pixels):
        return {"0": self.trunk.maps(pixels, 3)[-1]}


class Pool(nn.Module):
    def forward(self, features, boxes, sizes):
        return torchvision.ops.roi_align(features["0"], boxes, (8, 8), 1 / 16, -1, True)


class Head(nn.Module):
    def __init__(self, model, mean):
        super().__init__()
        self.model, self.mean = model, mean

    def forward(self, pooled):
        maps = self.model.extra_norm(self.model.trunk.stages[3](pooled))
        return maps.mean((2, 3)) if self.mean else maps


def torchvision_of(model):
    """torchvision's own R-CNN around the same weights, with exact anchors and aligned pooling."""
    config = model.config
    anchors = AnchorGenerator((tuple(config.anchor_sizes),), (tuple(config.anchor_ratios),))
    exact = grid_anchors(config, 1, 1)
    anchors.cell_anchors = [exact]
    limits = [dict(zip(("training", "testing"), pair)) for pair in zip(config.train_proposals, config.test_proposals)]
    proposals = rpn.RegionProposalNetwork(anchors, model.proposals.head, 0.7, 0.3, 10_000, 1.0, *limits, 0.7)
    proposals.min_size = 0.0
    heads = roi_heads.RoIHeads(
        Pool(), Head(model, True), model.regions.box_predictor, 0.5, 0.5, 10_000, 1.0, None, 0.05, 0.5, 100,
        Pool() if config.with_masks else None, Head(model, False) if config.with_masks else None,
        model.regions.mask_predictor if config.with_masks else None,
    )  # fmt: skip
    resize = GeneralizedRCNNTransform(64, 128, list(config.image_mean), list(config.image_std))
    return GeneralizedRCNN(Trunk(model), proposals, heads, resize)


@torch.no_grad()
@pytest.mark.parametrize("masks", [False, True])
def test_it_finds_what_torchvision_finds_with_its_parts(masks):
    model = tiny(with_masks=masks).eval()
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    (found,) = model.detect([picture])
    pixels = torch.from_numpy(noise).permute(2, 0, 1).float() / 255
    (wanted,) = torchvision_of(model).eval()([pixels])
    assert len(found.scores) == len(wanted["scores"]) > 5
    torch.testing.assert_close(found.boxes, wanted["boxes"], atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(found.scores, wanted["scores"])
    assert torch.equal(found.labels + 1, wanted["labels"])
    if masks:
        torch.testing.assert_close(found.masks, wanted["masks"][:, 0] > 0.5)


@pytest.mark.parametrize("masks", [False, True])
def test_losses_are_torchvisions_with_plain_l1_and_other_divisors(masks, monkeypatch):
    """Where everything is sampled; the mask branch of torchvision pools and runs its head a second time."""
    everything = {"rpn_samples": 10_000, "rpn_positive": 1.0, "roi_samples": 10_000, "roi_positive": 1.0}
    model = tiny(with_masks=masks, **everything).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else the second run sees other statistics
            module.requires_grad_(False)
    model.train()
    pixels = torch.randn(2, 3, 64, 64)
    losses = model(pixels, None, targets(masks), [3, 4])
    other = torchvision_of(model).train()
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    seen = {}

    def plain_l1(given, wanted, beta, reduction):
        seen.setdefault("rows", []).append(len(given))
        return F.l1_loss(given, wanted, reduction=reduction)

    monkeypatch.setattr(F, "smooth_l1_loss", plain_l1)
    images = image_list.ImageList(pixels, [(64, 64)] * 2)
    given = [{"boxes": one.boxes, "labels": one.labels + 1} | ({"masks": one.masks} if masks else {})
             for one in targets(masks)]  # fmt: skip
    features = other.backbone(pixels)
    found, first = other.rpn(images, features, given)
    _, second = other.roi_heads(features, found, images.image_sizes, given)
    anchors = 2 * 16 * 6
    chosen = sum(
        int((label >= 0).sum())
        for label in other.rpn.assign_targets_to_anchors([grid_anchors(model.config, 4, 4)] * 2, given)[0]
    )
    assert 0 < chosen <= anchors
    sums = losses.sums
    torch.testing.assert_close(sums["objectness"], first["loss_objectness"] * chosen, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums["rpn_box"], first["loss_rpn_box_reg"] * chosen, rtol=1e-4, atol=1e-4)
    means = losses.means()
    torch.testing.assert_close(means["classification"], second["loss_classifier"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(means["box"], second["loss_box_reg"], rtol=1e-4, atol=1e-4)
    assert losses.counts["rpn_box"] == 20_000
    if masks:
        torch.testing.assert_close(means["mask"], second["loss_mask"], rtol=1e-4, atol=1e-4)


def test_anchors_are_exact():
    config = PyramidCLIPDetectionConfig(vision_config=TOWER, anchor_sizes=[32], anchor_ratios=[0.5, 2.0])
    anchors = grid_anchors(config, 2, 3).view(2, 3, 2, 4)
    half = [32 * math.sqrt(2) / 2, 32 / math.sqrt(2) / 2]
    torch.testing.assert_close(anchors[0, 0, 0], torch.tensor([-half[0], -half[1], half[0], half[1]]))
    torch.testing.assert_close(anchors[1, 2, 1] - anchors[0, 0, 1], torch.tensor([32.0, 16, 32, 16]))


def test_samples_depend_on_their_seed_alone():
    labels = torch.tensor([1, 1, 0, -1] * 30)
    positive, negative = sampled(labels, 40, 0.25, seed=5, what=0)
    assert (
        len(positive) == 10 and len(negative) == 30 and (labels[positive] == 1).all() and (labels[negative] == 0).all()
    )
    torch.manual_seed(1)
    again = sampled(labels, 40, 0.25, seed=5, what=0)
    assert torch.equal(again[0], positive) and torch.equal(again[1], negative)
    assert not torch.equal(sampled(labels, 40, 0.25, seed=5, what=1)[1], negative)
    few = sampled(torch.tensor([1, 0, 0]), 40, 0.25, 0, 0)
    assert [len(one) for one in few] == [1, 2]


def test_all_of_it_learns_and_nothing_is_counted_twice():
    model = tiny(with_masks=True).train()
    before = int(model.trunk.stages[3].layers[0].norm1.num_batches_tracked)
    losses = model(torch.randn(2, 3, 64, 64), torch.tensor([[64, 64], [50, 60]]), targets(True), [1, 2])
    sum(losses.means().values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert int(model.trunk.stages[3].layers[0].norm1.num_batches_tracked) == before + 1


def test_pictures_without_objects_and_a_batch_without_any():
    model = tiny(with_masks=True).train()
    none = Objects(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 64, 64))
    for given in ([targets(True)[0], none], [none, none]):
        losses = model(torch.randn(2, 3, 64, 64), None, given, [1, 2])
        loss = sum(losses.means().values())
        loss.backward()
        assert loss.isfinite()


def test_saved_and_loaded(tmp_path):
    model = tiny(with_masks=True).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert type(again) is PyramidCLIPForObjectDetection and again.config.num_labels == 3
    picture = Image.new("RGB", (90, 70), (200, 10, 90))
    first, second = model.detect([picture])[0], again.detect([picture])[0]
    assert torch.equal(first.boxes, second.boxes) and torch.equal(first.masks, second.masks)
    assert first.masks.shape[1:] == (70, 90) and first.boxes[:, 2].max() <= 90


def test_initial_weights_are_detectron2s():
    torch.manual_seed(0)
    config = PyramidCLIPDetectionConfig(vision_config=TOWER, num_labels=300, with_masks=True)
    model = PyramidCLIPForObjectDetection(config)
    predictor, masks = model.regions.box_predictor, model.regions.mask_predictor
    assert predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.05)
    assert model.proposals.head.conv[0][0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert masks.mask_fcn_logits.weight.std().item() == pytest.approx(0.001, rel=0.05)
    biases = [predictor.cls_score, predictor.bbox_pred, model.proposals.head.cls_logits, masks.conv5_mask]
    assert all(layer.bias.abs().max() == 0 for layer in biases)


def test_sizes_are_detectron2s():
    assert scaled_size(500, 375, 800, 1333) == (1067, 800)
    assert scaled_size(1000, 200, 800, 1333) == (1333, 267)
    config = PyramidCLIPDetectionConfig(vision_config=TOWER)
    grey = normalised(Image.new("RGB", (3, 2), (255, 0, 51)), config)
    wanted = [(value - mean) / std for value, mean, std in zip((1, 0, 0.2), OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)]
    torch.testing.assert_close(grey[:, 1, 2], torch.tensor(wanted))


def test_what_it_refuses():
    with pytest.raises(StrictDataclassClassValidationError, match=r"a vit tower has none. A ViT is a backbone"):
        PyramidCLIPDetectionConfig(vision_config={"tower": "vit"})
    with pytest.raises(StrictDataclassClassValidationError, match="roi_size must be even"):
        PyramidCLIPDetectionConfig(vision_config=TOWER, roi_size=7)
    model = tiny(with_masks=True)
    with pytest.raises(ValueError, match="needs targets"):
        model.train()(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ValueError, match="has a mask head, and targets have no masks"):
        model(torch.zeros(2, 3, 64, 64), None, targets(), [0, 1])
    with pytest.raises(ValueError, match="needs evaluation mode"):
        model.detect([])
    with pytest.raises(ValueError, match="a picture of 400 x 4 becomes 128 x 1"):
        model.eval().detect([Image.new("RGB", (400, 4))])
