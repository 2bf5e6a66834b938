"""`python -m tests.gpu` where there is no GPU: every part at toy size, and what happens when something goes wrong."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from tests.gpu import session as sessions
from tests.gpu.__main__ import RESULTS, main
from tests.gpu.record import Record
from tests.gpu.session import Part, Session, Skipped, find_device, named

MACHINE = {"device": "cpu", "dry": True}


@pytest.mark.timeout(1500)
def test_every_part_passes_at_toy_size(tmp_path, checkout):
    pytest.importorskip("open_clip")
    before = RESULTS.read_bytes() if RESULTS.is_file() else None
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu", "--dry", "--minutes", "24", "--output", str(tmp_path / "gpu.json")],
        cwd=checkout,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.startswith("No GPU is measured: a dry pass was asked for.")
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["machine"]["dry"]
    states = {name: part["state"] for name, part in found["parts"].items()}
    assert {name for name, state in states.items() if state == "skipped"} <= {"right: checkpointing", "fast: demo"}
    assert set(states.values()) <= {"passed", "skipped"} and len(states) > 25
    assert "dry pass" in (tmp_path / "gpu.md").read_text()
    assert (RESULTS.read_bytes() if RESULTS.is_file() else None) == before


def session_of(tmp_path, *parts, seconds=60.0, chosen=None):
    names = [part.name for part in parts]
    record = Record(tmp_path / "gpu.json", MACHINE, names, names if chosen is None else chosen)
    session = Session(record, torch.device("cpu"), tmp_path, time.monotonic() + seconds)
    for part in parts:
        if part.name in (chosen or names):
            session.run(part)
    return record


def refuse(session):
    raise Skipped("not on this machine")


def break_down(session):
    session.note(what="before", number=1 / 3)
    raise RuntimeError("it broke")


def miss(session):
    session.check("a", 2.0, at_most=1)
    session.check("b", float("nan"), at_most=1)
    session.check("c", 1, equals=1)


def test_a_part_that_fails_stops_nothing_and_says_why(tmp_path):
    good = Part("right: good", 5, lambda session: session.check("fine", 3, at_least=3))
    parts = [
        Part("right: broken", 5, break_down),
        Part("right: refused", 5, refuse),
        Part("fast: missed", 5, miss),
        good,
    ]
    record = session_of(tmp_path, *parts)
    written = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert written == record.parts
    assert [part["state"] for part in written.values()] == ["failed", "skipped", "failed", "passed"]
    assert written["right: broken"]["reason"] == "RuntimeError: it broke"
    assert written["right: broken"]["rows"] == [{"what": "before", "number": 0.3333}]
    assert written["fast: missed"]["reason"].startswith("a: 2.0 (check: at most 1) DOES NOT HOLD; b: nan")
    page = (tmp_path / "gpu.md").read_text()
    assert "| right: refused | skipped |" in page and "| check | value | wanted | holds |" in page


def test_a_part_ends_with_its_seconds_and_the_rest_is_not_reached(tmp_path):
    def endless(session):
        session.part_ends = 0
        session.note(what="begun")
        while True:
            time.sleep(0.01)

    parts = [Part("right: endless", 5, endless), Part("right: after", 5, miss)]
    record = session_of(tmp_path, *parts, seconds=0.2)
    assert record.parts["right: endless"]["state"] == "failed"
    assert record.parts["right: endless"]["reason"].startswith("not finished after")
    assert record.parts["right: endless"]["rows"] == [{"what": "begun"}]
    assert record.parts["right: after"]["state"] == "not reached"


def test_two_calls_make_one_file_and_another_machine_starts_anew(tmp_path):
    good, other = (Part(name, 5, lambda session: session.note(what="seen")) for name in ("right: one", "fast: two"))
    session_of(tmp_path, good, other, chosen=["right: one"])
    record = session_of(tmp_path, good, other, chosen=["fast: two"])
    assert {name: part["state"] for name, part in record.parts.items()} == {
        "right: one": "passed",
        "fast: two": "passed",
    }
    elsewhere = Record(tmp_path / "gpu.json", {"device": "another", "dry": False}, ["right: one"], [])
    assert elsewhere.parts["right: one"]["state"] == "not reached"


def test_a_damaged_file_is_begun_anew(tmp_path):
    (tmp_path / "gpu.json").write_text("{")
    assert Record(tmp_path / "gpu.json", MACHINE, ["right: one"], []).parts["right: one"]["state"] == "not reached"


def test_parts_that_do_not_exist_are_named(tmp_path, capsys):
    parts = [Part("right: one", 5, miss), Part("fast: two", 5, miss)]
    assert [part.name for part in named(parts, ["right", "fast"], ["two"])] == ["fast: two"]
    with pytest.raises(ValueError, match="--parts: expected some of fast, right, got 'rigth'"):
        named(parts, ["rigth"], [])
    assert main(["--list", "--only", "tokenizer"]) == 2
    assert "error: --only tokenizer: no part has this in its name" in capsys.readouterr().err


def test_a_gpu_that_torch_cannot_use_is_a_sentence(monkeypatch):
    def refuse(device):
        raise ValueError(f"{device}: cannot compute on it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sessions, "check_device", refuse)
    with pytest.raises(ValueError, match="cuda: cannot compute on it"):
        find_device(dry=False)


@pytest.mark.parametrize(
    ("version", "words"), [(None, "built without CUDA"), ("13.0", "built for CUDA 13.0, finds no GPU")]
)
def test_no_gpu_says_why(monkeypatch, version, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    device, why = find_device(dry=False)
    assert device.type == "cpu" and words in why


def test_a_test_sees_a_gpu_only_where_it_is_about_one(request, monkeypatch):
    """Whatever the machine has."""
    plugins = request.config.pluginmanager.get_plugins()
    [configure] = [one.pytest_configure for one in plugins if getattr(one, "forking_stays_possible", None)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    for expression, seen in (("gpu", "3"), ("", ""), ("not slow", "")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        configure(SimpleNamespace(option=SimpleNamespace(markexpr=expression)))
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen
