"""The page that shows samples of a shard."""

import json
from html.parser import HTMLParser

import pytest

from tests.training.prepare.small_data import (
    picture,
)
from training.data.records import Region, Sample
from training.data.shards import ShardWriter
from training.prepare import view


class Seen(HTMLParser):
    """Tags with their attributes, and the text, of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_shows_every_level_and_loads_nothing(tmp_path):
    regions = [
        Region((0.25, 0.5, 0.75, 1.0), 0.875, "cat", ["very", "small", "striped", "grey"]),
        Region((0, 0, 1, 1), None, "<i>wall", []),
    ]
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write(
            Sample(
                "one", picture(0, (1280, 640)), "jpg", "caption <script>", "summary & more", ["striped cat"], regions
            )
        )
        writer.write(Sample("two", picture(1), "jpg", "plain"))
        writer.write_members("broken", {"jpg": b"no picture", "txt": b"x"})
        writer.write_members("unfit", {"jpg": picture(1), "json": b"{"})
    assert view.main([str(tmp_path / "0.tar"), "--output", str(tmp_path / "page.html"), "--number", "9"]) == 0
    page = Seen((tmp_path / "page.html").read_text(encoding="utf-8"))
    text = " ".join(page.texts)
    for expected in (
        "caption <script>",
        "summary & more",
        "striped cat",
        "1 small striped grey cat",
        "2 <i>wall",
        "plain",
        "0.875",
        "no score",
    ):
        assert expected in text, expected
    assert "are no JPEG" in text
    assert "bad-json" in text and text.count("none") >= 2
    boxes = [a for tag, a in page.tags if tag == "rect" and a["fill"] == "none"]
    shown = {name: float(boxes[0][name]) for name in ("x", "y", "width", "height")}
    assert shown == {"x": 160, "y": 160, "width": 320, "height": 160}
    sources = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert len(sources) == 2 and all(value.startswith("data:image/jpeg;base64,") for value in sources)
    assert "script" not in {tag for tag, _ in page.tags}
    with pytest.raises(ValueError, match="which has 4"):
        view.page(tmp_path / "0.tar", 1, first=4)


def test_of_very_many_regions_the_first_are_shown(tmp_path):
    regions = [Region((0, 0, 1, 1), 0.5, f"thing {i}", []) for i in range(5000)]
    with ShardWriter(tmp_path / "0.tar") as writer:
        writer.write(Sample("one", picture(0), "jpg", "caption", None, None, regions))
    page = Seen(view.page(tmp_path / "0.tar", 1))
    assert "5000 regions, the first 100 of them shown" in " ".join(page.texts)
    assert sum(tag == "rect" and a["fill"] == "none" for tag, a in page.tags) == 100


def test_labels_do_not_cover_each_other(tmp_path):
    taken = []
    places = [view._free_place(10, 10, 100, 640, 480, taken) for _ in range(10)]
    assert len({top for _, top in places}) == 10
    assert all(abs(a - b) >= 16 for i, (_, a) in enumerate(places) for _, b in places[:i])
    assert json.dumps(places) == json.dumps(taken and [(left, top) for left, top, _ in taken])
