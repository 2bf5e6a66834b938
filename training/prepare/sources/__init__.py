"""Where pairs come from: WebDataset tars, tables beside pictures, Hub datasets. Used by `training.prepare.pack`.

A source is cut into parts, each of which becomes one shard (or a row of them, where its length is unknown before it
is read). It gives `Raw` samples in a fixed order; what a row lacks is said in `Raw.fault` and never guessed.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from training.data.remote import is_url
from training.prepare.sources.hub import HubSource
from training.prepare.sources.raw import Part, Raw
from training.prepare.sources.tables import TABLE_SUFFIXES, TableSource
from training.prepare.sources.tars import TarSource

__all__ = ["HubSource", "Part", "Raw", "SourceArguments", "TableSource", "TarSource", "open_source"]


@dataclass
class SourceArguments:
    """What to read."""

    input: list[str] = field(
        default_factory=list,
        metadata={"help": "Tars, tables (.jsonl .csv .tsv .parquet), folders of either, or one Hub dataset name."},
    )
    picture_root: str | None = field(
        default=None, metadata={"help": "Folder that the paths of a table start from (default: the table's own)."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column of the picture: path or bytes (default: image, file_name, path, jpg)."}
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "Column of the text (default: caption, text, alt, title, txt)."}
    )
    key_column: str | None = field(
        default=None, metadata={"help": "Column with a unique name of each row (default: rows are numbered)."}
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    subset: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    streaming: bool = field(default=True, metadata={"help": "Read a Hub dataset as a stream, without a copy on disk."})
    samples_per_shard: int = field(default=10_000, metadata={"help": "Rows to a shard (tars keep their own size)."})


def open_source(arguments):
    """The `TarSource`, `TableSource` or `HubSource` that `arguments` names.

    Raises `ValueError` where nothing or a mixture is named, `FileNotFoundError` for a path that is not there.
    """
    if not arguments.input:
        raise ValueError("--input is missing: expected tars, tables, folders of either, or the name of a Hub dataset")
    if arguments.samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {arguments.samples_per_shard}, expected 1 or more")
    first = arguments.input[0]
    if len(arguments.input) == 1 and _is_hub_name(first):
        return HubSource(arguments)
    files = _files(arguments.input)
    tars = [name for name in files if name.endswith(".tar")]
    if len(tars) == len(files):
        return TarSource(files)
    if not tars:
        return TableSource(files, arguments)
    raise ValueError(f"--input names {len(tars)} tars and {len(files) - len(tars)} tables: pack them into two folders")


def _is_hub_name(name):
    if os.path.exists(name):
        return (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists()
    return (
        not is_url(name)
        and name.count("/") <= 1
        and not name.endswith((".tar", *TABLE_SUFFIXES))
        and name[:1] not in "./~"
    )


def _files(inputs):
    files = []
    for name in inputs:
        if is_url(name):
            files.append(name)
        elif os.path.isdir(name):
            found = sorted(str(p) for p in Path(name).iterdir() if p.suffix == ".tar")
            found = found or sorted(str(p) for p in Path(name).iterdir() if p.suffix.lower() in TABLE_SUFFIXES)
            if not found:
                raise FileNotFoundError(f"{name} holds no *.tar and no table ({', '.join(TABLE_SUFFIXES)})")
            files += found
        elif os.path.exists(name):
            if not name.lower().endswith((".tar", *TABLE_SUFFIXES)):
                raise ValueError(f"{name}: expected .tar or a table ({', '.join(TABLE_SUFFIXES)})")
            files.append(name)
        else:
            raise FileNotFoundError(f"{name} is not there")
    return files
