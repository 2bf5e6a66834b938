"""What a model is evaluated on: samples of our shards, and pictures with class labels from folders or shards.

Nothing is shuffled, skipped or replaced here: item i is the same sample in every run, and one that cannot be read is an
error, because a score over fewer samples than the data set has is another score.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS, open_undecoded
from pyramidclip_hf.picture_files import PICTURE_SUFFIXES
from training.data.records import BadSample, Sample, sample_from_members
from training.data.shards import ShardReader, is_url, read_dataset_json
from training.data.sources import Manifest, ManifestReader, Unit


def shard_paths(data: str) -> list[str]:
    """The shards that `data` names: a tar, a folder of tars (in the order of their names), or a URL of either.

    Raises FileNotFoundError where there is nothing, saying what is expected there.
    """
    if data.endswith(".tar"):
        if not is_url(data) and not Path(data).is_file():
            raise FileNotFoundError(f"no shard at {data}")
        return [data]
    if is_url(data):
        described = read_dataset_json(data)
        if not described or not described.get("shards"):
            raise FileNotFoundError(f"{data} has no dataset.json that lists shards; name one shard (a URL of a .tar)")
        return [f"{data.rstrip('/')}/{name}" for name in sorted(described["shards"])]
    if not Path(data).is_dir():
        raise FileNotFoundError(
            f"there is no folder {data}. Expected a folder of shards (*.tar, as `python -m training.prepare.pack` "
            "writes them) or, for zero-shot classification, one sub-folder of pictures for each class"
        )
    found = sorted(str(path) for path in Path(data).glob("*.tar"))
    if not found:
        raise FileNotFoundError(f"{data} has no shards (*.tar); `python -m training.prepare.pack` writes them")
    return found


class ShardSamples(Sequence):
    """The samples of shards as a sequence: `len`, and item i as a `records.Sample`, read when asked for.

    data: see `shard_paths`, or a `.jsonl` manifest of loose pictures (`data_sources`). max_samples: only the first so
    many. Reading raises ValueError where a sample has no picture or is damaged, naming it.
    """

    def __init__(self, data: str, max_samples: int | None = None):
        self.name = data
        self._readers = [_manifest(data)] if data.endswith(".jsonl") else list(map(ShardReader, shard_paths(data)))
        self._ends = list(itertools.accumulate(map(len, self._readers)))
        self._length = min(self._ends[-1], max_samples or self._ends[-1])
        if not self._length:
            raise ValueError(f"{data} holds no samples")

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {self.name}, which has {len(self)}")
        shard = bisect.bisect_right(self._ends, index)
        reader = self._readers[shard]
        row = index - (self._ends[shard] - len(reader))
        try:
            key = reader.key(row) if isinstance(reader, ManifestReader) else reader.keys[row]
            return sample_from_members(reader.read(row), key, reader.name)
        except BadSample as error:
            hint = "; a caption without a picture cannot be evaluated" if error.reason == "no-image" else ""
            advice = "Evaluation skips nothing: repair the data or take the sample out"
            raise ValueError(f"{error}{hint}. {advice}") from error

    def __iter__(self) -> Iterator[Sample]:
        return map(self.__getitem__, range(len(self)))


def _manifest(path: str) -> ManifestReader:
    manifest = Manifest(path)
    return ManifestReader(manifest, Unit(path, len(manifest.offsets) - 1, manifest.identity))


def open_picture(data: bytes, name: str, max_image_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The decoded picture; ValueError with its name where the bytes are none of an allowed format, or too many pixels.

    The bytes may be anybody's, as those of the Hub.
    """
    try:
        picture = open_undecoded(data, max_image_pixels)
        picture.load()
        return picture
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture {name} cannot be read: {error}") from error


@dataclass(frozen=True)
class LabelledPictures:
    """Pictures for classification.

    name: the data set, as results call it. class_names: the C names that prompts are made of. labels: one class number
    a picture. read: picture number -> PIL picture. described: fields of `EvalResult` that say which data this is.
    main_metric: the metric that this data set is reported by, and a word on it; None where there is no such custom.
    files: the picture files, in the order of `labels`; empty where pictures have no files of their own, None where they
    lie in shards.
    """

    name: str
    class_names: list[str]
    labels: list[int]
    read: Callable[[int], Image.Image]
    described: Mapping[str, str | None] = field(default_factory=dict)
    main_metric: tuple[str, str] | None = None
    files: Sequence[Path] | None = None

    def __len__(self) -> int:
        return len(self.labels)


def check_class_names(names: Sequence[str], source: str) -> list[str]:
    """The names without outer blanks; ValueError where one is empty, or two are the same up to case."""
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
    """The data as given; ValueError where a class has no picture, unless `max_samples` of the pictures were chosen."""
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


def labelled_folder(folder: str, classes_file: str | None = None, max_samples: int | None = None) -> LabelledPictures:
    """Pictures in one sub-folder for each class (searched at any depth), as torchvision's ImageFolder expects them.

    Class names are the folders' names with "_" read as a blank; `classes_file` gives others: lines `folder<TAB>name`,
    or one name a line in the order of the sorted folders. `max_samples`: so many, spread evenly over the pictures.

    Raises FileNotFoundError and ValueError that say what is missing and where it is expected.
    """
    root = Path(folder)
    folders = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{folder}: expected one sub-folder of pictures for each class, found none")
    if set(folders) <= {"train", "training", "val", "valid", "validation", "test"}:
        raise ValueError(
            f"{folder}: its folders {folders} are splits, not classes; name one, e.g. {root / folders[-1]}"
        )
    files = [
        (path, label)
        for label, name in enumerate(folders)
        for path in sorted(root.joinpath(name).rglob("*"))
        if path.suffix.lower() in PICTURE_SUFFIXES
    ]
    names = [name.replace("_", " ") for name in folders]
    if classes_file:
        names = names_from_file(classes_file, folders)
    if max_samples:
        files = [files[number] for number in spread_evenly(len(files), max_samples)]
    data = LabelledPictures(
        name=root.resolve().name,
        class_names=check_class_names(names, classes_file or folder),
        labels=[label for _, label in files],
        read=lambda number: open_picture(files[number][0].read_bytes(), str(files[number][0])),
        files=[path for path, _ in files],
    )
    return check_every_class_has_pictures(data, max_samples)


def names_from_file(classes_file: str, folders: list[str]) -> list[str]:
    """The class names of a file, in the order of `folders`: lines `folder<TAB>name`, or one name for each in order.

    Raises FileNotFoundError, and ValueError where the lines do not fit the folders.
    """
    if not Path(classes_file).is_file():
        raise FileNotFoundError(f"there is no class file {classes_file}; expected one name a line, or folder<TAB>name")
    lines = Path(classes_file).read_text(encoding="utf-8").splitlines()
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


def labelled_shards(data: str, classes_file: str | None = None, max_samples: int | None = None) -> LabelledPictures:
    """Pictures of shards whose `KEY.json` has `class_name`, as the split "objects" of the emoji scenes.

    Class names: `classes` of `dataset.json`, else the names met, sorted. `classes_file` gives others, in lines
    `class_name<TAB>name`, or lists the `class_name`s, one a line. `max_samples`: so many, spread evenly.
    Raises ValueError for a sample without a class, or with one that is not among the names.
    """
    samples = ShardSamples(data)
    chosen = spread_evenly(len(samples), max_samples or len(samples))
    found = [samples[number].extra.get("class_name") for number in chosen]
    if None in found:
        key = samples[chosen[found.index(None)]].key
        raise ValueError(f"{data}: sample {key!r} has no class_name in its .json; zero-shot classification needs one")
    listed = None if data.endswith((".tar", ".jsonl")) else (read_dataset_json(data) or {}).get("classes")
    names = classes = listed or sorted(set(found))
    if classes_file:
        lines = Path(classes_file).read_text(encoding="utf-8").splitlines()
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
        read=lambda number: open_picture(samples[chosen[number]].image, samples[chosen[number]].key),
    )
    return check_every_class_has_pictures(pictures, max_samples)
