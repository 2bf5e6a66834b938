"""The settings of fine-tuning a classifier: one flat dataclass, read from YAML and flags as those of pre-training are.

From the paper (appendix B.2, which follows MAE): `head_epochs` 8, `epochs` 128 with them, AdamW, `learning_rate` 1e-3,
cosine, no warm-up. Everything else is ours: it names no batch size, weight decay or augmentation. Batch 256, weight
decay 0.05 and betas 0.9, 0.999 are MAE's, at whose base batch of 256 the rate of 1e-3 needs no scaling; the crops are
torchvision's defaults.
"""

from dataclasses import dataclass

from training.evaluation.arguments import TABLE_7_SETS
from training.settings.fields import Through, check_area, setting
from training.settings.parts import check_part_settings
from training.settings.run import RunSettings, changed

_PICTURES = Through("data", "fingerprint")


@dataclass(kw_only=True)
class FinetuneArguments(RunSettings):
    """Everything that decides a run of `training.finetune`.

    Raises:
        ValueError: A value, or two together, cannot be; the message names the field, what was expected and what came.
    """

    output_dir: str = changed("output_dir", "runs/finetune")
    model: str = changed(
        "model",
        "",
        "folder with saved weights or Hub id; a folder of conversion.convert_torchvision; an architecture name starts "
        "from new weights",
    )
    train_data: str = changed(
        "train_data", "", "folder with a sub-folder of pictures for each class, or labelled shards"
    )
    validation_data: str | None = changed(
        "validation_data", None, "measured after every epoch, in the form of train_data"
    )
    test_data: str | None = setting(
        None, "measured once, at the end, in the form of train_data", section="first", identity=None, names="data"
    )
    global_batch_size: int = changed("global_batch_size", 256, "pictures in one optimizer step, all processes together")
    epochs: int = changed("epochs", 128, "passes over the data, those of the head alone included (paper: 128)")
    learning_rate: float = changed("learning_rate", 1e-3, "peak of the cosine, which spans all epochs (paper: 1e-3)")

    dataset: str | None = setting(
        None,
        f"both parts of {', '.join(TABLE_7_SETS)}; train_data is the folder that holds it",
        section="data",
        identity=_PICTURES,
    )
    validation_fraction: float = setting(
        0.0,
        "share of each class held out of train_data in place of validation_data",
        section="data",
        identity=_PICTURES,
        share=True,
    )
    test_fraction: float = setting(
        0.0, "share of each class held out in place of test_data", section="data", identity=_PICTURES, share=True
    )
    classes: str | None = setting(
        None,
        "file with class names, one a line (folders also: folder<TAB>name)",
        section="data",
        identity=Through("data", "classes"),
        names="path",
    )
    # What is refused ends the run, so it is in no run's identity.
    max_image_pixels: int = setting(
        100_000_000, "a picture with more is an error, by its header", section="data", identity=None, at_least=1
    )
    crop_area: list[float] = setting(
        [0.08, 1.0],
        "smallest and largest share of the picture in a training crop",
        section="data",
        identity="data",
        check=check_area,
    )
    flip: bool = setting(
        True,
        "mirror half of the training pictures; off where the side is part of the class",
        section="data",
        identity="data",
    )
    seed: int = changed("seed", 0, "seed of the new head, of held-out shares, data order and augmentation")
    eval_batch_size: int = setting(
        64,
        "pictures classified at a time by each process when measuring",
        section="data",
        identity=None,
        at_least=1,
    )

    head_epochs: int = setting(
        8,
        "first passes that train the new head alone (paper: 8); 0: none",
        section="schedule",
        identity="schedule",
        at_least=0,
    )
    warmup_fraction: float = changed(
        "warmup_fraction", 0.0, "share of all steps in which the learning rate rises linearly (paper: none)"
    )
    adam_beta2: float = changed("adam_beta2", 0.999)
    adam_epsilon: float = changed("adam_epsilon", 1e-8)
    max_grad_norm: float | None = changed("max_grad_norm", 0.0)
    label_smoothing: float = setting(
        0.0,
        "share of the target spread evenly over all classes",
        section="schedule",
        identity="objective",
        share=True,
    )

    eval_every_epochs: int = setting(
        1,
        "top-1 and its mean over classes on the validation data; 0: only at the end",
        section="watching",
        identity=None,
        at_least=0,
    )

    def __post_init__(self) -> None:
        """Checks each field, then what fields say about each other."""
        super().__post_init__()
        if not self.model:
            raise ValueError("model: expected a folder with saved weights, a Hub id, or an architecture")
        check_part_settings(self, [self.dataset] if self.dataset else [])
        if self.head_epochs > self.epochs:
            raise ValueError(
                f"head_epochs {self.head_epochs} are part of all epochs, of which there are {self.epochs}: set both, "
                f"or head_epochs: 0 to train the whole model from the start"
            )
