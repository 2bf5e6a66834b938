"""The flags of the preparation commands: the fields of dataclasses."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from pyramidclip_command import CommandParser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Shows the docstring as it is written, and the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str:
        shown = action.help or ""
        is_value = action.option_strings and action.default not in (None, [], argparse.SUPPRESS)
        return f"{shown} (default: %(default)s)" if is_value and "default" not in shown else shown


class _DataclassParser(CommandParser, HfArgumentParser):
    """Flags from dataclasses, errors and help as every command has them."""


# Any: a tuple of instances of the classes in `kinds`, which the caller unpacks and names.
def parse_dataclasses(words: Sequence[str], description: str | None, *kinds: type) -> tuple[Any, ...]:
    """Parses the words of a command into one instance of each dataclass.

    Args:
        words: the words; both `--max-pixels` and `--max_pixels` are understood.
        description: the command's docstring, which `--help` shows.
        *kinds: dataclasses whose fields are the flags.

    Raises:
        ValueError: a word is no flag, or its value is not what the field takes.
    """
    parser = _DataclassParser(kinds, description=description, formatter_class=_Help)
    values = vars(parser.parse_args(words))
    return tuple(kind(**{field.name: values[field.name] for field in fields(kind)}) for kind in kinds)
