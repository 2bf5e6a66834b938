"""`training.prepare.detect` with a detector that misbehaves, and the command."""

import json

import numpy as np
import pytest
import torch

from pyramidclip_command import Failure
from tests.training.prepare.small_data import (
    counts,
    picture,
    problems,
    read_tars,
    records,
    run_step,
    tree,
    write_tar,
)
from training.data.records import sample_from_members
from training.data.shards import read_dataset_json
from training.data.sources import open_data_set
from training.prepare import detect
from training.prepare.steps.detectors import open_detector
from training.prepare.steps.flags import DetectorArguments
from training.prepare.steps.regions import Detections
from training.prepare.steps.work import Worker

pytest.importorskip("torchvision")
pytest.importorskip("torchvision")


class Scripted:
    """A provider that gives what the width of the picture asks for."""

    feature_size = 4
    made_by = {"maker": "scripted"}

    def detect(self, pictures):
        return [self.one(picture.width) for picture in pictures]

    def one(self, width):
        boxes, scores, features = [[0, 0, 1, 1]] * 3, [0.5, 0.9, 0.7], np.arange(12.0).reshape(3, 4)
        if width == 20:
            return Detections([], [], [], np.zeros((0, 4)))
        if width == 21:
            features[1, 2] = np.nan
        if width == 22:
            features[:] = np.nan
        if width == 23:
            boxes = [[0.5, 0, 0.4, 1], [0, 0, 1, 1], [0, 0, 1.5, 1]]
        if width == 24:
            raise ValueError("too narrow for me")
        return Detections(boxes, scores, ["a", "b", "c"], features, [["x", "y"], [], ["z"]])


def packed(folder, widths=(30, 20, 21, 22, 23, 24, 31)):
    samples = [(f"w{width}", {"jpg": picture(width, (width, 10)), "txt": b"a"}) for width in widths]
    samples.insert(3, ("broken", {"jpg": picture(0, (100, 90))[:3000], "txt": b"a"}))
    samples.insert(5, ("huge", {"jpg": picture(0, (200, 100)), "txt": b"a"}))
    samples.insert(6, ("unfit", {"jpg": picture(0), "txt": b"\xff"}))
    write_tar(folder / "00000.tar", samples[:6])
    write_tar(folder / "00001.tar", samples[6:])
    return dict(samples)


def run(folder, provider=None, **options):
    arguments = detect.DetectArguments(str(folder), batch_size=options.pop("batch_size", 3), max_image_pixels=10_000)
    return detect.run(provider or Scripted(), arguments, options.pop("top", 2), Worker(), **options)


def test_what_detectors_do_wrong_is_named_and_the_rest_goes_on(tmp_path):
    before = packed(tmp_path / "data")
    run(tmp_path / "data")
    after, made = read_tars(tmp_path / "data"), records(tmp_path / "data")
    assert list(after) == list(before)
    for key, members in before.items():
        assert {s: d for s, d in after[key].items() if s in members} == members
    for key in ("w30", "w31"):
        assert [(r["label"], r["score"], r["attributes"]) for r in made[key]["regions"]] == [
            ("b", 0.9, []),
            ("c", 0.7, ["z"]),
        ]
        assert made[key]["tags"] == ["b", "z c"]
        assert sample_from_members(after[key], key, "").roi.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert [r["label"] for r in made["w21"]["regions"]] == ["c", "a"] and [
        r["label"] for r in made["w23"]["regions"]
    ] == ["b"]
    assert made["w20"] == made["w22"] == {"regions": []}
    named = {(key, reason) for _, key, reason, _ in problems(tmp_path / "data", "regions")}
    assert named == {
        ("w20", "no-regions"),
        ("w21", "feature-not-finite"),
        ("w22", "feature-not-finite"),
        ("w22", "no-regions"),
        ("w23", "box-upside-down"),
        ("w23", "box-outside"),
        ("w24", "refused-by-detector"),
        ("broken", "bad-picture"),
        ("huge", "picture-too-large"),
        ("unfit", "bad-utf8"),
    }
    assert {k: counts(tmp_path / "data", "regions")[k] for k in ("in", "out", "rejected")} == {
        "in": 10,
        "out": 10,
        "rejected": 0,
    }
    described = read_dataset_json(tmp_path / "data")
    assert described["roi_feature_size"] == 4 and described["made_by"]["regions"] == {"maker": "scripted"}


def test_a_detector_that_refuses_everything_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(detect, "_REFUSALS_IN_A_ROW", 4)
    write_tar(tmp_path / "data" / "0.tar", [(f"k{i}", {"jpg": picture(i, (24, 10)), "txt": b"a"}) for i in range(6)])
    with pytest.raises(Failure, match="refused 4 pictures in a row; the last one: too narrow"):
        run(tmp_path / "data")
    assert not list((tmp_path / "data").glob("*.partial"))


def test_two_kinds_are_not_mixed_unknowingly(tmp_path):
    packed(tmp_path / "data")
    run(tmp_path / "data")
    first = tree(tmp_path / "data")
    run(tmp_path / "data")
    assert tree(tmp_path / "data") == first
    other = Scripted()
    other.made_by = {"maker": "another"}
    with pytest.raises(
        ValueError, match="already has regions made by {'maker': 'scripted'}, not by {'maker': 'another'}"
    ):
        run(tmp_path / "data", other)
    assert tree(tmp_path / "data") == first
    run(tmp_path / "data", other, overwrite=True)
    assert read_dataset_json(tmp_path / "data")["made_by"]["regions"] == {"maker": "another"}


def test_unfinished_regions_are_marked_and_refused(tmp_path):
    packed(tmp_path / "data")
    run(tmp_path / "data")

    class Stops(Scripted):
        made_by = {"maker": "stops"}

        def one(self, width):
            if width == 31:
                raise KeyboardInterrupt
            return super().one(width)

    class Resumed(Scripted):
        made_by = Stops.made_by

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "data", Stops(), overwrite=True)
    assert read_dataset_json(tmp_path / "data")["unfinished"] == ["regions"]
    with pytest.raises(ValueError, match=r"data: regions has begun and not ended"):
        open_data_set(tmp_path / "data")
    run(tmp_path / "data", Resumed(), overwrite=True)
    assert open_data_set(tmp_path / "data").samples


def test_the_command(tmp_path, checkpoint):
    packed(tmp_path / "data")
    flags = [
        "--input_dir",
        str(tmp_path / "data"),
        "--detector",
        checkpoint("detr"),
        "--device",
        "cpu",
        "--score_threshold",
        "0",
    ]
    run_step(detect, [*flags, "--max_image_pixels", "10000"])
    described = read_dataset_json(tmp_path / "data")
    assert described["roi_feature_size"] == 24 and described["made_by"]["regions"]["maker"] == "detr"
    assert json.loads(read_tars(tmp_path / "data")["w30"]["json"])["regions"]
    with pytest.raises(ValueError, match="batch_size is 0"):
        run_step(detect, [*flags, "--batch_size", "0"])


def test_a_slow_type_is_said(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    open_detector(DetectorArguments(detector=checkpoint("detr"), dtype="bfloat16"))
    assert capsys.readouterr().err.count("--dtype bfloat16: this processor has no bfloat16 arithmetic") == 1
