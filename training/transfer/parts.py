"""Labelled pictures for training a classifier: parts with one set of classes, held-out shares, what identifies them.

A source is what `training.data.labelled` reads: a folder with a sub-folder of pictures for each class, or shards
whose `KEY.json` has `class_name`; or both parts come from one of the data sets of `training.evaluation.sets`. A picture
that cannot be read is an error naming it; but the validation on the way of a run leaves it out (`measurable`).
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pyramidclip_hf.files import json_text
from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from training.data.labelled import LabelledPictures, open_pictures
from training.data.remote import is_url
from training.data.shared_files import refuse_shared_files
from training.data.sources import shard_names
from training.evaluation.embedding import map_batches
from training.evaluation.sets import open_both_splits
from training.settings.parts import PartSettings

Numbers = np.ndarray[Any, np.dtype[np.int64]]
# Files hashed at a time by one process.
_DIGEST_BATCH = 256


def subset(data: LabelledPictures, numbers: Iterable[int]) -> LabelledPictures:
    """The pictures with these numbers, in this order, under the same class numbers."""
    chosen = [int(number) for number in numbers]
    labels = [data.labels[number] for number in chosen]
    return dataclasses.replace(data, labels=labels, read=functools.partial(_chosen_picture, data.read, chosen))


def _chosen_picture(read: Callable[[int], Image.Image], chosen: Sequence[int], number: int) -> Image.Image:
    return read(chosen[number])


def with_classes_of(data: LabelledPictures, reference: LabelledPictures) -> LabelledPictures:
    """`data` with the class numbers of `reference`.

    Raises:
        ValueError: The two do not have the same classes.
    """
    if data.class_names == reference.class_names:  # names may repeat then, as in CLIP's list for ImageNet
        return data
    own, wanted = set(data.class_names), set(reference.class_names)
    if own != wanted:
        missing, extra = sorted(wanted - own), sorted(own - wanted)
        raise ValueError(
            f"{data.name} and the training data {reference.name} must have the same classes. {data.name} has "
            f"{len(own)}, {reference.name} {len(wanted)}; only in {data.name}: {extra[:5]}; not in it: {missing[:5]}"
        )
    numbers = [reference.class_names.index(name) for name in data.class_names]
    return dataclasses.replace(
        data, class_names=list(reference.class_names), labels=[numbers[label] for label in data.labels]
    )


def held_out(labels: Sequence[int] | Numbers, fraction: float, seed: int) -> tuple[Numbers, Numbers]:
    """(numbers kept, numbers held out), each sorted: `fraction` of every class, rounded, at least one picture.

    A function of its arguments alone.

    Raises:
        ValueError: A class has a single picture.
    """
    given = np.asarray(labels)
    chosen = np.zeros(len(given), bool)
    for label in np.unique(given):
        members = np.flatnonzero(given == label)
        if len(members) < 2:
            raise ValueError(
                f"class number {label} has a single picture, so none can be held out; name the data to measure on "
                "(--validation-data, --test-data) or add pictures"
            )
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        chosen[np.random.default_rng((seed, int(label))).permutation(members)[:count]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


@dataclass(frozen=True)
class Part:
    """Some pictures of an opened source.

    Attributes:
        source: As the user named it.
        data: All its pictures.
        numbers: (n,) int64, which of them.
    """

    source: str
    data: LabelledPictures
    numbers: Numbers

    @property
    def pictures(self) -> LabelledPictures:
        """Those of the part alone, numbered from 0."""
        return subset(self.data, self.numbers)

    @property
    def labels(self) -> Numbers:
        """(n,) int64."""
        return np.asarray(self.data.labels, np.int64)[self.numbers]

    def split(self, fraction: float, seed: int) -> tuple["Part", "Part"]:
        """What stays, and a stratified share of `fraction`; see `held_out`."""
        kept, out = held_out(self.labels, fraction, seed)
        return (
            dataclasses.replace(self, numbers=self.numbers[kept]),
            dataclasses.replace(self, numbers=self.numbers[out]),
        )


def open_parts(args: PartSettings, dataset: str | None = None) -> dict[str, Part]:
    """The parts "train", "validation" and "test" that settings name; one that they do not name is absent.

    Args:
        args: The settings.
        dataset: One of `TABLE_7` under the folder `train_data`; None: `train_data` are the pictures.

    Raises:
        ValueError: Classes differ, or there is one alone, or both a source and a share are named, or what is to be
            measured on is learnt from.
    """
    if dataset:
        both = open_both_splits(dataset, args.train_data, args.classes)
        data, test = (one.limited(args.max_image_pixels) for one in both)
        parts = {"train": Part(args.train_data, data, np.arange(len(data)))}
        parts["test"] = Part(args.train_data, with_classes_of(test, data), np.arange(len(test)))
    else:
        data = open_pictures(args.train_data, args.classes).limited(args.max_image_pixels)
        parts = {"train": Part(args.train_data, data, np.arange(len(data)))}
    if len(data.class_names) < 2:
        raise ValueError(f"{args.train_data} has one class, {data.class_names[0]!r}: a classifier needs two or more")
    for number, name in enumerate(("test", "validation")):
        source, fraction = getattr(args, f"{name}_data"), getattr(args, f"{name}_fraction")
        if source and fraction:
            raise ValueError(f"give {name}_data or {name}_fraction, not both: got {source} and {fraction}")
        if source:
            opened = open_pictures(source, args.classes).limited(args.max_image_pixels)
            other = with_classes_of(opened, data)
            parts[name] = Part(source, other, np.arange(len(other)))
            refuse_shared(parts["train"], parts[name])
        elif fraction:
            parts["train"], parts[name] = parts["train"].split(fraction, args.seed * 2 + number)
    return parts


def refuse_shared(learnt: Part, measured: Part) -> None:
    """Looks whether two sources have files in common, by their bytes; pictures inside of shards are not compared.

    Raises:
        ValueError: They have, or are the same.
    """
    if measured.source == learnt.source:
        raise ValueError(
            f"{measured.source} is trained on: what is measured there says nothing. Take other pictures to measure on, "
            "or hold out a share of these (--validation-fraction, --test-fraction)"
        )
    kind = "shards" if measured.data.files is None else "pictures"
    refuse_shared_files(source_files(learnt), source_files(measured), measured.source, kind)


def measurable(parts: Mapping[str, Part]) -> tuple[dict[str, Part], list[str]]:
    """The parts that are measured, each picture decoded once before anything is trained.

    All processes call it together and share the pictures.

    Returns:
        The parts, without the pictures of "validation" that cannot be read, and what is wrong with each of these: what
        is measured on the way must not end what it looks at.

    Raises:
        ValueError: A picture of "test" cannot be read, whose score is reported; or none of "validation" can.
    """
    found = dict(parts)
    if "test" in parts and (bad := unreadable(parts["test"].pictures)):
        raise ValueError(
            f"test data {parts['test'].source}: {told_unreadable(bad, len(parts['test'].numbers))}. A score over fewer "
            "pictures is another score: repair them or take them out"
        )
    if "validation" not in parts:
        return found, []
    part = parts["validation"]
    bad = unreadable(part.pictures)
    if len(bad) == len(part.numbers):
        raise ValueError(f"validation data {part.source}: {told_unreadable(bad, len(part.numbers))}")
    found["validation"] = dataclasses.replace(part, numbers=np.delete(part.numbers, list(bad)))
    return found, list(bad.values())


def unreadable(data: LabelledPictures) -> dict[int, str]:
    """Number -> what is wrong, of each picture that cannot be decoded; all processes call it together."""

    def look(numbers: range) -> dict[int, str]:
        return pictures_of(data, numbers)[1]

    found = map_batches(look, len(data), _DIGEST_BATCH, f"looking at {data.name}")
    return {number: problem for batch in found for number, problem in batch.items()}


def pictures_of(data: LabelledPictures, numbers: Iterable[int]) -> tuple[list[Image.Image], dict[int, str]]:
    """The pictures of these numbers that can be decoded, and number -> what is wrong of the others."""
    pictures, problems = [], {}
    for number in numbers:
        try:
            pictures.append(data.read(number))
        except (ValueError, OSError) as error:
            problems[number] = str(error)
    return pictures, problems


def told_unreadable(bad: Mapping[int, str], count: int) -> str:
    """For people: how many of `count` pictures cannot be read, and the first ones."""
    first = "; ".join(list(bad.values())[:3])
    return f"{len(bad)} of {count} pictures cannot be read: {first}{'; ...' if len(bad) > 3 else ''}"


def source_files(part: Part) -> list[Path]:
    """The local files that a part's whole source is read from, in its order.

    None for a URL or a manifest, or where pictures have none of their own (CIFAR).
    """
    if part.data.files is not None:
        return list(part.data.files)
    names = [] if is_url(part.source) or part.source.endswith(".jsonl") else shard_names(part.source)
    return [] if any(map(is_url, names)) else [Path(name) for name in names]


def _relative(path: Path, source: str) -> str:
    return path.name if path == Path(source) else Path(os.path.relpath(path, source)).as_posix()


def fingerprint(part: Part) -> str:
    """What must stay the same for a run to continue on a part.

    Names and sizes of its files, which pictures of them, their classes; not where they lie.
    """
    listing = [[_relative(path, part.source), path.stat().st_size] for path in source_files(part)]
    identity = [listing or part.data.name, part.numbers.tolist(), part.data.class_names, part.data.labels]
    return hashlib.sha256(json_text(identity).encode()).hexdigest()[:32]


def content_digest(part: Part) -> str:
    """A hash of all that the pictures of a part's whole source show, so that a changed pixel changes it.

    Of the bytes of local files, which takes a fraction of the time of decoding; of the decoded pictures where there are
    none. All processes call it together and get the same.
    """
    files = source_files(part)

    def of_files(numbers: range) -> list[str]:
        digests = []
        for path in (files[number] for number in numbers):
            with open(path, "rb") as file:
                digests.append(f"{_relative(path, part.source)} {hashlib.file_digest(file, 'sha256').hexdigest()}")
        return digests

    def of_pictures(numbers: range) -> list[str]:
        pictures = (np.asarray(upright_rgb(part.data.read(number))) for number in numbers)
        return [f"{pixels.shape} {hashlib.sha256(pixels.tobytes()).hexdigest()}" for pixels in pictures]

    what = "identity of the pictures"
    if files:
        digests = map_batches(of_files, len(files), _DIGEST_BATCH, what)
    else:
        digests = map_batches(of_pictures, len(part.data), _DIGEST_BATCH, what)
    return hashlib.sha256(json_text([len(part.data), digests]).encode()).hexdigest()
