"""What processes hear of each other: for whom one waits, and who is silent."""

import contextlib
import threading
import time

import pytest
import torch.distributed as dist

from training.loop import watch
from training.loop.watch import Watch, doing, waiting


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(watch, "BEAT", 0.05)
    monkeypatch.setattr(watch, "SAY_AFTER", 0.4)


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_who_waits_says_for_whom_and_why_and_one_speaks_for_all(capfd):
    store = dist.HashStore()
    first, second, third = (Watch(store, number, 3, 100) for number in range(3))
    blocks = [one.at_work() for one in (first, second, third)]
    blocks += [first.said_to_do("saving"), *(one.said_to_do("", waits=True) for one in (second, third))]
    with contextlib.ExitStack() as stack:
        for block in blocks:
            stack.enter_context(block)
        until(lambda: "process 0: saving, " in second.waited_for())
        time.sleep(0.7)
    said = capfd.readouterr().err
    assert "waiting for process 0: saving, 0 s" in said or "waiting for process 0: saving, 1 s" in said
    assert "process 1" not in said and "process 2" not in said and said.count("waiting for") <= 2


def test_a_silent_process_is_named_once(capfd):
    store, told = dist.HashStore(), []
    first, second = Watch(store, 0, 2, 0.8, told.append), Watch(store, 1, 2, 100)
    with first.at_work():
        with second.at_work():
            until(lambda: first.waited_for())
            time.sleep(1.0)
            assert told == []  # however long it works, it is heard
        until(lambda: told)
        time.sleep(0.5)
    assert told == ["process 1 was not heard for 1 s: stopped, dead, or cut off"]
    assert "waiting for process 1: not heard for" in capfd.readouterr().err


def test_a_store_that_is_gone_is_silence():
    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

    told = threading.Event()
    with Watch(Gone(), 1, 2, 0.3, lambda sentence: told.set()).at_work():
        assert told.wait(20)


def test_what_a_process_does_is_of_the_watch_that_is_on():
    with doing("saving"), waiting():
        pass  # without one
    one = Watch(dist.HashStore(), 0, 1, 100)
    with one.at_work():
        with doing("saving"):
            assert one.doing == "saving"
            with waiting():
                assert one.doing == "saving" and one._waits
            assert not one._waits
        assert one.doing == "starting"
