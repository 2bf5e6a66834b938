# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Pictures, texts and regions to the model's inputs, for the plain CLIP call and for the whole pyramid.

>>> processor = PyramidCLIPProcessor()
>>> inputs = processor(images=picture, text=["a cat", "a dog"], return_tensors="pt")
>>> sorted(inputs)
['attention_mask', 'input_ids', 'pixel_values']
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self, cast

import numpy as np
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, TextKwargs

from .image_processing_pyramidclip import PyramidCLIPImageProcessor
from .levels_pyramidclip import LEVELS
from .saved_folders_pyramidclip import faults_named
from .tokenization_pyramidclip import PyramidCLIPTokenizer
from .versions_pyramidclip import HAS_PROCESSOR_DEFAULTS

_BOX = 4
# How far float16 boxes may lie outside the picture.
_ROUNDING = 1e-3


class PyramidCLIPTextKwargs(TextKwargs, total=False):
    """`return_truncation`: also return which texts were cut (`truncated`, `summary_truncated`, `tag_truncated`)."""

    return_truncation: bool | None


class PyramidCLIPProcessorKwargs(ProcessingKwargs, total=False):
    """`text_kwargs` may hold `return_truncation`."""

    text_kwargs: PyramidCLIPTextKwargs  # type: ignore[misc]  # narrowed, as each of transformers' processors does


class PyramidCLIPProcessor(ProcessorMixin):
    """The tokenizer and the image processor in one object, and the batch of the six levels (docs/design.md, Names).

    Args:
        image_processor: None: `PyramidCLIPImageProcessor()`.
        tokenizer: None: `PyramidCLIPTokenizer()`.
        roi_feature_size: width of region features without their boxes; the model's `vision_config.roi_feature_size`.
        **kwargs: as in the base class.

    Raises:
        ValueError: a `roi_feature_size` that is no positive integer.
    """

    valid_processor_kwargs: type[Any] = PyramidCLIPProcessorKwargs
    text_kwargs = {"padding": True}
    if not HAS_PROCESSOR_DEFAULTS:
        valid_processor_kwargs._defaults = {"text_kwargs": text_kwargs}

    def __init__(
        self,
        image_processor: PyramidCLIPImageProcessor | None = None,
        tokenizer: PyramidCLIPTokenizer | None = None,
        roi_feature_size: int = 2048,
        **kwargs: Any,
    ):
        if not isinstance(roi_feature_size, int) or roi_feature_size < 1:
            raise ValueError(f"roi_feature_size must be a positive integer, got {roi_feature_size!r}.")
        super().__init__(
            PyramidCLIPImageProcessor() if image_processor is None else image_processor,
            PyramidCLIPTokenizer() if tokenizer is None else tokenizer,
            **kwargs,
        )
        self.roi_feature_size = roi_feature_size

    # Not by `LoadedFromFolder`: transformers' common tests look for what is overridden in the first base alone.
    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in the base class, with the errors of `LoadedFromFolder`."""
        with faults_named(pretrained_model_name_or_path, kwargs.get("subfolder")):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        summary: str | Sequence[str | None] | None = None,
        tags: str | Sequence[str | Sequence[str] | None] | None = None,
        local_images: ImageInput | None = None,
        regions: Sequence[Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Any of the six levels to model inputs; a level that is not given is absent from the result.

        Texts are padded to the longest of their level (`padding="max_length"`: to 77) and cut to 77 tokens with the end
        token kept. Lists have one entry a sample; anything else is one sample. Beside a single `text`, a list of `tags`
        is that sample's phrases.

        Args:
            images: pictures of the global level -> `pixel_values` (B, 3, height, width) float32.
            text: captions -> `input_ids`, `attention_mask` (B, L) int64. B may differ from the number of pictures.
            summary: a text or None a sample -> `summary_input_ids`, `has_summary` (B,) bool.
            tags: phrases (joined with ", "), a text or None a sample -> `tag_input_ids`, `has_tags` (B,) bool. No
                phrases and blank texts count as None.
            local_images: pictures of the local level -> `local_pixel_values`.
            regions: features and boxes, or None, a sample -> `roi_features` (B, K, F + 4) float32, `roi_mask` (B, K)
                bool; K is the longest of the batch, at least 1. A sample is a tuple `(features (K, F), boxes (K, 4))`,
                a mapping with these two keys, or one (K, F + 4) array; boxes are x1, y1, x2, y2 over width and height
                of the uncropped picture.
            **kwargs: `return_tensors`, and what tokenizer or image processor take, flat or as `text_kwargs` and
                `images_kwargs`.

        Raises:
            ValueError: no input, levels of different length, a text that is no str, wrong region shapes or boxes.
        """
        if all(level is None for level in (images, text, summary, tags, local_images, regions)):
            raise ValueError("Expected at least one of images, text, summary, tags, local_images and regions.")
        one_text = isinstance(text, str) or (text is None and isinstance(summary, str))
        if isinstance(tags, str) or (one_text and tags is not None):
            tags = cast("Sequence[str | Sequence[str] | None]", [tags])  # beside one text, a list is its phrases
        summary = [summary] if isinstance(summary, str) else summary
        regions = regions if regions is None or isinstance(regions, list) else [regions]
        _check_lengths(text=text, summary=summary, tags=tags)
        _check_lengths(images=images, local_images=local_images, regions=regions)
        merged = self._merge_kwargs(
            self.valid_processor_kwargs,  # type: ignore[arg-type]  # the class, as transformers' own processors give it
            tokenizer_init_kwargs=self.tokenizer.init_kwargs,
            **kwargs,
        )
        text_kwargs, image_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        return_tensors = text_kwargs.get("return_tensors") or image_kwargs.get("return_tensors")

        data: dict[str, Any] = {}
        if text is not None:
            data.update(self.tokenizer(_checked_texts("text", text), **text_kwargs))
        if summary is not None:
            data.update(self._optional_texts("summary", summary, text_kwargs))
        if tags is not None:
            data.update(self._optional_texts("tags", [_tag_text(one) for one in tags], text_kwargs))
        if images is not None:
            data.update(self.image_processor(images, **image_kwargs))
        if local_images is not None:
            data["local_pixel_values"] = self.image_processor(local_images, **image_kwargs)["pixel_values"]
        if regions is not None:
            data.update(self._region_arrays(regions))
        return BatchFeature(data, tensor_type=return_tensors)

    def _optional_texts(self, name: str, texts: Sequence[str | None], text_kwargs: dict[str, Any]) -> dict[str, Any]:
        level = LEVELS[name]
        texts = [None if one is None or (isinstance(one, str) and not one.strip()) else one for one in texts]
        present = [one is not None for one in texts]
        encoded = self.tokenizer(_checked_texts(name, ["" if one is None else one for one in texts]), **text_kwargs)
        named = {level.input: encoded["input_ids"]}
        if level.mask:
            named[level.mask] = np.array(present)
        if "truncated" in encoded:
            named[level.input.replace("input_ids", "truncated")] = encoded["truncated"]
        return named

    def _region_arrays(self, regions: Sequence[Any]) -> dict[str, np.ndarray]:
        width = self.roi_feature_size + _BOX
        rows = [_region_rows(one, self.roi_feature_size, place) for place, one in enumerate(regions)]
        features = np.zeros((len(rows), max(1, *map(len, rows)), width), dtype=np.float32)
        mask = np.zeros(features.shape[:2], dtype=bool)
        for sample, row in enumerate(rows):
            features[sample, : len(row)] = row
            mask[sample, : len(row)] = True
        return {"roi_features": features, "roi_mask": mask}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in the base class, and `preprocessor_config.json` for programs that look for the image settings there."""
        os.makedirs(save_directory, exist_ok=True)
        self.image_processor.to_json_file(os.path.join(save_directory, "preprocessor_config.json"))
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _check_lengths(**levels: Any) -> None:
    lengths = {
        name: 1 if isinstance(level, str) else len(level)
        for name, level in levels.items()
        if isinstance(level, (str, list, tuple))
    }
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"Expected one entry a sample in each level, got lengths {lengths}; use None where one is missing."
        )


def _checked_texts(name: str, texts: str | Sequence[str]) -> str | list[str]:
    if isinstance(texts, str):
        return texts
    if not isinstance(texts, (list, tuple)) or not texts:
        raise ValueError(f"Expected {name} to be a text or a list of at least one text, got {texts!r}.")
    wrong = [place for place, one in enumerate(texts) if not isinstance(one, str)]
    if wrong:
        raise ValueError(f"Expected {name} to hold strings, got {type(texts[wrong[0]]).__name__} at place {wrong[0]}.")
    return list(texts)


def _tag_text(tags: str | Sequence[str] | None) -> str | None:
    """Phrases joined as the model was trained on them; None for no phrases."""
    if tags is None or isinstance(tags, str):
        return tags
    wrong = [phrase for phrase in tags if not isinstance(phrase, str)]
    if wrong:
        raise ValueError(f"Expected a sample's tags to be strings, got {wrong[0]!r}.")
    return ", ".join(phrase for phrase in tags if phrase.strip()) or None


def _region_rows(regions: Any, feature_size: int, place: int) -> np.ndarray:
    """One sample's regions as (K, feature_size + 4) float32."""
    if regions is None:
        return np.zeros((0, feature_size + _BOX), dtype=np.float32)
    if isinstance(regions, Mapping):
        regions = regions["features"], regions["boxes"]
    if isinstance(regions, tuple):
        features, boxes = (np.asarray(part, dtype=np.float32) for part in regions)
        if features.ndim != 2 or boxes.shape != (len(features), _BOX):
            raise ValueError(
                f"regions[{place}] must be features (K, {feature_size}) and boxes (K, {_BOX}), got shapes "
                f"{features.shape} and {boxes.shape}."
            )
        rows = np.concatenate([features, boxes], axis=1)
    else:
        rows = np.asarray(regions, dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] != feature_size + _BOX:
        raise ValueError(
            f"regions[{place}] has shape {rows.shape} with its boxes, expected (K, {feature_size} + {_BOX}); for other "
            "features, make PyramidCLIPProcessor(roi_feature_size=...)."
        )
    x1, y1, x2, y2 = rows[:, -_BOX:].T
    inside = (x1 >= -_ROUNDING) & (x1 <= x2) & (x2 <= 1 + _ROUNDING)
    inside &= (y1 >= -_ROUNDING) & (y1 <= y2) & (y2 <= 1 + _ROUNDING)
    if not (np.isfinite(rows).all() and inside.all()):
        raise ValueError(
            f"regions[{place}] has non-finite values, or boxes that are not x1 <= x2 and y1 <= y2 in 0..1: boxes are "
            "fractions of the uncropped picture's width and height."
        )
    return rows


__all__ = ["PyramidCLIPProcessor"]
