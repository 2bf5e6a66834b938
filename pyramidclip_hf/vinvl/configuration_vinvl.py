# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the VinVL object-attribute detector. The defaults are the released X152-C4 model."""

import difflib
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

# Words that say little unless they are certain; the published demo asks more of them than of the others.
COMMON_ATTRIBUTES = (
    "white", "black", "blue", "green", "red", "brown", "yellow", "small", "large", "silver", "wooden", "wood", "orange",
    "gray", "grey", "metal", "pink", "tall", "long", "dark", "purple",
)  # fmt: skip


# Mappings that are filled in where they are not given: `None` and string keys may come in, which transformers' check
# of types needs to hear; code that reads a configuration finds what the second name says.
_NOT_GIVEN: Any = None
if TYPE_CHECKING:
    NamesOfIds: TypeAlias = dict[int, str]
    Merged: TypeAlias = dict[str, str]
else:
    NamesOfIds = dict[int, str] | dict[str, str] | None
    Merged = dict[str, str] | None


@strict
class VinVLConfig(PreTrainedConfig):
    r"""Configuration of [`VinVLForObjectAttributeDetection`] (VinVL, arXiv 2101.00529).

    The defaults are `vinvl_x152c4.yaml` of the published scene-graph benchmark, with the settings of its feature
    extraction command.

    Trunk. The model is a ResNeXt whose first three stages (stride 16) give the one feature map and whose fourth
    stage runs on each region. Stage `i` has bottlenecks of width `groups * width_per_group * 2**i` and gives
    `stem_channels * 4 * 2**i` channels; so regions have features of `feature_size = stem_channels * 32` numbers.

    Args:
        layers (`tuple[int, int, int, int]`): bottleneck blocks of each stage.
        groups, width_per_group (`int`): groups of the 3x3 convolutions, and their width in the first stage.
        stem_channels (`int`): channels of the 7x7 convolution in front.
        anchor_sizes, anchor_ratios (`tuple[float, ...]`): sides in pixels, and height over width, of the anchors.
        rpn_pre_nms_top_n, rpn_post_nms_top_n (`int`): anchors that enter, and proposals that leave, the proposal NMS.
        rpn_nms_threshold (`float`): overlap above which the less likely proposal is dropped.
        rpn_min_size (`int`): shortest side of a proposal, in pixels of the resized picture.
        pooler_resolution (`int`): cells a side of a pooled region.
        pooler_sampling_ratio (`int`): samples a cell and axis; 0 takes `ceil(region size / pooler_resolution)`.
        roi_chunk_size (`int`): regions that go through the fourth stage at once. Bounds memory, changes no result.
        box_regression_weights (`tuple` of 4): divisors of the class-specific box deltas.
        ignore_box_regression (`bool`): the boxes are the proposals, as in the published feature extraction; False
            gives the box regressed for the label, as in the published demo. Features are of the proposal either way.
        nms_threshold (`float`): overlap above which, within a class, the less likely region loses that class.
        score_threshold (`float`), min_detections, max_detections (`int`): regions are kept down to this score, but at
            least and at most so many a picture (fewer where fewer proposals keep any class).
        label_embedding_size, attribute_hidden_size (`int`): sizes inside the attribute head.
        attribute_threshold (`float`): attributes at or below it are dropped.
        max_attributes_per_object (`int`): attributes kept for a region.
        id2label (`dict[int, str]`): class names, 0 the background; `num_labels=1595` stands in for it.
        id2attribute (`dict[int, str]`): attribute names, 0 "no attribute"; `num_attributes=525` stands in for it.
        phrase_max_attributes (`int`): words in front of the noun.
        phrase_attribute_threshold (`float`): an attribute must score more than this to enter a phrase.
        phrase_common_threshold (`float`), phrase_common_attributes (`tuple[str, ...]`): these words must score at
            least this.
        phrase_merged_attributes (`dict[str, str]`): attributes counted as another one, their scores added.

    Raises:
        huggingface_hub.errors.StrictDataclassError: values that no model can have, or of the wrong type.
        ValueError: a keyword that looks like a misspelt one of these, or `num_attributes` that `id2attribute` denies.
    """

    model_type = "vinvl"

    layers: list[int] | tuple[int, ...] = (3, 8, 36, 3)
    groups: int = 32
    width_per_group: int = 8
    stem_channels: int = 64

    anchor_sizes: list[int | float] | tuple[int | float, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: list[int | float] | tuple[int | float, ...] = (0.5, 1, 2)
    rpn_pre_nms_top_n: int = 6000
    rpn_post_nms_top_n: int = 300
    rpn_nms_threshold: float | int = 0.7
    rpn_min_size: int = 0

    pooler_resolution: int = 14
    pooler_sampling_ratio: int = 0
    roi_chunk_size: int = 64

    box_regression_weights: list[int | float] | tuple[int | float, ...] = (10, 10, 5, 5)
    ignore_box_regression: bool = True
    nms_threshold: float | int = 0.3
    score_threshold: float | int = 0.2
    min_detections: int = 10
    max_detections: int = 100

    label_embedding_size: int = 256
    attribute_hidden_size: int = 512
    attribute_threshold: float | int = 0.05
    max_attributes_per_object: int = 16
    id2attribute: NamesOfIds = _NOT_GIVEN

    phrase_max_attributes: int = 3
    phrase_attribute_threshold: float | int = 0.01
    phrase_common_threshold: float | int = 0.1
    phrase_common_attributes: list[str] | tuple[str, ...] = COMMON_ATTRIBUTES
    phrase_merged_attributes: Merged = _NOT_GIVEN

    def __post_init__(self, **kwargs: Any) -> None:
        own_fields = [name for name in type(self).__dataclass_fields__ if not hasattr(PreTrainedConfig, name)]
        for key in kwargs.keys() - {"num_labels", "num_attributes"}:
            meant = difflib.get_close_matches(key, own_fields, 1, cutoff=0.8)
            if meant:
                raise ValueError(f"VinVLConfig has no field {key!r}; did you mean {meant[0]!r}?")
        if self.id2label is None:
            kwargs.setdefault("num_labels", 1595)
        num_attributes = kwargs.pop("num_attributes", None)
        if self.id2attribute is None:
            self.id2attribute = {i: f"ATTRIBUTE_{i}" for i in range(num_attributes or 525)}
        # JSON has no integer keys.
        self.id2attribute = {int(key): name for key, name in self.id2attribute.items()}
        if num_attributes not in (None, len(self.id2attribute)):
            raise ValueError(f"num_attributes is {num_attributes}, but id2attribute names {len(self.id2attribute)}.")
        if self.phrase_merged_attributes is None:
            self.phrase_merged_attributes = {"blonde": "blond"}
        super().__post_init__(**kwargs)

    @property
    def num_attributes(self) -> int:
        """Attributes, "no attribute" included."""
        return len(self.id2attribute)

    @property
    def num_anchors(self) -> int:
        """Anchors of one cell of the feature map."""
        return len(self.anchor_sizes) * len(self.anchor_ratios)

    @property
    def feature_map_size(self) -> int:
        """Channels of the feature map."""
        return self.stem_channels * 16

    @property
    def feature_size(self) -> int:
        """Length of the feature vector of a region."""
        return self.stem_channels * 32

    def validate_architecture(self) -> None:
        """Part of `@strict`: run on construction and before saving."""
        if len(self.layers) != 4 or min(self.layers) < 1:
            raise ValueError(f"layers must be four positive block counts, got {self.layers}.")
        if len(self.box_regression_weights) != 4:
            raise ValueError(f"box_regression_weights must be four numbers, got {self.box_regression_weights}.")
        positive = (
            "groups", "width_per_group", "stem_channels", "num_anchors", "rpn_pre_nms_top_n", "rpn_post_nms_top_n",
            "pooler_resolution", "roi_chunk_size", "max_detections", "label_embedding_size", "attribute_hidden_size",
            "max_attributes_per_object",
        )  # fmt: skip
        wrong = {name: getattr(self, name) for name in positive if getattr(self, name) < 1}
        if wrong:
            raise ValueError(f"These must be at least 1: {wrong}.")
        if not 0 <= self.min_detections <= self.max_detections:
            raise ValueError(
                f"Expected 0 <= min_detections <= max_detections, got {self.min_detections} and {self.max_detections}."
            )

    def validate_names(self) -> None:
        """Part of `@strict`: ids must be 0 .. n-1, since they index the heads' outputs."""
        for field in ("id2label", "id2attribute"):
            ids = sorted(getattr(self, field))
            if len(ids) < 2 or ids != list(range(len(ids))):
                raise ValueError(f"{field} must name the ids 0 .. n-1 with n of at least 2, got ids {ids[:3]} ... .")
