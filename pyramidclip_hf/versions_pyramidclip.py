# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Needs transformers 5.11 and torch 2.6 or newer. What moved between these and today's is met here, and nowhere else.

The configuration imports this module first, so that older versions get a sentence; a folder on the Hub carries it too.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch.torch_version import TorchVersion

NEEDED = {"transformers": "5.11", "torch": "2.6"}


def check_versions(installed: Mapping[str, str]) -> None:
    """ImportError, in a sentence, where one of `installed` (name -> version) is older than NEEDED says."""
    for name, lowest in NEEDED.items():
        if TorchVersion(installed[name]) < lowest:
            raise ImportError(
                f"PyramidCLIP needs {name} {lowest} or newer, and {name} {installed[name]} is installed: "
                f'pip install "{name}>={lowest}"'
            )


check_versions({"transformers": transformers.__version__, "torch": torch.__version__})

from transformers.configuration_utils import PreTrainedConfig  # noqa: E402  # what follows is not in older ones
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask  # noqa: E402
from transformers.modeling_utils import PreTrainedModel  # noqa: E402
from transformers.processing_utils import ProcessorMixin  # noqa: E402


def _those_known(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that `function` names."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


# The cache of generation, which has to be given; renamed in 5.24, where the older name warns.
NO_CACHE = _those_known(create_causal_mask, {"cache": None})
NO_CACHE = NO_CACHE or _those_known(create_causal_mask, {"past_key_values": None})

# A mask that hides nothing could be left out, but the host would have to read it off the device. Older versions always
# read it.
DEVICE_ONLY = _those_known(create_bidirectional_mask, {"allow_is_bidirectional_skip": False})

# Who builds the towers' configurations of their dictionaries: transformers, or before it did the class itself.
BUILDS_SUB_CONFIGS = hasattr(PreTrainedConfig, "sub_configs_defaults")

# Older versions call it gradient checkpointing.
HAS_ACTIVATION_CHECKPOINTING = hasattr(PreTrainedModel, "activation_checkpointing_enable")

# Whether a processor's defaults are its own attributes; before, they were `_defaults` of its arguments' class.
HAS_PROCESSOR_DEFAULTS = (
    inspect.signature(ProcessorMixin._merge_kwargs).parameters["ModelProcessorKwargs"].default is None
)


def cpu_capabilities() -> dict[str, Any] | None:
    """What the processor can, by torch's names; None where an older torch does not say."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    return ask() if ask else None


# Older versions initialise all code alike.
NOT_CUSTOM_CODE = _those_known(PreTrainedModel._initialize_weights, {"is_custom_code": False})


@contextlib.contextmanager
def exact_products(device_type: str) -> Iterator[None]:
    """Within it, fp32 products are fp32 on such a device, not TF32 or bf16, whatever the process allows elsewhere.

    Inside of `torch.compile` it does nothing.
    """
    backend: Any = {"cuda": torch.backends.cuda, "cpu": torch.backends.mkldnn}.get(device_type)
    # Older versions have one switch for all devices; where each has its own, the old one must not be asked any more.
    switch: Any = getattr(backend, "matmul", None)
    new, old = hasattr(switch, "fp32_precision"), not hasattr(torch.backends, "fp32_precision")
    if torch.compiler.is_compiling() or not (new or old):
        yield
        return
    before = switch.fp32_precision if new else torch.get_float32_matmul_precision()

    def choose(precision: str) -> None:
        if new:
            switch.fp32_precision = precision
        else:
            torch.set_float32_matmul_precision(precision)

    choose("ieee" if new else "highest")
    try:
        yield
    finally:
        choose(before)
