"""The evaluation command on a tiny model and shards: against one sample at a time, and on several processes."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pyramidclip_hf import image_processing_pyramidclip
from pyramidclip_hf.levels_pyramidclip import LEVELS, TERMS
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPForImageClassification
from tests.hub_server import Repository, client_environment, running_hub
from tests.rounding import assert_equal_to_rounding
from tests.training.processes import run_in_processes
from tests.training.to_evaluate import COUNTS, FEATURES, WIDEST, save_tiny_model, write_pictures
from training.data import records
from training.data.records import Region, Sample, tag_text
from training.data.samples import ShardSamples
from training.data.shards import ShardWriter, write_dataset_json
from training.evaluate import main
from training.evaluation.arguments import KARPATHY_SETS, TABLE_7_SETS, read_templates
from training.evaluation.captions import CAPTION_SETS
from training.evaluation.classification import classification_metrics, zero_shot_scores
from training.evaluation.embedding import embed_levels, local_view
from training.evaluation.results import read_json
from training.evaluation.retrieval import retrieval_metrics
from training.evaluation.sets import TABLE_7, open_set

WORDS = "red green blue big small dog cat bird house tree car boat sun moon star".split()


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def make_sample(number, rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(file, "PNG")
    words = rng.permutation(WORDS)
    regions = [Region((0.1, 0.2, 0.5, 0.6), 0.9, words[4], []), Region((0.3, 0.3, 0.9, 1.0), 0.8, words[5], [])]
    return Sample(
        key=f"s{number:02d}",
        image=file.getvalue(),
        image_suffix="png",
        caption=" ".join(words[: 2 + number % 5]),
        captions=[" ".join(words[:3]), " ".join(words[2:7])] if number in (2, 9) else None,
        summary=None if number == 3 else " ".join(words[5:8]),
        tags=None if number == 5 else list(words[8:10]),
        regions=None if number == 7 else regions,
        roi=None if number == 7 else rng.standard_normal((2, FEATURES)).astype(np.float16),
        extra={"class_name": WORDS[5 + number % 3]},
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("data") / "scenes", np.random.default_rng(0)
    samples = [make_sample(number, rng) for number in range(13)]
    for start in (0, 6):
        with ShardWriter(folder / f"part-{start}.tar") as writer:
            for one in samples[start : start + 6 if start == 0 else 13]:
                writer.write(one)
    write_dataset_json(folder, {}, FEATURES, {}, classes=WORDS[5:8])
    return str(folder)


@torch.no_grad()
def encode_alone(model, processor, sample):
    """level -> list of (D,) vectors, each from a call of its own."""
    texts = {"caption": sample.captions or [sample.caption], "summary": [sample.summary]}
    texts["tags"] = [tag_text(sample.tags) if sample.tags else None]
    embeds = {
        level: [model.encode_text(processor(text=[one], return_tensors="pt")["input_ids"])[0] for one in found if one]
        for level, found in texts.items()
    }
    pixels = processor(images=Image.open(io.BytesIO(sample.image)), return_tensors="pt")["pixel_values"]
    embeds["global"] = embeds["local"] = [model.encode_image(pixels)[0]]
    embeds["roi"] = []
    if sample.roi is not None:
        boxes = np.array([region.box for region in sample.regions])
        rows = np.concatenate([sample.roi.astype(np.float32), boxes.astype(np.float32)], axis=1)
        embeds["roi"] = [model.encode_rois(torch.from_numpy(rows)[None])[0]]
    return embeds


def test_levels_equal_one_sample_at_a_time(model_folder, data):
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    samples = ShardSamples(data)
    found = embed_levels(model, processor, samples, list(LEVELS), batch_size=5)
    assert found.keys == [f"s{i:02d}" for i in range(13)]
    alone = [encode_alone(model, processor, sample) for sample in samples]
    for level, embeds in found.embeds.items():
        if level == "caption":
            expected = [vector for one in alone for vector in one["caption"]]
            assert found.owners["caption"].tolist() == [i for i, one in enumerate(alone) for _ in one["caption"]]
            assert len(expected) == 15
        else:
            assert found.present[level].tolist() == [bool(one[level]) for one in alone]
            expected = [one[level][0] if one[level] else embeds[i] for i, one in enumerate(alone)]
        assert_equal_to_rounding(embeds, torch.stack(expected), WIDEST)
    assert [level for level, mask in found.present.items() if not mask.all()] == ["roi", "summary", "tags"]


def test_local_view_is_the_middle():
    picture = Image.fromarray(np.arange(100 * 60, dtype=np.uint16).reshape(60, 100).astype(np.uint8))
    assert np.array_equal(np.asarray(local_view(picture, 0.25)), np.asarray(picture)[15:45, 25:75])
    assert local_view(picture, 1.0).size == (100, 60)
    with pytest.raises(ValueError, match=r"share in \(0, 1\]"):
        local_view(picture, 0.0)


def test_retrieval_command(model_folder, data, tmp_path, capsys):
    arguments = ["--model", model_folder, "--data", data, "--batch-size", "4", "--cpu"]
    outputs = ["--output", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"), "--split", "test"]
    assert main([*arguments, "--levels", *TERMS, *outputs]) == 0
    name, results, details = read_json(tmp_path / "r.json")
    values = {(one.dataset_config, one.metric_type): one.metric_value for one in results}
    assert {pair for pair, _ in values} == set(TERMS)
    assert (values["roi_tags", "images"], values["roi_summary", "images"], values["local_caption", "texts"]) == (
        11,
        11,
        15,
    )
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    alone = [encode_alone(model, processor, sample) for sample in ShardSamples(data)]
    both = [one for one in alone if one["roi"] and one["tags"]]
    expected = retrieval_metrics(*(torch.stack([one[level][0] for one in both]) for level in ("roi", "tags")))
    assert {metric: values["roi_tags", metric] for metric in expected} == pytest.approx(expected)
    assert results[0].dataset_split == "test" and details["task"] == "retrieval"
    assert (tmp_path / "r.csv").read_text().count("\n") == len(results) + 1
    assert "roi_tags" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sets_root(tmp_path_factory, data):
    """Two of Table 7's data sets and Flickr30K, of the pictures of the shards."""
    root = tmp_path_factory.mktemp("root")
    images = []
    for number, one in enumerate(ShardSamples(data)):
        wnid = ("n01440764", "n01443537", "n03773504", "n04008634")[number % 4]
        texts = [{"raw": text} for text in one.captions or [one.caption]]
        images.append({"filename": f"{one.key}.png", "split": "test", "sentences": texts})
        for path in (f"imagenet/val/{wnid}", f"SUN397/a/{'abbey' if number < 5 else 'alley'}", "flickr30k"):
            name = f"sun_{one.key}.jpg" if path.startswith("SUN") else f"{one.key}.png"
            (root / path).mkdir(parents=True, exist_ok=True)
            (root / path / name).write_bytes(one.image)
    (root / "SUN397/ClassName.txt").write_text("/a/abbey\n/a/alley\n")
    (root / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    return str(root)


def test_named_data_sets(model_folder, sets_root, tmp_path, capsys):
    arguments = ["--model", model_folder, "--data", sets_root, "--task", "zero-shot", "--batch-size", "4", "--cpu"]
    outputs = ["--output", str(tmp_path / "z.json"), "--csv", str(tmp_path / "z.csv")]
    templates = tmp_path / "templates"
    templates.write_text("my {}\n")
    assert main([*arguments, "--dataset", "imagenet", "sun397", "--templates", str(templates), *outputs]) == 0
    *results, mean = read_json(tmp_path / "z.json")[1]
    assert (mean.dataset_name, mean.metric_type) == ("2 data sets", "mean_of_main_metrics")
    known = [one.metric_value for one in results if one.metric_name]
    assert mean.metric_value == pytest.approx(sum(known) / 2)
    assert len({one.dataset_name for one in results}) == 2 and {one.dataset_type for one in results} == {
        *("imagenet", "sun397")
    }
    assert all("not the paper's split: found 13 in" in one.dataset_name for one in results)
    marked = [(one.dataset_type, one.metric_type, one.metric_name) for one in results if one.metric_name]
    assert marked == [("imagenet", "top_1", "main metric"), ("sun397", "top_1", "main metric")]
    assert "main metric" in capsys.readouterr().out and "main metric" in (tmp_path / "z.csv").read_text()
    # CLIP's list calls two of these classes "missile": they share their place in every order, whichever is right.
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    pictures = open_set("imagenet", sets_root)
    scores = zero_shot_scores(model, processor, pictures, ["my {}"], 4)
    assert torch.equal(scores[:, 2], scores[:, 3]) and not torch.equal(scores[:, 0], scores[:, 1])
    values = {one.metric_type: one.metric_value for one in results if one.dataset_type == "imagenet"}
    assert values["top_1"] == pytest.approx(classification_metrics(scores, torch.tensor(pictures.labels))["top_1"])


def test_captions_of_other_formats_equal_the_shards(model_folder, data, sets_root, tmp_path):
    arguments = ["--model", model_folder, "--batch-size", "4", "--cpu", "--levels", "global_caption"]
    flickr = f"{sets_root}/flickr30k"
    manifest = tmp_path / "pairs.jsonl"
    lines = [
        {"image": f"{flickr}/{one.key}.png", "captions": one.captions or [one.caption]} for one in ShardSamples(data)
    ]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = {
        "shards": ["--data", data],
        "named": ["--data", sets_root, "--dataset", "flickr30k"],
        "file": ["--data", flickr, "--captions", f"{flickr}/dataset_flickr30k.json"],
        "manifest": ["--data", str(manifest)],
    }
    values = {}
    for name, source in sources.items():
        assert main([*arguments, *source, "--output", str(tmp_path / name)]) == 0
        values[name] = {one.metric_type: one.metric_value for one in read_json(tmp_path / name)[1]}
    assert values["shards"] == values["named"] == values["file"] == values["manifest"]
    assert values["shards"]["texts"] == 15
    name = read_json(tmp_path / "named")[1][0].dataset_name
    assert name == "Flickr30K (not the test split of 1,000 pictures: found 13)"


def run_command(rank, world_size, model_folder, data, sets_root, folder):
    codes = []
    for name, source in (
        ("retrieval", ["--data", data, "--levels", "global_caption", "roi_tags"]),
        ("zero-shot", ["--data", data, "--task", "zero-shot"]),
        ("named", ["--data", sets_root, "--task", "zero-shot", "--dataset", "imagenet", "sun397"]),
    ):
        arguments = ["--model", model_folder, "--batch-size", "3", "--cpu"]
        codes.append(main([*arguments, *source, "--output", f"{folder}/{name}-{world_size}.json"]))
    return codes


def test_equal_on_one_two_and_three_processes(model_folder, data, sets_root, tmp_path):
    """13 samples in batches of 3: two and three processes get unequal shares, and none is filled up."""
    for world_size in (1, 2, 3):
        assert (
            run_in_processes(run_command, world_size, model_folder, data, sets_root, tmp_path) == [[0] * 3] * world_size
        )
    for task, count in (("retrieval", "images"), ("zero-shot", "pictures"), ("named", "pictures")):
        results = [read_json(tmp_path / f"{task}-{size}.json") for size in (1, 2, 3)]
        assert results[0][1] == results[1][1] == results[2][1]
        assert [details["processes"] for _, _, details in results] == [1, 2, 3]
        assert next(one.metric_value for one in results[0][1] if one.metric_type == count) == 13


@torch.no_grad()
def test_zero_shot_command(model_folder, data, tmp_path):
    templates = tmp_path / "templates"
    templates.write_text("a photo of a {}\n\nmy {}\n")
    arguments = ["--model", model_folder, "--data", data, "--task", "zero-shot", "--batch-size", "4", "--cpu"]
    assert main([*arguments, "--templates", str(templates), "--output", str(tmp_path / "z.json")]) == 0
    values = {one.metric_type: one.metric_value for one in read_json(tmp_path / "z.json")[1]}
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    classes = []
    for name in WORDS[5:8]:
        prompts = [f"a photo of a {name}", f"my {name}"]
        vectors = [model.encode_text(processor(text=one, return_tensors="pt")["input_ids"])[0] for one in prompts]
        classes.append(sum(vector / vector.norm() for vector in vectors))
    classes = torch.stack([vector / vector.norm() for vector in classes])
    samples = list(ShardSamples(data))
    right = []
    for sample in samples:
        pixels = processor(images=Image.open(io.BytesIO(sample.image)), return_tensors="pt")["pixel_values"]
        guess = (classes @ model.encode_image(pixels)[0]).argmax()
        right.append(WORDS[5 + guess] == sample.extra["class_name"])
    groups = [[ok for ok, one in zip(right, samples) if one.extra["class_name"] == name] for name in WORDS[5:8]]
    assert values["top_1"] == pytest.approx(sum(right) / 13)
    assert values["mean_per_class"] == pytest.approx(sum(sum(group) / len(group) for group in groups) / 3)
    assert (values["top_5"], values["pictures"], values["classes"]) == (1.0, 13, 3)


def test_classification_metrics_with_unequal_classes_and_ties():
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.1], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]])
    metrics = classification_metrics(scores, torch.tensor([0, 1, 1, 2]))
    assert metrics["top_1"] == pytest.approx((1 + 1 + 0.5 + 0) / 4)
    assert metrics["mean_per_class"] == pytest.approx((1 + 1.5 / 2 + 0) / 3)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 2 query rows"):
        classification_metrics(torch.tensor([[0.5, 0.1], [float("nan"), 0.2]]), torch.tensor([0, 1]))


def test_half_a_model_is_refused(model_folder, tmp_path):
    """A classifier has no text tower, which would be drawn at random."""
    loaded = load_model(model_folder)
    model, processor = loaded.model, loaded.processor
    classifier = PyramidCLIPForImageClassification(model.config)
    classifier.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights are missing or of another shape: .*both towers"):
        load_model(str(tmp_path))


def test_a_weight_of_another_shape_or_another_model_is_an_error(model_folder, data, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    weights["visual_projection.weight"] = weights["visual_projection.weight"][:, :5].clone()
    save_file(weights, tmp_path / "model/model.safetensors", {"format": "pt"})
    words = ["--model", str(tmp_path / "model"), "--data", data, "--device", "cpu"]
    assert main(words) == 2
    assert "1 weights are missing or of another shape: ['visual_projection.weight']" in capsys.readouterr().err
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps(config | {"model_type": "clip"}))
    assert main(words) == 2
    assert "its model_type is 'clip', expected 'pyramidclip'" in capsys.readouterr().err


@pytest.mark.loopback
def test_a_model_of_the_hub_needs_its_tokenizer(model_folder, tmp_path, checkout):
    """The processor would take the tokenizer that the package comes with, whatever the model was trained with."""
    files = {path.name: path.read_bytes() for path in Path(model_folder).iterdir()}
    without = {name: data for name, data in files.items() if name not in ("tokenizer.json", "vocab.json")}
    assert without.keys() != files.keys()
    code = "import sys\nfrom pyramidclip_hf.loading import load_model\nload_model(sys.argv[1])"
    with running_hub() as hub:
        for name, content in (("whole", files), ("half", without)):
            hub.repositories[f"tester/{name}"] = Repository()
            hub.repositories[f"tester/{name}"].commit(content)
            environment = os.environ | client_environment(hub, tmp_path / "home")
            ran = subprocess.run(
                [sys.executable, "-c", code, f"tester/{name}"],
                cwd=checkout,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert (ran.returncode == 0) == (name == "whole"), ran.stderr
    assert "--model tester/half: the tokenizer is missing" in ran.stderr


def test_what_is_wrong_ends_with_code_2(model_folder, data, sets_root, tmp_path, capsys):
    def error_of(*arguments):
        assert main([*arguments, "--cpu"]) == 2
        return capsys.readouterr().err

    assert "unknown level pair" in error_of("--model", model_folder, "--data", data, "--levels", "roi_roi")
    assert "no such file or folder" in error_of("--model", model_folder, "--data", str(tmp_path / "nowhere"))
    assert "no such file or folder" in error_of("--model", str(tmp_path / "nowhere"), "--data", data)
    assert "no config.json" in error_of("--model", str(tmp_path), "--data", data)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        os.link(f"{model_folder}/{name}", bare / name)
    assert "the tokenizer is missing (tokenizer.json" in error_of("--model", str(bare), "--data", data)
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    (tmp_path / "classes" / "cat" / "0.jpg").touch()
    told = error_of("--model", model_folder, "--data", str(tmp_path / "classes"))
    assert "holds pictures without captions: --captions FILE" in told and "are for --task zero-shot" in told
    told = error_of("--model", model_folder, "--data", str(tmp_path / "classes"), "--task", "zero-shot")
    assert "classes has a single class, 'cat', so that every answer would be right" in told
    assert "--device cuda:0 and --cpu contradict" in error_of("--model", "x", "--data", data, "--device", "cuda:0")
    assert "did you mean --levels" in error_of("--model", "x", "--data", data, "--level", "roi_tags")
    assert "arguments are required: --data" in error_of("--model", "x")
    (tmp_path / "names").write_text("cat\ncat\n")
    assert "pictures and captions only, so --levels roi_tags" in error_of(
        *("--model", model_folder, "--data", sets_root, "--dataset", "flickr30k", "--levels", "roi_tags")
    )
    assert "it is for --task zero-shot" in error_of("--model", model_folder, "--data", data, "--dataset", "pets")
    assert "lacks MS-COCO" in error_of("--model", model_folder, "--data", sets_root, "--dataset", "mscoco")
    zero_shot = ("--model", model_folder, "--data", data, "--task", "zero-shot")
    assert "--classes is for one data set" in error_of(*zero_shot, "--dataset", "pets", "dtd", "--classes", "x")
    assert "--split-file goes with" in error_of(*zero_shot, "--split-file", "x")
    assert "lacks Food-101" in error_of(*zero_shot, "--dataset", "food101")
    assert "class names repeat: 'cat'" in error_of(*zero_shot, "--classes", str(tmp_path / "names"))


@pytest.mark.parametrize("task", ["retrieval", "zero-shot"])
def test_a_larger_picture_is_taken_where_the_limit_says_so(model_folder, data, tmp_path, capsys, task):
    """48 x 40 pixels in shards, 20 x 18 in files."""
    words = ["--model", model_folder, "--task", task, "--device", "cpu"]
    folder = write_pictures(tmp_path / "classes", COUNTS) if task == "zero-shot" else data
    pixels = 20 * 18 if task == "zero-shot" else 48 * 40
    assert main([*words, "--data", folder, "--max-image-pixels", str(pixels)]) == 0
    assert main([*words, "--data", folder, "--max-image-pixels", str(pixels - 1)]) == 2
    assert f"more than max_image_pixels={pixels - 1}" in capsys.readouterr().err


def test_pairs_without_captions_say_what_they_have(model_folder, tmp_path, capsys):
    picture = next(Path(write_pictures(tmp_path / "pictures", COUNTS)).rglob("*.png"))
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"image": str(picture), "text": "a fox"}))
    assert main(["--model", model_folder, "--data", str(tmp_path / "pairs.jsonl"), "--device", "cpu"]) == 2
    told = "none of the 1 samples has the level 'caption'; the record of the first one has image, text"
    assert told in capsys.readouterr().err


def test_a_slow_type_is_said(model_folder, data, monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert main(["--model", model_folder, "--data", data, "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "--dtype bfloat16: this processor has no bfloat16 arithmetic" in capsys.readouterr().err


def test_templates(tmp_path):
    path = tmp_path / "templates"
    path.write_text("a {}\nno place\n")
    with pytest.raises(ValueError, match=r"needs \{\} once.*'no place'"):
        read_templates(str(path))
    with pytest.raises(FileNotFoundError, match="no template file"):
        read_templates(str(tmp_path / "nowhere"))
    assert read_templates(None) is None


def test_names_that_settings_know_without_torch_are_those_of_the_tables():
    assert tuple(TABLE_7) == TABLE_7_SETS and tuple(CAPTION_SETS) == KARPATHY_SETS
    assert records.MAX_IMAGE_PIXELS == image_processing_pyramidclip.MAX_IMAGE_PIXELS
