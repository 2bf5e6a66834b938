"""Files and folders are there whole or not at all, whoever dies when."""

import errno
import fcntl
import json
import math
import os
import signal
import stat
import subprocess
import sys
import time
from collections import OrderedDict
from types import MappingProxyType

import pytest
from safetensors.torch import save_file
from torch import ones

from pyramidclip_hf.files import (
    NoLocks,
    cache_folder,
    folder_written_aside,
    json_text,
    locked,
    write_atomically,
    written_aside,
)


@pytest.fixture
def umask_022():
    before = os.umask(0o022)
    yield
    os.umask(before)


def names_in(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_the_old_one_until_it_is_the_new_one(tmp_path):
    path = tmp_path / "table [1].json"
    write_atomically(path, b"old")
    with written_aside(path) as aside:
        aside.write_bytes(b"new")
        assert path.read_bytes() == b"old" and aside.parent == tmp_path
    assert path.read_bytes() == b"new" and names_in(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_no_trace(error, tmp_path):
    write_atomically(tmp_path / "file", b"old")
    (tmp_path / "folder").mkdir()
    for write in (written_aside, folder_written_aside):
        name = "file" if write is written_aside else "folder"
        with pytest.raises(type(error)), write(tmp_path / name) as aside:
            (aside / "part" if aside.is_dir() else aside).write_bytes(b"half")
            raise error
    assert names_in(tmp_path) == ["file", "folder"] and (tmp_path / "file").read_bytes() == b"old"


def test_a_disk_that_refuses_the_last_bytes_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomically(tmp_path / "file", b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / "file", b"new")
    assert names_in(tmp_path) == ["file"] and (tmp_path / "file").read_bytes() == b"old"


def test_what_killed_writers_left_is_removed_by_a_sole_writer_alone(tmp_path):
    for name in (".out [1].npz.0123.partial", ".out [1].npz.x.partial", ".out [1].npz2.0123.partial"):
        (tmp_path / name).touch()
    with written_aside(tmp_path / "out [1].npz"):
        pass
    assert len(names_in(tmp_path)) == 4
    with written_aside(tmp_path / "out [1].npz", sole_writer=True):
        pass
    assert names_in(tmp_path) == [".out [1].npz2.0123.partial", "out [1].npz"]


def test_a_folder_takes_the_place_of_another_as_a_whole(tmp_path):
    for content in ("first", "second"):
        (tmp_path / ".final.partial").mkdir()
        (tmp_path / ".final.partial" / "left by a killed one").touch()
        with folder_written_aside(tmp_path / "final") as aside:
            (aside / "model").mkdir()
            (aside / "model" / content).write_text(content)
    assert names_in(tmp_path) == ["final"] and names_in(tmp_path / "final" / "model") == ["second"]


def test_files_are_as_readable_as_the_users_others(tmp_path, umask_022):
    with written_aside(tmp_path / "a.safetensors") as aside:
        save_file({"x": ones(2)}, aside)
    with folder_written_aside(tmp_path / "folder") as folder:
        save_file({"x": ones(2)}, folder / "a.safetensors")
        (folder / "inner").mkdir()
        (folder / "run.sh").touch(0o755)
    modes = {path.relative_to(tmp_path).as_posix(): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    inside = {"folder": 0o755, "folder/inner": 0o755, "folder/run.sh": 0o755, "folder/a.safetensors": 0o644}
    assert modes == {"a.safetensors": 0o644} | inside


def test_a_lock_is_held_by_one_and_let_go_when_it_is_killed(tmp_path):
    path = tmp_path / "new folder" / "lock"
    code = (
        "import sys, time\nfrom pyramidclip_hf.files import locked\n"
        f"with locked({str(path)!r}):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match="held by another process"), locked(path, wait=False):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    begun = time.monotonic()
    with locked(path), pytest.raises(BlockingIOError), locked(path, wait=False):
        pass
    with locked(path, wait=False):
        assert time.monotonic() - begun < 30


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_and_nothing_of_ours_stands_for_one(tmp_path, monkeypatch, code):
    """A file in the place of a lock would stay when its process is killed, and shut out the next."""

    def refuse(handle, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    path = tmp_path / "lock"
    with pytest.raises(NoLocks, match=f"{path}: this file system has no locks"), locked(path, wait=False):
        pass
    for _ in range(2):
        with locked(path, needed=False), locked(path, needed=False):
            pass


def test_what_else_fails_with_a_lock_is_its_own_error(tmp_path, monkeypatch):
    def refuse(handle, operation):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken"), locked(tmp_path / "lock", needed=False):
        pass


def test_a_folder_is_written_where_folders_cannot_be_flushed(tmp_path, monkeypatch):
    flush = os.fsync

    def files_alone(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", files_alone)
    with folder_written_aside(tmp_path / "new") as folder:
        (folder / "file").write_text("whole")
    assert (tmp_path / "new" / "file").read_text() == "whole"


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("PYRAMIDCLIP_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "pyramidclip")


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_json_has_no_numbers_that_json_has_not():
    value = {
        "a": [1.5, math.nan, (math.inf, {"b": -math.inf})],
        "c": MappingProxyType({"d": None, "e": True}),
        "f": "ü",
    }
    text = json_text(value, indent=1, ensure_ascii=False)
    read = json.loads(text, parse_constant=no_constant)
    assert read == {"a": [1.5, "nan", ["inf", {"b": "-inf"}]], "c": {"d": None, "e": True}, "f": "ü"}
    assert math.isnan(float(read["a"][1])) and float(read["a"][2][1]["b"]) == -math.inf


def test_json_of_plain_values_is_that_of_the_standard_library():
    value = OrderedDict(b=[1, 2.5, "x", None], a={"c": (True,)})
    assert json_text(value, sort_keys=True) == json.dumps(value, sort_keys=True)
    with pytest.raises(TypeError, match="not JSON serializable"):
        json_text({"a": object()})
