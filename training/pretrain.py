"""Pre-trains a PyramidCLIP model.

    accelerate launch -m training.pretrain --config training/configs/demo.yaml [--field value ...] [--resume latest]

One process runs it as well (`python -m training.pretrain ...`). `docs/training.md` explains the settings, the folder
of a run, and what happens when something goes wrong. Exit codes: 0 finished; 2 a setting is wrong; 75 stopped by
SIGTERM after saving a checkpoint, to be continued with `--resume latest`; 1 anything else.

Read from the bottom: `main` parses, `build` makes the parts, `training.loop.run` is the loop.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import levels_of
from training.data.batches import DataError
from training.data.loader import TrainingReader, settings_for
from training.loop.checkpoint import (
    CheckpointError,
)
from training.loop.distributed import rank, world_size
from training.loop.gradient_cache import GradientCache
from training.loop.initial_model import initial_model
from training.loop.objective import ContrastiveObjective
from training.loop.optim import MovingAverage, build_optimizer
from training.loop.processes import start_processes, synchronised_batch_norm
from training.loop.run import AUTOCAST, Run, RunResult, complete_run, plan_steps
from training.loop.tracking import NonFiniteLoss
from training.loop.validation import ValidationSet
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import parse_settings

EXIT_WRONG_SETTING = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: try again later


def build(args: PretrainingArguments, folder: Path) -> Run:
    """All parts of the run, not yet resumed."""
    accelerator = start_processes(args, folder)
    model, processor = initial_model(args)
    args.per_device_batch_size(accelerator.num_processes)  # refused before any data is opened
    reader = open_reader(args, processor, model.config, folder)
    plan = plan_steps(args, reader.samples, accelerator.num_processes)
    if synchronised_batch_norm(args):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    objective = ContrastiveObjective(
        model,
        model.config.loss_weights,
        model.config.label_smoothing,
        args.freeze,
        AUTOCAST[args.precision],
        args.multi_positive,
    )
    if args.torch_compile:
        objective.encode = torch.compile(objective.encode)
    betas = (args.adam_beta1, args.adam_beta2)
    objective.to(accelerator.device)
    optimizer = build_optimizer(objective, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    validation = None
    if args.validation_data:
        validation = ValidationSet(
            args.validation_data, args.validation_samples, objective.terms, processor, args.max_regions
        )
    torch.manual_seed(args.seed * 1_000_003 + rank())  # each process its own dropout, if the model has any
    return Run(
        args=args,
        accelerator=accelerator,
        folder=folder,
        processor=processor,
        reader=reader,
        plan=plan,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        cache=GradientCache(accelerator, wrapped, args.per_device_chunk_size) if args.per_device_chunk_size else None,
        average=MovingAverage(model, args.ema_decay) if args.ema_decay else None,
        validation=validation,
    )


def open_reader(args: PretrainingArguments, processor, config, folder: Path):
    """The training data of this process; only the levels that the objective names are read."""
    settings = settings_for(
        processor,
        levels_of(config.loss_weights),
        pooling=config.text_config.pooling,
        max_length=config.text_config.max_position_embeddings,
        roi_feature_size=config.vision_config.roi_feature_size,
        max_regions=args.max_regions,
        allow_mixed_regions=args.allow_mixed_regions,
        global_area=tuple(args.global_crop_area),
        local_area=tuple(args.local_crop_area),
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
        window_shards=args.shuffle_window_shards,
        workers=args.dataloader_workers,
        max_bad_fraction=args.max_bad_fraction,
        overfit_batches=args.overfit_batches,
        bad_log=folder / f"bad-samples-{rank():05d}.jsonl",
        pin_memory=torch.cuda.is_available(),
    )


def run(args: PretrainingArguments) -> RunResult:
    """The whole run, in this process and those that `accelerate launch` started beside it.

    Raises ValueError for settings and data that do not fit, CheckpointError, NonFiniteLoss, and what reading data
    raises.
    """
    return complete_run(args, build)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(lambda words: parse_settings(PretrainingArguments, words), run, argv)


def run_command(parse: Callable[[Sequence[str]], Any], run: Callable[[Any], RunResult], argv: Sequence[str] | None):
    """The exit code of a command that trains, see the module's docstring; errors go to stderr as one line."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    try:
        result = run(args)
    except (ValueError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    except (CheckpointError, NonFiniteLoss, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0 if result.finished or args.dry_run else EXIT_STOPPED


if __name__ == "__main__":
    sys.exit(main())
