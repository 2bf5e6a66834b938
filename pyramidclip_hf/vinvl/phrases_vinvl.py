# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""From detections to words: "large brown horse". The rules of the published demo, with an upper limit of words."""

from collections.abc import Sequence

from .configuration_vinvl import VinVLConfig
from .modeling_vinvl import VinVLDetections


def phrase_attributes(names: Sequence[str], scores: Sequence[float], config: VinVLConfig) -> list[str]:
    """The attributes that go in front of the noun.

    Args:
        names: the attributes of one region, in any order.
        scores: their probabilities.
        config: its `phrase_*` fields.

    Returns:
        at most `phrase_max_attributes` names, the most confident last.
    """
    kept: dict[str, float] = {}
    for name, score in zip(names, scores, strict=True):
        common = name in config.phrase_common_attributes
        if score <= config.phrase_attribute_threshold or (common and score < config.phrase_common_threshold):
            continue
        name = config.phrase_merged_attributes.get(name, name)
        kept[name] = kept.get(name, 0.0) + score
    ascending = sorted(kept, key=kept.__getitem__)
    return ascending[max(0, len(ascending) - config.phrase_max_attributes) :]


def phrases(detections: VinVLDetections, config: VinVLConfig) -> list[str]:
    """One phrase a region, in the order of `detections` (most confident region first).

    Args:
        detections: the regions of one picture.
        config: its `phrase_*` fields.

    Returns:
        attributes, the most confident last, then the class name, joined by blanks.
    """
    return [
        " ".join([*phrase_attributes(names, scores.tolist(), config), label])
        for label, names, scores in zip(
            detections.label_names, detections.attribute_names, detections.attribute_scores, strict=True
        )
    ]
