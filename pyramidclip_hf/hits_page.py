# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The hits of a search as one page that holds everything in itself; the picture of them is `contact_sheet`."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import ImageOps

from .pages import data_uri, render
from .picture_files import Hit, UnreadablePicture, read_picture

_TEMPLATE = Path(__file__).with_name("hits.html")
_SIDE = 320


def hits_page(
    queries: Sequence[tuple[str, str | None]],
    found: Sequence[Sequence[Hit]],
    below: str,
    max_image_pixels: int | None = None,
) -> tuple[str, int]:
    """The HTML of a page with the hits of each query as a wall of thumbnails with rank, score and file name.

    Args:
        queries: (title, path of the query's picture or None).
        found: the hits of each.
        below: what stands under the title.
        max_image_pixels: pictures with more are placeholders.

    Returns:
        The page, and how many thumbnails could not be read; they are placeholders.

    Raises:
        ImportError: jinja2 is not installed.
    """
    shown, absent = [], 0
    for (title, path), hits in zip(queries, found, strict=True):
        rows = [
            {
                "rank": hit.rank,
                "score": f"{hit.score:.3f}",
                "name": os.path.basename(hit.name),
                "path": hit.name,
                "picture": _thumbnail(hit.name, max_image_pixels),
                "why": "cannot be read" if os.path.exists(hit.name) else "not found",
            }
            for hit in hits
        ]
        absent += sum(row["picture"] is None for row in rows)
        shown.append({"title": title, "picture": _thumbnail(path, max_image_pixels) if path else None, "hits": rows})
    return render(_TEMPLATE, {"title": "What was found", "below": below, "queries": shown}), absent


def _thumbnail(path: str, max_image_pixels: int | None) -> str | None:
    """A `data:` address; None where the picture cannot be read."""
    try:
        picture = ImageOps.contain(read_picture(path, max_image_pixels), (_SIDE, _SIDE))
    except UnreadablePicture:
        return None
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=88)
    return data_uri(file.getvalue(), "image/jpeg")
