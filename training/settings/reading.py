"""Settings out of a YAML file and the words of a command line; the help of a command.

YAML keys are the fields of a dataclass; flags are the same names with dashes (underscores are taken as well) and win
over the file; mappings are JSON on the command line. A key or flag that does not exist is an error that names its
nearest neighbours. A file may begin with what others say, and change it, key by key:

    extends: base.yaml    # beside this file, or a list of which later ones win; they may extend further ones
    epochs: 32
    max_steps:            # empty: the default

`--config` takes several files as well, later ones win, and `FILE:KEY.KEY` is the mapping under these keys of a file.

Own code, as neither jsonargparse 4.53 (no dashes, no near names, lists in brackets, no file name in an error) nor tyro
1.0 (no YAML, mappings not as JSON, errors in frames) does what is above without as much of it.
"""

import argparse
import dataclasses
import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from pyramidclip_command import CommandParser, plainly
from pyramidclip_hf.files import json_text, read_regular
from training.settings.fields import default_of, in_sections, mapping_of

Settings = TypeVar("Settings")

_ARGUMENT = re.compile(r"^argument [^:]*: ")
# Far more than settings are: bytes of a file, and values and letters with every alias written out.
_MAX_YAML_BYTES, _MAX_YAML_VALUES = 1 << 17, 1 << 20
_MAX_YAML_DEPTH = 100
# More names than this are no help in one line.
_MOST_TOLD = 20
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
        raise ValueError(plainly(message))


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
    file, flags = ("[--config FILE ...]", "[--setting value ...]") if config else ("", "[--flag value ...]")
    parser = _Parser(
        description=doc,
        usage=" ".join(word for word in ("%(prog)s", command, file, flags) if word),
        argument_default=argparse.SUPPRESS,
        exit_codes=exit_codes,
    )
    if config:
        parser.add_argument(
            "--config",
            nargs="+",
            metavar="FILE",
            help="YAML files with settings as below, or FILE:KEY.KEY, a mapping inside of one; later ones win, and "
            "flags over all",
        )
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
    files = values.pop("config", []) if config else []
    for name, kind in value_types(settings_class).items():
        if name in values and is_mapping(kind):
            values[name] = mapping_of(name, values[name])
    below = read_settings(settings_class, *files) if files else {}
    return settings_class(**_folded(settings_class, [below, values]))


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def _unknown(settings_class: type[Any], kind: str, name: str, where: str) -> ValueError:
    known = list(value_types(settings_class))
    said = {one: f"--{one.replace('_', '-')}" if kind == "flag" else one for one in known}
    plain = name.lstrip("-").replace("-", "_")
    # As people shorten them: lr, wd.
    near = [one for one in known if plain == "".join(word[0] for word in one.split("_"))]
    for least in (0.8, 0.5):
        near = near or difflib.get_close_matches(plain, known, n=3, cutoff=least)
    if near:
        hint = f"; did you mean {' or '.join(said[one] for one in near)}?"
    elif len(known) <= _MOST_TOLD:
        hint = f"; known: {', '.join(said.values())}"
    else:
        hint = f"; --help lists the {len(known)} that there are"
    return ValueError(f"unknown {kind} {name!r} in {where}{hint}")


def read_settings(settings_class: type[Any], *places: str | Path) -> dict[str, Any]:
    """The settings of YAML files and of those that they extend: field -> value, for the constructor.

    Args:
        settings_class: The dataclass.
        *places: As the words of `--config`; later ones win.

    Raises:
        ValueError: A file is not there or not readable, a key is unknown, a value has the wrong type, or the files
            extend each other in a circle. The message names the file.
    """
    parser = argument_parser(settings_class)
    said = [
        {name: _value(settings_class, parser, file, name, value) for name, value in content.items()}
        for file, content in reversed(read_chain(*places))
    ]
    return {name: value for name, value in _folded(settings_class, said).items() if value is not None}


def instance_of(settings_class: type[Settings], values: Mapping[str, Any], where: str) -> Settings:
    """A dataclass of the values of a mapping inside of a file.

    Args:
        settings_class: The dataclass; all its fields have defaults.
        values: Field -> value; None: the default.
        where: What the messages begin with.

    Raises:
        ValueError: A key is unknown, a value has the wrong type, or the dataclass refuses what it is given.
    """
    parser = argument_parser(settings_class)
    said = {name: _value(settings_class, parser, where, name, value) for name, value in values.items()}
    try:
        return settings_class(**{name: value for name, value in said.items() if value is not None})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _folded(settings_class: type[Any], said: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What is said by one after another, of which later ones win; changes to a mapping of a field that `adds_up` do."""
    adding = {entry.name for entry in dataclasses.fields(settings_class) if entry.metadata.get("adds_up")}
    found = dict[str, Any]()
    for values in said:
        for name, value in values.items():
            both = name in adding and isinstance(value, dict)
            found[name] = with_changes(found.get(name) or {}, value) if both else value
    return found


def with_changes(mapping: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`mapping` with the values of `changes`, mappings inside of it likewise."""
    inner = {
        name: with_changes(mapping[name], value)
        for name, value in changes.items()
        if isinstance(value, Mapping) and isinstance(mapping.get(name), Mapping)
    }
    return {**mapping, **changes, **inner}


def read_chain(*places: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """The YAML files that `places` name and those that they extend: (file, what it says itself), the strongest first.

    A file that several extend counts where it is weakest.

    Raises:
        ValueError: See `read_settings`.
    """
    chain = [entry for place in reversed(places) for entry in _chain(str(place), ())]
    weakest = {(file.resolve(), keys): at for at, (file, keys, _) in enumerate(chain)}
    return [chain[at][::2] for at in sorted(weakest.values())]


def _chain(place: str, above: tuple[Path, ...]) -> list[tuple[Path, str, dict[str, Any]]]:
    """(file, keys inside of it, what is there) of a place and of what it extends, the strongest first."""
    name, keys = _parts(place)
    path = Path(name)
    if not path.is_file():
        said = f"{above[-1]}: extends" if above else "--config"
        raise ValueError(
            f"{said}: expected a YAML file, and {path} {'is not one' if path.exists() else 'is not there'}"
        )
    if path.resolve() in [file.resolve() for file in above]:
        circle = above[[file.resolve() for file in above].index(path.resolve()) :]
        raise ValueError(f"{above[-1]}: extends goes in a circle: {' -> '.join(map(str, [*circle, path]))}")
    content = _read_mapping(path, keys)
    bases = content.pop("extends", None) or []
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        raise ValueError(f"{path}: extends: expected the name of a YAML file, or a list of such, got {bases!r}")
    chain = [(path, keys, content)]
    for base in reversed(bases):
        chain += _chain(str(path.parent / base), (*above, path))
    return chain


def _parts(place: str) -> tuple[str, str]:
    """A file, and the keys behind a colon; a colon of the file's own name is no such."""
    name, colon, keys = place.rpartition(":")
    return (name, keys) if colon and not Path(place).exists() else (place, "")


def _read_mapping(path: Path, keys: str) -> dict[str, Any]:
    import yaml

    try:
        content = _load_yaml(read_regular(path, _MAX_YAML_BYTES).decode("utf-8")) or {}
        _refuse_bomb(content)
    # ValueError: numbers of thousands of digits, days that no month has, bytes that are no UTF-8.
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deep, or aliases for more than {_MAX_YAML_VALUES} values") from None
    for key in keys.split(".") if keys else ():
        if not isinstance(content, dict) or key not in content:
            known = ", ".join(map(str, content)) if isinstance(content, dict) else f"a {type(content).__name__}"
            raise ValueError(f"{path}:{keys}: there is no {key}; there: {known}")
        content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected 'field: value' lines, got a {type(content).__name__}")
    return dict(content)


def _load_yaml(text: str) -> Any:
    """As `yaml.safe_load`; RecursionError where nesting, or what merge keys (`<<`) copy, is beyond all settings."""
    import yaml

    depth = 0
    for mark in re.findall(r"[][{}]", text):  # PyYAML takes seconds for a thousand of them
        depth += -1 if mark in "]}" else 1
        if depth > _MAX_YAML_DEPTH:
            raise RecursionError

    class Loader(yaml.SafeLoader):
        left = _MAX_YAML_VALUES

        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            """PyYAML takes the last of several values of a key."""
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                own = (key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key))
                if own in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
                seen.add(own)
            return node

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            for key, value in node.value:
                if key.tag == "tag:yaml.org,2002:merge":
                    for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                        if isinstance(merged, yaml.MappingNode):
                            self.flatten_mapping(merged)
                            self.left -= len(merged.value)
                        if self.left < 0:
                            raise RecursionError
            super().flatten_mapping(node)

    return yaml.load(text, Loader)


def _refuse_bomb(content: Any) -> None:
    """Refuses a file whose aliases stand for more than settings can be: each names what may again hold aliases."""
    waiting, left = [content], _MAX_YAML_VALUES
    while waiting:
        value = waiting.pop()
        left -= len(value) if isinstance(value, dict | list | str) else 1
        if left < 0:
            raise RecursionError
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, list) else ())


def _value(settings_class: type[Any], parser: argparse.ArgumentParser, path: Path | str, name: str, value: Any) -> Any:
    """A value of a file, of the field's type; through the command line's parser, so that both take the same."""
    kinds = value_types(settings_class)
    if name not in kinds:
        raise _unknown(settings_class, "key", str(name), str(path))
    if isinstance(value, list) and is_mapping(kinds[name]):
        raise ValueError(f"{path}: {name}: expected a mapping, got {value}")
    if value is None or value == []:
        return value
    if isinstance(value, dict):
        if not is_mapping(kinds[name]):
            raise ValueError(f"{path}: {name} takes no mapping, got {value}")
        return json.loads(json_text(value))
    flag = f"--{name.replace('_', '-')}"
    words = [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    try:
        found, left_over = parser.parse_known_args(words)
    except ValueError as error:
        raise ValueError(f"{path}: {name}: {_ARGUMENT.sub('', str(error))}") from error
    if left_over:
        raise ValueError(f"{path}: {name}: expected a single value, got {value}")
    return getattr(found, name)
