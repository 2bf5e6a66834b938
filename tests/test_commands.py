"""Every command: its help, what it says about a wrong flag and about a path that is not there, and its exit codes."""

import argparse
import ast
import errno
import importlib
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from pyramidclip_command import (
    EXIT_CODES,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_SKIPPED,
    EXIT_STOPPED,
    EXIT_UNPUBLISHED,
    EXIT_WRONG_USAGE,
    Failure,
    build_parser,
)

CHECKOUT = Path(__file__).resolve().parent.parent
# What lies directly in these folders and has a `main` is a command.
FOLDERS = ("training", "training/prepare", "training/emoji", "conversion")

# The least words with which each command looks for something that is not there; GONE is a path. None: it reads nothing.
WORDS_WITH_A_MISSING_PATH = {
    "conversion.convert_original_checkpoint": "--checkpoint GONE --output-dir OUT",
    "conversion.convert_torchvision": "--checkpoint GONE --output-dir OUT",
    "conversion.convert_vinvl": "--checkpoint GONE --labelmap GONE --output-dir OUT",
    "conversion.init_from_clip": "--model GONE --output-dir OUT",
    "pyramidclip_command": "embed GONE --model GONE --output OUT.npz",
    "training.ablations": None,
    "training.demo": None,
    "training.detection": "--model RN50 --train-data GONE:trainval --output-dir OUT",
    "training.detection_table": "--recipe GONE --output-dir OUT --models a=RN50",
    "training.emoji.scenes": None,
    "training.evaluate": "--model GONE --data GONE",
    "training.figures": "check --model GONE --data GONE",
    "training.finetune": "--model GONE --train-data GONE --output-dir OUT",
    "training.linear_probe": "--model GONE --train-data GONE --test-data GONE",
    "training.prepare.audit": "GONE",
    "training.prepare.detect": "--input-dir GONE --detector GONE --device cpu",
    "training.prepare.import_features": "--input GONE --merge-into GONE --made-by someone",
    "training.prepare.openclipart": "--source GONE --output-dir OUT",
    "training.prepare.pack": "--input GONE --output-dir OUT",
    "training.prepare.select": "--input GONE --rules GONE --output-dir OUT",
    "training.prepare.summarize": "--input-dir GONE --model first-clause",
    "training.prepare.synonyms": "--wordnet GONE --output OUT.json",
    "training.prepare.view": "GONE --output OUT.html",
    "training.pretrain": "--model GONE --train-data GONE --output-dir OUT --max-steps 1",
    "training.publish": "GONE someone/name",
    "training.static_page": "--model GONE --packages GONE --output-dir OUT",
    "training.scale": "--config GONE --gpus 8",
}


# Commands with subcommands, and one of them.
SUBCOMMANDS = {"pyramidclip_command": ["embed"], "training.figures": ["check"]}
ALL_OF_PYRAMIDCLIP = ("classify", "embed", "search", "explain", "export", "app")
TAKES_A_DEVICE = {"pyramidclip_command", "training.evaluate", "training.figures", "training.linear_probe",
                  "training.prepare.detect", "training.prepare.summarize"}  # fmt: skip


def module_names():
    yield "pyramidclip_command"
    for folder in FOLDERS:
        for path in sorted((CHECKOUT / folder).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf8"))
            if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
                yield f"{folder.replace('/', '.')}.{path.stem}"


COMMANDS = list(module_names())


def main_of(name):
    return importlib.import_module(name).main


def error_line(capsys):
    """What stands on stderr, which is one line that says `error:`."""
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.splitlines()[-1] == errors[0] and "Traceback" not in err, err
    return errors[0]


def test_each_command_has_its_words():
    assert set(COMMANDS) == WORDS_WITH_A_MISSING_PATH.keys()
    (subcommands,) = (one for one in build_parser()._actions if isinstance(one, argparse._SubParsersAction))
    assert set(subcommands.choices) == set(ALL_OF_PYRAMIDCLIP)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_comes_in_the_common_way(name):
    """The source as a whole, as some have subcommands: `main` is nothing but a call of `run_command`."""
    source = importlib.util.find_spec(name).origin
    tree = ast.parse(Path(source).read_text(encoding="utf8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    (called,) = (node for node in main.body if isinstance(node, ast.Return))
    assert ast.unparse(called).startswith("return run_command(")
    assert [argument.arg for argument in main.args.args] == ["argv"] and ast.unparse(main.returns) == "int"
    assert ast.unparse(tree.body[-1]) == "if __name__ == '__main__':\n    sys.exit(main())"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_it_is_and_the_exit_codes(name, capsys):
    with pytest.raises(SystemExit) as left:
        main_of(name)(["--help"])
    assert left.value.code == 0
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    first = (importlib.import_module(name).__doc__ or "").split("\n\n")[0] if name != "pyramidclip_command" else ""
    assert re.sub(r"\s+", " ", first).strip() in shown
    assert all(f" {code} " in shown.partition("exit codes:")[2] for code in (0, 1, 2, 130)), shown[-500:]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_one_style(name, capsys, monkeypatch):
    """Within 100 columns, flags with dashes, each default once, and the name that the documents type."""
    monkeypatch.setenv("COLUMNS", "250")
    others = ALL_OF_PYRAMIDCLIP if name == "pyramidclip_command" else SUBCOMMANDS.get(name, [])
    for subcommand in [[], *([word] for word in others)]:
        with pytest.raises(SystemExit):
            main_of(name)([*subcommand, "--help"])
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= 100
        assert "default: None" not in shown and not re.search(r"(?m)^  (-., )?--[a-z]+_", shown)
        for words in re.split(r"(?m)^  (?=-)", shown)[1:]:
            assert len(re.findall(r"default: ", words.partition("\n\n")[0])) <= 1, words


@pytest.mark.parametrize("name", COMMANDS)
def test_a_wrong_flag_is_one_line(name, capsys):
    assert main_of(name)([*SUBCOMMANDS.get(name, []), "--no-such-flag"]) == 2
    assert "--" in error_line(capsys)


def test_a_port_is_a_number(capsys):
    for given in ("seven", "99999", "-1"):
        assert main_of("pyramidclip_command")(["app", f"--port={given}"]) == 2
        assert f"--port: expected a number from 1 to 65535, got {given}" in error_line(capsys)


@pytest.mark.parametrize("name", [name for name in COMMANDS if WORDS_WITH_A_MISSING_PATH.get(name)])
def test_a_path_that_is_not_there_is_one_line(name, capsys, tmp_path):
    words = (
        WORDS_WITH_A_MISSING_PATH[name].replace("GONE", str(tmp_path / "gone")).replace("OUT", str(tmp_path / "out"))
    )
    assert main_of(name)(words.split()) == 2
    assert str(tmp_path / "gone") in error_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in COMMANDS if WORDS_WITH_A_MISSING_PATH.get(name)])
def test_what_is_missing_is_said_before_the_work(name, tmp_path, monkeypatch):
    """While the words are parsed, so that no model need be imported for it; a launched run says it in its folder."""
    parse, _ = parts_of(name)
    if name == "pyramidclip_command":
        pytest.skip("below, in a process of its own")
    gone = str(tmp_path / "gone")
    words = WORDS_WITH_A_MISSING_PATH[name].replace("GONE", gone).replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(FileNotFoundError, match=f"{gone}: there is no such file or folder"):
        getattr(importlib.import_module(name), parse)(words)
    monkeypatch.setenv("RANK", "0")
    getattr(importlib.import_module(name), parse)(words)


@pytest.mark.parametrize(
    "words",
    [
        "classify GONE --model MODEL --labels a",
        "classify --model GONE THERE --labels a",
        "classify --model MODEL THERE --labels-file GONE",
        "classify --model MODEL THERE --labels a --templates GONE",
        "embed --model MODEL THERE GONE --output OUT.npz",
        "embed --model MODEL --texts GONE --output OUT.npz",
        "search GONE --text a",
        "search THERE --image GONE",
        "explain GONE --model MODEL --text a --output OUT.png",
        "export --model MODEL --pairs GONE",
        "app --model GONE",
        "app --model MODEL --compare GONE",
        "app --model MODEL --embeddings GONE",
        "app --model MODEL --examples GONE",
        "app --model MODEL --labels-file GONE",
    ],
)
def test_what_is_missing_is_said_without_torch(words, tmp_path, monkeypatch, capsys):
    """What begins to import the models fails here, and not on a path that is there or could be."""
    (tmp_path / "there").touch()
    monkeypatch.setitem(sys.modules, "pyramidclip_hf.commands", None)
    gone, there = str(tmp_path / "gone"), str(tmp_path / "there")
    words = words.replace("GONE", gone).replace("THERE", there).replace("OUT", str(tmp_path / "out"))
    assert main_of("pyramidclip_command")(words.replace("MODEL", "owner/name").split()) == 2
    assert f"{gone}: there is no such file or folder" in error_line(capsys)
    words = words.replace(gone, there).replace("MODEL", str(tmp_path))
    assert main_of("pyramidclip_command")(words.split()) == 2
    assert "pyramidclip_hf.commands" in error_line(capsys)


# Commands that import torch before they answer a mistake in their words, and why: none.
NEEDS_TORCH_TO_ANSWER: dict[str, str] = {}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_answered_without_torch(name):
    """As it is typed; `--help` stands behind the same imports. transformers without torch takes half a second."""
    command = [sys.executable, "-X", "importtime", "-m", name, *SUBCOMMANDS.get(name, []), "--no-such-flag"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 2 and "error: " in done.stderr.splitlines()[-1], done.stderr[-500:]
    assert "pyramidclip_command" in imported or name == "pyramidclip_command"
    assert bool({"torch", "transformers.modeling_utils"} & imported) == (name in NEEDS_TORCH_TO_ANSWER)


def parts_of(name):
    """The names in a command's module of what parses its words and of what does its work."""
    tree = ast.parse(Path(importlib.util.find_spec(name).origin).read_text(encoding="utf8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    parse, run = next(node for node in main.body if isinstance(node, ast.Return)).value.args[:2]
    if isinstance(run, ast.Lambda):  # exit_code(run(args), args)
        run = run.body.args[0].func
    return ast.unparse(parse), ast.unparse(run)


ENDS = [
    (Failure("a part failed"), EXIT_FAILED),
    (OSError(errno.ENOSPC, "No space left on device", "out"), EXIT_FAILED),
    (OSError(errno.EIO, "Input/output error", "out"), EXIT_FAILED),
    (MemoryError("too large"), EXIT_FAILED),
    (torch.OutOfMemoryError("too large"), EXIT_FAILED),
    (ValueError("a wrong setting"), EXIT_WRONG_USAGE),
    (ImportError("install an extra"), EXIT_WRONG_USAGE),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "gone"), EXIT_WRONG_USAGE),
    (IsADirectoryError(errno.EISDIR, "Is a directory", "folder"), EXIT_WRONG_USAGE),
    (KeyboardInterrupt(), EXIT_INTERRUPTED),
]


@pytest.mark.parametrize("name", COMMANDS)
def test_each_exit_code_means_the_same(name, capsys, monkeypatch):
    """What ends the work of a command, which is what its `main` hands over, ends with the code that docs name."""
    parse, run = parts_of(name)
    module = importlib.import_module(name)

    def let_parse(parsing):
        made = parsing if parse.isidentifier() else lambda: Mock(parse_args=parsing)  # build_parser().parse_args
        monkeypatch.setattr(module, parse.partition("(")[0], made)

    let_parse(lambda words: Namespace(command="embed"))
    for error, code in ENDS:
        monkeypatch.setattr(module, run, Mock(side_effect=error))
        assert main_of(name)([]) == code, error
        said = capsys.readouterr().err
        assert "Traceback" not in said and len(said.strip().splitlines()) <= 2, said
        assert said.startswith("\nstopped." if code == EXIT_INTERRUPTED else "error: "), said
    monkeypatch.setattr(module, run, Mock(side_effect=AttributeError("a fault of the program")))
    with pytest.raises(AttributeError):
        main_of(name)([])
    for error, code in [(KeyboardInterrupt(), EXIT_INTERRUPTED), (ValueError("--x"), EXIT_WRONG_USAGE)]:
        let_parse(Mock(side_effect=error))
        assert main_of(name)([]) == code


# What comes beside 0, 1, 2 and 130, which all have.
FURTHER = {
    "pyramidclip_command": {EXIT_SKIPPED},
    "training.detection": {EXIT_STOPPED},
    "training.detection_table": {EXIT_STOPPED},
    "training.finetune": {EXIT_STOPPED},
    "training.pretrain": {EXIT_UNPUBLISHED, EXIT_STOPPED},
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_codes_that_a_command_has(name, capsys):
    with pytest.raises(SystemExit):
        main_of(name)(["--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out).partition("exit codes:")[2]
    named = {code for code, meaning in EXIT_CODES.items() if f" {code} {meaning}" in shown}
    assert named == {0, EXIT_FAILED, EXIT_WRONG_USAGE, EXIT_INTERRUPTED} | FURTHER.get(name, set())


def test_the_page_has_every_code():
    page = (CHECKOUT / "docs" / "training.md").read_text(encoding="utf8")
    table = page.partition("### Exit codes")[2].partition("\n#")[0]
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)}
    assert listed >= EXIT_CODES.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_version(name, capsys):
    with pytest.raises(SystemExit) as left:
        main_of(name)(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out.startswith("pyramidclip-hf ")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_choice_of_device_is_auto_unless_said(name, capsys):
    with pytest.raises(SystemExit):
        main_of(name)([*SUBCOMMANDS.get(name, []), "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    for described in re.findall(r" --device [A-Z]+ ([a-z].{60})", shown):
        assert "auto" in described
    assert name not in TAKES_A_DEVICE or " --device " in shown
