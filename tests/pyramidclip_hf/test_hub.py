"""Model cards, folders that load without the package, and publishing over HTTP to a Hub on this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import pyramidclip_hf
from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPModel,
    PyramidCLIPProcessor,
    PyramidCLIPVisionModel,
)
from pyramidclip_hf.hub import (
    PublishError,
    _files_to_publish,
    add_remote_code,
    build_model_card,
    export_remote_code,
    publish_folder,
)
from pyramidclip_hf.versions_pyramidclip import NEEDED
from tests.hub_server import Repository, card_faults, client_environment, running_hub
from tests.rounding import assert_equal_to_rounding

TEXTS = ["a small red cup", "wow!! two dogs"]
# The longest sum of the tiny models: a patch of 3 x 8 x 8 pixels, or a ResNet's 3 x 3 x 32 window.
WIDEST = 288
SECTIONS = ("How to use", "Intended use", "Training data", "Evaluation", "Limits", "Licence", "Citation")
VISION = {
    "vit": {"hidden_size": 32, "num_hidden_layers": 2, "num_leff_layers": 1, "patch_size": 8, "image_size": 32},
    "resnet": {"tower": "resnet", "layers": [1, 1, 1, 1], "width": 4, "image_size": 32},
}


def tiny_config(tower="vit"):
    return PyramidCLIPConfig(
        projection_dim=16,
        text_config={"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        vision_config={"num_attention_heads": 2, "roi_feature_size": 12, **VISION[tower]},
    )


def tiny_model(tower="vit", cls=PyramidCLIPModel):
    torch.manual_seed(0)
    config = tiny_config(tower)
    return cls(config.vision_config if cls is PyramidCLIPVisionModel else config).eval()


def tiny_processor():
    size = {"height": 32, "width": 32}
    image_processor = pyramidclip_hf.PyramidCLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    return PyramidCLIPProcessor(image_processor=image_processor, roi_feature_size=12)


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))


def outputs(model, processor):
    with torch.no_grad():
        return model(**processor(images=picture(), text=TEXTS, return_tensors="pt")).logits_per_image.numpy()


def run_python(code, folder, *arguments, **environment):
    """A fresh process in `folder`; the package is importable there unless `code` hides it."""
    checkout = Path(pyramidclip_hf.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(checkout), **environment}
    ran = subprocess.run([sys.executable, "-c", code, *arguments], cwd=folder, env=environment,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return ran


def results():
    return [
        EvalResult("zero-shot-image-classification", "cifar10", "CIFAR-10", "accuracy", 0.8125, dataset_split="test"),
        EvalResult("image-text-retrieval", "shapes", "Shapes | small", "recall@1", 0.5),
    ]


# --------------------------------------------------------------------------------------------------------- the card


def test_the_template_in_the_checkout_is_the_one_in_the_package(checkout):
    packaged = Path(pyramidclip_hf.__file__).with_name("model_card_template.md")
    assert (checkout / "MODEL_CARD.md").read_bytes() == packaged.read_bytes()


def test_card_is_filled_and_its_metadata_valid():
    card = build_model_card(
        tiny_config(), model_name="shapes", repo_id="user/shapes", results=results(), training={"steps": 10},
        training_data="Shapes.", license="mit", license_text="MIT.", datasets=["user/shapes"], remote_code=True,
    )  # fmt: skip
    text = str(card)
    assert card_faults(text) == []
    read = ModelCard(text, ignore_metadata_errors=False)
    assert read.data.to_dict() == card.data.to_dict()
    assert [result.metric_value for result in read.data.eval_results] == [0.8125, 0.5]
    assert read.data.pipeline_tag == "zero-shot-image-classification" and read.data.model_name == "shapes"
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == [
        *SECTIONS[:3],
        "Training",
        *SECTIONS[3:],
    ]
    assert "| zero-shot-image-classification | CIFAR-10 | test | accuracy | 0.8125 |" in text
    assert r"| Shapes \| small |  | recall@1 | 0.5 |" in text
    assert "| steps | 10 |" in text and 'from_pretrained("user/shapes")' in text and "trust_remote_code" in text
    assert "{{" not in text and "{%" not in text


def test_the_card_s_example_runs(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    picture().save(tmp_path / "picture.jpg")
    example = str(build_model_card(tiny_config(), model_name="shapes", repo_id="model"))
    example = example.split("```python\n")[1].split("```")[0]
    ran = run_python(example + "print(*probabilities.shape, probabilities.sum().item())", tmp_path)
    rows, columns, total = ran.stdout.split()
    assert (rows, columns) == ("1", "2") and float(total) == pytest.approx(1)


def test_card_without_facts_says_so():
    text = str(build_model_card(tiny_config("resnet"), model_name="bare"))
    assert card_faults(text) == []
    assert "No licence was stated" in text and "license: unknown" in text
    assert "Not stated by whoever published" in text and "No results were recorded" in text
    assert "trust_remote_code" not in text and "## Training\n" not in text


def test_card_says_which_terms_of_other_kinds_were_trained():
    config = tiny_config()
    assert "other kinds" not in str(build_model_card(config, model_name="x"))
    config.further_loss_terms = ["caption_mlm", "global_caption_tokens"]
    both = str(build_model_card(config, model_name="x"))
    told = "terms of other kinds (caption_mlm, global_caption_tokens), whose heads are no part of the model"
    assert f") and {told}, label smoothing" in both
    config.loss_weights = {}
    alone = str(build_model_card(config, model_name="x"))
    assert f"| objective | {told}; no pair of levels of the model's own, label smoothing" in alone
    assert "()" not in alone.split("| objective |")[1].splitlines()[0]


def test_card_of_a_named_architecture_counts_its_parameters():
    assert "151.6 million" in str(build_model_card(PyramidCLIPConfig.from_architecture("ViT-B-16"), model_name="x"))


def test_results_that_huggingface_hub_refuses():
    missing = EvalResult("t", "d", "D", "accuracy", 0.5)
    missing.task_type = None
    with pytest.raises((ValueError, TypeError)):
        build_model_card(tiny_config(), model_name=None, results=[missing])


def test_the_check_of_cards_sees_faults():
    text = str(build_model_card(tiny_config(), model_name="shapes", results=results()))
    for old, new in (("license: unknown", "license: free"), ("- name: shapes", "- name: ''"), ("---\n", ""),
                     ("name: CIFAR-10", "nome: CIFAR-10")):  # fmt: skip
        broken = text.replace(old, new)
        assert broken != text and card_faults(broken), new


# ------------------------------------------------------------------------------------------------------ remote code

WITHOUT_PACKAGE = """
import json, sys
import numpy as np
import torch
from PIL import Image

sys.modules["pyramidclip_hf"] = None
try:
    import pyramidclip_hf
except ImportError:
    pass
else:
    raise SystemExit("the package must be out of reach")
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForZeroShotImageClassification, AutoProcessor, AutoTokenizer)

texts, found = json.loads(sys.argv[1]), {}
picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
for name in sys.argv[2:]:
    trust = {"pretrained_model_name_or_path": name, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained(**trust)
    inputs = processor(images=picture, text=texts, return_tensors="pt")
    with torch.no_grad():
        for cls in (AutoModel, AutoModelForZeroShotImageClassification):
            found[f"{name}/{cls.__name__}"] = cls.from_pretrained(**trust)(**inputs).logits_per_image.numpy()
        fused = AutoModel.from_pretrained(**trust).fuse()
        found[f"{name}/fused"] = fused(**inputs).logits_per_image.numpy()
        head = AutoModelForImageClassification.from_pretrained(**trust)
        found[f"{name}/pooled"] = head.vision_model(inputs["pixel_values"]).pooler_output.numpy()
    found[f"{name}/pixels"] = AutoImageProcessor.from_pretrained(**trust)(picture, return_tensors="np")["pixel_values"]
    found[f"{name}/ids"] = AutoTokenizer.from_pretrained(**trust)(texts, padding=True, return_tensors="np")["input_ids"]
    classes = [type(x).__name__ for x in (AutoConfig.from_pretrained(**trust), processor, processor.tokenizer, head)]
    print(*classes)
    assert all(type(x).__module__.startswith("transformers_modules") for x in (processor, processor.tokenizer, head))
np.savez("found.npz", **found)
"""


def test_exported_folders_load_where_the_package_cannot_be_imported(tmp_path):
    processor, models = tiny_processor(), {tower: tiny_model(tower) for tower in VISION}
    for tower, model in models.items():
        export_remote_code(model, processor, tmp_path / tower)
    ran = run_python(WITHOUT_PACKAGE, tmp_path, json.dumps(TEXTS), *models, HF_HOME=str(tmp_path / "home"))
    assert ran.stdout.splitlines() == [
        "PyramidCLIPConfig PyramidCLIPProcessor PyramidCLIPTokenizer PyramidCLIPForImageClassification"
    ] * len(models)
    inputs = processor(images=picture(), text=TEXTS, return_tensors="pt")
    with np.load(tmp_path / "found.npz") as found:
        for tower, model in models.items():
            expected = outputs(model, processor)
            for name in ("AutoModel", "AutoModelForZeroShotImageClassification"):
                assert_equal_to_rounding(found[f"{tower}/{name}"], expected, WIDEST)
            np.testing.assert_allclose(found[f"{tower}/fused"], expected, rtol=0, atol=1e-4)
            with torch.no_grad():
                pooled = model.vision_model(inputs["pixel_values"]).pooler_output
            assert_equal_to_rounding(found[f"{tower}/pooled"], pooled, WIDEST)
            np.testing.assert_array_equal(found[f"{tower}/pixels"], inputs["pixel_values"].numpy())
            np.testing.assert_array_equal(found[f"{tower}/ids"], inputs["input_ids"].numpy())


def test_export_leaves_the_classes_alone(tmp_path):
    model, processor = tiny_model(), tiny_processor()
    export_remote_code(model, processor, tmp_path / "with code")
    model.save_pretrained(tmp_path / "without")
    processor.save_pretrained(tmp_path / "without")
    assert not list((tmp_path / "without").glob("*.py"))
    for path in (tmp_path / "without").glob("*.json"):
        assert "auto_map" not in path.read_text(encoding="utf8"), path
    for part in (model, model.config, processor, processor.tokenizer, processor.image_processor):
        assert getattr(type(part), "_auto_class", None) is None


def test_exported_code_is_complete_and_nothing_else(tmp_path):
    written = export_remote_code(tiny_model(), tiny_processor(), tmp_path)
    package = Path(pyramidclip_hf.__file__).parent
    assert {path.name for path in written} == {path.name for path in tmp_path.glob("*.py")}
    assert all(path.read_bytes() == (package / path.name).read_bytes() for path in written)
    assert {"modeling_pyramidclip_vit.py", "fusion_pyramidclip.py"} <= {path.name for path in written}
    assert not {"hub.py", "commands.py", "__init__.py"} & {path.name for path in written}


def test_with_the_package_its_own_classes_win(tmp_path):
    from transformers import AutoModel, AutoProcessor

    export_remote_code(tiny_model(), tiny_processor(), tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, trust_remote_code=True)) is PyramidCLIPModel
    assert type(AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)) is PyramidCLIPProcessor


@pytest.mark.parametrize("cls", [PyramidCLIPVisionModel, PyramidCLIPForImageClassification])
def test_towers_and_heads_can_be_exported(cls, tmp_path):
    export_remote_code(tiny_model(cls=cls), None, tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text(encoding="utf8"))["auto_map"]
    modules = {path.stem for path in tmp_path.glob("*.py")}
    assert {reference.split(".")[0] for reference in auto_map.values()} <= modules
    assert f"modeling_pyramidclip.{cls.__name__}" in auto_map.values()


def test_code_goes_only_beside_our_models(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}', encoding="utf8")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no PyramidCLIP model"):
            add_remote_code(folder)


@pytest.mark.parametrize(
    ("library", "version", "sentence"),
    [
        (
            "transformers",
            "5.10.4",
            "PyramidCLIP needs transformers 5.11 or newer, and transformers 5.10.4 is installed: ",
        ),
        ("torch", "2.5.1", "PyramidCLIP needs torch 2.6 or newer, and torch 2.5.1 is installed: pip install"),
    ],
)
def test_an_exported_folder_says_in_a_sentence_that_versions_are_too_old(
    library, version, sentence, tmp_path, monkeypatch
):
    """As those meet it who load it with `trust_remote_code`: whichever of its files comes first."""
    export_remote_code(tiny_model(), tiny_processor(), tmp_path / "folder")
    first_lines = (tmp_path / "folder" / "versions_pyramidclip.py").read_text(encoding="utf8").splitlines()[:2]
    assert f"{library} {NEEDED[library]}" in first_lines[1]
    monkeypatch.setattr(sys.modules[library], "__version__", version)
    for reference in ("configuration_pyramidclip.PyramidCLIPConfig", "processing_pyramidclip.PyramidCLIPProcessor"):
        with pytest.raises(ImportError, match=f"^{sentence}"):
            get_class_from_dynamic_module(reference, str(tmp_path / "folder"))


# ------------------------------------------------------------------------------------------------------- publishing

PUBLISH = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
import torch
from transformers import AutoModel, AutoProcessor
from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.hub import build_model_card, publish_folder

model, processor = PyramidCLIPModel.from_pretrained("model"), PyramidCLIPProcessor.from_pretrained("model")
card = build_model_card(model.config, model_name="shapes", repo_id="tester/shapes", license="mit")
print("COMMIT", publish_folder("model", "tester/shapes", card=card, remote_code=True))
model.push_to_hub("tester/pushed", max_shard_size="1MB")
processor.push_to_hub("tester/pushed")
for name in ("tester/shapes", "tester/pushed"):
    loaded = AutoModel.from_pretrained(name)
    assert type(loaded) is PyramidCLIPModel and type(AutoProcessor.from_pretrained(name)) is PyramidCLIPProcessor
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert PyramidCLIPProcessor.from_pretrained(name).tokenizer.pad_token_id == 0
print("SAME WEIGHTS")
"""

FAILURES = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from pyramidclip_hf.hub import PublishError, publish_folder
from huggingface_hub import ModelCard

for name, options in json.loads(sys.argv[1]):
    if "card" in options:
        options["card"] = ModelCard(options["card"])
    try:
        publish_folder("model", name, **options)
    except (PublishError, ValueError) as error:
        print("REFUSED", json.dumps([name, type(error).__name__, str(error)]))
"""


@pytest.fixture
def folder(tmp_path):
    """A saved model, as a process in `tmp_path` sees it under the name "model"."""
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_link_out_of_the_folder_is_not_published(folder, tmp_path):
    (tmp_path / "private.txt").write_text("a key", encoding="utf8")
    (folder / "inside.json").symlink_to(folder / "config.json")
    assert "inside.json" in _files_to_publish(folder)
    (folder / "notes.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(ValueError, match="notes.txt is a link to .*private.txt, outside of .*would be made public"):
        publish_folder(folder, "tester/none")


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.loopback
def test_publish_push_and_load_back(folder, tmp_path):
    (folder / ".secret").write_text("hidden", encoding="utf8")
    before = contents(folder)
    old_weights = {"model-00001-of-00002.safetensors": b"1", "model-00002-of-00002.safetensors": b"2",
                   "model.safetensors.index.json": b"{}", "pytorch_model.bin": b"3"}  # fmt: skip
    with running_hub() as hub:
        hub.repositories["tester/shapes"] = Repository()
        hub.repositories["tester/shapes"].commit({**old_weights, "samples/one.png": b"4"})
        environment = client_environment(hub, tmp_path / "home")
        ran = run_python(PUBLISH, tmp_path, **environment)
        published, pushed = (hub.repositories[f"tester/{name}"] for name in ("shapes", "pushed"))
        # A process without the package loads what was published.
        run_python(WITHOUT_PACKAGE, tmp_path, json.dumps(TEXTS), "tester/shapes", **environment)
    assert "SAME WEIGHTS" in ran.stdout and f"COMMIT {hub.url}/tester/shapes/commit/{published.sha}" in ran.stdout
    assert len(published.commits) == 3, "everything comes in one commit"
    assert contents(folder) == before, "the folder is only read"
    files = published.files
    assert files["model.safetensors"] == before["model.safetensors"]
    assert {"README.md", "processor_config.json", "tokenizer.json", "modeling_pyramidclip.py"} <= files.keys()
    assert ".secret" not in files
    assert not old_weights.keys() & files.keys(), "from_pretrained might take them for the new ones"
    assert files["samples/one.png"] == b"4", "other files stay"
    assert card_faults(files["README.md"].decode()) == []
    assert "model.safetensors.index.json" in pushed.files, "sharded weights arrive too"
    assert ("POST", "/api/validate-yaml") in hub.requests
    token = environment["HF_TOKEN"]
    assert f"Bearer {token}" in hub.tokens and token not in ran.stdout + ran.stderr
    with np.load(tmp_path / "found.npz") as found:
        expected = outputs(tiny_model(), tiny_processor())
        assert_equal_to_rounding(found["tester/shapes/AutoModel"], expected, WIDEST)


@pytest.mark.loopback
def test_failures_leave_repository_and_folder_as_they_were(folder, tmp_path):
    bad_token, before = "hf_" + "br0ken" * 4 + "\nX", contents(folder)
    cases = [
        ("tester/forbidden", {}),
        ("tester/moved", {}),
        ("tester/cut", {}),
        ("tester/shapes", {"token": bad_token}),
        ("no/such/id", {}),
        ("tester/bad-card", {"card": "---\nlicense: free\n---\n# x\n"}),
    ]
    with running_hub() as hub:
        for name in ("moved", "cut"):
            repository = hub.repositories[f"tester/{name}"] = Repository()
            repository.commit({"model.safetensors": b"the old weights"})
        environment = client_environment(hub, tmp_path / "home")
        ran = run_python(FAILURES, tmp_path, json.dumps(cases), **environment)
    refused = [json.loads(line.removeprefix("REFUSED ")) for line in ran.stdout.splitlines() if "REFUSED " in line]
    expected = {
        "tester/forbidden": ("PublishError", "no right to write there; log in with `hf auth login`"),
        "tester/moved": ("PublishError", "the repository changed meanwhile"),
        "tester/cut": ("PublishError", "no connection to the Hub"),
        "tester/shapes": ("ValueError", "The token holds"),
        "no/such/id": ("HFValidationError", "no/such/id"),
        "tester/bad-card": ("PublishError", "license 'free' is not on the list"),
    }
    assert [name for name, _, _ in refused] == list(expected)
    for name, kind, message in refused:
        assert kind == expected[name][0] and expected[name][1] in message, (name, kind, message)
    assert hub.repositories["tester/cut"].files == {"model.safetensors": b"the old weights"}
    assert hub.repositories["tester/moved"].files == {"model.safetensors": b"the old weights",
                                                      "foreign.txt": b"somebody else's"}  # fmt: skip
    assert "tester/bad-card" not in hub.repositories
    assert contents(folder) == before
    for secret in (environment["HF_TOKEN"], bad_token[:-2]):
        assert secret not in ran.stdout + ran.stderr


@pytest.mark.loopback
def test_killed_while_uploading(folder, tmp_path):
    code = "from pyramidclip_hf.hub import publish_folder; publish_folder('model', 'tester/stuck')"
    with running_hub() as hub:
        repository = hub.repositories["tester/stuck"] = Repository()
        repository.commit({"model.safetensors": b"the old weights"})
        environment = {**os.environ, **client_environment(hub, tmp_path / "home")}
        environment["PYTHONPATH"] = str(Path(pyramidclip_hf.__file__).parent.parent)
        process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment)
        try:
            assert hub.upload_began.wait(timeout=120)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert repository.files == {"model.safetensors": b"the old weights"}


@pytest.mark.loopback
def test_no_network(folder, tmp_path):
    before = contents(folder)
    with running_hub() as hub:
        environment = client_environment(hub, tmp_path / "home")
    ran = run_python(FAILURES, tmp_path, json.dumps([("tester/shapes", {})]), **environment)
    assert "tester/shapes was not published, nothing was sent: no connection to the Hub" in ran.stdout
    # This process has HF_HUB_OFFLINE=1 (conftest.py).
    with pytest.raises(PublishError, match="switched off .HF_HUB_OFFLINE."):
        publish_folder(folder, "tester/shapes")
    assert contents(folder) == before


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="config.json and weights"):
        publish_folder(tmp_path, "tester/shapes")
