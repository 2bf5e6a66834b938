"""Records: what is read back, and what is refused with which word."""

import io
import json

import numpy as np
import pytest

from pyramidclip_hf.levels_pyramidclip import LEVELS
from training.data.records import (
    BadSample,
    Region,
    Sample,
    has_level,
    level_text,
    members_from_sample,
    npy_bytes,
    phrase,
    sample_from_members,
    tag_text,
)


def make_sample():
    roi = np.arange(12, dtype=np.float16).reshape(2, 6) / 8
    regions = [
        Region((0.0, 0.1, 0.5, 0.6), 0.9, "dog", ["old", "big", "small", "red"]),
        Region((0.2, 0.2, 1.0, 1.0), None, "boat", []),
    ]
    return Sample(
        "a/b",
        b"\xff\xd8",
        "jpg",
        "a dog",
        "A dog in a boat.",
        ["red dog", "boat"],
        regions,
        roi,
        {"url": "u", "width": 3},
    )


def test_round_trip_keeps_everything_and_bytes_are_stable():
    sample = make_sample()
    members = members_from_sample(sample)
    assert members == members_from_sample(make_sample())
    back = sample_from_members(members, "a/b", "here")
    assert np.array_equal(back.roi, sample.roi) and back.roi.dtype == np.float16
    back.roi = sample.roi
    assert back == sample


def test_half_of_a_surrogate_pair_is_kept_in_json_and_replaced_in_text():
    sample = Sample("k", b"x", "jpg", "a \ud83d b", extra={"author": "x \ud83d y", "place": "Genève"})
    members = members_from_sample(sample)
    assert members["txt"].decode() == "a ? b" and b"\\ud83d" in members["json"]
    back = sample_from_members(members, "k", "w")
    assert back.caption == "a ? b" and back.extra == sample.extra
    assert "Genève".encode() in members_from_sample(Sample("k", b"x", "jpg", extra={"place": "Genève"}))["json"]


def test_roi_array_is_what_numpy_reads_and_is_no_copy():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(10, 2048)).astype(np.float16)
    written = npy_bytes(array)
    assert np.array_equal(np.load(io.BytesIO(written), allow_pickle=False), array)
    file = io.BytesIO()
    np.save(file, array)
    members = {
        "jpg": b"x",
        "json": json.dumps({"regions": [{"box": [0, 0, 1, 1]}] * 10}).encode(),
        "roi.npy": file.getvalue(),
    }
    roi = sample_from_members(members, "k", "w").roi
    assert np.array_equal(roi, array)
    assert not roi.flags.owndata and not roi.flags.writeable
    assert np.shares_memory(roi, np.frombuffer(members["roi.npy"], np.uint8))


def test_phrase_and_tag_text():
    assert phrase(Region((0, 0, 1, 1), 1.0, "dog", ["old", "big", "small", "red"])) == "big small red dog"
    assert phrase(Region((0, 0, 1, 1), 1.0, "dog", [])) == "dog"
    assert tag_text(["red dog", "boat"]) == "red dog, boat"


def test_levels_of_a_sample():
    sample, bare = make_sample(), Sample("k", b"x", "jpg", tags=[])
    assert [has_level(sample, level) for level in LEVELS] == [True] * len(LEVELS)
    assert [level for level in LEVELS if has_level(bare, level)] == ["global", "local"]
    texts = {"summary": "A dog in a boat.", "caption": "a dog", "tags": "red dog, boat"}
    assert {level: level_text(sample, level) for level in texts} == texts
    assert [level_text(bare, level) for level in texts] == [None] * 3


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b" from txt "}, "from txt"),
        ({"txt": b"from txt", "json": b'{"caption": "from json"}'}, "from txt"),
        ({"json": b'{"caption": "from json"}'}, "from json"),
        ({"txt": b"  ", "json": b'{"caption": "from json"}'}, "from json"),
        ({"json": b'{"caption": NaN}'}, None),
        ({"json": b'{"caption": null}'}, None),
        ({"json": b'{"caption": "  "}'}, None),
        ({"txt": b"null"}, "null"),
        ({"json": b'{"caption": "None"}'}, "None"),
    ],
)
def test_caption_sources(members, expected):
    assert sample_from_members({"png": b"x", **members}, "k", "w").caption == expected


def test_several_captions_and_missing_levels():
    record = {"captions": ["one", " two "], "summary": " ", "tags": ["", " red dog "], "other": 1}
    sample = sample_from_members({"jpeg": b"x", "json": json.dumps(record).encode()}, "k", "w")
    assert sample.captions == ["one", "two"] and sample.caption == "one"
    assert sample.summary is None and sample.tags == ["red dog"] and sample.regions is None and sample.roi is None
    assert sample.extra == {"other": 1} and sample.image_suffix == "jpg"
    assert sample_from_members(members_from_sample(sample), "k", "w").captions == ["one", "two"]


BOX = {"box": [0, 0, 1, 1]}


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"txt": b"x"}, "no-image"),
        ({"jpg": b"", "json": b"{"}, "bad-json"),
        ({"jpg": b"", "json": b"[" * 100000}, "bad-json"),
        ({"jpg": b"", "json": b"[1]"}, "bad-json"),
        ({"jpg": b"", "json": b" " * (9 << 20)}, "json-too-large"),
        ({"jpg": b"", "txt": b"x" * (2 << 20)}, "text-too-large"),
        ({"jpg": b"", "txt": b"\xff\xfe"}, "bad-utf8"),
        ({"jpg": b"", "json": b'{"caption": 3}'}, "bad-caption"),
        ({"jpg": b"", "json": b'{"summary": ["x"]}'}, "bad-summary"),
        ({"jpg": b"", "json": b'{"tags": "a, b"}'}, "bad-tags"),
        ({"jpg": b"", "json": b'{"tags": [1]}'}, "bad-tags"),
        ({"jpg": b"", "json": b'{"regions": {}}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 640, 480]}]}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0.5, 0, 0.4, 1]}]}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, NaN]}]}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, true]}]}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, 1%s]}]}' % (b"0" * 400)}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, 1], "score": 1%s}]}' % (b"0" * 400)}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, 1], "score": "x"}]}'}, "bad-regions"),
        ({"jpg": b"", "json": b'{"regions": [{"box": [0, 0, 1, 1], "label": 5}]}'}, "bad-regions"),
        ({"jpg": b"", "roi.npy": npy_bytes(np.ones((1, 4)))}, "roi-count"),
        (
            {"jpg": b"", "json": json.dumps({"regions": [BOX, BOX]}).encode(), "roi.npy": npy_bytes(np.ones((1, 4)))},
            "roi-count",
        ),
        ({"jpg": b"", "roi.npy": b"junk"}, "bad-roi"),
        ({"jpg": b"", "roi.npy": npy_bytes(np.ones((1, 4)))[:-1]}, "bad-roi"),
    ],
)
def test_refused_with_a_reason(members, reason):
    with pytest.raises(BadSample) as caught:
        sample_from_members(members, "key7", "shard.tar")
    assert caught.value.reason == reason
    assert "key7" in str(caught.value) and "shard.tar" in str(caught.value)


def test_pickled_array_is_refused():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadSample) as caught:
        sample_from_members({"jpg": b"", "roi.npy": file.getvalue()}, "k", "w")
    assert caught.value.reason == "bad-roi"


def test_writing_refuses_what_reading_would():
    with pytest.raises(ValueError, match="not finite"):
        npy_bytes(np.array([[1e6]]))
    sample = make_sample()
    sample.regions = sample.regions[:1]
    with pytest.raises(ValueError, match="2 rows"):
        members_from_sample(sample)


@pytest.mark.parametrize(
    ("level", "members"),
    [
        ("tags", {"json": b'{"tags": "cat, dog"}'}),
        ("summary", {"json": b'{"summary": 5}'}),
        ("roi", {"json": b'{"regions": "DE-BE"}'}),
        ("roi", {"json": b'{"regions": [{"box": [0, 0, 1, 1]}]}', "roi.npy": b"no array"}),
        ("roi", {"roi.npy": npy_bytes(np.zeros((2, 8)))}),
    ],
)
def test_a_level_that_is_not_wanted_may_mean_something_else(level, members):
    members = {"jpg": b"x", "txt": b"words", **members}
    with pytest.raises(BadSample):
        sample_from_members(members, "k", "w")
    sample = sample_from_members(members, "k", "w", levels=[name for name in LEVELS if name != level])
    assert sample.caption == "words" and not has_level(sample, level)
    with pytest.raises(BadSample):
        sample_from_members(members, "k", "w", levels=[level])
