"""One run, from its plan to the saved model: steps, log, evaluations, checkpoints, and how it ends."""

import contextlib
import json
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.data.loader import is_worker_death, worker_died
from training.loop.card import publish, write_card
from training.loop.checkpoint import (
    IDENTITY_WITHOUT,
    Progress,
    TrainingState,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    quiet_transformers,
    read_checkpoint,
    write_checkpoint,
)
from training.loop.distributed import StopVote, check_equal_batches, rank, world_size
from training.loop.gradient_cache import GradientCache
from training.loop.objective import ContrastiveObjective, StepLoss
from training.loop.optim import MovingAverage, learning_rate_at, set_learning_rate
from training.loop.tracking import MetricsLog, StepWindow, duplicate_rates, start_trackers
from training.loop.validation import ValidationSet
from training.settings.pretraining import PretrainingArguments

DRY_RUN_STEPS = 2
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Plan:
    """How long the run is. All sizes are samples; steps are optimizer steps."""

    samples: int
    steps_per_epoch: int
    total_steps: int
    per_device_batch_size: int


@dataclass
class Run:
    """The parts of a run, in the order in which they are built.

    wrapped: the prepared objective (DDP, an engine, or `objective` itself). cache: gradient caching, or None.
    last_metrics: what was logged last.
    """

    args: PretrainingArguments
    accelerator: Any
    folder: Path
    processor: Any
    reader: Any
    plan: Plan
    objective: ContrastiveObjective
    wrapped: nn.Module
    optimizer: Any
    cache: GradientCache | None
    average: MovingAverage | None
    validation: ValidationSet | None
    log: MetricsLog | None = None
    window: StepWindow | None = None
    progress: Progress = field(default_factory=Progress)

    name = "pretrain"  # of the progress bar

    @property
    def model(self) -> nn.Module:
        """The bare `PyramidCLIPModel`."""
        return self.objective.model

    # What follows is what another kind of run does in its own way; `training.finetune` is one.

    @property
    def logit_scale(self) -> torch.Tensor | None:
        """The parameter that the log shows, where the objective has it."""
        return self.model.logit_scale

    @property
    def eval_every_steps(self) -> int:
        """Optimizer steps from one evaluation to the next; 0: only at the end."""
        return self.args.eval_every_steps

    def identity(self) -> dict[str, Any]:
        """See `identity_of`."""
        return identity_of(self)

    def take_step(self, batch: dict[str, torch.Tensor], learning_rate: float) -> tuple[StepLoss, torch.Tensor]:
        """See `optimizer_step`."""
        return optimizer_step(self, batch, learning_rate)

    def batch_metrics(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        """What the log says of the newest batch; all processes call it together."""
        return duplicate_rates(batch) if self.args.log_duplicate_rates else {}

    def evaluate(self) -> dict[str, float]:
        """See `evaluate`."""
        return evaluate(self)

    def final_metrics(self) -> dict[str, float]:
        """What is measured of the finished model, beside the last evaluation."""
        return {}

    def record(self, metrics: dict[str, float]) -> dict[str, Any]:
        """See `training_record`."""
        return training_record(self, metrics)

    def write_card(self, folder: Path, record: dict[str, Any]) -> None:
        """Writes README.md beside the saved model."""
        write_card(folder, record)

    def describe_objective(self) -> str:
        """A line for the dry run."""
        return ", ".join(f"{name} {weight:.3g}" for name, weight in self.objective.loss_weights.items())


@dataclass(frozen=True)
class RunResult:
    """What `run` returns. finished: False when it was stopped by SIGTERM or was a dry run. final: folder of the saved
    model, or None. model, processor: as they are in memory.
    """

    folder: Path
    steps: int
    finished: bool
    final: Path | None
    metrics: dict[str, float]
    model: nn.Module
    processor: Any


def plan_steps(args: PretrainingArguments, samples: int, num_processes: int) -> Plan:
    """Length of the run; ValueError with the arithmetic where the data is smaller than one global batch."""
    per_device = args.per_device_batch_size(num_processes)
    steps_per_epoch = samples // args.global_batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data has {samples} samples, fewer than one global batch: {num_processes} processes x {per_device} = "
            f"{args.global_batch_size}. Lower global_batch_size to at most {samples}, or add data"
        )
    if args.overfit_batches:
        if args.overfit_batches > steps_per_epoch:
            raise ValueError(
                f"overfit_batches {args.overfit_batches}: the data has only {steps_per_epoch} "
                f"batches of {args.global_batch_size}"
            )
        steps_per_epoch = args.overfit_batches
    return Plan(samples, steps_per_epoch, args.max_steps or args.epochs * steps_per_epoch, per_device)


def identity_of(run: Run) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued; under "how", what may change."""
    args, model_config = run.args, run.model.config.to_dict()
    for name in (*IDENTITY_WITHOUT, "loss_weights", "label_smoothing"):
        model_config.pop(name, None)
    schedule = ("global_batch_size", "learning_rate", "warmup_fraction", "final_learning_rate_fraction")
    optimizer = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "ema_decay")
    data = (
        "seed",
        "shuffle_window_shards",
        "max_regions",
        "allow_mixed_regions",
        "global_crop_area",
        "local_crop_area",
        "overfit_batches",
    )
    how = ("precision", "per_device_chunk_size", "sync_batch_norm", "gradient_checkpointing", "torch_compile")

    def chosen(names):
        return {name: getattr(args, name) for name in names}

    return {
        "data": {"fingerprint": run.reader.fingerprint, "samples": run.plan.samples, **chosen(data)},
        "objective": {
            "loss_weights": dict(run.objective.loss_weights),
            "label_smoothing": run.objective.label_smoothing,
            "multi_positive": args.multi_positive,
            "freeze": args.freeze,
        },
        "schedule": {"total_steps": run.plan.total_steps, **chosen(schedule)},
        "optimizer": chosen(optimizer),
        "model": model_config,
        "how": chosen(how),
    }


def training_state(run: Run) -> TrainingState:
    """The live objects that a checkpoint holds."""
    deepspeed = run.accelerator.distributed_type == "DEEPSPEED"
    return TrainingState(
        model=run.model,
        optimizer=None if deepspeed else run.optimizer.optimizer,
        identity=run.identity(),
        scaler=run.accelerator.scaler,
        average=run.average,
        engine=run.wrapped if deepspeed else None,
    )


def resume(run: Run) -> None:
    """Continues from the checkpoint that `--resume` names, and opens the log."""
    args, start = run.args, None
    if args.resume:
        start = find_checkpoint(args.resume, run.folder)
        if start is None:
            run.accelerator.print(
                f"--resume latest: {run.folder} has no complete checkpoint yet, starting from the beginning"
            )
    elif list_checkpoints(run.folder):
        raise ValueError(
            f"output_dir {run.folder} already holds a run (last checkpoint "
            f"{list_checkpoints(run.folder)[-1].name}): continue it with "
            "--resume latest, or choose another output_dir"
        )
    if start is not None:
        run.progress, messages = read_checkpoint(start, training_state(run))
        run.reader.load_state(run.progress.reader)
        for message in (f"continuing from {start}, step {run.progress.step} of {run.plan.total_steps}", *messages):
            run.accelerator.print(message)
    start_trackers(run.accelerator, run.folder, args.to_dict(), run.progress.step)
    run.log = MetricsLog(run.folder, run.accelerator, run.progress.step)
    run.window = StepWindow(run.objective.terms, run.folder, args.precision != "fp16", run.progress.window)


def save(run: Run) -> None:
    """Writes a checkpoint of this moment, unless the newest one already is that."""
    if run.args.dry_run or run.progress.step == 0:
        return
    run.progress.window = run.window.rows()  # a loss that is not finite ends the run here, before it can be saved
    run.progress.reader = run.reader.state()
    write_checkpoint(run.folder, training_state(run), run.progress, run.args.keep_checkpoints)


def optimizer_step(run: Run, batch: dict[str, torch.Tensor], learning_rate: float) -> tuple[StepLoss, torch.Tensor]:
    """One step on this process's share of a global batch; returns the losses and the gradient norm before clipping."""
    args, accelerator = run.args, run.accelerator
    set_learning_rate(run.optimizer, learning_rate)
    run.optimizer.zero_grad()
    if run.cache is not None:
        losses = run.cache.forward_backward(batch)
    else:
        losses = run.wrapped(batch)
        accelerator.backward(losses.loss)
    norm = accelerator.clip_grad_norm_(run.objective.parameters(), args.max_grad_norm or float("inf"))
    run.optimizer.step()
    run.model.clamp_logit_scale_()
    if run.average is not None:
        run.average.update(run.model)
    return losses, torch.as_tensor(norm, device=losses.shares.device)


def scheduled_rate(run: Run) -> float:
    """The learning rate of the step that comes next."""
    args = run.args
    peak, warmup, end = args.learning_rate, args.warmup_fraction, args.final_learning_rate_fraction
    return learning_rate_at(run.progress.step, run.plan.total_steps, peak, warmup, end)


def timed_batches(run: Run) -> Iterator[tuple[float, dict[str, Any]]]:
    """(seconds waited, batch) from where the run is to the end of its epoch."""
    batches = iter(run.reader.batches(run.progress.epoch, run.progress.position))
    while True:
        asked = time.perf_counter()
        # A loader that starts draws a number; the model's random numbers must not depend on when that is.
        with torch.random.fork_rng(devices=[]):
            batch = next(batches, None)
        if batch is None:
            return
        size = len(batch["sample_keys"])
        if size != run.plan.per_device_batch_size:
            raise ValueError(
                f"process {rank()} got {size} pairs at step {run.progress.step + 1}, expected "
                f"{run.plan.per_device_batch_size} as every process; "
                "the run stops before pairs are matched wrongly"
            )
        yield time.perf_counter() - asked, batch


def train(run: Run, stop_requested: threading.Event) -> bool:
    """Trains to the last step; False when it stopped before because a process was asked to."""
    args, plan, progress, vote = run.args, run.plan, run.progress, StopVote()
    last = min(plan.total_steps, DRY_RUN_STEPS) if args.dry_run else plan.total_steps
    run.objective.train()
    check_equal_batches(plan.per_device_batch_size, run.accelerator.device)
    with progress_bar(run, last) as bar:
        while progress.step < last:
            for waited, batch in timed_batches(run):
                started = time.perf_counter()
                keys = batch.pop("sample_keys")
                tensors = {name: value.to(run.accelerator.device, non_blocking=True) for name, value in batch.items()}
                learning_rate = scheduled_rate(run)
                losses, norm = run.take_step(tensors, learning_rate)
                advance(run)
                run.window.add(
                    progress.step,
                    losses,
                    norm,
                    run.logit_scale,
                    learning_rate,
                    keys,
                    args.global_batch_size,
                    waited,
                )
                progress.seconds += waited + time.perf_counter() - started
                report(run, bar, batch)
                if vote.cast(stop_requested.is_set()) and progress.step < last:
                    save(run)
                    return False
                if progress.step >= last:
                    break
    return True


def advance(run: Run) -> None:
    """Moves the progress one step on; a pass over the data ends after its last full global batch."""
    progress = run.progress
    progress.step += 1
    progress.position += run.args.global_batch_size
    if progress.position >= run.plan.steps_per_epoch * run.args.global_batch_size:
        progress.epoch, progress.position = progress.epoch + 1, 0


def report(run: Run, bar, batch: dict[str, torch.Tensor]) -> None:
    """Whatever is due after this step: log, evaluation, checkpoint."""
    args, step, total = run.args, run.progress.step, run.plan.total_steps
    bar.update()
    if step % args.log_every_steps == 0 or step == total or (args.dry_run and step == DRY_RUN_STEPS):
        metrics = run.window.metrics() | {"epoch": step / run.plan.steps_per_epoch, "seconds": run.progress.seconds}
        run.log.write(step, metrics | run.batch_metrics(batch) | run.reader.metrics())
        speed = f"{metrics.get('samples_per_second', 0):.0f}"
        bar.set_postfix(loss=f"{metrics['loss/total']:.3f}", samples_per_s=speed)
    if run.eval_every_steps and step % run.eval_every_steps == 0 and step < total:
        run.evaluate()
    if args.save_every_steps and step % args.save_every_steps == 0 and step < total:
        save(run)


def evaluate(run: Run) -> dict[str, float]:
    """Retrieval on the validation set, logged; empty without one."""
    if run.validation is None:
        return {}
    metrics = run.validation.metrics(run.model, AUTOCAST[run.args.precision])
    run.objective.train()
    run.log.write(run.progress.step, metrics)
    return metrics


def progress_bar(run: Run, last: int):
    """A bar over the steps with rate and time left; silent on all processes but the first."""
    from tqdm.auto import tqdm

    return tqdm(
        total=last,
        initial=run.progress.step,
        desc=run.name,
        unit="step",
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    )


def finish(run: Run) -> tuple[Path, dict[str, float]]:
    """Last checkpoint, last evaluation, and the model to use in RUN/final; with EMA, its average in
    RUN/final-average.
    """
    if not checkpoint_path(run.folder, run.progress.step).is_dir():
        save(run)
    metrics = run.evaluate() | run.final_metrics()
    final = run.folder / "final"
    export(run, final, metrics)
    if run.average is not None:
        with run.average.swapped_into(run.model):
            average_metrics = evaluate_average(run)
            export(run, run.folder / "final-average", average_metrics)
    for line in run.reader.report():
        run.accelerator.print(line)
    if getattr(run.args, "push_to_hub", None) and run.accelerator.is_main_process:
        run.accelerator.print(f"published: {publish(run.folder, run.args.push_to_hub)}")
    return final, metrics


def evaluate_average(run: Run) -> dict[str, float]:
    """As `evaluate`, for the averaged weights, logged as `validation_average/...`."""
    if run.validation is None:
        return {}
    metrics = run.validation.metrics(run.model, AUTOCAST[run.args.precision])
    run.log.write(
        run.progress.step, {name.replace("validation/", "validation_average/"): v for name, v in metrics.items()}
    )
    return metrics


def export(run: Run, folder: Path, metrics: dict[str, float]) -> None:
    """A folder for `from_pretrained`: weights, configs, tokenizer, image processor, model card. Written aside, then
    renamed.
    """
    if not run.accelerator.is_main_process:
        return
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    with quiet_transformers():
        run.model.save_pretrained(aside)
    run.processor.save_pretrained(aside)
    record = run.record(metrics)
    (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    run.write_card(aside, record)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def training_record(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    """`training.json`: settings, data, length and results of the run, from which the model card is made."""
    return {
        "settings": run.args.to_dict(),
        "samples_seen": run.progress.step * run.args.global_batch_size,
        "steps": run.progress.step,
        "processes": world_size(),
        "seconds": run.progress.seconds,
        "data": run.reader.description,
        "metrics": metrics,
    }


def describe_dry_run(run: Run) -> None:
    """What the run would be, after its two steps."""
    args, plan = run.args, run.plan
    trainable = sum(p.numel() for p in run.objective.parameters() if p.requires_grad)
    lines = [
        f"dry run: {DRY_RUN_STEPS} steps done, nothing saved. The run would be",
        f"  model       {args.model}, {sum(p.numel() for p in run.model.parameters()):,} parameters, "
        f"{trainable:,} trained",
        f"  objective   {run.describe_objective()}",
        f"  data        {plan.samples:,} samples, {plan.steps_per_epoch:,} steps an epoch",
        f"  batch       {args.global_batch_size:,} = {run.accelerator.num_processes} processes x "
        f"{plan.per_device_batch_size:,}",
        f"  length      {plan.total_steps:,} steps, {plan.total_steps * args.global_batch_size:,} samples, into "
        f"{args.output_dir}",
    ]
    run.accelerator.print("\n".join(lines))


@contextlib.contextmanager
def termination_noticed() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process; a second SIGTERM ends it."""
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = signal.getsignal(signal.SIGTERM)

    def notice(signum, frame):
        requested.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, notice)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)


def complete_run(args: Any, build: Callable[[Any, Path], Run]) -> RunResult:
    """`run` for any settings and the function that makes a `Run` of them."""
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(termination_noticed())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if args.dry_run else args.output_dir)
        parts = build(args, folder)
        resume(parts)
        stack.callback(parts.reader.close)
        try:
            complete = train(parts, stop_requested)
        except RuntimeError as error:
            if is_worker_death(error):
                raise worker_died(error, args.dataloader_workers) from error
            raise
        final, metrics = None, {}
        if args.dry_run:
            describe_dry_run(parts)
        elif complete:
            final, metrics = finish(parts)
        else:
            parts.accelerator.print(
                f"stopped by SIGTERM at step {parts.progress.step}, saved; continue with --resume latest"
            )
        parts.accelerator.end_training()
    finished = complete and not args.dry_run
    return RunResult(folder, parts.progress.step, finished, final, metrics, parts.model, parts.processor)
