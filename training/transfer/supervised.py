"""Torchvision's supervised ResNet in place of a picture tower, as `conversion.convert_torchvision` left it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import ResNetForImageClassification

from pyramidclip_hf.files import read_regular
from pyramidclip_hf.loading import check_weights
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

_MAX_CONFIG_BYTES = 1 << 20


def is_supervised_resnet(name: str) -> bool:
    """Whether `name` is a folder whose configuration is that of transformers' ResNet."""
    try:
        return json.loads(read_regular(Path(name) / "config.json", _MAX_CONFIG_BYTES)).get("model_type") == "resnet"
    except (OSError, ValueError, AttributeError, RecursionError):
        return False  # the loader of our own models says what is wrong there


def supervised_resnet(
    name: str, changes: Mapping[str, Any] | None
) -> tuple[ResNetForImageClassification, PyramidCLIPProcessor]:
    """The classifier in fp32 that a folder holds, and the processor beside it.

    Args:
        name: The folder.
        changes: The setting `model_config`.

    Raises:
        ValueError: There are changes, a part is missing, or the blocks are not torchvision's.
    """
    if changes:
        raise ValueError(f"model_config is for new weights, but model {name} has trained ones; leave it out")
    check_weights(name, f"model {name}")
    told = f"model {name}: expected the folder that python -m conversion.convert_torchvision writes"
    try:
        loaded: Any = ResNetForImageClassification.from_pretrained(name, output_loading_info=True)
        processor = PyramidCLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"{told}, got {str(error).splitlines()[0]}") from error
    model, info = loaded
    if info["missing_keys"]:
        raise ValueError(f"{told}; its weights lack {sorted(info['missing_keys'])[0]}")
    config = model.config
    if config.layer_type != "bottleneck" or config.downsample_in_bottleneck or config.downsample_in_first_stage:
        raise ValueError(f"{told}; its blocks are not those of torchvision's ResNet-50")
    return model, processor
