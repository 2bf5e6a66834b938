"""The settings of fine-tuning a classifier: one flat dataclass, read from YAML and flags as those of pre-training are.

From the paper (appendix B.2, which follows MAE): `head_epochs` 8, `epochs` 128 with them, AdamW, `learning_rate` 1e-3,
cosine, no warm-up. Everything else is ours: it names no batch size, weight decay or augmentation. Batch 256, weight
decay 0.05 and betas 0.9, 0.999 are MAE's, at whose base batch of 256 the rate of 1e-3 needs no scaling; the crops are
torchvision's defaults.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from training.evaluation.sets import TABLE_7
from training.settings.pretraining import (
    PretrainingArguments,
    check_area,
    check_ranges,
    divided_batch,
    mapping_of,
    setting,
)
from training.transfer.parts import check_part_settings

_PRETRAINING = {entry.name: entry for entry in dataclasses.fields(PretrainingArguments)}


def _as_in_pretraining(name: str, **default: Any) -> Any:
    """The field of `PretrainingArguments`, with another default where one is given."""
    entry = _PRETRAINING[name]
    if not default:
        default = {"default_factory" if entry.default is dataclasses.MISSING else "default": entry.default}
        if "default_factory" in default:
            default["default_factory"] = entry.default_factory
    return field(**default, metadata=entry.metadata)


@dataclass(kw_only=True)
class FinetuneArguments:
    """Everything that decides a run of `training.finetune`. Raises ValueError naming the field, what was expected and
    what came.
    """

    program: ClassVar[str] = "accelerate launch -m training.finetune"
    purpose: ClassVar[str] = "Fine-tunes the picture encoder of a PyramidCLIP model as a classifier."

    # What is trained, and where it goes
    output_dir: str = setting("runs/finetune", "folder of this run: checkpoints/, final/, metrics.jsonl, tensorboard/")
    model: str = setting("", "folder with saved weights or Hub id; an architecture name starts from new weights")
    model_config: dict | str | None = _as_in_pretraining("model_config")
    seed: int = setting(0, "seed of the new head, of held-out shares, data order and augmentation")

    # Data
    train_data: str = setting("", "folder with a sub-folder of pictures for each class, or labelled shards")
    validation_data: str | None = setting(None, "the same, measured after every epoch")
    test_data: str | None = setting(None, "the same, measured once, at the end")
    dataset: str | None = setting(None, f"both parts of {', '.join(TABLE_7)}; train_data is the folder that holds it")
    validation_fraction: float = setting(0.0, "share of each class held out of train_data in place of validation_data")
    test_fraction: float = setting(0.0, "share of each class held out in place of test_data")
    classes: str | None = setting(None, "file with class names, one a line (folders also: folder<TAB>name)")
    crop_area: list[float] = setting([0.08, 1.0], "smallest and largest share of the picture in a training crop")
    flip: bool = setting(True, "mirror half of the training pictures; off where the side is part of the class")
    dataloader_workers: int = _as_in_pretraining("dataloader_workers")
    eval_batch_size: int = setting(64, "pictures classified at a time by each process when measuring")

    # Schedule and optimizer
    global_batch_size: int = setting(256, "pictures in one optimizer step, all processes together")
    epochs: int = setting(128, "passes over the data, those of the head alone included (paper: 128)")
    head_epochs: int = setting(8, "first passes that train the new head alone (paper: 8); 0: none")
    learning_rate: float = setting(1e-3, "peak of the cosine, which spans all epochs (paper: 1e-3)")
    warmup_fraction: float = setting(0.0, "share of all steps in which the learning rate rises linearly (paper: none)")
    final_learning_rate_fraction: float = _as_in_pretraining("final_learning_rate_fraction")
    weight_decay: float = setting(0.05, "of AdamW; not on norms, biases, position and class embeddings")
    adam_beta1: float = _as_in_pretraining("adam_beta1")
    adam_beta2: float = _as_in_pretraining("adam_beta2", default=0.999)
    adam_epsilon: float = _as_in_pretraining("adam_epsilon", default=1e-8)
    max_grad_norm: float = setting(0.0, "gradients are scaled down to this norm; 0: never")
    label_smoothing: float = setting(0.0, "share of the target spread evenly over all classes")

    # Precision, memory, speed
    precision: Literal["fp32", "bf16", "fp16"] = _as_in_pretraining("precision")
    gradient_checkpointing: bool = _as_in_pretraining("gradient_checkpointing")
    sync_batch_norm: bool = _as_in_pretraining("sync_batch_norm")

    # Watching, saving, stopping
    log_every_steps: int = _as_in_pretraining("log_every_steps")
    trackers: list[str] = _as_in_pretraining("trackers")
    eval_every_epochs: int = setting(1, "top-1 and its mean over classes on the validation data; 0: only at the end")
    save_every_steps: int = _as_in_pretraining("save_every_steps")
    keep_checkpoints: int = _as_in_pretraining("keep_checkpoints")
    resume: str | None = _as_in_pretraining("resume")
    dry_run: bool = _as_in_pretraining("dry_run")

    # What the loop of pre-training asks for, and a classifier does not have.
    max_steps: ClassVar[None] = None
    overfit_batches: ClassVar[int] = 0
    per_device_chunk_size: ClassVar[None] = None

    def __post_init__(self):
        """Parses the mapping, then checks every field and what fields say about each other."""
        self.model_config = mapping_of("model_config", self.model_config)
        if self.trackers == ["none"]:
            self.trackers = []
        if not self.model:
            raise ValueError("model: expected a folder with saved weights, a Hub id, or an architecture")
        check_part_settings(self)
        check_area("crop_area", self.crop_area)
        zero = "head_epochs dataloader_workers eval_every_epochs save_every_steps max_grad_norm learning_rate"
        one = "global_batch_size eval_batch_size epochs log_every_steps keep_checkpoints"
        shares = "warmup_fraction final_learning_rate_fraction adam_beta1 adam_beta2 label_smoothing"
        check_ranges(self, {0: (*zero.split(), "weight_decay", "seed"), 1: one.split()}, shares.split())
        if self.head_epochs > self.epochs:
            raise ValueError(f"head_epochs {self.head_epochs} are part of all epochs, of which there are {self.epochs}")

    def per_device_batch_size(self, num_processes: int) -> int:
        """Pictures of the global batch for each process; ValueError where it cannot be divided evenly."""
        return divided_batch(self.global_batch_size, num_processes)

    def to_dict(self) -> dict[str, Any]:
        """Field name -> plain value, fit for YAML and JSON."""
        return dataclasses.asdict(self)
