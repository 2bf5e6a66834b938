"""One run of any task: how it starts or continues, its steps, log, evaluations and checkpoints, and how it ends.

`complete_run` is the table of contents, `start` makes a `Run`, `train` is the loop, `optimizer_step` one step of it.
"""

import contextlib
import json
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, final

import torch
from torch import nn

from pyramidclip_command import EXIT_STOPPED
from pyramidclip_hf.files import folder_written_aside
from pyramidclip_hf.loading import quiet_transformers
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.loader import is_worker_death, worker_died
from training.loop.card import publish
from training.loop.checkpoint import (
    Progress,
    TrainingState,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from training.loop.distributed import StopVote, check_equal_batches, rank, world_size
from training.loop.optim import set_learning_rate
from training.loop.processes import algorithms, process_timeout, start_processes, synchronised_batch_norm
from training.loop.task import Batch, Metrics, StepLoss, Task
from training.loop.tracking import MetricsLog, StepWindow, start_trackers
from training.settings.fields import default_identity
from training.settings.run import RunSettings

DRY_RUN_STEPS = 2

Settings = TypeVar("Settings", bound=RunSettings)
# (settings, Accelerate's Accelerator, folder of the run) -> the task, once the processes know each other.
MakeTask = Callable[[Settings, Any, Path], Task]


@final
@dataclass
class Run:
    """A task on its way.

    Attributes:
        task: What is trained.
        accelerator: Accelerate's `Accelerator`.
        folder: Where everything goes.
        wrapped: The prepared objective: DDP, or the objective itself.
        optimizer: The prepared optimizer.
        progress: Where the run is.
        log: metrics.jsonl and the trackers.
        window: The steps since the last line of the log.
    """

    task: Task
    accelerator: Any
    folder: Path
    wrapped: nn.Module
    optimizer: Any
    progress: Progress
    log: MetricsLog
    window: StepWindow


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        folder: Of the run.
        steps: Optimizer steps done.
        finished: False when it was stopped by SIGTERM or was a dry run.
        final: Folder of the saved model, or None.
        metrics: Of the last evaluation.
        model: As it is in memory.
        processor: As it is in memory.
    """

    folder: Path
    steps: int
    finished: bool
    final: Path | None
    metrics: Metrics
    model: nn.Module
    processor: PyramidCLIPProcessor


def complete_run(settings: Settings, make_task: MakeTask[Settings]) -> RunResult:
    """The whole run, in this process and those that `accelerate launch` started beside it.

    Raises:
        ValueError: Settings and data do not fit each other, or a checkpoint belongs to another run.
        CheckpointError: A checkpoint could not be written or read.
        NonFiniteLoss: A loss was NaN or infinite.
        DataError: The data cannot be trained on.
    """
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(termination_noticed())
        stack.enter_context(algorithms(settings.deterministic))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if settings.dry_run else settings.output_dir)
        run = start(settings, make_task, folder)
        task = run.task
        stack.callback(task.reader.close)
        try:
            complete = train(run, stop_requested)
        except RuntimeError as error:
            if is_worker_death(error):
                raise worker_died(error, settings.workers) from error
            raise
        final: Path | None = None
        metrics: Metrics = {}
        if settings.dry_run:
            describe_dry_run(run)
        elif complete:
            final, metrics = finish(run)
        else:
            run.accelerator.print(
                f"stopped by SIGTERM at step {run.progress.step}, saved; continue with --resume latest"
            )
        run.accelerator.end_training()
    finished = complete and not settings.dry_run
    return RunResult(folder, run.progress.step, finished, final, metrics, task.objective.model, task.processor)


def exit_code(result: RunResult, settings: RunSettings) -> int:
    """Of a command that trained: 0, or 75 where the run was stopped before its end."""
    return 0 if result.finished or settings.dry_run else EXIT_STOPPED


##################################################################################################
#  Starting, resuming and saving                                                                 #
##################################################################################################


def start(settings: Settings, make_task: MakeTask[Settings], folder: Path) -> Run:
    """A run from the beginning, or from the checkpoint that `--resume` names."""
    accelerator = start_processes(settings, folder)
    settings.per_device_batch_size(accelerator.num_processes)  # refused before any data is opened
    task = make_task(settings, accelerator, folder)
    if synchronised_batch_norm(settings):
        nn.SyncBatchNorm.convert_sync_batchnorm(task.objective)  # in place
    wrapped, optimizer = accelerator.prepare(task.objective, task.build_optimizer())
    torch.manual_seed(settings.seed * 1_000_003 + rank())  # each process its own dropout, if the model has any
    progress = resume(task, accelerator, training_state(task, accelerator, wrapped, optimizer), folder)
    start_trackers(accelerator, folder, settings.to_dict(), progress.step)
    log = MetricsLog(folder, accelerator, progress.step)
    window = StepWindow(task.objective.terms, folder, settings.precision != "fp16", progress.window)
    return Run(task, accelerator, folder, wrapped, optimizer, progress, log, window)


def training_state(task: Task, accelerator: Any, wrapped: nn.Module, optimizer: Any) -> TrainingState:
    """The live objects that a checkpoint holds."""
    return TrainingState(
        model=task.objective.model,
        optimizer=optimizer.optimizer,
        identity=task.identity(),
        defaults=default_identity(task.settings),
        accepted=task.settings.accept_identity,
        scaler=accelerator.scaler,
        kept=task.kept,
        processor=task.processor,
    )


def resume(task: Task, accelerator: Any, state: TrainingState, folder: Path) -> Progress:
    """Fills `state` and the task's reader from the checkpoint that `--resume` names; where the run stands then.

    Raises:
        ValueError: The folder holds a run, and none is to be continued; or the checkpoint is another run's.
        CheckpointError: There is no such checkpoint, or it is damaged.
    """
    named, found = task.settings.resume, None
    if named:
        found = find_checkpoint(named, folder)
        if found is None:
            accelerator.print(f"--resume latest: {folder} has no complete checkpoint yet, starting from the beginning")
    elif list_checkpoints(folder):
        raise ValueError(
            f"output_dir {folder} already holds a run (last checkpoint {list_checkpoints(folder)[-1].name}): continue "
            "it with --resume latest, or choose another output_dir"
        )
    if found is None:
        return Progress()
    progress, messages = read_checkpoint(found, state)
    task.reader.load_state(progress.reader)
    for message in (f"continuing from {found}, step {progress.step} of {task.plan.total_steps}", *messages):
        accelerator.print(message)
    return progress


def save(run: Run) -> None:
    """Writes a checkpoint of this moment, unless the run saves none."""
    task, progress = run.task, run.progress
    if task.settings.dry_run or progress.step == 0:
        return
    progress.window = run.window.rows()  # a loss that is not finite ends the run here, before it can be saved
    progress.reader = task.reader.state()
    state = training_state(task, run.accelerator, run.wrapped, run.optimizer)
    write_checkpoint(run.folder, state, progress, task.settings.keep_checkpoints)


##################################################################################################
#  The loop                                                                                      #
##################################################################################################


def optimizer_step(run: Run, batch: Batch, learning_rate: float) -> tuple[StepLoss, torch.Tensor]:
    """One step on this process's share of a global batch; the losses, and the 0-d gradient norm before clipping."""
    task, limit = run.task, run.task.settings.max_grad_norm or float("inf")
    set_learning_rate(run.optimizer, learning_rate)
    run.optimizer.zero_grad()
    losses = task.backward(run.accelerator, run.wrapped, batch)
    norm = run.accelerator.clip_grad_norm_(task.objective.parameters(), limit)
    run.optimizer.step()
    task.after_step()
    return losses, torch.as_tensor(norm, device=losses.shares.device)


def timed_batches(run: Run) -> Iterator[tuple[float, dict[str, Any]]]:
    """(seconds waited, batch) from where the run is to the end of its epoch.

    Raises:
        ValueError: A batch is not of the size that all processes have.
    """
    batches = iter(run.task.reader.batches(run.progress.epoch, run.progress.position))
    expected = run.task.plan.per_device_batch_size
    while True:
        asked = time.perf_counter()
        # A loader that starts draws a number; the model's random numbers must not depend on when that is.
        with torch.random.fork_rng(devices=[]):
            batch = next(batches, None)
        if batch is None:
            return
        size = len(batch["sample_keys"])
        if size != expected:
            raise ValueError(
                f"process {rank()} got {size} pairs at step {run.progress.step + 1}, expected {expected} as every "
                "process; the run stops before pairs are matched wrongly"
            )
        yield time.perf_counter() - asked, batch


def train(run: Run, stop_requested: threading.Event) -> bool:
    """Trains to the last step; False when it stopped before because a process was asked to."""
    task, settings, progress = run.task, run.task.settings, run.progress
    vote = StopVote(process_timeout(settings))
    last = min(task.plan.total_steps, DRY_RUN_STEPS) if settings.dry_run else task.plan.total_steps
    task.objective.train()
    check_equal_batches(task.plan.per_device_batch_size, run.accelerator.device)
    with progress_bar(run, last) as bar:
        while progress.step < last:
            task.begin_epoch(progress.epoch)
            for waited, batch in timed_batches(run):
                started = time.perf_counter()
                keys = batch.pop("sample_keys")
                tensors = {name: value.to(run.accelerator.device, non_blocking=True) for name, value in batch.items()}
                rate = task.learning_rate(progress.step)
                losses, norm = optimizer_step(run, tensors, rate)
                advance(run)
                samples = settings.global_batch_size
                run.window.add(progress.step, losses, norm, task.logit_scale, rate, keys, samples, waited)
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
    progress, size = run.progress, run.task.settings.global_batch_size
    progress.step += 1
    progress.position += size
    if progress.position >= run.task.plan.steps_per_epoch * size:
        progress.epoch, progress.position = progress.epoch + 1, 0


def report(run: Run, bar: Any, batch: Batch) -> None:
    """Whatever is due after this step: log, evaluation, checkpoint.

    Args:
        run: The run.
        bar: Of `progress_bar`.
        batch: The step's, on the host.
    """
    task, settings, step = run.task, run.task.settings, run.progress.step
    plan, total = task.plan, task.plan.total_steps
    bar.update()
    if step % settings.log_every_steps == 0 or step == total or (settings.dry_run and step == DRY_RUN_STEPS):
        metrics = run.window.metrics() | {"epoch": step / plan.steps_per_epoch, "seconds": run.progress.seconds}
        run.log.write(step, metrics | task.batch_metrics(batch) | task.reader.metrics())
        speed = f"{metrics.get('samples_per_second', 0):.0f}"
        bar.set_postfix(loss=f"{metrics['loss/total']:.3f}", samples_per_s=speed)
    if task.eval_every_steps and step % task.eval_every_steps == 0 and step < total:
        evaluate(run, task.evaluate)
    if settings.save_every_steps and step % settings.save_every_steps == 0 and step < total:
        save(run)


def evaluate(run: Run, measure: Callable[[], Metrics], logged_as: str = "validation") -> Metrics:
    """What `measure` finds, logged where there is anything.

    Args:
        run: The run, whose objective is in training mode afterwards.
        measure: `Task.evaluate` or `Task.final_metrics`.
        logged_as: The log's word for `validation`.
    """
    metrics = measure()
    run.task.objective.train()
    if metrics:
        logged = {name.replace("validation/", f"{logged_as}/"): value for name, value in metrics.items()}
        run.log.write(run.progress.step, logged)
    return metrics


def progress_bar(run: Run, last: int) -> Any:
    """A bar over the steps with rate and time left; silent on all processes but the first."""
    from tqdm.auto import tqdm

    return tqdm(
        total=last,
        initial=run.progress.step,
        desc=run.task.name,
        unit="step",
        dynamic_ncols=True,
        disable=not run.accelerator.is_main_process,
    )


##################################################################################################
#  The end                                                                                       #
##################################################################################################


def finish(run: Run) -> tuple[Path, Metrics]:
    """Last checkpoint, last evaluation, and the model to use in RUN/final; its variants in RUN/final-NAME.

    Returns:
        RUN/final, and its metrics.
    """
    task = run.task
    if not checkpoint_path(run.folder, run.progress.step).is_dir():
        save(run)
    metrics = evaluate(run, task.evaluate) | evaluate(run, task.final_metrics)
    final = run.folder / "final"
    export(run, final, metrics)
    for name, swapped in task.variants.items():
        with swapped:
            export(run, run.folder / f"final-{name}", evaluate(run, task.evaluate, f"validation_{name}"))
    for line in task.reader.report():
        run.accelerator.print(line)
    if task.repository and run.accelerator.is_main_process:
        run.accelerator.print(f"published: {publish(run.folder, task.repository)}")
    return final, metrics


def export(run: Run, folder: Path, metrics: Metrics) -> None:
    """A folder for `from_pretrained`: weights, configs, tokenizer, image processor, model card; whole or not at all."""
    if not run.accelerator.is_main_process:
        return
    record = training_record(run, metrics)
    with folder_written_aside(folder) as aside:
        with quiet_transformers():
            run.task.objective.model.save_pretrained(aside)
        run.task.processor.save_pretrained(aside)
        (aside / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        run.task.write_card(aside, record)


def training_record(run: Run, metrics: Metrics) -> dict[str, Any]:
    """`training.json`: settings, data, length and results of the run, from which the model card is made."""
    settings, progress = run.task.settings, run.progress
    return {
        "settings": settings.to_dict(),
        "samples_seen": progress.step * settings.global_batch_size,
        "steps": progress.step,
        "processes": world_size(),
        "seconds": progress.seconds,
        "data": run.task.reader.description,
        "metrics": metrics,
    } | run.task.record()


def describe_dry_run(run: Run) -> None:
    """What the run would be, after its two steps."""
    task, settings, plan = run.task, run.task.settings, run.task.plan
    trainable = sum(p.numel() for p in task.objective.parameters() if p.requires_grad)
    parameters = sum(p.numel() for p in task.objective.model.parameters())
    lines = [
        f"dry run: {DRY_RUN_STEPS} steps done, nothing saved. The run would be",
        f"  model       {settings.model}, {parameters:,} parameters, {trainable:,} trained",
        f"  objective   {task.describe_objective()}",
        f"  data        {plan.samples:,} samples, {plan.steps_per_epoch:,} steps an epoch",
        f"  batch       {settings.global_batch_size:,} = {world_size()} processes x {plan.per_device_batch_size:,}",
        f"  length      {plan.total_steps:,} steps, {plan.total_steps * settings.global_batch_size:,} samples, into "
        f"{settings.output_dir}",
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

    def notice(signum: int, frame: FrameType | None) -> None:
        requested.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, notice)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before)
