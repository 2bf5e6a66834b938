"""How many operations a training step asks of the device: `python -m tests.step_operations`.

Each costs the host some ten microseconds, whatever its size, so their number bounds how fast a step can be where the
device is quick. Counted is what torch dispatches in a step of `training.pretrain` under bf16 autocast, without views
and allocations, which start nothing. Towers are narrow and have their real number of blocks: width plays no part.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from training.loop.objective import ContrastiveObjective
from training.loop.optim import MovingAverage, build_optimizer

PAIRS, REGIONS = 4, 3
TOKENS = {"tag_input_ids": 10, "input_ids": 16, "summary_input_ids": 30}
TEXT = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
TOWERS: dict[str, dict[str, Any]] = {
    "ViT-B": {
        "tower": "vit",
        "image_size": 32,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 12,
        "num_leff_layers": 9,
        "num_attention_heads": 2,
        "roi_feature_size": 6,
    },
    "RN50": {
        "tower": "resnet",
        "image_size": 64,
        "layers": [3, 4, 6, 3],
        "width": 8,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "roi_feature_size": 6,
    },
}
OBJECTIVES = {"pyramid": DEFAULT_LOSS_WEIGHTS, "CLIP": {"global_caption": 1.0}}
PARTS = ("forward", "backward", "optimizer", "average")
# What starts nothing though its schema does not say that it returns a view.
NOTHING = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")


class Operations(TorchDispatchMode):
    """Counts the operations dispatched inside, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts, and computes as without it."""
        returns = func._schema.returns
        view = returns and all(value.alias_info and not value.alias_info.is_write for value in returns)
        name = func._schema.name.split("::")[1]
        if not view and name not in NOTHING:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def batch_of(config: PyramidCLIPConfig) -> dict[str, torch.Tensor]:
    """Noise; texts of 10, 16 and 30 tokens, padded as the collator of the pooling pads them."""
    side, text = config.vision_config.image_size, config.text_config
    batch = {name: torch.randn(PAIRS, 3, side, side) for name in ("pixel_values", "local_pixel_values")}
    batch["roi_features"] = torch.randn(PAIRS, REGIONS, config.vision_config.roi_feature_size + 4)
    batch["roi_mask"] = torch.ones(PAIRS, REGIONS, dtype=torch.bool)
    for name, tokens in TOKENS.items():
        ids = torch.zeros(PAIRS, 77 if text.pooling == "max" else tokens, dtype=torch.int64)
        ids[:, 1 : tokens - 1] = torch.randint(1, 58, (PAIRS, tokens - 2))
        ids[:, 0], ids[:, tokens - 1] = text.bos_token_id, text.eos_token_id
        batch[name] = ids
        if name != "input_ids":
            batch[f"has_{name.split('_')[0].replace('tag', 'tags')}"] = torch.ones(PAIRS, dtype=torch.bool)
    return batch


def operations_of_step(
    tower: str, pooling: str, objective: str, dtype: torch.dtype | None = torch.bfloat16
) -> dict[str, Counter[str]]:
    """Part of the step -> operation -> how often."""
    torch.manual_seed(0)
    config = PyramidCLIPConfig(text_config={**TEXT, "pooling": pooling}, vision_config=TOWERS[tower], projection_dim=16)
    model = PyramidCLIPModel(config)
    module = ContrastiveObjective(model, OBJECTIVES[objective], 0.2, autocast_dtype=dtype)
    optimizer = build_optimizer(module, 1e-5, 0.2, (0.9, 0.98), 1e-6)
    average, batch = MovingAverage(model, 0.999), batch_of(config)
    counted: dict[str, Counter[str]] = {}

    def part(name: str, run: Callable[[], Any]) -> Any:
        with Operations() as operations:
            result = run()
        counted[name] = operations.names
        return result

    def optimize() -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        model.clamp_logit_scale_()

    losses = part("forward", lambda: module(batch))
    part("backward", losses.loss.backward)
    optimizer.step()  # the first one makes the states
    part("optimizer", optimize)
    part("average", lambda: average.update(model))
    return counted


def table() -> dict[tuple[str, str, str], tuple[int, ...]]:
    """(tower, pooling, objective) -> the numbers of `PARTS`."""
    found = {}
    for tower in TOWERS:
        for pooling in ("max", "eos"):
            for objective in OBJECTIVES:
                counted = operations_of_step(tower, pooling, objective)
                found[tower, pooling, objective] = tuple(counted[part].total() for part in PARTS)
    return found


if __name__ == "__main__":
    for row, numbers in table().items():
        print(f"    {row}: {numbers},")
