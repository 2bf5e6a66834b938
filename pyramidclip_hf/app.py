# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the page of `pyramidclip app` answers: classes, heat maps, regions, hits; nothing of a web library.

What is wrong with a question is a `ValueError` whose sentence is shown to whoever asked.
"""

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .embedding_files import read_metadata
from .embedding_search import best_hits, check_made_by
from .explain import Explanation, draw_regions, explain_image, explain_regions
from .files import read_regular, reason_of
from .image_processing_pyramidclip import PICTURE_FORMATS, PictureTooLarge
from .loading import Loaded
from .modeling_pyramidclip import PyramidCLIPModel
from .picture_files import Hit, UnreadablePicture, read_picture
from .zero_shot import (
    IMAGENET_TEMPLATES,
    Prediction,
    class_embeddings,
    classify_embeddings,
    image_embeddings,
    text_embeddings,
)

MAX_LABELS = 1000
# Of a label or a query. The model reads 75 tokens, which is about 300.
MAX_CHARACTERS = 500
MAX_HITS = 60
MAX_REGIONS = 100
# Bytes of a file of regions: a hundred of them with 2048 features take 0.8 MB.
_MAX_REGION_BYTES = 8 << 20
# Longer side of the pictures that are sent to the page.
_SHOWN_SIDE, _THUMBNAIL_SIDE = 1024, 320
# Labels that are embedded between two reports of progress, and sets of them that are remembered.
_LABELS_AT_A_TIME = 16
_SETS_REMEMBERED = 8

Progress = Callable[[float], None]


def quiet(share: float) -> None:
    """Progress that nobody looks at."""


class Regions(NamedTuple):
    """Regions of a picture.

    Attributes:
        boxes: (K, 4) float32, x1, y1, x2, y2 over the width and height of the upright picture.
        names: K phrases.
        features: (K, F) float32.
    """

    boxes: np.ndarray
    names: list[str]
    features: np.ndarray


class Why(NamedTuple):
    """What speaks for a text.

    Attributes:
        overlay: the picture with the heat over it, or with a frame a region.
        score: the cosine that is explained.
        parts: (phrase, by how much the score falls without it) of the regions, most relevant first.
    """

    overlay: Image.Image
    score: float
    parts: list[tuple[str, float]]


def labels_of(text: str) -> list[str]:
    """The labels that stand one a line; blank lines at the end, and spaces around, do not count.

    Raises:
        ValueError: none, an empty one between others, one twice, too many, or one that is too long.
    """
    lines = [" ".join(line.split()) for line in text.strip().splitlines()]
    if not lines:
        raise ValueError("There are no labels yet: write at least one, each on a line of its own.")
    if len(lines) > MAX_LABELS:
        raise ValueError(f"These are {len(lines):,} labels, and the page takes {MAX_LABELS:,}. Leave some out.")
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line:
            raise ValueError(f"Line {number} of the labels is empty. Write a label there, or delete the line.")
        checked_text(line, f"The label on line {number}")
        if line in seen:
            raise ValueError(f"The label “{line}” stands on lines {seen[line]} and {number}. Once is enough.")
        seen[line] = number
    return lines


def checked_text(text: str | None, what: str = "The text") -> str:
    """A text of at most `MAX_CHARACTERS`, with single spaces between its words.

    Raises:
        ValueError: it is empty or longer; begins with `what`.
    """
    words = " ".join((text or "").split())
    if not words:
        raise ValueError(f"{what} is empty: write a word or two.")
    if len(words) > MAX_CHARACTERS:
        raise ValueError(
            f"{what} has {len(words):,} characters, and the page takes {MAX_CHARACTERS}. The model reads about the "
            "first 300 of them anyway."
        )
    return words


def open_picture(path: str | None, max_image_pixels: int) -> Image.Image:
    """The upright RGB picture of a file that somebody gave.

    Raises:
        ValueError: none was given, or it cannot be read.
    """
    if not path:
        raise ValueError("There is no picture yet: choose one, paste one, or take one of the examples.")
    try:
        return read_picture(path, max_image_pixels)
    except UnreadablePicture as error:
        raise ValueError(_why_not(error, max_image_pixels)) from error


def _why_not(error: UnreadablePicture, max_image_pixels: int) -> str:
    """What to say of a picture that cannot be read, without the name that it has on this machine."""
    if isinstance(error.__cause__, UnidentifiedImageError):
        return f"This is no picture, or of a kind that is not read here. What is read: {', '.join(PICTURE_FORMATS)}."
    if isinstance(error.__cause__, PictureTooLarge):
        return (
            f"This picture is too large: at most {max_image_pixels / 1e6:g} million pixels are taken here. Make it "
            "smaller, and choose it again."
        )
    return f"This picture is damaged: {str(error).rstrip('.')}."


def read_regions(description: str, features: str) -> Regions:
    """The regions of a picture, from files in the form that shards hold them in (docs/data.md).

    Args:
        description: KEY.json, with `regions`: a list of `{box, label, attributes}`.
        features: KEY.roi.npy, (K, F) float16 or float32.

    Raises:
        ValueError: one of them is something else, or they do not fit each other.
    """
    try:
        content = json.loads(read_regular(description, _MAX_REGION_BYTES))
        listed = content.get("regions") if isinstance(content, dict) else None
        if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_REGIONS:
            raise ValueError(f'expected 1 to {MAX_REGIONS} entries in "regions"')
        boxes = np.asarray([region["box"] for region in listed], np.float32)
        names = [
            checked_text(" ".join([*map(str, one.get("attributes") or []), str(one.get("label") or "thing")]))
            for one in listed
        ]
        array = np.load(BytesIO(read_regular(features, _MAX_REGION_BYTES)), allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind != "f" or len(array) != len(listed) or boxes.shape != (len(listed), 4):
            raise ValueError(f"{len(listed)} regions with boxes {boxes.shape} and features {array.shape}")
    except Exception as error:  # of a damaged head of numbers, NumPy raises what Python's tokenizer does
        raise ValueError(
            "The regions cannot be read. Expected NAME.json with their boxes and NAME.roi.npy with their features, as "
            f"shards hold them ({reason_of(error)[:200]})."
        ) from error
    return Regions(boxes, names, array.astype(np.float32))


@dataclass
class Examples:
    """Pictures to begin with, and the regions of those that have some, by what the picture's file holds."""

    paths: list[str]
    regions: dict[str, Regions]

    @classmethod
    def of(cls, paths: Sequence[str]) -> "Examples":
        """Examples with the regions that lie beside them: NAME.json and NAME.roi.npy beside NAME.jpg.

        Raises:
            ValueError: such files that do not fit each other.
        """
        regions = {}
        for path in map(Path, paths):
            description, features = path.with_suffix(".json"), path.with_suffix(".roi.npy")
            if description.is_file() and features.is_file():
                regions[_content(path)] = read_regions(str(description), str(features))
        return cls([str(path) for path in paths], regions)

    def regions_of(self, path: str | None) -> Regions | None:
        """The regions of a picture that is one of the examples, under whatever name it comes back."""
        return self.regions.get(_content(path)) if path and self.regions else None


def _content(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TriedModel:
    """A model that people ask, one question at a time: explaining changes it for a moment.

    Attributes:
        loaded: the model, not fused.
        title: its name on the page.
        embeddings: the file that it searches; None: it cannot search.
        kind: what that file holds, "path" or "text".
    """

    def __init__(self, loaded: Loaded[PyramidCLIPModel], title: str):
        self.loaded, self.title = loaded, title
        self.embeddings: str | None = None
        self.kind, self.rows = "path", 0
        self._lock = threading.Lock()
        self._classes: OrderedDict[tuple[Any, ...], torch.Tensor] = OrderedDict()

    def take_embeddings(self, path: str) -> None:
        """Searches `path` from now on.

        Raises:
            ValueError: another model made it, or it is no file of embeddings.
        """
        metadata = read_metadata(path)
        check_made_by(metadata, self.loaded, path)
        self.embeddings, self.kind, self.rows = path, metadata["kind"], metadata["rows"]

    def classify(
        self, picture: Image.Image, labels: Sequence[str], with_templates: bool, progress: Progress = quiet
    ) -> list[Prediction]:
        """All labels, most probable first.

        Args:
            picture: RGB.
            labels: what `labels_of` gives.
            with_templates: each label in CLIP's 80 sentences, not alone.
            progress: told the share that is done.
        """
        with self._lock:
            classes = self._class_embeddings(tuple(labels), with_templates, progress)
            embeds = image_embeddings(self.loaded.model, self.loaded.processor, [picture])
            return classify_embeddings(self.loaded.model, embeds, labels, classes)[0]

    def _class_embeddings(self, labels: tuple[str, ...], with_templates: bool, progress: Progress) -> torch.Tensor:
        """(C, D), remembered: the next picture often comes with the same labels."""
        key = (labels, with_templates)
        if key not in self._classes:
            templates = IMAGENET_TEMPLATES if with_templates else ("{}",)
            parts = []
            for start in range(0, len(labels), _LABELS_AT_A_TIME):
                progress(start / len(labels))
                some = labels[start : start + _LABELS_AT_A_TIME]
                parts.append(class_embeddings(self.loaded.model, self.loaded.processor, some, templates))
            self._classes[key] = torch.cat(parts)
            if len(self._classes) > _SETS_REMEMBERED:
                self._classes.popitem(last=False)
        self._classes.move_to_end(key)
        return self._classes[key]

    def explain(self, picture: Image.Image, text: str) -> Why:
        """The heat over a picture of at most 1024 pixels a side, see `explain_image`."""
        with self._lock:
            found = explain_image(self.loaded.model, self.loaded.processor, picture, text)
        small = ImageOps.contain(picture, (_SHOWN_SIDE, _SHOWN_SIDE)) if max(picture.size) > _SHOWN_SIDE else picture
        heat = np.asarray(Image.fromarray(found.heat).resize(small.size, Image.Resampling.BILINEAR))
        shown = Explanation(np.clip(heat, 0, 1), found.score, found.method)
        return Why(shown.overlay(small), found.score, [])

    def explain_regions(self, picture: Image.Image, regions: Regions, text: str) -> Why:
        """The regions framed, the more relevant the thicker, see `explain_regions`.

        Raises:
            ValueError: features of another width than the model's.
        """
        width = self.loaded.model.config.vision_config.roi_feature_size
        if regions.features.shape[1] != width:
            raise ValueError(
                f"These regions have {regions.features.shape[1]} features each, and {self.title} reads {width}: they "
                "come from another detector than the one that it was trained with."
            )
        rows = (regions.features, regions.boxes)
        inputs = self.loaded.processor(regions=[rows], return_tensors="pt")
        with self._lock:
            found = explain_regions(self.loaded.model, self.loaded.processor, inputs["roi_features"], text)
        size = _SHOWN_SIDE if max(picture.size) > _SHOWN_SIDE else 2 * _THUMBNAIL_SIDE
        drawn = draw_regions(ImageOps.contain(picture, (size, size)), regions.boxes, found.relevance, regions.names)
        order = np.argsort(-found.relevance, kind="stable").tolist()
        return Why(drawn, found.score, [(regions.names[place], float(found.relevance[place])) for place in order])

    def search(self, query: str | Image.Image, top_k: int) -> list[Hit]:
        """The best rows of the model's file of embeddings for a text or a picture.

        Raises:
            ValueError: the model has no such file.
        """
        if self.embeddings is None:
            raise ValueError(
                f"{self.title} has nothing to search in: start the page with --embeddings and a file that `pyramidclip "
                "embed` wrote with this model."
            )
        model, processor = self.loaded.model, self.loaded.processor
        with self._lock:
            if isinstance(query, str):
                embeds = text_embeddings(model, processor, [query])
            else:
                embeds = image_embeddings(model, processor, [query])
            return best_hits(self.embeddings, self.kind, embeds, max(1, min(int(top_k), MAX_HITS)))[0]


def wall(
    hits: Sequence[Hit], max_image_pixels: int, progress: Progress = quiet
) -> tuple[list[tuple[Image.Image, str]], int]:
    """The hits as thumbnails with their captions, and how many of them are placeholders of what cannot be read."""
    entries, absent = [], 0
    for number, hit in enumerate(hits):
        progress(number / len(hits))
        try:
            picture = ImageOps.contain(read_picture(hit.name, max_image_pixels), (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
        except UnreadablePicture:
            picture = Image.new("RGB", (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), (128, 132, 140))
            absent += 1
        entries.append((picture, f"{hit.rank}. {hit.score:.3f} {Path(hit.name).name}"))
    return entries, absent


def distribute_embeddings(models: Sequence[TriedModel], paths: Sequence[str]) -> None:
    """Gives each file of embeddings to the model that made it.

    Raises:
        ValueError: a file that none of them made, or a second one of the same model.
    """
    for path in paths:
        hashes = [model.loaded.sha256() for model in models]
        made_by = read_metadata(path)["model_sha256"]
        model = models[hashes.index(made_by)] if made_by in hashes else models[0]
        if made_by in hashes and model.embeddings is not None:
            raise ValueError(f"--embeddings {path}: {model.title} has {model.embeddings} already; one file a model.")
        model.take_embeddings(path)


def titles_of(names: Sequence[str]) -> list[str]:
    """What models are called on the page: the last part of a path or id that says something, told apart if alike."""
    parts = [[part for part in Path(name).parts if part not in ("final", ".", "/")] or [name] for name in names]
    titles = [one[-1] for one in parts]
    if len(set(titles)) < len(titles):
        titles = ["/".join(one[-2:]) for one in parts]
    if len(set(titles)) < len(titles):
        titles = [f"{title} ({number})" for number, title in enumerate(titles, start=1)]
    return titles
