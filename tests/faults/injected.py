"""A fault at a chosen file operation of a child process: killed before it, or refused because the disk is full."""

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

# What Python tells its audit hooks of; safetensors and tokenizers write their files by themselves.
_CHANGES = {"os.mkdir", "os.link", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
# What needs room.
GROWING = ("open", "os.mkdir")
UNEXPECTED = 70


def _path(name: Any, folder_handle: int = -1) -> str:
    """Where a name leads, which may be relative to an open folder, as those that `shutil.rmtree` removes."""
    start = os.readlink(f"/proc/self/fd/{folder_handle}") if folder_handle >= 0 else os.getcwd()
    return os.path.join(start, os.fsdecode(name))


def watch(folder: Path, happens: Callable[[int, str, str], None]) -> None:
    """From here on, in this process, `happens` is called before each change of a file below `folder`.

    Args:
        folder: What is looked at.
        happens: Takes the number of the operation, from 1, its kind and its path.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, str | bytes | os.PathLike) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
            path = _path(name)
        elif event in _CHANGES:
            handle = arguments[2] if event in ("os.mkdir", "os.rename") else arguments[-1]
            if event == "os.truncate" or isinstance(arguments[0], int):
                return
            path = _path(arguments[0], handle)
        else:
            return
        if path.startswith(f"{folder}/") and not path.endswith("/.lock"):
            count += 1
            happens(count, event, path)

    sys.addaudithook(hook)


def killed_at(number: int) -> Callable[[int, str, str], None]:
    """SIGKILL before that operation."""

    def happens(count: int, event: str, path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return happens


def full_from(number: int) -> Callable[[int, str, str], None]:
    """No room from that operation on."""

    def happens(count: int, event: str, path: str) -> None:
        if count >= number and event in GROWING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return happens


def in_child(work: Callable[[], int], output: Path) -> int:
    """Exit code of `work` in a forked process, negative where a signal ended it; what it says goes into a file."""
    child = os.fork()
    if not child:
        _child(work, output)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _child(work: Callable[[], int], output: Path) -> NoReturn:
    code = UNEXPECTED
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = work()
        sys.stdout.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)
