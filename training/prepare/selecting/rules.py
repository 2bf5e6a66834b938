"""The rules that need no model and no other pictures: numbers, texts, formats, chance, and what comes again.

A rule says which numbers it measures of every sample, and takes samples out of those that the rules before it left.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from training.prepare.selecting.candidates import Candidate, hash_of
from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.facts import KEY_HASH, Column, Facts, each
from training.prepare.selecting.ranking import border, ordered, shuffled, up_to
from training.prepare.selecting.repeats import Numbered, repeated
from training.prepare.selecting.texts import (
    beginning,
    ending,
    is_file_name,
    letters_alone,
    share_of_digits,
    share_of_letters,
    word_count,
)

Level = Literal["caption", "summary", "tags"]


# Any: the value of a field, which has its own type.
def told(default: Any, help: str) -> Any:
    """A field of a rule with its description."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


class Rule(ABC):
    """What takes samples away. Its fields are the keys of its mapping in the YAML file.

    Attributes:
        kind: the word after `rule:`.
        looks_at_pictures: whether the encoded bytes are needed.
        encoder: the model that it asks.
    """

    kind: ClassVar[str]
    looks_at_pictures: bool = False
    encoder: Encoder | None = None

    def columns(self) -> list[Column]:
        """What is measured of each sample."""
        return []

    def of_others(self) -> list[Column]:
        """What is measured of each sample of the data sets in `against`."""
        return []

    def recorded(self) -> dict[str, Column]:
        """{field: number} of what goes into the records of the chosen samples; `FIELD_model` says whose it is."""
        return {}

    @abstractmethod
    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """Rows to take away, some at a time, out of what is left.

        Args:
            facts: of the data.
            others: of the data sets in `against`, where the rule has some.
            seed: of what is drawn, and of how ties are broken.

        Raises:
            ValueError: the rule cannot be met; the message says why.
        """


def require(condition: bool, message: str) -> None:
    """Raises `ValueError` unless a setting of a rule is as it should be."""
    if not condition:
        raise ValueError(message)


def check_bounds(rule: Any) -> None:
    """Whether `at_least` and `at_most` of a rule are finite and in order. Raises `ValueError`."""
    for name in ("at_least", "at_most"):
        value = getattr(rule, name)
        require(value is None or math.isfinite(value), f"{name}: expected a finite number, got {value}")
    low, high = rule.at_least, rule.at_most
    require(None in (low, high) or low <= high, f"at_least {low} is above at_most {high}")


def check_number_or_share(rule: Any) -> None:
    """Whether `number` or `share` of a rule is set, and as it should be. Raises `ValueError`."""
    number, share = rule.number, rule.share
    require((number is None) != (share is None), "expected either number or share")
    require(number is None or number >= 1, f"number: expected 1 or more, got {number}")
    require(share is None or 0 < share < 1, f"share: expected a share between 0 and 1, got {share}")


def outside(values: np.ndarray, low: float | None, high: float | None) -> np.ndarray:
    """Whether each value (n,) is below `low`, above `high`, or NaN."""
    wrong = np.isnan(values)
    if low is not None:
        wrong |= values < low
    if high is not None:
        wrong |= values > high
    return wrong


class Bounded(Rule):
    """A rule that takes what is outside of the bounds of its measures."""

    @abstractmethod
    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """(measure, smallest, largest value that stays) of each."""

    def columns(self) -> list[Column]:
        """The measures."""
        return [column for column, _, _ in self.bounds()]

    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """What is outside by one of them."""
        for column, low, high in self.bounds():
            for alive in facts.alive(column.name):
                yield alive.rows[outside(alive.values[0], low, high)]


def all_but_best(facts: Facts, column: str, count: int, lowest: bool, seed: int, what: str) -> Iterator[np.ndarray]:
    """The rows that are not among the best N; of equal values those whose keys have the smaller random number.

    Raises:
        ValueError: fewer are left.
    """

    def chunks() -> Iterator[np.ndarray]:
        for alive in facts.alive(column, KEY_HASH):
            values, keys = alive.values
            good = ~np.isnan(values)
            places = ordered(values[good] if lowest else -values[good])
            yield np.stack([places, shuffled(keys[good], seed), alive.rows[good].astype(np.uint64)], axis=1)

    there = sum(len(chunk) for chunk in chunks())
    require(
        count <= there, f"the best {count} by {what} are asked for, and the rules before leave {there}: lower `best`"
    )
    if count == there:
        return
    last = border(chunks, count)
    for chunk in chunks():
        yield chunk[~up_to(chunk, last), 2].astype(np.int64)


@dataclass
class Scored(Bounded):
    """Bounds of one number, and the best N by it over all shards."""

    at_least: float | None = told(None, "smaller ones go")
    at_most: float | None = told(None, "larger ones go")
    best: int | None = told(None, "so many stay, over all shards; ties are broken by key and seed")
    order: Literal["highest", "lowest"] = told("highest", "which are the best")
    field: str = told("", "what the number is called in the records")

    def __post_init__(self) -> None:
        require(bool(self.field), "field: expected the name of a field of the records, as similarity")
        check_bounds(self)
        given = (self.at_least, self.at_most, self.best)
        require(any(value is not None for value in given), "expected at_least, at_most or best")
        require(self.best is None or self.best >= 1, f"best: expected 1 or more, got {self.best}")

    @abstractmethod
    def column(self) -> Column:
        """The number."""

    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """Those of the number."""
        return [(self.column(), self.at_least, self.at_most)]

    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """What is outside of the bounds, then what is not among the best."""
        yield from super().decide(facts, others, seed)
        if self.best is not None:
            yield from all_but_best(facts, self.column().name, self.best, self.order == "lowest", seed, self.field)


@dataclass
class Number(Scored):
    """A number in the records: bounds, or the best N over all shards."""

    kind: ClassVar[str] = "number"
    missing: Literal["error", "reject"] = told("error", "what becomes of a sample without a number there, or with NaN")

    def column(self) -> Column:
        """The number."""
        return Column(("number", self.field, self.missing), "f8", each(self._measure))

    def _measure(self, candidate: Candidate) -> float:
        record = candidate.record
        value = record.get(self.field)
        number = as_number(value)
        if math.isnan(number) and self.missing == "error":
            there = ", ".join(record) or "none"
            found = f"is {value!r}" if self.field in record else "is not there"
            raise ValueError(
                f"{candidate.where}, key {candidate.key!r}: the field {self.field} {found}, expected a number; fields "
                f"of the record: {there}. `missing: reject` takes such samples away"
            )
        return number


def as_number(value: object) -> float:
    """A number, or the text of one as CSV has it; NaN for all else, and for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


@dataclass
class Sample(Rule):
    """A random choice by seed, the same whatever the shards are called."""

    kind: ClassVar[str] = "sample"
    number: int | None = told(None, "so many stay, exactly")
    share: float | None = told(None, "about this share stays, 0 to 1")

    def __post_init__(self) -> None:
        check_number_or_share(self)

    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """What was not drawn."""
        if self.share is not None:
            for alive in facts.alive(KEY_HASH):
                yield alive.rows[shuffled(alive.values[0], seed) >= np.uint64(int(self.share * 2.0**64))]
            return
        count, there = self.number or 0, facts.left
        require(count <= there, f"a sample of {count} is asked for, and the rules before leave {there}: lower `number`")
        if count == there:
            return

        def chunks() -> Iterator[np.ndarray]:
            for alive in facts.alive(KEY_HASH):
                yield np.stack([shuffled(alive.values[0], seed), alive.rows.astype(np.uint64)], axis=1)

        last = border(chunks, count)
        for chunk in chunks():
            yield chunk[~up_to(chunk, last), 1].astype(np.int64)


@dataclass
class Words(Bounded):
    """Shortest and longest text in words; of scripts without blanks each sign is one."""

    kind: ClassVar[str] = "words"
    level: Level = told("caption", "whose text")
    at_least: int | None = told(None, "shorter ones go")
    at_most: int | None = told(None, "longer ones go")

    def __post_init__(self) -> None:
        check_bounds(self)
        require(self.at_least is not None or self.at_most is not None, "expected at_least or at_most")

    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """Those of the number of words."""
        column = Column(("words", self.level), "f8", each(lambda one: word_count(one.text(self.level))))
        return [(column, self.at_least, self.at_most)]


@dataclass
class Pattern(Bounded):
    """Regular expressions (Python's `re`; `(?i)` for either case) that a text must not or must contain."""

    kind: ClassVar[str] = "pattern"
    level: Level = told("caption", "whose text")
    without: list[str] = told([], "texts with a match of one of these go")
    only: list[str] = told([], "texts without a match of any of these go")

    def __post_init__(self) -> None:
        require(bool(self.without or self.only), "expected `without` or `only`, lists of regular expressions")
        for name in ("without", "only"):
            for pattern in getattr(self, name):
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"{name}: {pattern!r} is no regular expression: {error}") from None

    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """Of whether a text is unwanted."""
        without, only = ([re.compile(one) for one in some] for some in (self.without, self.only))

        def measure(candidate: Candidate) -> int:
            text = candidate.text(self.level)
            unwanted = any(pattern.search(text) for pattern in without)
            return int(unwanted or bool(only and not any(pattern.search(text) for pattern in only)))

        return [(Column(("pattern", self.level, self.without, self.only), "u1", each(measure)), None, 0)]


@dataclass
class Junk(Bounded):
    """Texts that say nothing in any language: numbers, file names, addresses, signs."""

    kind: ClassVar[str] = "junk"
    level: Level = told("caption", "whose text")
    digits_at_most: float | None = told(None, "texts with a larger share of digits go, 0 to 1")
    letters_at_least: float | None = told(None, "texts with a smaller share of letters of any script go, 0 to 1")
    file_names: bool = told(False, "texts that are a file name, an address or a picture's number go")

    def __post_init__(self) -> None:
        for name in ("digits_at_most", "letters_at_least"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{name}: expected a share from 0 to 1, got {value}")
        given = self.digits_at_most is not None or self.letters_at_least is not None or self.file_names
        require(given, "expected digits_at_most, letters_at_least or file_names")

    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """Those of what is asked for."""
        level = self.level
        found: list[tuple[Column, float | None, float | None]] = []
        if self.digits_at_most is not None:
            column = Column(("digits", level), "f8", each(lambda one: share_of_digits(one.text(level))))
            found.append((column, None, self.digits_at_most))
        if self.letters_at_least is not None:
            column = Column(("letters", level), "f8", each(lambda one: share_of_letters(one.text(level))))
            found.append((column, self.letters_at_least, None))
        if self.file_names:
            column = Column(("file_name", level), "f8", each(lambda one: int(is_file_name(one.text(level)))))
            found.append((column, None, 0.5))
        return found


@dataclass
class Picture(Bounded):
    """Size, shape and format of the pictures, by their first bytes."""

    kind: ClassVar[str] = "picture"
    looks_at_pictures = True
    shortest_side: int | None = told(None, "pictures with a shorter side of fewer pixels go")
    aspect_at_most: float | None = told(None, "pictures with a larger ratio of long to short side go")
    formats: list[str] = told([], "other formats go; of jpeg, png, webp (as Pillow calls them)")
    decodes: bool = told(False, "pictures that break off go; each is read to its end")

    def __post_init__(self) -> None:
        require(
            self.aspect_at_most is None or self.aspect_at_most >= 1,
            f"aspect_at_most: expected 1 or more, got {self.aspect_at_most}",
        )
        require(
            self.shortest_side is None or self.shortest_side >= 1,
            f"shortest_side: expected 1 or more, got {self.shortest_side}",
        )
        unknown = [name for name in self.formats if name.lower() not in ("jpeg", "png", "webp")]
        require(not unknown, f"formats: expected jpeg, png or webp, got {', '.join(unknown)}")
        given = self.shortest_side or self.aspect_at_most or self.formats or self.decodes
        require(bool(given), "expected shortest_side, aspect_at_most, formats or decodes")

    def bounds(self) -> list[tuple[Column, float | None, float | None]]:
        """Those of what is asked for."""
        found: list[tuple[Column, float | None, float | None]] = []
        if self.shortest_side is not None:
            column = Column(("side",), "f8", each(lambda one: min(one.header.width, one.header.height)))
            found.append((column, self.shortest_side, None))
        if self.aspect_at_most is not None:
            found.append((Column(("aspect",), "f8", each(_aspect)), None, self.aspect_at_most))
        if self.formats:
            wanted = sorted({name.upper() for name in self.formats})

            def is_other(candidate: Candidate) -> int:
                name = candidate.header.format
                return int(("JPEG" if name == "MPO" else name) not in wanted)

            found.append((Column(("format", wanted), "f8", each(is_other)), None, 0.5))
        if self.decodes:
            found.append((Column(("decodes",), "f8", each(lambda one: int(not one.decodes))), None, 0.5))
        return found


def _aspect(candidate: Candidate) -> float:
    header = candidate.header
    return max(header.width, header.height) / max(min(header.width, header.height), 1)


Repeated = Literal["caption", "letters", "beginning", "end", "picture", "pair"]


@dataclass
class Repeats(Rule):
    """What comes more than so many times: texts, boilerplate at their beginning or end, pictures byte for byte."""

    kind: ClassVar[str] = "repeats"
    of: Repeated = told(
        "caption",
        "what is compared: `caption`; `letters`, the caption without case, digits, signs; its `beginning` or `end`; "
        "`picture`, by its bytes; `pair`, both",
    )
    words: int = told(4, "words of a beginning or end")
    most: int = told(1, "times that are not too many")
    take: Literal["rest", "all"] = told("rest", "of what comes more often: all but the first ones, or `all` of it")
    against: list[str] = told([], "data sets: what is in them goes, however often it comes here")

    def __post_init__(self) -> None:
        require(self.most >= 1, f"most: expected 1 or more, got {self.most}")
        require(self.words >= 1, f"words: expected 1 or more, got {self.words}")
        self.looks_at_pictures = self.of in ("picture", "pair")

    def columns(self) -> list[Column]:
        """64 bits of what is compared; 0 where there is nothing to compare."""
        identity = (self.of, self.words) if self.of in ("beginning", "end") else (self.of,)
        return [Column(identity, "u8", each(self._measure))]

    def of_others(self) -> list[Column]:
        """The same."""
        return self.columns() if self.against else []

    def _measure(self, candidate: Candidate) -> int:
        if self.of == "picture":
            return candidate.picture_hash
        text = candidate.text("caption")
        if self.of == "pair":
            return hash_of(candidate.picture, text.encode(errors="surrogatepass"))
        if self.of == "letters":
            text = letters_alone(text)
        elif self.of != "caption":
            text = (beginning if self.of == "beginning" else ending)(text, self.words)
        return hash_of(text.encode(errors="surrogatepass")) if text else 0

    def decide(self, facts: Facts, others: Facts | None, seed: int) -> Iterable[np.ndarray]:
        """What comes too often, or is in another data set."""
        name = self.columns()[0].name

        def chunks() -> Iterator[Numbered]:
            for alive in facts.alive(name):
                yield Numbered(alive.values[0], alive.rows)

        def of_others() -> Iterator[np.ndarray]:
            for alive in others.alive(name) if others is not None else ():
                yield alive.values[0]

        # Listed before the first is taken, for what is left is looked at once more for each bucket.
        yield from list(
            repeated(chunks, facts.left, self.most, self.take == "all", of_others if others is not None else None)
        )
