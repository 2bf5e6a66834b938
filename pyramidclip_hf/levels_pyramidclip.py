# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The levels of PyramidCLIP's pyramid (arXiv 2204.14095) and the loss terms between them; only the standard library."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Level:
    """One level of the pyramid. Its name is also the field of a training sample that holds it; pictures share one.

    Attributes:
        kind: `"picture"` and `"regions"` go through the image tower, `"text"` through the text tower.
        holds: what the level is, in words.
        input: name of the model input that carries it.
        output: field of `PyramidCLIPOutput` with its embeddings.
        argument: the processor's argument for it.
        mask: name of the model input, (B,) or (B, K) bool, that says which samples have it; `None`: all have.
    """

    kind: Literal["picture", "regions", "text"]
    holds: str
    input: str
    output: str
    argument: str
    mask: str | None = None


# The pyramid, in the order in which its levels are encoded: image levels first.
LEVELS: dict[str, Level] = {
    "global": Level("picture", "the whole picture", "pixel_values", "image_embeds", "images"),
    "local": Level("picture", "a part of the picture", "local_pixel_values", "local_image_embeds", "local_images"),
    "roi": Level("regions", "features of detected objects", "roi_features", "roi_embeds", "regions", "roi_mask"),
    "summary": Level("text", "the gist", "summary_input_ids", "summary_embeds", "summary", "has_summary"),
    "caption": Level("text", "the detailed text", "input_ids", "text_embeds", "text"),
    "tags": Level("text", "attributes and names of objects", "tag_input_ids", "tag_embeds", "tags", "has_tags"),
}

# A loss term pairs one image level with one text level: name -> (image level, text level).
TERMS: dict[str, tuple[str, str]] = {
    "global_summary": ("global", "summary"),
    "local_caption": ("local", "caption"),
    "roi_summary": ("roi", "summary"),
    "global_tags": ("global", "tags"),
    "roi_caption": ("roi", "caption"),
    "local_tags": ("local", "tags"),
    "roi_tags": ("roi", "tags"),
    "global_caption": ("global", "caption"),
    "local_summary": ("local", "summary"),
}

# Three groups of two (peer, global relation, local relation), each group a third of the loss (paper, section 3.4).
DEFAULT_LOSS_WEIGHTS: dict[str, float] = dict.fromkeys(list(TERMS)[:6], 1 / 6)


def _is_weight(value: Any) -> bool:
    try:
        return 0 <= float(value) < float("inf")
    except (OverflowError, TypeError, ValueError):
        return False


def check_loss_weights(weights: Mapping[str, float], terms: Collection[str] = TERMS) -> dict[str, float]:
    """The mapping without its zero weights.

    Args:
        weights: term name -> weight.
        terms: the names that there are.

    Raises:
        ValueError: a name that is no loss term, a negative or non-finite weight, or no term left.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"loss_weights must be a mapping of term name to weight, got {type(weights).__name__}.")
    unknown = sorted(set(weights) - set(terms))
    if unknown:
        raise ValueError(f"loss_weights names unknown terms {unknown}; the terms are {list(terms)}.")
    wrong = {name: weight for name, weight in weights.items() if not _is_weight(weight)}
    if wrong:
        raise ValueError(f"loss_weights must be finite and not negative, got {wrong}.")
    kept = {name: float(weight) for name, weight in weights.items() if weight}
    if not kept:
        raise ValueError(f"loss_weights names no term (a weight of 0 is not named); choose among {list(terms)}.")
    return kept


def levels_of(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The levels that the named terms need, image levels first, in the order in which they are encoded."""
    needed = {level for name in check_loss_weights(weights) for level in TERMS[name]}
    return tuple(level for level in LEVELS if level in needed)


def levels_of_kind(kind: Literal["picture", "regions", "text"], among: Collection[str] = LEVELS) -> tuple[str, ...]:
    """The levels of one kind among the named ones, in the order in which they are encoded."""
    return tuple(name for name, level in LEVELS.items() if level.kind == kind and name in among)
