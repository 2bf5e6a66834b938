# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""How every command comes in and goes out, and the start of `pyramidclip`; nothing but the standard library.

A command is a module with `parse(words)`, which gives settings, `run(settings)`, which works and may give an exit code,
and

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(parse, run, argv)

Results go to stdout; an error is one line on stderr.
"""

import argparse
import errno
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

EXIT_FAILED = 1
EXIT_WRONG_USAGE = 2
EXIT_SKIPPED = 3
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
    EXIT_STOPPED: "stopped in good order, can be continued",
    EXIT_INTERRUPTED: "stopped by Ctrl-C",
}
_WRONG_USAGE = (
    ValueError,
    ImportError,
    FileNotFoundError,
    FileExistsError,
    NotADirectoryError,
    IsADirectoryError,
    PermissionError,
)

Settings = TypeVar("Settings")


class Failure(RuntimeError):
    """An error whose message is the whole story: the command says it in one line and ends with exit code 1."""


class CommandParser(argparse.ArgumentParser):
    """argparse's parser, but a wrong word raises ValueError, flags are not abbreviated, the help names the exit codes.

    Args:
        *args: as `argparse.ArgumentParser` takes them, or a parser that stands behind this one in the order of bases.
        exit_codes: those beside 0, 1, 2 and 130 that the command may end with.
        **kwargs: `description` is shown as it is written.
    """

    def __init__(self, *args: Any, exit_codes: Sequence[int] = (), **kwargs: Any):
        codes = sorted({0, EXIT_FAILED, EXIT_WRONG_USAGE, EXIT_INTERRUPTED, *exit_codes})
        listed = "\n".join(f"  {code:<3} {EXIT_CODES[code]}" for code in codes)
        own = f"{kwargs.pop('epilog', None) or ''}\n\nexit codes:\n{listed}\n".lstrip("\n")
        kwargs = {"formatter_class": argparse.RawDescriptionHelpFormatter, "prog": _program(), **kwargs}
        super().__init__(*args, **{**kwargs, "epilog": own, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raises ValueError: argparse found `message` wrong with the words."""
        raise ValueError(f"{message} ({self.prog} --help says what is expected)")


def _program() -> str | None:
    """How the running command was called: `python -m training.evaluate`; None: by its file, which argparse shows."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec is not None else None


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
        2 after ValueError, ImportError and errors about what a path names; 1 after `Failure`, other errors of the
        system and a lack of memory; 130 after Ctrl-C; 141 where nobody reads stdout any more; else what `run` returned.
        Any other error is a fault of the program and goes through.
    """
    try:
        settings = parse(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        return _say("\nstopped.", "", EXIT_INTERRUPTED)
    except (*_WRONG_USAGE, Failure) as error:
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
    except _WRONG_USAGE as error:
        return _say(f"error: {_line(error)}", "", EXIT_WRONG_USAGE)
    except Failure as error:
        return _say(f"error: {_line(error)}", "", EXIT_FAILED)
    except OSError as error:
        full = " The disk is full." if error.errno == errno.ENOSPC else ""
        return _say(f"error: {_line(error)}.{full}", advice(settings), EXIT_FAILED)
    except (RuntimeError, MemoryError) as error:
        # torch's error is known by its name, so that it need not be imported.
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        return _say(f"error: {_line(error)}. Lower --batch-size.", advice(settings), EXIT_FAILED)


def _line(error: BaseException) -> str:
    """The message without line breaks, or the error's kind where it has none."""
    return " ".join(str(error).split("\n")).strip() or type(error).__name__


def _say(text: str, advice: str, code: int) -> int:
    print(f"{text} {advice}".rstrip(), file=sys.stderr, flush=True)
    return code


def main() -> int:
    """Runs `pyramidclip_hf.cli.main` and returns its exit code."""
    package = importlib.util.find_spec("pyramidclip_hf")
    file = Path(package.origin).with_name("cli.py")
    spec = importlib.util.spec_from_file_location("pyramidclip_hf.cli", file)
    cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cli)
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
