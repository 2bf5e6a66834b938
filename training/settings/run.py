"""The settings that every kind of training has, and the base class of those of each kind."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

from training.settings.fields import (
    Through,
    check_fields,
    check_named_folder,
    mapping_of,
    redeclared,
    setting,
    usable_cores,
)
from training.settings.reading import is_mapping, value_types

# More fill memory sooner than they fill batches.
MOST_WORKERS = 16


def told_processes(number: int) -> str:
    """So many processes, in words."""
    return f"{number} process" if number == 1 else f"{number} processes"


def told_number(number: int, what: str) -> str:
    """So many of what is counted, whose plural ends in "s"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


@dataclass(kw_only=True)
class RunSettings:
    """What every run has: a kind of training derives from it, and repeats a field only to change it (`changed`).

    Sizes of batches say whose they are; durations are optimizer steps unless the name says otherwise.

    Raises:
        ValueError: A value is outside of its bounds; the message names the field, what was expected and what came.
    """

    output_dir: str = setting(
        "runs/run",
        "folder of this run: checkpoints/, final/, metrics.jsonl, tensorboard/",
        section="first",
        identity=None,
        check=check_named_folder,
    )
    model: str = setting(
        "",
        "architecture name, folder with saved weights, or Hub id; the latter two continue from weights",
        section="first",
        identity=Through("model"),
        names="id",
    )
    train_data: list[str] | str = setting(
        [], "what is trained on", section="first", identity=Through("data", "fingerprint"), names="data"
    )
    validation_data: str | None = setting(None, "what is measured on", section="first", identity=None, names="data")
    global_batch_size: int = setting(
        256,
        "samples in one optimizer step, all processes together",
        section="first",
        identity="schedule",
        at_least=1,
    )
    epochs: int | None = setting(
        None, "passes over the data", section="first", identity=Through("schedule", "total_steps"), at_least=1
    )
    learning_rate: float = setting(5e-4, "peak of the cosine", section="first", identity="schedule", at_least=0)
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "of the autocast region; weights, loss and optimizer stay fp32", section="first", identity="how"
    )
    resume: str | None = setting(
        None,
        "'latest' checkpoint of output_dir, or a checkpoint folder",
        section="first",
        identity=None,
        names="path",
    )

    model_config: dict[str, Any] | None = setting(
        None,
        'changes to the architecture\'s config, e.g. {"vision_config": {"image_size": 64}}, those of files and flags '
        "together; only with an architecture name",
        section="trained",
        identity=Through("model"),
        adds_up=True,
    )
    seed: int = setting(
        0, "seed of initial weights, data order and augmentation", section="data", identity="data", at_least=0
    )
    dataloader_workers: int | None = setting(
        None,
        "reading processes beside each training process; 0 reads in the training process. Default: the cores of the "
        f"machine, shared among its training processes, at most {MOST_WORKERS}",
        section="data",
        identity=None,
        at_least=0,
    )

    warmup_fraction: float = setting(
        0.02,
        "share of all steps in which the learning rate rises linearly from 0",
        section="schedule",
        identity="schedule",
        share=True,
    )
    final_learning_rate_fraction: float = setting(
        0.0, "end of the cosine as a share of its peak", section="schedule", identity="schedule", share=True
    )
    weight_decay: float = setting(
        0.05,
        "of AdamW; not on norms, biases, position and class embeddings",
        section="schedule",
        identity="optimizer",
        at_least=0,
    )
    adam_beta1: float = setting(
        0.9, "decay of AdamW's first moment", section="schedule", identity="optimizer", share=True
    )
    adam_beta2: float = setting(
        0.98, "decay of AdamW's second moment", section="schedule", identity="optimizer", share=True
    )
    adam_epsilon: float = setting(1e-6, "added to AdamW's denominator", section="schedule", identity="optimizer")
    max_grad_norm: float | None = setting(
        1.0,
        "gradients are scaled down to this norm; 0: never",
        section="schedule",
        identity="optimizer",
        at_least=0,
    )

    gradient_checkpointing: bool = setting(
        False,
        "recompute activations in the backward pass: less memory, a third more time",
        section="precision",
        identity="how",
    )
    sync_batch_norm: bool = setting(
        True,
        "batch statistics over all GPUs; without effect on CPU and on one GPU",
        section="precision",
        identity="how",
    )
    deterministic: bool = setting(
        False,
        "a GPU's deterministic algorithms alone, gradients summed one by one, slower: a continued run equals an "
        "undisturbed one bit for bit",
        section="precision",
        identity="how",
    )

    log_every_steps: int = setting(
        50,
        "steps averaged into one line of metrics.jsonl and the trackers",
        section="watching",
        identity=None,
        at_least=1,
    )
    trackers: list[str] = setting(
        ["tensorboard"],
        "names that Accelerate knows (tensorboard, wandb, ...), or none",
        section="watching",
        identity=None,
    )
    save_every_steps: int = setting(
        1000,
        "a checkpoint every so often, and one at the end; 0: only at the end",
        section="watching",
        identity=None,
        at_least=0,
    )
    accept_identity: list[str] = setting(
        [],
        "names that --resume says differ, e.g. model.hidden_act, which may: you know that the same is trained",
        section="watching",
        identity=None,
    )
    process_timeout_minutes: float = setting(
        30.0,
        "a process that is silent for so long ends the run; a collective that waits a minute longer does, too",
        section="watching",
        identity=None,
        at_least=0.1,
    )
    keep_checkpoints: int = setting(2, "older checkpoints are removed", section="watching", identity=None, at_least=1)
    dry_run: bool = setting(
        False, "two steps, then print what the run would be, and stop", section="watching", identity=None
    )

    def __post_init__(self) -> None:
        """Parses mappings, then checks each field by itself."""
        for name, kind in value_types(type(self)).items():
            if is_mapping(kind):
                setattr(self, name, mapping_of(name, getattr(self, name)))
        if self.trackers == ["none"]:
            self.trackers = []
        check_fields(self)

    def per_device_batch_size(self, num_processes: int) -> int:
        """Samples of the global batch for each process.

        Raises:
            ValueError: The global batch cannot be divided evenly.
        """
        size, rest = divmod(self.global_batch_size, num_processes)
        if rest or size == 0:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} cannot be divided among {num_processes} processes: "
                f"choose a multiple of {num_processes}"
            )
        return size

    @property
    def workers(self) -> int:
        """Reading processes beside this training process: as set, else what the machine has for it."""
        if self.dataloader_workers is not None:
            return self.dataloader_workers
        return min(MOST_WORKERS, max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))

    def to_dict(self) -> dict[str, Any]:
        """Field name -> plain value, fit for YAML and JSON."""
        return dataclasses.asdict(self)


_SHARED = {entry.name: entry for entry in dataclasses.fields(RunSettings)}


def changed(name: str, default: Any, help: str | None = None, **changes: Any) -> Any:
    """The field `name` of `RunSettings` with another default, and other words where they are given.

    Args:
        name: The field.
        default: Its default.
        help: What it is; None: as in `RunSettings`.
        **changes: Of the arguments of `setting`, e.g. a further bound.
    """
    return redeclared(_SHARED[name], default, help, **changes)
