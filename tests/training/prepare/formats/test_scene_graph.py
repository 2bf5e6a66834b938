"""`formats/scene_graph.py`: what its rows of sizes may look like."""

import pytest

from training.prepare.formats import BadRow, scene_graph


def test_size_rows():
    assert scene_graph._size_of(b"50 100") == (100, 50)
    with pytest.raises(BadRow, match="bad-size"):
        scene_graph._size_of(b"[]")
