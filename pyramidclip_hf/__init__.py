# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PyramidCLIP for Transformers. Importing this package registers its classes with transformers' Auto classes.

>>> from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
>>> model, processor = PyramidCLIPModel.from_pretrained(folder), PyramidCLIPProcessor.from_pretrained(folder)
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
)

from .configuration_pyramidclip import (
    ARCHITECTURES,
    PyramidCLIPConfig,
    PyramidCLIPTextConfig,
    PyramidCLIPVisionConfig,
)
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

__version__ = "0.1.0"

for _config in (PyramidCLIPConfig, PyramidCLIPTextConfig, PyramidCLIPVisionConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
AutoModel.register(PyramidCLIPConfig, PyramidCLIPModel, exist_ok=True)
AutoModel.register(PyramidCLIPTextConfig, PyramidCLIPTextModel, exist_ok=True)
AutoModel.register(PyramidCLIPVisionConfig, PyramidCLIPVisionModel, exist_ok=True)
AutoModelForZeroShotImageClassification.register(PyramidCLIPConfig, PyramidCLIPModel, exist_ok=True)
AutoModelForImageClassification.register(PyramidCLIPConfig, PyramidCLIPForImageClassification, exist_ok=True)

__all__ = [
    "ARCHITECTURES",
    "PyramidCLIPConfig",
    "PyramidCLIPForImageClassification",
    "PyramidCLIPModel",
    "PyramidCLIPOutput",
    "PyramidCLIPPreTrainedModel",
    "PyramidCLIPTextConfig",
    "PyramidCLIPTextModel",
    "PyramidCLIPTextModelWithProjection",
    "PyramidCLIPVisionConfig",
    "PyramidCLIPVisionModel",
    "PyramidCLIPVisionModelWithProjection",
]
