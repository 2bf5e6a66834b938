# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the detector on the ResNet picture tower (`modeling_detection.py`)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .configuration_pyramidclip import PyramidCLIPVisionConfig, VisionConfig
from .versions_pyramidclip import BUILDS_SUB_CONFIGS

_NOT_GIVEN: Any = None
_SUB_CONFIGS: dict[str, Any] = {"vision_config": PyramidCLIPVisionConfig}


@strict
class PyramidCLIPDetectionConfig(PreTrainedConfig):
    """A Faster or Mask R-CNN in C4 form; defaults are detectron2's and MoCo's. Sizes are pixels.

    Args:
        vision_config: of the picture tower, a ResNet; a configuration or a dictionary.
        plain: the trunk is a plain ResNet of these sizes, torchvision's and transformers', for supervised weights.
        image_mean: of each channel of pixels in 0..1; CLIP's.
        image_std: their standard deviation.
        with_masks: also a mask for each object.
        extra_norm: one more BatchNorm behind the fourth stage, as MoCo has it.
        anchor_sizes: sides of the anchors' squares.
        anchor_ratios: height over width.
        rpn_samples: anchors of a picture that the proposal loss sees.
        rpn_positive: at most this share of them on an object.
        rpn_nms_threshold: overlap above which a proposal yields to a surer one.
        train_proposals: before and after that, in training.
        test_proposals: the same, when measuring.
        roi_size: cells along a side of a pooled region; the fourth stage halves it.
        roi_samples: regions of a picture that the last losses see.
        roi_positive: at most this share of them on an object.
        score_threshold: detections are surer than this.
        nms_threshold: overlap above which a detection of a class yields to a surer one.
        max_detections: of a picture.
        short_side: pictures are resized to it when detecting.
        long_side: and at most this long.
    """

    model_type = "pyramidclip_detection"
    if BUILDS_SUB_CONFIGS:
        sub_configs_defaults: ClassVar[dict[str, Any]] = _SUB_CONFIGS
    else:
        sub_configs: ClassVar[dict[str, Any]] = _SUB_CONFIGS

    vision_config: VisionConfig = _NOT_GIVEN
    plain: bool = False
    image_mean: list[float] | tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: list[float] | tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    with_masks: bool = False
    extra_norm: bool = True
    anchor_sizes: list[int] | tuple[int, ...] = (32, 64, 128, 256, 512)
    anchor_ratios: list[float] | tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_samples: int = 256
    rpn_positive: float = 0.5
    rpn_nms_threshold: float = 0.7
    train_proposals: list[int] | tuple[int, ...] = (12000, 2000)
    test_proposals: list[int] | tuple[int, ...] = (6000, 1000)
    roi_size: int = 14
    roi_samples: int = 512
    roi_positive: float = 0.25
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    max_detections: int = 100
    short_side: int = 800
    long_side: int = 1333

    def __post_init__(self, **kwargs: Any) -> None:
        if not BUILDS_SUB_CONFIGS and not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = PyramidCLIPVisionConfig(**(self.vision_config or {"tower": "resnet"}))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks; run by `@strict` at construction and on saving."""
        if self.vision_config.tower != "resnet":
            raise ValueError(
                "the detector is of C4 form, three stages of a ResNet below and the fourth on each region: a "
                f"{self.vision_config.tower} tower has none. A ViT is a backbone for the detectors of transformers "
                "(PyramidCLIPBackbone, docs/ecosystem.md)."
            )
        if self.roi_size < 2 or self.roi_size % 2:
            raise ValueError(f"roi_size must be even, the fourth stage halves it; got {self.roi_size}.")
        if not self.anchor_sizes or min(self.anchor_sizes) < 1:
            raise ValueError(f"anchor_sizes must be pixels, got {self.anchor_sizes}.")
        if not 0 < self.short_side <= self.long_side:
            raise ValueError(f"short_side ({self.short_side}) must not exceed long_side ({self.long_side}).")


__all__ = ["PyramidCLIPDetectionConfig"]
