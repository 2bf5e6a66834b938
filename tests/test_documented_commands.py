"""Commands as docstrings and pages show them: every module is there, and its own parser takes every word."""

import argparse
import ast
import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
LAUNCHER = re.compile(r"(\w+=\S+ )*(\S*python3? -m (?!pip|venv|pytest)|accelerate launch |torchrun |pyramidclip (?!-))")
# Stand for settings of any name, in usage lines.
PLACEHOLDERS = {"--field": 2}
OPEN_ENDED = "..."


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


def documented_commands():
    """(where, command) for each command line of a module's docstring or of a page."""
    for path in sorted(sources()):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) or ""
        for command in commands_in(code_of_docstring(docstring)):
            yield path.relative_to(CHECKOUT).as_posix(), command
    for path in sorted(pages()):
        for command in commands_in(code_of_page(path.read_text(encoding="utf8"))):
            yield path.relative_to(CHECKOUT).as_posix(), command


def module_and_words(command):
    """The module that a command runs, and its words; brackets, ellipses and placeholders of usage lines removed."""
    words = [word.strip("[]") for word in shlex.split(command, comments=True) if not re.fullmatch(r"\w+=.*", word)]
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
        r"invalid (?:int|float) value: '([A-Z]+|\$\w+)'|invalid choice: '([A-Z]+)'.*?'([^']+)'", problem
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
