"""`torch.compile` block by block: all equal blocks share one compilation, and texts of other lengths need no new one.

What runs between the blocks stays as it is written. So it works with gradient caching, checkpointing and DDP, which see
the same modules as before.
"""

from typing import Any

import torch
from torch import nn

from pyramidclip_hf.modeling_pyramidclip_resnet import PyramidCLIPResNetBottleneck
from pyramidclip_hf.modeling_pyramidclip_text import PyramidCLIPEncoderLayer, PyramidCLIPTextLayer

# Compilations of one `compute`: blocks of both towers share it, each for pictures, regions or texts, all tokens or one,
# with gradient or without, training or not. Beyond the limit torch would run blocks uncompiled; its own is 8.
_RECOMPILATIONS = 64


def compile_blocks(model: nn.Module, **options: Any) -> None:
    """Lets every block of the towers compile itself at its first call, in place.

    Args:
        model: Of any class of ours.
        **options: Of `torch.compile`, such as `backend`.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILATIONS)
    for module in model.modules():
        if isinstance(module, (PyramidCLIPEncoderLayer, PyramidCLIPResNetBottleneck)):
            # Lengths of texts differ from batch to batch; other sizes are found out where they do.
            dynamic = True if isinstance(module, PyramidCLIPTextLayer) else None
            module.compute = torch.compile(module.compute, dynamic=dynamic, **options)  # type: ignore[method-assign]
