"""Pre-trains a PyramidCLIP model.

    python -m training.pretrain --config training/configs/demo.yaml [--field value ...] [--resume latest]

Several processes: `accelerate launch --config_file FILE -m training.pretrain ...`. `docs/training.md` explains the
settings, the folder of a run, and what happens when something goes wrong. Exit code 75: stopped by SIGTERM after saving
a checkpoint, to be continued with `--resume latest`; 4: finished and saved, but not published.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidclip_command import EXIT_STOPPED, EXIT_UNPUBLISHED, Failure, answer_words, run_command
from training.settings.fields import check_named
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import parse_settings


def parse(words: Sequence[str]) -> PretrainingArguments:
    """The settings that the words of a command line stand for."""
    return check_named(
        parse_settings(PretrainingArguments, words, __doc__, exit_codes=(EXIT_UNPUBLISHED, EXIT_STOPPED))
    )


if __name__ == "__main__":
    answer_words(parse)

import torch
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import ARCHITECTURES, PyramidCLIPConfig
from pyramidclip_hf.levels_pyramidclip import levels_of
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.coverage import Coverage
from training.data.inputs import in_table_order
from training.data.loader import TrainingReader, settings_for
from training.data.patience import Patience
from training.data.pixels import Normalisation
from training.data.remote import ShardCache
from training.data.words import read_synonyms
from training.loop.agreement import RunCrew
from training.loop.card import write_card
from training.loop.checkpoint import Stateful
from training.loop.compiling import begin_step, compile_blocks
from training.loop.distributed import rank, world_size
from training.loop.gradient_cache import GradientCache
from training.loop.identity import Identity
from training.loop.initial_model import initial_model
from training.loop.objective import ContrastiveObjective
from training.loop.optim import MovingAverage
from training.loop.processes import synchronised_batch_norm
from training.loop.record import sum_of
from training.loop.run import RunResult, complete_run, exit_code
from training.loop.task import AUTOCAST, Batch, Metrics, Plan, Reader, StepLoss, Task, plan_steps
from training.loop.terms.table import FurtherTerms, read_objective
from training.loop.token_scoring import save_token_heads, token_pairs
from training.loop.tracking import duplicate_rates
from training.loop.validation import ValidationSet
from training.scale import most_pairs

# Of a GPU's memory, what a run can have: the driver and the allocator's waste take the rest.
USABLE = 0.95


# Heads begin at other numbers than the model.
HEADS_SEED = 1_000_000_007


@dataclass
class ContrastiveTask(Task):
    """Pre-training: the pyramid's levels pulled together and apart.

    Attributes:
        settings: Those of the run.
        objective: The dual encoder under its loss.
        processor: Saved beside the model.
        reader: The training data of this process.
        plan: How long the run is.
        validation: Retrieval while training, or None.
        average: Of the weights, or None.
        coverage: What share of the pairs each term gets.
        synonyms: Checksum of the file of synonyms, where there is one.
    """

    settings: PretrainingArguments
    objective: ContrastiveObjective
    processor: PyramidCLIPProcessor
    reader: Reader
    plan: Plan
    validation: ValidationSet | None
    average: MovingAverage | None
    coverage: Coverage
    synonyms: str | None = None

    name = "pretrain"

    def backward(self, accelerator: Any, wrapped: nn.Module, batch: Batch) -> StepLoss:
        """All pairs at once, or in chunks of `per_device_chunk_size` with the same gradients."""
        if self.settings.replays_graphs:
            begin_step()
        if chunk_size := self.settings.per_device_chunk_size:
            return GradientCache(accelerator, wrapped, chunk_size).forward_backward(batch)
        return super().backward(accelerator, wrapped, batch)

    def after_step(self, stepped: bool) -> None:
        """What the objective does, and takes the new weights into the average."""
        self.objective.after_step(stepped)
        if self.average is not None:
            self.average.update(self.objective.model)

    def identity(self) -> Identity:
        """With the objective as it is; the model's config may name another."""
        known, objective = super().identity(), self.objective
        told = {
            "loss_weights": dict(objective.loss_weights),
            "label_smoothing": objective.label_smoothing,
            "further": objective.options(),
        }
        model = {name: value for name, value in known["model"].items() if name not in (*told, "further_loss_terms")}
        data = {**known["data"], "synonyms": self.synonyms}
        return {**known, "data": data, "objective": {**known["objective"], **told}, "model": model}

    @property
    def kept(self) -> Mapping[str, Stateful]:
        """The average; heads and what else terms of other kinds have, where there are such."""
        average = {} if self.average is None else {"moving_average": self.average}
        return {**average, **self.objective.kept}

    @property
    def logit_scale(self) -> torch.Tensor:
        """The logarithm of the softmax scale."""
        return self.objective.model.logit_scale

    @property
    def eval_every_steps(self) -> int:
        """As set."""
        return self.settings.eval_every_steps

    def batch_metrics(self, batch: Batch) -> Metrics:
        """`duplicates/LEVEL`, where asked for."""
        return duplicate_rates(batch) if self.settings.log_duplicate_rates else {}

    def evaluate(self) -> Metrics:
        """Retrieval on the validation set; empty without one."""
        if self.validation is None:
            return {}
        return self.validation.metrics(self.objective.model, AUTOCAST[self.settings.precision])

    def describe_objective(self) -> str:
        """Each term, its weight, and its share of the pairs."""
        shares = self.coverage.shares
        told = [f"{name} {weight:.3g} ({shares[name]:.0%})" for name, weight in self.objective.loss_weights.items()]
        told += [f"{name} {weight:.3g}" for name, weight in self.objective.weights.items() if name not in shares]
        return ", ".join(told) + f"; in brackets the share of {self.coverage.pairs} pairs that has both levels"

    @property
    def variants(self) -> Mapping[str, AbstractContextManager[None]]:
        """The average of the weights."""
        return {} if self.average is None else {"average": self.average.swapped_into(self.objective.model)}

    def record(self) -> dict[str, Any]:
        """The share of the pairs that each term got."""
        return {"shares_of_pairs": {term: self.coverage.shares[term] for term in self.objective.loss_weights}}

    def write_beside(self, folder: Path) -> None:
        """The heads of token terms, without which a model that they trained cannot be asked."""
        save_token_heads(folder, token_pairs(self.objective.further))

    def write_card(self, folder: Path, record: Mapping[str, Any]) -> None:
        """README.md as it is before the model is published."""
        write_card(folder, record)

    @property
    def repository(self) -> str | None:
        """As set by `push_to_hub`."""
        return self.settings.push_to_hub


def contrastive_task(args: PretrainingArguments, accelerator: Any, folder: Path) -> ContrastiveTask:
    """The task of these settings; `accelerator` decides the device, bad samples are named in `folder`."""
    if args.replays_graphs and synchronised_batch_norm(args):
        raise ValueError(
            "torch_compile_mode: reduce-overhead with sync_batch_norm on several GPUs is not possible: in a CUDA graph "
            "a block cannot wait for the other processes. Set sync_batch_norm: false, or leave torch_compile_mode out"
        )
    model, processor = initial_model(args)
    check_text_lengths(args, model.config)
    further = further_terms(args, model.config)
    reader = open_reader(args, processor, model.config, folder, accelerator.device, further)
    plan = plan_steps(
        reader.samples,
        args.global_batch_size,
        epochs=args.epochs,
        max_steps=args.max_steps,
        overfit_batches=args.overfit_batches,
    )
    objective = ContrastiveObjective(
        model,
        model.config.loss_weights,
        model.config.label_smoothing,
        args.freeze,
        AUTOCAST[args.precision],
        args.multi_positive,
        Normalisation(processor.image_processor.image_mean, processor.image_processor.image_std),
        further.terms,
        further.pairs,
    ).to(accelerator.device)
    coverage = reader.look()
    if objective.loss_weights:
        for line in coverage.check(list(objective.loss_weights), args.allow_empty_terms):
            accelerator.print(line, file=sys.stderr)
    if args.torch_compile:
        compile_blocks(model, graphs=args.replays_graphs)
    validation = None
    if args.validation_data:
        if os.path.realpath(args.validation_data) in map(os.path.realpath, args.train_data):
            told = "is trained on: what is measured there says what is remembered, not what is learnt"
            accelerator.print(f"validation_data {args.validation_data} {told}", file=sys.stderr)
        validation = ValidationSet(
            args.validation_data,
            args.validation_samples,
            list(objective.loss_weights),
            processor,
            args.max_regions,
            args.drop_repeated_tags,
            args.allow_unfinished,
            args.max_image_pixels,
            token_heads=() if objective.pairs else token_pairs(objective.further),
        )
        if validation.bad:
            told = f"{args.validation_data}: {len(validation.bad)} of {len(validation.bad) + len(validation.samples)}"
            accelerator.print(f"{told} samples cannot be read and are left out: {validation.bad[0]}", file=sys.stderr)
    average = MovingAverage(model, args.ema_decay) if args.ema_decay else None
    synonyms = str(sum_of(Path(args.synonyms))) if args.synonyms else None
    return ContrastiveTask(args, objective, processor, reader, plan, validation, average, coverage, synonyms)


def further_terms(args: PretrainingArguments, config: PyramidCLIPConfig) -> FurtherTerms:
    """The terms of `objective`; their heads' first weights depend on the seed only.

    Raises:
        ValueError: One is wrong, a queue has no room for a batch, or retrieval is to be measured of a model that no
            term trains for it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed + HEADS_SEED)
        further = read_objective(args.objective, config)
    further.check_batch(args.global_batch_size)
    if args.validation_data and not config.loss_weights and not further.trains_texts:
        raise ValueError(
            f"validation_data: no term of objective ({', '.join(args.objective or {})}) brings pictures and texts "
            "together, so retrieval would measure nothing that is trained: name a level pair in loss_weights, or leave "
            "validation_data out"
        )
    return further


def open_reader(
    args: PretrainingArguments,
    processor: PyramidCLIPProcessor,
    config: PyramidCLIPConfig,
    folder: Path,
    device: torch.device,
    further: FurtherTerms,
) -> TrainingReader:
    """The training data of this process for `device`; only the levels that the objective names are read."""
    settings = settings_for(
        processor,
        in_table_order({*(levels_of(config.loss_weights) if config.loss_weights else ()), *further.levels}),
        pooling=config.text_config.pooling,
        max_length=config.text_config.max_position_embeddings,
        roi_feature_size=config.vision_config.roi_feature_size,
        max_regions=args.max_regions,
        drop_repeated_tags=args.drop_repeated_tags,
        allow_mixed_regions=args.allow_mixed_regions,
        global_area=tuple(args.global_crop_area),
        local_area=tuple(args.local_crop_area),
        view_area=tuple(args.view_crop_area),
        synonyms=read_synonyms(args.synonyms) if args.synonyms else {},
        mask_share=further.mask_share,
        text_lengths=tuple(args.text_lengths),
        all_regions=args.replays_graphs,
        max_image_pixels=args.max_image_pixels,
    )
    return TrainingReader(
        args.train_data,
        settings,
        processor.tokenizer,
        args.global_batch_size,
        rank(),
        world_size(),
        seed=args.seed,
        window_samples=args.shuffle_window_samples,
        cache=ShardCache(
            max_bytes=int(args.cache_gigabytes * 1e9), patience=Patience(args.fetch_attempts, args.fetch_seconds)
        ),
        allow_unfinished=args.allow_unfinished,
        crew=RunCrew(),
        shares=args.data_shares,
        workers=args.workers,
        max_bad_fraction=args.max_bad_fraction,
        overfit_batches=args.overfit_batches,
        bad_log=folder / f"bad-samples-{rank():05d}.jsonl",
        device=device,
    )


def check_text_lengths(args: PretrainingArguments, config: PyramidCLIPConfig) -> None:
    """Refuses lengths that texts cannot have, and graphs for texts of any length.

    Raises:
        ValueError: With the setting to change.
    """
    pooling, context = config.text_config.pooling, config.text_config.max_position_embeddings
    if args.text_lengths and pooling == "max":
        raise ValueError(f"text_lengths: under pooling max each text has {context} tokens; leave it out")
    if args.text_lengths and args.text_lengths[-1] > context:
        raise ValueError(f"text_lengths: the model's texts have at most {context} tokens, got {args.text_lengths}")
    if args.replays_graphs and pooling == "eos" and not args.text_lengths:
        raise ValueError(
            "torch_compile_mode: reduce-overhead records a CUDA graph for each length of texts, and under pooling eos "
            f"each batch has another: set text_lengths, e.g. 32 {context}"
        )


def run(args: PretrainingArguments) -> RunResult:
    """The whole run, see `training.loop.run.complete_run`.

    Raises:
        OutOfMemory: The GPU has too little memory for the batch.
    """
    try:
        return complete_run(args, contrastive_task)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(too_little_memory(args, torch.cuda.get_device_properties().total_memory, error)) from error


class OutOfMemory(Failure):
    """The GPU has too little memory for the batch; the message says which would fit."""


def too_little_memory(args: PretrainingArguments, memory: int, error: BaseException) -> str:
    """A sentence on what a GPU of `memory` bytes could do instead of the settings."""
    pairs = args.per_device_batch_size(world_size())
    at_once, reason = args.per_device_chunk_size or pairs, str(error).splitlines()[0]
    said = f"too little memory on the GPU ({memory / 1e9:.0f} GB) for {at_once} pairs at once ({reason})"
    if args.model not in ARCHITECTURES:
        return f"{said}. Set a smaller per_device_chunk_size, which keeps the batch, or gradient_checkpointing"
    most = most_pairs(args, world_size(), int(USABLE * memory))
    if most >= at_once:
        return f"{said}. By training.scale's count {most} should fit: look at what else holds memory there"
    fitting = [chunk for chunk in range(1, most + 1) if pairs % chunk == 0]
    if not fitting:
        return f"{said}. By training.scale's count not one fits: take a smaller model or a larger GPU"
    return (
        f"{said}. By training.scale's count at most {most} fit: set per_device_chunk_size to {fitting[-1]}, which "
        f"keeps the batch, or gradient_checkpointing, or share the batch among more GPUs"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(parse, lambda args: exit_code(run(args), args), argv)


if __name__ == "__main__":
    sys.exit(main())
