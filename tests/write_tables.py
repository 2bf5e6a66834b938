"""Writes the tables of settings in docs/ again, from the dataclasses: `python -m tests.write_tables`.

A table stands below a line `<!-- settings: MODULE.CLASS -->` and ends with the first empty line. What a command printed
stands below it in a block that begins with `$ python -m MODULE WORDS`, and is written again too.
"""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

from training.settings.fields import settings_table

DOCS = Path(__file__).resolve().parent.parent / "docs"
TABLE = re.compile(r"(?<=<!-- settings: )([\w.]+)\.(\w+)( -->\n)((?:.+\n)*)")
OUTPUT = re.compile(r"(^```text\n\$ python -m ([\w.]+) (.+)\n)((?:(?!```).*\n)*)", re.MULTILINE)


def with_tables(text: str) -> str:
    """The text of a page with its tables as the dataclasses are now."""

    def table(found: re.Match[str]) -> str:
        module, name, rest, _ = found.groups()
        return f"{module}.{name}{rest}" + settings_table(getattr(importlib.import_module(module), name))

    return TABLE.sub(table, text)


def printed(module: str, words: str) -> str:
    """What `python -m MODULE WORDS` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = importlib.import_module(module).main(shlex.split(words))
    if code:
        raise RuntimeError(f"python -m {module} {words}: expected exit code 0, got {code}")
    return out.getvalue()


def with_outputs(text: str) -> str:
    """The text of a page with what its commands print now."""
    return OUTPUT.sub(lambda found: found[1] + printed(found[2], found[3]), text)


def pages() -> list[Path]:
    """The pages that have such tables."""
    return [path for path in sorted(DOCS.glob("*.md")) if TABLE.search(path.read_text(encoding="utf-8"))]


def pages_with_outputs() -> list[Path]:
    """The pages that have such blocks."""
    return [path for path in sorted(DOCS.glob("*.md")) if OUTPUT.search(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for path in pages():
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
    for path in pages_with_outputs():
        path.write_text(with_outputs(path.read_text(encoding="utf-8")), encoding="utf-8")
        print(path)
