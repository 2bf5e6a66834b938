"""`steps/regions.py`: which detections a sample keeps, and lists of names."""

import numpy as np
import pytest

from training.prepare.steps.flags import read_names
from training.prepare.steps.regions import Detections, best_regions, confident_attributes, faults_of
from training.prepare.steps.work import Tally


def test_name_lists(tmp_path):
    (tmp_path / "n.txt").write_text("yolk\ngoal, goals\nbath room\n")
    assert read_names(tmp_path / "n.txt") == ["yolk", "goal", "bath room"]
    (tmp_path / "n.txt").write_text("yolk\n\ngoal\n")
    with pytest.raises(ValueError, match="line 2"):
        read_names(tmp_path / "n.txt")


def test_equal_scores_keep_their_order_and_tags_are_one_a_region():
    found = Detections(np.tile([0, 0, 1, 1], (4, 1)), [0.5, 0.7, 0.5, 0.7], ["a", "b", "a", "c"], np.eye(4))
    levels = best_regions(found, 3, Tally(), "here", "k")
    assert [r.label for r in levels["regions"]] == ["b", "c", "a"] and levels["tags"] == ["b", "c", "a"]
    np.testing.assert_array_equal(levels["roi"], np.eye(4)[[1, 3, 0]])
    levels = best_regions(found, 4, Tally(), "here", "k")
    assert levels["tags"] == ["b", "c", "a", "a"] and len(levels["regions"]) == 4
    assert faults_of(Detections([[0, 0, 1, 1]], [1], [" "], [[1.0]])) == {0: ("no-label", "")}
    with pytest.raises(ValueError, match="expected equal numbers"):
        Detections([[0, 0, 1, 1]], [1, 2], ["a"], [[1.0]])


def test_confident_attributes():
    assert confident_attributes(["a", "b", "__no_attribute__", "c"], [0.1, 0.5, 0.9, 0.0], 0.0) == ["a", "b"]
    assert confident_attributes(["a", "b"], [0.09, 0.1], 0.1) == ["b"]
