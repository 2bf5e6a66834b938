"""What says whether two runs are the same one: what a checkpoint keeps of it, and how it is compared.

An identity holds what changes the function that is trained, the data or the way, and nothing that an upgrade of a
library brings along: of a model's configuration its own fields, none of transformers' base class. A value that a
checkpoint does not name, because its version did not know it, is the default.
"""

import dataclasses
import difflib
import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from pyramidclip_hf.files import json_text

# Group ("data", "objective", "schedule", "optimizer", "model", "how") -> name -> value.
Identity = Mapping[str, Mapping[str, Any]]

# Own fields of a configuration that say where training begins and nothing of the function.
_BEGINNING = ("logit_scale_init_value",)


class IdentityError(ValueError):
    """A checkpoint belongs to another run; the message lists what differs."""


def model_identity(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that the configuration's own class declares, those of its towers inside; plain values."""
    found = {}
    for name in _own_fields(type(config)):
        value = getattr(config, name)
        found[name] = model_identity(value) if isinstance(value, PreTrainedConfig) else value
    return found


def _own_fields(kind: type[PreTrainedConfig]) -> list[str]:
    declared = {
        name
        for parent in kind.__mro__
        if issubclass(parent, PreTrainedConfig) and parent is not PreTrainedConfig
        for name in inspect.get_annotations(parent)
    }
    return [entry.name for entry in dataclasses.fields(kind) if entry.name in declared - {*_BEGINNING}]


def completed_model(saved: Mapping[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """The model's part of a checkpoint's identity with every field that the class of `config` has.

    Args:
        saved: As a checkpoint has it. Older records hold all of `to_dict()`, and lose what is not the class's own.
        config: The model's now, whose class says what a field means that is not named.
    """
    told = {}
    for name in model_identity(config):
        if name in saved:
            inner = getattr(config, name)
            told[name] = completed_model(saved[name], inner) if isinstance(inner, PreTrainedConfig) else saved[name]
    kept = told if "model_type" in saved else {**saved, **told}
    kind: Any = type(config)
    return {**model_identity(kind(**told)), **kept}


def completed(
    saved: Identity, now: Identity, defaults: Identity, config: PreTrainedConfig
) -> dict[str, dict[str, Any]]:
    """A checkpoint's identity, with what its version did not know as it was then: at the default.

    Args:
        saved: What the checkpoint says.
        now: What the run says.
        defaults: Of the settings.
        config: Of the model.
    """
    named = {*now["model"], *(saved["model"] if "model_type" not in saved["model"] else ())}
    model = {name: value for name, value in completed_model(saved["model"], config).items() if name in named}
    groups = {group: {**defaults.get(group, {}), **values} for group, values in saved.items() if group != "model"}
    return {**groups, "model": model}


def compare_identity(saved: Identity, now: Identity, path: Path, accepted: Sequence[str] = ()) -> list[str]:
    """Checks that a checkpoint may be continued by this run.

    Args:
        saved: What the checkpoint says, see `completed`.
        now: What the run says.
        path: Of the checkpoint, for messages.
        accepted: Names, as messages have them, that may differ.

    Returns:
        A message for each difference under "how" (precision, chunk size), which may change, and each accepted one.

    Raises:
        IdentityError: Something else differs; a line for each, what it was and what it is now.
        ValueError: An accepted name is none.
    """
    # Through JSON, as the stored one went: tuples are lists there.
    saved_values, now_values = (_flat(json.loads(json_text(identity))) for identity in (saved, now))
    names = sorted({*saved_values, *now_values})
    for name in accepted:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names
            raise ValueError(f"accept_identity: expected names such as {', '.join(near)}, got {name!r}")
    differing = {
        name: f"{name}: was {saved_values.get(name)!r}, is now {now_values.get(name)!r}"
        for name in names
        if saved_values.get(name) != now_values.get(name)
    }
    fixed = [name for name in differing if not name.startswith("how.") and name not in accepted]
    if fixed:
        lines = "\n  ".join(differing[name] for name in fixed)
        raise IdentityError(
            f"{path} belongs to a run with other settings, and continuing under these would be neither the one nor the "
            f"other:\n  {lines}\nRestore the old values, or start a new run in another output_dir with model: "
            f"{path / 'model'} to begin from these weights. What does not change what is trained, as you know: "
            f"--accept-identity {' '.join(fixed)}"
        )
    return [
        f"continuing with {'an accepted difference' if name in accepted else 'a changed setting'}: {line}"
        for name, line in differing.items()
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    items: dict[str, Any] = {}
    for name, inner in value.items():
        items |= _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    return items
