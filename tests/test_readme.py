"""The README against the checkout: length, tree, loss table, commands, example; and the table of docs/speed.md."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.chart import markdown_table
from tests.bench.engines import PAGE, RESULT, engines_table

CHECKOUT = Path(__file__).resolve().parent.parent
README = (CHECKOUT / "README.md").read_text(encoding="utf8")


def section(title):
    """The text between the heading `title` and the next heading of the same level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def tree_entries(text):
    """{path: description} of an indented file tree; folders end with a slash, and two spaces indent."""
    entries, folders = {}, []
    for line in text.splitlines():
        indent, name, description = re.fullmatch(r"( *)(\S+) +(\S.*)", line).groups()
        folders = folders[: len(indent) // 2]
        entries["".join([*folders, name])] = description
        if name.endswith("/"):
            folders.append(name)
    return entries


def tracked_files():
    shown = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if shown.returncode:
        pytest.skip("needs a git checkout")
    return shown.stdout.splitlines()


def folders_to_be_listed(tracked):
    """The folders down to the rooms; the tests mirror the rooms, and only what mirrors none is listed."""
    folders = {tuple(name.split("/")[:-1][:2]) for name in tracked if not name.startswith(".")} - {()}
    for folder in folders:
        mirrors_a_room = folder[0] == "tests" and (CHECKOUT / "/".join(folder[1:])).is_dir()
        if folder[0] != "tests" or len(folder) == 1 or not mirrors_a_room:
            yield "/".join(folder) + "/"


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140


def test_the_speed_table_is_the_committed_result():
    result = json.loads((CHECKOUT / "tests/bench/results/bench.json").read_text(encoding="utf8"))
    page = (CHECKOUT / "docs/speed.md").read_text(encoding="utf8")
    table = re.search(r"(^\|.*\n)+", page, re.MULTILINE)[0]
    assert table == markdown_table(result)
    ratios = re.findall(r"\d+\.\d\d x", README)
    assert ratios
    assert set(ratios) <= set(re.findall(r"\d+\.\d\d x", table))


def test_the_table_of_engines_is_the_committed_result():
    table = re.search(r"(^\|.*\n)+", PAGE.read_text(encoding="utf8"), re.MULTILINE)[0]
    assert table == engines_table(json.loads(RESULT.read_text(encoding="utf8")))


def test_every_path_of_the_tree_exists():
    entries = tree_entries(blocks(section("Where each thing is, and what to read"), "text")[0])
    assert len(entries) > 15
    wrong = [name for name in entries if not (CHECKOUT / name).exists()]
    wrong += [name for name in entries if name.endswith("/") != (CHECKOUT / name).is_dir() and name not in wrong]
    assert not wrong


def test_every_room_is_in_the_tree():
    entries = tree_entries(blocks(section("Where each thing is, and what to read"), "text")[0])
    missing = sorted(set(folders_to_be_listed(tracked_files())) - entries.keys())
    assert not missing, f"add to the README's tree, one line each: {missing}"


def test_the_tree_reader_sees_nesting():
    text = "a/          folder a\n  b/        folder b\n    c.py    file c\n  d.py      file d\ne.md        file e\n"
    assert list(tree_entries(text)) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e.md"]


def test_links_lead_to_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)]+)\)", README)
    assert targets
    assert not [target for target in targets if not (CHECKOUT / target.split("#")[0]).exists()]


def test_loss_table_is_the_code():
    from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS, TERMS

    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", section("The objective"), re.MULTILINE)
    assert [name for name, _ in rows] == list(TERMS)
    for name, rest in rows:
        inputs, weight, _ = (cell.strip() for cell in rest.split("|"))
        levels = [LEVELS[level] for level in TERMS[name]]
        wanted = {name for level in levels for name in (level.input, level.mask) if name}
        assert set(re.findall(r"`(\w+)`", inputs)) == wanted
        assert weight == ("1/6" if name in DEFAULT_LOSS_WEIGHTS else "0")
    assert set(DEFAULT_LOSS_WEIGHTS.values()) == {1 / 6}


def make_targets():
    makefile = (CHECKOUT / "Makefile").read_text(encoding="utf8")
    return set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))


def test_commands_exist():
    """Every `make` target, `-m` module and YAML file in the shell blocks is there, and every `--flag` a setting."""
    from training.settings.pretraining import PretrainingArguments

    settings = {field.name for field in dataclasses.fields(PretrainingArguments)} | {"config"}
    commands = "\n".join(blocks(README, "bash")).replace("\\\n", " ").splitlines()
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        for previous, word in zip(words, words[1:]):
            if previous == "make":
                assert word in make_targets(), command
            if previous == "-m" and word.split(".")[0] in {"training", "conversion"}:
                assert (CHECKOUT / (word.replace(".", "/") + ".py")).exists(), command
            if previous == "--config":
                assert (CHECKOUT / word).exists(), command
        if "training.pretrain" in words:
            flags = {
                word[2:].replace("-", "_") for word in words[words.index("training.pretrain") :] if word[:2] == "--"
            }
            assert flags <= settings, command


def test_the_example_prints_probabilities(tmp_path):
    """The README's Python block, run as printed but for the folder, which holds a tiny random model."""
    from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor

    code = blocks(section("Use a model"), "python")[0]
    folder = re.search(r'"(runs/demo/[^"]+)"', code)[1]
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = PyramidCLIPConfig(
        text_config=dict(tiny),
        vision_config={**tiny, "tower": "vit", "image_size": 224, "patch_size": 32, "num_leff_layers": 1},
        projection_dim=16,
    )
    PyramidCLIPModel(config).save_pretrained(tmp_path)
    PyramidCLIPProcessor().save_pretrained(tmp_path)
    shown = subprocess.run(
        [sys.executable, "-c", code.replace(folder, str(tmp_path))],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert shown.returncode == 0, shown.stderr
    printed = [line.split(maxsplit=1) for line in shown.stdout.splitlines()]
    assert len(printed) >= 3
    assert sum(float(probability) for probability, _ in printed) == pytest.approx(1, abs=0.005)
    assert all(label in code for _, label in printed)
