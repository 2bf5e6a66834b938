# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""What the subcommands of `pyramidclip` do with the arguments that `pyramidclip_command` parsed.

Results go to stdout, tab-separated or with `--json` one object a line; everything else goes to stderr.
"""

import argparse
import hashlib
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from PIL import Image

from pyramidclip_command import EXIT_SKIPPED, Failure

from .app_page import run_app
from .backends import ExportedModel, load_exported
from .embedding_files import EmbeddingJob, check_output, read_metadata
from .embedding_search import best_hits, check_made_by
from .explain import explain_image
from .export import compare_on_data, export_model, read_pairs
from .files import json_text, write_text
from .fusion_pyramidclip import LinearBackend, OneDNNLinear
from .handing_out import Advance, Phase
from .hits_page import hits_page
from .loading import Loaded, choose_device, load_model, warn_of_slow_type
from .modeling_pyramidclip import PyramidCLIPModel
from .picture_files import (
    PICTURE_SUFFIXES,
    Hit,
    UnreadablePicture,
    characters_that_lack,
    check_font,
    check_picture_output,
    contact_sheet,
    find_pictures,
    pictures_of_classes,
    read_ahead,
    read_picture,
    save_picture,
    told_passed_over,
    unseen_file,
)
from .processing_pyramidclip import PyramidCLIPProcessor
from .ray_engine import RayOptions, run_on_ray
from .zero_shot import (
    IMAGENET_TEMPLATES,
    class_embeddings,
    classify_embeddings,
    embeddings_ahead,
    image_embeddings,
    text_embeddings,
)

# What decides the pixels; the rest is on always.
_PROCESSOR_SETTINGS = ("size", "crop_size", "resample", "image_mean", "image_std")
# Of `search --output`, beside those of pictures.
_PAGE_SUFFIXES = (".html", ".htm")
# A bar for fewer prompts would be gone before it is read.
_PROMPTS_WORTH_A_BAR = 1000

# How many are looked at to see what numbers pass through a tower.
_CALIBRATION_PICTURES = 128
_CALIBRATION_TEXTS = 256
_CALIBRATED_ON = "pictures: files, folders with all below them, or globs in quotes"

# A picture's path, and its `pixel_values` (3, H, W) or why it has none.
Reading = tuple[str, torch.Tensor | UnreadablePicture]


def _pixels_ahead(
    paths: Iterable[str], processor: PyramidCLIPProcessor, args: argparse.Namespace
) -> Generator[Reading, None, None]:
    """`read_ahead` with `pixel_values` (3, H, W), at least one batch in front of the model."""

    def read(path: str) -> torch.Tensor:
        picture = read_picture(path, args.max_image_pixels)
        try:
            return processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        except (ValueError, MemoryError) as error:
            raise UnreadablePicture(f"cannot be prepared: {error}") from error

    return read_ahead(paths, read, args.workers, 2 * max(args.batch_size, args.workers))


# What the user sees


class _Messages:
    """Results on stdout and all else on stderr, without breaking the progress bar; counts the skipped pictures."""

    def __init__(self, args: argparse.Namespace):
        self.quiet: bool = args.quiet
        self.json: bool = args.json
        self.skipped = 0
        self._bar: tqdm | None = None

    def row(self, row: dict[str, Any], columns: Sequence[Any]) -> None:
        """One result: with `--json` as an object, else its columns between tabs."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.clear()
        print(json_text(row, ensure_ascii=False) if self.json else "\t".join(map(str, columns)), flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What `--quiet` leaves out."""
        if not self.quiet:
            self.say(text)

    def skip(self, item: str, reason: object) -> None:
        self.skipped += 1
        self.say(f"skipped {_printable(item)}: {reason}")

    def exit_code(self, of: int) -> int:
        """Says how many of `of` were skipped."""
        if self.skipped:
            self.say(f"{self.skipped} of {of} were skipped")
        return EXIT_SKIPPED if self.skipped else 0

    def bar(self, total: int, unit: str, initial: int = 0) -> tqdm:
        """A progress bar with rate and time left; in a log, a line every ten seconds."""
        interval = 0.1 if sys.stderr.isatty() else 10
        self._bar = tqdm(
            total=total, unit=unit, initial=initial, disable=self.quiet, mininterval=interval, file=sys.stderr
        )
        return self._bar


def _printable(path: str) -> str:
    """A path that need not be UTF-8."""
    return os.fsencode(path).decode(errors="replace")


def _lines_of(path: str, what: str) -> list[str]:
    """The lines of a UTF-8 file; ValueError where it is empty or has a blank one."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected {what} as UTF-8 text, one a line ({error}).") from error
    blank = [number for number, line in enumerate(lines, start=1) if not line]
    if blank or not lines:
        raise ValueError(
            f"{path}: expected {what}, one a line; {f'line {blank[0]} is blank' if blank else 'it is empty'}."
        )
    return lines


def _templates_of(path: str) -> list[str]:
    """The prompts of a file, one a line; ValueError where one has no place, or several, for the label."""
    templates = _lines_of(path, "prompts")
    for number, template in enumerate(templates, start=1):
        if template.count("{}") != 1:
            raise ValueError(
                f"{path}, line {number}: expected a prompt with {{}} once, where the label goes, got {template!r}."
            )
    return templates


# The model


def _load(args: argparse.Namespace, messages: _Messages, fuse: bool = True) -> Loaded[Any]:
    """The model and processor that the arguments name, see `load_model` and `load_exported`."""
    backend: Literal["torch", "onnx", "openvino"] = getattr(args, "backend", "torch")
    if backend != "torch":
        if args.device not in ("auto", "cpu"):
            raise ValueError(f"--device {args.device}: --backend {backend} computes on the processor; leave it out.")
        return load_exported(args.model, backend=backend, dtype=args.dtype, revision=args.revision)
    if args.dtype == "int8":
        raise ValueError("--dtype int8 needs --backend onnx or openvino and a model that `pyramidclip export` made.")
    device = choose_device(args.device)
    warn_of_slow_type("--dtype", args.dtype, device, messages.note)
    return load_model(args.model, revision=args.revision, device=device, dtype=args.dtype, fuse=fuse)


# classify


def run_classify(args: argparse.Namespace) -> int:
    """Prints the `--top-k` labels of each picture, batch by batch."""
    messages = _Messages(args)
    labels = _lines_of(args.labels_file, "labels") if args.labels_file else args.labels
    if not args.labels_file and len(labels) == 1 and "," in labels[0]:
        raise ValueError(
            f"--labels: got one label, {labels[0]!r}, which is always the likeliest; labels stand apart: "
            f"--labels {' '.join(shlex.quote(one.strip()) for one in labels[0].split(',') if one.strip())}"
        )
    templates = _templates_of(args.templates) if args.templates else IMAGENET_TEMPLATES
    paths = _found(args.pictures, sys.stdin, messages)

    loaded = _load(args, messages)
    bar_for_labels = not args.quiet and len(labels) * len(templates) > _PROMPTS_WORTH_A_BAR
    class_embeds = class_embeddings(loaded.model, loaded.processor, labels, templates, progress=bar_for_labels)

    with closing(_pixels_ahead(paths, loaded.processor, args)) as readings, messages.bar(len(paths), "picture") as bar:
        batches = _batches(readings, [(0, len(paths))], args.batch_size, messages, bar)
        for batch, embeds in embeddings_ahead(loaded.model, batches):
            found = classify_embeddings(loaded.model, embeds, labels, class_embeds, args.top_k)
            for path, predictions in zip(batch.names, found, strict=True):
                rounded = [{"label": one.name, "probability": round(one.probability, 6)} for one in predictions]
                columns = [path] + [cell for one in predictions for cell in (one.name, f"{one.probability:.4f}")]
                messages.row({"path": path, "predictions": rounded}, columns)
    return messages.exit_code(of=len(paths))


class _Batch(NamedTuple):
    """Pictures that are encoded together.

    Attributes:
        part: number of the part that they belong to.
        names: of those that could be read.
        skipped: (name, reason) of those before them that could not.
        ends: whether it is the last of its part.
    """

    part: int
    names: list[str]
    skipped: list[tuple[str, str]]
    ends: bool


def _batches(
    readings: Iterator[Reading], parts: Iterable[tuple[int, int]], batch_size: int, messages: _Messages, bar: tqdm
) -> Iterator[tuple[_Batch, torch.Tensor]]:
    """Batches with their pixels (n, 3, H, W), of `parts` (number, how many readings).

    A batch ends with its part: the company in which a picture is encoded decides its last bits. The last one of a part
    may be empty.
    """
    for number, count in parts:
        names: list[str] = []
        pixels: list[torch.Tensor] = []
        skipped: list[tuple[str, str]] = []
        for place, (name, reading) in enumerate(islice(readings, count), start=1):
            if isinstance(reading, UnreadablePicture):
                messages.skip(name, reading)
                skipped.append((name, str(reading)))
            else:
                names.append(name)
                pixels.append(reading)
            bar.update()
            if len(names) == batch_size or place == count:
                stacked = torch.stack(pixels) if pixels else torch.empty(0)
                yield _Batch(number, names, skipped, place == count), stacked
                names, pixels, skipped = [], [], []


def _found(pictures: Sequence[str], stdin: Iterable[str], messages: _Messages) -> list[str]:
    """The pictures that the words name; says what was passed over."""
    passed_over: Counter[str] = Counter()
    paths = find_pictures(pictures, stdin, passed_over, shards=True)
    if told := told_passed_over(passed_over):
        messages.say(told)
    return paths


# embed


def run_embed(args: argparse.Namespace) -> int:
    """Embeds pictures, or the lines of `--texts`, into one file; continues where the same command was stopped."""
    messages = _Messages(args)
    output = check_output(args.output)
    items, inputs = _items_to_embed(args, messages)
    loaded = _load(args, messages, fuse=False)
    kind = "text" if args.texts else "path"
    settings = {"kind": kind, "model_sha256": loaded.sha256(), "dtype": args.dtype, "inputs": inputs}
    if not args.texts:
        processor = loaded.processor.image_processor.to_dict()
        settings["image_processor"] = {name: processor[name] for name in _PROCESSOR_SETTINGS}
        settings["max_image_pixels"] = args.max_image_pixels
    if isinstance(loaded.model, ExportedModel):
        settings["engine"] = loaded.model.engine._asdict()
    job = EmbeddingJob(output, loaded.name, settings, items, args.part_size, args.overwrite)
    _say_where_it_stands(job, items, messages)
    if not job.complete and isinstance(loaded.model, PyramidCLIPModel):
        _fuse_as_before(job, loaded.model)
    if args.engine == "ray":
        _embed_on_ray(job, settings, args, messages)
    else:
        (_embed_texts if args.texts else _embed_pictures)(job, loaded, args, messages, job.missing())
    rows, skipped = job.finish()
    messages.note(f"{output}: {rows} embeddings")
    if args.json:
        listed = [{"path": _printable(path), "reason": reason} for path, reason in skipped]
        messages.row({"output": str(output), "rows": rows, "skipped": listed}, ())
    return messages.exit_code(of=rows + messages.skipped)


def _items_to_embed(args: argparse.Namespace, messages: _Messages) -> tuple[list[str], list[str]]:
    """What is to be embedded, and how the command named it: with the content, where that is not a place."""
    if args.texts and args.pictures:
        raise ValueError("Expected pictures or --texts, got both: one file of embeddings holds one kind.")
    if args.texts:
        lines = _lines_of(args.texts, "texts")
        return lines, [f"texts with sha256 {_sha256_of(lines)}"]
    if not args.pictures:
        raise ValueError("Expected pictures (files, folders, globs, or - for paths on stdin) or --texts FILE.")
    piped = list(sys.stdin) if "-" in args.pictures else []
    inputs = [f"- with sha256 {_sha256_of(piped)}" if one == "-" else one for one in args.pictures]
    return _found(args.pictures, piped, messages), inputs


def _sha256_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _say_where_it_stands(job: EmbeddingJob, items: list[str], messages: _Messages) -> None:
    """Names again what earlier runs of this job skipped, so that the run that finishes has named all."""
    if job.complete:
        messages.note(f"{job.output} is complete already; --overwrite makes it again")
    elif job.continues:
        messages.note(f"continuing: {len(job.parts) - len(job.missing())} of {len(job.parts)} parts are done")
    known, now = set(job.items), set(items)
    new, gone = [item for item in items if item not in known], len(known - now)
    if new or gone:
        messages.say(
            f"since this job began, pictures have come ({len(new)}) and gone ({gone}); it keeps to the list that it "
            "began with (--overwrite begins again)"
        )
    for item in new:
        messages.skip(item, "it came after this job began")
    for item, reason in job.skipped():
        messages.skip(item, reason)


def _fuse_as_before(job: EmbeddingJob, model: PyramidCLIPModel) -> None:
    """Fuses the model with the library for matrix products that the job's first run chose.

    `model.fuse()` measures which is faster, which may come out otherwise the next time, and the last bits of the
    embeddings hang on it.
    """
    tower = model.vision_model if job.settings["kind"] == "path" else model.text_model

    def choose() -> str:
        model.fuse(linear="auto")
        return "onednn" if any(isinstance(module, OneDNNLinear) for module in tower.modules()) else "torch"

    # Fused already where this is the first run; then it stays as it is.
    model.fuse(linear=cast("LinearBackend", job.remembered("linear", choose)))


def _embed_on_ray(job: EmbeddingJob, settings: dict[str, Any], args: argparse.Namespace, messages: _Messages) -> None:
    """Has the workers of a cluster make the missing parts; names what they skipped."""
    known = set(job.skipped())
    if job.missing():
        with_gpu = None if args.device == "auto" else args.device != "cpu"
        options = RayOptions(args.ray_address, args.ray_workers, with_gpu)
        told = argparse.Namespace(**{**vars(args), "quiet": True})
        run_on_ray("pyramidclip_hf.commands:open_embed_job", (told, settings), options)
    if left := job.missing():
        raise Failure(f"{len(left)} parts are not in {job.folder}: the workers do not see that folder, or another one")
    for item, reason in job.skipped():
        if (item, reason) not in known:
            messages.skip(item, reason)


def open_embed_job(asked: tuple[argparse.Namespace, dict[str, Any]]) -> "_EmbedJob":
    """What a worker of Ray has of an embedding job. asked: the arguments, and the settings of the job as it began."""
    args, settings = asked
    loaded = _load(args, _Messages(args), fuse=False)
    if loaded.sha256() != settings["model_sha256"]:
        raise Failure(f"--model {args.model} is another model on {platform.node()} than where the command began")
    job = EmbeddingJob(Path(args.output), loaded.name, settings, [], args.part_size, args.overwrite)
    if isinstance(loaded.model, PyramidCLIPModel):
        _fuse_as_before(job, loaded.model)
    return _EmbedJob(job, loaded, args)


class _EmbedJob:
    """The parts of an embedding job, see `handing_out.Job`; putting them together is left to whoever began it."""

    def __init__(self, job: EmbeddingJob, loaded: Loaded[Any], args: argparse.Namespace):
        self.job, self.loaded, self.args = job, loaded, args

    def phases(self) -> Iterator[Phase]:
        """One: all parts."""
        items: dict[str, int | None] = {str(number): len(self.job.items_of(number)) for number in self.job.parts}
        unit = "text" if self.args.texts else "picture"
        yield Phase("embed", items, lambda item: not self.job.is_missing(int(item)), self._do, unit)

    def _do(self, item: str, advance: Advance) -> None:
        # They were there where the command began: another machine may see them.
        if not self.args.texts and (unseen := unseen_file(self.job.items_of(int(item)))) is not None:
            raise FileNotFoundError(f"there is no {_printable(unseen)}")
        embed = _embed_texts if self.args.texts else _embed_pictures
        embed(self.job, self.loaded, self.args, _Messages(self.args), [int(item)])
        advance(len(self.job.items_of(int(item))))

    def finish(self) -> None:
        """Nothing is left to a worker."""
        return

    def told(self, result: None) -> str:
        """Nothing."""
        return ""


def _embed_pictures(
    job: EmbeddingJob, loaded: Loaded[Any], args: argparse.Namespace, messages: _Messages, missing: Sequence[int]
) -> None:
    paths = (path for number in missing for path in job.items_of(number))
    parts = [(number, len(job.items_of(number))) for number in missing]
    total, left = len(job.items), sum(count for _, count in parts)
    pixels_ahead = closing(_pixels_ahead(paths, loaded.processor, args))
    with pixels_ahead as readings, messages.bar(total, "picture", initial=total - left) as bar:
        batches = _batches(readings, parts, args.batch_size, messages, bar)
        names: list[str] = []
        skipped: list[tuple[str, str]] = []
        rows = [np.zeros((0, loaded.model.config.projection_dim), np.float32)]
        for batch, embeds in embeddings_ahead(loaded.model, batches):
            names += batch.names
            skipped += batch.skipped
            rows.append(embeds.numpy())
            if batch.ends:
                job.save(batch.part, names, np.concatenate(rows), skipped)
                names, skipped, rows = [], [], rows[:1]


def _embed_texts(
    job: EmbeddingJob, loaded: Loaded[Any], args: argparse.Namespace, messages: _Messages, missing: Sequence[int]
) -> None:
    left = sum(len(job.items_of(number)) for number in missing)
    with messages.bar(len(job.items), "text", initial=len(job.items) - left) as bar:
        for number in missing:
            texts = job.items_of(number)
            embeds = text_embeddings(loaded.model, loaded.processor, texts, args.batch_size)
            job.save(number, texts, embeds.numpy(), [])
            bar.update(len(texts))


# search


def run_search(args: argparse.Namespace) -> int:
    """Prints the best rows for each query, and draws the contact sheet."""
    messages = _Messages(args)
    if not args.text and not args.image:
        raise ValueError("Expected a query: --text or --image.")
    if not all(text.strip() for text in args.text):
        raise ValueError("--text: expected words to search for, got an empty text.")
    metadata = read_metadata(args.embeddings)
    if args.output:
        check_picture_output(args.output, args.overwrite, pages=_PAGE_SUFFIXES)
        check_font(args.font)
        if metadata["kind"] != "path":
            raise ValueError(f"{args.embeddings} holds texts: a contact sheet (--output) needs pictures.")
    args.model = args.model or metadata["model"]
    # The model is gone before the file is searched.
    queries = _queries(args, metadata, messages)
    titles = args.text + args.image
    found = best_hits(args.embeddings, metadata["kind"], queries, args.top_k, args.index)
    for title, hits in zip(titles, found):
        for hit in hits:
            row = {"query": title, "rank": hit.rank, "score": round(hit.score, 6), metadata["kind"]: hit.name}
            messages.row(row, (title, hit.rank, f"{hit.score:.4f}", hit.name))
    if args.output:
        _write_sheet(args, metadata, found, messages)
    return 0


def _write_sheet(
    args: argparse.Namespace, metadata: dict[str, Any], found: list[list[Hit]], messages: _Messages
) -> None:
    """Writes the hits as a page or as one picture, as the ending of `--output` says."""
    queries = [(text, None) for text in args.text] + [(path, path) for path in args.image]
    model_name = "/".join(Path(metadata["model"]).parts[-2:])
    below = f"of {metadata['rows']} pictures, by {model_name}"
    if Path(args.output).suffix.lower() in _PAGE_SUFFIXES:
        page, absent = hits_page(queries, found, f"The best {below}", args.max_image_pixels)
        write_text(args.output, page)
        what = "page"
    else:
        sheet, absent = contact_sheet(queries, found, below, args.max_image_pixels, args.font)
        save_picture(sheet, args.output)
        if lacking := characters_that_lack([*args.text, *(hit.name for hits in found for hit in hits)], args.font):
            messages.say(f"the sheet's font lacks {lacking}: --font FILE takes one that has them")
        what = f"contact sheet of {sheet.width} x {sheet.height} pixels"
    if absent:
        messages.say(
            f"{absent} pictures of the sheet could not be read; their paths are as `embed` was given them, so "
            "relative ones count from where it ran"
        )
    messages.note(f"{args.output}: {what}")


def _queries(args: argparse.Namespace, metadata: dict[str, Any], messages: _Messages) -> torch.Tensor:
    """Unit embeddings (Q, D) of the queries, texts first, by the model that made the file.

    Raises:
        ValueError: another model, or an engine whose embeddings are further off than a search can bear.
    """
    # For a few queries fusing costs more time and memory than it saves.
    loaded = _load(args, messages, fuse=False)
    check_made_by(metadata, loaded, args.embeddings)
    queries = []
    if args.text:
        queries.append(text_embeddings(loaded.model, loaded.processor, args.text))
    pictures = [_picture_of("--image", path, args.max_image_pixels) for path in args.image]
    if pictures:
        queries.append(image_embeddings(loaded.model, loaded.processor, pictures))
    return torch.cat(queries)


def _picture_of(flag: str, path: str, max_image_pixels: int, expected: str = "the file of one picture") -> Image.Image:
    """`read_picture` of what a flag names; ValueError where that does not work, with what was expected."""
    if os.path.isdir(path):
        raise ValueError(f"{flag} {path} is a folder: expected {expected}.".lstrip())
    try:
        return read_picture(path, max_image_pixels)
    except UnreadablePicture as error:
        kinds = "" if Path(path).suffix.lower() in PICTURE_SUFFIXES else f" (such as {' '.join(PICTURE_SUFFIXES[:4])})"
        told = f"{flag} {path}: cannot be read: {error}: expected {expected}{kinds}."
        raise ValueError(told.lstrip()) from error


# explain


def run_explain(args: argparse.Namespace) -> int:
    """Writes the picture with what speaks for the text laid over it, and prints the score."""
    messages = _Messages(args)
    check_picture_output(args.output, args.overwrite)
    picture = _picture_of("", args.picture, args.max_image_pixels)

    # The relevance is read off the plain modules, which the fused form does not have.
    loaded = _load(args, messages, fuse=False)
    explanation = explain_image(loaded.model, loaded.processor, picture, args.text)
    save_picture(explanation.overlay(picture), args.output)
    score = float(explanation.score)
    row = {"path": args.picture, "text": args.text, "score": round(score, 6), "output": args.output}
    messages.row(row, (args.picture, args.text, f"{score:.4f}", args.output))
    return 0


# export


def run_export(args: argparse.Namespace) -> int:
    """Writes the towers for an engine, and prints how far each file is from the model."""
    messages = _Messages(args)
    pictures = _calibration(args, messages)
    classes = _pictures_of_classes(args.classes, messages) if args.classes else {}
    loaded = load_model(args.model, revision=args.revision)
    output = args.output or args.model
    if not args.output and not Path(args.model).is_dir():
        raise ValueError("--model is an id of the Hub: expected --output FOLDER.")
    options = {"backend": args.format, "dtypes": args.dtype, "regions": args.regions, "calibration": pictures}
    texts = [pair["caption"] for pair in read_pairs(args.pairs)] if args.pairs else []
    for file in export_model(loaded, output, texts=texts[:_CALIBRATION_TEXTS], say=messages.note, **options):
        columns = (
            file.file,
            f"{file.megabytes:.1f} MB",
            f"cosine {file.mean_cosine:.6f}, least {file.least_cosine:.6f}",
        )
        messages.row(file._asdict(), columns)
    if args.pairs or classes:
        for dtype in args.dtype:
            exported = load_exported(output, backend=args.format, dtype=dtype).model
            for name, before, after in compare_on_data(loaded, exported, args.pairs, classes, args.max_image_pixels):
                row = {"dtype": dtype, "measure": name, "model": before, "exported": after}
                messages.row(row, (dtype, name, f"{before:.2%} -> {after:.2%}"))
    return 0


def _calibration(args: argparse.Namespace, messages: _Messages) -> list[Image.Image]:
    paths = _found(args.calibration, sys.stdin, messages) if args.calibration else []
    return [
        _picture_of("--calibration", path, args.max_image_pixels, _CALIBRATED_ON)
        for path in paths[:_CALIBRATION_PICTURES]
    ]


def _pictures_of_classes(folder: str, messages: _Messages) -> dict[str, list[str]]:
    """Class -> its pictures, of a folder with a sub-folder a class; says what was passed over in all of them."""
    passed_over: Counter[str] = Counter()
    found = pictures_of_classes(folder, passed_over)
    if len(found) < 2:  # of a single class, every picture would be right
        raise ValueError(
            f"--classes {folder}: expected a folder with one sub-folder of pictures for each of at least two classes, "
            f"found {', '.join(found) or 'none'}."
        )
    if empty := [name for name, pictures in found.items() if not pictures]:
        raise ValueError(
            f"--classes {folder}: no pictures in {', '.join(empty)}. {told_passed_over(passed_over)}".strip()
        )
    if told := told_passed_over(passed_over):
        messages.say(f"--classes {folder}: {told}")
    return {name.replace("_", " "): [str(path) for path in pictures] for name, pictures in found.items()}


# What `pyramidclip_command` calls by the subcommand's name.
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "classify": run_classify,
    "embed": run_embed,
    "search": run_search,
    "explain": run_explain,
    "export": run_export,
    "app": run_app,
}
