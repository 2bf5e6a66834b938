"""What a run needs, worked out from its recipe before any GPU is rented: memory, arithmetic, reading, communication.

    python -m training.scale --config training/configs/vit_b_32_143m_32_epochs.yaml --gpus 64

The model is traced on fake tensors (shapes without data), as it is: activation memory is what autograd really keeps
of it, arithmetic is what its operations really do. `docs/scale.md` compares both with measurements and works an
example.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyramidclip_command import answer_words, run_command
from training.settings.fields import check_named
from training.settings.reading import parse_settings


@dataclass(kw_only=True)
class ScaleArguments:
    """Settings of `python -m training.scale`."""

    config: list[str] = field(metadata={"names": "source", "help": "recipe; several as for training.pretrain"})
    gpus: int = field(metadata={"help": "number of GPUs"})
    teraflops: float | None = field(
        default=None,
        metadata={
            "help": "arithmetic that a GPU really reaches, TFLOP/s; by default what one H200 did at commit 047d512: "
            "135 with RN50, 152 with ViT-B-16 (20 %% of its bf16 product), 133 with ViT-B-32, and so with all others"
        },
    )
    samples: int = field(default=143_000_000, metadata={"help": "samples in the data"})
    samples_per_shard: int = field(default=10_000, metadata={"help": "samples in a shard"})
    tokens: int = field(default=24, metadata={"help": "length of texts under pooling: eos"})

    def __post_init__(self) -> None:
        """Refuses what nothing can be worked out for."""
        for name in ("gpus", "samples", "samples_per_shard", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {getattr(self, name)}")
        if self.teraflops is not None and not self.teraflops > 0:
            raise ValueError(f"teraflops: expected a number above 0, got {self.teraflops}")


def parse(argv: Sequence[str]) -> ScaleArguments:
    """The settings that the words of the command line stand for."""
    return check_named(parse_settings(ScaleArguments, argv, __doc__, config=False))


if __name__ == "__main__":
    answer_words(parse)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from pyramidclip_hf.configuration_pyramidclip import ARCHITECTURES, PyramidCLIPConfig
from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.loss_pyramidclip import BYTES_PER_ENTRY, block_of
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from training.data.inputs import MASKED_LABELS, MASKED_POSITIONS, RUN_LEVELS, any_level, inputs_of_kind
from training.data.pixels import Normalisation
from training.loop.objective import PAIRS, ContrastiveObjective
from training.loop.terms.encoding import levels_in
from training.loop.terms.table import read_objective
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import read_settings

GB = 1e9


# TFLOP/s of one H200, measured by the count of this command (docs/scale.md); ViT-B-32's stands for all others.
TERAFLOPS = {"RN50": 135.0, "ViT-B-32": 133.0, "ViT-B-16": 152.0}


# Masked words of a caption of 24 tokens in one of a few hundred, with a share of 0.15.
MOST_MASKED = 10


# Of opening data, measured (docs/scale.md): a shard that is counted already, by one process, in seconds and bytes; and
# a sample of three members that has to be counted by its headers, in seconds of a processor.
SECONDS_A_SHARD, BYTES_A_SHARD, SECONDS_A_SAMPLE = 73e-6, 930, 67e-6


# Both views of 512 x 384 px, regions and texts, measured (docs/scale.md).
SAMPLES_A_CORE = 190


AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


# The fused attention of the CPU, on which the trace runs; torch counts only its siblings on GPUs.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        weights: fp32, buffers included.
        gradients: fp32, of trained weights.
        optimizer: AdamW's two moments.
        activations: What autograd keeps of one forward pass over the GPU's pairs, or one chunk of them.
        loss: Gathered embeddings, their gradients, and the blocks of the closed-form loss; what terms of other kinds
            need, see `training.loop.terms.term.Term.loss_bytes`.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Their sum, which is what tensors take at most: within 3 % of what was seen on a GPU (docs/scale.md)."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def recipe_config(args: PretrainingArguments) -> PyramidCLIPConfig:
    """The model's config that a recipe names.

    Raises:
        ValueError: It starts from saved weights, which would be read.
    """
    if args.model not in ARCHITECTURES:
        raise ValueError(f"model: expected one of {', '.join(ARCHITECTURES)} to work out its needs, got {args.model!r}")
    config = PyramidCLIPConfig.from_architecture(args.model, **(args.model_config or {}))
    config.further_loss_terms = sorted(args.objective or {})
    if args.loss_weights is not None:
        config.loss_weights = dict(args.loss_weights)
    return config


def _text_length(config: PyramidCLIPConfig, tokens: int) -> int:
    longest = config.text_config.max_position_embeddings
    return min(tokens, longest) if config.text_config.pooling == "eos" else longest


def _fake_batch(config: PyramidCLIPConfig, pairs: int, regions: int, tokens: int) -> dict[str, torch.Tensor]:
    vision, length = config.vision_config, _text_length(config, tokens)
    shapes = {
        "picture": (3, vision.image_size, vision.image_size),
        "regions": (regions, vision.roi_feature_size + 4),
        "text": (length,),
    }
    batch = {}
    for level in (*LEVELS.values(), *RUN_LEVELS.values()):
        dtype = {"text": torch.int64, "picture": torch.uint8, "regions": torch.float32}[level.kind]
        batch[level.input] = torch.zeros(pairs, *shapes[level.kind], dtype=dtype)
        if level.mask:
            shape = (pairs, regions) if level.kind == "regions" else (pairs,)
            batch[level.mask] = torch.ones(shape, dtype=torch.bool)
    for name in (MASKED_POSITIONS, MASKED_LABELS):  # a caption in some has that many masked words, and pads the others
        batch[name] = torch.zeros(pairs, min(length, MOST_MASKED), dtype=torch.int64)
    return batch


@dataclass(frozen=True)
class Trace:
    """A forward pass on fake tensors.

    Attributes:
        objective: What was traced.
        activations: Bytes kept for the backward pass; a tensor that several operations keep counts once, and weights
            do not count.
        operations: Floating-point operations.
    """

    objective: ContrastiveObjective
    activations: int
    operations: int


def traced(
    config: PyramidCLIPConfig,
    pairs: int,
    precision: str,
    checkpointing: bool,
    regions: int = 10,
    tokens: int = 24,
    further: Mapping[str, Any] | None = None,
) -> Trace:
    """The forward pass of `pairs` pairs.

    Args:
        config: Of the model.
        pairs: Encoded at once.
        precision: Of the autocast region, as in the settings.
        checkpointing: Whether activations are recomputed.
        regions: Of each picture.
        tokens: Length of texts under `pooling="eos"`; under "max" it is the longest, 77.
        further: The run's `objective`.
    """
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            kept[storage._cdata] = storage.nbytes()
        holds.append(tensor)
        return tensor

    holds: list[torch.Tensor] = []  # alive, so that no storage's address is used twice
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = PyramidCLIPModel(config)
        if checkpointing:
            model.activation_checkpointing_enable()
        terms = read_objective(further, config)
        objective = ContrastiveObjective(
            model,
            config.loss_weights,
            config.label_smoothing,
            "none",
            AUTOCAST[precision],
            normalisation=Normalisation(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
            further=terms.terms,
            run_pairs=terms.pairs,
        )
        weights = {parameter.untyped_storage()._cdata for parameter in objective.parameters()}
        weights |= {buffer.untyped_storage()._cdata for buffer in objective.buffers()}
        batch = _fake_batch(config, pairs, regions, tokens)
        counter = FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention_flops})
        with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            objective.embed(batch)
    activations = sum(size for address, size in kept.items() if address not in weights)
    return Trace(objective, activations, counter.get_total_flops())


def memory_per_gpu(args: PretrainingArguments, num_gpus: int, tokens: int = 24) -> Memory:
    """Bytes that the recipe needs on each of `num_gpus` GPUs under DDP."""
    config = recipe_config(args)
    pairs = args.per_device_batch_size(num_gpus)
    at_once = args.per_device_chunk_size or pairs
    checkpointing = args.gradient_checkpointing
    trace = traced(config, at_once, args.precision, checkpointing, args.max_regions, tokens, args.objective)
    objective = trace.objective
    trained = 4 * sum(p.numel() for p in objective.parameters() if p.requires_grad)
    tensors = [*objective.parameters(), *objective.buffers()]
    levels, width = len(objective.levels), config.projection_dim
    # Own and gathered embeddings and the gradients of both, fp32, and blocks of the similarity matrices.
    embeddings = 2 * 4 * levels * width * (pairs + args.global_batch_size)
    terms = max(1, len(objective.pairs))
    height, width = block_of(pairs, args.global_batch_size, terms, torch.device("cuda"))
    further = _further_bytes(args, config, objective, pairs, tokens)
    return Memory(
        weights=sum(t.numel() * t.element_size() for t in tensors),
        gradients=trained,
        optimizer=2 * trained,
        activations=trace.activations,
        loss=embeddings + BYTES_PER_ENTRY * terms * height * width + further,
    )


def _tokens_of_levels(config: PyramidCLIPConfig, tokens: int) -> dict[str, int]:
    length = dict.fromkeys((*LEVELS, *RUN_LEVELS), _text_length(config, tokens))
    return length | dict.fromkeys(inputs_of_kind("picture", length), config.vision_config.grid_size**2)


def _further_bytes(
    args: PretrainingArguments, config: PyramidCLIPConfig, objective: ContrastiveObjective, pairs: int, tokens: int
) -> int:
    """Of terms of other kinds than level pairs; with caching also the rows of all pairs, and their gradients."""
    length = _tokens_of_levels(config, tokens)
    found = sum(term.loss_bytes(pairs, args.global_batch_size, length) for term in objective.further)
    if not args.per_device_chunk_size or not objective.further:
        return found
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        rows = objective.embed(_fake_batch(config, args.per_device_chunk_size, args.max_regions, tokens))
    kept = sum(row.nbytes for name, row in rows.items() if name != PAIRS)
    return found + 2 * kept * pairs // args.per_device_chunk_size


def most_pairs(args: PretrainingArguments, num_gpus: int, memory: int) -> int:
    """How many pairs one GPU can encode at once under the recipe's global batch.

    Args:
        args: The recipe.
        num_gpus: That share the global batch.
        memory: Bytes of one GPU that the run may have.
    """
    needs = memory_per_gpu(args, num_gpus)
    config, few = recipe_config(args), 8
    one, two = (
        traced(
            config, pairs, args.precision, args.gradient_checkpointing, args.max_regions, further=args.objective
        ).activations
        for pairs in (few, 2 * few)
    )
    left = memory - (needs.total - needs.activations)  # activations grow by so much a pair, from a constant
    return max(0, int((left - (2 * one - two)) * few // (two - one)))


def flops_per_pair(args: PretrainingArguments, tokens: int = 24) -> float:
    """Floating-point operations of one training step for one pair: forward and twice that backward.

    The backward pass is not counted itself: torch's counter takes that of LeFF's depth-wise convolutions for that of
    dense ones, and says 253 GFLOP for ViT-B-32 where 104 are right.

    Gradient caching and gradient checkpointing each add a forward pass.
    """
    pairs = 8
    config = recipe_config(args)
    trace = traced(config, pairs, args.precision, False, args.max_regions, tokens, args.objective)
    passes = 3 + bool(args.per_device_chunk_size) + args.gradient_checkpointing
    length, everyone = _tokens_of_levels(config, tokens), args.global_batch_size
    losses = sum(term.loss_operations(everyone, length) for term in trace.objective.further)
    return passes * trace.operations / pairs + losses


def start_up(samples: int, samples_per_shard: int, processes: int) -> str:
    """What opening the data takes before the first step."""
    shards = -(-samples // samples_per_shard)
    hours = samples * SECONDS_A_SAMPLE / 3600
    return (
        f"start-up            {shards:,} shards: {shards * SECONDS_A_SHARD:.1f} s and "
        f"{shards * BYTES_A_SHARD / 1e6:.0f} MB a process where they are counted; else once {hours:.1f} hours of "
        f"processors, {60 * hours / processes:.1f} minutes of each process"
    )


def report(
    args: PretrainingArguments,
    num_gpus: int,
    teraflops: float | None,
    samples: int,
    tokens: int,
    samples_per_shard: int = 10_000,
) -> str:
    """The page that `main` prints."""
    memory, flops = memory_per_gpu(args, num_gpus, tokens), flops_per_pair(args, tokens)
    config = recipe_config(args)
    teraflops = teraflops or TERAFLOPS.get(args.model, TERAFLOPS["ViT-B-32"])
    pairs_per_second = teraflops * 1e12 / flops
    steps = args.max_steps or (args.epochs or 0) * (samples // args.global_batch_size)
    hours = steps * args.global_batch_size / (pairs_per_second * num_gpus) / 3600
    with torch.device("meta"):
        terms = read_objective(args.objective, config)
    objective = ContrastiveObjective(
        _fake_model(config), config.loss_weights, 0.0, further=terms.terms, run_pairs=terms.pairs
    )
    gathered = 4 * len(objective.levels) * config.projection_dim * args.global_batch_size
    masks = len(objective.masked_levels) * args.global_batch_size
    sums = 4 * len(objective.pairs) * args.global_batch_size
    inputs = {any_level(level).input for level in levels_in(objective.wanted)}
    batch = _fake_batch(config, 1, args.max_regions, tokens)
    sent = sum(tensor.nbytes for name, tensor in batch.items() if name in inputs)
    return "\n".join(
        [
            f"{args.model} on {num_gpus} GPUs, global batch {args.global_batch_size} = {num_gpus} x "
            f"{args.per_device_batch_size(num_gpus)}",
            f"memory per GPU      {memory.total / GB:6.1f} GB: weights {memory.weights / GB:.2f}, gradients "
            f"{memory.gradients / GB:.2f}, AdamW {memory.optimizer / GB:.2f}, activations "
            f"{memory.activations / GB:.2f}, loss {memory.loss / GB:.2f}",
            f"arithmetic          {flops / 1e9:6.1f} GFLOP a pair and step; at {teraflops:g} TFLOP/s: "
            f"{pairs_per_second:.0f} pairs/s per GPU",
            f"reading             {pairs_per_second:6.0f} samples/s per GPU, {pairs_per_second * num_gpus:.0f} in all; "
            f"{pairs_per_second / SAMPLES_A_CORE:.0f} processor cores and {pairs_per_second * sent / GB:.2f} GB/s of "
            "batches to each GPU",
            start_up(samples, samples_per_shard, num_gpus),
            f"embeddings          1 all-gather of {gathered / 1e6:.0f} MB and 1 reduce-scatter of the same; masks: "
            f"1 all-gather of {masks / 1e3:.0f} kB",
            f"log-sum-exps        1 all-to-all of {sums / 1e3:.0f} kB, and back",
            f"gradients           1 all-reduce of {memory.gradients / 1e6:.0f} MB",
            f"length              {steps:,} steps, {hours:.0f} hours ({hours * num_gpus:.0f} GPU hours)",
        ]
    )


def _fake_model(config: PyramidCLIPConfig) -> PyramidCLIPModel:
    with torch.device("meta"):
        return PyramidCLIPModel(config)


def run(args: ScaleArguments) -> None:
    """Prints the page."""
    recipe = PretrainingArguments(**read_settings(PretrainingArguments, *args.config))
    print(report(recipe, args.gpus, args.teraflops, args.samples, args.tokens, args.samples_per_shard))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
