"""Processes that hear of each other beside their work: for whom one waits, who is silent, and an end to that.

A thread of each process counts on in the group's store every few seconds, with what its process does. So a process that
waits says for whom and why, and one that is stopped or dead, or whose machine is gone, ends the others after a set time
whatever the devices wait for, with its number.
"""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

BEAT = 2.0  # seconds
SAY_AFTER = 60.0  # seconds of waiting, and again after as many


# The one of this process, while a run is on.
_current: list["Watch"] = []


def doing(what: str) -> contextlib.AbstractContextManager[None]:
    """Inside, this process does what others may have to wait for."""
    return _current[-1].said_to_do(what) if _current else contextlib.nullcontext()


def waiting() -> contextlib.AbstractContextManager[None]:
    """Inside, this process waits for others."""
    return _current[-1].said_to_do("", waits=True) if _current else contextlib.nullcontext()


class Watch:
    """What one process tells of itself and knows of the others.

    Args:
        store: Of torch.distributed, with `set`, `check` and `get`.
        number: Of this process.
        processes: How many there are.
        patience: Seconds of silence after which `on_silence` is called.
        on_silence: Gets the sentence that says who is silent; called once, in the watch's thread.
    """

    def __init__(
        self, store: Any, number: int, processes: int, patience: float, on_silence: Callable[[str], None] | None = None
    ):
        self.store, self.number, self.processes = store, number, processes
        self.patience, self.on_silence = patience, on_silence
        self.doing, self._since, self._waits, self._said = "starting", time.monotonic(), False, 0.0
        # Process -> (its last count, when it was new here, what it told).
        self._heard: dict[int, tuple[int, float, dict[str, Any]]] = {}
        self._beats, self._said_silence, self._ended = 0, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Tells and listens inside."""
        _current.append(self)
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()
            _current.remove(self)

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
        """The processes that were not heard for so many seconds."""
        now = time.monotonic()
        return [number for number, (_, heard, _) in sorted(self._heard.items()) if now - heard > longer_than]

    def waited_for(self) -> str:
        """For whom the others wait, in words; empty where all wait."""
        now, told = time.monotonic(), []
        for number, (_, heard, last) in sorted(self._heard.items()):
            if now - heard > 5 * BEAT:
                told.append(f"process {number}: not heard for {now - heard:.0f} s")
            elif not last.get("waits"):
                told.append(f"process {number}: {last.get('doing')}, {last.get('seconds', 0):.0f} s")
        return "; ".join(told)

    def _watch(self) -> None:
        while not self._ended.wait(BEAT):
            with contextlib.suppress(Exception):  # a store whose process is gone is silence too
                self._tell()
            self._listen()
            waited = time.monotonic() - self._since
            if self._waits and waited - self._said > SAY_AFTER:
                self._said = waited
                if (told := self.waited_for()) and self._speaks():
                    print(f"waiting for {told}", file=sys.stderr, flush=True)
            elif (silent := self.silent(SAY_AFTER)) and time.monotonic() - self._said_silence > SAY_AFTER:
                self._said_silence = time.monotonic()
                print(f"waiting for {self.waited_for()}", file=sys.stderr, flush=True)
            if self.on_silence is not None and (silent := self.silent(self.patience)):
                on_silence, self.on_silence = self.on_silence, None
                numbers = ", ".join(map(str, silent))
                on_silence(f"process {numbers} was not heard for {self.patience:.0f} s: stopped, dead, or cut off")

    def _tell(self) -> None:
        self._beats += 1
        seconds = time.monotonic() - self._since
        told = {"beat": self._beats, "doing": self.doing, "seconds": seconds, "waits": self._waits}
        self.store.set(f"watch/{self.number}", json.dumps(told))

    def _listen(self) -> None:
        for number in range(self.processes):
            if number == self.number:
                continue
            beat, heard, last = self._heard.get(number, (-1, time.monotonic(), {}))
            with contextlib.suppress(Exception):
                if self.store.check([f"watch/{number}"]):
                    last = json.loads(self.store.get(f"watch/{number}"))
                    if last["beat"] != beat:
                        beat, heard = last["beat"], time.monotonic()
            self._heard[number] = beat, heard, last

    def _speaks(self) -> bool:
        """One of those that wait speaks for all: the first."""
        waiting = [number for number, (_, _, last) in self._heard.items() if last.get("waits")]
        return self.number < min(waiting, default=self.processes)
