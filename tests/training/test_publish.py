"""`python -m training.publish` against a Hub on this machine, then loaded back."""

import json
import os
import shutil
import subprocess
import sys

import markdown_it
import pytest
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard
from PIL import Image

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor
from tests.hub_server import card_faults, client_environment, running_hub
from training.evaluation.results import write_json
from training.loop.card import model_folder, publish, write_card
from training.publish import main
from training.settings.pretraining import PretrainingArguments

LOAD_BACK = """
import sys
from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
model, processor = (cls.from_pretrained("tester/shapes") for cls in (PyramidCLIPModel, PyramidCLIPProcessor))
print(processor.roi_feature_size, f"{model.logit_scale.item():.6f}")
"""


@pytest.fixture
def run_folder(tmp_path):
    """What a finished run leaves, of a model that was not trained."""
    config = PyramidCLIPConfig(
        projection_dim=16,
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_leff_layers": 0,
                       "patch_size": 16, "image_size": 32, "roi_feature_size": 12},
    )  # fmt: skip
    torch.manual_seed(0)
    final = tmp_path / "shapes-run" / "final"
    PyramidCLIPModel(config).save_pretrained(final)
    PyramidCLIPProcessor(roi_feature_size=12).save_pretrained(final)
    settings = PretrainingArguments(
        output_dir=str(tmp_path / "shapes-run"), train_data=["data/shapes"], validation_data="data/held-out",
        global_batch_size=8, max_steps=3, dataloader_workers=0,
    ).to_dict()  # fmt: skip
    data = [{"name": "data/shapes", "samples": 24, "license": "CC0"}]
    metrics = {"validation/global_caption/image_to_text/R@1": 0.25, "validation/loss": 1.5}
    record = {"settings": settings, "samples_seen": 24, "steps": 3, "processes": 1, "seconds": 36.0, "data": data,
              "metrics": metrics}  # fmt: skip
    (final / "training.json").write_text(json.dumps(record), encoding="utf8")
    write_card(final, record)
    return tmp_path / "shapes-run"


def run_module(arguments, folder, checkout, environment):
    environment = {**os.environ, "PYTHONPATH": str(checkout), **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)  # fmt: skip


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.loopback
def test_run_is_published_in_one_commit_and_loads_back(run_folder, tmp_path, checkout):
    result = EvalResult("zero-shot-image-classification", "cifar10", "CIFAR-10", "accuracy", 0.8125)
    write_json([result], tmp_path / "results.json", "shapes-run")
    before = contents(run_folder)
    command = ["-m", "training.publish", "shapes-run", "tester/shapes", "--results", "results.json"]
    with running_hub() as hub:
        environment = client_environment(hub, tmp_path / "home")
        ran = run_module(command, tmp_path, checkout, environment)
        assert ran.returncode == 0, ran.stderr
        loaded = run_module(["-c", LOAD_BACK], tmp_path, checkout, environment)
        assert loaded.returncode == 0, loaded.stderr
    repository = hub.repositories["tester/shapes"]
    assert ran.stdout.strip() == f"{hub.url}/tester/shapes/commit/{repository.sha}" and len(repository.commits) == 2
    assert loaded.stdout.split() == ["12", "2.659260"]
    files = repository.files
    assert {"model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "training.json",
            "modeling_pyramidclip.py"} <= files.keys()  # fmt: skip
    text = files["README.md"].decode()
    assert card_faults(text) == []
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in ModelCard(text).data.eval_results}
    assert found == {("held-out", "global_caption/image_to_text/R@1"): 0.25, ("CIFAR-10", "accuracy"): 0.8125}
    assert (
        "| global batch size | 8 |" in text
        and "shapes: 24 samples" in text
        and 'from_pretrained("tester/shapes")' in text
    )
    assert contents(run_folder) == before, "the run is only read"
    # The server is gone: nothing is sent, and the folder stays.
    ran = run_module(command, tmp_path, checkout, environment)
    assert ran.returncode == 1 and "no connection to the Hub" in ran.stderr
    assert contents(run_folder) == before
    assert environment["HF_TOKEN"] not in ran.stdout + ran.stderr


@pytest.mark.loopback
def test_a_page_is_published_beside_the_model(run_folder, tmp_path, checkout):
    """Its README is what the Hub takes, its versions are pinned ones, and its code is the package's."""
    (tmp_path / "labels.txt").write_text("a cat\na red bat\n")
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (20, 20), "red").save(tmp_path / "pictures" / "red.png")
    command = ["-m", "training.publish", "shapes-run", "tester/shapes", "--space", "--examples", "pictures"]
    with running_hub() as hub:
        environment = client_environment(hub, tmp_path / "home")
        ran = run_module([*command, "--labels-file", "labels.txt"], tmp_path, checkout, environment)
        assert ran.returncode == 0, ran.stderr
        again = run_module(command, tmp_path, checkout, environment)
        assert again.returncode == 0, again.stderr
    model, space = (hub.repositories[name] for name in ("tester/shapes", "spaces/tester/shapes"))
    assert ran.stdout.split() == [f"{hub.url}/tester/shapes/commit/{model.commits[1][0]}",
                                  f"{hub.url}/spaces/tester/shapes/commit/{space.commits[1][0]}"]  # fmt: skip
    files = space.commits[1][1]
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---")[1])
    assert card_faults(card) == [] and metadata["models"] == ["tester/shapes"] and metadata["app_file"] == "app.py"
    written = contents(run_folder / "space")
    assert written.keys() == space.files.keys() - {".gitattributes", "labels.txt"}
    assert files["pyramidclip_hf/app.py"] == (checkout / "pyramidclip_hf" / "app.py").read_bytes()
    assert files["labels.txt"] == b"a cat\na red bat\n" and files["examples/00.png"][1:4] == b"PNG"
    assert '["--model", "tester/shapes", "--examples", "examples", "--labels-file", "labels.txt"]' in (
        files["app.py"].decode()
    )
    pins = [line for name in ("constraints.txt", "constraints-app.txt") for line in
            (checkout / name).read_text().splitlines()]  # fmt: skip
    required = files["requirements.txt"].decode().split()
    assert set(required) <= set(pins) and any(line.startswith("pillow==12.") for line in required)
    assert metadata["sdk_version"] == dict(line.split("==") for line in required)["gradio"]


def test_what_a_page_cannot_be_made_of(run_folder, tmp_path, capsys):
    (tmp_path / "words.png").write_text("no picture")
    words = [str(run_folder), "tester/shapes"]
    for more, sentence in (
        (["--examples", "x"], "--examples and --labels-file are the page's: add --space"),
        (["--space", "--examples", str(tmp_path / "words.png")], "This is no picture"),
        (["--space", "--labels-file", str(tmp_path / "gone.txt")], "gone.txt"),
    ):
        assert main([*words, *more]) == 2
        assert sentence in capsys.readouterr().err
    assert main([str(run_folder), "tester/sha/pes", "--space"]) == 2
    assert "repo_id: expected an id of the Hub, such as user/name, got 'tester/sha/pes'" in capsys.readouterr().err
    (run_folder / "space").mkdir()
    assert main([*words, "--space"]) == 2
    assert "was not written by --space: move it away" in capsys.readouterr().err


def test_what_data_say_of_themselves_is_text_in_the_card(run_folder):
    final = run_folder / "final"
    record = json.loads((final / "training.json").read_text(encoding="utf8"))
    record["data"] = [{
        "name": "data/<b>emoji_scenes", "samples": 24,
        "license": "a|b ![x](https://x.example/y.png) &lt; ```\n## no `x`",
        "attribution": "CC0\n\n# Heading\n<script>alert(1)</script>\n---\n- [link](javascript:x) _a_ **b**",
    }]  # fmt: skip
    record["settings"]["output_dir"] = 'runs/x")\n```\n# <img src=x>\n'
    write_card(final, record)
    text = (final / "README.md").read_text(encoding="utf8")
    assert card_faults(text) == []
    html = markdown_it.MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])
    for tag in ("<script", "<img", "<b>", "Heading</h", "no <code", "<em>", "<strong>", '<a href="javascript'):
        assert tag not in html, tag
    assert "&lt;b&gt;emoji_scenes: 24 samples." in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<pre>") == 2  # the example and the citation


def test_what_cannot_be_published(run_folder, tmp_path):
    with pytest.raises(ValueError, match="neither a finished run"):
        publish(tmp_path, "tester/shapes")
    (tmp_path / "other.json").write_text("{}", encoding="utf8")
    with pytest.raises(ValueError, match="expected a result file"):
        publish(run_folder, "tester/shapes", result_files=[tmp_path / "other.json"])
    cut = shutil.copytree(run_folder / "final", tmp_path / "cut")
    weights = cut / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ValueError, match="cut/model.safetensors"):
        publish(cut, "tester/shapes")
    assert model_folder(run_folder) == run_folder / "final" == model_folder(run_folder / "final")
