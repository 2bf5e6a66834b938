"""The paper's pictures on a tiny model, the check of the heat maps against boxes, and, slow, the check on models that
were trained for a minute or two."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.explain import Explanation, RegionExplanation
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from tests.training.prepare.small_data import FEATURES, make_sample, write_shards
from training.data.samples import ShardSamples
from training.figures import attribution_of, localisation, main, tsne_points

ATTRIBUTION = "Drawn by somebody. License: CC BY-SA 4.0"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {"image_size": 32, "patch_size": 8, "num_leff_layers": 0, "roi_feature_size": FEATURES}
    config = PyramidCLIPConfig(
        text_config={**tower, "pooling": "eos"}, vision_config={**tower, **vision}, projection_dim=8
    )
    folder = tmp_path_factory.mktemp("tiny", numbered=False) / "final"
    PyramidCLIPModel(config).save_pretrained(folder)
    processor = PyramidCLIPProcessor(PyramidCLIPImageProcessor(size={"shortest_edge": 32}), roi_feature_size=FEATURES)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = write_shards(tmp_path_factory.mktemp("shards") / "scenes", range(9))
    described = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(described | {"attribution": ATTRIBUTION}))
    return str(folder)


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of three classes with five pictures each."""
    folder, rng = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for name, colour in (("red_fox", 200), ("blue_whale", 90), ("owl", 20)):
        (folder / name).mkdir()
        for number in range(5):
            pixels = np.clip(colour + rng.integers(-20, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return str(folder)


def has_ink(path, rows):
    """Whether anything is drawn in those rows of pixels."""
    return bool((np.asarray(Image.open(path).convert("L"))[rows] < 250).any())


def test_retrieval_figure_of_two_models(model_folder, shards, tmp_path, capsys):
    command = ["retrieval", "--models", model_folder, model_folder, "--titles", "one", "two", "--data", shards]
    command += ["--max-samples", "3", "--queries", "0", "2"]
    first, second = tmp_path / "a" / "one.png", tmp_path / "two.png"
    assert main([*command, "--output", str(first)]) == 0
    assert "the right picture among the first 3: tiny" in capsys.readouterr().out  # all that there are
    assert main([*command, "--output", str(second)]) == 0
    assert first.read_bytes() == second.read_bytes()
    pixels = np.asarray(Image.open(first).convert("RGB")).astype(int)
    green = (abs(pixels - [0x17, 0x80, 0x4A]).sum(axis=-1) < 12).sum(axis=1)
    frames = (np.diff((green > 50).astype(int)) == 1).sum()  # upper and lower edge of the right picture of each row
    assert frames == 2 * 4
    assert attribution_of(shards) == ATTRIBUTION and attribution_of(f"{shards}/part-000.tar") == ATTRIBUTION
    assert has_ink(first, slice(-14, None))


def test_tsne_figure(model_folder, classes, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n")
    command = ["tsne", "--model", model_folder, "--data", classes, "--templates", str(tmp_path / "prompts.txt")]
    for name in ("one.png", "two.png"):
        assert main([*command, "--output", str(tmp_path / name), "--per-class", "4"]) == 0
    assert "12 pictures and 3 prompts" in capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert main([*command, "--output", str(tmp_path / "some.png"), "--shown-classes", "2", "--keep-gap"]) == 0
    assert "10 pictures and 2 prompts" in capsys.readouterr().out


def test_figures_of_named_data_sets(model_folder, classes, tmp_path, capsys):
    """Small ones of the layout of SUN397 and Flickr30K."""
    root = tmp_path / "root"
    (root / "SUN397").mkdir(parents=True)
    (root / "SUN397/ClassName.txt").write_text("/r/red_fox\n/o/owl\n")
    paths = [path for name in ("red_fox", "owl") for path in sorted(Path(classes, name).iterdir())]
    (root / "flickr30k/images").mkdir(parents=True)
    images = []
    for path in paths:
        folder, name = root / "SUN397" / path.parent.name[0] / path.parent.name, f"{path.parent.name}{path.name}"
        folder.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as picture:
            picture.save(folder / f"sun_{path.stem}.jpg")
            picture.save(root / "flickr30k/images" / name)
        images.append({"filename": name, "split": "test", "sentences": [{"raw": f"text {len(images)}"}]})
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n")
    command = ["tsne", "--model", model_folder, "--templates", str(tmp_path / "prompts.txt"), "--dataset", "sun397"]
    assert main([*command, "--data", str(root), "--output", str(tmp_path / "tsne.png")]) == 0
    assert "10 pictures and 2 prompts" in capsys.readouterr().out
    command = ["retrieval", "--models", model_folder, "--data", str(root), "--output", str(tmp_path / "found.png")]
    assert main([*command, "--dataset", "flickr30k", "--queries", "9", "--top", "2"]) == 0
    assert "the right picture among the first 2" in capsys.readouterr().out
    assert main([*command, "--dataset", "cifar10"]) == 2 and "it is for --task zero-shot" in capsys.readouterr().err


def test_prompts_lie_among_their_pictures_unless_the_gap_is_kept():
    """Three classes around three directions, texts shifted by a common vector."""
    rng, centres, shift = np.random.default_rng(0), np.eye(3, 8), 3 * np.eye(8)[7]

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    labels = np.arange(90) % 3
    pictures, prompts = unit(centres[labels] + 0.1 * rng.normal(size=(90, 8))), unit(centres + shift)

    def nearest_class(keep_gap):
        points = tsne_points(pictures, prompts, 10.0, keep_gap)
        distances = np.linalg.norm(points[90:, None] - points[None, :90], axis=-1)
        return [np.bincount(labels[np.argsort(row)[:10]], minlength=3).argmax() for row in distances]

    assert nearest_class(keep_gap=False) == [0, 1, 2]
    assert nearest_class(keep_gap=True) != [0, 1, 2]


def test_check_measures_heat_in_the_boxes(model_folder, shards, monkeypatch, capsys):
    """Against maps whose mass is known: all of it in the left half of the picture."""
    asked = []

    def left_half(model, processor, picture, text):
        heat = np.zeros(picture.size[::-1], np.float32)
        heat[:, : picture.width // 2] = 1
        asked.append(text)
        return Explanation(heat, 0.5, "grad_cam")

    def second_region(model, processor, roi_features, text):
        return RegionExplanation(
            np.eye(roi_features.shape[1], dtype=np.float32)[min(1, roi_features.shape[1] - 1)], 0.0
        )

    monkeypatch.setattr("training.figures.explain_image", left_half)
    monkeypatch.setattr("training.figures.explain_regions", second_region)
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    samples = ShardSamples(shards)
    found = localisation(model, processor, samples, "a {phrase} or {label}")
    each = [sorted(make_sample(number).regions or [], key=lambda region: -region.score) for number in range(9)]
    regions = [region for ranked in each for region in ranked]
    assert asked == [f"a red {region.label} or {region.label}" for region in regions]
    # Boxes go from 0.1 to 0.5 + i / 10 in x and from 0.2 to 0.9 in y: 24 of the left 30 columns, 0.7 of the rows.
    assert found.mass == pytest.approx([0.8 * 0.7] * len(regions), abs=0.02)
    assert found.area == pytest.approx([(region.box[2] - 0.1) * 0.7 for region in regions], abs=0.02)
    places = [place for number in range(9) for place in range(len(make_sample(number).regions or []))]
    counts = [len(make_sample(n).regions) for n in range(9) for _ in make_sample(n).regions or []]
    assert found.found == [place == min(1, count - 1) for place, count in zip(places, counts)]
    assert found.chance == [1 / count for count in counts]
    monkeypatch.undo()
    assert main(["check", "--model", model_folder, "--data", shards, "--max-samples", "3"]) == 0
    printed = capsys.readouterr().out
    assert "objects asked for                     6, as 'a {phrase}'" in printed and "guessing: 50.0%" in printed


def test_a_slow_type_is_said(model_folder, shards, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert main(["check", "--model", model_folder, "--data", shards, "--dtype", "float16", "--device", "cpu"]) == 0
    assert capsys.readouterr().err.count("--dtype float16: this processor has no float16 arithmetic") == 1


def test_wrong_settings_end_with_code_2(model_folder, shards, classes, tmp_path, capsys):
    png, limit = ["--output", str(tmp_path / "x.png")], ["--max-image-pixels", "99"]
    for words, message in (
        ([], "python -m training.figures tsne"),
        (["plot"], "python -m training.figures tsne"),
        (["tsne", "--model", model_folder, "--data", classes, "--output", "x.pdf"], "expected the name of a .png"),
        (["tsne", "--model", model_folder, "--data", classes, "--shown-classes", "1", *png], "needs two classes"),
        (["tsne", "--model", model_folder, "--data", classes, "--per-class", "0", *png], "--per-class: expected more"),
        (
            ["tsne", "--model", model_folder, "--data", classes, "--perplexity", "-3", *png],
            "--perplexity: expected more",
        ),
        (["tsne", "--model", model_folder, "--data", str(tmp_path / "no"), *png], "no"),
        (["retrieval", "--models", model_folder, "--data", shards, "--queries", "9", *png], "has samples 0 to 8"),
        (["retrieval", "--models", model_folder, "--titles", "a", "b", "--data", shards, *png], "--titles: expected 1"),
        (["check", "--model", model_folder, "--data", shards, "--prompt", "a {name}"], "{label} or {phrase}"),
        (["check", "--model", str(tmp_path), "--data", shards], "no config.json"),
        (["check", "--model", model_folder, "--data", shards, *limit], "more than max_image_pixels=99"),
        (["retrieval", "--models", model_folder, "--data", shards, *limit, *png], "more than max_image_pixels=99"),
        (["tsne", "--model", model_folder, "--data", classes, *limit, *png], "more than max_image_pixels=99"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.png").exists()


TRAINED = {
    "vit": {"vision_config": {"image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 3,
                              "num_attention_heads": 3, "num_leff_layers": 1, "freeze_patch_embedding": False}},
    "resnet": {"vision_config": {"image_size": 64, "width": 12, "layers": [1, 1, 1, 1]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    from training.emoji.scenes import Recipe, build

    folder = tmp_path_factory.mktemp("scenes")
    build(Recipe(0, 4000, 40, 1, 96, 1000), folder, workers=1, progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("tower", TRAINED)
def test_heat_of_a_trained_model_lies_on_the_named_object(tower, scenes, tmp_path):
    """Two minutes of training are enough for at least twice the share that chance would give."""
    from training import pretrain
    from training.settings.pretraining import PretrainingArguments
    from training.settings.reading import parse_settings

    text = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"}
    words = ["--train-data", str(scenes / "train"), "--output-dir", str(tmp_path / "run"), "--precision", "fp32"]
    words += ["--model", "RN50" if tower == "resnet" else "ViT-B-32", "--trackers", "none", "--max-steps", "180"]
    words += ["--model-config", json.dumps({"projection_dim": 96, "text_config": text, **TRAINED[tower]})]
    words += ["--global-batch-size", "64", "--learning-rate", "2e-3", "--warmup-fraction", "0.05"]
    words += ["--dataloader-workers", "0"]
    assert pretrain.run(parse_settings(PretrainingArguments, words)).finished
    loaded = load_model(str(tmp_path / "run/final"))
    model, processor = loaded.model, loaded.processor
    found = localisation(model, processor, ShardSamples(str(scenes / "validation")))
    mass, area = np.array(found.mass), np.array(found.area)
    print(f"{tower}: mass {mass.mean():.3f}, area {area.mean():.3f}, more in {(mass > area).mean():.3f}")
    assert mass.mean() > 2 * area.mean() and (mass > area).mean() > 0.7
    assert np.mean(found.found) > 1.5 * np.mean(found.chance)
