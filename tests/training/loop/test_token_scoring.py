"""Scores by tokens: against loops over one picture and one text, the training's own validation, and what is refused."""

import io
import json
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from pyramidclip_hf import PyramidCLIPConfig
from pyramidclip_hf.loading import load_model
from tests.training.processes import run_in_processes
from tests.training.tiny import VIT
from training import pretrain
from training.data.labelled import open_pictures
from training.data.records import Sample
from training.data.samples import ShardSamples
from training.data.shards import ShardWriter, write_dataset_json
from training.evaluate import main
from training.evaluation.arguments import EvaluationArguments
from training.evaluation.results import read_json
from training.loop.terms.tokens import TokenPair
from training.loop.token_scoring import TokenScoring
from training.settings.pretraining import PretrainingArguments

WORDS = "red green blue big small dog cat bird house tree car boat sun moon star".split()
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"}
MODEL = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 8}
COUNT = 14


def picture(rng):
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (24, 30, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Captions of different lengths; the third picture has two."""
    folder, rng = tmp_path_factory.mktemp("data") / "scenes", np.random.default_rng(0)
    with ShardWriter(folder / "part.tar") as writer:
        for number in range(COUNT):
            captions = [" ".join(rng.permutation(WORDS)[: 2 + (number + more) % 6]) for more in range(2)]
            writer.write(
                Sample(
                    key=f"s{number:02d}",
                    image=picture(rng),
                    image_suffix="png",
                    caption=captions[0],
                    captions=captions if number == 2 else None,
                    extra={"class_name": WORDS[5 + number % 3]},
                )
            )
    write_dataset_json(folder, {}, None, {}, classes=WORDS[5:8])
    return str(folder)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "filip"
    pretrain.run(
        PretrainingArguments(
            output_dir=str(folder),
            train_data=[data],
            validation_data=data,
            model="ViT-B-32",
            model_config=MODEL,
            loss_weights={},
            objective={"global_caption_tokens": {"width": 5}},
            global_batch_size=7,
            max_steps=4,
            learning_rate=1e-2,
            precision="fp32",
            ema_decay=0.5,
            trackers=["none"],
            dataloader_workers=0,
        )
    )
    return folder


def values(path):
    return {one.metric_type: one.metric_value for one in read_json(path)[1]}


def evaluate(model, data, output, *words):
    assert (
        main(["--model", str(model), "--data", data, "--scoring", "tokens", "--cpu", "--output", output, *words]) == 0
    )
    return values(output)


def tokens_alone(run, data):
    """Vectors of each picture and each caption, every one by a call of its own, and whose each caption is."""
    loaded = load_model(str(run / "final"))
    model, processor, heads = loaded.model, loaded.processor, load_file(run / "final" / "heads.safetensors")

    def project(states, side):
        weight, bias = (heads[f"global_caption_tokens.{side}_projection.{name}"] for name in ("weight", "bias"))
        return F.normalize(states @ weight.T + bias, dim=-1)

    @torch.no_grad()
    def picture_of(image):
        states = model.vision_model(processor(images=image, return_tensors="pt")["pixel_values"]).last_hidden_state
        return project(model.vision_model.post_layernorm(states)[0, 1:], "image")

    @torch.no_grad()
    def text_of(text):
        ids = processor(text=[text], return_tensors="pt")["input_ids"]
        length = int((ids[0] == model.config.text_config.eos_token_id).nonzero()[0]) + 1
        return project(model.text_model(ids).last_hidden_state[0, :length], "text")

    return picture_of, text_of


@torch.no_grad()
def score(rows, columns):
    return sum(max(float(row @ column) for column in columns) for row in rows) / len(rows)


def expected_recall(scores, right, k):
    places = []
    for row, own in zip(scores, right, strict=True):
        best = max(row[place] for place in own)
        places.append(sum(one > best for place, one in enumerate(row) if place not in own))
    return sum(place < k for place in places) / len(places), sum(place + 1 for place in places) / len(places)


def test_retrieval_is_that_of_loops_and_of_the_training_itself(run, data, tmp_path):
    found = evaluate(run / "final", data, str(tmp_path / "r.json"), "--batch-size", "4", "--chunk-size", "3")

    picture_of, text_of = tokens_alone(run, data)
    samples = list(ShardSamples(data))
    images = [picture_of(Image.open(io.BytesIO(one.image))) for one in samples]
    captions = [(number, text) for number, one in enumerate(samples) for text in one.captions or [one.caption]]
    texts = [text_of(text) for _, text in captions]
    own = [[place for place, (owner, _) in enumerate(captions) if owner == number] for number in range(COUNT)]
    to_text = expected_recall([[score(image, text) for text in texts] for image in images], own, 5)
    to_image = expected_recall(
        [[score(text, image) for image in images] for text in texts], [[n] for n, _ in captions], 5
    )
    for direction, (recall, rank) in {"image_to_text": to_text, "text_to_image": to_image}.items():
        assert found[f"{direction}_R@5"] == pytest.approx(recall)
        assert found[f"{direction}_mean_rank"] == pytest.approx(rank)
    assert (found["images"], found["texts"]) == (COUNT, COUNT + 1)
    logged = json.loads((run / "final" / "training.json").read_text())["metrics"]
    by_training = {name.rsplit("/", 1)[1]: value for name, value in logged.items() if name.startswith("validation/")}
    assert len(by_training) == 8 and all(
        name.split("/")[1] == "global_caption_tokens" for name in logged if "R@" in name
    )
    again = evaluate(run / "final", data, str(tmp_path / "same.json"))
    assert {name: again[name] for name in by_training} == by_training
    assert read_json(tmp_path / "same.json")[1][0].dataset_config == "global_caption_tokens"


def test_zero_shot_is_the_mean_over_prompts(run, data, tmp_path):

    loaded = load_model(str(run / "final"))
    scoring = TokenScoring.of_folder(loaded.folder, loaded.model, loaded.processor, "model")
    pictures = open_pictures(data)
    args = EvaluationArguments(model="", data="", batch_size=4)
    loaded.model.train()
    scores = scoring.zero_shot(pictures, ["a {}", "my big {} there"], args)
    assert loaded.model.training and loaded.model.vision_model.training
    loaded.model.eval()
    picture_of, text_of = tokens_alone(run, data)
    prompts = [[text_of(line.format(name)) for line in ("a {}", "my big {} there")] for name in pictures.class_names]
    expected = [
        [sum(score(picture_of(pictures.read(number)), prompt) for prompt in own) / 2 for own in prompts]
        for number in range(len(pictures))
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    found = evaluate(run / "final", data, str(tmp_path / "z.json"), "--task", "zero-shot")
    assert found["pictures"] == COUNT and found["classes"] == 3


def command(rank, world_size, model, data, folder):
    return [
        main(
            ["--model", model, "--data", data, "--scoring", "tokens", "--cpu", "--batch-size", "3", "--task", task]
            + ["--output", f"{folder}/{task}-{world_size}.json"]
        )
        for task in ("retrieval", "zero-shot")
    ]


def test_a_pair_is_scored_by_its_own_heads_else_by_those_that_serve_it():
    config = PyramidCLIPConfig(**MODEL)
    serving, own = (TokenPair(f"{name}_tokens", 1.0, {}, config) for name in ("view1_caption", "global_caption"))
    model = types.SimpleNamespace(device=torch.device("cpu"))
    for heads in ((serving, own), (own, serving)):
        assert TokenScoring(model, None, heads).head_for("global_caption") is own
    assert TokenScoring(model, None, [serving]).head_for("global_caption") is serving
    with pytest.raises(ValueError, match="no token heads for it; it has those for global_caption$"):
        TokenScoring(model, None, [serving]).head_for("global_tags")


def test_equal_on_one_and_two_processes(run, data, tmp_path):
    for size in (1, 2):
        assert run_in_processes(command, size, str(run / "final"), data, tmp_path) == [[0, 0]] * size
    for task in ("retrieval", "zero-shot"):
        assert values(tmp_path / f"{task}-1.json") == values(tmp_path / f"{task}-2.json")


def test_heads_lie_beside_each_final_model_and_are_no_part_of_it(run):
    heads = load_file(run / "final" / "heads.safetensors")
    assert sorted(heads) == [
        f"global_caption_tokens.{name}"
        for name in ("image_projection.bias", "image_projection.weight", "logit_scale")
        + ("text_projection.bias", "text_projection.weight")
    ]
    assert (run / "final-average" / "heads.safetensors").is_file()
    assert not heads.keys() & load_file(run / "final" / "model.safetensors").keys()
    last = load_file(sorted((run / "checkpoints").iterdir())[-1] / "heads.safetensors")
    assert all(torch.equal(heads[name], last[name]) for name in heads)


@pytest.mark.parametrize(
    ("harm", "words", "message"),
    [
        (lambda path: path.unlink(), [], "needs the heads.safetensors that a run with a token term"),
        (lambda path: path.write_bytes(b"{}"), [], "cannot be read as the heads of this model"),
        (
            lambda path: save_file({"a.b": torch.ones(1)}, path),
            [],
            "expected heads of terms such as global_caption_tokens",
        ),
        (lambda path: None, ["--levels", "local_summary"], "no token heads for it; it has those for global_caption"),
        (lambda path: None, ["--backend", "onnx"], "--scoring tokens needs --backend torch"),
    ],
)
def test_what_cannot_be_scored_is_refused(run, data, tmp_path, capsys, harm, words, message):
    folder = shutil.copytree(run / "final", tmp_path / "model")
    harm(folder / "heads.safetensors")
    assert main(["--model", str(folder), "--data", data, "--scoring", "tokens", "--cpu", *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
