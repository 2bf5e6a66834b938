"""Checkpoints that are complete or absent, and the identity of the run they belong to.

    RUN/checkpoints/step-00001000/
        model/                  config.json, model.safetensors: `from_pretrained` reads it; with BatchNorm's statistics
        optimizer.pt            AdamW's moments; scaler.pt where the run has a scaler
        NAME.safetensors        what else the task keeps; pre-training: moving_average
        process-00000.pt        random states of one process, and the counts of its reader
        run.json                position in the data, counts, identity of the run, checksums of all files; written last

A checkpoint is written into `.step-00001000.partial`, every file is flushed to the disk, and then the folder is
renamed. Killed at any moment, the last complete checkpoint stays as it was. Nothing here is unpickled: weights are
safetensors, the rest is read with `weights_only=True`.
"""

import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pyramidclip_hf.files import fsync, replace_folder
from pyramidclip_hf.loading import quiet_transformers
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.loop.distributed import everyone, rank, world_size
from training.loop.identity import Identity, compare_identity, completed
from training.loop.record import (
    WITHOUT_CHECKSUMS,
    CheckpointError,
    DamagedCheckpoint,
    find_damage,
    read_record,
    sum_of,
    write_record,
)
from training.loop.run_folder import checkpoint_path, list_checkpoints, prune, remove_leftovers, step_of
from training.settings.run import told_processes


class Stateful(Protocol):
    """What a checkpoint can keep in a file of tensors: a module, an average of weights, a queue."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Name -> tensor."""

    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> Any:
        """Takes what `state_dict` gave; KeyError or RuntimeError where names differ."""


@dataclass
class Progress:
    """Where a run is.

    Attributes:
        step: Optimizer steps done.
        epoch: Passes over the data done.
        position: Samples of this pass that all processes together have consumed.
        window: The per-step rows of the log since the last line.
        reader: What the data side wants to keep: counts of bad samples by reason and the like.
        seconds: Training time so far.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    window: list[dict[str, Any]] = field(default_factory=list)
    reader: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class TrainingState:
    """What a checkpoint holds beside the progress: the live objects, written from and read into.

    Attributes:
        model: The bare model.
        optimizer: torch's.
        identity: See `training.loop.identity`.
        defaults: What a checkpoint means that does not name a setting yet, because its version did not know it.
        accepted: Names of the identity that may differ.
        scaler: Of fp16.
        kept: File name, without suffix -> what else the task keeps.
        processor: Saved beside the model, so that another run can begin from these weights.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    identity: Identity
    defaults: Identity = field(default_factory=dict)
    accepted: Sequence[str] = ()
    scaler: Any = None
    kept: Mapping[str, Stateful] = field(default_factory=dict)
    processor: PyramidCLIPProcessor | None = None


# ----------------------------------------------------------------------------------------------------------------
# writing


def write_checkpoint(run_dir: Path, state: TrainingState, progress: Progress, keep: int) -> Path:
    """Writes a checkpoint and removes all but the newest `keep`.

    All processes call it together; they share the file system of `run_dir`.

    Raises:
        CheckpointError: On every process, when one of them could not write (disk full, folder gone). What was half
            written is removed, earlier checkpoints are untouched.
    """
    target = checkpoint_path(run_dir, progress.step)
    partial = target.with_name(f".{target.name}.partial")

    def agreed(write: Callable[..., None], *arguments: Any, here: bool = True) -> None:
        """All do it, or those that are `here`; nobody goes on before everybody could."""
        problems = everyone(_attempt(write, *arguments) if here else None)
        if any(problems):
            if rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(_not_written(target, problems, list_checkpoints(run_dir)))

    agreed(_make_empty, run_dir, partial, here=rank() == 0)
    agreed(_write_files, partial, state, progress)
    sums: dict[str, Any] = {}
    agreed(_take_sums, partial, sums)
    files = {name: found for told in everyone(sums) for name, found in told.items()}
    agreed(_complete, run_dir, partial, target, state, progress, files, keep, here=rank() == 0)
    return target


def _not_written(target: Path, problems: Sequence[str | None], kept: Sequence[Path]) -> str:
    number, problem = next((number, problem) for number, problem in enumerate(problems) if problem)
    where = f"process {number}: " if len(problems) > 1 else ""
    return (
        f"could not write the checkpoint of step {step_of(target)} to {target}: {where}{problem}. Free space or choose "
        f"another output_dir, then continue with --resume latest (last complete: {kept[-1] if kept else 'none'})"
    )


def _attempt(write: Callable[..., None], *arguments: Any) -> str | None:
    """Runs `write`; the text of the error where the file system refused (torch: a full disk is a RuntimeError)."""
    try:
        write(*arguments)
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_empty(run_dir: Path, folder: Path) -> None:
    remove_leftovers(run_dir)
    folder.mkdir(parents=True)


def _write_files(folder: Path, state: TrainingState, progress: Progress) -> None:
    _write_tensors(folder / own_file(rank()), {"random": random_state(), "reader": progress.reader})
    if rank() != 0:
        return
    with quiet_transformers():
        state.model.save_pretrained(folder / "model")
    if state.processor is not None:
        _write_processor(state.processor, folder / "model")
    _write_tensors(folder / "optimizer.pt", state.optimizer.state_dict())
    if state.scaler is not None:
        _write_tensors(folder / "scaler.pt", state.scaler.state_dict())
    for name, part in state.kept.items():
        save_file(part.state_dict(), folder / f"{name}.safetensors")


def _take_sums(folder: Path, files: dict[str, Any]) -> None:
    """Fills `files` with the checksums of what this process wrote."""
    own = [folder / own_file(rank())]
    if rank() == 0:
        own += [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("process-")]
    for path in own:
        files[path.relative_to(folder).as_posix()] = sum_of(path)


def _complete(
    run_dir: Path,
    partial: Path,
    target: Path,
    state: TrainingState,
    progress: Progress,
    files: Mapping[str, Any],
    keep: int,
) -> None:
    """Writes the record, puts the checkpoint in its place, removes old ones."""
    common = {name: value for name, value in asdict(progress).items() if name != "reader"}
    record = {"processes": world_size(), "identity": state.identity, "progress": common, "files": files}
    if (log := run_dir / "metrics.jsonl").is_file():
        fsync(log)
        record["log"] = sum_of(log)
    write_record(partial, record)
    replace_folder(partial, target)
    prune(run_dir, keep, target)


def own_file(process: int) -> str:
    """Name of what a process keeps for itself in a checkpoint."""
    return f"process-{process:05d}.pt"


def _write_processor(processor: PyramidCLIPProcessor, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except Exception as error:  # tokenizers has no type of its own for a full disk
        raise OSError(f"{folder}: {error}") from error


def _write_tensors(path: Path, content: Any) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # When the system refuses a write, torch tells of a position in its archive, and not of the full disk behind it.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


# ----------------------------------------------------------------------------------------------------------------
# reading


def read_checkpoint(path: Path, state: TrainingState) -> tuple[Progress, list[str]]:
    """Fills the live objects of `state` from a checkpoint, and meanwhile compares its files with their checksums.

    Returns:
        The progress, and messages for the user.

    Raises:
        IdentityError: The checkpoint belongs to another run, see `training.loop.identity.compare_identity`.
        DamagedCheckpoint: A file is missing, unreadable or not what was written; `state` may be half filled.
        CheckpointError: It is of another format.
    """
    record = read_record(path)
    saved = completed(record["identity"], state.identity, state.defaults, state.model.config)
    messages = compare_identity(saved, state.identity, path, state.accepted)
    same_number = record["processes"] == world_size()
    # Other random states than one's own are of no use, and counts of all are the first process's.
    processes = [rank()] if same_number else range(record["processes"]) if rank() == 0 else []
    read = [own_file(process) for process in processes]
    # The first process looks at all of it, the others at what they read alone.
    looked_at = None if rank() == 0 else [*read, *(name for name in record.get("files", ()) if not _is_one_s_own(name))]
    failed: Exception | None = None
    with ThreadPoolExecutor(1) as beside:
        damage = beside.submit(find_damage, path, record, looked_at)
        try:
            _fill(path, state)
            kept = [_read_tensors(path / name) for name in read]
        # Damaged tensors, pickles and dictionaries fail in many ways.
        except Exception as error:
            failed = error
        found = damage.result()
    if found is not None:
        raise DamagedCheckpoint(found) from failed
    if failed is not None:
        raise DamagedCheckpoint(f"{path}: cannot be read: {type(failed).__name__}: {failed}") from failed
    if record["format"] == WITHOUT_CHECKSUMS:
        messages.append(f"{path} was written by a version without checksums: that it is undamaged was not looked at")
    if same_number:
        set_random_state(kept[0]["random"])
        reader = kept[0]["reader"]
    else:
        # Counts are only ever added up, so the first process may hold all of them.
        reader = _summed([process["reader"] for process in kept])
        messages.append(
            f"the checkpoint was written by {told_processes(record['processes'])} and continues on {world_size()}: the "
            "same data in the same order, but sums run in another order and BatchNorm sees other batches, so the run "
            "is not bit-equal to an undisturbed one"
        )
    return Progress(**record["progress"], reader=reader), messages


def _is_one_s_own(name: str) -> bool:
    return name.startswith("process-")


def _fill(path: Path, state: TrainingState) -> None:
    state.model.load_state_dict(load_file(path / "model" / "model.safetensors"))
    state.optimizer.load_state_dict(_read_tensors(path / "optimizer.pt"))
    if state.scaler is not None:
        state.scaler.load_state_dict(_read_tensors(path / "scaler.pt"))
    for name, part in state.kept.items():
        part.load_state_dict(load_file(path / f"{name}.safetensors"))


def _summed(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of the readers of all processes: numbers are added, lists are joined."""
    total: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            if isinstance(value, Mapping):
                total[name] = _summed([total.get(name, {}), dict(value)])
            else:
                total[name] = total[name] + value if name in total else value
    return total


def _read_tensors(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


def random_state() -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain numbers."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "device": None if (device := _device_generator()) is None else device.get_rng_state(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Sets all generators of this process to a state from `random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    device, device_state = _device_generator(), state.get("device", state.get("cuda"))  # as older ones call it
    if device is not None and device_state is not None:
        device.set_rng_state(device_state)


def _device_generator() -> Any:
    """The module of an accelerator of any kind, with its generator; None without one that is used."""
    kind = torch.accelerator.current_accelerator()
    module = None if kind is None else torch.get_device_module(kind)
    return module if module is not None and getattr(module, "is_initialized", lambda: True)() else None
