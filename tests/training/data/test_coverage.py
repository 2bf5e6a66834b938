"""Which terms the data feeds, against counts made by hand; and the objective that is advised for it."""

import dataclasses
import json

import pytest

from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS, check_loss_weights
from tests.training.prepare.small_data import FEATURES, make_sample, write_pictures, write_tar
from training.data.coverage import Coverage, look_at
from training.data.shards import ShardWriter
from training.data.sources import open_data_set

PAPER = tuple(DEFAULT_LOSS_WEIGHTS)


def test_the_shares_are_those_of_the_samples(tmp_path):
    """Summaries for the first 30 of 40, tags for every second, regions for every fourth, over four shards."""
    for shard in range(4):
        with ShardWriter(tmp_path / f"{shard}.tar") as writer:
            for number in range(10 * shard, 10 * shard + 10):
                made = make_sample(1)  # has every level
                assert made.roi is not None and made.summary and made.tags
                changes = {"key": f"{number:03d}"}
                changes |= {} if number < 30 else {"summary": None}
                changes |= {} if number % 2 == 0 else {"tags": None}
                changes |= {} if number % 4 == 0 else {"roi": None, "regions": None}
                writer.write(dataclasses.replace(made, **changes))
    coverage = look_at([open_data_set(str(tmp_path))], FEATURES)
    assert coverage == Coverage(
        40,
        {
            "global_summary": 0.75, "local_caption": 1.0, "roi_summary": 8 / 40, "global_tags": 0.5,
            "roi_caption": 0.25, "local_tags": 0.5, "roi_tags": 0.25, "global_caption": 1.0, "local_summary": 0.75,
        },
    )  # fmt: skip
    # Features of another detector are not read by this model.
    assert look_at([open_data_set(str(tmp_path))], FEATURES + 1).shares["roi_caption"] == 0


def covered(*levels):
    there = {"global", "local", "caption", *levels}
    return Coverage(100, {term: float(there.issuperset(pair)) for term, pair in TERMS.items()})


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([], {"global_caption": 0.5, "local_caption": 0.5}),
        (["summary"], {"global_summary": 0.5, "local_caption": 0.5}),
        (["summary", "tags"], dict.fromkeys(("global_summary", "local_caption", "global_tags", "local_tags"), 0.25)),
        (["roi"], dict.fromkeys(("global_caption", "local_caption", "roi_caption"), 0.3333)),
        (["summary", "tags", "roi"], dict.fromkeys(PAPER, 0.1667)),
    ],
)
def test_the_advised_objective_is_fed_and_sees_the_whole_picture(levels, expected):
    coverage = covered(*levels)
    advised = coverage.fitting_objective()
    assert advised == expected
    assert check_loss_weights(advised) and not coverage.empty(tuple(advised))
    assert any(TERMS[term][0] == "global" for term in advised)


def test_an_empty_term_is_an_error_and_a_scarce_one_a_warning():
    with pytest.raises(ValueError, match="none of 100 pairs looked at") as error:
        covered().check(PAPER, allow_empty=False)
    advised = """--loss-weights '{"global_caption": 0.5, "local_caption": 0.5}'"""
    assert "global_summary, roi_summary, global_tags, roi_caption, local_tags" in str(error.value)
    assert "(regions, summary, tags)" in str(error.value) and advised in str(error.value)
    told, warning = covered().check(PAPER, allow_empty=True)
    assert "global_summary 0%, local_caption 100%" in told and "warning" in warning and advised in warning
    few = Coverage(100, {**covered("summary").shares, "global_summary": 0.49})
    _, warning = few.check(("global_summary", "local_caption"), allow_empty=False)
    assert "global_summary 49%" in warning and "local_caption 100%" not in warning
    assert len(covered("summary").check(("global_summary", "local_caption"), allow_empty=False)) == 1


def test_data_without_a_usable_pair_says_so_before_anything_is_drawn(tmp_path):
    write_pictures(tmp_path, 3)
    lines = [json.dumps({"image": f"{number}.jpg", "caption": " "}) for number in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="none of 3 pairs looked at can be used: 3 no-caption.*prepare.pack"):
        look_at([open_data_set(str(tmp_path / "pairs.jsonl"))], FEATURES)


def test_a_manifest_whose_pictures_lie_elsewhere_says_where_it_looked(tmp_path):
    write_pictures(tmp_path / "pictures", 3)
    (tmp_path / "lists").mkdir()
    lines = [json.dumps({"image": f"pictures/{number}.jpg", "caption": "words"}) for number in range(3)]
    for folder in (tmp_path, tmp_path / "lists"):
        (folder / "pairs.jsonl").write_text("\n".join(lines))
    assert look_at([open_data_set(tmp_path / "pairs.jsonl")], FEATURES).pairs == 3
    where = "none of 3 pairs looked at has its picture, there is no .*lists/pictures/0.jpg"
    with pytest.raises(ValueError, match=where) as error:
        look_at([open_data_set(tmp_path / f"{folder}pairs.jsonl") for folder in ("", "lists/")], FEATURES)
    assert f"paths count from the manifest's folder, {tmp_path / 'lists'}: put the manifest" in str(error.value)
    (tmp_path / "pictures" / "0.jpg").unlink()  # some that are missing are left to the run
    assert look_at([open_data_set(tmp_path / "pairs.jsonl")], FEATURES).pairs == 3


def test_shards_without_pictures_are_said_to_have_none(tmp_path):
    write_tar(tmp_path / "0.tar", [("k", {"txt": b"words", "json": b"{}"})])
    with pytest.raises(
        ValueError, match="none of 1 pairs looked at has its picture, k of .*0.tar has .* alone; shards"
    ):
        look_at([open_data_set(tmp_path)], FEATURES)
