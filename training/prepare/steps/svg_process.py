"""One process that reads and draws SVG files of strangers, started and killed by `training.prepare.steps.svg`.

Run as a file, so that nothing but the standard library and resvg is there. Parsers of XML and of SVG recurse, expand
and allocate as their input says, and resvg reads pictures that a file names by path: here it may take so much memory
and no more, and can open nothing.

    python svg_process.py SIDE MEMORY_BYTES     stdin: 4 bytes of length and a file, again and again
                                                stdout: 4 bytes, JSON, 4 bytes, a PNG (empty where there is a fault)
"""

import json
import re
import resource
import struct
import sys
from typing import Any, BinaryIO
from xml.etree import ElementTree

_ENCODING = re.compile(rb"""^\s*<\?xml[^>]*encoding=["']([A-Za-z0-9._-]+)["']""")
_HREF = re.compile(r"^(?:\{[^}]*\})?href$")


class Refused(ValueError):
    """A file that is not drawn: one machine-readable word, and a sentence."""


def described(root: ElementTree.Element) -> dict[str, Any]:
    """What the file says of itself: title, description, keywords and licence, as editors write them (Dublin Core).

    The title is SVG's own element where there is none; what is missing is empty.
    """
    # Below Work, as the titles of agents are names of people.
    work = root.find(".//{*}Work")
    if work is None:
        work = root
    licence = work.find("{*}license")
    named = list(licence.attrib.values()) if licence is not None else []
    return {
        "title": _text(work.find("{*}title")) or _text(root.find("{http://www.w3.org/2000/svg}title")),
        "description": _text(work.find("{*}description")),
        "keywords": [word for item in work.findall("{*}subject//{*}li") if (word := _text(item))],
        "licence": named[0] if named else "",
    }


def _text(element: ElementTree.Element | None) -> str:
    return "" if element is None else " ".join("".join(element.itertext()).split())


def refuse_external(root: ElementTree.Element) -> None:
    """Raises `Refused` where a part of the picture lies in another file, which is not there: it would be incomplete."""
    for element in root.iter():
        if str(element.tag).rpartition("}")[2] not in ("image", "feImage"):
            continue
        for name, value in element.attrib.items():
            if _HREF.match(name) and not value.lstrip().startswith(("data:", "#")):
                raise Refused("external-picture", f"a part of it is the file {value[:200]!r}")


def drawn(data: bytes, side: int) -> tuple[dict[str, Any], bytes]:
    """Description and PNG of an SVG file, on white, its longer side `side` pixels. Raises `Refused`."""
    import resvg_py

    try:
        root = ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise Refused("bad-xml", str(error)[:300]) from None
    refuse_external(root)
    told = described(root)
    del root
    found = _ENCODING.match(data)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else found[1].decode() if found else "utf-8"
    try:
        text = data.decode(encoding, "replace").removeprefix("\ufeff")
        # Without fonts, which differ from machine to machine: words in pictures are not drawn. With the dots an inch
        # that CSS has: 0, the default here, makes nothing of a size in points.
        png = resvg_py.svg_to_bytes(
            svg_string=text, width=side, height=side, background="#ffffff", dpi=96, skip_system_fonts=True
        )
    except (ValueError, LookupError) as error:
        raise Refused("not-drawn", str(error)[:300]) from None
    return told, bytes(png)


def answer(data: bytes, side: int) -> tuple[dict[str, Any], bytes]:
    """As `drawn`, with a fault as {reason, detail}."""
    try:
        return drawn(data, side)
    except Refused as refused:
        reason, detail = refused.args
        return {"reason": reason, "detail": detail}, b""
    except (MemoryError, RecursionError) as error:
        return {"reason": "too-large-to-draw", "detail": type(error).__name__}, b""


def serve(requests: BinaryIO, answers: BinaryIO, side: int, memory: int) -> None:
    """Answers until the input ends."""
    blank = b'<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
    answer(blank, side)  # all is imported before nothing can be opened any more
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    while header := requests.read(4):
        told, png = answer(requests.read(struct.unpack("<I", header)[0]), side)
        text = json.dumps(told).encode()
        answers.write(b"".join((struct.pack("<I", len(text)), text, struct.pack("<I", len(png)), png)))
        answers.flush()


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer, int(sys.argv[1]), int(sys.argv[2]))
