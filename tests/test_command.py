"""The way in and out that all commands share: what becomes one line and which exit code."""

import argparse
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import pyramidclip_command
from pyramidclip_command import CommandParser, Failure, run_command
from pyramidclip_hf.files import write_text


class OwnFailure(Failure):
    pass


def words(argv):
    return list(argv)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("expected a,\ngot b"), 2, "error: expected a, got b"),
        (ValueError("It differs:\n  a: 1, not 2\n\n  b: 3, not 4\n"), 2, "error: It differs: a: 1, not 2; b: 3, not 4"),
        (ImportError("pip install x"), 2, "error: pip install x"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: x: No such file"),
        (FileExistsError("x holds a model"), 2, "error: x holds a model"),
        (NotADirectoryError("x is a file"), 2, "error: x is a file"),
        (IsADirectoryError("x is a folder"), 2, "error: x is a folder"),
        (PermissionError("x"), 2, "error: x"),
        (OwnFailure("the loss is not finite"), 1, "error: the loss is not finite"),
        (OSError(28, "No space left"), 1, "error: No space left. The disk is full. Go on."),
        (ConnectionError("reset"), 1, "error: reset. Go on."),
        (MemoryError(), 1, "error: MemoryError. Go on."),
        (torch.OutOfMemoryError("no more"), 1, "error: no more. Go on."),
        (KeyboardInterrupt(), 130, "stopped. Go on."),
    ],
)
def test_what_is_expected_to_go_wrong_is_one_line(error, code, line, capsys):
    def run(settings):
        raise error

    assert run_command(words, run, [], advice=lambda settings: "Go on.") == code
    assert capsys.readouterr() == ("", f"{line}\n" if code != 130 else f"\n{line}\n")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--labels-file gone.txt", "--labels-file gone.txt: No such file or directory"),
        ("--labels_file=gone.txt", "--labels-file gone.txt: No such file or directory"),
        ("--labels-file gone/labels.txt", "--labels-file gone/labels.txt: there is no folder gone"),
        ("--labels-file file/labels.txt", "--labels-file file/labels.txt: file is a file, expected a folder"),
        ("--labels-file file/deep/labels.txt", "--labels-file file/deep/labels.txt: file is a file, expected a folder"),
        ("--labels-file folder", "--labels-file folder: Is a directory"),
        ("--labels-file fold/x", "--labels-file fold/x: there is no folder fold"),
        ("gone.txt", "gone.txt: No such file or directory"),
        ("gone.txt --input-dir folder", "gone.txt: No such file or directory"),
        ("folder/x --input-dir folder", "--input-dir folder: folder/x: No such file or directory"),
        ("folder/x --input-dir other folder", "--input-dir folder: folder/x: No such file or directory"),
    ],
)
def test_what_the_system_says_of_a_path_names_the_flag(argv, line, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    parser = CommandParser(prog="name")
    parser.add_argument("--labels-file", "--labels_file")
    parser.add_argument("--input-dir", nargs="+", default=[])
    parser.add_argument("picture", nargs="?")

    assert (
        run_command(parser.parse_args, lambda settings: open(settings.labels_file or settings.picture), argv.split())
        == 2
    )
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("place", ["file/out.json", "gone/out.json", "folder"])
def test_a_file_that_cannot_be_written_is_called_by_its_own_name(place, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    argv = ["--output", place]
    assert run_command(lambda words: argparse.Namespace(output=words[1]), write, argv) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: --output {place}: ") and "partial" not in line and "Errno" not in line


def test_a_file_in_the_place_of_a_folder_is_said(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    made = run_command(
        lambda words: argparse.Namespace(output_dir=words[1]),
        lambda settings: os.makedirs(settings.output_dir, exist_ok=True),
        ["--output-dir", "file"],
    )
    assert made == 2 and capsys.readouterr().err == "error: --output-dir file: there is a file already\n"


def test_a_folder_that_cannot_be_made_is_said_of_what_was_to_lie_in_it(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    def run(settings):
        Path(settings.output).parent.mkdir(exist_ok=True)

    words = ["--output", "file/out.json"]
    assert run_command(lambda words: argparse.Namespace(output=words[1]), run, words) == 2
    assert capsys.readouterr().err == "error: --output file/out.json: file is a file, expected a folder\n"


def write(settings):
    write_text(settings.output, "text")


@dataclass
class Sizes:
    global_batch_size: int = 8
    per_device_chunk_size: int | None = None


@dataclass
class Parts:
    first: int
    work: Sizes


@pytest.mark.parametrize("settings", [Sizes(), Parts(1, Sizes())])
def test_the_memory_too_small_names_a_flag_that_the_command_has(settings, capsys):
    def run(settings):
        raise MemoryError("no more")

    assert run_command(lambda words: settings, run, []) == 1
    assert capsys.readouterr().err == "error: no more. Lower --per-device-chunk-size.\n"
    assert run_command(words, run, []) == 1
    assert capsys.readouterr().err == "error: no more.\n"


def test_of_several_processes_the_first_speaks_for_the_command_and_the_launcher_learns_the_reason(
    capsys, monkeypatch, tmp_path, request
):
    """The file is read as torchrun reads it."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    def run(settings):
        raise ValueError("expected a")

    before = signal.getsignal(signal.SIGTERM)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    for rank, line in (("0", "error: expected a\n"), ("3", "process 3: error: expected a\n")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank))
        assert run_command(words, run, []) == 2
        assert capsys.readouterr().err == line
    # It sends SIGTERM to the others; a process that has told its end goes with its own exit code.
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "0"))
    assert "error: expected a" in str(ChildFailedError("pretrain", {0: failure})).partition("Root Cause")[2]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_faults_of_the_program_go_through(error):
    def run(settings):
        raise error

    with pytest.raises(type(error)):
        run_command(words, run, [])


def test_what_run_returns_is_the_exit_code(monkeypatch):
    assert run_command(words, lambda settings: None, []) == 0
    assert run_command(words, lambda settings: 75, []) == 75
    monkeypatch.setattr(sys, "argv", ["name", "a", "b"])
    assert run_command(words, len) == 2


def test_words_that_do_not_parse_exit_with_2(capsys):
    def parse(argv):
        raise FileNotFoundError("no recipe x.yaml")

    assert run_command(parse, words, []) == 2
    assert capsys.readouterr().err == "error: no recipe x.yaml\n"


def test_a_pipe_that_nobody_reads_ends_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        code = run_command(words, lambda settings: print("x" * 10), [])
        monkeypatch.undo()
    assert code == 141 and capsys.readouterr().err == ""


def test_the_parser_shows_docstring_and_exit_codes(capsys):
    parser = CommandParser(description="What it does.\n\n    how to call it\n", epilog="More words.", exit_codes=[75])
    parser.add_argument("--number", type=int)
    with pytest.raises(SystemExit) as left:
        run_command(parser.parse_args, words, ["--help"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "What it does.\n\n    how to call it\n" in shown
    folded = " ".join(shown.partition("exit codes: ")[2].split())
    assert [part.split()[0] for part in folded.split("; ")] == ["0", "1", "2", "75", "130"]
    for argv in (["--numbr", "2"], ["--numb", "2"], ["--number", "x"], ["--number"]):
        assert run_command(parser.parse_args, words, argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and "--help" in err


def test_the_help_is_folded_and_names_each_default_once(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    command = f"    python -m it {'--flag value ' * 12}"
    parser = CommandParser(description=f"{'Long words. ' * 20}\n\n{command}\n\n- one\n- {'two ' * 40}\n", prog="it")
    parser.add_argument("--number", type=int, default=3, help="how many")
    parser.add_argument("--other", default="x", help="default: that of the model")
    parser.add_argument("--absent", help="a file")
    parser.add_argument("--switch", action="store_true", help="do it")
    shown = parser.format_help()
    assert max(map(len, shown.splitlines())) <= 100
    assert " ".join(command.split()) in " ".join(shown.replace("\\\n", " ").split()), "no longer what one can type"
    assert shown.count("default: ") == 2 and "how many (default: 3)" in shown
    assert "\n- one\n- two two" in shown and "\n  two two" in shown


def test_subcommands_have_the_same_parser(capsys):
    parser = CommandParser(prog="tool", description="A tool.")
    paint = parser.add_subparsers(required=True, metavar="COMMAND").add_parser("paint", description="Paints.")
    paint.add_argument("--colour", choices=["red", "blue"])
    for argv, expected in (
        ([], "COMMAND"),
        (["draw"], "paint"),
        (["--colour", "red", "paint"], "--colour comes before the subcommand, flags come behind it: tool paint --c"),
        (["--colour=red"], "--colour comes before the subcommand, flags come behind it: tool COMMAND --colour ..."),
        (["paint", "--colour", "pink"], "tool paint --help"),
        (["paint", "--color", "red"], "--color red"),
    ):
        assert run_command(parser.parse_args, words, argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert (
        run_command(parser.parse_args, lambda settings: settings.colour == "red" and 7, ["paint", "--colour=red"]) == 7
    )
    assert isinstance(parser, argparse.ArgumentParser)


def test_a_flag_that_is_misspelt_is_named_where_another_is_missing(capsys):
    parser = CommandParser(prog="tool", description="A tool.")
    parser.add_argument("--model-folder", required=True)
    parser.add_argument("--data", required=True)
    for argv, expected in ((["--modell=x", "--data", "y"], "; --modell=x is none of the flags"), (["--data", "y"], "")):
        assert run_command(parser.parse_args, words, argv) == 2
        told = capsys.readouterr().err.strip()
        assert "are required: --model-folder" in told and told.endswith(expected or "says what is expected)")


def test_the_way_in_needs_the_standard_library_alone(checkout):
    code = "import sys; before = set(sys.modules); import pyramidclip_command; print(*(set(sys.modules) - before))"
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    tops = {name.split(".")[0] for name in shown.stdout.split()}
    assert tops - sys.stdlib_module_names == {"pyramidclip_command"}
    assert pyramidclip_command.EXIT_SKIPPED == 3 and pyramidclip_command.EXIT_STOPPED == 75


@pytest.mark.parametrize("word", ["many", "1e3", "-1", "", "0", "²"])
def test_a_number_that_is_none_is_told_in_words(word, capsys):
    argv = ["classify", "x.png", "--model", "m", "--labels", "a", "--top-k", word]
    assert pyramidclip_command.main(argv) == 2
    assert f"--top-k: expected a whole number of at least 1, got {word} " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["training/pretrain.py", "training/prepare/pack.py", "conversion/convert_vinvl.py"])
def test_a_command_started_by_its_path_says_how_it_is_started(name, tmp_path, checkout):
    """With this module found, as where the package is installed, and the checkout not."""
    shutil.copy(checkout / "pyramidclip_command.py", tmp_path)
    words = [sys.executable, str(checkout / name), "--help"]
    started = subprocess.run(
        words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    module = name.removesuffix(".py").replace("/", ".")
    assert (started.returncode, started.stdout) == (2, "")
    assert started.stderr == (
        f"error: {checkout / name}: a command of the checkout is started in {checkout} as python -m {module}, or "
        f"accelerate launch -m {module}\n"
    )


def test_a_command_started_by_its_path_runs_where_the_checkout_is_found(tmp_path, checkout):
    words = [sys.executable, str(checkout / "training" / "pretrain.py"), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    found = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("usage: ")
