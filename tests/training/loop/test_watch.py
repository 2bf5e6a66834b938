"""What processes hear of each other: for whom one waits, and who is silent."""

import contextlib
import json
import time

import pytest
import torch.distributed as dist

from training.loop import watch
from training.loop.watch import GONE, Ended, Watch, doing, waiting


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
        first.leave(Ended("finished", ""))
        until(lambda: not second.waited_for())  # nobody waits for a process that said that it ends
    said = capfd.readouterr().err
    assert "waiting for process 0: saving, 0 s" in said or "waiting for process 0: saving, 1 s" in said
    assert "process 1" not in said and "process 2" not in said and said.count("waiting for") <= 2


def test_a_silent_process_is_named_once(capfd):
    store, told = dist.HashStore(), []
    first, second = Watch(store, 0, 2, 0.8, told.append), Watch(store, 1, 2, 100)
    with first.at_work():
        second._leaving.wait = lambda seconds=0: time.sleep(seconds)  # ends without a word, later
        for thread in second._threads:
            thread.start()
        until(lambda: first.waited_for())
        time.sleep(1.0)
        assert told == []  # however long it works, it is heard
        second.store = None
        until(lambda: told)
        time.sleep(0.5)
    assert told == [Ended("another process", f"process 1 {GONE}")]
    said = capfd.readouterr().err  # the silence lasts less than two seconds more, and a look comes every 0.05
    assert "waiting for process 1: not heard for" in said and said.count("waiting for") <= 10


def test_whoever_notices_first_says_the_same():
    """A broken connection is found by the main thread, long before the watch gives up."""
    store = dist.HashStore()
    first, second = Watch(store, 0, 2, 100), Watch(store, 1, 2, 100)
    with first.at_work():
        with second.at_work():
            until(lambda: first._others[1].told)
            second._tell = lambda: None
        began = time.monotonic()
        assert first.search_loss("Connection closed by peer") == ("another process", f"process 1 {GONE}")
        assert time.monotonic() - began < 20 * watch.BEAT + 2


def test_a_process_that_is_there_but_did_not_come_is_named():
    store = dist.HashStore()
    first, second = Watch(store, 0, 2, 100), Watch(store, 1, 2, 100)
    with first.at_work(), second.at_work(), second.said_to_do("reading the data of step 3"):
        until(lambda: first._others[1].told.get("doing") != "starting" and first._others[1].told)
        reason, message = first.search_loss("timed out")
    assert reason == "another process" and message.startswith("timed out; missing: process 1: reading the data of step")


def test_how_a_process_ends_is_heard_and_not_taken_for_death():
    store, told = dist.HashStore(), []
    first = Watch(store, 0, 3, 0.4, told.append)
    second, third = (Watch(store, number, 3, 100) for number in (1, 2))
    with first.at_work():
        with third.at_work():
            until(lambda: first._others[2].told)
        with second.at_work():
            time.sleep(1.0)
            assert not told  # the third is at its end, and may be silent
            second.leave(Ended("disk full", "No space left on device"))
        until(lambda: told)
    assert told == [Ended("disk full", "process 1: No space left on device")]


def test_a_store_that_is_gone_is_silence_of_the_first_process():
    class Gone:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

        clone = lambda self: self  # noqa: E731

    told = []
    with Watch(Gone(), 1, 3, 0.3, told.append).at_work():
        until(lambda: told)
    assert told == [Ended("another process", f"process 0 {GONE}")]


def test_a_store_that_does_not_answer_stops_nobody_from_judging():
    class Stuck:
        def set(self, name, value):
            time.sleep(100)

    told = []
    one = Watch(Stuck(), 1, 2, 0.3, told.append)
    began = time.monotonic()
    with one.at_work():
        until(lambda: told)
    assert told == [Ended("another process", f"process 0 {GONE}")] and time.monotonic() - began < 50


def test_a_process_that_was_stopped_itself_does_not_take_the_others_for_dead(monkeypatch):
    """Its clock goes on while it stands still: the first look afterwards finds everybody's last word old."""
    store, told = dist.HashStore(), []
    first, second = Watch(store, 0, 2, 0.5, told.append), Watch(store, 1, 2, 100)
    shift, clock = [0.0], time.monotonic
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock() + shift[0])
    with first.at_work(), second.at_work():
        for _ in range(5):
            time.sleep(0.3)
            shift[0] += 30
    assert not told


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
    with doing("saving"):
        assert one.doing == "starting"  # it is over


def test_how_it_ended_is_told_before_a_process_goes_on_to_its_end():
    class Slow:
        told: list[str] = []

        def set(self, name, value):
            time.sleep(0.1)  # a store of a far machine
            self.told.append(value)

        def check(self, names):
            return False

    with Watch(Slow(), 0, 1, 100).at_work():
        pass
    assert Slow.told and json.loads(Slow.told[-1])["ended"] == ["finished", ""]


def test_who_ends_itself_meanwhile_is_not_ended_for_another():
    """Of how a process ended those hear first that wait for it, and end in good order."""
    told = []
    one = Watch(dist.HashStore(), 0, 2, 100, told.append)
    one._leaving.set()
    one._give_up(Ended("disk full", "process 1: No space left on device"))
    assert not told
    one._give_up(Ended("another process", f"process 1 {GONE}"))
    assert len(told) == 1


def test_each_wait_is_said_anew(capfd):
    store = dist.HashStore()
    first, second = Watch(store, 0, 2, 100), Watch(store, 1, 2, 100)
    with first.at_work(), second.at_work():
        for doing_so in ("saving", "reading"):
            with first.said_to_do(doing_so), second.said_to_do("", waits=True):
                until(lambda word=doing_so: f"process 0: {word}" in second.waited_for())
                time.sleep(0.7)
    said = capfd.readouterr().err
    assert "process 0: saving" in said and "process 0: reading" in said
