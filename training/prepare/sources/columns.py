"""From a row of a table or of a Hub dataset to picture, caption and the rest."""

import json
import math
from pathlib import Path

from training.data.records import BadSample
from training.data.remote import is_url
from training.prepare.sources.raw import MAX_PICTURE_BYTES

_KNOWN_COLUMNS = {
    "image": ("image", "file_name", "path", "jpg", "png", "webp", "img", "image_path"),
    "caption": ("caption", "text", "alt", "title", "txt", "TEXT"),
}


def choose_columns(names, arguments, where):
    """{"image": column, "caption": column, "key": column or None}. Raises `ValueError` naming the columns that are
    there."""
    chosen = {"key": arguments.key_column}
    for role, known in _KNOWN_COLUMNS.items():
        asked = getattr(arguments, f"{role}_column")
        chosen[role] = asked or next((name for name in known if name in names), None)
    missing = [f"--{role}_column" for role, name in chosen.items() if name is None and role != "key"]
    absent = [name for name in chosen.values() if name is not None and name not in names]
    if missing or absent:
        wanted = f"give {', '.join(missing)}" if missing else f"there is no column {', '.join(absent)}"
        raise ValueError(f"{where} has the columns {', '.join(map(str, names))}: {wanted}")
    return chosen


def key_text(value):
    return None if value is None or value == "" else str(value)


def fill(raw, row, columns, root):
    """Puts picture, caption and the remaining columns of a table row into `raw`."""
    rest = {
        name: value for name, value in row.items() if name not in (columns["image"], columns["caption"], columns["key"])
    }
    if columns["key"]:
        raw.key = key_text(row.get(columns["key"]))
        if raw.key is None:
            raw.fault = ("no-key", f"column {columns['key']} is empty")
            return
    try:
        raw.picture, path = _picture(row.get(columns["image"]), root)
        if path is not None:
            rest.setdefault("path", path)
        if isinstance(rest.get("roi"), str):
            raw.members["roi.npy"] = _read_file(root, rest.pop("roi"), "roi")
    except BadSample as bad:
        raw.fault = (bad.reason, bad.detail)
        return
    caption = row.get(columns["caption"])
    if isinstance(caption, list):
        rest["captions"] = caption
    elif caption is not None and not (isinstance(caption, float) and math.isnan(caption)):
        raw.members["txt"] = str(caption).encode("utf-8", "surrogatepass")
    record = {str(name): _plain(value) for name, value in rest.items()}
    if record:
        raw.members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode(
            "utf-8", "surrogatepass"
        )


def _picture(value, root):
    """The bytes of a picture and its path: from bytes, the Hub's {bytes, path}, or a path. Raises `BadSample`."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return value["bytes"], value.get("path")
        value = value.get("path")
        if root is None and isinstance(value, str) and is_url(value):  # a picture folder on the Hub, streamed
            return _fetch(value), value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), None
    if not isinstance(value, str) or not value:
        raise BadSample(None, root, "no-image", f"expected a path or bytes, found {type(value).__name__}")
    if is_url(value):
        raise BadSample(
            None, root, "remote-picture", f"{value[:200]}: fetch pictures first, for instance with img2dataset"
        )
    return _read_file(root, value, "image"), value


def _fetch(url):
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read(MAX_PICTURE_BYTES + 1)
    except OSError as error:
        raise BadSample(None, url, "no-image", f"{url[:200]}: {error}") from None


def _read_file(root, name, what):
    path = Path(root or ".") / name
    try:
        if path.stat().st_size > MAX_PICTURE_BYTES:
            raise BadSample(
                None, path, f"{what}-too-large", f"{path.stat().st_size} bytes, at most {MAX_PICTURE_BYTES}"
            )
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise BadSample(None, path, f"no-{what}", f"{name}: {error}") from None


def _plain(value):
    """A value as JSON knows it: NaN is null, bytes and dates become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
