"""Anchors, decoding, overlaps and the suppression, against published numbers and torchvision's operators."""

from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_iou

from pyramidclip_hf.vinvl import boxes_vinvl
from pyramidclip_hf.vinvl.boxes_vinvl import (
    box_overlaps,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    grid_anchors,
    select_detections,
    suppress_per_class,
)
from tests.pyramidclip_hf.vinvl.plain_vinvl import plain_anchor_table, plain_decode, plain_selection, plain_suppression

RELEASED_ANCHORS = [
    (-15, -4, 30, 19), (-38, -16, 53, 31), (-84, -40, 99, 55), (-176, -88, 191, 103), (-360, -184, 375, 199),
    (-8, -8, 23, 23), (-24, -24, 39, 39), (-56, -56, 71, 71), (-120, -120, 135, 135), (-248, -248, 263, 263),
    (-3, -14, 18, 29), (-14, -36, 29, 51), (-36, -80, 51, 95), (-80, -168, 95, 183), (-168, -344, 183, 359),
]  # fmt: skip


def random_boxes(*shape, seed=0, extent=300.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, generator=generator) * extent
    return torch.cat([corners, corners + torch.rand(*shape, 2, generator=generator) * extent], dim=-1)


def random_probabilities(boxes, classes, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(boxes, classes, generator=generator)).softmax(dim=1)


def test_anchors_are_the_released_table():
    assert cell_anchors((32, 64, 128, 256, 512), (0.5, 1, 2)) == RELEASED_ANCHORS


def test_anchors_of_other_sizes_round_before_scaling():
    sizes, ratios = (24, 40, 100), (0.3, 0.8, 3)
    assert torch.tensor(cell_anchors(sizes, ratios)).allclose(torch.tensor(plain_anchor_table(sizes, ratios)).float())


def test_grid_goes_by_row_column_anchor():
    grid = grid_anchors([(0, 0, 15, 15), (-8, -8, 23, 23)], height=2, width=3)
    assert grid.shape == (12, 4)
    # Row 1, column 2, second anchor.
    assert grid[(1 * 3 + 2) * 2 + 1].tolist() == [24, 8, 55, 39]
    assert grid[1 * 2].tolist() == [16, 0, 31, 15]


@pytest.mark.parametrize(
    ("box", "deltas", "weights", "expected"),
    [
        ((10, 20, 109, 219), (1, -1, 0.5, -0.5), (10, 10, 5, 5), (14.741454, 9.516258, 124.258546, 189.483742)),
        ((-8, -8, 23, 23), (0.1, -0.2, 0.3, -0.4), (1, 1, 1, 1), (-10.397741, -9.125121, 31.797741, 11.325121)),
        ((3, 5, 40, 77), (0, 0, 0, 0), (10, 10, 5, 5), (3, 5, 40, 77)),
        # Sides grow by 1000 / 16 at most.
        ((0, 0, 15, 15), (0, 0, 50, 50), (1, 1, 1, 1), (-492, -492, 507, 507)),
    ],
)
def test_decoding(box, deltas, weights, expected):
    decoded = decode_boxes(torch.tensor([deltas]), torch.tensor([box]).float(), weights)
    assert decoded[0].tolist() == pytest.approx(expected, abs=2e-5, rel=1e-6)


def test_decoding_per_class_uses_four_numbers_a_class():
    boxes, deltas = random_boxes(5), torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    decoded = decode_boxes(deltas.unflatten(1, (3, 4)), boxes[:, None], (10, 10, 5, 5))
    for i in range(5):
        for label in range(3):
            expected = plain_decode(deltas[i, 4 * label : 4 * label + 4].tolist(), boxes[i].tolist(), (10, 10, 5, 5))
            assert decoded[i, label].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_clipping_ends_at_the_last_pixel():
    clipped = clip_boxes(torch.tensor([[-3.0, -4.0, 900.0, 700.0], [1.0, 2.0, 3.0, 4.0]]), height=600, width=800)
    assert clipped.tolist() == [[0, 0, 799, 599], [1, 2, 3, 4]]


def test_overlaps_are_torchvisions():
    boxes, others = random_boxes(9), random_boxes(7, seed=1)
    assert torch.equal(box_overlaps(boxes[:, None], others[None]), box_iou(boxes, others))
    point = torch.zeros(1, 4)
    assert not (box_overlaps(point, point) > 0).any()


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("levels", [None, 8])
def test_suppression_is_one_nms_a_class(per_class, levels):
    boxes = random_boxes(60, 25) if per_class else random_boxes(60)
    probabilities = random_probabilities(60, 25, spread=1)
    if levels:  # many ties
        probabilities = (probabilities * 25 * levels).ceil() / (25 * levels)
    kept = suppress_per_class(probabilities, boxes, 0.3)
    assert torch.equal(kept, plain_suppression(probabilities, boxes, 0.3))
    assert 0.1 < kept.float().mean() < 0.9


def test_pairs_above_the_floor_are_decided_as_without_one():
    boxes, probabilities = random_boxes(60), random_probabilities(60, 25, spread=2)
    everything, some = (suppress_per_class(probabilities, boxes, 0.3, floor) for floor in (0.0, 0.05))
    above = probabilities >= 0.05
    assert torch.equal(some, everything & above)
    assert (everything & ~above).any()


def test_threshold_is_compared_in_double_precision():
    # Two boxes that overlap by float32(0.3), a little more than 0.3: 3 of 10 pixels.
    boxes, probabilities = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]]), torch.tensor([[0.6], [0.4]])
    assert torch.equal(suppress_per_class(probabilities, boxes, 0.3), plain_suppression(probabilities, boxes, 0.3))


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(
    ("spread", "least", "most"), [(0.01, 10, 100), (1, 10, 100), (3, 10, 100), (6, 10, 20), (6, 10, 10), (6, 0, 5)]
)
def test_selection_is_filter_1(spread, least, most, per_class):
    boxes = random_boxes(80, 51) if per_class else random_boxes(80)
    probabilities = random_probabilities(80, 51, spread)
    config = SimpleNamespace(nms_threshold=0.3, score_threshold=0.2, min_detections=least, max_detections=most)
    chosen, scores, labels = select_detections(probabilities, boxes, config)
    expected = plain_selection(probabilities, boxes, 0.3, 0.2, least, most)
    assert (chosen.tolist(), scores.tolist(), labels.tolist()) == expected
    assert (labels > 0).all()


def test_selection_looks_at_less_likely_pairs_until_there_are_enough(monkeypatch):
    # Everyone overlaps everyone and all prefer one class, so each further detection needs a less likely class.
    boxes = 100 + random_boxes(40, extent=1.0) * torch.tensor([1.0, 1, 100, 100])
    probabilities = random_probabilities(40, 81, spread=0.2)
    probabilities[:, 1:31] *= 3
    probabilities /= probabilities.sum(dim=1, keepdim=True)
    floors = []

    def counted(probabilities, boxes, threshold, floor):
        floors.append(floor)
        return suppress_per_class(probabilities, boxes, threshold, floor)

    monkeypatch.setattr(boxes_vinvl, "suppress_per_class", counted)
    config = SimpleNamespace(nms_threshold=0.3, score_threshold=0.2, min_detections=35, max_detections=100)
    chosen, scores, labels = select_detections(probabilities, boxes, config)
    expected = plain_selection(probabilities, boxes, 0.3, 0.2, 35, 100)
    assert (chosen.tolist(), scores.tolist(), labels.tolist()) == expected
    assert len(floors) == 2 and floors[1] == 0


def test_selection_of_nothing():
    config = SimpleNamespace(nms_threshold=0.3, score_threshold=0.2, min_detections=10, max_detections=100)
    chosen, scores, labels = select_detections(torch.zeros(0, 5), torch.zeros(0, 4), config)
    assert len(chosen) == len(scores) == len(labels) == 0
    certain_background = torch.tensor([[1.0, 0, 0], [1.0, 0, 0]])
    assert not len(select_detections(certain_background, random_boxes(2), config)[0])
