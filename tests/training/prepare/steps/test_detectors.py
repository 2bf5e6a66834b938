"""`steps/detectors.py` with tiny detectors of each kind, made with random weights."""

import numpy as np
import pytest
import torch
from PIL import Image

from training.prepare.steps import detectors
from training.prepare.steps.detectors import open_detector, prompted_name, queries_of
from training.prepare.steps.flags import DetectorArguments
from training.prepare.steps.regions import Detections

pytest.importorskip("torchvision")
pytest.importorskip("torchvision")


def pil(number=0, size=(64, 48)):
    return Image.fromarray(np.random.default_rng(number).integers(0, 255, (size[1], size[0], 3), np.uint8))


@pytest.fixture
def vocabulary(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\ntree\nsky\n")
    (tmp_path / "attributes.txt").write_text("red\nbig\nstriped\n")
    return {"names": str(tmp_path / "names.txt"), "attributes": str(tmp_path / "attributes.txt")}


def check_detections(found, width):
    assert found.boxes.min() >= 0 and found.boxes.max() <= 1 and found.features.shape == (len(found), width)
    assert all(isinstance(label, str) and label for label in found.labels)


def test_vinvl_provider_gives_what_the_model_gives(checkpoint):
    from pyramidclip_hf.vinvl import VinVLForObjectAttributeDetection, VinVLImageProcessor, phrases

    provider = open_detector(DetectorArguments(checkpoint("vinvl"), top=4))
    pictures = [pil(0), pil(1, (50, 90))]
    model = VinVLForObjectAttributeDetection.from_pretrained(checkpoint("vinvl"))
    processor = VinVLImageProcessor.from_pretrained(checkpoint("vinvl"))
    for found, image in zip(provider.detect(pictures), pictures):
        (expected,) = model(**processor([image], return_tensors="pt")).detections
        check_detections(found, provider.feature_size)
        # Rows of equal score may come in another order in a batch; each region has its own features.
        assert len(found) == 4 and found.labels == expected.label_names[:4]
        np.testing.assert_allclose(found.scores, expected.scores[:4], atol=1e-5)
        np.testing.assert_allclose(found.boxes, expected.normalized_boxes[:4], atol=1e-4)
        np.testing.assert_allclose(found.features, expected.features[:4], rtol=1e-3, atol=1e-3)
        assert [" ".join([*a, n]) for a, n in zip(found.attributes, found.labels)] == phrases(expected, model.config)[
            :4
        ]
    assert provider.made_by["maker"] == "vinvl" and provider.made_by["settings"]["top"] == 4


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_boxes_are_traced_to_their_queries(checkpoint, kind):
    provider = open_detector(DetectorArguments(checkpoint(kind), features="queries", score_threshold=0.0))
    inputs = provider.processor(images=[pil(0), pil(1)], return_tensors="pt")
    with torch.no_grad():
        outputs = provider.model(**inputs)
    before = outputs.pred_boxes.clone()
    post_process = provider.processor.post_process_object_detection
    found = post_process(outputs, threshold=0.0)
    queries = queries_of(outputs, post_process, 0.0)
    assert torch.equal(outputs.pred_boxes, before)
    for i, (result, query) in enumerate(zip(found, queries)):
        x, y, w, h = outputs.pred_boxes[i, query].unbind(-1)
        expected = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)
        torch.testing.assert_close(result["boxes"], expected)
        assert len(query) == outputs.logits.shape[1]
    states = detectors.query_states(outputs, provider.model)
    detections = provider.detect([pil(0), pil(1)])
    for i, one in enumerate(detections):
        check_detections(one, 16)
        distance = torch.cdist(torch.tensor(one.features), states[i]).min(1)
        assert distance.values.max() < 1e-5 and len(set(distance.indices.tolist())) == len(one)


@pytest.mark.parametrize("kind", ["detr", "rt_detr"])
def test_backbone_features_are_means_under_the_box(checkpoint, kind):
    provider = open_detector(DetectorArguments(checkpoint(kind), score_threshold=0.0))
    (found,) = provider.detect([pil(0)])
    check_detections(found, 24)
    assert provider.feature_size == 24

    # A map that holds its own coordinates: the mean under a box is the box's centre.
    def coordinates(width, height):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        return torch.stack([x, y])[None]

    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.2, 0.3, 0.6, 0.9]])
    provider.maps[:] = [coordinates(40, 30)]
    centres = provider._pooled(0, boxes, {})
    torch.testing.assert_close(centres, torch.tensor([[0.5, 0.5], [0.4, 0.6]]), atol=1e-3, rtol=0)
    # In a padded batch the picture fills the top left.
    mask = torch.zeros(1, 60, 80)
    mask[:, :60, :40] = 1
    centres = provider._pooled(0, boxes, {"pixel_mask": mask})
    torch.testing.assert_close(centres, torch.tensor([[0.25, 0.5], [0.2, 0.6]]), atol=1e-3, rtol=0)


def test_feature_size_chooses_the_map(checkpoint):
    provider = open_detector(DetectorArguments(checkpoint("rt_detr"), feature_size=16, score_threshold=0.0))
    assert provider.detect([pil(0)])[0].features.shape[1] == 16
    provider = open_detector(DetectorArguments(checkpoint("rt_detr"), feature_size=2048, score_threshold=0.0))
    with pytest.raises(ValueError, match=r"no feature map of 2048 channels: the backbone gives \[12, 16, 24\]"):
        provider.detect([pil(0)])


def test_yolos_has_queries_only(checkpoint):
    with pytest.raises(ValueError, match="--features queries"):
        open_detector(DetectorArguments(checkpoint("yolos")))
    provider = open_detector(DetectorArguments(checkpoint("yolos"), features="queries", score_threshold=0.0))
    (found,) = provider.detect([pil(0)])
    check_detections(found, 16)
    assert len(found) == 6


@pytest.mark.parametrize("kind", ["owlv2", "grounding-dino"])
def test_open_vocabulary(checkpoint, vocabulary, kind):
    settings = {"score_threshold": 0.0, "attribute_threshold": 0.0, "names_per_prompt": 3, **vocabulary}
    provider = open_detector(DetectorArguments(checkpoint(kind), **settings))
    found = provider.detect([pil(0), pil(1, (48, 64))])
    for one in found:
        width = {"owlv2": 16, "grounding-dino": 32}[kind]
        assert one.features.shape == (len(one), width) and len(one) and provider.feature_size == width
        assert set(one.labels) <= {"cat", "dog", "tree", "sky", ""}
        assert set(sum(one.attributes, [])) <= {"red", "big", "striped"}
        overlaps = _overlaps(one.boxes)
        assert overlaps[~np.eye(len(one), dtype=bool)].max(initial=0) <= 0.5 + 1e-6
    assert any(words for one in found for words in one.attributes)
    assert provider.made_by["settings"]["names"] == ["cat", "dog", "tree", "sky"]
    with pytest.raises(ValueError, match="--names FILE"):
        open_detector(DetectorArguments(checkpoint(kind)))


def _overlaps(boxes):
    low, high = np.maximum(boxes[:, None, :2], boxes[None, :, :2]), np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = np.clip(high - low, 0, None).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return both / np.maximum(areas[:, None] + areas[None] - both, 1e-12)


def test_attributes_belong_to_the_region_they_overlap(checkpoint, vocabulary):
    provider = open_detector(DetectorArguments(checkpoint("owlv2"), **vocabulary))
    regions = Detections([[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]], [0.9, 0.8], ["cat", "dog"], np.zeros((2, 4)))
    boxes = [[0, 0, 0.5, 0.45], [0.5, 0.5, 1, 1], [0, 0.02, 0.5, 0.5], [0, 0, 1, 1], [0.5, 0.5, 1, 0.95]]
    answer = Detections(boxes, [0.3, 0.5, 0.7, 0.9, 0.2], ["red", "big", "striped", "big", "big"], np.zeros((5, 4)))
    assert provider._attributes(regions, answer) == [["red", "striped"], ["big"]]


def test_names_that_come_back_in_pieces():
    assert prompted_name("red cat", ["cat", "red cat"]) == "red cat"
    assert prompted_name("cat dog", ["air conditioner", "cat", "dog"]) == "cat"
    assert prompted_name("conditioner", ["air conditioner", "cat"]) == "air conditioner"
    assert prompted_name("", ["cat"]) == ""


def test_what_is_no_detector_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of the kind 'bert', which finds no objects: expected VinVL"):
        open_detector(DetectorArguments(str(tmp_path)))
