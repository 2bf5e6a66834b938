"""A checkpoint's own record, run.json: where the run was, whose it is, and a checksum of every file, of itself too.

The checksums find what a disk or a copy did to a file, not what somebody did on purpose: XXH3, with 128 bits, because
it costs little beside reading (docs/training.md has the figures).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyramidclip_command import Failure
from pyramidclip_hf.files import json_text

FORMAT = 2
WITHOUT_CHECKSUMS = 1
NAME, CHECKSUM, OF_ITSELF = "run.json", "xxh3_128", "record"


class CheckpointError(Failure):
    """A checkpoint could not be written or read; the message says which file, why, and what is still there."""


class DamagedCheckpoint(CheckpointError):
    """A file of a checkpoint is missing or is not what was written."""


def sum_of(path: Path, size: int | None = None) -> dict[str, Any]:
    """`bytes` and `xxh3_128` of a file, or of its first `size` bytes.

    Raises:
        OSError: It cannot be read.
    """
    import xxhash

    total, count, buffer = xxhash.xxh3_128(), 0, memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size is None or count < size:
            got = file.readinto(buffer if size is None else buffer[: size - count])
            if not got:
                break
            total.update(buffer[:got])
            count += got
    return {"bytes": count, CHECKSUM: total.hexdigest()}


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with its own checksum under "record"."""
    import xxhash

    content = {name: value for name, value in record.items() if name != OF_ITSELF}
    text = json_text(content, sort_keys=True, separators=(",", ":"))
    return {**content, OF_ITSELF: xxhash.xxh3_128_hexdigest(text.encode())}


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes run.json, with the checksum of itself."""
    content = json.loads(json_text({"format": FORMAT, **record}))  # the checksum is of what is read
    text = json_text(sealed(content), indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read_record(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        DamagedCheckpoint: It is missing, or is not what was written.
        CheckpointError: Another version wrote it, in a form that this one does not know.
    """
    path = folder / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path}: cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(record, dict):
        raise DamagedCheckpoint(f"{path}: expected an object, got {type(record).__name__}")
    if record.get("format") == WITHOUT_CHECKSUMS and OF_ITSELF not in record:
        return record
    if record.get(OF_ITSELF) != sealed(record)[OF_ITSELF]:
        raise DamagedCheckpoint(f"{path}: is not what was written: its checksum differs")
    if record["format"] != FORMAT:
        raise CheckpointError(f"{path}: written in format {record['format']}, this version reads format {FORMAT}")
    return record


def find_damage(folder: Path, record: Mapping[str, Any], names: Iterable[str] | None = None) -> str | None:
    """What is wrong with the first damaged file of a checkpoint; None: nothing, or its version wrote no checksums.

    Args:
        folder: The checkpoint.
        record: Of `read_record`.
        names: Of the files to look at, relative to `folder`; None: all.
    """
    files: dict[str, dict[str, Any]] = record.get("files", {})
    for name in sorted(files if names is None else set(names) & set(files)):
        written, path = files[name], folder / name
        try:
            found = sum_of(path)
        except OSError as error:
            return f"{path}: cannot be read: {type(error).__name__}: {error}"
        if found["bytes"] != written["bytes"]:
            return f"{path}: has {found['bytes']} bytes, {written['bytes']} were written"
        if found != written:
            return f"{path}: is not what was written: its checksum differs"
    return None


def is_whole(folder: Path) -> bool:
    """Whether a folder is a checkpoint of which every file is as it was written."""
    try:
        record = read_record(folder)
    except CheckpointError:
        return False
    return record["format"] == FORMAT and find_damage(folder, record) is None
