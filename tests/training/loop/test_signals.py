"""SIGTERM as a request, seen in this process: what is noticed, and what every signal does afterwards."""

import os
import signal
import threading

import pytest

from training.loop.signals import deaths_unheard, termination_noticed


def of_torch(signum, frame):
    """Stands for the handler by which torch raises the death of a loader's worker."""


def of_caller(signum, frame):
    """Stands for what SIGTERM did before."""


@pytest.fixture
def handlers():
    """Handlers of others, in place."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGCHLD)}
    signal.signal(signal.SIGTERM, of_caller)
    signal.signal(signal.SIGCHLD, of_torch)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def now():
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGCHLD)


def test_sigterm_is_noticed_however_often_and_all_is_as_before(handlers):
    with termination_noticed() as requested:
        assert not requested.is_set() and signal.getsignal(signal.SIGCHLD) is of_torch
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert requested.is_set() and signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
    assert now() == (of_caller, of_torch)


def test_without_sigterm_all_is_as_before(handlers):
    with termination_noticed():
        assert signal.getsignal(signal.SIGTERM) is not of_caller
    assert now() == (of_caller, of_torch)


def test_deaths_are_unheard_inside_only(handlers):
    with pytest.raises(KeyError), deaths_unheard():
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL
        raise KeyError
    assert now() == (of_caller, of_torch)


@pytest.mark.parametrize("context", [termination_noticed, deaths_unheard])
def test_another_thread_can_go_through_and_changes_nothing(handlers, context):
    seen = []

    def go():
        with context():
            seen.append(now())

    thread = threading.Thread(target=go)
    thread.start()
    thread.join()
    assert seen == [(of_caller, of_torch)]
