"""Writes the tables of settings in docs/ again, from the dataclasses: `python -m tests.write_tables`.

A table stands below a line `<!-- settings: MODULE.CLASS -->` and ends with the first empty line.
"""

import importlib
import re
from pathlib import Path

from training.settings.fields import settings_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = re.compile(r"(?<=<!-- settings: )([\w.]+)\.(\w+)( -->\n)((?:.+\n)*)")


def with_tables(text: str) -> str:
    """The text of a page with its tables as the dataclasses are now."""

    def table(found: re.Match[str]) -> str:
        module, name, rest, _ = found.groups()
        return f"{module}.{name}{rest}" + settings_table(getattr(importlib.import_module(module), name))

    return TABLE.sub(table, text)


def pages() -> list[Path]:
    """The pages that have such tables."""
    return [path for path in sorted(DOCS.glob("*.md")) if TABLE.search(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
