"""The flags of the preparation commands: the fields of dataclasses."""

import argparse
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers import HfArgumentParser

from pyramidclip_command import CommandParser


class _DataclassParser(CommandParser, HfArgumentParser):
    """Flags from dataclasses, errors and help as every command has them."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """The flags of one dataclass, in a group that its docstring's first line heads; shown with dashes alone."""
        before = len(self._actions)
        super()._add_dataclass_arguments(dtype)
        title = (dtype.__doc__ or "").partition("\n")[0].rstrip(".")
        group = self.add_argument_group(title[:1].lower() + title[1:])
        for action in self._actions[before:]:
            self._optionals._group_actions.remove(action)
            group._group_actions.append(action)
            flag = action.option_strings[-1]
            if action.const is True or isinstance(action, argparse._StoreFalseAction):
                action.metavar = "BOOL"
            if flag.startswith("--no-") and action.dest != flag[2:].replace("-", "_"):
                action.help = argparse.SUPPRESS  # beside the flag that it is the contrary of
            action.option_strings = [flag]


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
    parser = _DataclassParser(kinds, description=description)
    values = vars(parser.parse_args(words))
    return tuple(kind(**{field.name: values[field.name] for field in fields(kind)}) for kind in kinds)
