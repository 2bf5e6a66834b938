"""One run of any task: how it starts or continues, its steps, log, evaluations and checkpoints, and how it ends.

`complete_run` is the table of contents, `start` makes a `Run`, `train` is the loop, `optimizer_step` one step of it.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import nn

from pyramidclip_command import EXIT_FAILED, EXIT_STOPPED, EXIT_UNPUBLISHED, Failure
from pyramidclip_hf import __version__
from pyramidclip_hf.files import folder_written_aside, json_text
from pyramidclip_hf.loading import quiet_transformers
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.loader import WorkerDied, begin_workers, is_worker_death, worker_died
from training.loop.agreement import check_equal, check_same_folder, first_decides, together
from training.loop.card import publish
from training.loop.checkpoint import (
    Progress,
    TrainingState,
    random_state,
    set_random_state,
    write_checkpoint,
)
from training.loop.distributed import (
    StopVote,
    check_equal_batches,
    everyone,
    rank,
    sum_each_gradient_alone,
    world_size,
)
from training.loop.optim import set_learning_rate
from training.loop.outcome import (
    OtherProcessFailed,
    Outcome,
    RunFailed,
    Way,
    explained,
    forget_unfinished,
    is_full_disk,
    outcome_of,
    write_outcome,
)
from training.loop.pace import Pace
from training.loop.processes import (
    algorithms,
    form_group,
    process_timeout,
    start_accelerator,
    synchronised_batch_norm,
)
from training.loop.resume import resume
from training.loop.run_folder import sole_run
from training.loop.signals import termination_noticed
from training.loop.task import Batch, Metrics, StepLoss, Task
from training.loop.tracking import MetricsLog, StepWindow, start_trackers
from training.loop.watch import Ended, Watch, doing, waiting
from training.settings.fields import default_identity
from training.settings.run import RunSettings, told_number, told_processes

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
        pace: The time that they took.
        saved: The step of the newest checkpoint in `folder`, 0 where there is none.
        finished: Before it was started; then nothing is written.
    """

    task: Task
    accelerator: Any
    folder: Path
    wrapped: nn.Module
    optimizer: Any
    progress: Progress
    log: MetricsLog
    window: StepWindow
    pace: Pace
    saved: int
    finished: bool


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
        unpublished: Why the Hub did not take the final model, where it was to; in the first process.
    """

    folder: Path
    steps: int
    finished: bool
    final: Path | None
    metrics: Metrics
    model: nn.Module
    processor: PyramidCLIPProcessor
    unpublished: str | None = None


def complete_run(settings: Settings, make_task: MakeTask[Settings]) -> RunResult:
    """The whole run, in this process and those that `accelerate launch` started beside it.

    However it ends, RUN/stopped.json says it, see `training.loop.outcome`.

    Raises:
        ValueError: Settings and data do not fit each other, or a checkpoint belongs to another run.
        CheckpointError: A checkpoint could not be written or read.
        NonFiniteLoss: A loss was NaN or infinite.
        DataError: The data cannot be trained on.
        RunFailed: A file could not be read or written on the way.
        OtherProcessFailed: What another process raised.
    """
    with contextlib.ExitStack() as stack:
        stop_requested = stack.enter_context(termination_noticed())
        stack.enter_context(algorithms(settings.deterministic))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if settings.dry_run else settings.output_dir)
        form_group(settings)
        way = Way()
        watch = stack.enter_context(watched(settings, way))
        told = ""
        if not settings.dry_run:
            with end_told(watch):
                told = first_decides(lambda: stack.enter_context(sole_run(folder)))
                first_decides(lambda: forget_unfinished(folder))
            way.folder = folder
        with explained(way), end_told(watch):
            accelerator = start_accelerator(settings, folder)
            if told:
                accelerator.print(told)
            run = start(settings, make_task, folder, accelerator)
            stack.callback(run.task.reader.close)
            way.reached = lambda: run.progress.step
            try:
                return _from_start_to_end(run, stop_requested)
            except Exception as error:
                said = _as_it_is_said(error, run)
                if said is error:
                    raise
                raise said from error


@contextlib.contextmanager
def watched(settings: RunSettings, way: Way) -> Iterator[Watch | None]:
    """Inside, the processes hear of each other; one that is silent too long ends the others, as one that fails does.

    Args:
        settings: Of the run.
        way: How far the run is, and where the reason is written.
    """
    if world_size() == 1:
        yield None
        return

    def give_up(ended: Ended) -> None:
        # The main thread may wait for a device, where no exception reaches it.
        print(f"error: {ended.message}; the run ends at step {way.reached()}", file=sys.stderr, flush=True)
        if way.folder is not None:
            with contextlib.suppress(OSError):
                write_outcome(way.folder, Outcome(*ended), way.reached())
        os._exit(EXIT_FAILED)

    store = torch.distributed.distributed_c10d._get_default_store()
    watch = Watch(store, rank(), world_size(), settings.process_timeout_minutes * 60, give_up)
    with watch.at_work():
        yield watch


@contextlib.contextmanager
def end_told(watch: Watch | None) -> Iterator[None]:
    """Tells the others the error that ends the block; of a broken connection it finds out whose first.

    Raises:
        OtherProcessFailed: In place of the error of a collective that another process did not come to.
    """
    try:
        yield
    except BaseException as error:
        outcome = outcome_of(error)
        if watch is None:
            raise
        lost = outcome.reason == "another process" and not isinstance(error, OtherProcessFailed)
        if lost:
            outcome = Outcome(*watch.search_loss(outcome.message))
        watch.leave(Ended(outcome.reason, outcome.message))
        if lost:
            raise OtherProcessFailed(outcome) from error
        raise


def _from_start_to_end(run: Run, stop_requested: threading.Event) -> RunResult:
    task, folder = run.task, run.folder
    final: Path | None = None
    metrics: Metrics = {}
    unpublished: str | None = None
    finished = False
    if run.finished:
        run.accelerator.print(f"{folder} is finished, step {run.progress.step}: nothing is left to do")
        final, finished = folder / "final", True
        kept = json.loads((final / "training.json").read_text(encoding="utf-8"))["metrics"]
        metrics = {name: float(value) for name, value in kept.items()}  # what is no number is text in JSON
    else:
        complete = train(run, stop_requested)
        if task.settings.dry_run:
            describe_dry_run(run)
        elif complete:
            final, metrics, unpublished = finish(run)
            finished = True
        else:
            told = f"stopped by SIGTERM at step {run.progress.step}, saved; continue with --resume latest"
            run.accelerator.print(told)
            conclude(run, Outcome("asked to stop", told))
    run.accelerator.end_training()
    return RunResult(
        folder, run.progress.step, finished, final, metrics, task.objective.model, task.processor, unpublished
    )


def conclude(run: Run, outcome: Outcome, **more: Any) -> None:
    """Writes stopped.json; no process leaves before it is there."""
    first_decides(lambda: write_outcome(run.folder, outcome, run.progress.step, **more))


def _as_it_is_said(error: Exception, run: Run) -> Exception:
    """What a run that was on its way raises for `error`: nothing that a command would call wrong usage."""
    if is_worker_death(error):
        return worker_died(error, run.task.settings.workers)
    if isinstance(error, OSError):
        return RunFailed(f"step {run.progress.step}: {error}. Mend it, then continue with --resume latest")
    if isinstance(error, (ValueError, ImportError)):
        return RuntimeError(f"step {run.progress.step}: {error}")
    return error


def exit_code(result: RunResult, settings: RunSettings) -> int:
    """Of a command that trained: 0; 75 where the run was stopped before its end; 4 where the Hub did not take it."""
    if result.unpublished:
        print(f"error: {result.unpublished}", file=sys.stderr, flush=True)
        return EXIT_UNPUBLISHED
    return 0 if result.finished or settings.dry_run else EXIT_STOPPED


##################################################################################################
#  Starting, resuming and saving                                                                 #
##################################################################################################


def start(settings: Settings, make_task: MakeTask[Settings], folder: Path, accelerator: Any) -> Run:
    """A run from the beginning, or from the checkpoint that `--resume` names."""
    settings.per_device_batch_size(accelerator.num_processes)  # refused before any data is opened
    # Before they tell each other anything that another version may not understand.
    check_equal({"torch": torch.__version__, "pyramidclip-hf": __version__})
    if not settings.dry_run:
        check_same_folder(folder)  # before any checkpoint is looked for
    begin_workers(accelerator.device, settings.workers)
    with doing("opening the data"):
        task = together(lambda: make_task(settings, accelerator, folder))
    if synchronised_batch_norm(settings):
        nn.SyncBatchNorm.convert_sync_batchnorm(task.objective)  # in place
    wrapped, optimizer = accelerator.prepare(task.objective, task.build_optimizer())
    if settings.deterministic:
        sum_each_gradient_alone(wrapped)
    torch.manual_seed(settings.seed * 1_000_003 + rank())  # each process its own dropout, if the model has any
    state = training_state(task, accelerator, wrapped, optimizer)
    begun = resume(task.settings, accelerator, state, folder, task.plan.total_steps)
    task.reader.load_state(begun.progress.reader)
    check_processes(task, state, begun.progress)
    log = MetricsLog(folder, accelerator)
    if not begun.finished:
        start_trackers(accelerator, folder, settings.to_dict(), begun.progress.step)
        for message in first_decides(lambda: log.continue_at(begun.progress.step, begun.log)):
            accelerator.print(message)
    window = StepWindow(task.objective.terms, folder, settings.precision != "fp16", begun.progress.window)
    return Run(
        task=task,
        accelerator=accelerator,
        folder=folder,
        wrapped=wrapped,
        optimizer=optimizer,
        progress=begun.progress,
        log=log,
        window=window,
        pace=Pace(task.objective.model, accelerator.device),
        saved=begun.saved,
        finished=begun.finished,
    )


def check_processes(task: Task, state: TrainingState, progress: Progress) -> None:
    """Compares all processes before the first step.

    Raises:
        ValueError: They do not agree on data, plan, place or settings.
    """
    identity = json_text(state.identity, sort_keys=True, default=str)
    check_equal(
        {
            "data": task.reader.fingerprint,
            "samples": task.plan.samples,
            "steps in an epoch": task.plan.steps_per_epoch,
            "steps": task.plan.total_steps,
            "batch of a process": task.plan.per_device_batch_size,
            "continues at step": progress.step,
            "epoch": progress.epoch,
            "position": progress.position,
            "identity": hashlib.sha256(identity.encode()).hexdigest()[:16],
        }
    )


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


def save(run: Run) -> None:
    """Writes a checkpoint of this moment, unless there is one or the run saves none."""
    task, progress = run.task, run.progress
    if task.settings.dry_run or progress.step == run.saved:
        return
    progress.window = run.window.rows()  # a loss that is not finite ends the run here, before it can be saved
    progress.reader = task.reader.state()
    state = training_state(task, run.accelerator, run.wrapped, run.optimizer)
    with doing("saving"):
        write_checkpoint(run.folder, state, progress, task.settings.keep_checkpoints)
    run.saved = progress.step


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
    task.after_step(not run.optimizer.step_was_skipped)
    return losses, torch.as_tensor(norm, device=losses.shares.device)


def timed_batches(run: Run, stop_requested: threading.Event) -> Iterator[tuple[float, dict[str, Any]]]:
    """(seconds waited, batch) from where the run is to the end of its epoch.

    Of workers that die after a stop was asked for, nobody speaks: this process reads the last batches itself.

    Raises:
        Failure: A batch is not of the size that all processes have.
    """
    batches = iter(run.task.reader.batches(run.progress.epoch, run.progress.position))
    expected = run.task.plan.per_device_batch_size
    while True:
        asked = time.perf_counter()
        # A loader that starts draws a number; the model's random numbers must not depend on when that is.
        with torch.random.fork_rng(devices=[]):
            try:
                with doing(f"reading the data of step {run.progress.step + 1}"):
                    batch = next(batches, None)
            except WorkerDied:
                if not stop_requested.is_set():
                    raise
                run.task.reader.read_here()
                batches = iter(run.task.reader.batches(run.progress.epoch, run.progress.position))
                batch = next(batches, None)
        if batch is None:
            return
        size = len(batch["sample_keys"])
        if size != expected:
            raise Failure(
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
    # What a run does after saving, one that continues does again.
    if evaluation_is_due(run) and first_decides(lambda: not run.log.has_validation(progress.step)):
        evaluate(run, task.evaluate)
    with progress_bar(run, last) as bar:
        while progress.step < last:
            task.begin_epoch(progress.epoch)
            for waited, batch in timed_batches(run, stop_requested):
                started = time.perf_counter()
                keys = batch.pop("sample_keys")
                tensors = {name: value.to(run.accelerator.device, non_blocking=True) for name, value in batch.items()}
                with doing(f"step {progress.step + 1}"), waiting():
                    losses, norm = optimizer_step(run, tensors, task.learning_rate(progress.step))
                rate = run.optimizer.param_groups[0]["lr"]  # what the step was made with, and not what was wanted
                advance(run)
                run.window.add(progress.step, losses, norm, task.logit_scale, rate, keys)
                run.pace.add(settings.global_batch_size, waited)
                progress.seconds += waited + time.perf_counter() - started
                report(run, bar, batch)
                with waiting():
                    stop = vote.cast(stop_requested.is_set())
                if stop and progress.step < last:
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
    """Whatever is due after this step: log, checkpoint, evaluation.

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
        of_all, lines = run.pace.metrics(task.reader.metrics())
        metrics |= of_all
        for line in lines:
            run.accelerator.print(line, file=sys.stderr)
        run.log.write(step, metrics | task.batch_metrics(batch))
        task.reader.check_bad(sum(everyone(task.reader.recent_bad)))
        speed = f"{metrics.get('samples_per_second', 0):.0f}"
        bar.set_postfix(loss=f"{metrics['loss/total']:.3f}", samples_per_s=speed)
    # First, so that no evaluation that fails or is killed takes a checkpoint along.
    if settings.save_every_steps and step % settings.save_every_steps == 0 and step < total:
        save(run)
    if evaluation_is_due(run):
        evaluate(run, task.evaluate)


def evaluation_is_due(run: Run) -> bool:
    """Whether the task is to be measured after this step, on the way; behind the last one `finish` does."""
    every, step = run.task.eval_every_steps, run.progress.step
    return bool(every) and step % every == 0 and 0 < step < run.task.plan.total_steps


def evaluate(run: Run, measure: Callable[[], Metrics], logged_as: str = "validation") -> Metrics:
    """What `measure` finds, logged where there is anything.

    Args:
        run: The run, whose objective is in training mode afterwards, and whose random numbers are as before: they were
            saved before, and one that continues may not evaluate.
        measure: `Task.evaluate` or `Task.final_metrics`.
        logged_as: The log's word for `validation`.
    """
    before = random_state()
    with doing("evaluating"):
        metrics = measure()
    run.task.objective.train()
    set_random_state(before)
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


def finish(run: Run) -> tuple[Path, Metrics, str | None]:
    """Last checkpoint, last evaluation, and the model to use in RUN/final; its variants in RUN/final-NAME.

    Returns:
        RUN/final, its metrics, and why the Hub did not take it, where it was to.
    """
    task = run.task
    save(run)
    metrics = evaluate(run, task.evaluate) | evaluate(run, task.final_metrics)
    final = run.folder / "final"
    export(run, final, metrics)
    for name, swapped in task.variants.items():
        with swapped:
            export(run, run.folder / f"final-{name}", evaluate(run, task.evaluate, f"validation_{name}"))
    for line in task.reader.report():
        run.accelerator.print(line)
    unpublished = published(run, task.repository) if task.repository and run.accelerator.is_main_process else None
    outcome = Outcome("finished", f"finished at step {run.progress.step}")
    if unpublished:
        outcome = Outcome("finished, not published", unpublished)
    conclude(run, outcome, identity=task.identity())
    return final, metrics, unpublished


def published(run: Run, repository: str) -> str | None:
    """Publishes the final model; why it could not, which takes nothing from what is saved."""
    try:
        print(f"published: {publish(run.folder, repository)}")
    except Exception as error:
        return (
            f"the run is finished and saved in {run.folder / 'final'}, but could not be published: "
            f"{str(error) or type(error).__name__}. Publish it with python -m training.publish {run.folder} "
            f"{repository}"
        )
    return None


def export(run: Run, folder: Path, metrics: Metrics) -> None:
    """A folder for `from_pretrained`: weights, configs, tokenizer, image processor, model card; whole or not at all.

    Raises:
        RunFailed: It could not be written.
    """
    with doing("writing the model"):
        first_decides(lambda: _export(run, folder, training_record(run, metrics)))


def _export(run: Run, folder: Path, record: dict[str, Any]) -> None:
    try:
        with folder_written_aside(folder) as aside:
            with quiet_transformers():
                run.task.objective.model.save_pretrained(aside)
            run.task.processor.save_pretrained(aside)
            run.task.write_beside(aside)
            (aside / "training.json").write_text(json_text(record, indent=1) + "\n", encoding="utf-8")
            run.task.write_card(aside, record)
    except Exception as error:
        # Each library that writes here has an error of its own for a full disk.
        if not isinstance(error, OSError) and not is_full_disk(error):
            raise
        raise RunFailed(
            f"could not write {folder}: {error}. The run is done and its last checkpoint complete: make room, then "
            "--resume latest writes the model"
        ) from error


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
        f"  data        {plan.samples:,} samples, {told_number(plan.steps_per_epoch, 'step')} an epoch",
        f"  batch       {settings.global_batch_size:,} = {told_processes(world_size())} x "
        f"{plan.per_device_batch_size:,}",
        f"  length      {told_number(plan.total_steps, 'step')}, "
        f"{plan.total_steps * settings.global_batch_size:,} samples, into {settings.output_dir}",
    ]
    run.accelerator.print("\n".join(lines))
