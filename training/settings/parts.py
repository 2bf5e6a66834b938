"""What settings say about labelled parts of data: the one to train on, and those to validate and test on."""

from collections.abc import Sequence
from typing import Protocol

from training.evaluation.arguments import TABLE_7_SETS
from training.settings.fields import check_share


class PartSettings(Protocol):
    """The settings from which the parts "train", "validation" and "test" are opened.

    Attributes:
        train_data: A folder with a sub-folder of pictures for each class, or labelled shards; with named data sets, the
            folder that holds them.
        validation_data: The same, or None.
        test_data: The same, or None.
        validation_fraction: Share of each class held out of the training data where no `validation_data` are named.
        test_fraction: The same for `test_data`; it is taken first.
        classes: A file with class names, or None.
        seed: Of what is held out.
        max_image_pixels: Of a picture, at most.
    """

    train_data: str
    validation_data: str | None
    test_data: str | None
    test_fraction: float
    classes: str | None
    seed: int
    max_image_pixels: int

    @property
    def validation_fraction(self) -> float | None:
        """None as 0."""


def check_part_settings(settings: PartSettings, datasets: Sequence[str] = ()) -> None:
    """Refuses what can be refused before anything is opened.

    Args:
        settings: To check.
        datasets: Those that are named beside them, each of `TABLE_7_SETS`, which have test parts of their own.

    Raises:
        ValueError: The message names the setting, what was expected and what came.
    """
    check_share("validation_fraction", settings.validation_fraction or 0.0)
    check_share("test_fraction", settings.test_fraction)
    if not settings.train_data:
        raise ValueError("train_data: expected a folder with a sub-folder of pictures for each class, or shards")
    for name in datasets:
        if name not in TABLE_7_SETS:
            raise ValueError(f"dataset: expected one of {', '.join(TABLE_7_SETS)}, got {name!r}")
        if settings.test_data or settings.test_fraction:
            raise ValueError(f"dataset {name} has its own test part: leave out test_data and test_fraction")
