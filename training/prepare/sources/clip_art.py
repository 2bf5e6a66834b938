"""A folder of SVG files, each with its title, description and keywords inside, as Debian's openclipart-svg has them."""

import os
from collections.abc import Iterator
from pathlib import Path

from training.data.records import BadSample, json_bytes
from training.prepare.sources.pairs import Fault, RawPair, SourcePart
from training.prepare.steps.svg import Drawer

# Licences that say so, and files that say nothing, in a collection that is in the public domain.
_PUBLIC_DOMAIN = "publicdomain"


class ClipArtSource:
    """Pictures are drawn, captions are titles with descriptions, tags are keywords; nothing of it is cleaned.

    Args:
        folder: with SVG files in it, at any depth.
        side: pixels of a picture's longer side.
        files_per_part: files of a part, which becomes a shard.

    Raises:
        FileNotFoundError: there is no such folder, or no SVG file in it.
    """

    name, has_keys, is_stream = "clip art", False, False

    def __init__(self, folder: str, side: int, files_per_part: int = 1000):
        self.folder, self.side, self.files_per_part = Path(folder), side, files_per_part
        self.files = sorted(_svg_files(self.folder))
        if not self.files:
            raise FileNotFoundError(
                f"{folder}: no *.svg in it; expected the folder of a collection, as /usr/share/openclipart/svg of "
                "Debian's package openclipart-svg"
            )

    def parts(self) -> list[SourcePart]:
        """So many files each, in the order of their paths."""
        step, count = self.files_per_part, len(self.files)
        return [
            SourcePart(f"{number:05d}", str(self.folder), min(step, count - first), first, first)
            for number, first in enumerate(range(0, count, step))
        ]

    def keys(self, part: SourcePart) -> list[str | None]:
        """None of its own; they are numbered."""
        return [None] * (part.rows or 0)

    def read(self, part: SourcePart, skip: int = 0) -> Iterator[RawPair]:
        """Draws and yields the pairs of a part in order, from number `skip` on."""
        with Drawer(self.side) as drawer:
            for number in range(part.first + skip, part.first + (part.rows or 0)):
                raw = RawPair(f"{number:07d}", self.files[number])
                try:
                    _fill(raw, self.folder, drawer)
                except BadSample as bad:
                    raw.fault = Fault(bad.reason, bad.detail)
                yield raw


def _svg_files(folder: Path) -> Iterator[str]:
    """Paths from the folder, with slashes; links are not followed."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            if name.lower().endswith(".svg") and path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()


def _fill(raw: RawPair, folder: Path, drawer: Drawer) -> None:
    try:
        data = (folder / raw.where).read_bytes()
    except OSError as error:
        raise BadSample(raw.key, raw.where, "no-image", str(error)) from None
    drawing = drawer.draw(data)
    licence = drawing.licence.lower().replace(" ", "")
    if licence and _PUBLIC_DOMAIN not in licence:
        raise BadSample(raw.key, raw.where, "other-licence", drawing.licence[:200])
    raw.picture = drawing.png
    raw.members["txt"] = caption(drawing.title, drawing.description).encode(errors="replace")
    raw.members["json"] = json_bytes({"path": raw.where, "tags": drawing.keywords})


def caption(title: str, description: str) -> str:
    """The title, and the description behind it where it says more; either may be empty.

    >>> caption("Baseball Cap", "A blue cap.")
    'Baseball Cap. A blue cap.'
    """
    if not title or not description or description.lower() == title.lower():
        return title or description
    return f"{title}{'' if title[-1] in '.!?:' else '.'} {description}"
