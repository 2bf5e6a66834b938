# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The one form of all pages that are written as files: a template and a stylesheet, and nothing from elsewhere.

A page's own template begins with `{% extends "page.html" %}` and fills the blocks `title`, `main` and perhaps `style`.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent


def render(template: Path, content: Mapping[str, Any]) -> str:
    """The page that a Jinja template and its values make; every value that the template names must be there.

    Values are text: what they hold of HTML is shown as it is, unless the template says `|safe`.

    Args:
        template: the page's own.
        content: name -> value.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise ImportError('the page needs jinja2, which torch brings: pip install "pyramidclip-hf[train]"') from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    style = (_HERE / "page.css").read_text(encoding="utf8")
    return environment.get_template(template.name).render(page_style=style, **content)


def data_uri(data: bytes, media_type: str) -> str:
    """The bytes as a `data:` address that a page can hold instead of a file."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
