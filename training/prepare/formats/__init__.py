"""Region features that other programs stored: scene-graph-benchmark, Oscar/VinVL, LXMERT, and stores written here.

A format gives the `Detections` of one row. What a row lacks makes it a `BadRow`; what a whole format lacks is refused
with the reason, or listed in `lacks`; nothing is made up. Nothing is unpickled.

A new format is a class of the form of `RegionFormat`, with a `FileFormat` to open it, in a file of its own here, and
its name in `FORMATS`; its flags, where it has some, stand in `training.prepare.steps.flags`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from training.prepare.formats.lxmert import LxmertRows
from training.prepare.formats.oscar import OscarRows
from training.prepare.formats.protocols import FileFormat, RegionFormat
from training.prepare.formats.scene_graph import SceneGraphRows
from training.prepare.formats.several import JoinedRows
from training.prepare.formats.store import StoreRows
from training.prepare.formats.tsv import FormatOptions, Head, Size
from training.prepare.formats.tsv_index import BadRow, TsvIndex
from training.prepare.steps.flags import FormatFlags

__all__ = ["FORMATS", "BadRow", "FormatOptions", "RegionFormat", "Size", "open_format", "open_formats"]


FORMATS: tuple[FileFormat, ...] = (StoreRows, OscarRows, SceneGraphRows, LxmertRows)

_UNREADABLE = {
    ".pth": "torch.save of pickled objects",
    ".pt": "torch.save of pickled objects",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".npz": "the arrays of bottom-up-attention.pytorch, whose names and scores are a pickled dictionary",
    ".npy": "the pairs of MMF, whose boxes and names are a pickled dictionary",
}


def open_formats(paths: Sequence[str], key_pattern: str | None = None, *flags: FormatFlags) -> RegionFormat:
    """The reader of all inputs, one after the other.

    Args:
        paths: files or folders of one format.
        key_pattern: its group is the key within a row's name; None: the name itself.
        *flags: of the formats.

    Raises:
        ValueError: as `open_format`; or flags and inputs differ in number, or the inputs are of several formats.
    """
    for own in flags:
        own.check(len(paths))
    pieces = [open_format(path, key_pattern, FormatOptions(*flags, number=n)) for n, path in enumerate(paths)]
    return JoinedRows(pieces)


_KNOWN = (
    "scene-graph-benchmark predictions.tsv (key, JSON with objects), Oscar features.tsv (key, number, base64), Oscar "
    "caption features (key, JSON with features), LXMERT (10 columns)"
)


def open_format(path: str | Path, key_pattern: str | None = None, options: FormatOptions | None = None) -> RegionFormat:
    """The reader of one input, told by its content.

    Args:
        path: file or folder.
        key_pattern: its group is the key within a row's name; None: the name itself.
        options: the flags of the formats.

    Raises:
        ValueError: the file needs unpickling, is of no known format or of one that lacks the scores or names that the
            best regions are chosen and named by, or a companion file is missing.
        FileNotFoundError: it is not there.
    """
    path = Path(path)
    if path.suffix in _UNREADABLE:
        raise ValueError(
            f"{path} is not read: {path.suffix} files are {_UNREADABLE[path.suffix]}, and unpickling runs whatever "
            "code the file holds. Write it as TSV (LXMERT's columns, docs/prepare.md) with the program that made it"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if not path.is_dir() and not path.is_file():
        raise ValueError(f"{path} is a device or FIFO, expected a file or folder")
    head = Head(path) if path.is_dir() else _head_of(path, key_pattern)
    for known in FORMATS:
        if known.recognises(head):
            return known.open(head, options or FormatOptions())
    raise ValueError(f"{path}: its first row has {len(head.columns)} columns and is none of: {_KNOWN}")


def _head_of(path: Path, key_pattern: str | None) -> Head:
    """The beginning of a file. Raises `ValueError` where no format could be told by it."""
    index = TsvIndex(path, key_pattern)
    if not len(index):
        raise ValueError(f"{path} has no row that begins with a key and a tab: expected one of {_KNOWN}")
    try:
        columns = index.columns(0)
    except BadRow as bad:
        raise ValueError(f"{path}, line {index.line(0)}: {bad}") from None
    if len(columns) == 6:
        raise ValueError(
            f"{path} has the six columns of bottom-up-attention: boxes and features, but no scores and no class names, "
            "so neither the most confident regions nor the tags can be had from it. Extract again with LXMERT's columns"
        )
    try:
        record = json.loads(columns[-1]) if len(columns) == 2 else None
    except (ValueError, RecursionError):
        record = None
    return Head(path, key_pattern, index, columns, record)
