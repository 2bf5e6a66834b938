"""The settings of training a detector: one flat dataclass, read from YAML and flags as those of pre-training are.

What is the paper's, MoCo's and ours is marked in `training/configs/voc_faster_rcnn.yaml` and `coco_mask_rcnn.yaml`; the
defaults here are those of the former, for any data.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from training.settings.fields import Through, setting
from training.settings.run import RunSettings, changed


def check_sides(name: str, sides: Sequence[int]) -> None:
    """Raises ValueError where `sides` are no short sides of pictures."""
    if not sides or min(sides) < 32:
        raise ValueError(f"{name}: expected short sides of at least 32 pixels, got {sides}")


def check_decays(name: str, shares: Sequence[float]) -> None:
    """Raises ValueError where `shares` are not rising shares of a run."""
    if list(shares) != sorted(set(shares)) or not all(0 < share < 1 for share in shares):
        raise ValueError(f"{name}: expected rising shares of all steps between 0 and 1, got {shares}")


@dataclass(kw_only=True)
class DetectionArguments(RunSettings):
    """Everything that decides a run of `training.detection`.

    Raises:
        ValueError: A value, or two together, cannot be; the message names the field, what was expected and what came.
    """

    output_dir: str = changed("output_dir", "runs/detection")
    model: str = changed(
        "model",
        "",
        "folder with saved weights or Hub id, whose ResNet picture tower is taken; a folder of "
        "conversion.convert_torchvision; an architecture name (RN50) starts from new weights",
    )
    train_data: list[str] = changed(
        "train_data",
        [],
        "sources VOC_FOLDER:SPLIT (VOC2007:trainval), or FILE.json:PICTURE_FOLDER of COCO",
        names="source",
    )
    validation_data: str | None = changed(
        "validation_data", None, "one such source, measured every eval_every_steps and at the end", names="source"
    )
    test_data: list[str] = setting(
        [], "such sources, measured once, at the end", section="first", identity=None, names="source"
    )
    global_batch_size: int = changed("global_batch_size", 16, "pictures in one optimizer step, all processes together")
    max_steps: int | None = setting(
        24_000,
        "optimizer steps (paper, VOC: 24k); null: as `epochs` says",
        section="first",
        identity=Through("schedule", "total_steps"),
        at_least=1,
    )
    learning_rate: float = changed("learning_rate", 0.02, "highest (paper: 0.02)")

    with_masks: bool = setting(
        False, "also learn a mask for each object (Mask R-CNN)", section="trained", identity=Through("model")
    )
    detector: dict[str, Any] | None = setting(
        None,
        'changes to the detector\'s config, e.g. {"anchor_sizes": [32, 64]}, those of files and flags together',
        section="trained",
        identity=Through("model"),
        adds_up=True,
    )
    batch_norm: Literal["trained", "frozen"] = setting(
        "trained", "whether BatchNorm learns; frozen may diverge at a rate of 0.02", section="trained", identity="how"
    )

    short_sides: list[int] = setting(
        list(range(480, 801, 32)),
        "one of these short sides is drawn for each training picture, pixels",
        section="data",
        identity="data",
        check=check_sides,
    )
    test_short_side: int = setting(
        800, "short side of pictures when measuring (paper: 800)", section="data", identity=None, at_least=32
    )
    max_image_pixels: int = setting(
        100_000_000, "a picture with more is an error, by its header", section="data", identity=None, at_least=1
    )
    long_side: int = setting(1333, "pictures are at most this long", section="data", identity="data", at_least=32)
    flip: bool = setting(True, "mirror half of the training pictures", section="data", identity="data")
    seed: int = changed("seed", 0, "seed of new weights, data order, scales, mirroring and what is sampled")

    optimizer: Literal["sgd", "adamw"] = setting(
        "sgd", "sgd has momentum; adamw uses adam_beta1 and so on", section="schedule", identity="optimizer"
    )
    momentum: float = setting(0.9, "of sgd", section="schedule", identity="optimizer", share=True)
    weight_decay: float = changed("weight_decay", 1e-4, "not on norms; of adamw not on biases either")
    warmup_fraction: float = changed("warmup_fraction", 100 / 24_000, "share of all steps that the rise takes")
    warmup_start: float = setting(
        0.001, "where the rise begins, as a share of the rate", section="schedule", identity="schedule", share=True
    )
    decay_at: list[float] = setting(
        [0.75, 11 / 12],
        "shares of all steps after which the rate falls (paper, VOC: 18k and 22k of 24k); none: a cosine instead",
        section="schedule",
        identity="schedule",
        check=check_decays,
    )
    decay_factor: float = setting(
        0.1, "what the rate is multiplied with there", section="schedule", identity="schedule", at_least=0
    )
    max_grad_norm: float | None = changed("max_grad_norm", 0.0)
    precision: Literal["fp32", "bf16", "fp16"] = changed("precision", "fp32")
    precise_batch_norm: int = setting(
        200,
        "batches over which BatchNorm's statistics are taken anew before measuring; 0: the running ones",
        section="schedule",
        identity=None,
        at_least=0,
    )
    eval_every_steps: int = setting(
        0, "steps between two measurements of validation_data; 0: only at the end", section="watching", identity=None,
        at_least=0,
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Checks each field, then what fields say about each other."""
        super().__post_init__()
        if isinstance(self.train_data, str):
            self.train_data = [self.train_data]
        if not self.model:
            raise ValueError("model: expected a folder with saved weights, a Hub id, or an architecture such as RN50")
        if not self.train_data:
            raise ValueError("train_data: expected VOC_FOLDER:SPLIT or FILE.json:PICTURE_FOLDER")
        if max([*self.short_sides, self.test_short_side]) > self.long_side:
            raise ValueError(
                f"long_side {self.long_side} is below short_sides {max(self.short_sides)} or test_short_side "
                f"{self.test_short_side}: no picture could have that size"
            )
        if self.gradient_checkpointing and self.batch_norm == "trained":
            raise ValueError(
                "gradient_checkpointing: with trained BatchNorm regions would be counted twice; leave it out"
            )

    def learning_rate_of(self, step: int, total_steps: int) -> float:
        """Of optimizer step `step` from 0: a linear rise, then a fall by `decay_factor` at each of `decay_at`."""
        warmup = math.ceil(self.warmup_fraction * total_steps - 1e-9)
        falls = sum(step >= round(share * total_steps) for share in self.decay_at)
        rate = self.learning_rate * self.decay_factor**falls
        done = min(1.0, step / warmup) if warmup else 1.0
        return rate * (self.warmup_start * (1 - done) + done)
