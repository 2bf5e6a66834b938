"""Where a run begins: at its first step, at a checkpoint that can be read, or at its end already.

The first process looks and decides; all read, and one that cannot read a checkpoint sends all to the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pyramidclip_hf.loading import check_weights
from training.loop.agreement import first_decides, together
from training.loop.checkpoint import Progress, TrainingState, read_checkpoint
from training.loop.distributed import everyone
from training.loop.identity import compare_identity, completed
from training.loop.outcome import forget_outcome, is_finished, read_outcome
from training.loop.record import CheckpointError, DamagedCheckpoint, read_record
from training.loop.run_folder import beyond, find_checkpoints, list_checkpoints, set_aside, take_back
from training.settings.run import RunSettings


@dataclass
class Begun:
    """Where a run begins.

    Attributes:
        progress: Steps and data done.
        saved: The step of the checkpoint in the run's folder that it continues from, 0 where it does not.
        finished: The run has been at its end.
        log: What the checkpoint says of metrics.jsonl.
    """

    progress: Progress = field(default_factory=Progress)
    saved: int = 0
    finished: bool = False
    log: dict[str, Any] | None = None


@dataclass
class _Found:
    """What the first process found in the folder of a run."""

    checkpoints: list[Path]
    taken_back: list[Path]
    outcome: dict[str, Any]
    model: bool


def resume(settings: RunSettings, accelerator: Any, state: TrainingState, folder: Path, total_steps: int) -> Begun:
    """Fills `state` from what `--resume` names; all processes call it together.

    Args:
        settings: Of the run.
        accelerator: Accelerate's `Accelerator`.
        state: The live objects.
        folder: Of the run.
        total_steps: After which it is finished.

    Raises:
        ValueError: The folder holds a run, and none is to be continued; there is no such checkpoint, or it is another
            run's.
        CheckpointError: No checkpoint can be read.
    """
    found = first_decides(lambda: _look(settings, folder))
    for path in found.taken_back:
        accelerator.print(f"{path} had been written to its end beside its place, and was put there")
    if not found.checkpoints:
        if is_finished(found.outcome) and found.model and settings.resume:
            begun, messages = together(lambda: _finished_without_checkpoints(found.outcome, state, folder))
            for message in messages:
                accelerator.print(message)
            return begun
        if settings.resume:
            accelerator.print(f"--resume latest: {folder} has no complete checkpoint yet, starting from the beginning")
        return Begun()
    chosen, progress, messages = _read_first_readable(found.checkpoints, accelerator, state)
    own = chosen.resolve().parent == (folder / "checkpoints").resolve()
    finished = own and progress.step >= total_steps and is_finished(found.outcome) and found.model
    if not finished:
        messages = [f"continuing from {chosen}, step {progress.step} of {total_steps}", *messages]
    if not settings.dry_run and not finished:
        messages += first_decides(lambda: _leave_branch(folder, chosen, progress.step, is_finished(found.outcome)))
    for message in messages:
        accelerator.print(message)
    log = first_decides(lambda: read_record(chosen).get("log")) if own else None
    return Begun(progress, progress.step if own else 0, finished, log)


def _look(settings: RunSettings, folder: Path) -> _Found:
    taken_back, outcome = take_back(folder), read_outcome(folder)
    found = _Found([], taken_back, outcome, (folder / "final").is_dir())
    if settings.resume:
        found.checkpoints = find_checkpoints(settings.resume, folder)
    complete = list_checkpoints(folder)
    if complete and not settings.resume:
        raise ValueError(
            f"output_dir {folder} already holds a run (last checkpoint {complete[-1].name}): continue it with --resume "
            "latest, or choose another output_dir"
        )
    if found.model and not found.checkpoints and not (settings.resume and is_finished(outcome)):
        raise ValueError(
            f"output_dir {folder} already holds the model of a run, without a checkpoint to continue from: choose "
            "another output_dir, or move it away"
        )
    return found


def _finished_without_checkpoints(
    outcome: dict[str, Any], state: TrainingState, folder: Path
) -> tuple[Begun, list[str]]:
    """The end of a run whose checkpoints somebody removed: the model is its `final/`.

    Raises:
        IdentityError: It was another run.
    """
    saved = completed(outcome["identity"], state.identity, state.defaults, state.model.config)
    messages = compare_identity(saved, state.identity, folder, state.accepted)
    check_weights(folder / "final", str(folder))
    state.model.load_state_dict(load_file(folder / "final" / "model.safetensors"))
    return Begun(Progress(step=outcome["step"]), outcome["step"], finished=True), messages


def _read_first_readable(
    checkpoints: Sequence[Path], accelerator: Any, state: TrainingState
) -> tuple[Path, Progress, list[str]]:
    """The first of the checkpoints that all processes can read, its progress, and messages."""
    problems: list[str] = []
    for path in checkpoints:

        def attempt(path: Path = path) -> tuple[Progress, list[str]] | str:
            try:
                return read_checkpoint(path, state)
            except DamagedCheckpoint as error:
                return str(error)

        read = together(attempt)
        told = [problem for problem in everyone(read if isinstance(read, str) else None) if problem]
        if not told and not isinstance(read, str):
            return path, *read
        problems.append(told[0])
        if path != checkpoints[-1]:
            accelerator.print(f"{told[0]}. Going back to the checkpoint before {path.name}")
    raise CheckpointError(
        "; ".join(problems)
        + ". No other checkpoint was named: continue from an older one with --resume DIR, or begin anew in another "
        "output_dir"
    )


def _leave_branch(folder: Path, chosen: Path, step: int, was_finished: bool) -> list[str]:
    """Sets aside what lies beyond the step that the run goes on from; what was done."""
    found = beyond(folder, step, chosen)
    checkpoints = [path for path in found if path.parent != folder]
    if not checkpoints and not (was_finished and found):
        return []  # a model of this very step is written anew
    place = set_aside(folder, found, step)
    forget_outcome(folder)
    names = ", ".join(path.name for path in sorted(found))
    return (
        [f"{names} lie beyond step {step} and were moved to {place}; remove it when nobody needs it"] if names else []
    )
