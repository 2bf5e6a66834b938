"""How well objects are found: COCO's average precision by pycocotools, and VOC's as tables of papers have it.

VOC's is the 11-point average precision of 2007, for each class and each overlap 0.50, 0.55, ... 0.95: AP50 and AP75 are
means over classes, AP the mean over overlaps. COCO's, at 101 points and with an overlap that may be equal, is another
number on the same detections, up to several points higher.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from huggingface_hub import EvalResult

from training.data.annotations import AnnotatedPictures, mask_of
from training.evaluation.results import hub_identifier

OVERLAPS = np.arange(10) * 0.05 + 0.5


class Found(NamedTuple):
    """What was found in a picture.

    Attributes:
        boxes: (N, 4) float, pixels of the picture.
        scores: (N,) float.
        labels: (N,) int64.
        masks: COCO's run lengths of each; None where none were looked for.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: list[Any] | None = None


@dataclass(frozen=True)
class Measured:
    """Scores in 0..1.

    Attributes:
        metrics: name -> value.
        per_class: class name -> the same names that exist for one class.
    """

    metrics: dict[str, float]
    per_class: dict[str, dict[str, float]]


def run_lengths_of(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run lengths of an (H, W) mask. Raises ImportError where pycocotools is missing."""
    try:
        from pycocotools import mask as coco_mask
    except ImportError as error:
        raise ImportError('average precision of COCO needs pycocotools: pip install -e ".[detection]"') from error
    coded = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in coded["size"]], "counts": coded["counts"].decode()}


def overlaps_of(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(M,) intersection over union of a box (4,) with others (M, 4)."""
    low, high = np.maximum(others[:, :2], box[:2]), np.minimum(others[:, 2:], box[2:])
    shared = np.clip(high - low, 0, None).prod(axis=1)
    areas = (others[:, 2:] - others[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    return shared / np.maximum(areas - shared, 1e-12)


def voc_average_precision(
    truth: Sequence[tuple[np.ndarray, np.ndarray]], found: Sequence[tuple[np.ndarray, np.ndarray]], overlap: float
) -> float:
    """The 11-point average precision of one class; NaN where it has no object.

    Each detection, by falling score, is compared with the true box of the largest overlap, whatever its state. It is
    right where that is above `overlap` and the box is still free; on a difficult box it counts neither way.

    Args:
        truth: of each picture, boxes (n, 4) and whether each is difficult (n,).
        found: of each picture, boxes (m, 4) and scores (m,).
        overlap: what an overlap has to exceed.
    """
    positives = sum(int((~difficult).sum()) for _, difficult in truth)
    if not positives:
        return float("nan")
    entries = [
        (score, number, box) for number, (boxes, scores) in enumerate(found) for box, score in zip(boxes, scores)
    ]
    entries.sort(key=lambda entry: -entry[0])
    taken = [np.zeros(len(boxes), bool) for boxes, _ in truth]
    right = []
    for _, number, box in entries:
        boxes, difficult = truth[number]
        shared = overlaps_of(box, boxes) if len(boxes) else np.zeros(1)
        best = int(shared.argmax())
        if not shared[best] > overlap:
            right.append(False)
        elif not difficult[best]:
            right.append(not taken[number][best])
            taken[number][best] = True
    hits = np.cumsum(right, dtype=np.float64)
    if not len(hits):
        return 0.0
    recall, precision = hits / positives, hits / np.arange(1, len(hits) + 1)
    points = [precision[recall >= point].max(initial=0.0) for point in np.arange(0.0, 1.1, 0.1)]
    return float(np.mean(points))


def voc_scores(data: AnnotatedPictures, found: Sequence[Found]) -> Measured:
    """`voc_ap`, `voc_ap50`, `voc_ap75`; COCO's crowds count as difficult."""
    per_class = {}
    for label, name in enumerate(data.class_names):
        truth, seen = [], []
        for picture, one in zip(data.pictures, found):
            things = [thing for thing in picture.objects if thing.label == label]
            boxes = np.array([thing.box for thing in things], np.float64).reshape(-1, 4)
            truth.append((boxes, np.array([thing.difficult or thing.crowd for thing in things], bool)))
            chosen = one.labels == label
            seen.append((one.boxes[chosen], one.scores[chosen]))
        values = np.array([voc_average_precision(truth, seen, overlap) for overlap in OVERLAPS])
        per_class[name] = {"voc_ap": float(values.mean()), "voc_ap50": float(values[0]), "voc_ap75": float(values[5])}
    return Measured(_means(per_class), per_class)


def _means(per_class: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Over the classes that have objects."""
    names = next(iter(per_class.values()))
    columns = {name: np.array([values[name] for values in per_class.values()]) for name in names}
    return {name: float(np.nanmean(column)) if np.isfinite(column).any() else 0.0 for name, column in columns.items()}


def coco_scores(data: AnnotatedPictures, found: Sequence[Found], masks: bool) -> Measured:
    """`box_ap`, `box_ap50`, `box_ap75`, with `masks` also those of masks, by pycocotools.

    Annotations are numbered anew, from 1: an id of 0 or one that repeats gives wrong values in silence.

    Raises:
        ImportError: pycocotools is missing.
    """
    kinds = {"bbox": "box", **({"segm": "mask"} if masks else {})}
    names = [f"{kind}_{metric}" for kind in kinds.values() for metric in ("ap", "ap50", "ap75")]
    truth, results = _coco_truth(data, masks), _coco_results(found)
    per_class = {name: dict.fromkeys(names, 0.0) for name in data.class_names}
    if not results:  # loadRes fails on an empty list
        met = {thing.label for picture in data.pictures for thing in picture.objects if not thing.crowd}
        for label, name in enumerate(data.class_names):
            if label not in met:
                per_class[name] = dict.fromkeys(names, float("nan"))
        return Measured(dict.fromkeys(names, 0.0), per_class)
    for kind, word in kinds.items():
        precision = _coco_precision(truth, results, kind)
        for label, name in enumerate(data.class_names):
            of_class = precision[:, :, label]
            for metric, rows in (("ap", slice(None)), ("ap50", slice(0, 1)), ("ap75", slice(5, 6))):
                values = of_class[rows]
                per_class[name][f"{word}_{metric}"] = float(values.mean()) if (values > -1).all() else float("nan")
    return Measured(_means(per_class), per_class)


def _coco_truth(data: AnnotatedPictures, masks: bool) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for number, picture in enumerate(data.pictures):
        for thing in picture.objects:
            x1, y1, x2, y2 = thing.box
            entry = {
                "id": len(annotations) + 1,
                "image_id": number,
                "category_id": thing.label,
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": thing.area,
                "iscrowd": int(thing.crowd),
            }
            if masks:
                entry["segmentation"] = run_lengths_of(mask_of(thing, picture.width, picture.height))
            annotations.append(entry)
    images = [{"id": number, "width": one.width, "height": one.height} for number, one in enumerate(data.pictures)]
    categories = [{"id": label, "name": name} for label, name in enumerate(data.class_names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _coco_results(found: Sequence[Found]) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = []
    for number, one in enumerate(found):
        for index, (x1, y1, x2, y2) in enumerate(one.boxes.tolist()):
            entry: dict[str, Any] = {
                "image_id": number,
                "category_id": int(one.labels[index]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(one.scores[index]),
            }
            if one.masks is not None:
                entry["segmentation"] = one.masks[index]
            results.append(entry)
    return results


def _coco_precision(truth: dict[str, Any], results: list[dict[str, Any]], kind: str) -> np.ndarray:
    """(10 overlaps, 101 recalls, classes), all sizes, at most 100 detections; -1 where a class has no object."""
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError('average precision of COCO needs pycocotools: pip install -e ".[detection]"') from error
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        # Boxes alone: with masks in the entries loadRes would take their areas.
        given = [{k: v for k, v in one.items() if kind == "segm" or k != "segmentation"} for one in results]
        given = [{k: v for k, v in one.items() if kind == "bbox" or k != "bbox"} for one in given]
        evaluation = COCOeval(coco, coco.loadRes(given), kind)
        evaluation.evaluate()
        evaluation.accumulate()
    return np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]


def measure(data: AnnotatedPictures, found: Sequence[Found], masks: bool = False) -> Measured:
    """Both measures: VOC's rule and COCO's."""
    voc, coco = voc_scores(data, found), coco_scores(data, found, masks)
    return Measured(
        {**voc.metrics, **coco.metrics},
        {name: {**values, **coco.per_class[name]} for name, values in voc.per_class.items()},
    )


def detection_results(
    data: AnnotatedPictures, split: str, measured: Measured, per_class: bool = False
) -> list[EvalResult]:
    """One result for each number, with `per_class` of each class too (`config`: its name), as the Hub keeps them."""
    rows: list[tuple[str | None, Mapping[str, float]]] = [(None, measured.metrics)]
    rows += list(measured.per_class.items()) if per_class else []
    return [
        EvalResult(
            task_type="object-detection",
            dataset_type=hub_identifier(data.name),
            dataset_name=data.name,
            dataset_config=config,
            dataset_split=split,
            metric_type=metric,
            metric_value=value,
        )
        for config, metrics in rows
        for metric, value in metrics.items()
        if value == value
    ]
