"""SIGTERM as a request: the run saves after a step and leaves, however often and to whomever it is sent."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def termination_noticed() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process; more of them ask for the same.

    Once it is set, torch no longer raises the death of a loader's worker in the middle of a step; whoever waits for a
    batch still hears of it. Outside of the main thread, which alone receives signals, the event is never set.
    """
    requested = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}

    def notice(signum: int, frame: FrameType | None) -> None:
        if not requested.is_set():
            before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        requested.set()

    signal.signal(signal.SIGTERM, notice)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])
        if requested.is_set():
            signal.signal(signal.SIGCHLD, before[signal.SIGCHLD])


@contextlib.contextmanager
def deaths_unheard() -> Iterator[None]:
    """Inside, torch does not raise the death of a loader's worker, as its handler does wherever the process is."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
