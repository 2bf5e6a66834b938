"""Checkpoints that are complete or absent, and the identity of the run they belong to.

    RUN/checkpoints/step-00001000/
        model/                  config.json, model.safetensors: `from_pretrained` reads it; with BatchNorm's statistics
        optimizer.pt            AdamW's moments; scaler.pt where the run has a scaler
        NAME.safetensors        what else the task keeps; pre-training: moving_average
        process-00000.pt        random states of one process, and the counts of its reader
        run.json                position in the data, counts, identity of the run; written last

A checkpoint is written into `.step-00001000.partial`, every file is flushed to the disk, and then the folder is
renamed. Killed at any moment, the last complete checkpoint stays as it was. Nothing here is unpickled: weights are
safetensors, the rest is read with `weights_only=True`.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from pyramidclip_command import Failure
from pyramidclip_hf.files import replace_folder
from pyramidclip_hf.loading import quiet_transformers
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.loop.distributed import any_process, rank, world_size
from training.loop.identity import Identity, compare_identity, completed

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(Failure):
    """A checkpoint could not be written or read; the message says which file, why, and what is still there."""


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
# finding


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return Path(run_dir) / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The complete checkpoints of this run, oldest first. Looks at `RUN/checkpoints/step-*` and nowhere else."""
    folder = Path(run_dir) / "checkpoints"
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "run.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `--resume` means: None for "latest" of a run that has none yet.

    Raises:
        CheckpointError: A folder was named that is no complete checkpoint.
    """
    complete = list_checkpoints(run_dir)
    if resume == "latest":
        return complete[-1] if complete else None
    path = Path(resume)
    if not (path / "run.json").is_file():
        names = ", ".join(found.name for found in complete) or "none"
        raise CheckpointError(
            f"--resume: expected 'latest' or the folder of a complete checkpoint, and {path} has no run.json; "
            f"complete in {run_dir}: {names}"
        )
    return path


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
    problem = _attempt(_make_empty, partial) if rank() == 0 else None
    if not any_process(problem is not None):  # the folder is there before any other process writes into it
        problem = _attempt(_write_files, partial, state, progress)
    if any_process(problem is not None):
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(run_dir)
        raise CheckpointError(
            f"could not write the checkpoint of step {progress.step} to {target}: "
            f"{problem or 'another process failed'}. "
            f"Free space or choose another output_dir, then continue with --resume latest (last complete: "
            f"{kept[-1] if kept else 'none'})"
        )
    if rank() == 0:
        replace_folder(partial, target)
        _prune(run_dir, keep)
    any_process(False)  # nobody goes on before the new checkpoint is in place
    return target


def _attempt(write: Callable[..., None], *arguments: Any) -> str | None:
    """Runs `write`; the text of the error where the file system refused (torch: a full disk is a RuntimeError)."""
    try:
        write(*arguments)
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _make_empty(folder: Path) -> None:
    for left_over in folder.parent.glob(".step-*"):
        shutil.rmtree(left_over)
    folder.mkdir(parents=True)


def _write_files(folder: Path, state: TrainingState, progress: Progress) -> None:
    _write_tensors(folder / f"process-{rank():05d}.pt", {"random": random_state(), "reader": progress.reader})
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
    common = {name: value for name, value in asdict(progress).items() if name != "reader"}
    record = {"format": FORMAT, "processes": world_size(), "identity": state.identity, "progress": common}
    (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _write_processor(processor: PyramidCLIPProcessor, folder: Path) -> None:
    try:
        processor.save_pretrained(folder)
    except Exception as error:  # tokenizers has no type of its own for a full disk
        raise OSError(f"{folder}: {error}") from error


def _write_tensors(path: Path, content: Any) -> None:
    with open(path, "wb") as file:
        torch.save(content, file)


def _prune(run_dir: Path, keep: int) -> None:
    for path in list_checkpoints(run_dir)[:-keep]:
        (path / "run.json").unlink()  # first, so that a half removed one does not count as complete
        shutil.rmtree(path)


# ----------------------------------------------------------------------------------------------------------------
# reading


def read_checkpoint(path: Path, state: TrainingState) -> tuple[Progress, list[str]]:
    """Fills the live objects of `state` from a checkpoint.

    Returns:
        The progress, and messages for the user.

    Raises:
        IdentityError: The checkpoint belongs to another run, see `training.loop.identity.compare_identity`.
        CheckpointError: A file is missing or unreadable.
    """
    record = json.loads((path / "run.json").read_text(encoding="utf-8"))
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in format {record['format']}, this version reads format {FORMAT}")
    saved = completed(record["identity"], state.identity, state.defaults, state.model.config)
    messages = compare_identity(saved, state.identity, path, state.accepted)
    try:
        state.model.load_state_dict(load_file(path / "model" / "model.safetensors"))
        state.optimizer.load_state_dict(_read_tensors(path / "optimizer.pt"))
        if state.scaler is not None:
            state.scaler.load_state_dict(_read_tensors(path / "scaler.pt"))
        for name, part in state.kept.items():
            part.load_state_dict(load_file(path / f"{name}.safetensors"))
        processes = [_read_tensors(path / f"process-{i:05d}.pt") for i in range(record["processes"])]
        if len(processes) == world_size():
            set_random_state(processes[rank()]["random"])
            reader = processes[rank()]["reader"]
        else:
            # Counts are only ever added up, so the first process may hold all of them.
            reader = _summed([process["reader"] for process in processes]) if rank() == 0 else {}
            messages.append(
                f"the checkpoint was written by {len(processes)} processes and continues on {world_size()}: the same "
                "data in the same order, but sums run in another order and BatchNorm sees other batches, so the run is "
                "not bit-equal to an undisturbed one"
            )
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {type(error).__name__}: {error}. Continue from an older one with --resume DIR"
        ) from error
    return Progress(**record["progress"], reader=reader), messages


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
