"""Pictures with several captions, for retrieval: Flickr30K, MS-COCO (paper, section 4.3), or files in their formats.

Three annotation formats are read: Karpathy's (`dataset_flickr30k.json`, `dataset_coco.json`), COCO's own
(`captions_val2017.json`, and clip-benchmark's `coco_test_karpathy.json`), and clip-benchmark's text
(`flickr30k_test_karpathy.txt`: a header, then `picture,caption` a line). Every caption counts; nothing is skipped.
"""

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidclip_hf.files import parse_json, read_utf8
from training.data.records import Sample
from training.data.samples import Samples

FORMATS = "Karpathy's JSON (dataset_*.json), COCO's captions JSON, or text with a header and one picture,caption a line"


class CaptionedPictures(Samples):
    """Picture files with captions.

    Args:
        name: the data set, as results call it.
        captions: picture path -> its captions, in order.
        described: see `Samples`.
    """

    def __init__(self, name: str, captions: Mapping[Path, list[str]], described: Mapping[str, str | None]):
        self.name, self.described = name, described
        self._items = list(captions.items())

    def __len__(self) -> int:
        return len(self._items)

    def read(self, number: int) -> Sample:
        """One picture with its captions; OSError where the file is gone."""
        path, captions = self._items[number]
        return Sample(
            key=path.name,
            image=path.read_bytes(),
            image_suffix=path.suffix.lower().lstrip("."),
            caption=captions[0] if captions else None,
            captions=captions if len(captions) > 1 else None,
        )


def captioned_folder(
    captions_file: str, folder: str, split: str | None = None, max_samples: int | None = None
) -> CaptionedPictures:
    """The pictures of `folder` that an annotation file names, with their captions.

    Args:
        captions_file: see the module.
        folder: of the pictures.
        split: which split of a Karpathy file (default: test); the other formats have none.
        max_samples: the first so many pictures.

    Raises:
        FileNotFoundError: the file or pictures are missing (captions without pictures).
        ValueError: the file is of another format or has no captions.
    """
    found = read_captions(captions_file, split or "test")
    paths = _picture_paths(list(found), [Path(folder)], captions_file)
    chosen = dict(zip(paths, list(found.values())[:max_samples]))
    return CaptionedPictures(Path(captions_file).stem, chosen, {"dataset_split": split})


def read_captions(captions_file: str, split: str = "test") -> dict[str, list[str]]:
    """The captions of an annotation file.

    Args:
        captions_file: see the module.
        split: of a Karpathy file.

    Returns:
        Picture path, as the file gives it -> captions, in the file's order.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another format, no such split, no captions, or one without words.
    """
    if not Path(captions_file).is_file():
        raise FileNotFoundError(f"there is no captions file {captions_file}; expected {FORMATS}")
    text = read_utf8(captions_file)
    if text.lstrip().startswith("{") and not captions_file.endswith(".json"):
        raise ValueError(
            f"{captions_file} holds JSON, one object a line: as a manifest it is --data {captions_file}, without "
            f"--captions, which takes {FORMATS}"
        )
    if captions_file.endswith(".json"):
        try:
            content = parse_json(text)
            images = content["images"]
            if "annotations" in content:
                captions = _coco(images, content["annotations"], captions_file)
            else:
                captions = _karpathy(images, split, captions_file)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{captions_file}: expected {FORMATS} ({error!r})") from error
    else:
        captions = _lines(text.splitlines(), captions_file)
    blank = [picture for picture, texts in captions.items() if not all(one.strip() for one in texts)]
    if blank:
        raise ValueError(f"{captions_file}: {blank[0]} has a caption without words")
    if not any(captions.values()):
        raise ValueError(f"{captions_file} has no captions, so nothing can be retrieved by text")
    return captions


def _karpathy(images: list[dict[str, Any]], split: str, where: str) -> dict[str, list[str]]:
    chosen = [one for one in images if one["split"] == split]
    if not chosen:
        there = ", ".join(f"{name} ({count:,} pictures)" for name, count in Counter(i["split"] for i in images).items())
        raise ValueError(f"{where} has no split {split!r}; it has {there or 'no pictures'}")
    found: dict[str, list[str]] = {}
    for one in chosen:
        picture = "/".join(part for part in (one.get("filepath"), one["filename"]) if part)
        if picture in found:
            raise ValueError(f"{where}: {picture} is named twice; every picture counts once")
        found[picture] = [sentence["raw"] for sentence in one["sentences"]]
    return found


def _coco(images: list[dict[str, Any]], annotations: list[dict[str, Any]], where: str) -> dict[str, list[str]]:
    names = {one["id"]: one["file_name"] for one in images}
    found: dict[str, list[str]] = {name: [] for name in names.values()}
    lost = [one["image_id"] for one in annotations if one["image_id"] not in names]
    if lost:
        raise ValueError(
            f"{where}: {len(lost)} captions belong to no picture of the file, first image_id {lost[0]}; captions "
            "without pictures cannot be evaluated"
        )
    for one in annotations:
        found[names[one["image_id"]]].append(one["caption"])
    return found


def _lines(lines: list[str], where: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines[1:], 2):
        picture, comma, caption = line.strip().partition(",")  # captions have commas of their own, unquoted
        if picture and not comma:
            raise ValueError(f"{where}:{number}: expected picture,caption, got {line.strip()[:60]!r}")
        if picture:
            # The lists of clip-benchmark, which are no .csv, are taken as it takes them.
            is_table = where.lower().endswith(".csv")
            found.setdefault(picture, []).append(_unquoted(caption.strip()) if is_table else caption.strip())
    return found


def _unquoted(caption: str) -> str:
    """A caption without the quotes that programs for tables put around one with commas; one that has its own stays."""
    try:
        fields = next(csv.reader([caption], strict=True)) if caption.startswith('"') else []
    except csv.Error:
        return caption
    return fields[0] if len(fields) == 1 else caption


def _picture_paths(names: list[str], folders: list[Path], where: str) -> list[Path]:
    """Where each picture is: under the first of `folders` that has it, with or without the folder in its name."""
    found: list[Path] = []
    missing: list[str] = []
    for name in names:
        places = (folder / one for folder in folders for one in (name, Path(name).name))
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            missing.append(name)
        else:
            found.append(path)
    if missing:
        raise FileNotFoundError(
            f"{where}: {len(missing)} of {len(names)} pictures with captions are not in "
            f"{' or '.join(map(str, folders))}, first {missing[0]}. Captions without pictures cannot be evaluated: "
            "complete the folder, or take their captions out"
        )
    if len(set(found)) < len(found):
        raise ValueError(f"{where}: two of its names lead to the picture {Counter(found).most_common(1)[0][0]}")
    return found


@dataclass(frozen=True)
class NamedCaptions:
    """A retrieval data set of section 4.3 of the paper.

    Attributes:
        title: as results call it.
        pictures: how many its usual test split has.
        files: annotations, looked for in this order under the data root; `{split}` stands for the split.
        folders: where pictures are looked for under the data root.
        download: what to fetch, and from where.
    """

    title: str
    pictures: int
    files: tuple[str, ...]
    folders: tuple[str, ...]
    download: str


_KARPATHY = "https://cs.stanford.edu/people/karpathy/deepimagesent/"
CAPTION_SETS = {
    "flickr30k": NamedCaptions(
        title="Flickr30K",
        pictures=1000,
        files=("flickr30k/dataset_flickr30k.json", "flickr30k/flickr30k_{split}_karpathy.txt"),
        folders=("flickr30k/flickr30k-images", "flickr30k/images", "flickr30k"),
        download="the pictures (https://shannon.cs.illinois.edu/DenotationGraph/, on request) to "
        f"flickr30k/flickr30k-images, and dataset_flickr30k.json ({_KARPATHY}) to flickr30k",
    ),
    "mscoco": NamedCaptions(
        title="MS-COCO",
        pictures=5000,
        files=("coco/dataset_coco.json", "coco/coco_{split}_karpathy.json"),
        folders=("coco", "coco/val2014", "coco/images"),
        download=f"val2014.zip (https://cocodataset.org) to coco/val2014, and dataset_coco.json ({_KARPATHY}) to coco",
    ),
}


def open_captions(name: str, root: str, split: str | None = None, max_samples: int | None = None) -> CaptionedPictures:
    """A data set of `CAPTION_SETS` from the folder that holds it.

    What is read counts as the test split only where it has as many pictures; otherwise the name says what was found.

    Args:
        name: a key of `CAPTION_SETS`.
        root: the folder.
        split: Karpathy's; default test.
        max_samples: the first so many pictures.

    Raises:
        FileNotFoundError: data is missing; the message says what to download and where to put it.
        ValueError: see `captioned_folder`, and an unknown name.
    """
    if name not in CAPTION_SETS:
        raise ValueError(f"there is no retrieval data set {name!r}; there are {', '.join(CAPTION_SETS)}")
    spec, split = CAPTION_SETS[name], split or "test"
    files = [one.format(split=split) for one in spec.files]
    file = next((Path(root, one) for one in files if Path(root, one).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{root} lacks {spec.title}: no {' or '.join(files)}. Download {spec.download}")
    found = read_captions(str(file), split)
    folders = [path for one in spec.folders if (path := Path(root, one)).is_dir()]
    paths = _picture_paths(list(found), folders, str(file))
    chosen = dict(zip(paths, list(found.values())[:max_samples]))
    title = spec.title
    if split != "test":
        title += f" ({split} split)"
    elif len(chosen) != spec.pictures:
        title += f" (not the test split of {spec.pictures:,} pictures: found {len(chosen):,})"
    return CaptionedPictures(title, chosen, {"dataset_type": name, "dataset_split": split})
