# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Work that consists of many pieces which do not know of each other: what a phase of it is, and who gets which next.

A piece (a shard, a part of a file) is done or not done, which files say, so it may be done again and by anybody. A
`Schedule` hands pieces to whoever asks, so that all are ready at about the same time.
"""

import bisect
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pyramidclip_command import Failure

# How often a piece may be with a worker that dies: as many times it is bad luck, once more and it is the piece.
MOST_DEATHS = 3

# Moves a progress bar by so many.
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Phase:
    """Pieces of work that may be done in any order, by anybody.

    Attributes:
        name: for people.
        items: piece -> its size (samples), or None.
        is_done: whether a piece is done, which files say.
        do: does a piece, and leaves the file that says so; it is also told how to move a progress bar.
        unit: what sizes count.
        wanted_whole: whether whoever wants to go on needs all pieces, also those of others.
    """

    name: str
    items: Mapping[str, int | None]
    is_done: Callable[[str], bool]
    do: Callable[[str, Advance], None]
    unit: str = "pair"
    wanted_whole: bool = False


class Job(Protocol):
    """Work in phases. Each process that has a hand in it opens a job of its own from the same settings."""

    def phases(self) -> Iterator[Phase]:
        """The phases in turn; whoever asks for the next one knows that the one before is done, if `wanted_whole`."""
        ...

    def finish(self) -> Any:
        """What becomes of it when all pieces are done; None while some are not."""
        ...

    def told(self, result: Any) -> str:
        """What people are told of what `finish` gave."""
        ...


class Lost(Failure):
    """A piece of work that cannot be done anywhere; the message names it and says why."""


class Schedule:
    """Which piece is next: the largest that whoever asks will have done before the others have done the rest.

    How fast each worker is, is known from what it has done; its first piece is one of the smallest. So a slow worker is
    not what all others wait for: at the end it gets small pieces, or none.

    Args:
        items: piece -> size or None (taken as the middle one), of those that are to be done.
        clock: gives seconds.
    """

    def __init__(self, items: Mapping[str, int | None], clock: Callable[[], float] = time.monotonic):
        known = [size for size in items.values() if size is not None]
        middle = statistics.median(known) if known else 1
        # Rising sizes, and of equal ones the first last, as pieces are taken from behind.
        self._left = sorted(
            (max(middle if size is None else size, 1), -number, item)
            for number, (item, size) in enumerate(items.items())
        )
        self._clock = clock
        self._at_work: dict[str, tuple[Hashable, float, tuple[float, int, str]]] = {}
        self._did: dict[Hashable, tuple[float, float]] = {}  # size, and seconds
        self._deaths: Counter[str] = Counter()
        self._unseen: defaultdict[str, set[str]] = defaultdict(set)

    @property
    def is_done(self) -> bool:
        """Whether nothing is left, and nobody at work."""
        return not self._left and not self._at_work

    def next(self, worker: Hashable, place: str) -> str | None:
        """A piece for a worker on the machine `place`; None: there is none for it now."""
        if not self._left:
            return None
        smallest = self._left[0][0]
        fitting = self._fitting(worker)
        if fitting is None:
            fitting = smallest
        elif fitting < smallest:
            # Whoever comes to it next has it done sooner, as long as somebody else is at work.
            if self._at_work and fitting < smallest / 2:
                return None
            fitting = smallest
        for number in range(bisect.bisect_right(self._left, (fitting, 1)) - 1, -1, -1):
            if place not in self._unseen.get(self._left[number][2], ()):
                return self._take(number, worker)
        for number in range(len(self._left)):
            if place not in self._unseen.get(self._left[number][2], ()):
                return self._take(number, worker)
        return None

    def _take(self, number: int, worker: Hashable) -> str:
        piece = self._left.pop(number)
        self._at_work[piece[2]] = worker, self._clock(), piece
        return piece[2]

    def _fitting(self, worker: Hashable) -> float | None:
        """How large a piece may be for a worker to be ready when all are; None: nobody knows how fast it is."""
        paces = {who: size / max(seconds, 1e-9) for who, (size, seconds) in self._did.items()}
        if worker not in paces:
            return None
        others = {who for who, _, _ in self._at_work.values()} - {worker}
        usual = statistics.median(paces.values())
        together = paces[worker] + sum(paces.get(who, usual) for who in others)
        now, rest = self._clock(), sum(size for size, _, _ in self._left)
        for who, started, (size, _, _) in self._at_work.values():
            rest += max(size - (now - started) * paces.get(who, usual), 0)
        return paces[worker] * rest / together

    def _ended(self, item: str) -> tuple[float, int, str]:
        return self._at_work.pop(item)[2]

    def done(self, item: str) -> None:
        """A piece is done."""
        worker, started, piece = self._at_work.pop(item)
        size, seconds = self._did.get(worker, (0.0, 0.0))
        self._did[worker] = size + piece[0], seconds + self._clock() - started

    def died(self, item: str, why: str) -> None:
        """The worker that had it is no more: the piece is left again.

        Raises:
            Lost: that happened too often.
        """
        piece = self._ended(item)
        self._deaths[item] += 1
        if self._deaths[item] > MOST_DEATHS:
            raise Lost(f"{item}: {self._deaths[item]} workers died over it, one after another; the last one: {why}")
        bisect.insort(self._left, piece)

    def unseen(self, item: str, place: str, places: Collection[str], why: str) -> None:
        """A machine does not see what the piece is made of: another one gets it.

        Args:
            item: the piece.
            place: the machine.
            places: all machines that have workers now.
            why: its error.

        Raises:
            Lost: none sees it.
        """
        piece = self._ended(item)
        self._unseen[item].add(place)
        if self._unseen[item] >= set(places):
            raise Lost(
                f"{item}: no worker can see it ({', '.join(sorted(self._unseen[item]))}): {why}. What is read and "
                "written must lie in folders that all machines share under one path, or behind a URL"
            )
        bisect.insort(self._left, piece)
