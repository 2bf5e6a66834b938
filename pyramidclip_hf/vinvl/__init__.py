# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The VinVL X152-C4 object-attribute detector in plain PyTorch: regions, their names and attributes, 2048-d features.

    >>> processor = VinVLImageProcessor.from_pretrained(folder)
    >>> model = VinVLForObjectAttributeDetection.from_pretrained(folder)
    >>> inputs = processor([picture, other_picture], return_tensors="pt")
    >>> found = model(**inputs).detections  # one entry a picture, most confident region first
    >>> phrases(found[0], model.config)[:2]
    ['large brown horse', 'blue sky']

Running the model needs torchvision: `pip install "pyramidclip-hf[vinvl]"`. `folder` is what
`python -m conversion.convert_vinvl` writes. Importing this package registers the configuration and the image processor
with `AutoConfig` and `AutoImageProcessor`.
"""

from transformers import AutoConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_vinvl import VinVLConfig
from .image_processing_vinvl import VinVLImageProcessor
from .modeling_vinvl import (
    VinVLDetections,
    VinVLForObjectAttributeDetection,
    VinVLObjectAttributeDetectionOutput,
    VinVLPreTrainedModel,
)
from .phrases_vinvl import phrase_attributes, phrases

AutoConfig.register(VinVLConfig.model_type, VinVLConfig, exist_ok=True)
AutoImageProcessor.register(
    VinVLConfig,
    image_processor_classes={"pil": VinVLImageProcessor, "torchvision": VinVLImageProcessor},
    exist_ok=True,
)

__all__ = [
    "VinVLConfig",
    "VinVLDetections",
    "VinVLForObjectAttributeDetection",
    "VinVLImageProcessor",
    "VinVLObjectAttributeDetectionOutput",
    "VinVLPreTrainedModel",
    "phrase_attributes",
    "phrases",
]
