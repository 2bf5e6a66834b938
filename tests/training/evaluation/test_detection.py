"""Average precision: VOC's against an independent form and by hand, COCO's on cases that go wrong in silence."""

import math
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pycocotools", reason='needs pycocotools: pip install -e ".[detection]"')

from training.data.annotations import AnnotatedPicture, AnnotatedPictures, Annotation
from training.evaluation.detection import (
    OVERLAPS,
    Found,
    coco_scores,
    detection_results,
    measure,
    run_lengths_of,
    voc_average_precision,
    voc_scores,
)


def square(x, y, side=10, label=0, **more):
    return Annotation((x, y, x + side, y + side), label, area=float(side * side), **more)


def data_of(*pictures, names=("cat", "dog")):
    shown = [AnnotatedPicture(n, Path(f"{n}.jpg"), 100, 100, tuple(things)) for n, things in enumerate(pictures)]
    return AnnotatedPictures("made up", "voc", list(names), list(range(1, len(names) + 1)), shown)


def found(*entries, masks=None):
    boxes, scores, labels = (np.array([entry[i] for entry in entries]) for i in range(3))
    return Found(boxes.reshape(-1, 4).astype(float), scores.astype(float), labels.astype(int), masks)


def perfect(data):
    return [
        found(*[(thing.box, 0.9, thing.label) for thing in one.objects]) if one.objects else found()
        for one in data.pictures
    ]


def plain_average_precision(truth, seen, overlap):
    """VOC's 2007 rule, written detection by detection and point by point."""
    wanted = sum(not hard for _, difficult in truth for hard in difficult)
    everything = [(-s, n, k) for n, (boxes, scores) in enumerate(seen) for k, s in enumerate(scores)]
    used, hits, misses, curve = set(), 0, 0, []
    for _, n, k in sorted(everything):
        box, best, index = seen[n][0][k], -1.0, None
        for j, other in enumerate(truth[n][0]):
            width = min(box[2], other[2]) - max(box[0], other[0])
            height = min(box[3], other[3]) - max(box[1], other[1])
            inner = max(width, 0) * max(height, 0)
            outer = (box[2] - box[0]) * (box[3] - box[1]) + (other[2] - other[0]) * (other[3] - other[1]) - inner
            if inner / outer > best:
                best, index = inner / outer, j
        if best > overlap and truth[n][1][index]:
            continue
        if best > overlap and (n, index) not in used:
            used.add((n, index))
            hits += 1
        else:
            misses += 1
        curve.append((hits / wanted, hits / (hits + misses)))
    total = 0.0
    for point in np.arange(0.0, 1.1, 0.1):
        total += max([precision for recall, precision in curve if recall >= point], default=0.0)
    return total / 11


@pytest.mark.parametrize("overlap", [0.5, 0.75, 0.9])
def test_vocs_rule_equals_a_plain_form_on_noise(overlap):
    draw = np.random.default_rng(0)
    truth, seen = [], []
    for _ in range(20):
        corners = draw.uniform(0, 80, (3, 2))
        boxes = np.concatenate([corners, corners + draw.uniform(5, 20, (3, 2))], axis=1)
        near = np.concatenate([boxes + draw.normal(0, 1.2, (3, 4)), boxes[:1] + draw.normal(0, 0.5, (1, 4))])
        truth.append((boxes, draw.random(3) < 0.2))
        seen.append((near, draw.random(4)))
    value = voc_average_precision(truth, seen, overlap)
    assert 0 < value < 1 and value == pytest.approx(plain_average_precision(truth, seen, overlap), abs=1e-12)


def test_vocs_rule_by_hand():
    """A hit, a second hit on the same object (wrong), one on a difficult object (neither), one missed."""
    data = data_of([square(0, 0), square(50, 50, difficult=True), square(20, 60)], names=("cat",))
    entries = found(((0, 0, 10, 10), 0.9, 0), ((0, 0, 10, 9), 0.8, 0), ((50, 50, 60, 60), 0.7, 0))
    # One of two objects at precision 1: recall reaches 0.5, six of the eleven points.
    assert voc_scores(data, [entries]).metrics["voc_ap50"] == pytest.approx(6 / 11)
    exact = data_of([square(0, 0, 10)], names=("cat",))
    half = found(((0, 0, 10, 5), 0.9, 0))
    assert voc_scores(exact, [half]).metrics["voc_ap50"] == 0.0  # the overlap has to exceed 0.5
    assert coco_scores(exact, [half], False).metrics["box_ap50"] == pytest.approx(1.0)  # COCO's may equal it


def test_vocs_ap_is_the_mean_over_ten_overlaps():
    data = data_of([square(0, 0)], names=("cat",))
    entries = found(((0, 0, 10, 8.2), 0.9, 0))  # an overlap of 0.82
    assert voc_scores(data, [entries]).metrics == pytest.approx({"voc_ap": 0.7, "voc_ap50": 1.0, "voc_ap75": 1.0})
    assert OVERLAPS.tolist() == pytest.approx([0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95])


def test_the_truth_itself_is_found_and_classes_without_objects_are_left_out():
    mask = np.zeros((100, 100), np.uint8)
    mask[:10, :10] = 1
    coded = run_lengths_of(mask)
    data = data_of([square(0, 0, segmentation=coded)], [], names=("cat", "dog"))
    entries = [found(((0, 0, 10, 10), 0.9, 0), masks=[coded]), found()]
    measured = measure(data, entries, masks=True)
    assert list(measured.metrics.values()) == pytest.approx([1.0] * 9)
    assert all(math.isnan(value) for value in measured.per_class["dog"].values())
    rows = detection_results(data, "test", measured, per_class=True)
    assert len(rows) == 18 and {row.dataset_config for row in rows} == {None, "cat"}


def test_nothing_found_is_zero():
    data = data_of([square(0, 0)], [square(3, 3, label=1)])
    measured = measure(data, [found(), found()])
    assert set(measured.metrics.values()) == {0.0}
    assert len(detection_results(data, "test", measured)) == 6


def test_cocos_crowds_are_forgiven_and_ids_do_not_matter():
    data = data_of([square(0, 0), square(40, 40, 40, crowd=True)], names=("cat",))
    entries = found(((0, 0, 10, 10), 0.5, 0), ((50, 50, 60, 60), 0.9, 0))
    assert coco_scores(data, [entries], False).metrics["box_ap"] == pytest.approx(1.0)
    many = data_of(*[[square(n, n)] for n in range(30)], names=("cat",))
    assert list(coco_scores(many, perfect(many), False).metrics.values()) == pytest.approx([1.0] * 3)
