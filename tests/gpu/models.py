"""The models and training steps that are compared: ours, open_clip's and transformers' CLIPModel, of the same size."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.loss_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.bench.bench_training import LEARNING_RATE, SMOOTHING, TOKENS, WEIGHT_DECAY, training_batch
from tests.gpu.session import Session, Skipped
from training.loop.compiling import begin_step, compile_blocks
from training.loop.gradient_cache import GradientCache
from training.loop.objective import ContrastiveObjective
from training.loop.optim import build_optimizer
from training.scale import flops_per_pair, memory_per_gpu
from training.settings.pretraining import PretrainingArguments

PYRAMID, CLIP = DEFAULT_LOSS_WEIGHTS, {"global_caption": 1.0}
BETAS, EPSILON = (0.9, 0.98), 1e-6
TOY_VIT = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_leff_layers": 1}
TOY_RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 4}
TOY_TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def changes(session: Session, name: str, pooling: str = "max") -> dict[str, Any]:
    """What differs from the architecture `name`: the pooling, and in a dry pass the size."""
    if not session.dry:
        return {"text_config": {"pooling": pooling}}
    vision = dict(TOY_RESNET if name.startswith("RN") else TOY_VIT)
    return {"text_config": {**TOY_TEXT, "pooling": pooling}, "vision_config": vision, "projection_dim": 32}


def config_of(session: Session, name: str, pooling: str = "max") -> PyramidCLIPConfig:
    """The config of architecture `name`, small in a dry pass."""
    return PyramidCLIPConfig.from_architecture(name, **changes(session, name, pooling))


def our_model(session: Session, name: str, pooling: str = "max") -> PyramidCLIPModel:
    """Ours on the device, with random weights."""
    torch.manual_seed(0)
    with session.device:
        return PyramidCLIPModel(config_of(session, name, pooling))


def our_batch(session: Session, config: PyramidCLIPConfig, pairs: int) -> dict[str, torch.Tensor]:
    """All levels of `pairs` pairs, on the device."""
    return {name: value.to(session.device) for name, value in training_batch(config, pairs).items()}


def open_clip_model(session: Session, name: str) -> nn.Module:
    """open_clip's model `name` on the device."""
    open_clip = imported("open_clip")
    config = open_clip.get_model_config(name)
    if session.dry:
        vision = {"layers": [1, 1, 1, 1], "width": 8} if name.startswith("RN") else {"layers": 2, "width": 64}
        config["vision_cfg"] |= {"image_size": 64, **vision}
        config["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    with session.device:
        return open_clip.model.CLIP(**config)


def clip_model(session: Session, name: str) -> nn.Module:
    """The CLIPModel of transformers with towers of the sizes of `name`, on the device."""
    from transformers import CLIPConfig, CLIPModel

    config = config_of(session, name)
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    vision, text = ({key: getattr(tower, key) for key in same} for tower in (config.vision_config, config.text_config))
    vision |= {key: getattr(config.vision_config, key) for key in ("image_size", "patch_size")}
    torch.manual_seed(0)
    with session.device:
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=config.projection_dim))


def imported(name: str) -> Any:
    """A module that need not be there; Skipped where it is not."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Skipped(f"{name} cannot be imported ({error}); `make gpu-wheels` fetches it") from error


class OurStep:
    """One optimizer step as `training.pretrain` takes it, in bf16.

    Args:
        chunk: pairs encoded at a time (gradient caching); None: all.
        channels_last: pictures and their convolutions' weights are stored channels-last.
        compiled: the blocks are, as under `--torch-compile`, by this backend.
        graphs: their steps replay CUDA graphs.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        pooling: str,
        weights: Mapping[str, float],
        pairs: int,
        *,
        chunk: int | None = None,
        channels_last: bool = False,
        compiled: str | None = None,
        graphs: bool = False,
    ):
        model = our_model(session, name, pooling)
        self.batch = our_batch(session, model.config, pairs)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
            self.batch = {
                key: value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
                for key, value in self.batch.items()
            }
        smoothing = SMOOTHING if len(weights) > 1 else 0.0
        self.objective = ContrastiveObjective(model, weights, smoothing, autocast_dtype=torch.bfloat16)
        if compiled:
            compile_blocks(model, graphs=graphs, backend=compiled)
        self.graphs = graphs
        self.optimizer = build_optimizer(self.objective, LEARNING_RATE, WEIGHT_DECAY, BETAS, EPSILON)
        self.cache = GradientCache(plain_accelerator(session), self.objective, chunk) if chunk else None

    def __call__(self) -> torch.Tensor:
        """Takes the step; returns the loss, on the device."""
        self.optimizer.zero_grad()
        if self.graphs:
            begin_step()
        if self.cache is not None:
            loss = self.cache.forward_backward(self.batch).loss
        else:
            loss = self.objective(self.batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 1.0)
        self.optimizer.step()
        self.objective.model.clamp_logit_scale_()
        return loss.detach()


def plain_accelerator(session: Session) -> Any:
    """An Accelerator of this process alone, without mixed precision."""
    from accelerate import Accelerator

    return Accelerator(cpu=session.dry, mixed_precision="no")


def their_step(session: Session, model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same around another model: bf16 autocast, clipping, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, BETAS, EPSILON, WEIGHT_DECAY, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(session.device.type, dtype=torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    return step


def open_clip_step(session: Session, name: str, pairs: int, compiled: str | None = None) -> Callable[[], torch.Tensor]:
    """CLIP's objective by open_clip's model and loss, texts of 77 tokens."""
    open_clip = imported("open_clip")
    model = open_clip_model(session, name).train()
    batch = our_batch(session, config_of(session, name), pairs)
    loss = open_clip.loss.ClipLoss()
    forward = torch.compile(model, backend=compiled) if compiled else model
    return their_step(session, model, lambda: loss(*forward(batch["pixel_values"], batch["input_ids"])[:3]))


def clip_model_step(session: Session, name: str, pairs: int) -> Callable[[], torch.Tensor]:
    """CLIP's objective by transformers' CLIPModel, texts of 77 tokens."""
    model = clip_model(session, name).train()
    batch = our_batch(session, config_of(session, name), pairs)
    inputs = {name: batch[name] for name in ("pixel_values", "input_ids")}
    return their_step(session, model, lambda: model(**inputs, return_loss=True).loss)


def recipe(
    session: Session, name: str, pooling: str, weights: Mapping[str, float], pairs: int, chunk: int | None = None
) -> PretrainingArguments:
    """What `training.scale` is asked about."""
    return PretrainingArguments(
        model=name,
        model_config=changes(session, name, pooling),
        loss_weights=dict(weights),
        global_batch_size=pairs,
        per_device_chunk_size=chunk,
        max_steps=1,
    )


def predicted(args: PretrainingArguments, weights: Mapping[str, float]) -> tuple[float, float]:
    """(GB of a step, GFLOP of a pair) that `training.scale` believes in."""
    tokens = round(sum(TOKENS.values()) / 3) if len(weights) > 1 else TOKENS["input_ids"]
    return memory_per_gpu(args, 1, tokens).total / 1e9, flops_per_pair(args, tokens) / 1e9


def fitting(session: Session, name: str, pairs: int) -> int:
    """`pairs`, halved until the pyramid's step of `name` fits into the free memory as `training.scale` believes.

    Raises:
        Skipped: not even two pairs fit.
    """
    if session.dry:
        return pairs
    free = torch.cuda.mem_get_info()[0] / 1e9
    asked = pairs
    while pairs >= 2:
        needs, _ = predicted(recipe(session, name, "max", PYRAMID, pairs), PYRAMID)
        if needs < 0.9 * free:
            break
        pairs //= 2
    else:
        raise Skipped(f"{name} does not fit into {free:.1f} GB, not even 2 pairs at a time")
    if pairs < asked:
        session.note(what=f"{name}: {asked} pairs do not fit", free_gb=free, largest_by_training_scale=pairs)
    return pairs
