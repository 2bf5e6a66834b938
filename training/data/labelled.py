"""Pictures with class labels, from folders with one sub-folder for each class or from shards.

Nothing is shuffled, skipped or replaced here: picture i is the same one in every run, and one that cannot be read is an
error, because a score over fewer pictures than the data set has is another score.
"""

import dataclasses
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pyramidclip_hf.files import read_utf8, visible
from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.picture_files import pictures_of_classes, told_passed_over
from training.data.records import Sample
from training.data.remote import is_url
from training.data.samples import ShardSamples, open_picture
from training.data.shards import read_dataset_json


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures for classification.

    Attributes:
        name: the data set, as results call it.
        class_names: the C names that prompts are made of.
        labels: one class number a picture.
        read: picture number -> PIL picture; takes `max_image_pixels` too, see `limited`. It can be pickled, for
            processes that are started.
        described: fields of `EvalResult` that say which data this is.
        main_metric: the metric that this data set is reported by, and a word on it; None where there is no such custom.
        files: the picture files, in the order of `labels`; empty where pictures have no files of their own, None where
            they lie in shards.
    """

    name: str
    class_names: list[str]
    labels: list[int]
    read: Callable[..., Image.Image]
    described: Mapping[str, str | None] = field(default_factory=dict)
    main_metric: tuple[str, str] | None = None
    files: Sequence[Path] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def limited(self, max_image_pixels: int) -> "LabelledPictures":
        """The same, where a picture with more pixels cannot be read, by its header."""
        return dataclasses.replace(self, read=functools.partial(self.read, max_image_pixels=max_image_pixels))


def check_class_names(names: Sequence[str], source: str) -> list[str]:
    """The names without outer blanks.

    Args:
        names: of the classes.
        source: where they are from, in errors.

    Raises:
        ValueError: a name is empty, or two are the same up to case.
    """
    names = [name.strip() for name in names]
    empty = [number for number, name in enumerate(names, 1) if not name]
    if empty:
        raise ValueError(f"{source}: class name number {empty[0]} is empty; every class needs words for its prompt")
    folded = [name.casefold() for name in names]
    repeated = sorted({name for name, key in zip(names, folded) if folded.count(key) > 1})
    if repeated:
        raise ValueError(
            f"{source}: class names repeat: {', '.join(map(repr, repeated[:5]))}. Two classes with one name get the "
            "same prompts, so neither can be told from the other; rename or merge them"
        )
    return names


def check_every_class_has_pictures(data: LabelledPictures, max_samples: int | None) -> LabelledPictures:
    """The data as given.

    Args:
        data: to check.
        max_samples: so many pictures were chosen, so classes may have none; None: all there are.

    Raises:
        ValueError: a class has no picture.
    """
    met = set(data.labels)
    missing = [name for number, name in enumerate(data.class_names) if number not in met]
    if missing and not max_samples:
        raise ValueError(
            f"{data.name}: {len(missing)} of {len(data.class_names)} class names have no picture: "
            f"{', '.join(map(repr, missing[:5]))}. Names that are never right make the score incomparable; leave them "
            "out or add their pictures"
        )
    return data


def spread_evenly(items: int, wanted: int) -> list[int]:
    """The numbers of `wanted` of the items, at even distances; all where there are no more."""
    wanted = min(items, wanted)
    return [number * items // wanted for number in range(wanted)]


def open_pictures(
    data: str, classes_file: str | None = None, max_samples: int | None = None, allow_unfinished: bool | None = None
) -> LabelledPictures:
    """The pictures of a folder of classes, or of shards; see `labelled_folder` and `labelled_shards`."""
    if os.path.isdir(data) and not visible(data, "*.tar"):
        return labelled_folder(data, classes_file, max_samples)
    return labelled_shards(data, classes_file, max_samples, allow_unfinished)


def listed_classes(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """What lies in a folder that has one sub-folder for each class, as torchvision's ImageFolder expects it.

    Returns:
        The names of the sub-folders, sorted; the pictures in them, at any depth, sorted within each; the number of the
        class of each. Hidden files and folders (`.ipynb_checkpoints`, macOS's `._x.jpg`) are left out.
    """
    other: Counter[str] = Counter()
    classes = pictures_of_classes(folder, other)
    if other and os.environ.get("RANK", "0") == "0":  # of several processes, one says it
        print(f"{folder}: {told_passed_over(other)}", file=sys.stderr)
    labels = [label for label, pictures in enumerate(classes.values()) for _ in pictures]
    return list(classes), [path for pictures in classes.values() for path in pictures], labels


def labelled_folder(folder: str, classes_file: str | None = None, max_samples: int | None = None) -> LabelledPictures:
    """Pictures in one sub-folder for each class, see `listed_classes`.

    Args:
        folder: with the sub-folders, whose names with "_" read as a blank are the class names.
        classes_file: gives others: lines `folder<TAB>name`, or one name a line in the order of the sorted folders.
        max_samples: so many, spread evenly over the pictures.

    Raises:
        FileNotFoundError: there are no sub-folders, or no such file.
        ValueError: splits instead of classes, names that do not fit, or a class without a picture.
    """
    root = Path(folder)
    folders, paths, labels = listed_classes(root)
    files = list(zip(paths, labels))
    if not folders:
        raise FileNotFoundError(f"{folder}: expected one sub-folder of pictures for each class, found none")
    if set(folders) <= {"train", "training", "val", "valid", "validation", "test"}:
        raise ValueError(
            f"{folder}: its folders {folders} are splits, not classes; name one, e.g. {root / folders[-1]}"
        )
    names = [name.replace("_", " ") for name in folders]
    if classes_file:
        names = names_from_file(classes_file, folders)
    if max_samples:
        files = [files[number] for number in spread_evenly(len(files), max_samples)]
    paths = [path for path, _ in files]
    data = LabelledPictures(
        name=root.resolve().name,
        class_names=check_class_names(names, classes_file or folder),
        labels=[label for _, label in files],
        read=functools.partial(_picture_file, paths),
        files=paths,
    )
    return check_every_class_has_pictures(data, max_samples)


def names_from_file(classes_file: str, folders: list[str]) -> list[str]:
    """The class names of a file, in the order of `folders`.

    Args:
        classes_file: lines `folder<TAB>name`, or one name for each in order.
        folders: the classes as the data names them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the lines do not fit the folders.
    """
    if not Path(classes_file).is_file():
        raise FileNotFoundError(f"there is no class file {classes_file}; expected one name a line, or folder<TAB>name")
    lines = read_utf8(classes_file).splitlines()
    if any("\t" in line for line in lines):
        named = dict(line.split("\t", 1) for line in lines if "\t" in line)
        missing = [folder for folder in folders if folder not in named]
        extra = sorted(set(named) - set(folders))
        if missing or extra:
            raise ValueError(
                f"{classes_file}: folders without a name: {missing[:5]}; names of absent folders: {extra[:5]}"
            )
        return [named[folder] for folder in folders]
    if len(lines) != len(folders):
        raise ValueError(
            f"{classes_file} has {len(lines)} names, but the data has {len(folders)} classes "
            f"({', '.join(folders[:5])}, ...); expected one name for each, in the order of the sorted folders"
        )
    return lines


def labelled_shards(
    data: str, classes_file: str | None = None, max_samples: int | None = None, allow_unfinished: bool | None = None
) -> LabelledPictures:
    """Pictures of shards whose `KEY.json` has `class_name`, as the split "objects" of the emoji scenes.

    Args:
        data: the string that names them, see `training.data.sources`. Where it is a folder, local or behind a URL, the
            class names are `classes` of its `dataset.json`; else those met, sorted.
        classes_file: gives other names, in lines `class_name<TAB>name`, or lists the `class_name`s, one a line.
        max_samples: so many, spread evenly over the samples.
        allow_unfinished: see `open_data_set`.

    Raises:
        FileNotFoundError: there is nothing, or no such file.
        ValueError: a sample without a class or with one that is not among the names, or a class without a picture.
    """
    samples = ShardSamples(data, allow_unfinished=allow_unfinished, levels=("global",))
    chosen = spread_evenly(len(samples), max_samples or len(samples))
    found = [_class_of(samples.read(number, picture=False), data) for number in chosen]
    is_folder = os.path.isdir(data) or (is_url(data) and ".tar" not in Path(data).name and not data.endswith(".txt"))
    listed = (read_dataset_json(data) or {}).get("classes") if is_folder else None
    names = classes = listed or sorted(set(found))
    if classes_file:
        if not Path(classes_file).is_file():
            raise FileNotFoundError(f"there is no class file {classes_file}; expected class_name<TAB>name a line")
        lines = read_utf8(classes_file).splitlines()
        if any("\t" in line for line in lines):
            names = names_from_file(classes_file, classes)
        else:
            names = classes = lines
    names = check_class_names(names, classes_file or data)
    unknown = sorted(set(found) - set(classes))
    if unknown:
        raise ValueError(f"{data}: pictures of classes that are not among the {len(names)} names: {unknown[:5]}")
    numbers = {name: number for number, name in enumerate(classes)}
    pictures = LabelledPictures(
        name=Path(data).resolve().stem,
        class_names=names,
        labels=[numbers[name] for name in found],
        read=functools.partial(_picture_of, samples, chosen),
    )
    return check_every_class_has_pictures(pictures, max_samples)


def _picture_file(files: Sequence[Path], number: int, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """One of the files, decoded; ValueError where it is no picture."""
    return open_picture(files[number].read_bytes(), str(files[number]), max_image_pixels)


def _picture_of(
    samples: ShardSamples, chosen: Sequence[int], number: int, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    sample = samples[chosen[number]]
    return open_picture(sample.image, sample.key, max_image_pixels)


def _class_of(sample: Sample, data: str) -> str:
    found = sample.extra.get("class_name")
    if found is None:
        raise ValueError(
            f"{data}: sample {sample.key!r} has no class_name in its .json: expected the name of its class in each, or "
            "a folder with a sub-folder of pictures for each class"
        )
    if not isinstance(found, str):
        raise ValueError(f"{data}: sample {sample.key!r}: class_name is {found!r}, expected a string")
    return found
