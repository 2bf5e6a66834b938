"""Checkpoints of Transformers that a step runs: their description, and what identifies them."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from pyramidclip_hf.files import visible
from pyramidclip_hf.hub_reach import asking_hub
from pyramidclip_hf.loading import check_weights
from pyramidclip_hf.saved_folders_pyramidclip import damage_named, where_the_model_is


@contextmanager
def checkpoint_expected(name: str, flag: str) -> Iterator[None]:
    """Around what reads a checkpoint: says in one sentence what is wrong with `name`, which `flag` gave.

    Raises:
        ValueError: neither a folder here nor on the Hub, or the Hub cannot be reached, or files are missing or cut.
    """
    if os.path.isdir(name):
        check_weights(name, f"{flag} {name}")
    with asking_hub(), damage_named(name, f"{flag} {name}"):
        try:
            yield
        except OSError as error:
            raise _no_checkpoint(name, flag, error) from error


# Any: each kind of model has a configuration of its own.
def checkpoint_config(name: str, revision: str | None, flag: str) -> Any:
    """The configuration of a checkpoint. Raises `ValueError` where there is none, or none of a known kind."""
    with asking_hub(), damage_named(name, f"{flag} {name}"):
        try:
            return AutoConfig.from_pretrained(name, revision=revision)
        except (OSError, ValueError) as error:
            raise _no_checkpoint(name, flag, error) from error


def _no_checkpoint(name: str, flag: str, error: Exception) -> ValueError:
    is_folder = os.path.isdir(name)
    here = "a folder that cannot be used" if is_folder else "no folder here, and the Hub does not give it"
    with asking_hub() as out_of_reach:
        reason = (not is_folder and out_of_reach) or str(error).splitlines()[0]
    return ValueError(
        f"{flag} {name} is {here} ({reason}): expected a folder that save_pretrained wrote, or the "
        f"name of a checkpoint that is in the cache or can be fetched.{where_the_model_is(name)}"
    )


def checkpoint_content(name: str, described: PreTrainedConfig) -> str:
    """What identifies a checkpoint: a hash of its files for a folder, the commit for a Hub name."""
    if os.path.isdir(name):
        digest = hashlib.sha256()
        for path in visible(name):
            if path.is_file() and path.suffix.lower() != ".md":
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]
    return getattr(described, "_commit_hash", None) or name
