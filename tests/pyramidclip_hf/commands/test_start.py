"""The start of `pyramidclip`: help, wrong words, a closed pipe."""

import argparse
import configparser
import importlib
import os
import resource
import subprocess
import sys

import pytest

import pyramidclip_command
import pyramidclip_hf
from pyramidclip_hf import commands


def test_a_closed_pipe_ends_quietly(model_dir, pictures, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        argv = ["classify", "--model", model_dir, str(pictures / "blue.jpg"), "--labels", "cat", "--quiet"]
        code = pyramidclip_command.main(argv)
        monkeypatch.undo()
    assert code == 141 and capsys.readouterr().err == ""


def test_help_loads_neither_torch_nor_transformers(checkout):
    """Run as the installed command does it: through `pyramidclip_command`."""
    code = (
        "import sys; sys.argv = ['pyramidclip', '--help']; import pyramidclip_command\n"
        "try: pyramidclip_command.main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy', 'PIL', 'pyramidclip_hf') if m in sys.modules])"
    )
    # PYTHONPATH and not the working folder, so that an installed package is tested the same way.
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert shown.returncode == 0 and shown.stdout.endswith("[]\n"), shown.stderr
    assert all(name in shown.stdout for name in ("classify", "embed", "search", "explain", "exit codes"))


def test_the_installed_command_is_this_one(checkout):
    config = configparser.ConfigParser()
    config.read(checkout / "setup.cfg", encoding="utf8")
    name, _, target = config["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "pyramidclip" and config["options"]["py_modules"].split() == [module]
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "COMMAND"),
        (["paint"], "'paint'"),
        (["classify", "x.png", "--model", "m"], "--labels"),
        (["embed", "--batch-size", "0"], "at least 1, got 0"),
        (["search", "x.npz", "--txt", "fox"], "--txt"),
    ],
)
def test_wrong_flags_exit_with_2_in_one_line(argv, message, capsys):
    assert pyramidclip_command.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["embed", "--help"], 0), (["embed", "--paint"], 2)])
def test_help_and_wrong_flags_answer_at_once(argv, code, checkout):
    """Below 0.3 s of processor time, of which Python's own start is a part; one quiet attempt is enough."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ran = subprocess.run([sys.executable, "-m", "pyramidclip_command", *argv], capture_output=True, env=environment)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert ran.returncode == code
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3, seconds


def test_each_subcommand_has_its_work():
    parser = pyramidclip_command.build_parser()
    (subcommands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    assert list(subcommands.choices) == list(commands.COMMANDS)
    assert all(one.description and "130 stopped by Ctrl-C" in one.format_help() for one in subcommands.choices.values())


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        pyramidclip_command.main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"pyramidclip-hf {pyramidclip_hf.__version__}\n"
