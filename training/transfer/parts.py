"""Labelled pictures for training a classifier: parts with one set of classes, held-out shares, what identifies them.

A source is what `training.data.labelled` reads: a folder with a sub-folder of pictures for each class, or shards
whose `KEY.json` has `class_name`; or both parts come from one of the data sets of `training.evaluation.sets`. Nothing
is skipped: a picture that cannot be read is an error naming it, when it is met.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from training.data.labelled import LabelledPictures, open_pictures
from training.data.remote import is_url
from training.data.sources import shard_names
from training.evaluation.embedding import map_batches
from training.evaluation.sets import open_both_splits

# Files hashed at a time by one process.
_DIGEST_BATCH = 256


def subset(data: LabelledPictures, numbers: Sequence[int]) -> LabelledPictures:
    """The pictures with these numbers, in this order, under the same class numbers."""
    numbers = [int(number) for number in numbers]
    labels = [data.labels[number] for number in numbers]
    return dataclasses.replace(data, labels=labels, read=lambda number: data.read(numbers[number]))


def with_classes_of(data: LabelledPictures, reference: LabelledPictures) -> LabelledPictures:
    """`data` with the class numbers of `reference`; ValueError where the two do not have the same classes."""
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


def held_out(labels: Sequence[int], fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers kept, numbers held out), each sorted: `fraction` of every class, rounded, at least one picture.

    A function of its arguments alone. ValueError where a class has a single picture.
    """
    labels = np.asarray(labels)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
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
    """Pictures `numbers` of an opened source. source: as the user named it. data: all its pictures."""

    source: str
    data: LabelledPictures
    numbers: np.ndarray

    @property
    def pictures(self) -> LabelledPictures:
        return subset(self.data, self.numbers)

    @property
    def labels(self) -> np.ndarray:
        """(n,) int64."""
        return np.asarray(self.data.labels, np.int64)[self.numbers]

    def split(self, fraction: float, seed: int) -> tuple["Part", "Part"]:
        """What stays, and a stratified share of `fraction`; see `held_out`."""
        kept, out = held_out(self.labels, fraction, seed)
        return (
            dataclasses.replace(self, numbers=self.numbers[kept]),
            dataclasses.replace(self, numbers=self.numbers[out]),
        )


def open_parts(args) -> dict[str, Part]:
    """The parts "train", "validation" and "test" that settings name; one that they do not name is absent.

    args: `train_data`, `validation_data`, `test_data` (sources or None), `validation_fraction`, `test_fraction` (shares
    of the training data held out where no source is named; the test share is taken first; 0: none), `dataset` (one of
    `TABLE_7`, whose folder is in `train_data`, and which has its own test part; or None), `classes` (file with names,
    or None), `seed`. Raises ValueError where classes differ or both a source and a share are named.
    """
    if args.dataset:
        data, test = open_both_splits(args.dataset, args.train_data, args.classes)
        parts = {"train": Part(args.train_data, data, np.arange(len(data)))}
        parts["test"] = Part(args.train_data, with_classes_of(test, data), np.arange(len(test)))
    else:
        data = open_pictures(args.train_data, args.classes)
        parts = {"train": Part(args.train_data, data, np.arange(len(data)))}
    for number, name in enumerate(("test", "validation")):
        source, fraction = getattr(args, f"{name}_data"), getattr(args, f"{name}_fraction")
        if source and fraction:
            raise ValueError(f"give {name}_data or {name}_fraction, not both: got {source} and {fraction}")
        if source:
            other = with_classes_of(open_pictures(source, args.classes), data)
            parts[name] = Part(source, other, np.arange(len(other)))
        elif fraction:
            parts["train"], parts[name] = parts["train"].split(fraction, args.seed * 2 + number)
    return parts


def source_files(part: Part) -> list[Path]:
    """The local files that a part's whole source is read from, in its order; none for a URL or a manifest, or where
    pictures have none of their own (CIFAR).
    """
    if part.data.files is not None:
        return list(part.data.files)
    names = [] if is_url(part.source) or part.source.endswith(".jsonl") else shard_names(part.source)
    return [] if any(map(is_url, names)) else [Path(name) for name in names]


def _relative(path: Path, source: str) -> str:
    return path.name if path == Path(source) else Path(os.path.relpath(path, source)).as_posix()


def fingerprint(part: Part) -> str:
    """What must stay the same for a run to continue on a part: names and sizes of its files, which pictures of them,
    their classes; not where they lie.
    """
    listing = [[_relative(path, part.source), path.stat().st_size] for path in source_files(part)]
    identity = [listing or part.data.name, part.numbers.tolist(), part.data.class_names, part.data.labels]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


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

    function, items = (of_files, len(files)) if files else (of_pictures, len(part.data))
    digests = map_batches(function, items, _DIGEST_BATCH, "identity of the pictures")
    return hashlib.sha256(json.dumps([len(part.data), digests]).encode()).hexdigest()
