"""From photographs and written captions to a data set with all levels: the commands one after the other, as a user runs
them."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.training.prepare.small_data import make_language_model, make_vinvl, read_tars, run_step
from training.data.records import sample_from_members, tag_text
from training.data.shards import ShardReader, read_dataset_json
from training.prepare import detect, pack, summarize, view

SKIMAGE = {
    "astronaut.png": "A smiling astronaut in an orange suit stands before a flag, "
    "with a model of the shuttle behind her",
    "chelsea.png": "Close-up of a ginger tabby cat with green eyes that looks past the camera, lying on a blanket",
    "coffee.png": "A red cup of espresso on a red saucer with a small silver spoon, standing on a wooden table",
    "rocket.jpg": "A rocket on its launch pad at dusk, lit by floodlights, with steel towers on both sides of it",
    "motorcycle_left.png": "A red motorcycle stands in a garage between shelves full of boxes and tools",
    "hubble_deep_field.jpg": "Countless distant galaxies in blue, white and red on the black ground of the night sky",
    "camera.png": "A photographer bends over a film camera on a tripod, in a meadow, in black and white",
    "page.png": "Printed text",
}
SKLEARN = {
    "china.jpg": "The Summer Palace in Beijing from below: a pagoda in red, green and gold under a blue sky with trees",
    "flower.jpg": "A dahlia in full bloom with pink and yellow petals before a dark green background of leaves",
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of photographs that two packages bring along, with a table of captions; one picture cannot be used."""
    skimage, sklearn = pytest.importorskip("skimage"), pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("photographs")
    places = {name: Path(skimage.__file__).parent / "data" / name for name in SKIMAGE}
    places |= {name: Path(sklearn.__file__).parent / "datasets" / "images" / name for name in SKLEARN}
    for name, place in places.items():
        (folder / name).write_bytes(place.read_bytes())
    (folder / "cut.jpg").write_bytes((folder / "china.jpg").read_bytes()[:60_000])
    rows = [
        {"image": name, "caption": caption}
        for name, caption in {**SKIMAGE, **SKLEARN, "cut.jpg": "Half a palace"}.items()
    ]
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def prepared(photographs, tmp_path_factory):
    """The folder of shards after pack, summarize and detect."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path_factory.mktemp("cache")))
        models, data = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("data")
        t5 = make_language_model(models / "t5", [*SKIMAGE.values(), *SKLEARN.values()])
        vinvl = make_vinvl(models / "vinvl")
        run_step(
            pack,
            [
                "--input",
                str(photographs / "captions.jsonl"),
                "--output_dir",
                str(data),
                "--samples_per_shard",
                "4",
                "--device",
                "cpu",
            ],
        )
        run_step(
            summarize,
            ["--input_dir", str(data), "--model", t5, "--num_beams", "2", "--max_new_tokens", "8", "--device", "cpu"],
        )
        run_step(detect, ["--input_dir", str(data), "--detector", vinvl, "--device", "cpu"])
    return data


def test_every_photograph_has_all_levels(prepared, photographs):
    samples = read_tars(prepared)
    captions = {**SKIMAGE, **SKLEARN}
    assert len(samples) == len(captions) == 10
    for (name, caption), (key, members) in zip(captions.items(), samples.items()):
        sample = sample_from_members(members, key, name)
        assert sample.image == (photographs / name).read_bytes() and sample.image_suffix == name[-3:]
        assert sample.caption == caption and sample.extra["path"] == name
        assert 1 <= len(sample.regions) <= 10 and sample.roi.shape == (len(sample.regions), 128)
        assert np.isfinite(sample.roi).all() and sample.roi.dtype == np.float16
        scores = [region.score for region in sample.regions]
        assert scores == sorted(scores, reverse=True)
        assert sample.tags and tag_text(sample.tags).count(", ") == len(sample.tags) - 1
        if len(caption.split()) < 10:
            assert sample.summary == caption


def test_what_was_made_by_what_is_told(prepared):
    described = read_dataset_json(prepared)
    assert set(described["made_by"]) == {"pack", "summary", "regions"} and described["roi_feature_size"] == 128
    assert described["made_by"]["regions"]["maker"] == "vinvl"
    counts = described["counts"]
    assert counts["samples"] == 10 and counts["pack"]["in"] == 11 and counts["pack"]["rejected"] == 1
    for step in ("summary", "regions"):
        assert counts[step]["in"] == counts[step]["out"] == 10
    assert "unfinished" not in described
    problems = (prepared / "reports" / "pack.problems.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in problems] == ["bad-picture"]


def test_the_page_of_a_shard(prepared, tmp_path):
    assert view.main([str(prepared / "00000.tar"), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    with ShardReader(prepared / "00000.tar") as reader:
        assert page.count("<article>") == len(reader) == 4
    assert all(caption in page for caption in list(SKIMAGE.values())[:4])


def test_the_audit_finds_every_level_and_no_fault(prepared, tmp_path):
    from training.prepare import audit

    assert audit.main([str(prepared), "--output-dir", str(tmp_path / "audit"), "--workers", "1"]) == 0
    report = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert report["samples"] == 10 and report["bad"]["count"] == 0
    levels = dict(zip(report["levels"], report["both_present"][0]))
    assert levels == {"picture": 1, "caption": 1, "summary": 1, "tags": 1, "regions": 1}
    assert report["regions"]["feature_widths"] == {"128": 10}


def test_two_steps_of_training_on_it(prepared, tmp_path):
    from training import pretrain

    config = {
        "text_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"},
        "vision_config": {
            "image_size": 32,
            "patch_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_leff_layers": 1,
            "roi_feature_size": 128,
        },
        "projection_dim": 16,
    }
    flags = {
        "train-data": prepared,
        "output-dir": tmp_path / "run",
        "model": "ViT-B-16",
        "model-config": json.dumps(config),
    }
    flags |= {"global-batch-size": 4, "max-steps": 2, "log-every-steps": 1, "trackers": "none", "dataloader-workers": 0}
    argv = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    assert pretrain.main(argv) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {name: value for line in lines for name, value in line.items() if "loss" in name}
    # All six terms of the objective found their levels.
    found = [name for name in losses if name.rpartition("/")[2] in pyramid_terms()]
    assert len(found) == 6 and all(np.isfinite(losses[name]) and losses[name] > 0 for name in found), losses
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def pyramid_terms():
    from pyramidclip_hf.loss_pyramidclip import DEFAULT_LOSS_WEIGHTS

    return set(DEFAULT_LOSS_WEIGHTS)
