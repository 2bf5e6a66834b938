"""Settings out of a YAML file and the words of a command line; the help of a command.

YAML keys are the fields of a dataclass; flags are the same names with dashes (underscores are taken as well) and win
over the file; mappings are JSON on the command line. A key or flag that does not exist is an error that names its
nearest neighbours. A file may begin with what another one says, and change it, key by key:

    extends: base.yaml    # beside this file; it may extend a further one
    epochs: 32
    max_steps:            # empty: the default

Own code, as neither jsonargparse 4.53 (no dashes, no near names, lists in brackets, no file name in an error) nor tyro
1.0 (no YAML, mappings not as JSON, errors in frames) does what is above without as much of it.
"""

import argparse
import dataclasses
import difflib
import json
import re
import shutil
import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from pyramidclip_command import CommandParser
from training.settings.fields import default_of, in_sections

Settings = TypeVar("Settings")

HELP_WIDTH = 100
_ARGUMENT = re.compile(r"^argument [^:]*: ")
_METAVARS = {int: "N", float: "X", str: "TEXT"}
_TRUTHS = dict.fromkeys(("yes", "true", "t", "y", "1"), True)
_TRUTHS |= dict.fromkeys(("no", "false", "f", "n", "0"), False)


def value_types(settings_class: type[Any]) -> dict[str, Any]:
    """Field -> type of its value, without None."""
    hints = get_type_hints(settings_class)
    return {entry.name: _without_none(hints[entry.name]) for entry in dataclasses.fields(settings_class)}


def _without_none(kind: Any) -> Any:
    if get_origin(kind) not in (Union, types.UnionType):
        return kind
    (first, *_) = [part for part in get_args(kind) if part is not type(None)]
    return first


def is_mapping(kind: Any) -> bool:
    """Whether values of a type are mappings."""
    return (get_origin(kind) or kind) is dict


##################################################################################################
#  The parser and its help                                                                       #
##################################################################################################


class _Parser(CommandParser):
    def error(self, message: str) -> NoReturn:
        """Raises ValueError: the message, as it may be about a word of a file, not of the command line."""
        raise ValueError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=_help_width())


def _help_width() -> int:
    return min(HELP_WIDTH, shutil.get_terminal_size().columns)


def _description(doc: str | None) -> str:
    """A docstring within the width of the help; commands, which are indented, stay as they are."""
    parts = (doc or "").strip().split("\n\n")
    return "\n\n".join(part if part.startswith(" ") else textwrap.fill(part, _help_width()) for part in parts)


class _Switch(argparse.Action):
    """`--flip`, `--flip false` and `--no-flip`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        if option_string == f"--no-{self.dest.replace('_', '-')}":
            if values is not self.const:
                parser.error(f"argument {option_string}: expected no value")
            values = False
        setattr(namespace, self.dest, values)


def _truth(word: str) -> bool:
    if word.lower() not in _TRUTHS:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return _TRUTHS[word.lower()]


def argument_parser(
    settings_class: type[Any],
    doc: str | None = None,
    *,
    config: bool = True,
    command: str = "",
    exit_codes: Sequence[int] = (),
) -> argparse.ArgumentParser:
    """The parser of a command, with a flag for each field of a dataclass: what is named and no defaults.

    Args:
        settings_class: The dataclass. Fields that no `setting` made have their help in `metadata["help"]`.
        doc: The docstring of the command's module, the head of the help.
        config: Whether there is a flag `--config` for a YAML file. Without it, a field that has no default is required.
        command: The words that come before the flags.
        exit_codes: See `CommandParser`.
    """
    file, flags = ("[--config FILE]", "[--setting value ...]") if config else ("", "[--flag value ...]")
    parser = _Parser(
        description=_description(doc),
        usage=" ".join(word for word in ("%(prog)s", command, file, flags) if word),
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        exit_codes=exit_codes,
    )
    if config:
        parser.add_argument("--config", metavar="FILE", help="YAML file with settings as below; flags win over it")
    kinds = value_types(settings_class)
    for title, entries in in_sections(settings_class).items():
        group = parser.add_argument_group(title)
        for entry in entries:
            _add_flag(group, entry, kinds[entry.name])
    return parser


def _add_flag(group: Any, entry: dataclasses.Field[Any], kind: Any) -> None:
    default, flag = default_of(entry), f"--{entry.name.replace('_', '-')}"
    text = entry.metadata["help"].replace("%%", "%")
    if default not in (None, "", [], dataclasses.MISSING) and "default:" not in text.lower():
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {str(shown).lower() if isinstance(shown, bool) else shown})"
    options: dict[str, Any] = {"dest": entry.name, "help": text.replace("%", "%%")}
    options |= {"required": default is dataclasses.MISSING}
    if kind is bool:
        flags = [flag, f"--no-{flag.removeprefix('--')}"] if default else [flag]
        group.add_argument(*flags, action=_Switch, nargs="?", const=True, type=_truth, metavar="BOOL", **options)
        return
    if get_origin(kind) is Literal:
        options |= {"choices": get_args(kind)}
    elif is_mapping(kind):
        options |= {"metavar": "JSON"}
    elif get_origin(kind) is list:
        (of,) = get_args(kind)
        options |= {"nargs": "+", "type": of, "metavar": _METAVARS[of]}
    else:
        options |= {"type": kind, "metavar": _METAVARS[kind]}
    group.add_argument(flag, **options)


##################################################################################################
#  Reading                                                                                       #
##################################################################################################


def parse_settings(
    settings_class: type[Settings],
    argv: Sequence[str],
    doc: str | None = None,
    *,
    config: bool = True,
    command: str = "",
    exit_codes: Sequence[int] = (),
) -> Settings:
    """The settings that the words of a command line, without the program's name, stand for.

    Args:
        settings_class: The dataclass, see `argument_parser`.
        argv: The words.
        doc: See `argument_parser`.
        config: See `argument_parser`.
        command: See `argument_parser`; not in `argv`.
        exit_codes: See `CommandParser`.

    Raises:
        ValueError: A key or flag is unknown (near ones are named), a value has the wrong type, or the dataclass refuses
            what it is given.
    """
    parser = argument_parser(settings_class, doc, config=config, command=command, exit_codes=exit_codes)
    given, left_over = parser.parse_known_args([_dashed(word) for word in argv])
    if left_over:
        kind = "flag" if left_over[0].startswith("-") else "word"
        raise _unknown(settings_class, kind, left_over[0].split("=")[0], "the command line")
    values = vars(given)
    file = values.pop("config", None) if config else None
    if file is not None:
        values = {**read_settings(settings_class, file), **values}
    return settings_class(**values)


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(settings_class: type[Any], kind: str, name: str, where: str) -> ValueError:
    known = list(value_types(settings_class))
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    return ValueError(f"unknown {kind} {name!r} in {where}{hint}")


def read_settings(settings_class: type[Any], path: str | Path) -> dict[str, Any]:
    """The settings of a YAML file and of those that it extends: field -> value, for the constructor.

    Raises:
        ValueError: A file is not there or not readable, a key is unknown, a value has the wrong type, or the files
            extend each other in a circle. The message names the file.
    """
    parser, found = argument_parser(settings_class), dict[str, Any]()
    for file, content in reversed(read_chain(path)):
        found |= {name: _value(settings_class, parser, file, name, value) for name, value in content.items()}
    return {name: value for name, value in found.items() if value is not None}


def read_chain(path: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """A YAML file, the one that it extends, and so on: (file, what it says itself) of each.

    Raises:
        ValueError: See `read_settings`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: expected a YAML file, and {path} is not one")
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        content = _read_mapping(path)
        base = content.pop("extends", None)
        chain.append((path, content))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise ValueError(f"{path}: extends: expected the name of a YAML file, got {base!r}")
        below, files = path.parent / base, [file for file, _ in chain]
        if not below.is_file():
            raise ValueError(f"{path}: extends: expected a YAML file, and {below} is not one")
        if below.resolve() in [file.resolve() for file in files]:
            raise ValueError(f"{path}: extends goes in a circle: {' -> '.join(map(str, [*files, below]))}")
        path = below


def _read_mapping(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'field: value' lines, got a {type(content).__name__}")
    return content


def _value(settings_class: type[Any], parser: argparse.ArgumentParser, path: Path, name: str, value: Any) -> Any:
    """A value of a file, of the field's type; through the command line's parser, so that both take the same."""
    kinds = value_types(settings_class)
    if name not in kinds:
        raise _unknown(settings_class, "key", str(name), str(path))
    if value is None or value == []:
        return value
    if isinstance(value, dict):
        if not is_mapping(kinds[name]):
            raise ValueError(f"{path}: {name} takes no mapping, got {value}")
        return json.loads(json.dumps(value))
    flag = f"--{name.replace('_', '-')}"
    words = [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    try:
        found, left_over = parser.parse_known_args(words)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {_ARGUMENT.sub('', str(error))}") from error
    if left_over:
        raise ValueError(f"{path}: {name}: expected a single value, got {value}")
    return getattr(found, name)
