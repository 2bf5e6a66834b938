"""Steps in an order in which one would undo what another did: refused, and nothing is touched."""

import json

import pytest

from tests.training.prepare.small_data import (
    read_tars,
    run_step,
    tree,
    write_jsonl,
    write_pictures,
)
from training.data.shards import read_dataset_json
from training.prepare import detect, pack, summarize
from training.prepare.steps.rewriting import mark_unfinished
from training.prepare.steps.work import Stage

SUMMARIZE = "--model first-clause --input-dir".split()


@pytest.fixture
def table(tmp_path):
    write_pictures(tmp_path / "in", 4)
    rows = [{"image": f"{i}.jpg", "caption": f"caption {i}"} for i in range(4)]
    return write_jsonl(tmp_path / "in" / "table.jsonl", rows)


def packed(table, folder, *flags):
    run_step(pack, ["--input", table, "--output-dir", folder, "--samples-per-shard", 2, *flags])
    return folder


def test_a_step_waits_until_the_one_before_is_whole(table, tmp_path, monkeypatch):
    """A shard that was written and whose report was not is packed once more, without what came into it between."""
    folder = tmp_path / "data"
    with monkeypatch.context() as killed:
        killed.setattr(Stage, "save", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            packed(table, folder)
    assert len(list(folder.glob("*.tar"))) == 1
    before = tree(folder)
    for step, flags in (
        (summarize, [*SUMMARIZE, folder]),
        (summarize, [*SUMMARIZE, folder, "--output-dir", tmp_path / "other"]),
        (detect, ["--input-dir", folder, "--detector", "nobody/nothing"]),
        (pack, ["--input", folder, "--output-dir", tmp_path / "other"]),
    ):
        with pytest.raises(ValueError, match="data: pack has begun and not ended, says its dataset.json"):
            run_step(step, flags)
    assert tree(folder) == before and not (tmp_path / "other").exists()
    run_step(summarize, [*SUMMARIZE, packed(table, folder)])
    assert all("summary" in json.loads(members["json"]) for members in read_tars(folder).values())


def test_two_steps_in_one_folder_do_not_undo_each_other(table, tmp_path):
    """Summaries have begun, as in another terminal: regions would go into the same shards."""
    mark_unfinished(Stage(packed(table, tmp_path / "data"), "summary", {}))
    before = tree(tmp_path / "data")
    with pytest.raises(ValueError, match="data: summary has begun and not ended"):
        run_step(detect, ["--input-dir", tmp_path / "data", "--detector", "nobody/nothing"])
    assert tree(tmp_path / "data") == before


def test_packing_again_does_not_write_over_what_later_steps_made(table, tmp_path):
    folder = packed(table, tmp_path / "data")
    run_step(summarize, [*SUMMARIZE, folder])
    before = tree(folder)
    with pytest.raises(ValueError, match="data holds shards that `summary` changed, which `pack` would write over"):
        packed(table, folder, "--overwrite", "--samples-per-shard", 1)
    assert tree(folder) == before
    packed(table, folder)
    packed(table, folder, "--overwrite")
    assert tree(folder) == before and read_dataset_json(folder)["made_by"]["summary"]


def test_shards_of_others_are_not_written_over(table, tmp_path):
    folder, other = packed(table, tmp_path / "data"), packed(table, tmp_path / "other")
    before = tree(other)
    with pytest.raises(ValueError, match="other holds shards that it did not make, which `summary` would write over"):
        run_step(summarize, [*SUMMARIZE, folder, "--output-dir", other])
    (tmp_path / "plain").mkdir()
    foreign = (other / "00000.tar").rename(tmp_path / "plain" / "00000.tar").read_bytes()
    with pytest.raises(ValueError, match="plain holds shards that it did not make, which `pack` would write over"):
        packed(table, tmp_path / "plain", "--overwrite")
    assert tree(tmp_path / "plain") == {"00000.tar": foreign}
    assert tree(other) == {name: data for name, data in before.items() if name != "00000.tar"}
