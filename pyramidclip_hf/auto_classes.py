# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The classes of the package, registered with transformers' Auto classes: what `import pyramidclip_hf` brings."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

# From its own module: among the names of transformers it needs torchvision in versions below 5.23.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_pyramidclip import (
    ARCHITECTURES,
    PyramidCLIPBackboneConfig,
    PyramidCLIPConfig,
    PyramidCLIPTextConfig,
    PyramidCLIPVisionConfig,
)
from .image_processing_pyramidclip import PyramidCLIPImageProcessor
from .modeling_pyramidclip import (
    PyramidCLIPForImageClassification,
    PyramidCLIPModel,
    PyramidCLIPOutput,
    PyramidCLIPPreTrainedModel,
    PyramidCLIPTextModel,
    PyramidCLIPTextModelWithProjection,
    PyramidCLIPVisionModel,
    PyramidCLIPVisionModelWithProjection,
)
from .modeling_pyramidclip_backbone import PyramidCLIPBackbone
from .processing_pyramidclip import PyramidCLIPProcessor
from .tokenization_pyramidclip import PyramidCLIPTokenizer

for _config in (PyramidCLIPConfig, PyramidCLIPTextConfig, PyramidCLIPVisionConfig, PyramidCLIPBackboneConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(PyramidCLIPConfig, PyramidCLIPModel, exist_ok=True)
AutoModel.register(PyramidCLIPTextConfig, PyramidCLIPTextModel, exist_ok=True)
AutoModel.register(PyramidCLIPVisionConfig, PyramidCLIPVisionModel, exist_ok=True)
AutoBackbone.register(PyramidCLIPBackboneConfig, PyramidCLIPBackbone, exist_ok=True)
AutoModelForZeroShotImageClassification.register(PyramidCLIPConfig, PyramidCLIPModel, exist_ok=True)
AutoModelForImageClassification.register(PyramidCLIPConfig, PyramidCLIPForImageClassification, exist_ok=True)
AutoProcessor.register(PyramidCLIPConfig, PyramidCLIPProcessor, exist_ok=True)
for _config in (PyramidCLIPConfig, PyramidCLIPVisionConfig):
    AutoImageProcessor.register(
        _config,
        image_processor_classes={"pil": PyramidCLIPImageProcessor, "torchvision": PyramidCLIPImageProcessor},
        exist_ok=True,
    )
for _config in (PyramidCLIPConfig, PyramidCLIPTextConfig):
    AutoTokenizer.register(_config, tokenizer_class=PyramidCLIPTokenizer, exist_ok=True)

__all__ = [
    "ARCHITECTURES",
    "PyramidCLIPBackbone",
    "PyramidCLIPBackboneConfig",
    "PyramidCLIPConfig",
    "PyramidCLIPForImageClassification",
    "PyramidCLIPImageProcessor",
    "PyramidCLIPModel",
    "PyramidCLIPOutput",
    "PyramidCLIPPreTrainedModel",
    "PyramidCLIPProcessor",
    "PyramidCLIPTextConfig",
    "PyramidCLIPTextModel",
    "PyramidCLIPTextModelWithProjection",
    "PyramidCLIPTokenizer",
    "PyramidCLIPVisionConfig",
    "PyramidCLIPVisionModel",
    "PyramidCLIPVisionModelWithProjection",
]
