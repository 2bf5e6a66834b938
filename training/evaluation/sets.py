"""The 11 classification data sets of Table 7 of the paper (appendix B.1), read from a local folder.

    open_set("pets", "/data")  ->  LabelledPictures

The folders are laid out as torchvision expects them, the class names are CLIP's as clip-benchmark and torchvision carry
them; nothing is downloaded. What is read counts as Table 7's only where the numbers of pictures and classes are its
numbers: otherwise the name says what was found instead. Two of the sets come without a split in these libraries
(SUN397, Caltech-101): a split file then says which pictures count, and the name says so.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pyramidclip_hf.files import read_utf8
from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from training.data.labelled import (
    LabelledPictures,
    check_class_names,
    check_every_class_has_pictures,
    listed_classes,
    names_from_file,
    spread_evenly,
)
from training.data.samples import open_picture

INSTALL = 'needs clip-benchmark and torchvision: pip install -e ".[eval]"'
PAPER_METRIC = "the metric of Table 7"
MAIN_METRIC = "main metric"


@dataclass(frozen=True)
class Listing:
    """What a library lists.

    Attributes:
        keys: the classes as the files of the data set name them.
        names: as prompts do.
        pictures: paths, or (H, W, 3) uint8 arrays where they have no files.
        labels: one class number a picture.
    """

    keys: list[str]
    names: list[str]
    pictures: Sequence[Path | np.ndarray]
    labels: list[int]


# (root, "train" or "test") -> what the library lists.
Reader = Callable[[Path, str], Listing]


@dataclass(frozen=True)
class NamedSet:
    """One row of Table 7, and where its files are.

    Attributes:
        numbers: classes, training pictures, test pictures in Table 7.
        metric: `top_1` ("accuracy") or `mean_per_class`.
        pictures: the folder under the data root that the paths of a split file start from; `{part}` is the split as
            `parts` calls it, and `a|b` the first of two that is there.
        needs: what else has to be there.
        download: what to fetch, and from where.
        read: (root, "train" or "test") -> `Listing`.
        split_files: split files that are taken by themselves where they are there, {"train": paths, "test": paths}.
        whole: the library lists all pictures whichever split is asked for.
    """

    title: str
    numbers: tuple[int, int, int]
    metric: str
    pictures: str
    needs: tuple[str, ...]
    download: str
    read: Reader
    split_files: dict[str, tuple[str, ...]] = field(default_factory=dict)
    whole: bool = False
    parts: dict[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})

    def folder(self, root: Path, split: str) -> Path:
        """Where the pictures of a split are, or belong."""
        found = [root / one.format(part=self.parts[split]) for one in self.pictures.split("|")]
        return next((path for path in found if path.exists()), found[0])

    def counted(self, split: str) -> tuple[int, int]:
        """How many classes, and pictures of the split, Table 7 has."""
        return self.numbers[0], self.numbers[1 if split == "train" else 2]


def open_set(
    name: str,
    root: str,
    split: str = "test",
    split_file: str | None = None,
    classes_file: str | None = None,
    max_samples: int | None = None,
) -> LabelledPictures:
    """A data set of `TABLE_7` by its short name, from the folder `root` that holds all of them.

    Args:
        name: a key of `TABLE_7`.
        root: the folder.
        split: "test" or "train" (for ImageNet, "test" is its validation set, as in the paper).
        split_file: lines `relative/path<TAB>label`; the label may be left out where the library lists the picture.
        classes_file: see `training.data.labelled.labelled_folder`.
        max_samples: so many, spread evenly.

    Raises:
        ValueError: an unknown name or split, or files that do not fit.
        FileNotFoundError: data is missing; the message says what to download, and where to put it.
        ImportError: no torchvision or clip-benchmark.
    """
    if name not in TABLE_7:
        raise ValueError(f"there is no data set {name!r}; Table 7 has {', '.join(TABLE_7)}")
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r} of {name}: expected test or train")
    spec, folder = TABLE_7[name], Path(root)
    _check_is_there(spec, folder, split)
    try:
        listing = spec.read(folder, split)
    except ImportError as error:
        raise ImportError(f"{spec.title} {INSTALL} ({error})") from error
    except (RuntimeError, OSError, KeyError) as error:
        advice = _what_to_download(spec, folder, split)
        raise ValueError(f"{spec.title} under {root} is incomplete or damaged: {error}. {advice}") from error
    pictures, labels, names = listing.pictures, listing.labels, listing.names
    if not split_file:
        there = (folder / one for one in spec.split_files.get(split, ()))
        split_file = next((str(path) for path in there if path.is_file()), None)
    if split_file:
        pictures, labels = _read_split_file(split_file, spec.folder(folder, split), listing)
    if max_samples:
        chosen = spread_evenly(len(pictures), max_samples)
        pictures, labels = [pictures[i] for i in chosen], [labels[i] for i in chosen]
    if classes_file:
        names = check_class_names(names_from_file(classes_file, listing.keys), classes_file)
    sizes = (len(names), len(pictures))
    as_paper = sizes == spec.counted(split) and not (spec.whole and not split_file)
    data = LabelledPictures(
        name=_reported_name(spec, split, sizes, split_file, as_paper),
        class_names=names,
        labels=labels,
        read=functools.partial(_picture, pictures),
        described={"dataset_type": name, "dataset_split": spec.parts[split]},
        main_metric=(spec.metric, PAPER_METRIC if as_paper else MAIN_METRIC),
        files=[picture for picture in pictures if isinstance(picture, Path)],
    )
    return check_every_class_has_pictures(data, max_samples)


def open_both_splits(
    name: str, root: str, classes_file: str | None = None
) -> tuple[LabelledPictures, LabelledPictures]:
    """The training part and the test part of a data set of `TABLE_7`, to learn on the one and measure on the other.

    Raises:
        ValueError: see `open_set`; the library lists all pictures for both and there are no split files; a picture is
            in both parts.
        FileNotFoundError: see `open_set`.
        ImportError: see `open_set`.
    """
    spec = TABLE_7.get(name)
    if spec and spec.whole:
        absent = [
            names[0] for names in spec.split_files.values() if not any(Path(root, one).is_file() for one in names)
        ]
        if absent:
            raise ValueError(
                f"{spec.title} comes without a split, so nothing tells training from test pictures: put "
                f"{' and '.join(absent)} under {root}, lines relative/path[<TAB>label]"
            )
    train, test = (open_set(name, root, split, classes_file=classes_file) for split in ("train", "test"))
    shared = set(train.files or ()) & set(test.files or ())
    if shared:
        raise ValueError(f"{train.name}: {len(shared)} pictures are in both parts, first {min(shared)}")
    return train, test


def _picture(
    pictures: Sequence[Path | np.ndarray], number: int, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    picture = pictures[number]
    if isinstance(picture, Path):
        return open_picture(picture.read_bytes(), str(picture), max_image_pixels)
    return Image.fromarray(picture)


def _reported_name(spec: NamedSet, split: str, sizes: tuple[int, int], split_file: str | None, as_paper: bool) -> str:
    notes = [f"split file {Path(split_file).name}"] if split_file else []
    if not as_paper:
        (classes, pictures), (all_classes, all_pictures) = sizes, spec.counted(split)
        found = f"found {pictures:,} in {classes} classes, Table 7 has {all_pictures:,} in {all_classes}"
        notes.append(f"not the paper's split: {found}")
    elif split == "train":
        notes.append("training part")
    return spec.title + (f" ({'; '.join(notes)})" if notes else "")


def _what_to_download(spec: NamedSet, root: Path, split: str) -> str:
    places = ", ".join(map(str, [spec.folder(root, split), *(root / one for one in spec.needs)]))
    return f"Download {spec.download}, so that there is {places} (docs/evaluation.md lists all layouts)"


def _check_is_there(spec: NamedSet, root: Path, split: str) -> None:
    missing = [path for path in (spec.folder(root, split), *(root / one for one in spec.needs)) if not path.exists()]
    if missing:
        absent = ", ".join(str(path.relative_to(root)) for path in missing)
        raise FileNotFoundError(f"{root} lacks {spec.title}: no {absent}. {_what_to_download(spec, root, split)}")


def _read_split_file(source: str, folder: Path, listing: Listing) -> tuple[list[Path], list[int]]:
    """Pictures and class numbers of the lines of a split file; a path may start with a slash, as those of SUN397."""
    if not Path(source).is_file():
        raise FileNotFoundError(f"there is no split file {source}; expected one relative/path<TAB>label a line")
    paths = [picture for picture in listing.pictures if isinstance(picture, Path)]
    if len(paths) < len(listing.pictures):
        raise ValueError(f"{source}: this data set has no files to name in a split file; it comes with its own split")
    known = dict(zip((path.relative_to(folder).as_posix() for path in paths), listing.labels))
    numbers = {name: number for number, name in enumerate(listing.names) if listing.names.count(name) == 1}
    numbers |= {key: number for number, key in enumerate(listing.keys)}
    found: dict[str, int] = {}
    for line, text in enumerate(read_utf8(source).splitlines(), 1):
        path, label = (part.strip() for part in text.partition("\t")[::2])
        path = path.lstrip("/")
        if not path:
            continue
        if path in found:
            raise ValueError(f"{source}:{line}: {path} is named twice; every picture counts once")
        if label and label not in numbers:
            raise ValueError(f"{source}:{line}: no class is called {label!r}; they are {listing.keys[:5]}, ...")
        if not label and path not in known:
            raise ValueError(
                f"{source}:{line}: {path} is not among the {len(known)} pictures under {folder} that are listed for "
                "this split; check the path, or give relative/path<TAB>label"
            )
        found[path] = numbers[label] if label else known[path]
    if not found:
        raise ValueError(f"{source} has no lines; expected one relative/path<TAB>label a line")
    absent = [path for path in found if path not in known and not (folder / path).is_file()]
    if absent:
        raise FileNotFoundError(f"{source}: {len(absent)} of {len(found)} pictures are not there, first {absent[0]}")
    return [folder / path for path in found], list(found.values())


def _plain(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _clip_names(name: str) -> list[str]:
    """CLIP's class names for a data set, in the order of its labels, from the installed clip-benchmark."""
    file = resources.files("clip_benchmark.datasets").joinpath("en_classnames.json")
    return json.loads(file.read_text(encoding="utf-8"))[name]


def _from_library(library: str, parts: dict[str, list[dict[str, Any]]], names: Callable[[Any], list[str]]) -> Reader:
    """A reader of a torchvision data set whose split is made of one or more of the library's own."""

    def read(root: Path, split: str) -> Listing:
        import torchvision.datasets

        pictures, labels = [], []
        for options in parts[split]:
            # The library calls `loader` with a path. `Path` itself as the loader lists all without decoding any.
            data = getattr(torchvision.datasets, library)(root, loader=Path, **options)
            pairs = [data[number] for number in range(len(data))]
            pictures += [picture for picture, _ in pairs]
            labels += [int(label) for _, label in pairs]
        return Listing(list(data.classes), names(data), pictures, labels)

    return read


def _cifar(library: str) -> Reader:
    def read(root: Path, split: str) -> Listing:
        import torchvision.datasets

        # Its files are pickles; the library unpickles them only where their MD5 is the published one.
        data = getattr(torchvision.datasets, library)(root, train=split == "train")
        return Listing(data.classes, _plain(data.classes), list(data.data), list(data.targets))

    return read


def _pets(root: Path, split: str) -> Listing:
    from torchvision.datasets import OxfordIIITPet

    data = OxfordIIITPet(root, split="test" if split == "test" else "trainval")
    # The one class here that takes no `loader`: its public face would decode every picture for its label.
    return Listing(data.classes, data.classes, list(data._images), list(data._labels))


def _sun397(root: Path, split: str) -> Listing:
    def names(data: Any) -> list[str]:
        return [name.replace("_", " ").replace("/", " ") for name in data.classes]

    listing = _from_library("SUN397", {split: [{}]}, names)(root, split)
    paths = [picture for picture in listing.pictures if isinstance(picture, Path)]
    order = sorted(range(len(paths)), key=paths.__getitem__)  # else the disk's order
    return Listing(listing.keys, listing.names, [paths[i] for i in order], [listing.labels[i] for i in order])


def _caltech101(root: Path, split: str) -> Listing:
    keys, pictures, labels = listed_classes(root / "caltech101" / "101_ObjectCategories")
    names = _clip_names("caltech101")  # in the order of the sorted folders, the background class first
    if len(keys) == len(names) - 1 and "BACKGROUND_Google" not in keys:
        names = names[1:]
    if len(keys) != len(names):
        raise RuntimeError(f"{len(keys)} class folders, expected 102 (101 and BACKGROUND_Google)")
    return Listing(keys, names, pictures, labels)


def _imagenet(root: Path, split: str) -> Listing:
    from clip_benchmark.datasets.builder import all_imagenet_wordnet_ids

    keys, pictures, labels = listed_classes(TABLE_7["imagenet"].folder(root, split))
    names = dict(zip(all_imagenet_wordnet_ids, _clip_names("imagenet1k")))
    unknown = [key for key in keys if key not in names]
    if unknown:
        raise RuntimeError(f"folders that are no WordNet ids of ImageNet's 1000 classes: {unknown[:5]}")
    return Listing(keys, [names[key] for key in keys], pictures, labels)


_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_SPLITS = {"test": [{"split": "test"}], "train": [{"split": "train"}]}
_SPLITS_AND_VAL = {"test": [{"split": "test"}], "train": [{"split": "train"}, {"split": "val"}]}

TABLE_7: dict[str, NamedSet] = {
    "cifar10": NamedSet(
        title="CIFAR-10",
        numbers=(10, 50_000, 10_000),
        metric="top_1",
        pictures="cifar-10-batches-py",
        needs=(),
        download="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it",
        read=_cifar("CIFAR10"),
    ),
    "cifar100": NamedSet(
        title="CIFAR-100",
        numbers=(100, 50_000, 10_000),
        metric="top_1",
        pictures="cifar-100-python",
        needs=(),
        download="cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it",
        read=_cifar("CIFAR100"),
    ),
    "dtd": NamedSet(
        title="Describable Textures",
        numbers=(47, 3_760, 1_880),
        metric="top_1",
        pictures="dtd/dtd/images",
        needs=("dtd/dtd/labels",),
        download=f"dtd-r1.0.1.tar.gz from {_OXFORD}/dtd/ and unpack it in the folder dtd",
        read=_from_library("DTD", _SPLITS_AND_VAL, lambda data: _plain(data.classes)),
    ),
    "cars": NamedSet(
        title="Stanford Cars",
        numbers=(196, 8_144, 8_041),
        metric="top_1",
        pictures="stanford_cars/cars_{part}",
        needs=("stanford_cars/devkit/cars_meta.mat", "stanford_cars/cars_test_annos_withlabels.mat"),
        download="cars_test.tgz (or cars_train.tgz), car_devkit.tgz and cars_test_annos_withlabels.mat (their page, "
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html, is gone; copies carry the same names) and unpack them "
        "in the folder stanford_cars",
        read=_from_library("StanfordCars", _SPLITS, lambda data: data.classes),
    ),
    "food101": NamedSet(
        title="Food-101",
        numbers=(101, 75_750, 25_250),
        metric="top_1",
        pictures="food-101/images",
        needs=("food-101/meta",),
        download="http://data.vision.ee.ethz.ch/cvl/food-101.tar.gz and unpack it",
        read=_from_library("Food101", _SPLITS, lambda data: _plain(data.classes)),
    ),
    "pets": NamedSet(
        title="Oxford-IIIT Pets",
        numbers=(37, 3_680, 3_669),
        metric="mean_per_class",
        pictures="oxford-iiit-pet/images",
        needs=("oxford-iiit-pet/annotations",),
        download=f"images.tar.gz and annotations.tar.gz from {_OXFORD}/pets/ and unpack them in the folder "
        "oxford-iiit-pet",
        read=_pets,
    ),
    "flowers": NamedSet(
        title="Oxford Flowers 102",
        numbers=(102, 2_040, 6_149),
        metric="mean_per_class",
        pictures="flowers-102/jpg",
        needs=("flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        download=f"102flowers.tgz, imagelabels.mat and setid.mat from {_OXFORD}/flowers/102/ and put them, the archive "
        "unpacked, in the folder flowers-102",
        read=_from_library("Flowers102", _SPLITS_AND_VAL, lambda data: _clip_names("flowers")),
    ),
    "aircraft": NamedSet(
        title="FGVC Aircraft",
        numbers=(100, 6_667, 3_333),
        metric="mean_per_class",
        pictures="fgvc-aircraft-2013b/data/images",
        needs=("fgvc-aircraft-2013b/data/variants.txt",),
        download=f"fgvc-aircraft-2013b.tar.gz from {_OXFORD}/fgvc-aircraft/ and unpack it",
        read=_from_library(
            "FGVCAircraft", {"test": [{"split": "test"}], "train": [{"split": "trainval"}]}, lambda data: data.classes
        ),
    ),
    "sun397": NamedSet(
        title="SUN397",
        numbers=(397, 19_850, 19_850),
        metric="top_1",
        pictures="SUN397",
        needs=("SUN397/ClassName.txt",),
        download="SUN397.tar.gz and Partitions.zip from https://vision.princeton.edu/projects/2010/SUN/, unpack the "
        "first, and put Testing_01.txt and Training_01.txt of the second in the folder SUN397",
        read=_sun397,
        split_files={
            split: (f"SUN397/{file}", f"SUN397/Partitions/{file}")
            for split, file in (("test", "Testing_01.txt"), ("train", "Training_01.txt"))
        },
        whole=True,
    ),
    "caltech101": NamedSet(
        title="Caltech-101",
        numbers=(102, 3_060, 6_085),
        metric="mean_per_class",
        pictures="caltech101/101_ObjectCategories",
        needs=(),
        download="caltech-101.zip (Caltech 101) from https://data.caltech.edu and unpack it and the "
        "101_ObjectCategories.tar.gz in it in the folder caltech101; its split is yours to give (train.txt and "
        "test.txt in the folder caltech101, or --split-file)",
        read=_caltech101,
        split_files={split: (f"caltech101/{split}.txt",) for split in ("test", "train")},
        whole=True,
    ),
    "imagenet": NamedSet(
        title="ImageNet",
        numbers=(1000, 1_281_167, 50_000),
        metric="top_1",
        pictures="imagenet/{part}|{part}",
        needs=(),
        download="ILSVRC2012_img_val.tar from https://image-net.org (after signing in) and sort its pictures into one "
        "folder for each class, named by WordNet id (n01440764, ...)",
        read=_imagenet,
        parts={"train": "train", "test": "val"},
    ),
}
