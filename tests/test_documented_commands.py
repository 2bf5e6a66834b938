"""What docstrings and pages show: each command parses; on small data each of a page runs, and each Python block."""

import argparse
import ast
import functools
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._inductor.config
from PIL import Image

import pyramidclip_command
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPForImageClassification
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from tests.training.to_evaluate import FEATURES, save_tiny_model, write_pictures
from training.data.records import Region, Sample
from training.data.shards import ShardWriter, write_dataset_json

CHECKOUT = Path(__file__).resolve().parent.parent
LAUNCHER = re.compile(r"(\w+=\S+ )*(\S*python3? -m (?!pip|venv|pytest)|accelerate launch |torchrun |pyramidclip (?!-))")
# Stand for settings of any name, in usage lines.
PLACEHOLDERS = {"--field": 2}
OPEN_ENDED = "..."

# Why a command does not run here; all parse, and the file named runs it in small.
LONG = {
    "conversion.convert_torchvision": "wants torchvision's weights; tests/conversion/test_convert_torchvision.py",
    "conversion.convert_vinvl": "wants the released checkpoint; tests/conversion/test_convert_vinvl.py",
    "tests.bench.clip_art": "trains for an hour; its parts are those of training.pretrain",
    "tests.bench.engines": "twenty minutes",
    "tests.bench.growth": "quarter of an hour",
    "tests.bench.opening": "writes gigabytes; tests/training/data/test_start_up.py",
    "tests.deleted_statements": "hours; tests/test_deleted_statements.py",
    "tests.gpu": "a program of its own; tests/gpu/test_gpu.py",
    "training.ablations": "hours; tests/training/test_ablations.py",
    "training.detection": "trains; tests/training/test_detection.py",
    "training.detection_table": "trains; tests/training/test_detection.py",
    "training.emoji.scenes": "draws thousands of scenes; tests/training/emoji/test_scenes.py",
    "training.finetune": "trains; tests/training/test_finetune.py",
    "training.prepare.detect": "a detector of gigabytes; tests/training/prepare/test_detect.py",
    "training.prepare.import_features": "files of others; tests/training/prepare/test_import_features.py",
    "training.prepare.openclipart": "a package of Debian; tests/training/prepare/test_openclipart.py",
    "training.prepare.select": "data of others; tests/training/prepare/test_select.py",
    "training.static_page": "wants packages of npm; tests/training/test_static_page.py",
    "training.pretrain": "trains; tests/training/test_pretrain_data.py",
}
# What parts of the other commands do not run, by words that they hold.
LONG_WORDS = {
    "app": "serves until it is stopped; tests/pyramidclip_hf/test_app_page.py",
    "export": "half a minute; tests/pyramidclip_hf/commands/test_export.py",
    "--space": "publishes; tests/training/test_publish.py",
    "--bench": "downloads; tests/training/evaluation/test_clip_benchmark.py",
    "--dataset": "data sets of others; tests/training/evaluation/test_sets.py",
    "retrieval --models": "draws for seconds; tests/training/test_figures.py",
    "tsne": "draws for seconds; tests/training/test_figures.py",
}
# What stands for what takes long, or for a word in capitals; all else is typed as printed.
LABELLED = {"TRAIN_FOLDER": 0, "VALIDATION_FOLDER": 1, "TEST_FOLDER": 2}  # seeds of their pictures
STAND_INS = {"t5-base": "first-clause", "DIR": "model", "SHARDS": "shards"}


def pages():
    """The Markdown files of the checkout that show commands."""
    return [path for path in (*CHECKOUT.glob("*.md"), *(CHECKOUT / "docs").rglob("*.md")) if path.name != "tour.md"]


def sources():
    return [
        path for top in ("pyramidclip_hf", "training", "conversion", "tests") for path in (CHECKOUT / top).rglob("*.py")
    ]


def code_of_page(text):
    """The bash blocks and the indented blocks of a page, continued lines joined."""
    blocks = re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks += re.findall(
        r"(?:^    .*\n)+", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return "\n".join(blocks).replace("\\\n", " ").splitlines()


def code_of_docstring(text):
    """The indented blocks of a docstring; a line that is indented further, or begins with a flag, goes on."""
    lines = []
    for block in re.findall(r"(?:^    .*\n?)+", text, re.MULTILINE):
        own = []
        for line in block.splitlines():
            if own and not LAUNCHER.match(line.strip()) and re.match(r"     |    [-\[]", line):
                own[-1] += " " + line.strip().removesuffix("\\")
            else:
                own.append(line.strip().removesuffix("\\"))
        lines += own
    return lines


def commands_in(lines):
    return [line.strip() for line in lines if LAUNCHER.match(line.strip())]


def commands_of_pages():
    """(page, command) in the order of the pages."""
    for path in sorted(pages()):
        for command in commands_in(code_of_page(path.read_text(encoding="utf8"))):
            yield path.relative_to(CHECKOUT).as_posix(), command


def documented_commands():
    """(where, command) for each command line of a module's docstring or of a page."""
    for path in sorted(sources()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        for command in commands_in(code_of_docstring(docstring)):
            yield path.relative_to(CHECKOUT).as_posix(), command
    yield from commands_of_pages()


def module_and_words(command):
    """The module that a command runs, and its words; brackets, ellipses and placeholders of usage lines removed."""
    given = (word.strip("[]") for word in shlex.split(command, comments=True))
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"\w+=.*", word), given))  # without variables in front
    if words[0] == "pyramidclip":
        module, words = "pyramidclip_command", words[1:]
    else:
        at = words.index("-m")
        module, words = words[at + 1], words[at + 2 :]
    for name, length in PLACEHOLDERS.items():
        if name in words:
            del words[words.index(name) : words.index(name) + length]
    return module, [word.split("|")[0] for word in words if word.strip(".")]


class Answered(BaseException):
    """What a command's parser says of its words; no command catches it."""


def answer_of_parser(module, words, monkeypatch):
    """What the parser of `module` finds wrong with `words`; empty where it takes them. Nothing is run."""
    parse = argparse.ArgumentParser.parse_known_args

    def error(parser, message):
        raise ValueError(message)

    def parse_and_stop(parser, args=None, namespace=None):
        parser.allow_abbrev = False
        options = {option for action in parser._actions for option in action.option_strings}
        if options <= {"-h", "--help", "--config"} and "--config" in options:
            return parse(parser, args, namespace)
        try:
            _, left = parse(parser, args, namespace)
        except ValueError as problem:
            raise Answered(str(problem)) from None
        raise Answered(f"unknown {' '.join(left)}" if left else "")

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(sys, "argv", [module, *words])
        try:
            importlib.import_module(module).main()
        except Answered as answer:
            return str(answer)
    return "did not ask its parser"


def file_of(module):
    path = CHECKOUT / module.replace(".", "/")
    return next((file for file in (path.with_suffix(".py"), path / "__main__.py") if file.is_file()), None)


def fault_of(command, monkeypatch):
    """What is wrong with a command line; empty where nothing is."""
    if len(LAUNCHER.findall(command)) > 1:
        return "two commands in one line"
    module, words = module_and_words(command)
    file = file_of(module)
    if file is None:
        return f"there is no module {module}"
    for flag, value in zip(words, words[1:]):
        if flag == "--config" and value.startswith("training/") and not (CHECKOUT / value).is_file():
            return f"there is no {value}"
    if "--bench" in words or module == "tests.upstream":  # these hand their words to another program
        return ""
    module = module if file.name != "__main__.py" else f"{module}.__main__"
    problem = answer_of_parser(module, words, monkeypatch)
    # `N`, `NAME` and `$VARIABLE` stand for any number or choice.
    while instead := re.search(
        r"expected a (?:whole )?number, got '([A-Z]+|\$\w+)'|invalid choice: '([A-Z]+)'.*?'([^']+)'", problem
    ):
        word, example = (instead[1], "1") if instead[1] else (instead[2], instead[3])
        words = [example if given == word else given for given in words]
        problem = answer_of_parser(module, words, monkeypatch)
    # A command that ends in "..." leaves out what it needs; its flags are still looked at.
    return "" if OPEN_ENDED in command.split()[-1:] and "required" in problem else problem


def test_documented_commands_are_taken(monkeypatch):
    faults, seen = [], 0
    for where, command in documented_commands():
        seen += 1
        fault = fault_of(command, monkeypatch)
        if fault:
            faults.append(f"{where}: {command}\n    {fault}")
    assert seen > 80
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("command", "fault"),
    [
        ("python -m training.scale --config training/configs/demo.yaml --gpus 64", ""),
        ("python -m training.pretrain --config training/configs/demo.yaml [--field value ...]", ""),
        ("python -m training.pretrain ...", ""),
        ("python -m training.scales --gpus 64", "there is no module training.scales"),
        (
            "python -m training.scale --config training/configs/none.yaml --gpus 1",
            "there is no training/configs/none.yaml",
        ),
        ("python -m training.scale --config x.yaml --gpu 64", "the following arguments are required: --gpus"),
        ("python -m training.publish a b --flag python -m training.publish a b", "two commands in one line"),
        ("python -m training.publish RUN REPO_ID --no-such-flag", "unknown --no-such-flag"),
        ("pyramidclip embed --model DIR pictures/ --output pictures.npz", ""),
    ],
)
def test_faults_of_commands_are_seen(command, fault, monkeypatch):
    assert fault_of(command, monkeypatch).startswith(fault)
    assert bool(fault_of(command, monkeypatch)) == bool(fault)


def test_a_wrapped_command_is_one_command():
    text = "Does it.\n\n    python -m training.scale --config x.yaml\n        --gpus 64\n    python -m training.demo\n"
    assert commands_in(code_of_docstring(text)) == [
        "python -m training.scale --config x.yaml --gpus 64",
        "python -m training.demo",
    ]


def reason_not_to_run(module, words):
    return LONG.get(module) or next((LONG_WORDS[held] for held in LONG_WORDS if held in " ".join(words)), None)


RUN = [one for one in commands_of_pages() if not reason_not_to_run(*module_and_words(one[1]))]


def make_shards(folder):
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "00000.tar") as writer:
        for number, name in enumerate(("bat", "fox", "owl", "cow")):
            writer.write(
                Sample(
                    key=name,
                    image=Path("pictures", f"{name}.png").read_bytes(),
                    image_suffix="png",
                    caption=f"a {name} in the snow",
                    summary=f"a {name}",
                    tags=[name],
                    regions=[Region((0.1, 0.2, 0.5, 0.6), 0.9, name, [])],
                    roi=rng.standard_normal((1, FEATURES)).astype(np.float16),
                    extra={"class_name": ("dog", "cat")[number % 2]},
                )
            )
    write_dataset_json(folder, {}, FEATURES, {}, classes=["dog", "cat"])


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """A folder with what the pages take for granted."""
    folder, before = tmp_path_factory.mktemp("docs"), Path.cwd()
    os.chdir(folder)
    save_tiny_model("model")
    shutil.copytree("model", "runs/demo/pyramid/final")
    Path("pictures").mkdir()
    rng = np.random.default_rng(0)
    names = ("bat", "fox", "owl", "cow")
    for name in names:
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), np.uint8)).save(f"pictures/{name}.png")
    shutil.copy("pictures/bat.png", "picture.jpg")
    pairs = [{"image": f"pictures/{name}.png", "caption": f"a {name}, seen in the snow"} for name in names]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    Path("captions.csv").write_text("image,caption\n" + "".join(f'{p["image"]},"{p["caption"]}"\n' for p in pairs))
    chosen = "data/openclipart-chosen"
    for shards in ("shards", "runs/demo/scenes/validation", "data/shards", f"{chosen}/train", f"{chosen}/validation"):
        make_shards(Path(shards))
    for labelled, seed in LABELLED.items():
        write_pictures(labelled, {"blue": 8, "green": 8}, seed)
    write_pictures("runs/demo/scenes/objects", {"blue": 8, "green": 8})
    with pytest.MonkeyPatch.context() as patch:
        os.chdir(before)
        patch.setattr(PyramidCLIPProcessor, "from_pretrained", functools.cache(PyramidCLIPProcessor.from_pretrained))
        yield folder


@pytest.fixture
def place(things, monkeypatch):
    monkeypatch.chdir(things)


def test_every_command_runs_or_has_its_reason():
    found = [module_and_words(command) for _, command in commands_of_pages()]
    assert len(RUN) >= 15
    used = {module for module, _ in found} & LONG.keys()
    assert used == LONG.keys(), "a reason that no command needs"
    for held in LONG_WORDS:
        assert any(held in " ".join(words) for module, words in found if module not in LONG), held
    files = re.findall(r"tests/\S+\.py", " ".join([*LONG.values(), *LONG_WORDS.values()]))
    assert not [file for file in files if not (CHECKOUT / file).is_file()]


# One test for each page, as a line needs what the lines above it made.
@pytest.mark.parametrize("page", list(dict.fromkeys(page for page, _ in RUN)))
def test_commands_run_as_printed(page, place, capsys):
    for made in ("data/mine", "audit", "pictures.npz", "sheet.png", "overlay.png", "page.html"):
        shutil.rmtree(made, ignore_errors=True)
        Path(made).unlink(missing_ok=True)
    for _, command in (one for one in RUN if one[0] == page):
        module, words = module_and_words(command)
        words = [STAND_INS.get(word, word) for word in words]
        code = importlib.import_module(module).main(words)
        said = capsys.readouterr()
        assert code == 0, f"{command}\n{said.err[-1500:]}"
        for flag, made in zip(words, words[1:]):
            assert not flag.startswith("--output") or Path(made).exists(), command


def python_block(page):
    (block,) = re.findall(r"^```python\n(.*?)^```", (CHECKOUT / page).read_text(encoding="utf8"), re.M | re.S)
    return block


# Where each page's Python blocks run.
ELSEWHERE = {
    "MODEL_CARD.md": "tests/pyramidclip_hf/test_hub.py",
    "README.md": "tests/test_readme.py",
    "docs/detection.md": "tests/training/test_detection.py",
    "docs/ecosystem.md": "tests/pyramidclip_hf/test_ecosystem.py",
}
HERE = {"docs/command.md", "docs/engines.md", "docs/explain.md", "docs/transfer.md"}


def test_every_python_block_runs_somewhere():
    with_blocks = {
        page.relative_to(CHECKOUT).as_posix() for page in pages() if "```python" in page.read_text(encoding="utf8")
    }
    assert with_blocks == ELSEWHERE.keys() | HERE
    assert all((CHECKOUT / file).is_file() for file in ELSEWHERE.values())


@pytest.fixture
def names(place):
    """What the blocks take for granted: a model, a picture, two objects of it."""
    loaded = load_model("model")
    features, boxes = np.random.default_rng(0).standard_normal((2, FEATURES)), np.array([[0, 0, 0.5, 0.5]] * 2)
    picture = Image.open("pictures/bat.png")
    return vars(loaded) | {
        "picture": picture,
        "features": features,
        "boxes": boxes,
        "labels": ["bat", "wing"],
    }


def test_the_block_of_explain(names):
    exec(python_block("docs/explain.md"), names)
    assert names["explanation"].heat.shape == (40, 48)
    assert all(Image.open(made).size[0] > 0 for made in ("bat.png", "regions.png"))
    assert len(names["regions"].relevance) == 2


@pytest.mark.slow
def test_the_block_of_command(names):
    """An exported model stands under the name; int8 is what the pictures were calibrated for."""
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    words = ["export", "--model", "model", "--output", "DIR", "--dtype", "int8", "--calibration", "pictures", "--quiet"]
    assert pyramidclip_command.main(words) == 0
    exec(python_block("docs/command.md"), names)
    pixels = names["processor"](images=names["picture"], return_tensors="pt")["pixel_values"]
    assert names["model"].encode_image(pixels).shape == (1, 16)


@pytest.mark.slow
def test_the_block_of_engines(names):
    """The tiny model compiled in bfloat16 beside itself as it was saved."""
    pixels = names["processor"](images=names["picture"], return_tensors="pt")["pixel_values"]
    with torch.no_grad(), torch._inductor.config.patch(freezing=False):
        wanted = names["model"].encode_image(pixels)
        exec(python_block("docs/engines.md").replace("DIR", "model"), names)
        found = names["encode_image"](pixels.bfloat16())
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float(), wanted).item() > 0.999


def test_the_block_of_transfer(place):
    """A classifier of random weights stands for the one that fine-tuning wrote."""
    loaded = load_model("model")
    loaded.model.config.num_labels = 3
    PyramidCLIPForImageClassification(loaded.model.config).save_pretrained("runs/finetune/final")
    loaded.processor.image_processor.save_pretrained("runs/finetune/final")
    names = {}
    exec(python_block("docs/transfer.md").replace('classify("', 'answer = classify("'), names)
    assert sum(one["score"] for one in names["answer"]) == pytest.approx(1, abs=1e-5)


def test_the_script_of_transfer(place):
    """Between the shell's END marks: the trained model's shape with weights of its own."""
    page = (CHECKOUT / "docs" / "transfer.md").read_text(encoding="utf8")
    (script,) = re.findall(r"^python - <<'END'\n(.*?)^END$", page, re.MULTILINE | re.DOTALL)
    exec(script, {})
    trained, new = (load_model(name).model for name in ("runs/demo/pyramid/final", "runs/random"))
    assert trained.config.to_dict()["vision_config"] == new.config.to_dict()["vision_config"]
    assert {name: one.shape for name, one in trained.named_parameters()} == {
        name: one.shape for name, one in new.named_parameters()
    }
