"""Every byte of a checkpoint is watched: a flipped bit or a missing end anywhere in it is found and the file named."""

import json
import math
import random
import shutil

import pytest

from tests.training.runs import resumable_settings, use_memory
from training import pretrain
from training.loop.record import (
    FORMAT,
    CheckpointError,
    DamagedCheckpoint,
    find_damage,
    is_whole,
    read_record,
    sealed,
    sum_of,
    write_record,
)
from training.loop.run_folder import list_checkpoints
from training.loop.tracking import StepWindow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        use_memory(patch)
        pretrain.run(resumable_settings(folder, steps=2))
    return list_checkpoints(folder)[-1]


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def damage_of(folder):
    """What `--resume` would say."""
    try:
        return find_damage(folder, read_record(folder))
    except DamagedCheckpoint as error:
        return str(error)


def test_a_record_names_every_file(checkpoint):
    named = {checkpoint / name for name in read_record(checkpoint)["files"]}
    assert named == set(files_of(checkpoint)) - {checkpoint / "run.json"}
    assert {"model.safetensors", "optimizer.pt", "moving_average.safetensors", "process-00000.pt"} <= {
        path.name for path in named
    }


def test_every_flipped_bit_is_found_and_its_file_named(checkpoint):
    """Ten bits of every file, and a hundred of any byte."""
    assert damage_of(checkpoint) is None and is_whole(checkpoint)
    draw = random.Random(0)
    files = files_of(checkpoint)
    chosen = files * 10 + draw.choices(files, [path.stat().st_size for path in files], k=100)
    for path in chosen:
        content = path.read_bytes()
        flipped = bytearray(content)
        place = draw.randrange(len(flipped))
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        said = damage_of(checkpoint)
        path.write_bytes(content)
        # White space between the words of run.json says nothing.
        harmless = path.name == "run.json" and same_json(content, flipped)
        assert harmless or (said and str(path) in said), (path, place)
    assert damage_of(checkpoint) is None


def same_json(content, other):
    try:
        return json.loads(content) == json.loads(other)
    except ValueError:
        return False


def test_files_that_end_early_or_are_gone_are_named(checkpoint, tmp_path):
    for path in files_of(checkpoint):
        copy = shutil.copytree(checkpoint, tmp_path / path.name / "step-00000002")
        damaged = copy / path.relative_to(checkpoint)
        damaged.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert str(damaged) in damage_of(copy)
        damaged.unlink()
        assert str(damaged) in damage_of(copy)


def test_a_part_of_a_file_has_the_sum_of_a_file_of_its_content(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    content = random.Random(0).randbytes(3 << 20)
    whole.write_bytes(content)
    for size in (0, 1, 1 << 20, (1 << 20) + 1, 3 << 20):
        part.write_bytes(content[:size])
        assert sum_of(whole, size) == sum_of(part) and sum_of(part)["bytes"] == size


def test_a_record_of_a_later_version_is_no_damage(checkpoint, tmp_path):
    copy = shutil.copytree(checkpoint, tmp_path / "step-00000002")
    (copy / "run.json").write_text(json.dumps(sealed({**read_record(copy), "format": 3})))
    with pytest.raises(CheckpointError, match="written in format 3, this version reads format 2") as caught:
        read_record(copy)
    assert not isinstance(caught.value, DamagedCheckpoint)


def test_a_norm_that_overflowed_is_json_for_everybody_and_comes_back(tmp_path):
    rows = [{"step": 3, "loss": 1.5, "terms": {"a": 1.0}, "counts": {"a": 4}, "grad_norm": math.inf}]
    write_record(tmp_path, {"progress": {"window": rows}})
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)
    assert StepWindow(["a"], tmp_path, False, read_record(tmp_path)["progress"]["window"]).rows() == rows
    # One that an earlier version wrote.
    (tmp_path / "run.json").write_text(json.dumps(sealed({"format": FORMAT, "progress": {"window": rows}})))
    assert StepWindow(["a"], tmp_path, False, read_record(tmp_path)["progress"]["window"]).rows() == rows
