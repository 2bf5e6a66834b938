"""From a row of a table or of a Hub dataset to picture, caption and the rest."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from pyramidclip_hf.files import json_text, reason_of
from training.data.records import BadSample
from training.data.remote import is_url
from training.prepare.sources.pairs import MAX_PICTURE_BYTES, REMOTE_PICTURE, Fault, RawPair
from training.prepare.steps.flags import USUAL_COLUMNS, SourceArguments


class Columns(NamedTuple):
    """Which columns hold what; `key` is None where rows are numbered."""

    image: str
    caption: str
    key: str | None


def choose_columns(names: Collection[str], arguments: SourceArguments, where: str) -> Columns:
    """The columns that the arguments name, or that are called as usual.

    Args:
        names: the columns that are there.
        arguments: may name some.
        where: the file, for errors.

    Raises:
        ValueError: one is missing; it names those that are there.
    """
    chosen = {"key": arguments.key_column}
    for role, known in USUAL_COLUMNS.items():
        asked = getattr(arguments, f"{role}_column")
        chosen[role] = asked or next((name for name in known if name in names), None)
    missing = [f"--{role}-column" for role, name in chosen.items() if name is None and role != "key"]
    absent = [name for name in chosen.values() if name is not None and name not in names]
    image, caption = chosen["image"], chosen["caption"]
    if image is None or caption is None or absent:
        wanted = f"give {', '.join(missing)}" if missing else f"there is no column {', '.join(absent)}"
        told = ", ".join(map(str, names))
        raise ValueError(f"{where} has the columns {told}: {wanted}{parted_otherwise(names)}")
    return Columns(image, caption, chosen["key"])


def parted_otherwise(names: Collection[str]) -> str:
    """A sentence to put behind what went wrong where one name looks as several between other signs, else nothing."""
    other = next((mark for name in names for mark in ";\t,|" if len(names) == 1 and mark in str(name)), None)
    return f". Its columns seem to be parted by {other!r}: .csv is read with ',', .tsv with '\\t'" if other else ""


def key_text(value: object) -> str | None:
    """A cell as a key; an empty one is none."""
    return None if value is None or value == "" else str(value)


def fill(raw: RawPair, row: Mapping[str, object], columns: Columns, root: Path | None) -> None:
    """Puts picture, caption and the remaining columns of a table row into `raw`.

    Args:
        raw: gets a `fault` where the row lacks its key or its picture; of one whose picture is a URL the rest as well.
        row: {column: value}.
        columns: which is which.
        root: the folder that paths start from; None in Hub datasets, where a path may be a URL.
    """
    rest = {name: value for name, value in row.items() if name not in columns}
    if columns.key:
        raw.key = key_text(row.get(columns.key))
        if raw.key is None:
            raw.fault = Fault("no-key", f"column {columns.key} is empty")
            return
    try:
        raw.picture, path = _picture(row.get(columns.image), root)
        if path is not None:
            rest.setdefault("path", path)
        roi = rest.get("roi")
        if isinstance(roi, str):
            del rest["roi"]
            raw.members["roi.npy"] = _read_file(root, roi, "roi")
    except BadSample as bad:
        raw.fault = Fault(bad.reason, bad.detail)
        if bad.reason != REMOTE_PICTURE:
            return
    caption = row.get(columns.caption)
    if isinstance(caption, list):
        rest["captions"] = caption
    elif caption is not None and not (isinstance(caption, float) and math.isnan(caption)):
        raw.members["txt"] = str(caption).encode("utf-8", "surrogatepass")
    record = {str(name): _plain(value) for name, value in rest.items()}
    if record:
        text = json_text(record, ensure_ascii=False, separators=(",", ":"))
        raw.members["json"] = text.encode("utf-8", "surrogatepass")


def _picture(value: object, root: Path | None) -> tuple[bytes, str | None]:
    """The bytes of a picture and its path: from bytes, the Hub's {bytes, path}, or a path. Raises `BadSample`."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"], value.get("path")
        value = value.get("path")
        if root is None and isinstance(value, str) and is_url(value):  # a picture folder on the Hub, streamed
            return _fetch(value), value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value), None
    if not isinstance(value, str) or not value:
        raise BadSample(None, None, "no-image", f"expected a path or bytes, found {type(value).__name__}")
    if is_url(value):
        raise BadSample(
            None, None, REMOTE_PICTURE, f"{value[:200]}: fetch pictures first, for instance with img2dataset"
        )
    return _read_file(root, value, "image"), value


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise BadSample(None, url, "no-image", f"{url[:200]}: {error}") from None


def _read_file(root: Path | None, name: str, what: str) -> bytes:
    path = Path(root or ".") / name
    try:
        stat = path.stat()
        if not S_ISREG(stat.st_mode):
            raise BadSample(None, str(path), f"no-{what}", f"{name} is not a file with contents")
        size = stat.st_size
        if size > MAX_PICTURE_BYTES:
            raise BadSample(None, str(path), f"{what}-too-large", f"{size} bytes, at most {MAX_PICTURE_BYTES}")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadSample(None, str(path), f"no-{what}", f"{name}: {reason_of(error)}") from None


def _plain(value: object) -> object:
    """A value as JSON knows it: NaN is null, bytes and dates become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
