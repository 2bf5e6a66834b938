# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PyramidCLIP for Transformers. Importing this package registers its classes with transformers' Auto classes.

>>> from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
>>> model, processor = PyramidCLIPModel.from_pretrained(folder), PyramidCLIPProcessor.from_pretrained(folder)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyramidclip_command import reads_words

__version__ = "0.1.0"

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

# torch and transformers take seconds to import; a command answers help and mistakes before.
if TYPE_CHECKING or not reads_words():
    from .auto_classes import (
        ARCHITECTURES,
        PyramidCLIPBackbone,
        PyramidCLIPBackboneConfig,
        PyramidCLIPConfig,
        PyramidCLIPForImageClassification,
        PyramidCLIPImageProcessor,
        PyramidCLIPModel,
        PyramidCLIPOutput,
        PyramidCLIPPreTrainedModel,
        PyramidCLIPProcessor,
        PyramidCLIPTextConfig,
        PyramidCLIPTextModel,
        PyramidCLIPTextModelWithProjection,
        PyramidCLIPTokenizer,
        PyramidCLIPVisionConfig,
        PyramidCLIPVisionModel,
        PyramidCLIPVisionModelWithProjection,
    )


def __getattr__(name: str) -> Any:
    """A class that is asked for while a command still reads its words; it brings all of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".auto_classes", __name__), name)
