# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Anchors, box arithmetic and suppression of the VinVL detector, all on float32 boxes x1, y1, x2, y2 in pixels.

The detector was trained with boxes whose corners are pixels that belong to them: a box is `x2 - x1 + 1` wide. Anchors,
decoding and clipping keep to that; overlaps do not add 1, like `torchvision.ops.nms`, which the published code calls.
"""

import math
from collections.abc import Sequence

import torch

from .configuration_vinvl import VinVLConfig

# Cells of the feature map are this many pixels apart.
FEATURE_STRIDE = 16
# Deltas of the logarithm of a side beyond this would make boxes of more than 1000 pixels out of one cell.
MAX_LOG_SCALE = math.log(1000 / FEATURE_STRIDE)


def cell_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """Anchors around the first cell, ratio by ratio, each in the order of `sizes`.

    The sides for a ratio are rounded for a box of 16 x 16 pixels and only then scaled, as the first Faster R-CNN did;
    anchors computed otherwise are some pixels off.

    Args:
        sizes: sides in pixels.
        ratios: height over width.

    Returns:
        `len(ratios) * len(sizes)` boxes.
    """
    centre = (FEATURE_STRIDE - 1) / 2
    anchors = []
    for ratio in ratios:
        base_width = round(math.sqrt(FEATURE_STRIDE**2 / ratio))
        base_height = round(base_width * ratio)
        for size in sizes:
            half_width = (base_width * size / FEATURE_STRIDE - 1) / 2
            half_height = (base_height * size / FEATURE_STRIDE - 1) / 2
            anchors.append((centre - half_width, centre - half_height, centre + half_width, centre + half_height))
    return anchors


def grid_anchors(
    anchors: Sequence[tuple[float, float, float, float]], height: int, width: int, device: torch.device | None = None
) -> torch.Tensor:
    """The anchors of a whole feature map, by row, then column, then anchor: (height * width * len(anchors), 4)."""
    base = torch.tensor(anchors, dtype=torch.float32, device=device)
    y, x = torch.meshgrid(
        FEATURE_STRIDE * torch.arange(height, dtype=torch.float32, device=device),
        FEATURE_STRIDE * torch.arange(width, dtype=torch.float32, device=device),
        indexing="ij",
    )
    shifts = torch.stack((x, y, x, y), dim=-1)
    return (shifts[:, :, None] + base).reshape(-1, 4)


def decode_boxes(deltas: torch.Tensor, boxes: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    """Applies deltas (dx, dy, dw, dh) to boxes.

    Args:
        deltas: (..., 4).
        boxes: (..., 4), broadcast against the deltas.
        weights: four divisors of the deltas.

    Returns:
        (..., 4), not clipped.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    widths, heights = x2 - x1 + 1, y2 - y1 + 1
    dx, dy, dw, dh = (deltas.unbind(-1)[i] / weights[i] for i in range(4))
    centre_x = dx * widths + (x1 + 0.5 * widths)
    centre_y = dy * heights + (y1 + 0.5 * heights)
    half_widths = 0.5 * widths * dw.clamp(max=MAX_LOG_SCALE).exp()
    half_heights = 0.5 * heights * dh.clamp(max=MAX_LOG_SCALE).exp()
    return torch.stack(
        (
            centre_x - half_widths,
            centre_y - half_heights,
            centre_x + half_widths - 1,
            centre_y + half_heights - 1,
        ),
        dim=-1,
    )


def clip_boxes(boxes: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Moves corners outside the picture to its outermost pixels, 0 .. width - 1 and 0 .. height - 1."""
    x, y = boxes[..., 0::2].clamp(0, width - 1), boxes[..., 1::2].clamp(0, height - 1)
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def box_overlaps(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union, broadcast over the leading dimensions; 0/0 is NaN, which exceeds no threshold."""
    corner = torch.maximum(boxes[..., :2], others[..., :2])
    sides = (torch.minimum(boxes[..., 2:], others[..., 2:]) - corner).clamp(min=0)
    areas, other_areas = ((b[..., 2] - b[..., 0]) * (b[..., 3] - b[..., 1]) for b in (boxes, others))
    shared = sides[..., 0] * sides[..., 1]
    return shared / (areas + other_areas - shared)


def suppress_per_class(
    probabilities: torch.Tensor, boxes: torch.Tensor, threshold: float, floor: float = 0.0
) -> torch.Tensor:
    """Non-maximum suppression within each class, for all classes at once.

    Walks down the ranks, the classes side by side: step r strikes out what overlaps the r-th most likely region of each
    class, where that is still there. The result is that of one `torchvision.ops.nms` a class, its ties included (the
    earlier region wins). A region only ever loses to a more likely one, so pairs of region and class below `floor` can
    be left out without changing the others.

    Args:
        probabilities: (N, C) float32.
        boxes: (N, 4), shared by all classes, or (N, C, 4) float32.
        threshold: overlap above which the less likely of two regions is struck out.
        floor: pairs of a lower probability, or of 0, are left out.

    Returns:
        (N, C) bool: which regions keep which class; False for what is left out.
    """
    considered = (probabilities >= floor) & (probabilities > 0)
    classes = considered.any(dim=0).nonzero().squeeze(1)
    kept_pairs = torch.zeros_like(considered)
    if not len(classes):
        return kept_pairs
    depth = int(considered.sum(dim=0).max())
    ranked = probabilities[:, classes].t().sort(dim=1, descending=True, stable=True).indices[:, :depth]
    rows = classes[:, None]
    kept = considered[ranked, rows]
    ranked_boxes = boxes[ranked] if boxes.dim() == 2 else boxes[ranked, rows]
    for rank in range(depth - 1):
        overlaps = box_overlaps(ranked_boxes[:, rank, None], ranked_boxes[:, rank + 1 :])
        # Compared in double precision, as torchvision does: 0.3 is no float32.
        kept[:, rank + 1 :] &= ~((overlaps.double() > threshold) & kept[:, rank, None])
    kept_pairs[ranked, rows] = kept
    return kept_pairs


def select_detections(
    probabilities: torch.Tensor, boxes: torch.Tensor, config: VinVLConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From proposals to detections, by "filter 1" of the published code: at most one detection a proposal.

    A proposal takes the likeliest of the classes that it keeps after the suppression. Those whose score reaches
    `score_threshold` are returned, but at least `min_detections` and at most `max_detections` (fewer where fewer
    proposals keep a class).

    Args:
        probabilities: (N, C) float32; column 0 is the background.
        boxes: (N, 4) or (N, C, 4) float32, clipped.
        config: its thresholds and limits.

    Returns:
        indices of the proposals, scores and labels of the detections, by falling score.
    """
    classes, class_boxes = probabilities[:, 1:], boxes if boxes.dim() == 2 else boxes[:, 1:]
    # Whoever keeps one of the likeliest pairs outranks whoever keeps none of them, so most pairs need no suppression.
    depth = max(int((classes >= config.score_threshold).sum()), 1024)
    while True:
        floor = float(classes.flatten().topk(depth).values[-1]) if depth < classes.numel() else 0.0
        scores, labels = (classes * suppress_per_class(classes, class_boxes, config.nms_threshold, floor)).max(dim=1)
        chosen = scores.nonzero().squeeze(1)
        if len(chosen) >= config.min_detections or floor == 0:
            break
        depth *= 8
    order = scores[chosen].sort(descending=True, stable=True).indices
    confident = int((scores >= config.score_threshold).sum())
    chosen = chosen[order][: min(max(confident, config.min_detections), config.max_detections)]
    return chosen, scores[chosen], labels[chosen] + 1
