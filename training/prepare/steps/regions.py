"""From what a detector gives to the ten regions that a sample keeps: checked, sorted by confidence, cut to the best.

Used for detections made here and for those that others made. Whatever is left out is named with its reason.
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from training.data.records import BOX_TOLERANCE, Region, phrase
from training.prepare.steps.rewriting import Levels
from training.prepare.steps.work import Tally

FLOAT16_MAX = float(np.finfo(np.float16).max)


class Detections:
    """What a detector found in one picture, in any order.

    Attributes:
        boxes: (n, 4) float64: x1, y1, x2, y2 over width and height of the uncropped picture.
        scores: (n,) float64, the confidences.
        labels: n nouns.
        features: (n, F) float32.
        attributes: n lists of words, the most confident last; empty where the detector names none.

    Raises:
        ValueError: their numbers differ.
    """

    def __init__(
        self,
        boxes: ArrayLike,
        scores: ArrayLike,
        labels: Sequence[str],
        features: ArrayLike,
        attributes: Sequence[Sequence[str]] = (),
    ):
        self.boxes: np.ndarray = np.asarray(boxes, np.float64).reshape(-1, 4)
        self.scores: np.ndarray = np.asarray(scores, np.float64).reshape(-1)
        self.labels = list(labels)
        self.features: np.ndarray = np.asarray(features, np.float32)
        self.attributes = [list(words) for words in attributes] or [[] for _ in self.labels]
        counts = {
            "boxes": len(self.boxes),
            "scores": len(self.scores),
            "labels": len(self.labels),
            "attributes": len(self.attributes),
            "rows of features": len(self.features),
        }
        if len(set(counts.values())) != 1 or self.features.ndim != 2:
            raise ValueError(f"{counts}, features of shape {self.features.shape}: expected equal numbers and (n, F)")

    def __len__(self) -> int:
        return len(self.labels)


def faults_of(found: Detections) -> dict[int, tuple[str, str]]:
    """{row: (reason, detail)} of the regions that cannot be used.

    Reasons: `box-not-finite`, `box-upside-down` (x1 > x2 or y1 > y2), `box-outside` (by more than 1 % of the picture),
    `score-not-finite`, `feature-not-finite`, `feature-overflow` (beyond float16), `no-label`.
    """
    boxes, low, high = found.boxes, -BOX_TOLERANCE, 1 + BOX_TOLERANCE
    finite = np.isfinite(boxes).all(1)
    with np.errstate(invalid="ignore"):
        tests: tuple[tuple[str, ArrayLike, Callable[[int], str]], ...] = (
            ("box-not-finite", ~finite, lambda i: str(boxes[i].tolist())),
            ("box-upside-down", (boxes[:, :2] > boxes[:, 2:]).any(1), lambda i: str(boxes[i].round(4).tolist())),
            ("box-outside", ((boxes < low) | (boxes > high)).any(1), lambda i: str(boxes[i].round(4).tolist())),
            ("score-not-finite", ~np.isfinite(found.scores), lambda i: str(found.scores[i])),
            ("feature-not-finite", ~np.isfinite(found.features).all(1), lambda i: "NaN or infinite values"),
            ("feature-overflow", (np.abs(found.features) > FLOAT16_MAX).any(1), lambda i: "beyond 65504"),
            ("no-label", np.array([not label.strip() for label in found.labels], bool), lambda i: ""),
        )
    faults: dict[int, tuple[str, str]] = {}
    for reason, rows, detail in tests:
        for i in np.flatnonzero(rows).tolist():
            faults.setdefault(i, (reason, detail(i)))
    return faults


def best_regions(found: Detections, top: int, tally: Tally, where: object, key: str, line: int | None = None) -> Levels:
    """The levels `regions`, `roi` and `tags` of a sample: its `top` most confident detections, sorted.

    Equal scores keep the detector's order. Regions that cannot be used are named in `tally` and counted (`regions_in` =
    `regions_out` + `regions_beyond_top` + `regions_unusable`); a picture without any is named `no-regions` and gets
    `regions` []. Tags are the phrases of the regions, one for each (readers may drop repeats: `best_objects` of
    `training.data.records`).

    Args:
        found: in any order.
        top: how many stay.
        tally: gets counts and faults.
        where: the file, for the faults.
        key: of the sample, for the faults.
        line: in the file, for the faults.
    """
    faults = faults_of(found)
    for i, (reason, detail) in sorted(faults.items()):
        tally.note(where, key, reason, f"region {i}: {detail}" if detail else f"region {i}", line)
    usable = np.array([i for i in range(len(found)) if i not in faults], np.int64)
    order = usable[np.argsort(-found.scores[usable], kind="stable")]
    kept = order[:top]
    tally.count("regions_in", len(found))
    tally.count("regions_out", len(kept))
    tally.count("regions_beyond_top", len(order) - len(kept))
    tally.count("regions_unusable", len(faults))
    if not len(kept):
        tally.note(
            where, key, "no-regions", f"{len(found)} detections, none usable" if len(found) else "zero detections", line
        )
        return {"regions": [], "roi": None, "tags": None}
    regions = [
        Region(
            tuple(np.clip(found.boxes[i], 0, 1).tolist()),
            round(float(found.scores[i]), 6),
            found.labels[i].strip(),
            list(found.attributes[i]),
        )
        for i in kept
    ]
    tags = [phrase(region) for region in regions]
    return {"regions": regions, "roi": found.features[kept].astype(np.float16), "tags": tags}


def confident_attributes(names: Sequence[str], scores: Sequence[float], threshold: float) -> list[str]:
    """The attribute names of one object whose score reaches `threshold`, the most confident last.

    The paddings that scene-graph-benchmark writes (score 0, `__no_attribute__`) never count.
    """
    pairs = [
        (float(score), -rank, name)
        for rank, (name, score) in enumerate(zip(names, scores))
        if score > 0 and score >= threshold and name and name != "__no_attribute__"
    ]
    return [name for _, _, name in sorted(pairs)]
