"""From what was measured to what becomes of each sample: the rules one after another, each on what is left."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.facts import KEY_HASH, Column, Facts
from training.prepare.selecting.near import Split
from training.prepare.selecting.repeats import Numbered, repeated
from training.prepare.selecting.rules import Rule

MOST_RULES = 250


@dataclass
class Selection:
    """What is to be done, as a file of rules says it.

    Attributes:
        rules: {name: rule}, in the order in which they are asked.
        split: what goes to validation; None: nothing.
        seed: of what is drawn, and of ties.
        told: the same as JSON types, for `dataset.json`.
    """

    rules: dict[str, Rule]
    split: Split | None = None
    seed: int = 0
    told: dict[str, object] = field(default_factory=dict)

    @property
    def looks_at_pictures(self) -> bool:
        """Whether a rule needs the encoded bytes."""
        rules = any(rule.looks_at_pictures for rule in self.rules.values())
        return rules or (self.split is not None and self.split.looks_at_pictures)

    @property
    def encoders(self) -> list[Encoder]:
        """The models that rules ask."""
        return [rule.encoder for rule in self.rules.values() if rule.encoder is not None]

    def columns(self) -> dict[str, Column]:
        """{name: column} of all that is measured."""
        found = [column for rule in self.rules.values() for column in rule.columns()]
        found += self.split.columns() if self.split is not None else []
        return {column.name: column for column in found}

    def against(self) -> dict[str, dict[str, Column]]:
        """{data set that rules compare with: what is measured of it}."""
        found: dict[str, dict[str, Column]] = {}
        for rule in self.rules.values():
            for name in getattr(rule, "against", ()):
                found.setdefault(name, {}).update({column.name: column for column in rule.of_others()})
        return found


class Taken(NamedTuple):
    """What a rule took, and what it left."""

    rule: str
    taken: int
    left: int


class Decision(NamedTuple):
    """What becomes of each sample.

    Attributes:
        facts: with their verdicts.
        validation: (samples,) bool, which of those that stay go to validation.
        taken: of each rule.
    """

    facts: Facts
    validation: np.ndarray
    taken: list[Taken]


def decide(
    selection: Selection,
    files: Mapping[str, Sequence[Path]],
    against: Mapping[str, Mapping[str, Sequence[Path]]],
    unique_keys: bool,
) -> Decision:
    """Asks the rules one after another.

    Args:
        selection: what they are.
        files: {part: the files of its facts}.
        against: {data set: {part: the files of its facts}} of those that rules compare with.
        unique_keys: a key that came before is a fault.

    Raises:
        ValueError: a rule cannot be met; it is named.
    """
    facts = Facts(files)
    if unique_keys:
        _mark_same_keys(facts)
    taken = []
    for number, (name, rule) in enumerate(selection.rules.items()):
        before, others = facts.left, getattr(rule, "against", [])
        other_files = {f"{other} {part}": paths for other in others for part, paths in against[other].items()}
        try:
            for rows in rule.decide(facts, Facts(other_files) if others else None, selection.seed):
                facts.reject(rows, number)
        except ValueError as error:
            raise ValueError(f"rule {name}: {error}") from None
        taken.append(Taken(name, before - facts.left, facts.left))
    validation = np.zeros(len(facts), bool)
    if selection.split is not None:
        validation[selection.split.decide(facts, selection.seed)] = True
    return Decision(facts, validation, taken)


def _mark_same_keys(facts: Facts) -> None:
    def chunks() -> list[Numbered]:
        return [Numbered(alive.values[0], alive.rows) for alive in facts.alive(KEY_HASH)]

    for rows in list(repeated(chunks, len(facts), 1, False)):
        facts.verdicts[rows] = facts.SAME_KEY


class Output(NamedTuple):
    """A shard to write.

    Attributes:
        side: `validation` or `train`; "" where nothing is split.
        name: of the shard, without suffix.
        parts: numbers of the parts whose samples it gets.
        samples: how many.
    """

    side: str
    name: str
    parts: list[int]
    samples: int


def outputs(decision: Decision, is_split: bool, samples_per_shard: int) -> dict[str, Output]:
    """{item: output}: neighbouring parts go into one shard until it has about so many samples."""
    facts = decision.facts
    found: dict[str, Output] = {}
    for side in ("train", "validation") if is_split else ("",):
        chosen = (facts.verdicts == 0) & (decision.validation == (side == "validation"))
        counts = [int(np.count_nonzero(chosen[a:b])) for a, b in zip(facts.starts, facts.starts[1:])]
        for number, parts in enumerate(_grouped(counts, samples_per_shard)):
            name = f"{number:05d}"
            found[f"{side}-{name}" if side else name] = Output(side, name, parts, sum(counts[part] for part in parts))
    return found


def _grouped(counts: Sequence[int], step: int) -> list[list[int]]:
    """Numbers of neighbours whose counts come near `step`, all of them in some group."""
    found: list[list[int]] = []
    held = 0
    for number, count in enumerate(counts):
        if not found or (held and held + count > step):
            found.append([])
            held = 0
        found[-1].append(number)
        held += count
    return found
