"""Settings as fields of a dataclass, each declared once: default, help, bounds, section, and place in a run's identity.

    learning_rate: float = setting(5e-4, "peak of the cosine", section="first", identity="schedule", at_least=0)

The rest is derived from the declaration: the checks of a value (`check_fields`), what `--resume` compares
(`identity_of`), the command line with its help (`training.settings.reading`), and the tables in docs/
(`settings_table`).
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from pyramidclip_command import check_there

Group = Literal["data", "objective", "schedule", "optimizer", "model", "how"]
GROUPS: tuple[Group, ...] = get_args(Group)

# In the order of the help and of the tables.
SECTIONS = {
    "first": "what most runs set",
    "trained": "what is trained",
    "data": "data",
    "batches": "batches",
    "schedule": "schedule and optimizer",
    "precision": "precision, memory, speed",
    "watching": "watching, saving, stopping",
}

Check = Callable[[str, Any], None]
Settings = TypeVar("Settings")

# See `check_there`; a source is a path before its last colon.
Named = Literal["path", "data", "id", "source"]


class Through(NamedTuple):
    """For a setting that a run compares through what comes of it: `epochs`, say, through the number of steps.

    Args:
        group: The part of the identity.
        key: The name there; "" where the setting has a hand in the whole group.
    """

    group: Group
    key: str = ""


def setting(
    default: Any,
    help: str,
    *,
    section: str,
    identity: Group | Through | None,
    at_least: float | None = None,
    share: bool = False,
    check: Check | None = None,
    adds_up: bool = False,
    names: Named | None = None,
) -> Any:
    """A field of a dataclass of settings.

    Args:
        default: Its default; a list is copied for each instance.
        help: What it is, for `--help` and the documentation.
        section: A key of `SECTIONS`.
        identity: Where a checkpoint keeps it. A run is continued under the same values only; under other ones, which
            are said, where the group is "how"; whatever they are where it is None: output, watching, speed.
        at_least: The smallest value allowed.
        share: Whether it is a share from 0 to below 1.
        check: A further check of (name, value).
        adds_up: Whether what files and flags say one after another, mappings, adds up; else each replaces the former.
        names: What its value names, where that must be there: see `check_named`.
    """
    if section not in SECTIONS:
        raise ValueError(f"section: expected one of {', '.join(SECTIONS)}, got {section!r}")
    bounds = [] if at_least is None else [_at_least(at_least)]
    checks = [*bounds, *([check_share] if share else []), *([check] if check else [])]
    metadata = {"help": help, "section": section, "identity": identity, "checks": tuple(checks), "adds_up": adds_up}
    return _field(default, {**metadata, "names": names})


def _field(default: Any, metadata: Mapping[str, Any]) -> Any:
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def redeclared(entry: dataclasses.Field[Any], default: Any, help: str | None = None, **changes: Any) -> Any:
    """The field `entry` for a subclass, with another default, and other words where they are given.

    Args:
        entry: A field that `setting` made.
        default: As in `setting`.
        help: As in `setting`; None: as it was.
        **changes: Of the arguments of `setting`; bounds are added to those that are there.
    """
    kept = {name: entry.metadata[name] for name in ("section", "identity", "adds_up", "names")}
    metadata = setting(default, entry.metadata["help"] if help is None else help, **(kept | changes)).metadata
    return _field(default, {**metadata, "checks": (*entry.metadata["checks"], *metadata["checks"])})


def usable_cores() -> int:
    """Processor cores that this process may use: what defaults of numbers of processes begin with."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


##################################################################################################
#  Checks                                                                                        #
##################################################################################################


def check_fields(settings: Any) -> None:
    """Raises ValueError, naming the field, for a value outside of the bounds of its declaration; None passes."""
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        for check in entry.metadata.get("checks", ()) if value is not None else ():
            check(entry.name, value)


def check_named(settings: Settings) -> Settings:
    """The settings, when what they name is there, see `check_there`.

    Args:
        settings: Of a dataclass whose fields say what they name in `metadata["names"]`.

    Raises:
        FileNotFoundError: Something is not there; the message names the flag.
    """
    for entry in dataclasses.fields(cast(Any, settings)):
        kind, value = entry.metadata.get("names"), getattr(settings, entry.name)
        if kind is None or value in (None, "latest"):
            continue
        named = [value] if isinstance(value, str) else value
        if kind == "source":
            named = [one if os.path.exists(one) else one.rpartition(":")[0] or one for one in named]
        flag, told = f"--{entry.name.replace('_', '-')}", entry.metadata["help"].replace("%%", "%")
        check_there(flag, named, told, "path" if kind == "source" else kind)
    return settings


def _at_least(bound: float) -> Check:
    def check(name: str, value: float) -> None:
        if not bound <= value <= sys.float_info.max:  # whole numbers may have any length
            raise ValueError(f"{name}: expected a number of at least {bound}, got {value}")

    return check


def check_named_folder(name: str, folder: str) -> None:
    """Raises ValueError where `folder` is blank, as an unset variable of a shell is: it would be the working folder."""
    if not folder.strip():
        raise ValueError(f"{name}: expected the name of a folder, got {folder!r}; the working folder is called .")


def check_share(name: str, value: float) -> None:
    """Raises ValueError where `value` is not in [0, 1)."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a share from 0 to below 1, got {value}")


def check_above_0(name: str, value: float) -> None:
    """Raises ValueError where `value` is not above 0."""
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value}")


def check_share_or_all(name: str, value: float) -> None:
    """Raises ValueError where `value` is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a share from 0 to 1, got {value}")


def check_lengths(name: str, lengths: Sequence[int]) -> None:
    """Raises ValueError where `lengths` are no rising numbers of tokens, two at least: a text has its start and end."""
    if list(lengths) != sorted(set(lengths)) or (lengths and lengths[0] < 2):
        raise ValueError(f"{name}: expected rising numbers of tokens from 2 on, each once, got {lengths}")


def check_repo_id(name: str, repo_id: str) -> None:
    """Raises ValueError where `repo_id` can be no id of the Hub, before a run finds out at its end."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{name}: expected an id of the Hub, such as user/name, got {repo_id!r}") from error


def check_area(name: str, area: Sequence[float]) -> None:
    """Raises ValueError where `area` is not the smallest and largest share of a picture."""
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"{name}: expected two shares with 0 < smallest <= largest <= 1, got {area}")


def mapping_of(name: str, value: Any) -> dict[str, Any] | None:
    """A mapping that is given as such or as JSON, as on the command line.

    Raises:
        ValueError: It is neither; the message begins with `name`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'{name}: expected a JSON object such as {{"key": 1}}, got {value!r} ({error})') from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, got {type(value).__name__} {value!r}")
    return value


##################################################################################################
#  Identity                                                                                      #
##################################################################################################


def identity_of(settings: Any) -> dict[str, dict[str, Any]]:
    """Group -> {field: value} of the fields that name the group; what goes `Through` something is left to the run."""
    return _grouped((entry, getattr(settings, entry.name)) for entry in dataclasses.fields(settings))


def default_identity(settings: Any) -> dict[str, dict[str, Any]]:
    """`identity_of`, at the fields' defaults: what a checkpoint means whose version did not know a field yet."""
    return _grouped((entry, default_of(entry)) for entry in dataclasses.fields(settings))


def _grouped(values: Iterable[tuple[dataclasses.Field[Any], Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for entry, value in values:
        group = entry.metadata["identity"]
        if group is not None and not isinstance(group, Through):
            found[group][entry.name] = value
    return found


##################################################################################################
#  Order and documentation                                                                       #
##################################################################################################


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """The default of a field; `dataclasses.MISSING` where it has none."""
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def in_sections(settings: Any) -> dict[str, list[dataclasses.Field[Any]]]:
    """Title of a section -> its fields, in the order of the help.

    Args:
        settings: A dataclass or an instance of it. Fields that no `setting` made are one section.
    """
    found: dict[str, list[dataclasses.Field[Any]]] = {title: [] for title in ("settings", *SECTIONS.values())}
    for entry in dataclasses.fields(settings):
        found[SECTIONS.get(entry.metadata.get("section", ""), "settings")].append(entry)
    return {title: entries for title, entries in found.items() if entries}


def settings_table(settings: Any) -> str:
    """All settings as rows of a Markdown table: name, default, what it is; of a run also what `--resume` says to it."""
    entries = [entry for section in in_sections(settings).values() for entry in section]
    rows = [["setting", "default", "what it is"]]
    for entry in entries:
        default = default_of(entry)
        shown = "" if default in (None, "", [], dataclasses.MISSING) else f"`{default}`"
        rows.append([f"`{entry.name}`", shown, entry.metadata["help"].replace("%%", "%").replace("|", "\\|")])
    if all("identity" in entry.metadata for entry in entries):
        rows = [[*row, told] for row, told in zip(rows, ["with `--resume`", *map(_on_resume, entries)])]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _on_resume(entry: dataclasses.Field[Any]) -> str:
    return {None: "free", "how": "free, said"}.get(entry.metadata["identity"], "as it was")
