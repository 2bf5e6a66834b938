# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""How every command comes in and goes out, and the start of `pyramidclip`; nothing but the standard library.

A command is a module with `parse(words)`, which gives settings, `run(settings)`, which works and may give an exit code,
and

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(parse, run, argv)

Results go to stdout; an error is one line on stderr. Where the work needs torch, whose import takes seconds, `parse`
stands above the imports that bring it, and between them

    if __name__ == "__main__":
        answer_words(parse)
"""

import argparse
import contextlib
import errno
import importlib
import io
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

EXIT_FAILED = 1
EXIT_WRONG_USAGE = 2
EXIT_SKIPPED = 3
EXIT_UNPUBLISHED = 4
# EX_TEMPFAIL of sysexits.h: run it again.
EXIT_STOPPED = 75
# As a shell reports programs that SIGINT and SIGPIPE ended.
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

EXIT_CODES = {
    0: "all done",
    EXIT_FAILED: "something failed on the way",
    EXIT_WRONG_USAGE: "wrong usage, nothing was done",
    EXIT_SKIPPED: "done, but some were skipped, each named on stderr with the reason",
    EXIT_UNPUBLISHED: "done and saved, but the Hub did not take it",
    EXIT_STOPPED: "stopped in good order, can be continued",
    EXIT_INTERRUPTED: "stopped by Ctrl-C",
}
WRONG_USAGE = (
    ValueError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

HELP_WIDTH = 100
_NO_DEFAULTS: tuple[Any, ...] = (None, "", [], argparse.SUPPRESS)

# What takes less memory when it is lower, in the order of choice.
_SIZES = ("per_device_chunk_size", "global_batch_size", "batch_size")

Settings = TypeVar("Settings")


class Failure(RuntimeError):
    """An error whose message is the whole story: the command says it in one line and ends with its exit code, 1."""

    exit_code = EXIT_FAILED


def _help_width() -> int:
    return min(HELP_WIDTH, shutil.get_terminal_size().columns)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The help of every command: at most 100 columns, each default once, where it is a value."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=_help_width())

    def add_usage(self, usage: str | None, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """What must be given, and that there are flags: what they are stands below."""
        flags = argparse.Action(["--flag"], "flag", metavar="value ...")
        needed = [action for action in actions if action.required or not action.option_strings]
        # Without a prefix it is the beginning of what subcommands are called.
        super().add_usage(usage, needed if prefix == "" else [flags, *needed], [], prefix)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        is_value = action.option_strings and action.default is not False and action.default not in _NO_DEFAULTS
        return f"{text} (default: %(default)s)" if is_value and "default" not in text.lower() else text


def folded(text: str) -> str:
    """A docstring within the width of the help: paragraphs and items are filled, long commands continued."""
    lines: list[str] = []
    for line in text.strip().splitlines():
        new = not line.strip() or line.startswith((" ", "- ")) or not lines or lines[-1][:1] in ("", " ")
        if new or not lines[-1].strip():
            lines.append(line)
        else:
            lines[-1] += f" {line.strip()}"
    return "\n".join(map(_folded_line, lines))


def _folded_line(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()))
    is_command = len(indent) >= 4
    further = indent + ("    " if is_command else "  " if line.lstrip().startswith("- ") else "")
    width = _help_width() - (2 if is_command else 0)
    pieces = textwrap.wrap(
        line.strip(),
        width,
        initial_indent=indent,
        subsequent_indent=further,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return (" \\\n" if is_command else "\n").join(pieces)


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, but a wrong word raises ValueError, flags are not abbreviated, the help names the exit codes.

    Args:
        *args: as `argparse.ArgumentParser` takes them, or a parser that stands behind this one in the order of bases.
        exit_codes: those beside 0, 1, 2 and 130 that the command may end with.
        **kwargs: `description` is a docstring, see `folded`.
    """

    def __init__(self, *args: Any, exit_codes: Sequence[int] = (), **kwargs: Any):
        codes = sorted({0, EXIT_FAILED, EXIT_WRONG_USAGE, EXIT_INTERRUPTED, *exit_codes})
        listed = "exit codes: " + "; ".join(f"{code} {EXIT_CODES[code]}" for code in codes)
        own = f"{kwargs.pop('epilog', None) or ''}\n\n{folded(listed)}\n".lstrip("\n")
        kwargs["description"] = folded(kwargs.get("description") or "")
        kwargs = {"formatter_class": HelpFormatter, "prog": _program(), **kwargs}
        super().__init__(*args, **{**kwargs, "epilog": own, "allow_abbrev": False})
        self.add_argument("--version", action=_Version, nargs=0, help="print the version and leave")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in the base class; where there are subcommands, a flag in front of one is told its place."""
        words = list(sys.argv[1:] if args is None else args)
        first = words[0].partition("=")[0] if words else ""
        if self._subparsers is not None and first.startswith("-") and first not in self._option_string_actions:
            names = next(action for action in self._subparsers._group_actions if action.choices).choices or ()
            command = next((word for word in words if word in names), "COMMAND")
            self.error(f"{first} comes before the subcommand, flags come behind it: {self.prog} {command} {first} ...")
        try:
            return super().parse_known_args(words, namespace)
        except ValueError as error:
            unknown = [word for word in words if word[:2] == "--" and self._is_unknown(word)]
            if self._subparsers is None and unknown and "are required" in str(error):  # perhaps misspelt
                raise ValueError(f"{error}; {unknown[0]} is none of the flags") from None
            raise

    def _is_unknown(self, word: str) -> bool:
        flag = word.partition("=")[0].replace("-", "_")
        return flag != "__" and flag not in {known.replace("-", "_") for known in self._option_string_actions}

    def error(self, message: str) -> NoReturn:
        """Raises ValueError: argparse found `message` wrong with the words."""
        raise ValueError(f"{plainly(message)} ({self.prog} --help says what is expected)")


def plainly(message: str) -> str:
    """Argparse's message about a value that is no number, in words."""
    message = re.sub(r"invalid int value: ", "expected a whole number, got ", message)
    return re.sub(r"invalid float value: ", "expected a number, got ", message)


class _Version(argparse.Action):
    """Prints the version of the installed distribution, which is looked up only then."""

    def __call__(self, parser: argparse.ArgumentParser, *parsed: Any) -> None:
        from importlib.metadata import version  # a third of the time that --help takes

        print(f"pyramidclip-hf {version('pyramidclip-hf')}")
        parser.exit()


def _program() -> str | None:
    """How the running command was called: `python -m training.evaluate`; None: by its file, which argparse shows."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else None


def looks_like_a_folder(model: str) -> bool:
    """Whether a name can only be a folder's: an id of the Hub has one slash at most, and begins otherwise."""
    return model.startswith((".", "/", "~")) or model.count("/") > 1


def check_there(flag: str, named: Any, expected: str = "", kind: str = "path") -> None:
    """Looks whether what a flag names is there, before torch is imported, which takes seconds.

    Of several processes each leaves it to the run, whose RUN/stopped.json says why it ended; so does what this cannot
    know: globs, ranges, URLs, ids of the Hub.

    Args:
        flag: for the message.
        named: a path or a list of them; None: nothing.
        expected: what belongs there, for the message.
        kind: "path"; "data": or a glob, a range, a URL; "id": or an id of the Hub, or the name of an architecture.

    Raises:
        FileNotFoundError: it is not there.
    """
    if "RANK" in os.environ:
        return
    for one in named if isinstance(named, (list, tuple)) else [named]:
        name = "" if one is None else os.fspath(one)
        if not name or (kind == "id" and not looks_like_a_folder(name)):
            continue
        if kind != "path" and ("://" in name or any(mark in name for mark in "*?[{")):
            continue
        if _is_missing(name):
            told = f". Expected: {expected}" if expected else ""
            raise FileNotFoundError(f"{flag} {name}: there is no such file or folder{told}".lstrip())


def _is_missing(path: str) -> bool:
    """Whether there is nothing; what may not be looked at is left to whoever reads it."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except (OSError, ValueError):
        pass
    return False


# Whether this process is a command that has not come to its work yet.
_reads_words = False


def expect_words() -> None:
    """Says that this process reads a command's words first, where `python -m PACKAGE.NAME` imports the package now."""
    global _reads_words
    _reads_words = sys.argv[0] == "-m"  # which stands there until the module is found


def reads_words() -> bool:
    """Whether a command still reads its words, see `answer_words`; `import pyramidclip_hf` is cheap as long."""
    return _reads_words


def answer_words(parse: Callable[[Sequence[str]], object]) -> None:
    """Answers help and mistakes of the running command and ends it; returns where there is work to do.

    Args:
        parse: see `run_command`, which calls it once more.
    """
    global _reads_words
    code = run_command(parse, lambda settings: None)
    if code:
        sys.exit(code)
    _reads_words = False
    if "pyramidclip_hf" in sys.modules:
        importlib.import_module("pyramidclip_hf.auto_classes")


def run_command(
    parse: Callable[[Sequence[str]], Settings],
    run: Callable[[Settings], int | None],
    argv: Sequence[str] | None = None,
    *,
    advice: Callable[[Settings], str] = lambda settings: "",
) -> int:
    """Runs a command and returns its exit code; what is expected to go wrong becomes one line on stderr.

    Args:
        parse: makes settings of the command's words; `--help` leaves by SystemExit.
        run: does the work; returns an exit code, or None for 0.
        argv: the words; None: those of the process.
        advice: a sentence for those who stopped the command or whose disk or memory was full: how to go on.

    Returns:
        2 after ValueError, ImportError and errors about what a path names; that of a `Failure`, which is 1 unless it
        says more; 1 after other errors of the system and a lack of memory; 130 after Ctrl-C; 141 where nobody reads
        stdout any more; else what `run` returned.
        Any other error is a fault of the program and goes through.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name of a file that is not UTF-8 must not end a command when it is told; stderr is like this already.
        sys.stdout.reconfigure(errors="backslashreplace")
    words = sys.argv[1:] if argv is None else argv
    try:
        settings = parse(words)
    except KeyboardInterrupt:
        return _say("\nstopped.", "", EXIT_INTERRUPTED)
    except (*WRONG_USAGE, Failure) as error:
        return _say(f"error: {_line(error)}", "", EXIT_WRONG_USAGE)
    try:
        code = run(settings)
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        # Python would flush once more on its way out, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _say("\nstopped.", advice(settings), EXIT_INTERRUPTED)
    except WRONG_USAGE as error:
        return _say(f"error: {_line(error, settings, words)}", "", EXIT_WRONG_USAGE)
    except Failure as error:
        return _say(f"error: {_line(error, settings, words)}", "", error.exit_code)
    except OSError as error:
        full = " The disk is full." if error.errno == errno.ENOSPC else ""
        return _say(f"error: {_line(error, settings, words)}.{full}", advice(settings), EXIT_FAILED)
    except (RuntimeError, MemoryError) as error:
        # torch's error is known by its name, so that it need not be imported.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _say(f"error: {_line(error, settings, words)}.{_smaller(settings)}", advice(settings), EXIT_FAILED)


def _line(error: BaseException, settings: Any = None, words: Sequence[str] = ()) -> str:
    """The message without line breaks, or the error's kind where it has none."""
    told = str(error)
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        told = _about_a_path(error, settings, words)
    text = ""
    for part in filter(None, map(str.strip, told.splitlines())):
        between = "" if not text else " " if text[-1] in ".:;," else "; "
        text += between + part
    return text or type(error).__name__


def _about_a_path(error: OSError, settings: Any, words: Sequence[str]) -> str:
    """What the system says of a path, behind the flag that named it; a folder on the way that is none is named."""
    if not isinstance(error.filename, (str, bytes)):
        return error.strerror or ""
    path = _without_marks(os.fsdecode(error.filename))
    flag, given = _named_by(path, settings, words)
    said = "there is a file already" if error.errno == errno.EEXIST and os.path.isfile(path) else error.strerror
    what = said if given == path else f"{path}: {said}"
    is_below = given.startswith(os.path.join(path, ""))  # the folder of what is written could not be made
    folder = path if is_below else os.path.dirname(path)
    while error.errno == errno.ENOTDIR and folder and not os.path.lexists(folder):
        folder = os.path.dirname(folder)
    if folder and not os.path.isdir(folder):
        what = f"{folder} is a file, expected a folder" if os.path.exists(folder) else f"there is no folder {folder}"
    return f"{flag} {given}: {what}".lstrip()


def _without_marks(path: str) -> str:
    """The name that a file will have which is written aside, see `pyramidclip_hf.files.written_aside`."""
    folder, name = os.path.split(path)
    aside = re.fullmatch(r"\.(.+)\.[0-9a-f]{12}\.partial", name)
    return os.path.join(folder, aside[1]) if aside else path


def _named_by(path: str, settings: Any, words: Sequence[str]) -> tuple[str, str]:
    """The flag whose value is `path` or a folder above it, and that value; without one "" and the path."""
    flags = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    found = ("", path)
    for part in (settings, *getattr(settings, "__dict__", {}).values()):
        for name, value in getattr(part, "__dict__", {}).items():
            flag = f"--{name.replace('_', '-')}"
            for one in (value if isinstance(value, (list, tuple)) else [value]) if flag in flags else []:
                is_path = isinstance(one, (str, os.PathLike)) and os.fspath(one) not in ("", os.sep)
                ends = os.path.join(path, ""), os.path.join(os.fspath(one), "") if is_path else ""
                if is_path and (ends[0].startswith(ends[1]) or ends[1].startswith(ends[0])):
                    found = max(found, (flag, os.fspath(one)), key=lambda pair: (pair[0] != "", len(pair[1])))
    return found


def _smaller(settings: Any) -> str:
    """What to lower where memory was too small: the first of the sizes that the command has."""
    for part in (settings, *getattr(settings, "__dict__", {}).values()):
        for name in _SIZES:
            if hasattr(part, name):
                return f" Lower --{name.replace('_', '-')}."
    return ""


def _say(text: str, advice: str, code: int) -> int:
    # A name that is no UTF-8 has marks in it that only some streams write.
    said = f"{text} {advice}".rstrip().encode("utf-8", "backslashreplace").decode()
    if os.environ.get("RANK", "0") != "0":  # one of several processes; the first one's line is the command's
        said = said.replace("error: ", f"process {os.environ['RANK']}: error: ", 1)
    print(said, file=sys.stderr, flush=True)
    _tell_launcher(said)
    return code


def _tell_launcher(said: str) -> None:
    """Leaves the reason where torchrun looks for it: it ends with what it finds there of the process that failed."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path or os.path.exists(path):
        return
    with contextlib.suppress(ValueError):  # not in the main thread
        # It ends the others when the first is gone; this one is about to end by itself, with a code that says more.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": said, "timestamp": int(time.time())}, file)


# The command line of `pyramidclip`


def _at_least_one(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return number


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_parser() -> CommandParser:
    """The parser of `pyramidclip`; `command` of what it returns is the subcommand's name."""
    parser = CommandParser(
        prog="pyramidclip",
        description="Classify pictures, embed and search them, and see why, with a PyramidCLIP model.",
        exit_codes=[EXIT_SKIPPED],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        described = f"{text[0].upper()}{text[1:]}."
        return commands.add_parser(name, help=text, description=described, exit_codes=[EXIT_SKIPPED])

    _add_classify(command("classify", "name pictures by labels of your own"))
    _add_embed(command("embed", "turn pictures or texts into a file of embeddings"))
    _add_search(command("search", "find pictures by text or picture in a file of embeddings"))
    _add_explain(command("explain", "show which parts of a picture speak for a text"))
    _add_export(command("export", "write a model for ONNX Runtime or OpenVINO"))
    _add_app(command("app", "serve a page to try one or two models on"))
    return parser


_ENGINES = ("onnx", "openvino")
_PICTURES_HELP = "files, tar shards, folders (with all below), globs in quotes, or - for paths on stdin, one a line"


def _add_common(
    parser: argparse.ArgumentParser, model_help: str = "", batches: bool = False, engines: bool = True
) -> None:
    model_help = model_help or "folder of a saved model, or Hub id"
    parser.add_argument("--model", required="default" not in model_help, help=model_help)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument(
        "--device", default="auto", help="default: auto, an accelerator if there is one; or cpu, cuda, cuda:1, mps"
    )
    if engines:
        parser.add_argument(
            "--backend",
            default="torch",
            choices=("torch", *_ENGINES),
            help="what computes; the others run what `pyramidclip export` wrote (default: %(default)s)",
        )
    types = ("float32", "bfloat16", "float16", *(["int8"] if engines else []))
    own = ", int8 with another --backend" if engines else ""
    parser.add_argument("--dtype", default="float32", choices=types, help=f"of the model{own} (default: %(default)s)")
    parser.add_argument(
        "--max-image-pixels",
        type=_at_least_one,
        default=100_000_000,
        help="pictures with more are not decoded (default: %(default)s; Pillow itself ends at 178956970)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no notes")
    if batches:
        parser.add_argument("--batch-size", type=_at_least_one, default=32, help="default: %(default)s")
        parser.add_argument(
            "--workers",
            type=_at_least_one,
            default=_processors(),
            help="threads that decode pictures while the model computes (default: the processors, here %(default)s)",
        )


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", help=_PICTURES_HELP)
    labels = parser.add_mutually_exclusive_group(required=True)
    labels.add_argument("--labels", nargs="+", metavar="LABEL", help="classes; put pictures before this flag")
    labels.add_argument("--labels-file", metavar="FILE", help="classes, one a line")
    parser.add_argument("--templates", metavar="FILE", help="prompts, one a line, {} for the label; default: CLIP's 80")
    parser.add_argument("--top-k", type=_at_least_one, default=1, help="labels a picture (default: %(default)s)")
    _add_common(parser, batches=True)


def _add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="*", help=_PICTURES_HELP)
    parser.add_argument(
        "--texts", metavar="FILE", help="embed the lines of this file; long ones are cut to the context"
    )
    parser.add_argument("--output", required=True, help="NAME.parquet (needs pyarrow) or NAME.npz")
    parser.add_argument(
        "--part-size",
        type=_at_least_one,
        default=1024,
        help="rows between two saves; a stopped job repeats at most these (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="take the place of a finished or unfinished file")
    parser.add_argument(
        "--engine",
        default="local",
        choices=("local", "ray"),
        help="who embeds: this process, or workers on a Ray cluster that see the same folders (default: %(default)s)",
    )
    parser.add_argument(
        "--ray-address", help="HOST:PORT of the cluster, or auto; default: $RAY_ADDRESS, else one on this machine"
    )
    parser.add_argument(
        "--ray-workers", type=_at_least_one, help="default: one a GPU of the cluster, or one a processor core"
    )
    _add_common(parser, batches=True)


def _add_search(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("embeddings", help="file that `pyramidclip embed` wrote")
    parser.add_argument("--text", nargs="+", action="extend", default=[], metavar="QUERY", help="in words")
    parser.add_argument("--image", nargs="+", action="extend", default=[], metavar="FILE", help="by example")
    parser.add_argument("--top-k", type=_at_least_one, default=10, help="hits a query (default: %(default)s)")
    parser.add_argument(
        "--index",
        metavar="FILE",
        help="search through this FAISS index, which is made if it is not there (file too "
        "large to be read for each query); a few hits may be missed",
    )
    parser.add_argument("--output", metavar="SHEET", help="contact sheet to write: a PNG, JPEG, WebP, or a page, .html")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a sheet that is there")
    parser.add_argument("--font", metavar="FILE", help="TrueType font of the sheet, for queries beyond Latin letters")
    _add_common(parser, "folder of a saved model, or Hub id; default: the one that the embeddings name")


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("picture", help="a file")
    parser.add_argument("--text", required=True, help="what to look for")
    parser.add_argument("--output", required=True, help="overlay to write, a PNG, JPEG or WebP")
    parser.add_argument("--overwrite", action="store_true", help="take the place of a picture that is there")
    _add_common(parser, engines=False)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="folder of a saved model, or Hub id")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--output", metavar="FOLDER", help="where to; default: the model's own folder")
    parser.add_argument("--format", default="onnx", choices=_ENGINES, help="default: %(default)s")
    parser.add_argument(
        "--dtype",
        nargs="+",
        default=["float32"],
        choices=("float32", "float16", "int8"),
        help="one or more, each in files of its own (default: float32)",
    )
    parser.add_argument("--regions", action="store_true", help="the region branch too")
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        metavar="PICTURES",
        help="pictures as they will be seen; needed for int8",
    )
    parser.add_argument(
        "--pairs", metavar="FILE", help="say what retrieval loses on these: JSON lines with image and caption"
    )
    parser.add_argument(
        "--classes", metavar="FOLDER", help="say what zero-shot classification loses on these: a sub-folder a class"
    )
    parser.add_argument("--max-image-pixels", type=_at_least_one, default=100_000_000, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print JSON, one object a line")
    parser.add_argument("--quiet", action="store_true", help="no notes")


def _port(text: str) -> int:
    number = int(text) if text.strip().isdecimal() else 0
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to 65535, got {text}")
    return number


def _add_app(parser: argparse.ArgumentParser) -> None:
    model_help = "folder of a saved model, or Hub id; default: those that `make demo` left in runs/demo, compared"
    parser.add_argument("--model", help=model_help)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--compare", metavar="MODEL", help="a second model, beside the first one")
    parser.add_argument(
        "--embeddings",
        nargs="+",
        default=[],
        metavar="FILE",
        help="what to search in: files that `pyramidclip embed` wrote with these models, one a model",
    )
    parser.add_argument(
        "--examples",
        nargs="+",
        default=[],
        metavar="PICTURES",
        help="to begin with: files or folders; NAME.json and NAME.roi.npy beside NAME.jpg are its regions",
    )
    parser.add_argument("--labels-file", metavar="FILE", help="labels to begin with, one a line")
    parser.add_argument(
        "--device", default="auto", help="default: auto, an accelerator if there is one; or cpu, cuda, cuda:1, mps"
    )
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s, this machine alone")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860 on")
    parser.add_argument(
        "--share", action="store_true", help="a public address for a week, through Gradio's servers; off by default"
    )
    parser.add_argument(
        "--max-image-pixels",
        type=_at_least_one,
        default=50_000_000,
        help="pictures with more are refused (default: %(default)s)",
    )


# What the subcommands read, beside models and pictures, and what belongs there where a slip is near.
_READ = {
    "labels_file": "a file with labels, one a line; --labels takes them as words",
    "templates": "a file with prompts, one a line, {} for the label",
    "texts": "a file with texts, one a line",
    "font": "",
    "image": "the file of a picture; --text takes words",
    "embeddings": "a file that `pyramidclip embed` wrote",
    "picture": "the file of a picture",
    "pairs": "JSON lines with image and caption",
    "classes": "a folder with one sub-folder of pictures for each class",
}
# What takes words, and the flag that takes what a file holds.
_WORDS = {
    "labels": "--labels-file reads labels from a file, one a line",
    "text": "expected the words to look for; `pyramidclip search` takes pictures by --image",
}


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """The words as arguments; labels that took the pictures behind them are told so."""
    try:
        return build_parser().parse_args(words)
    except ValueError as error:
        if "--labels" in words and "are required: pictures" in str(error):
            raise ValueError(f"{error}; all that follows --labels is labels, so pictures come before it") from None
        raise


def _check_words(args: argparse.Namespace) -> None:
    """ValueError where the name of a file stands for its content: as words, it would be answered all the same."""
    for name, told in _WORDS.items():
        given = getattr(args, name, None) or []
        for word in [given] if isinstance(given, str) else given:
            if os.path.splitext(word)[1] and os.path.isfile(word):
                raise ValueError(f"--{name} {word}: that is a file, whose name would be taken for words: {told}")


def _run(args: argparse.Namespace) -> int:
    # torch and transformers take seconds to import: help, wrong flags and what is missing answer without them.
    check_there("--model", args.model, "folder of a saved model, or Hub id", "id")
    check_there("--compare", getattr(args, "compare", None), "folder of a saved model, or Hub id", "id")
    _check_words(args)
    for name, expected in _READ.items():
        flag = "" if name in ("embeddings", "picture") else f"--{name.replace('_', '-')}"
        check_there(flag, getattr(args, name, None), expected)
    for flag, name in (("", "pictures"), ("--calibration", "calibration"), ("--examples", "examples")):
        check_there(flag, [one for one in getattr(args, name, ()) if one != "-"], kind="data")
    from pyramidclip_hf.commands import COMMANDS

    return COMMANDS[args.command](args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the `pyramidclip` command."""
    again = "What is complete is kept: the same command continues."
    return run_command(_parse, _run, argv, advice=lambda args: again if args.command == "embed" else "")


def _refuse_a_path() -> None:
    """Ends a command of the checkout that is started by its path, with how it is started.

    Python looks for modules in that file's folder then, where the checkout's packages are not.
    """
    started = sys.modules["__main__"]
    if getattr(started, "__spec__", None) is not None or not hasattr(started, "__file__"):
        return
    path = Path(started.__file__ or "").absolute()
    for folder in path.parents:
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        is_ours = name.split(".")[0] in ("training", "conversion", "tests")
        if is_ours and (folder / "pyramidclip_command.py").is_file():
            if str(folder) not in map(os.path.abspath, sys.path):
                how = f"in {folder} as python -m {name}, or accelerate launch -m {name}"
                sys.exit(_say(f"error: {path}: a command of the checkout is started {how}", "", EXIT_WRONG_USAGE))
            return


_refuse_a_path()
if __name__ == "__main__":
    sys.exit(main())
