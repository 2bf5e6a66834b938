# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Files of pictures for the command line: which ones, their pixels read ahead by threads, contact sheets of them."""

import glob
import os
import tarfile
import textwrap
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError

from .files import is_hidden, reason_of, visible, written_aside
from .image_processing_pyramidclip import PICTURE_FORMATS, open_undecoded, upright_rgb

_SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
    "AVIF": (".avif",),
}
PICTURE_SUFFIXES = tuple(suffix for form in PICTURE_FORMATS for suffix in _SUFFIXES[form])
# WebDataset's shards, of which the pictures count.
SHARD_SUFFIX = ".tar"
_MAX_MEMBER_BYTES = 256 << 20
# Pictures all the same, and why they are not read.
_NOT_READ = {
    ".heic": "Pillow has no reader of its own; the plug-in pillow-heif converts them",
    ".jxl": "Pillow has no reader of its own; the plug-in pillow-jxl-plugin converts them",
    ".avif": "this Pillow was built without AVIF; 11.3 and later have it",
    ".svg": "drawings, which have no pixels; resvg-py draws them",
    ".psd": "not read from strangers; convert them",
}
_NOT_READ[".heif"] = _NOT_READ[".heic"]
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

_CELL, _GAP, _MARGIN, _COLUMNS = 208, 16, 28, 5
_CAPTION = 46
# The colours of page.css.
_INK, _GREY, _PALE, _ACCENT = (29, 36, 51), (91, 98, 119), (246, 247, 250), (31, 95, 191)
_MAX_SHEET_CELLS = 2000

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadablePicture(Exception):
    """A picture that is skipped; the message is the reason."""


def find_pictures(
    arguments: Sequence[str], stdin: Iterable[str] = (), passed_over: Counter[str] | None = None, shards: bool = False
) -> list[str]:
    """The pictures that files, folders (searched to any depth), globs and "-" (paths in `stdin`) name, each once.

    In folders and globs, only files with a picture's suffix count, and nothing hidden; what is named outright counts
    whatever its name. A folder's pictures come sorted, everything else as it was given. The endings of other files
    that are not hidden are counted in `passed_over`. With `shards`, the pictures inside of tars count too, wherever
    one comes: `SHARD.tar/KEY.jpg`, in the tar's order.

    Raises:
        ValueError: an argument that is not there, a tar that cannot be read, or no picture at all.
    """
    found: dict[str, None] = {}
    passed_over = Counter() if passed_over is None else passed_over

    def add(path: str) -> None:
        is_shard = shards and path.lower().endswith(SHARD_SUFFIX) and os.path.isfile(path)
        found.update(dict.fromkeys(_pictures_inside(path) if is_shard else [path]))

    for argument in arguments:
        if argument == "-":
            for line in stdin:
                if line.strip():
                    add(line.rstrip("\r\n"))
        elif os.path.isfile(argument):
            add(argument)
        elif os.path.isdir(argument) or glob.has_magic(argument):
            for match in [argument] if os.path.isdir(argument) else sorted(glob.glob(argument, recursive=True)):
                if os.path.isdir(match):
                    files: Iterable[str] = pictures_below(match, passed_over, shards)
                else:
                    files = [match] if _is_picture(os.path.basename(match), passed_over, shards) else []
                for path in files:
                    add(path)
        else:
            raise ValueError(f"There is no file or folder {argument!r}.")
    if not found:
        raise ValueError(
            f"No pictures found in {', '.join(arguments)}: expected files ending in {' '.join(PICTURE_SUFFIXES)}. "
            + told_passed_over(passed_over)
        )
    return list(found)


def pictures_below(
    folder: str | os.PathLike[str], passed_over: Counter[str] | None = None, shards: bool = False
) -> Iterator[str]:
    """The paths of the pictures in a folder, at any depth, sorted within each folder; hidden ones are left out.

    Links to folders are followed, each folder is searched once.

    Args:
        folder: to search.
        passed_over: counts the endings of what is no picture, and not hidden.
        shards: tars count as pictures.

    Raises:
        OSError: a folder cannot be read.
    """
    counted = Counter[str]() if passed_over is None else passed_over
    searched = set()
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        known = os.stat(place)
        if (known.st_dev, known.st_ino) in searched:
            folders.clear()
            continue
        searched.add((known.st_dev, known.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (os.path.join(place, name) for name in sorted(files) if _is_picture(name, counted, shards))


def _raise(error: OSError) -> NoReturn:
    raise error


def pictures_of_classes(folder: str | os.PathLike[str], passed_over: Counter[str]) -> dict[str, list[Path]]:
    """{name of a sub-folder: its pictures}, both sorted, of a folder that has one for each class.

    Args:
        folder: to search; hidden files and folders are left out.
        passed_over: counts what is no picture, and pictures that are in none of the sub-folders.

    Raises:
        OSError: a folder cannot be read.
    """
    entries = visible(folder)
    for path in entries:
        if path.is_file() and path.name.lower().endswith(PICTURE_SUFFIXES):
            passed_over[f"{path.suffix.lower()} beside the folders of classes"] += 1
    return {path.name: sorted(map(Path, pictures_below(path, passed_over))) for path in entries if path.is_dir()}


def _is_picture(name: str, passed_over: Counter[str], shards: bool = False) -> bool:
    if is_hidden(name):
        return False
    if not name.lower().endswith((*PICTURE_SUFFIXES, SHARD_SUFFIX) if shards else PICTURE_SUFFIXES):
        passed_over[Path(name).suffix.lower()] += 1
        return False
    return True


class _Members:
    """Where the pictures inside of a tar lie: {name: (offset, bytes)}. Raises `ValueError` where it cannot be read."""

    def __init__(self, path: str):
        self.places: dict[str, tuple[int, int]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isreg() and member.name.lower().endswith(PICTURE_SUFFIXES):
                        self.places[member.name] = member.offset_data, member.size
        except tarfile.TarError as error:
            raise ValueError(f"{path}: is no uncompressed tar, or ends in the middle ({error}).") from error


# Those that threads read pictures of. The time of the file is part of what they are known by.
@lru_cache(maxsize=4)
def _members(path: str, mtime_ns: int) -> _Members:
    return _Members(path)


def _pictures_inside(shard: str) -> Iterator[str]:
    return (f"{shard}/{name}" for name in _Members(shard).places)


def _shard_of(path: str) -> tuple[str, str]:
    """The tar that a picture is inside of, and its name there; "" and the path where it is a file of its own."""
    shard, mark, name = path.rpartition(f"{SHARD_SUFFIX}/")
    return (shard + SHARD_SUFFIX, name) if mark and not os.path.isdir(shard + SHARD_SUFFIX) else ("", path)


def unseen_file(paths: Sequence[str]) -> str | None:
    """A tar of these pictures that is not there; of pictures in files of their own the first, where all are not."""
    shards = dict.fromkeys(_shard_of(path)[0] for path in paths)
    unseen = [shard for shard in shards if shard and not os.path.exists(shard)]
    if "" in shards and not any(os.path.exists(path) for path in paths):
        unseen += paths[:1]
    return unseen[0] if unseen else None


def _opened(path: str) -> str | bytes:
    """What is to be read: the path of a file, or the bytes of a picture inside of a tar."""
    shard, name = _shard_of(path)
    if not shard:
        return path
    with open(shard, "rb") as file:
        try:
            offset, size = _members(shard, os.fstat(file.fileno()).st_mtime_ns).places[name]
        except KeyError:
            raise FileNotFoundError(f"{shard} has no {name}") from None
        if size > _MAX_MEMBER_BYTES:
            raise UnreadablePicture(f"has {size} bytes, expected at most {_MAX_MEMBER_BYTES}")
        file.seek(offset)
        return file.read(size)


def told_passed_over(passed_over: Counter[str]) -> str:
    """What to say of the files that were passed over: how many of each ending, and why where they are pictures."""
    if not passed_over:
        return ""
    kinds = passed_over.most_common()
    counts = [f"{number} {suffix or 'without an ending'}" for suffix, number in kinds]
    shown = counts[:10] + ([f"{len(counts) - 10} more endings"] if len(counts) > 10 else [])
    why = [f"{suffix}: {_NOT_READ[suffix]}" for suffix, _ in kinds if suffix in _NOT_READ]
    return "; ".join([f"passed over: {', '.join(shown)}", *why])


def read_picture(path: str, max_image_pixels: int | None) -> Image.Image:
    """The upright RGB PIL picture of a file, or of one inside of a tar, `SHARD.tar/KEY.jpg`.

    Raises:
        UnreadablePicture: no such file, no picture, too many pixels, damaged, or a name that is not UTF-8.
    """
    try:
        path.encode()
        with open_undecoded(_opened(path), max_image_pixels) as picture:
            picture.load()
            return upright_rgb(picture)
    except UnreadablePicture:
        raise
    except UnicodeEncodeError as error:
        raise UnreadablePicture("the name is not UTF-8, so it could not be written down") from error
    except Exception as error:  # on damaged data, Pillow's readers raise almost anything
        suffix = Path(path).suffix.lower()
        known = f" ({_NOT_READ[suffix]})" if suffix in _NOT_READ and suffix not in PICTURE_SUFFIXES else ""
        # Of bytes, Pillow says where they lie in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        reason = f"cannot identify image file {path!r}" if unknown else reason_of(error)
        raise UnreadablePicture(reason + known) from error


def read_ahead(
    items: Iterable[Item], read: Callable[[Item], Result], workers: int, ahead: int
) -> Generator[tuple[Item, Result | UnreadablePicture], None, None]:
    """Yields (item, `read(item)` or the `UnreadablePicture` that it raised) in order.

    `workers` threads are up to `ahead` items in front of what was yielded. Pillow decodes and resizes without holding
    Python's lock, so threads are enough. Closing the iterator drops what is not begun.
    """

    def attempt(item: Item) -> Result | UnreadablePicture:
        try:
            return read(item)
        except UnreadablePicture as error:
            return error

    waiting: deque[tuple[Item, Future[Result | UnreadablePicture]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append((item, pool.submit(attempt, item)))
                if len(waiting) > ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def check_picture_output(path: str, overwrite: bool = False, pages: Sequence[str] = ()) -> None:
    """ValueError unless `path` names a kind of picture, in a folder that exists, and no file that must stay.

    `pages` are further endings that are taken, those of pages.
    """
    if Path(path).suffix.lower() not in (*SHEET_SUFFIXES, *pages) or not Path(path).parent.is_dir():
        kinds = f"a picture ({' '.join(SHEET_SUFFIXES)})" + (f" or a page ({' '.join(pages)})" if pages else "")
        raise ValueError(f"--output {path}: expected {kinds} in a folder that exists.")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"--output {path}: there is such a file already; --overwrite takes its place.")


def save_picture(picture: Image.Image, path: str) -> None:
    """Writes a picture as what its suffix says; the file is there as a whole or not at all."""
    kind = Path(path).suffix.lower().removeprefix(".")
    with written_aside(path, sole_writer=True) as aside:
        picture.save(aside, "JPEG" if kind == "jpg" else kind.upper())


class Hit(NamedTuple):
    """One result: its place from 1 on, the cosine, and the path or text."""

    rank: int
    score: float
    name: str


def contact_sheet(
    queries: Sequence[tuple[str, str | None]],
    found: Sequence[Sequence[Hit]],
    below: str,
    max_image_pixels: int | None = None,
    font_file: str | None = None,
) -> tuple[Image.Image, int]:
    """An RGB picture with the hits of each query as a grid of thumbnails with rank, score and file name.

    Args:
        queries: (title, path of the query's picture or None).
        found: the hits of each.
        below: what follows "best K" under a title.
        max_image_pixels: pictures with more are placeholders.
        font_file: TrueType; None: Pillow's own, which has the letters of ASCII only.

    Returns:
        The picture, and how many thumbnails could not be read; they are drawn as placeholders.

    Raises:
        ValueError: more cells than a picture should hold, or no such font.
    """
    cells = sum(map(len, found))
    if cells > _MAX_SHEET_CELLS:
        raise ValueError(f"A sheet holds at most {_MAX_SHEET_CELLS} pictures, these would be {cells}: lower --top-k.")
    title_font, font, small = (_font(font_file, size) for size in (26, 16, 13))
    columns = min(_COLUMNS, max(map(len, found)))
    width = max(2 * _MARGIN + columns * (_CELL + _GAP) - _GAP, 560)
    heads = [_wrapped(title, title_font, width - 2 * _MARGIN - (96 if path else 0)) for title, path in queries]
    head_heights = [max(34 * len(lines) + 34, 92 if path else 0) for lines, (_, path) in zip(heads, queries)]
    grid_heights = [-(-len(hits) // columns) * (_CELL + _CAPTION + _GAP) for hits in found]
    height = sum(head_heights) + sum(grid_heights) + _GAP * (len(queries) - 1) + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw, top, absent = ImageDraw.Draw(sheet), _MARGIN, 0
    for (_, path), lines, head, grid, hits in zip(queries, heads, head_heights, grid_heights, found):
        left = _MARGIN
        if path:
            _paste_thumbnail(sheet, draw, path, (left, top, 80), max_image_pixels, small)
            left += 96
        for number, line in enumerate(lines):
            draw.text((left, top + 34 * number), line, font=title_font, fill=_INK)
        draw.text((left, top + 34 * len(lines) + 2), f"best {len(hits)} {below}", font=small, fill=_GREY)
        top += head
        for place, hit in enumerate(hits):
            x = _MARGIN + place % columns * (_CELL + _GAP)
            y = top + place // columns * (_CELL + _CAPTION + _GAP)
            absent += not _paste_thumbnail(sheet, draw, hit.name, (x, y, _CELL), max_image_pixels, small)
            draw.text((x, y + _CELL + 5), str(hit.rank), font=font, fill=_ACCENT)
            draw.text((x + _CELL, y + _CELL + 5), f"{hit.score:.3f}", font=font, fill=_INK, anchor="ra")
            name = _shortened(os.path.basename(hit.name), small, _CELL)
            draw.text((x, y + _CELL + 26), name, font=small, fill=_GREY)
        top += grid + _GAP
    return sheet, absent


def characters_that_lack(texts: Iterable[str], font_file: str | None = None) -> str:
    """The characters of the texts, each once, that the font draws as it draws what no font has."""
    font = _font(font_file, 16)
    if not isinstance(font, ImageFont.FreeTypeFont):
        return ""

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = font.getmask(character)
        return mask.size, bytes(mask)

    nothing = drawn("\U0010ffff")
    characters = dict.fromkeys(character for text in texts for character in text if character.isprintable())
    return "".join(c for c in characters if not c.isspace() and drawn(c) == nothing)


def _paste_thumbnail(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    path: str,
    square: tuple[int, int, int],
    max_image_pixels: int | None,
    font: Font,
) -> bool:
    """Draws the picture, fitted into `square` (left, top, side), or a placeholder; returns whether it was there."""
    left, top, side = square
    box = (left, top, left + side - 1, top + side - 1)
    try:
        picture = ImageOps.contain(read_picture(path, max_image_pixels), (side, side))
    except UnreadablePicture:
        draw.rectangle(box, fill=_PALE, outline=(200, 202, 206))
        words = "cannot be read" if os.path.exists(path) else "not found"
        draw.text((left + side // 2, top + side // 2), words, font=font, fill=_GREY, anchor="mm")
        return False
    draw.rectangle(box, fill=_PALE)
    sheet.paste(picture, (left + (side - picture.width) // 2, top + (side - picture.height) // 2))
    return True


def check_font(file: str | None) -> None:
    """ValueError unless a sheet can be written with this font, see `contact_sheet`."""
    _font(file, 12)


def _font(file: str | None, size: int) -> Font:
    if file is None:
        return ImageFont.load_default(size)
    try:
        return ImageFont.truetype(file, size)
    except OSError as error:
        raise ValueError(f"--font {file}: expected a TrueType or OpenType file ({reason_of(error)}).") from error


def _wrapped(text: str, font: Font, width: int) -> list[str]:
    """At most three lines that fit into `width` pixels."""
    text = " ".join(text.split())
    letters = max(8, int(width / max(1.0, font.getlength(text) / max(1, len(text))) * 0.95))
    return textwrap.wrap(text, letters, max_lines=3, placeholder=" ...") or [" "]


def _shortened(text: str, font: Font, width: int) -> str:
    """The text, or its beginning and end with dots between, where it is wider than `width` pixels."""
    kept = len(text)
    while kept > 2 and font.getlength(shown := _middle_out(text, kept)) > width:
        kept -= 1
    return shown if kept > 2 else text[:2]


def _middle_out(text: str, kept: int) -> str:
    return text if kept >= len(text) else f"{text[: (kept + 1) // 2]}...{text[-(kept // 2) :]}"
