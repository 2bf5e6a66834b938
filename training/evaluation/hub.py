"""Evaluation on data sets of the Hub, or on local folders that the `datasets` library reads, by their columns.

`hf://datasets/OWNER/NAME[@REVISION]`, `OWNER/NAME`, or a folder or file that `datasets.load_dataset` takes (Parquet,
`metadata.csv` beside pictures, what `save_to_disk` wrote). Pictures are taken as the stored bytes.
"""

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pyramidclip_hf.files import read_regular, visible
from pyramidclip_hf.hub_reach import asking_hub
from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from training.data.hub_sets import RefusedFile, load_checked, load_saved
from training.data.labelled import (
    LabelledPictures,
    check_class_names,
    check_every_class_has_pictures,
    names_from_file,
    spread_evenly,
)
from training.data.records import Sample
from training.data.samples import Samples, open_picture
from training.data.shards import MAX_MEMBER_BYTES, read_dataset_json

if TYPE_CHECKING:
    from datasets import Dataset
    from datasets.features.features import FeatureType

HUB_PREFIX = "hf://datasets/"
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls", "class")
_CAPTION_COLUMNS = ("caption", "captions", "sentences", "text", "txt")
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
_METADATA = tuple(f"{folder}metadata.{suffix}" for folder in ("", "*/") for suffix in ("csv", "jsonl", "parquet"))
_FOLDERS = (*_SAVED, "*.parquet", "data/*.parquet", *_METADATA)


def is_hub_data(data: str) -> bool:
    """Whether `--data` is for the `datasets` library: a name on the Hub, or a folder or file of its formats.

    A Hub repository whose `dataset.json` lists shards of ours is not: those are read as shards.
    """
    if data.startswith(HUB_PREFIX):
        return bool(_NAME.fullmatch(data.removeprefix(HUB_PREFIX))) and not read_dataset_json(data)
    path = Path(data)
    if path.is_dir():
        return not visible(path, "*.tar") and any(visible(path, pattern) for pattern in _FOLDERS)
    if path.exists() or data.endswith((".tar", ".jsonl", ".txt")):
        return data.endswith(".parquet")
    # data/mine, where the folder data is there, is a slip in a path and not a name on the Hub.
    return bool(_NAME.fullmatch(data)) and not path.parent.exists()


def labelled_hub(
    data: str,
    split: str | None = None,
    subset: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    classes_file: str | None = None,
    max_samples: int | None = None,
) -> LabelledPictures:
    """Pictures with labels of a data set, see the module.

    Args:
        data: the data set.
        split: default test.
        subset: the data set's configuration.
        image_column: default: the only picture column, or a usual name.
        label_column: default: the only class column, or a usual name.
        classes_file: gives class names other than those of the label's `ClassLabel`, or the words of a column of
            strings, "_" read as a blank.
        max_samples: so many, spread evenly.

    Raises:
        FileNotFoundError: no such data set or split.
        ValueError: columns, labels or names that do not fit.
        ImportError: no `datasets`.
    """
    rows, name, fields = _load(data, split, subset)
    image = _pick(rows.features, image_column, "--image-column", _IMAGE_COLUMNS, _is_picture)
    label = _pick(rows.features, label_column, "--label-column", _LABEL_COLUMNS, _is_class, _has_names)
    if max_samples:
        rows = rows.select(spread_evenly(len(rows), max_samples))
    keys, labels = _classes(rows.select_columns([label])[:][label], rows.features[label], label, data)
    if classes_file:
        names = names_from_file(classes_file, keys)
    elif all(key.isdecimal() for key in keys) and not _has_names(rows.features[label]):
        raise ValueError(f"{data}: the column {label} has numbers without names; --classes names a file with the names")
    else:
        names = [key.replace("_", " ") for key in keys]
    rows = _undecoded(rows.select_columns([image]), image)
    pictures = LabelledPictures(
        name=name,
        class_names=check_class_names(names, classes_file or data),
        labels=labels,
        read=functools.partial(_picture, rows, image, data),
        described=fields,
    )
    return check_every_class_has_pictures(pictures, max_samples)


class CaptionedRows(Samples):
    """Pictures and captions of a data set; `labelled_hub` says what is raised, and the other arguments.

    Rows with the same picture, byte by byte, are one sample with the captions of all: copies would stand in each
    other's way.

    Args:
        caption_column: a text a row, or a list of texts.
        max_samples: the first so many rows.
    """

    def __init__(
        self,
        data: str,
        split: str | None = None,
        subset: str | None = None,
        image_column: str | None = None,
        caption_column: str | None = None,
        max_samples: int | None = None,
    ):
        rows, self.name, self.described = _load(data, split, subset)
        self._data = data
        self._image = _pick(rows.features, image_column, "--image-column", _IMAGE_COLUMNS, _is_picture)
        self._caption = _pick(rows.features, caption_column, "--caption-column", _CAPTION_COLUMNS, _is_text)
        rows = rows.select(range(min(len(rows), max_samples or len(rows))))
        self._rows = _undecoded(rows.select_columns([self._image, self._caption]), self._image)
        numbers: dict[bytes, list[int]] = {}
        for number, row in enumerate(self._rows):
            digest = hashlib.sha256(_bytes(row[self._image], data, number)).digest()
            numbers.setdefault(digest, []).append(number)
        self._numbers = list(numbers.values())

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Sample:
        """One picture with the captions of its rows; ValueError where a row has none."""
        captions: list[str] = []
        for row_number in self._numbers[number]:
            row = self._rows[row_number]
            texts = row[self._caption]
            found = [texts] if isinstance(texts, str) else list(texts or ())
            if not found or not all(isinstance(one, str) and one.strip() for one in found):
                raise ValueError(
                    f"{self._data}, row {row_number}: expected a caption in {self._caption!r}, got {texts!r}"
                )
            captions += found
        picture = _bytes(row[self._image], self._data, row_number)
        return Sample(
            f"row {row_number}", picture, "jpg", captions[0], captions=captions if len(captions) > 1 else None
        )


class _Loaded(NamedTuple):
    """The rows of a split, the name of the data set, and fields of `EvalResult` that say which data this is."""

    rows: "Dataset"
    name: str
    described: dict[str, str | None]


def _load(data: str, split: str | None, subset: str | None) -> _Loaded:
    try:
        import datasets
    except ImportError as error:
        raise ImportError('data sets of the Hub need datasets: pip install -e ".[train]"') from error
    path, reason = Path(data), ""
    wanted: str | None = split or "test"
    name, _, revision = data.removeprefix(HUB_PREFIX).partition("@") if not path.exists() else (data, "", "")
    try:
        if path.is_dir() and any((path / file).is_file() for file in _SAVED):
            saved = load_saved(data)
            rows = saved[wanted] if isinstance(saved, datasets.DatasetDict) else saved
            wanted = str(rows.split or wanted)
        elif path.is_file():
            rows, wanted = load_checked("parquet", data_files=data, split="train"), split
        else:
            with asking_hub() as reason:
                rows = load_checked(name, subset, split=wanted, revision=revision or None)
    except RefusedFile as error:
        raise ValueError(f"{data}: {error}") from error
    except Exception as error:  # of damaged files, `datasets` raises almost anything
        reason = reason or f"{type(error).__name__}: {error}"
        raise FileNotFoundError(
            f"{data}: no split {wanted!r} of a data set could be loaded ({reason}). Expected a "
            "data set of the Hub or a folder that datasets.load_dataset takes; --split and --subset say which part"
        ) from error
    if not len(rows):
        raise ValueError(f"{data}: the split {wanted!r} has no rows")
    title = path.stem if path.exists() else name
    described = {"dataset_type": title, "dataset_split": wanted, "dataset_revision": revision or None}
    return _Loaded(rows, title + (f" ({subset})" if subset else ""), described)


def _pick(
    features: "Mapping[str, FeatureType]",
    asked: str | None,
    flag: str,
    usual: tuple[str, ...],
    fits: "Callable[[FeatureType], bool]",
    sure: "Callable[[FeatureType], bool] | None" = None,
) -> str:
    """The column asked for, else the only one that fits for sure, else the first that fits and has a usual name.

    Args:
        features: of all columns.
        asked: by the user.
        flag: which asks.
        usual: names.
        fits: whether a column will do.
        sure: whether it is meant for that; None: as `fits`.

    Raises:
        ValueError: the column asked for will not do, or none is left.
    """
    if asked and asked not in features:
        raise ValueError(f"{flag} {asked}: there is no such column; there are {', '.join(features)}")
    if asked and not fits(features[asked]):
        raise ValueError(f"{flag} {asked}: the column holds {features[asked]}, which is no use here")
    if asked:
        return asked
    fitting = [name for name, feature in features.items() if fits(feature)]
    certain = [name for name in fitting if (sure or fits)(features[name])]
    named = [name for name in usual if name in fitting]
    if len(certain) != 1 and not named:
        raise ValueError(f"{flag} is needed: the columns are {', '.join(features)}, and {fitting or 'none'} would do")
    return certain[0] if len(certain) == 1 else named[0]


def _is_picture(feature: "FeatureType") -> bool:
    return type(feature).__name__ == "Image" or getattr(feature, "dtype", None) in ("binary", "large_binary")


def _has_names(feature: "FeatureType") -> bool:
    return hasattr(feature, "names")


def _is_class(feature: "FeatureType") -> bool:
    dtype = getattr(feature, "dtype", "")
    return _has_names(feature) or dtype in ("string", "large_string") or "int" in str(dtype)


def _is_text(feature: "FeatureType") -> bool:
    inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else feature)
    return getattr(inner, "dtype", None) in ("string", "large_string")


def _classes(values: list[Any], feature: Any, column: str, data: str) -> tuple[list[str], list[int]]:
    """The classes as the data names them, and the class number of each row."""
    if any(value is None or value == -1 for value in values):
        raise ValueError(f"{data}: rows without a label in {column}; the labels of this split may not be public")
    if _has_names(feature):
        return list(feature.names), list(values)
    if isinstance(values[0], int):
        return [str(number) for number in range(max(values) + 1)], list(values)
    keys = sorted(set(values))
    numbers = {key: number for number, key in enumerate(keys)}
    return keys, [numbers[value] for value in values]


def _undecoded(rows: "Dataset", column: str) -> "Dataset":
    from datasets import Image

    return rows.cast_column(column, Image(decode=False)) if isinstance(rows.features[column], Image) else rows


def _picture(
    rows: "Dataset", column: str, data: str, number: int, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    return open_picture(_bytes(rows[number][column], data, number), f"{data}, row {number}", max_image_pixels)


def _bytes(value: Any, data: str, row: int) -> bytes:
    """The bytes of a picture as `datasets` gives it undecoded: bytes, or a mapping with `bytes` or `path`."""
    if isinstance(value, bytes):
        return value
    value = value or {}
    if value.get("bytes") is not None:
        return value["bytes"]
    if value.get("path") and Path(value["path"]).is_file():
        return read_regular(value["path"], MAX_MEMBER_BYTES)
    raise ValueError(f"{data}, row {row}: no picture; a caption or label without one cannot be evaluated")
