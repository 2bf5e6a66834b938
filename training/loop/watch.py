"""Processes that hear of each other beside their work: for whom one waits, who is gone, and an end to that.

Two threads of each process: one tells in the group's store every few seconds what its process does and reads what the
others do, the other judges, so that a store that does not answer stops nobody from judging. So a process that waits
says for whom and why, and one that is stopped or dead, or whose machine is gone, ends the others after a set time
whatever the devices wait for, with its number.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pyramidclip_hf.files import json_text

BEAT = 2.0  # seconds
SAY_AFTER = 60.0  # seconds of waiting, and again after as many
# Beats that a process which is alive never misses, as only its threads could hinder it.
MISSED = 5
# How a process is spoken of that is silent; it stopped, died, or its machine or network did.
GONE = "is no longer heard: stopped, dead, or cut off"


# The one of this process, while a run is on.
_current: list["Watch"] = []


def doing(what: str) -> contextlib.AbstractContextManager[None]:
    """Inside, this process does what others may have to wait for."""
    return _current[-1].said_to_do(what) if _current else contextlib.nullcontext()


def waiting() -> contextlib.AbstractContextManager[None]:
    """Inside, this process waits for others."""
    return _current[-1].said_to_do("", waits=True) if _current else contextlib.nullcontext()


class Ended(NamedTuple):
    """How a process ended: a key of `training.loop.outcome.REASONS` and a sentence."""

    reason: str
    message: str


@dataclass
class _Heard:
    """What is known of another process: its last count, when that was new here, and what it told."""

    beat: int = -1
    at: float = field(default_factory=time.monotonic)
    told: dict[str, Any] = field(default_factory=dict)


class Watch:
    """What one process tells of itself and knows of the others.

    Args:
        store: Of torch.distributed, with `set`, `check` and `multi_get`.
        number: Of this process.
        processes: How many there are.
        patience: Seconds of silence after which `on_loss` is called.
        on_loss: Gets the sentence that says who is gone; called once, in a thread of the watch.
    """

    def __init__(
        self, store: Any, number: int, processes: int, patience: float, on_loss: Callable[[Ended], None] | None = None
    ):
        self.number, self.patience, self.on_loss = number, patience, on_loss
        # A connection of its own: whoever waits in the store holds the one that the group has.
        self.store = store.clone() if hasattr(store, "clone") else store
        self.doing, self._since, self._waits, self._said = "starting", time.monotonic(), False, 0.0
        self._others = {other: _Heard() for other in range(processes) if other != number}
        self._beats, self._said_silence, self._answered = 0, 0.0, time.monotonic()
        self._ended: Ended | None = None
        self._leaving, self._left = threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Tells and listens inside."""
        _current.append(self)
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self.leave(self._ended or Ended("finished", ""))
            _current.remove(self)

    def leave(self, ended: Ended) -> None:
        """Tells the others how this process ends, so that they do not take its silence for death."""
        self._ended = ended
        self._leaving.set()
        for thread in self._threads:
            thread.join(MISSED * BEAT)  # a store that is gone answers nobody

    @contextlib.contextmanager
    def said_to_do(self, doing: str, waits: bool = False) -> Iterator[None]:
        """Inside, this process does something that others may have to wait for, or `waits` for others itself."""
        before = self.doing, self._since, self._waits
        self.doing, self._since, self._waits = doing if not waits else self.doing, time.monotonic(), waits
        self._said = 0.0
        try:
            yield
        finally:
            self.doing, self._since, self._waits = before

    def silent(self, longer_than: float) -> list[int]:
        """The processes that were not heard for so many seconds, and have not said that they end."""
        now = time.monotonic()
        if now - self._answered > longer_than:
            return [0]  # the store lies with the first process, or with its launcher
        return [
            other
            for other, heard in self._others.items()
            if now - heard.at > longer_than and not heard.told.get("ended")
        ]

    def loss(self, patience: float) -> Ended | None:
        """What another process ended of, or who was silent for `patience` seconds."""
        for other, heard in self._others.items():
            if (ended := heard.told.get("ended")) and not ended[0].startswith("finished"):
                message = ended[1] if ended[0] == "another process" else f"process {other}: {ended[1]}"
                return Ended(ended[0], message)
        if numbers := self.silent(patience):
            return Ended("another process", f"process {', '.join(map(str, numbers))} {GONE}")
        return None

    def search_loss(self, told: str) -> Ended:
        """Waits until it is known of whom a connection broke, or who did not come to a call of all.

        Args:
            told: What is known without, for where all processes are there.
        """
        end = time.monotonic() + (MISSED + 2) * BEAT
        while (found := self.loss(MISSED * BEAT)) is None and time.monotonic() < end:
            time.sleep(BEAT / 10)
        missing = self.waited_for()
        return found or Ended("another process", f"{told}; missing: {missing}" if missing else told)

    def waited_for(self) -> str:
        """For whom the others wait, in words; empty where all wait."""
        now, told = time.monotonic(), []
        for other, heard in self._others.items():
            if heard.told.get("ended"):
                continue
            if now - heard.at > MISSED * BEAT:
                told.append(f"process {other}: not heard for {now - heard.at:.0f} s")
            elif not heard.told.get("waits"):
                told.append(f"process {other}: {heard.told.get('doing')}, {heard.told.get('seconds', 0):.0f} s")
        return "; ".join(told)

    # Two threads

    def _talk(self) -> None:
        last = False
        while not last:
            last = self._leaving.wait(BEAT)
            with contextlib.suppress(Exception):  # a store whose process is gone is silence too
                self._tell()
                if not last:
                    self._listen()
                    self._answered = time.monotonic()

    def _judge(self) -> None:
        looked = time.monotonic()
        while not self._leaving.wait(BEAT):
            now = time.monotonic()
            if (own := now - looked - BEAT) > BEAT:  # this process was stopped itself, or starved
                self._answered += own
                for heard in self._others.values():
                    heard.at += own
            looked = now
            self._say(now)
            if self.on_loss is not None and (found := self.loss(self.patience)):
                self._give_up(found)

    def _give_up(self, found: Ended) -> None:
        # Whoever waits for a process that told its end hears of it too, most often, and ends in good order.
        if found.reason != "another process" and self._leaving.wait(MISSED * BEAT):
            return
        on_loss, self.on_loss = self.on_loss, None
        if on_loss is not None:
            on_loss(found)

    def _say(self, now: float) -> None:
        waited = now - self._since
        if self._waits and waited - self._said > SAY_AFTER:
            self._said = waited
            if (told := self.waited_for()) and self._speaks():
                print(f"waiting for {told}", file=sys.stderr, flush=True)
        elif self.silent(SAY_AFTER) and now - self._said_silence > SAY_AFTER:
            self._said_silence = now
            print(f"waiting for {self.waited_for()}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        self._beats += 1
        seconds = time.monotonic() - self._since
        told = {"beat": self._beats, "doing": self.doing, "seconds": seconds, "waits": self._waits}
        self.store.set(f"watch/{self.number}", json_text(told | {"ended": self._ended}))

    def _listen(self) -> None:
        """Two questions to the store, however many processes there are; more until all have spoken."""
        names = {other: f"watch/{other}" for other in self._others}
        if not self.store.check(list(names.values())):
            names = {other: name for other, name in names.items() if self.store.check([name])}
        for other, text in zip(names, self.store.multi_get(list(names.values())) if names else ()):
            told, heard = json.loads(text), self._others[other]
            if told["beat"] != heard.beat:
                heard.beat, heard.at, heard.told = told["beat"], time.monotonic(), told

    def _speaks(self) -> bool:
        """One of those that wait speaks for all: the first."""
        return all(self.number < other for other, heard in self._others.items() if heard.told.get("waits"))
