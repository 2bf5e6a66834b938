"""SVG files of strangers as pictures with what they say of themselves, drawn by resvg in a process that may fail."""

import contextlib
import importlib.util
import json
import struct
import subprocess
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from training.data.records import BadSample

MAX_SVG_BYTES = 16 << 20


class Drawing(NamedTuple):
    """A drawn file; what it does not say is empty.

    Attributes:
        png: on white; the longer side has the pixels that were asked for.
        title: of the picture.
        description: of the picture.
        keywords: in the order of the file.
        licence: as the file names it, usually a URL.
    """

    png: bytes
    title: str
    description: str
    keywords: list[str]
    licence: str


class Drawer:
    """Draws one file after another in a process of its own, which is replaced where it hangs or dies.

    That process can open no file and no connection, and has a limit on memory; each file has one on time. So a file
    that expands without end, recurses, or names files of this machine costs one sample.

    Args:
        side: pixels of the longer side.
        seconds: for one file.
        memory: bytes that the process may have.

    Raises:
        ImportError: resvg is missing; it names the extra.
    """

    def __init__(self, side: int, seconds: float = 20.0, memory: int = 2 << 30):
        if importlib.util.find_spec("resvg_py") is None:
            raise ImportError('drawing SVG files needs resvg_py: pip install -e ".[demo]"')
        self.side, self.seconds, self.memory = side, seconds, memory
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Drawer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def draw(self, data: bytes) -> Drawing:
        """The picture of an SVG file's bytes.

        Raises:
            BadSample: `bad-xml`, `external-picture` (a part lies in another file), `not-drawn` (resvg says no),
                `too-large-to-draw` (bytes of the file, memory), `too-slow-to-draw`, or `crashed`.
        """
        if len(data) > MAX_SVG_BYTES:
            raise BadSample(None, None, "too-large-to-draw", f"{len(data)} bytes, at most {MAX_SVG_BYTES}")
        if self._process is None:
            words = [sys.executable, "-I", str(Path(__file__).with_name("svg_process.py"))]
            self._process = subprocess.Popen(
                [*words, str(self.side), str(self.memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        late = threading.Event()
        timer = threading.Timer(self.seconds, _end, (self._process, late))
        timer.start()
        try:
            told, png = _ask(self._process, data)
        except (OSError, EOFError):
            self.close()
            reason, detail = ("too-slow-to-draw", f"over {self.seconds:g} s") if late.is_set() else ("crashed", "")
            raise BadSample(None, None, reason, detail or "the process that draws ended") from None
        finally:
            timer.cancel()
        if "reason" in told:
            raise BadSample(None, None, told["reason"], told["detail"])
        return Drawing(png, **told)


def _end(process: "subprocess.Popen[bytes]", late: threading.Event) -> None:
    late.set()
    process.kill()


def _ask(process: "subprocess.Popen[bytes]", data: bytes) -> tuple[dict, bytes]:
    """What the process answers. Raises `OSError` or `EOFError` where it does not."""
    requests, answers = process.stdin, process.stdout
    if requests is None or answers is None:
        raise EOFError
    parts = []
    with contextlib.suppress(BrokenPipeError):  # it ended; reading says so
        requests.write(struct.pack("<I", len(data)) + data)
        requests.flush()
    for _ in range(2):
        header = answers.read(4)
        if len(header) < 4:
            raise EOFError
        (size,) = struct.unpack("<I", header)
        part = answers.read(size)
        if len(part) < size:
            raise EOFError
        parts.append(part)
    return json.loads(parts[0]), parts[1]
