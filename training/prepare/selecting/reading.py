"""The rules of `training.prepare.select`, read from YAML: a name, the kind of rule, and its settings, each."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.prepare.selecting.decide import MOST_RULES, Selection
from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.near import NearDuplicates, Split
from training.prepare.selecting.rules import Junk, Number, Pattern, Picture, Repeats, Rule, Sample, Words
from training.prepare.selecting.similarity import Similarity
from training.settings.reading import instance_of, read_settings

KINDS: dict[str, type[Rule]] = {
    kind.kind: kind for kind in (Number, Sample, Words, Pattern, Junk, Picture, Repeats, NearDuplicates, Similarity)
}


@dataclass
class RulesFile:
    """What a file of rules holds. Rules are asked in their order; one that is empty (`name:`) is left out."""

    rules: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata={"help": "{name: {rule: KIND, its settings}}, in the order in which they are asked", "adds_up": True},
    )
    split: dict[str, Any] | None = dataclasses.field(
        default=None, metadata={"help": "what goes to validation; empty: nothing", "adds_up": True}
    )
    seed: int = dataclasses.field(default=0, metadata={"help": "of what is drawn, and of how ties are broken"})


def read_rules(path: str) -> Selection:
    """The rules of a YAML file and of those that it extends.

    Raises:
        ValueError: the file, a rule, its kind or a setting is not what is expected; the message names it and says what
            there is.
    """
    if not Path(path).is_file():
        raise ValueError(f"--rules {path}: expected a YAML file, and it is a folder")
    file = RulesFile(**read_settings(RulesFile, path))
    for name in ("rules", "split"):
        value = vars(file)[name]
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{path}: {name}: expected a mapping, got {value!r}")
    given = {name: settings for name, settings in file.rules.items() if settings is not None}
    if not given and not file.split:
        raise ValueError(f"{path}: no rules; expected `rules:` with a name and a mapping each")
    if len(given) > MOST_RULES:
        raise ValueError(f"{path}: {len(given)} rules, expected at most {MOST_RULES}")
    rules = {str(name): _rule(f"{path}: rule {name}", settings, Path(path)) for name, settings in given.items()}
    encoders = dict[Encoder, Encoder]()
    for rule in rules.values():
        if rule.encoder is not None:  # rules that ask the same model load it once
            rule.encoder = encoders.setdefault(rule.encoder, rule.encoder)
    split = None
    if file.split:
        split = instance_of(Split, file.split, f"{path}: split")
    told = [{"name": name, "rule": rule.kind, **said(rule)} for name, rule in rules.items()]
    return Selection(
        rules, split, file.seed, {"rules": told, "split": said(split) if split else None, "seed": file.seed}
    )


def _rule(where: str, settings: Any, path: Path) -> Rule:
    known = ", ".join(KINDS)
    if not isinstance(settings, dict) or not isinstance(settings.get("rule"), str):
        raise ValueError(f"{where}: expected a mapping with `rule: KIND`, of {known}; got {settings!r}")
    kind = KINDS.get(settings["rule"])
    if kind is None:
        raise ValueError(f"{where}: there is no kind of rule {settings['rule']!r}, expected one of {known}")
    return instance_of(kind, {name: value for name, value in settings.items() if name != "rule"}, where)


def said(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that have a value."""
    return {name: value for name, value in dataclasses.asdict(settings).items() if value not in (None, [], False)}
