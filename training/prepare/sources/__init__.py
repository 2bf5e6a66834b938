"""Where pairs come from: WebDataset tars, tables beside pictures, Hub datasets. Used by `training.prepare.pack`.

A source is cut into parts, each of which becomes one shard (or a row of them, where its length is unknown before it
is read). It gives `RawPair`s in a fixed order; what a row lacks is said in their `fault` and never guessed.
"""

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from pyramidclip_hf.files import contents_of, visible
from training.data.remote import is_url
from training.data.sources import shard_names
from training.prepare.sources.hub import HubSource
from training.prepare.sources.pairs import Fault, PairSource, RawPair, SourcePart
from training.prepare.sources.tables import TableSource
from training.prepare.sources.tars import TarSource
from training.prepare.steps.flags import PAIRS, TABLE_SUFFIXES, SourceArguments

__all__ = [
    "TABLE_SUFFIXES",
    "Fault",
    "PairSource",
    "RawPair",
    "SourceArguments",
    "SourcePart",
    "expand_inputs",
    "open_source",
    "refuse_own_folder",
]


def expand_inputs(inputs: Sequence[str]) -> list[str]:
    """The words of --input with patterns, ranges, lists of shards and remote folders replaced by what they name.

    Raises:
        FileNotFoundError: a pattern fits no file, or what a list names is not there.
        ValueError: a list or range cannot be read.
    """
    expanded = []
    for name in inputs:
        if name.endswith(".txt") or "{" in name or (is_url(name) and not name.lower().endswith(TABLE_SUFFIXES)):
            expanded += shard_names(name)
            continue
        found = sorted(glob.glob(name)) if not is_url(name) and glob.has_magic(name) else [name]
        if not found:
            raise FileNotFoundError(f"--input {name} matches no file")
        expanded += found
    return expanded


def refuse_own_folder(inputs: Sequence[str], output_dir: str) -> None:
    """Raises `ValueError` where the output would go among the input."""
    output = Path(output_dir).resolve()
    for name in inputs:
        own = None if is_url(name) else Path(name).resolve()
        if own == output or (own is not None and name.endswith(".tar") and output in own.parents):
            raise ValueError(f"--output-dir {output_dir} holds the input {name}: choose another folder")


def open_source(arguments: SourceArguments) -> PairSource:
    """The source that `arguments` names.

    Raises:
        ValueError: nothing is named, or a mixture, or what is no source.
        FileNotFoundError: a path is not there.
    """
    if not arguments.input:
        raise ValueError(f"--input is missing: expected {PAIRS}, or the name of a Hub dataset")
    if arguments.samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {arguments.samples_per_shard}, expected 1 or more")
    first = arguments.input[0]
    if len(arguments.input) == 1 and is_hub_name(first):
        return HubSource(arguments)
    files = _files(arguments.input)
    tars = [name for name in files if name.endswith(".tar")]
    if len(tars) == len(files):
        return TarSource(files)
    if not tars:
        return TableSource(files, arguments)
    raise ValueError(f"--input names {len(tars)} tars and {len(files) - len(tars)} tables: pack them into two folders")


def is_hub_name(name: str) -> bool:
    """Whether a source is one of the Hub: what `save_to_disk` wrote, or a name that is no path here."""
    if os.path.exists(name):
        return (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists()
    return (
        not is_url(name)
        and name.count("/") <= 1
        and not name.endswith((".tar", *TABLE_SUFFIXES))
        and name[:1] not in "./~"
    )


def _files(inputs: Sequence[str]) -> list[str]:
    files = []
    for name in inputs:
        if is_url(name):
            files.append(name)
        elif os.path.isdir(name):
            files += _files_of(name)
        elif os.path.exists(name):
            if not name.lower().endswith((".tar", *TABLE_SUFFIXES)):
                raise ValueError(f"{name}: expected .tar, or a manifest or table ({', '.join(TABLE_SUFFIXES)})")
            if not os.path.isfile(name):
                raise ValueError(f"{name} is a device or FIFO, expected a file")
            files.append(name)
        else:
            raise FileNotFoundError(f"{name} is not there: expected {PAIRS}")
    return files


def _files_of(folder: str) -> list[str]:
    there = [path for path in visible(folder) if path.is_file()]
    found = [str(path) for path in there if path.suffix == ".tar"]
    found = found or [str(path) for path in there if path.suffix.lower() in TABLE_SUFFIXES]
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no *.tar and no table ({', '.join(TABLE_SUFFIXES)}): {contents_of(folder)}. Name pictures "
            "and their captions in a table and give that"
        )
    return found
