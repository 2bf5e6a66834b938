"""The detector as a whole against its straightforward form, alone and in batches, saved and loaded."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig

from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor, phrases
from pyramidclip_hf.vinvl.modeling_vinvl import VinVLFrozenBatchNorm2d, align_regions
from tests.pyramidclip_hf.vinvl.plain_vinvl import plain_detect, plain_map, plain_trunk
from tests.pyramidclip_hf.vinvl.same_detections import assert_alike, tf32_off


def pixels(height, width, seed=0):
    """Blobs of some size on the scale of the image processor's output."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(1, 3, height // 8 + 1, width // 8 + 1, generator=generator)
    return 60 * torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]


def batch_of(*pictures):
    """pixel_values and image_sizes of pictures (3, h, w)."""
    sizes = torch.tensor([picture.shape[1:] for picture in pictures])
    batch = torch.zeros(len(pictures), 3, *sizes.amax(dim=0).tolist())
    for row, picture in zip(batch, pictures):
        row[:, : picture.shape[1], : picture.shape[2]] = picture
    return batch, sizes


def assert_same_detections(found, other, tolerance=1e-4):
    assert found.labels.tolist() == other.labels.tolist()
    assert found.label_names == other.label_names and found.attribute_names == other.attribute_names
    for field in ("boxes", "normalized_boxes", "scores", "features"):
        torch.testing.assert_close(getattr(found, field), getattr(other, field), rtol=tolerance, atol=tolerance)
    for scores, others in zip(found.attribute_scores, other.attribute_scores):
        torch.testing.assert_close(scores, others, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"ignore_box_regression": False},
        {"min_detections": 12, "rpn_post_nms_top_n": 30, "score_threshold": 0.9},
        {"layers": (2, 1, 1, 2), "groups": 4, "width_per_group": 8, "anchor_ratios": (0.5, 1.0), "nms_threshold": 0.1},
    ],
)
@pytest.mark.parametrize("size", [(96, 80), (61, 125)])
def test_every_output_is_the_plain_forms(model_with, overrides, size):
    model, picture = model_with(seed=2, **overrides), pixels(*size)
    found = model(picture[None], original_sizes=torch.tensor([[200, 150]])).detections[0]
    with torch.no_grad():
        expected = plain_detect(model, picture, (200, 150))
    assert len(found) >= 3 and found.labels.tolist() == expected["labels"]
    for field in ("boxes", "scores", "features"):
        torch.testing.assert_close(getattr(found, field), expected[field], rtol=1e-4, atol=1e-3)
    assert [ids.tolist() for ids in found.attribute_ids] == expected["attribute_ids"]
    for scores, expected_scores in zip(found.attribute_scores, expected["attribute_scores"]):
        assert scores.tolist() == pytest.approx(expected_scores, abs=1e-4)
    normalized = found.boxes / torch.tensor([150.0, 200, 150, 200])
    normalized = normalized.clamp(0, 1)
    normalized[:, 2:] = normalized[:, 2:].maximum(normalized[:, :2])
    torch.testing.assert_close(found.normalized_boxes, normalized)
    assert len({tuple(box) for box in found.boxes.tolist()}) > 2, "boxes that do not differ test nothing"


def test_trunk_is_torchvisions(tiny_model):
    picture = pixels(70, 97)
    with torch.no_grad():
        expected = plain_map(plain_trunk(tiny_model), picture)
        [found] = tiny_model.feature_maps(picture[None], [(70, 97)])
    assert found.shape == (1024, 5, 7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_published_map_size(model_with):
    model = model_with(stem_channels=8, layers=(1, 1, 1, 1))
    with torch.no_grad():
        [feature_map] = model.feature_maps(torch.zeros(1, 3, 600, 1000), [(600, 1000)])
    assert feature_map.shape == (128, 38, 63)


def test_norm_has_no_epsilon():
    norm = VinVLFrozenBatchNorm2d(2)
    norm.running_var.copy_(torch.tensor([1e-6, 4.0]))
    norm.running_mean.copy_(torch.tensor([0.0, 3.0]))
    norm.weight.copy_(torch.tensor([1.0, 5.0]))
    norm.bias.copy_(torch.tensor([0.0, 7.0]))
    given = torch.tensor([1e-3, 5.0]).reshape(1, 2, 1, 1)
    assert norm(given).flatten().tolist() == pytest.approx([1.0, 12.0], rel=1e-6)


@pytest.mark.parametrize(
    ("region", "expected"),
    [
        ((16, 8, 72, 80), [[11.625, 13.375], [25.125, 26.875]]),
        ((0, 0, 5, 5), [[1.75, 2.25], [4.75, 5.25]]),
    ],
)
def test_published_pooling_values(region, expected):
    config = VinVLConfig(pooler_resolution=2)
    feature_map = torch.arange(36.0).reshape(1, 6, 6)
    assert align_regions(feature_map, torch.tensor([region]).float(), config)[0, 0].tolist() == expected


def test_a_batch_gives_what_each_picture_gives_alone(tiny_model):
    pictures = [pixels(96, 80), pixels(61, 125, seed=1), pixels(96, 80, seed=2), pixels(40, 40, seed=3)]
    batch, sizes = batch_of(*pictures)
    originals = sizes * 2
    together = tiny_model(batch, sizes, originals).detections
    for picture, original, found in zip(pictures, originals, together):
        alone = tiny_model(picture[None], original_sizes=original[None]).detections[0]
        assert len(alone) >= 3
        assert_same_detections(found, alone)


def test_what_stands_in_the_padding_does_not_matter(tiny_model):
    batch, sizes = batch_of(pixels(96, 80), pixels(50, 60, seed=1))
    other = batch.clone()
    other[1, :, 50:] = 1e3
    other[1, :, :, 60:] = -1e3
    for found, expected in zip(tiny_model(other, sizes).detections, tiny_model(batch, sizes).detections):
        assert_same_detections(found, expected, tolerance=0)


def test_features_are_the_proposals_even_where_boxes_are_regressed(model_with):
    picture = pixels(96, 80)
    regressed = model_with(ignore_box_regression=False)
    output = regressed(picture[None])
    found, proposals = output.detections[0], output.proposals[0]
    with torch.no_grad():
        [feature_map] = regressed.feature_maps(picture[None], [(96, 80)])
        features = regressed.roi_head.pool(feature_map, proposals)
    nearest = torch.cdist(found.features, features).argmin(dim=1)
    torch.testing.assert_close(found.features, features[nearest], rtol=1e-4, atol=1e-4)
    assert (found.boxes - proposals[nearest]).abs().amax() > 1
    # By default box and feature belong together.
    output = model_with()(picture[None])
    assert {tuple(box) for box in output.detections[0].boxes.tolist()} <= {
        tuple(box) for box in output.proposals[0].tolist()
    }


def test_chunks_of_regions_change_nothing(tiny_model, model_with):
    picture = pixels(96, 80)[None]
    found = model_with(roi_chunk_size=1000)(picture).detections[0]
    assert_same_detections(found, tiny_model(picture).detections[0])


def test_attributes_above_the_threshold_only(tiny_model, model_with):
    """Softmax over all attributes, "no attribute" removed without sharing out its part, 0.05 not enough."""
    model = model_with(max_attributes_per_object=8)
    probabilities = torch.tensor([0.30, 0.05, 0.25, 0.0501, 0.04, 0.0999, 0.20, 0.009, 0.001])
    head = model.attribute_head
    with torch.no_grad():
        head.attr_score.weight.zero_()
        head.attr_score.bias.copy_((probabilities / probabilities.sum()).log())
    features = torch.rand(2, model.config.feature_size)
    with torch.no_grad():
        ids, scores = model._attributes(features, torch.tensor([1, 2]))
    assert [row.tolist() for row in ids] == [[2, 6, 5, 3]] * 2
    assert scores[0].tolist() == pytest.approx([0.25, 0.20, 0.0999, 0.0501], abs=1e-6)
    # The tiny model keeps three.
    found = tiny_model(pixels(96, 80)[None]).detections[0]
    assert {len(row) for row in found.attribute_ids} - {0} and max(map(len, found.attribute_ids)) <= 3
    for row, names in zip(found.attribute_ids, found.attribute_names):
        assert names == [f"ATTRIBUTE_{i}" for i in row.tolist()] and 0 not in row.tolist()


def test_no_detection_is_an_empty_result_of_the_right_shapes(model_with):
    found = model_with(min_detections=0, score_threshold=1.1)(pixels(64, 48)[None]).detections[0]
    assert len(found) == 0
    assert found.boxes.shape == found.normalized_boxes.shape == (0, 4)
    assert found.features.shape == (0, 2048) and found.features.dtype == torch.float32
    assert found.scores.shape == found.labels.shape == (0,) and found.labels.dtype == torch.int64
    assert found.label_names == found.attribute_ids == found.attribute_scores == found.attribute_names == []
    assert phrases(found, VinVLConfig()) == []
    # Regressed boxes take the other way through the code.
    regressed = model_with(min_detections=0, score_threshold=1.1, ignore_box_regression=False)
    assert regressed(pixels(64, 48)[None]).detections[0].features.shape == (0, 2048)
    # A smallest side that no proposal reaches leaves none to choose from.
    assert len(model_with(rpn_min_size=1000)(pixels(64, 48)[None]).detections[0]) == 0


def test_boxes_of_less_than_a_pixel_are_not_upside_down_when_normalised(model_with):
    model = model_with()
    with torch.no_grad():
        model.rpn.bbox_pred.bias.copy_(torch.tensor([0.0, 0, -6, -6]).repeat(model.config.num_anchors))
    found = model(pixels(96, 80)[None]).detections[0]
    assert (found.boxes[:, 2:] < found.boxes[:, :2]).any()
    assert (found.normalized_boxes[:, 2:] >= found.normalized_boxes[:, :2]).all()


def test_a_picture_of_one_pixel(tiny_model):
    found = tiny_model(torch.zeros(1, 3, 1, 1)).detections[0]
    assert len(found) >= 1 and torch.isfinite(found.features).all()


def test_not_a_number_is_named(tiny_model):
    batch, sizes = batch_of(pixels(64, 48), pixels(64, 64))
    batch[1, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="picture 1 of the batch"):
        tiny_model(batch, sizes)


@pytest.mark.parametrize(
    ("sizes", "originals", "message"),
    [
        ([[64, 48]], None, "one size a picture"),
        ([[64, 48], [65, 48]], None, "do not lie within"),
        ([[64, 48], [0, 48]], None, "do not lie within"),
        ([[64, 48], [64, 48]], [[1, 1]], "one size a picture"),
    ],
)
def test_sizes_must_fit(tiny_model, sizes, originals, message):
    originals = originals and torch.tensor(originals)
    with pytest.raises(ValueError, match=message):
        tiny_model(torch.zeros(2, 3, 64, 48), torch.tensor(sizes), originals)
    with pytest.raises(ValueError, match="pixel_values"):
        tiny_model(torch.zeros(3, 64, 48))


def test_saved_and_loaded_it_is_the_same(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    loaded, info = VinVLForObjectAttributeDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()) and not loaded.training
    assert isinstance(AutoConfig.from_pretrained(tmp_path), VinVLConfig)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    picture = pixels(64, 80)[None]
    assert_same_detections(loaded(picture).detections[0], tiny_model(picture).detections[0], tolerance=0)


def test_missing_weights_are_initialised_not_left_over(tiny_model, tmp_path):
    state = {name: tensor for name, tensor in tiny_model.state_dict().items() if "roi_head" not in name}
    tiny_model.save_pretrained(tmp_path, state_dict=state)
    loaded = VinVLForObjectAttributeDetection.from_pretrained(tmp_path)
    assert 0.009 < loaded.roi_head.cls_score.weight.std() < 0.011 and not loaded.roi_head.cls_score.bias.any()
    assert torch.equal(loaded.roi_head.layer4[0].bn1.running_var, torch.ones(64))
    assert torch.equal(loaded.rpn.conv.weight, tiny_model.rpn.conv.weight)


def test_new_models_keep_numbers_of_order_one():
    torch.manual_seed(0)
    config = VinVLConfig(groups=2, width_per_group=4, stem_channels=8, num_labels=12, num_attributes=9)
    model = VinVLForObjectAttributeDetection(config).eval()
    with torch.no_grad():
        [feature_map] = model.feature_maps(pixels(96, 128)[None], [(96, 128)])
    assert 0.1 < feature_map.std() < 30
    assert model(pixels(96, 128)[None]).proposals[0][:, :2].std() > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(tiny_model, tmp_path, dtype):
    tiny_model.save_pretrained(tmp_path)
    model = VinVLForObjectAttributeDetection.from_pretrained(tmp_path, dtype=dtype)
    found = model(pixels(96, 80)[None]).detections[0]
    assert found.features.dtype == dtype and found.boxes.dtype == found.scores.dtype == torch.float32
    if dtype == torch.float64:
        found.features = found.features.float()
        assert_same_detections(found, tiny_model(pixels(96, 80)[None]).detections[0], tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives(model_with):
    batch, sizes = batch_of(pixels(96, 80), pixels(61, 125, seed=1))
    for overrides in ({}, {"ignore_box_regression": False}):
        model = model_with(**overrides)
        expected = model(batch, sizes).detections
        with tf32_off():
            found = model.cuda()(batch.cuda(), sizes.cuda()).detections
        for one, other in zip(found, expected):
            assert_alike(one, other)


def test_processor_and_model_fit_together(tiny_model):
    from PIL import Image

    pictures = [Image.linear_gradient("L").resize((90, 70)), Image.radial_gradient("L").resize((50, 80))]
    inputs = VinVLImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})(pictures, return_tensors="pt")
    output = tiny_model(**inputs)
    for picture, found in zip(pictures, output.detections):
        assert 3 <= len(found) <= 15
        assert (found.boxes >= 0).all()
        assert (found.boxes <= torch.tensor([picture.width, picture.height] * 2)).all()
        assert ((found.normalized_boxes >= 0) & (found.normalized_boxes <= 1)).all()
        assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert output.to_tuple() == (output.detections, output.proposals)


def test_without_torchvision_only_the_model_fails():
    program = """
import sys
sys.modules["torchvision"] = None
from pyramidclip_hf.vinvl import VinVLConfig, VinVLForObjectAttributeDetection, VinVLImageProcessor
import numpy as np
print(VinVLImageProcessor()(np.zeros((60, 60, 3), np.uint8))["pixel_values"].shape)
try:
    VinVLForObjectAttributeDetection(VinVLConfig(layers=(1, 1, 1, 1), stem_channels=8))
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "(1, 3, 600, 600)" in done.stdout and 'pip install "pyramidclip-hf[vinvl]"' in done.stdout
