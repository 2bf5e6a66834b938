"""`torch.compile` block by block: all equal blocks share one compilation, and texts of other lengths need no new one.

What runs between the blocks stays as it is written. So it works with gradient caching, checkpointing and DDP, which see
the same modules as before.

With CUDA graphs a block's kernels are recorded once for each shape and then launched together, forward and backward.
What a graph gives lies in memory that its replay in the next step takes back: hence `begin_step`, and no block may run
for a second time in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pyramidclip_hf.modeling_pyramidclip_resnet import PyramidCLIPResNetBottleneck
from pyramidclip_hf.modeling_pyramidclip_text import PyramidCLIPEncoderLayer, PyramidCLIPTextLayer

# torch's name of the mode that records CUDA graphs.
GRAPHS = "reduce-overhead"

# Compilations of one `compute`: blocks of both towers share it, each for pictures, regions or texts, all tokens or one,
# with gradient or without, training or not. Beyond the limit torch would run blocks uncompiled; its own is 8.
_RECOMPILATIONS = 64


def compile_blocks(model: nn.Module, *, graphs: bool = False, **options: Any) -> None:
    """Lets every block of the towers compile itself at its first call, in place.

    Args:
        model: Of any class of ours.
        graphs: Steps of training replay CUDA graphs (`begin_step` says where one starts); a CPU has none, and computes
            as without.
        **options: Of `torch.compile`, such as `backend`.
    """
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _RECOMPILATIONS)
    for module in model.modules():
        if isinstance(module, (PyramidCLIPEncoderLayer, PyramidCLIPResNetBottleneck)):
            # Lengths of texts differ from batch to batch; other sizes are found out where they do.
            dynamic = True if isinstance(module, PyramidCLIPTextLayer) and not graphs else None
            compute = torch.compile(module.compute, dynamic=dynamic, **options)
            if graphs:
                replayed = torch.compile(module.compute, dynamic=dynamic, mode=GRAPHS, **options)
                compute = _replayed_in_training(module, replayed, compute)
                if isinstance(module, PyramidCLIPEncoderLayer):
                    # Cast outside, weights would lie elsewhere in each step, and a graph reads them where they were.
                    module.casts_ahead = False
            module.compute = compute  # type: ignore[method-assign]


def _replayed_in_training(
    module: nn.Module, replayed: Callable[..., torch.Tensor], usual: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """`replayed` in a step that goes back, `usual` else: without a backward pass nothing says when a result may go."""

    def compute(*args: Any, **kwargs: Any) -> torch.Tensor:
        chosen = replayed if module.training and torch.is_grad_enabled() else usual
        return chosen(*args, **kwargs)

    return compute


def begin_step() -> None:
    """Says that nothing of the step before is read any more, its gradients included, so that graphs may be replayed."""
    torch.compiler.cudagraph_mark_step_begin()
