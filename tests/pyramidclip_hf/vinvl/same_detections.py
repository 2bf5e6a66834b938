"""Detections of one picture by two devices: equal but for ties."""

from typing import NamedTuple

import torch


class Likeness(NamedTuple):
    """score: the largest difference of scores, place by place. again: the share of detections that the other has too,
    with the same label and a box less than a pixel away. box: the largest distance of those, px. features: theirs, as a
    share of the largest feature.
    """

    score: float
    again: float
    box: float
    features: float


def likeness(found, other) -> Likeness:
    """How alike two detections of one picture are.

    Two boxes or labels of nearly the same score may change places, and of two that suppress each other either may stay:
    scores by place hardly notice, labels by place do.
    """
    if len(found) != len(other) or len(found) == 0:
        return Likeness(float("inf"), 0.0, float("inf"), float("inf"))
    score = (found.scores.cpu() - other.scores.cpu()).abs().max().item()
    boxes, others = found.boxes.float().cpu(), other.boxes.float().cpu()
    distances = (boxes[:, None] - others[None]).abs().amax(dim=2)
    distances[found.labels.cpu()[:, None] != other.labels.cpu()[None]] = float("inf")
    nearest, partner = distances.min(dim=1)
    same = nearest < 1
    if not same.any():
        return Likeness(score, 0.0, float("inf"), float("inf"))
    features, wanted = found.features.float().cpu()[same], other.features.float().cpu()[partner[same]]
    apart = ((features - wanted).abs().max() / wanted.abs().max()).item()
    return Likeness(score, same.float().mean().item(), nearest[same].max().item(), apart)


def assert_alike(found, other) -> None:
    """To what fp32 in another order of summation allows; at most one detection in ten is of a tie."""
    alike = likeness(found, other)
    assert alike.score < 1e-3 and alike.again >= 0.9 and alike.box < 0.1 and alike.features < 1e-2, alike


def tf32_off():
    """Context of a test that compares fp32 across devices."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
