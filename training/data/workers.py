"""Loader processes and signals: SIGTERM to everybody, as schedulers and launchers send it, ends none of them.

A scheduler that stops a job sends SIGTERM to all of its processes, and a launcher to the group of each training
process. The training process saves and needs its workers until then. So they take SIGTERM from it alone, and end when
it does.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

LOOK_AFTER_PARENT = 1.0  # seconds


@contextlib.contextmanager
def started_untouched_by_termination() -> Iterator[None]:
    """Processes started inside have SIGTERM blocked from their first moment; one to this process waits for the end."""
    resource_tracker.ensure_running()  # its start, which multiprocessing would do inside, lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def live_as_long_as_the_parent(worker: int) -> None:
    """A worker's first act: SIGTERM from others than its parent is nothing, and it ends soon after its parent.

    Args:
        worker: Its number, as torch hands it over.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()


def _watch(started_by: int) -> None:
    parent = multiprocessing.parent_process()
    # A forked worker's siblings hold the pipe that tells of the parent's end; behind a server of forks, getppid does
    # not change.
    while parent is not None and os.getppid() == started_by and parent.is_alive():
        sent = signal.sigtimedwait({signal.SIGTERM}, LOOK_AFTER_PARENT)
        if sent is not None and sent.si_pid == parent.pid:
            break
    os._exit(0)
