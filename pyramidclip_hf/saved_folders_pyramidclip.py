# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""A saved folder that cannot be loaded: which of its files is damaged, or where the model of a run's folder lies."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeAlias

from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

Folder: TypeAlias = str | os.PathLike[str]

# The largest vocabularies are a tenth of it.
MAX_JSON_BYTES = 256 << 20
EXPECTED = "Expected a folder that save_pretrained of a PyramidCLIPModel and of its processor wrote"
_AGAIN = "copy or download it again (out of the Hub's cache, delete it first)."
# What a file begins with that a clone without Git LFS has in place of a large one.
_LFS = b"version https://git-lfs"
_WEIGHTS, _INDEX, _TOKENIZER = "model.safetensors", "model.safetensors.index.json", "tokenizer.json"
_SETTINGS = (
    "config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    _TOKENIZER,
    "vocab.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


class LoadedFromFolder:
    """First of the bases of what `from_pretrained` loads: its errors name the damaged file, or the folder meant."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Self:
        """As in the other base class.

        Raises:
            FileNotFoundError: the folder is that of a run, which holds the saved one.
            ValueError: a file of the folder is damaged; the message names it.
        """
        with faults_named(pretrained_model_name_or_path, kwargs.get("subfolder")):
            return super().from_pretrained(  # type: ignore[misc]  # of the base that stands behind
                pretrained_model_name_or_path, *args, **kwargs
            )


@contextmanager
def faults_named(name: Any, subfolder: str | None = None, weights: bool = False) -> Iterator[None]:
    """Around what loads a saved folder, see `LoadedFromFolder`.

    Args:
        name: as `from_pretrained` takes it; of what is no folder here nothing is said.
        subfolder: of the folder, where the files lie.
        weights: whether they are read, too.
    """
    if not isinstance(name, (str, os.PathLike)) or not os.path.isdir(name):
        yield
        return
    folder = Path(name, subfolder or "")
    told = "" if any((folder / file).is_file() for file in _SETTINGS) else where_the_model_is(folder)
    if told:
        raise FileNotFoundError(f"{folder}: no config.json there. {EXPECTED}.{told}")
    with damage_named(folder, weights=weights):
        yield


@contextmanager
def damage_named(folder: Folder, called: str = "", weights: bool = False) -> Iterator[None]:
    """Around what reads a saved folder of any kind: an error there names the file that is damaged, if one is.

    Args:
        folder: that is read.
        called: what it was asked for by, for the message.
        weights: whether they are read, too.

    Raises:
        ValueError: in place of what was raised inside.
    """
    try:
        yield
    except Exception as error:  # on damaged files, the readers raise almost anything
        told = damaged_settings(folder) or (damaged_weights(folder) if weights else "")
        if not told:
            raise
        raise ValueError(f"{called}: {told}" if called else told) from error


def where_the_model_is(folder: Folder) -> str:
    """A sentence on the saved folder inside a run's folder, with a blank in front; empty where there is none."""
    for name in ("final", "model"):
        if Path(folder, name, "config.json").is_file():
            return f" {Path(folder, name)} is such a one."
    saved = sorted(Path(folder).glob("checkpoints/step-*/model/config.json"))
    return (
        f" The run in it has not come to its end; of its checkpoints {saved[-1].parent} is such a one." if saved else ""
    )


def damaged_settings(folder: Folder) -> str:
    """What is wrong with the first damaged one of the small files beside the weights, with its name; empty: nothing."""
    return next(filter(None, (damaged_json(Path(folder, name)) for name in _SETTINGS)), "")


def damaged_json(path: Path) -> str:
    """What is wrong with a file that should hold a JSON mapping, where it is there; empty: nothing."""
    if not path.is_file():  # also where it is a FIFO or a device
        return ""
    if path.stat().st_size > MAX_JSON_BYTES:
        return f"{path} has more than {MAX_JSON_BYTES} bytes, which none of ours has."
    content = path.read_bytes()
    if content.startswith(_LFS):
        return _left_by_lfs(path)
    try:
        if not isinstance(json.loads(content), dict):
            raise ValueError("something else")
        if path.name == _TOKENIZER:
            Tokenizer.from_file(os.fspath(path))
    except (ValueError, RecursionError) as error:
        return f"{path} is no JSON mapping ({error}), so cut short or damaged; {_AGAIN}"
    except Exception as error:  # the tokenizer's own have no other type
        return f"{path} is no tokenizer ({error}), so damaged or of another version; {_AGAIN}"
    return ""


def damaged_weights(folder: Folder) -> str:
    """What the headers of a model's files of weights, which say how long each has to be, show; empty: nothing."""
    names, index = [_WEIGHTS], Path(folder, _INDEX)
    if not Path(folder, _WEIGHTS).is_file() and index.is_file():
        if told := damaged_json(index):
            return told
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (LookupError, TypeError, AttributeError) as error:
            return f"{index} is damaged ({error}); {_AGAIN}"
    for path in (Path(folder, str(name)) for name in names):
        if not path.is_file():
            if index.is_file():
                return f"{path} is not there, and the index of the weights names it; {_AGAIN}"
            continue
        try:
            with safe_open(path, "pt"):
                continue
        except (SafetensorError, OSError, ValueError) as error:
            with open(path, "rb") as file:
                if file.read(len(_LFS)) == _LFS:
                    return _left_by_lfs(path)
            return f"{path}, {path.stat().st_size:,} bytes, is cut short or damaged ({error}); {_AGAIN}"
    return ""


def _left_by_lfs(path: Path) -> str:
    return f"{path} is what Git LFS left in its place: `git lfs pull` fetches it."
