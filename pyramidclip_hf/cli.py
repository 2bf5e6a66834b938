# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The `pyramidclip` command: classify pictures, embed folders, search the embeddings, explain a similarity.

    pyramidclip classify --model DIR pictures/ --labels cat dog
    pyramidclip embed --model DIR pictures/ --output pictures.npz
    pyramidclip search pictures.npz --text "a red bat" --output sheet.png
    pyramidclip explain --model DIR picture.jpg --text "a red bat" --output overlay.png

Results go to stdout, tab-separated or with `--json` one object a line; everything else goes to stderr. What is heavy
(torch, transformers) is imported inside the subcommands, and argparse stands in for transformers' HfArgumentParser,
so that help and wrong flags answer at once: read on at `main`, at the end.
"""

import argparse
import errno
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

EXIT_WRONG_USAGE = 2
EXIT_SKIPPED = 3
EXIT_STOPPED = 130
# As a shell reports a program that SIGPIPE ended.
EXIT_BROKEN_PIPE = 141

_EXIT_CODES = """\
exit codes: 0 all done; 1 something failed on the way; 2 wrong usage, nothing was done; 3 done, but pictures were
skipped, each named on stderr with the reason; 130 stopped by Ctrl-C.
"""
# What decides the pixels; the rest is on always.
_PROCESSOR_SETTINGS = ("size", "crop_size", "resample", "image_mean", "image_std")
# A bar for fewer prompts would be gone before it is read.
_PROMPTS_WORTH_A_BAR = 1000


def _pixels_ahead(paths: Iterable[str], processor: Any, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """`read_ahead` with `pixel_values` (3, H, W), at least one batch in front of the model."""
    from .picture_files import UnreadablePicture, read_ahead, read_picture

    def read(path: str) -> Any:
        picture = read_picture(path, args.max_image_pixels)
        try:
            return processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
        except (ValueError, MemoryError) as error:
            raise UnreadablePicture(f"cannot be prepared: {error}") from error

    return read_ahead(paths, read, args.workers, 2 * max(args.batch_size, args.workers))


def _stack(pixels: list, return_tensors: str = "pt") -> dict[str, Any]:
    """Stands in for the image processor where `read_ahead` has done its work."""
    import torch

    return {"pixel_values": torch.stack(pixels)}


# What the user sees


class _Messages:
    """Results on stdout and all else on stderr, without breaking the progress bar; counts the skipped pictures."""

    def __init__(self, args: argparse.Namespace):
        self.quiet, self.json, self.skipped, self._bar = args.quiet, args.json, 0, None

    def row(self, row: dict[str, Any], columns: Sequence[Any]) -> None:
        """One result: with `--json` as an object, else its columns between tabs."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.clear()
        print(json.dumps(row, ensure_ascii=False) if self.json else "\t".join(map(str, columns)), flush=True)

    def say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """What `--quiet` leaves out."""
        if not self.quiet:
            self.say(text)

    def skip(self, item: str, reason: Any) -> None:
        self.skipped += 1
        self.say(f"skipped {_printable(item)}: {reason}")

    def exit_code(self, of: int) -> int:
        """Says how many of `of` were skipped."""
        if self.skipped:
            self.say(f"{self.skipped} of {of} were skipped")
        return EXIT_SKIPPED if self.skipped else 0

    def bar(self, total: int, unit: str, initial: int = 0) -> Any:
        """A progress bar with rate and time left; in a log, a line every ten seconds."""
        from huggingface_hub.utils import tqdm

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


# The model


def _load(args: argparse.Namespace, messages: _Messages, fuse: bool = True) -> Any:
    """The model and processor that the arguments name, see `load_model`."""
    from .loading import choose_device, load_model

    device = choose_device(args.device)
    _warn_of_slow_type(args.dtype, device, messages)
    return load_model(args.model, revision=args.revision, device=device, dtype=args.dtype, fuse=fuse)


def _warn_of_slow_type(dtype: str, device: Any, messages: _Messages) -> None:
    import torch

    able = {"bfloat16": ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"), "float16": ("avx512_fp16", "amx_fp16", "fp16")}
    if device.type != "cpu" or dtype == "float32":
        return
    capabilities = torch.cpu.get_capabilities()
    if not any(capabilities.get(name) for name in able[dtype]):
        messages.note(f"this processor has no {dtype} arithmetic: it works, but float32 is faster")


# classify


def run_classify(args: argparse.Namespace) -> int:
    """Prints the `--top-k` labels of each picture, batch by batch."""
    from .picture_files import find_pictures
    from .zero_shot import IMAGENET_TEMPLATES, class_embeddings, classify

    messages = _Messages(args)
    labels = _lines_of(args.labels_file, "labels") if args.labels_file else args.labels
    templates = _lines_of(args.templates, "templates") if args.templates else None
    paths = find_pictures(args.pictures, sys.stdin)

    loaded = _load(args, messages)
    templates = IMAGENET_TEMPLATES if templates is None else templates
    bar_for_labels = not args.quiet and len(labels) * len(templates) > _PROMPTS_WORTH_A_BAR
    class_embeds = class_embeddings(loaded.model, loaded.processor, labels, templates, progress=bar_for_labels)

    def print_batch(names: list[str], pixels: list) -> None:
        found = classify(
            loaded.model, _stack, pixels, labels, class_embeds=class_embeds, top_k=args.top_k, batch_size=len(pixels)
        )
        for path, predictions in zip(names, found):
            rounded = [{"label": one.name, "probability": round(one.probability, 6)} for one in predictions]
            columns = [path] + [cell for one in predictions for cell in (one.name, f"{one.probability:.4f}")]
            messages.row({"path": path, "predictions": rounded}, columns)

    with closing(_pixels_ahead(paths, loaded.processor, args)) as readings, messages.bar(len(paths), "picture") as bar:
        _in_batches(readings, args.batch_size, messages, bar, print_batch)
    return messages.exit_code(of=len(paths))


def _in_batches(
    readings: Iterable[tuple[str, Any]],
    batch_size: int,
    messages: _Messages,
    bar: Any,
    use: Callable[[list[str], list], None],
) -> list[tuple[str, str]]:
    """Calls `use(names, pixels)` with full batches of what could be read, and once with the rest; returns (name,
    reason) of what could not."""
    from .picture_files import UnreadablePicture

    names, pixels, skipped = [], [], []
    for name, reading in readings:
        if isinstance(reading, UnreadablePicture):
            messages.skip(name, reading)
            skipped.append((name, str(reading)))
        else:
            names.append(name)
            pixels.append(reading)
        if len(names) == batch_size:
            use(names, pixels)
            names, pixels = [], []
        bar.update()
    if names:
        use(names, pixels)
    return skipped


# embed


def run_embed(args: argparse.Namespace) -> int:
    """Embeds pictures, or the lines of `--texts`, into one file; continues where the same command was stopped."""
    from .embedding_files import EmbeddingJob, check_output

    messages = _Messages(args)
    output = check_output(args.output)
    items, inputs = _items_to_embed(args)
    loaded = _load(args, messages, fuse=False)
    settings = {"kind": "text" if args.texts else "path", "model_sha256": loaded.sha256(), "dtype": args.dtype}
    settings |= {"inputs": inputs}
    if not args.texts:
        processor = loaded.processor.image_processor.to_dict()
        settings["image_processor"] = {name: processor[name] for name in _PROCESSOR_SETTINGS}
        settings["max_image_pixels"] = args.max_image_pixels
    job = EmbeddingJob(output, loaded.name, settings, items, args.part_size, args.overwrite)
    _say_where_it_stands(job, items, messages)
    if not job.complete:
        _fuse_as_before(job, loaded.model)
    (_embed_texts if args.texts else _embed_pictures)(job, loaded, args, messages)
    rows, skipped = job.finish()
    messages.note(f"{output}: {rows} embeddings")
    if args.json:
        listed = [{"path": _printable(path), "reason": reason} for path, reason in skipped]
        messages.row({"output": str(output), "rows": rows, "skipped": listed}, ())
    return messages.exit_code(of=rows + len(skipped))


def _items_to_embed(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """What is to be embedded, and how the command named it: with the content, where that is not a place."""
    from .picture_files import find_pictures

    if args.texts and args.pictures:
        raise ValueError("Expected pictures or --texts, got both: one file of embeddings holds one kind.")
    if args.texts:
        lines = _lines_of(args.texts, "texts")
        return lines, [f"texts with sha256 {_sha256_of(lines)}"]
    if not args.pictures:
        raise ValueError("Expected pictures (files, folders, globs, or - for paths on stdin) or --texts FILE.")
    piped = list(sys.stdin) if "-" in args.pictures else []
    inputs = [f"- with sha256 {_sha256_of(piped)}" if one == "-" else one for one in args.pictures]
    return find_pictures(args.pictures, piped), inputs


def _sha256_of(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def _say_where_it_stands(job: Any, items: list[str], messages: _Messages) -> None:
    """Names again what earlier runs of this job skipped, so that the run that finishes has named all."""
    if job.complete:
        messages.note(f"{job.output} is complete already; --overwrite makes it again")
    elif job.continues:
        messages.note(f"continuing: {len(job.parts) - len(job.missing())} of {len(job.parts)} parts are done")
    new, gone = len(set(items) - set(job.items)), len(set(job.items) - set(items))
    if new or gone:
        messages.say(
            f"since this job began, {new} pictures have come and {gone} have gone; it keeps to the list that it began "
            "with (--overwrite begins again)"
        )
    for item, reason in job.skipped():
        messages.skip(item, reason)


def _fuse_as_before(job: Any, model: Any) -> None:
    """`model.fuse()` measures which library is faster, which may come out otherwise the next time; the last bits of the
    embeddings hang on it, so a job keeps to what its first run chose."""
    from .fusion_pyramidclip import OneDNNLinear

    tower = model.vision_model if job.settings["kind"] == "path" else model.text_model

    def choose() -> str:
        model.fuse(linear="auto")
        return "onednn" if any(isinstance(module, OneDNNLinear) for module in tower.modules()) else "torch"

    # Fused already where this is the first run; then it stays as it is.
    model.fuse(linear=job.remembered("linear", choose))


def _embed_pictures(job: Any, loaded: Any, args: argparse.Namespace, messages: _Messages) -> None:
    import numpy as np

    from .zero_shot import image_embeddings

    missing = job.missing()
    paths = (path for number in missing for path in job.items_of(number))
    left = sum(len(job.items_of(number)) for number in missing)
    total = len(job.items)
    with closing(_pixels_ahead(paths, loaded.processor, args)) as readings:
        with messages.bar(total, "picture", initial=total - left) as bar:
            for number in missing:
                names, rows = [], [np.zeros((0, loaded.model.config.projection_dim), np.float32)]

                def embed(batch: list[str], pixels: list, names=names, rows=rows) -> None:
                    names += batch
                    rows.append(image_embeddings(loaded.model, _stack, pixels, len(pixels)).numpy())

                # A batch ends with its part: the company in which a picture is encoded decides its last bits.
                of_part = islice(readings, len(job.items_of(number)))
                skipped = _in_batches(of_part, args.batch_size, messages, bar, embed)
                job.save(number, names, np.concatenate(rows), skipped)


def _embed_texts(job: Any, loaded: Any, args: argparse.Namespace, messages: _Messages) -> None:
    from .zero_shot import text_embeddings

    missing = job.missing()
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
    from .embedding_files import read_embeddings
    from .picture_files import check_picture_output, contact_sheet, save_picture

    messages = _Messages(args)
    if not args.text and not args.image:
        raise ValueError("Expected a query: --text or --image.")
    stored = read_embeddings(args.embeddings)
    if args.output:
        check_picture_output(args.output)
        if stored.kind != "path":
            raise ValueError(f"{args.embeddings} holds texts: a contact sheet (--output) needs pictures.")
    args.model = args.model or stored.metadata["model"]
    loaded = _load(args, messages)
    if loaded.sha256() != stored.metadata["model_sha256"]:
        raise ValueError(
            f"{args.embeddings} was made by another model: {stored.metadata['model']} (weights "
            f"{stored.metadata['model_sha256'][:12]}), but {args.model} has the weights {loaded.sha256()[:12]}. "
            "Embeddings of two models cannot be compared: take that --model, or embed again."
        )
    titles = args.text + args.image
    found = _best(loaded, stored, args)
    for title, hits in zip(titles, found):
        for hit in hits:
            row = {"query": title, "rank": hit.rank, "score": round(hit.score, 6), stored.kind: hit.name}
            messages.row(row, (title, hit.rank, f"{hit.score:.4f}", hit.name))
    if args.output:
        queries = [(text, None) for text in args.text] + [(path, path) for path in args.image]
        model_name = "/".join(Path(stored.metadata["model"]).parts[-2:])
        below = f"of {len(stored.names)} pictures, by {model_name}"
        sheet, absent = contact_sheet(queries, found, below, args.max_image_pixels, args.font)
        save_picture(sheet, args.output)
        if absent:
            messages.say(
                f"{absent} pictures of the sheet could not be read; their paths are as `embed` was given them, so "
                "relative ones count from where it ran"
            )
        messages.note(f"{args.output}: contact sheet of {sheet.width} x {sheet.height} pixels")
    return 0


def _best(loaded: Any, stored: Any, args: argparse.Namespace) -> list[list[Any]]:
    """The hits of each query: texts first, then pictures."""
    import torch

    from .picture_files import Hit, UnreadablePicture, read_picture
    from .zero_shot import image_embeddings, retrieve, text_embeddings

    queries = []
    if args.text:
        queries.append(text_embeddings(loaded.model, loaded.processor, args.text))
    try:
        pictures = [read_picture(path, args.max_image_pixels) for path in args.image]
    except UnreadablePicture as error:
        raise ValueError(f"--image: a query cannot be read: {error}") from error
    if pictures:
        queries.append(image_embeddings(loaded.model, loaded.processor, pictures))
    matches = retrieve(torch.cat(queries), torch.from_numpy(stored.embeddings), args.top_k)
    return [
        [Hit(rank, score, stored.names[place]) for rank, (score, place) in enumerate(zip(scores, places), start=1)]
        for scores, places in zip(matches.scores.tolist(), matches.indices.tolist())
    ]


# explain


def run_explain(args: argparse.Namespace) -> int:
    """Writes the picture with what speaks for the text laid over it, and prints the score."""
    from .picture_files import UnreadablePicture, check_picture_output, read_picture, save_picture

    messages = _Messages(args)
    check_picture_output(args.output)
    try:
        picture = read_picture(args.picture, args.max_image_pixels)
    except UnreadablePicture as error:
        raise ValueError(f"{args.picture}: cannot be read: {error}") from error

    from .explain import explain_image

    # The relevance is read off the plain modules, which the fused form does not have.
    loaded = _load(args, messages, fuse=False)
    explanation = explain_image(loaded.model, loaded.processor, picture, args.text)
    save_picture(explanation.overlay(picture), args.output)
    score = float(explanation.score)
    row = {"path": args.picture, "text": args.text, "score": round(score, 6), "output": args.output}
    messages.row(row, (args.picture, args.text, f"{score:.4f}", args.output))
    return 0


# The command line


def _at_least_one(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> argparse.ArgumentParser:
    """The parser; each subcommand's function is `run` of what it returns."""
    parser = argparse.ArgumentParser(
        prog="pyramidclip",
        description="Classify pictures, embed and search them, and see why, with a PyramidCLIP model.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    _add_classify(command("classify", run_classify, "name pictures by labels of your own"))
    _add_embed(command("embed", run_embed, "turn pictures or texts into a file of embeddings"))
    _add_search(command("search", run_search, "find pictures by text or picture in a file of embeddings"))
    _add_explain(command("explain", run_explain, "show which parts of a picture speak for a text"))
    return parser


_PICTURES_HELP = "files, folders (with all below), globs in quotes, or - for paths on stdin, one a line"


def _add_common(parser: argparse.ArgumentParser, model_help: str = "", batches: bool = False) -> None:
    model_help = model_help or "folder of a saved model, or Hub id"
    parser.add_argument("--model", required="default" not in model_help, help=model_help)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps; default: an accelerator if there is one"
    )
    types = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", default="float32", choices=types, help="of the model (default: %(default)s)")
    parser.add_argument(
        "--max-image-pixels",
        type=_at_least_one,
        default=100_000_000,
        help="pictures with more are not decoded (default: %(default)s; Pillow itself ends at 178956970)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
    if batches:
        parser.add_argument("--batch-size", type=_at_least_one, default=32, help="default: %(default)s")
        parser.add_argument(
            "--workers",
            type=_at_least_one,
            default=_processors(),
            help="threads that decode pictures while the model computes (default: the processors, here %(default)s)",
        )


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", help=_PICTURES_HELP)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", nargs="+", metavar="LABEL", help="classes; put pictures before this flag")
    labels.add_argument("--labels-file", metavar="FILE", help="classes, one a line")
    parser.add_argument("--templates", metavar="FILE", help="prompts, one a line, {} for the label; default: CLIP's 80")
    parser.add_argument("--top-k", type=_at_least_one, default=1, help="labels a picture (default: %(default)s)")
    _add_common(parser, batches=True)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", help=_PICTURES_HELP)
    parser.add_argument(
        "--texts", metavar="FILE", help="embed the lines of this file; long ones are cut to the context"
    )
    parser.add_argument("--output", required=True, help="NAME.parquet (needs pyarrow) or NAME.npz")
    parser.add_argument(
        "--part-size",
        type=_at_least_one,
        default=1024,
        help="rows between two saves; a stopped job repeats at most these (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="take the place of a finished or unfinished file")
    _add_common(parser, batches=True)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", help="file that `pyramidclip embed` wrote")
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="QUERY", help="in words")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="by example")
    parser.add_argument("--top-k", type=_at_least_one, default=10, help="hits a query (default: %(default)s)")
    parser.add_argument("--output", metavar="SHEET", help="contact sheet to write, a PNG, JPEG or WebP")
    parser.add_argument("--font", metavar="FILE", help="TrueType font of the sheet, for queries beyond Latin letters")
    _add_common(parser, "folder of a saved model, or Hub id; default: the one that the embeddings name")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file")
    parser.add_argument("--text", required=True, help="what to look for")
    parser.add_argument("--output", required=True, help="overlay to write, a PNG, JPEG or WebP")
    _add_common(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code; `--help` lists the codes."""
    args = build_parser().parse_args(argv)
    again = " What is complete is kept: the same command continues." if args.command == "embed" else ""
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python would flush once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"\nstopped.{again}", file=sys.stderr)
        return EXIT_STOPPED
    except (ValueError, ImportError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_USAGE
    except OSError as error:
        full = " The disk is full." if error.errno == errno.ENOSPC else ""
        print(f"error: {error}.{full}{again}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"error: {error}\nLower --batch-size.{again}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
