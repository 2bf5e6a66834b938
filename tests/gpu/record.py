"""What `python -m tests.gpu` found, kept in a file that is complete after every line of it.

The file is JSON: the machine, and for each part its state (one of STATES), a reason where it has one, its seconds, and
its rows. A row is a measurement (`what`), a check (`check`: it must hold) or a goal (`goal`: it should). A page of the
same name says the same in tables. Parts of another call on the same machine stay: two short calls make one file.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# "running" is what a call leaves that was ended from outside, at the part that it was in.
STATES = ("passed", "failed", "skipped", "not reached", "running")

Row = dict[str, Any]


class Record:
    """The results of one machine.

    Args:
        path: JSON file; the page goes beside it as `.md`. What it holds of the same machine is kept.
        machine: what the numbers depend on; `device` and `dry` decide whether it is the same machine.
        parts: names of all parts, in the order of the page.
        chosen: those that this call runs; they start anew, as "not reached".
    """

    def __init__(self, path: Path, machine: Mapping[str, Any], parts: Sequence[str], chosen: Sequence[str]):
        self.path, self.machine = path, dict(machine)
        before = self._of_before()
        new = {"state": "not reached", "rows": []}
        self.parts: dict[str, dict[str, Any]] = {
            name: dict(new) if name in chosen else before.get(name, dict(new)) for name in parts
        }
        self.save()

    def _of_before(self) -> dict[str, dict[str, Any]]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            same = all(found["machine"][key] == self.machine[key] for key in ("device", "dry"))
            return found["parts"] if same else {}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def begin(self, part: str) -> None:
        """The part runs from here on."""
        self.parts[part] = {"state": "running", "rows": []}
        self.save()

    def add(self, part: str, row: Mapping[str, Any]) -> None:
        """A row of the part, written to the file before this returns."""
        self.parts[part]["rows"].append({key: _plain(value) for key, value in row.items()})
        self.save()

    def end(self, part: str, state: str, seconds: float, reason: str = "") -> None:
        """The part is over. A row that was a check and did not hold makes it "failed"."""
        broken = [row for row in self.parts[part]["rows"] if "check" in row and not row["holds"]]
        if state == "passed" and broken:
            state, reason = "failed", "; ".join(sentence(row) for row in broken)
        self.parts[part] |= {"state": state, "seconds": round(seconds, 1)} | ({"reason": reason} if reason else {})
        self.save()

    def save(self) -> None:
        """Writes both files, each aside and then renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"machine": self.machine, "parts": self.parts}, indent=1) + "\n"
        for path, text in ((self.path, content), (self.path.with_suffix(".md"), page(self.machine, self.parts))):
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)

    def counts(self, names: Sequence[str]) -> dict[str, int]:
        """State -> how many of the named parts have it."""
        states = [self.parts[name]["state"] for name in names]
        return {state: states.count(state) for state in STATES if state in states}


def _plain(value: Any) -> Any:
    """`value` as JSON has it: floats to four digits, those that are not finite as words."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value


def sentence(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    if "check" in row or "goal" in row:
        kind = "check" if "check" in row else "goal"
        verdict = {True: "holds", False: "DOES NOT HOLD" if kind == "check" else "not reached"}[row["holds"]]
        return f"{row[kind]}: {row['value']} ({kind}: {row['wanted']}) {verdict}"
    rest = ", ".join(f"{key} {value}" for key, value in row.items() if key != "what")
    return f"{row['what']}: {rest}"


def page(machine: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The record as Markdown."""
    lines = ["# `make gpu`", ""]
    if machine["dry"]:
        lines += ["A dry pass at toy size without a GPU: it says that every part runs, and nothing about a GPU.", ""]
    lines += [", ".join(f"{key} {value}" for key, value in machine.items() if key != "dry") + ".", ""]
    lines += ["| part | state | s | reason |", "|---|---|---|---|"]
    for name, part in parts.items():
        reason = " ".join(str(part.get("reason", "")).split())[:300].replace("|", "\\|")
        lines.append(f"| {name} | {part['state']} | {part.get('seconds', '')} | {reason} |")
    for name, part in parts.items():
        if part["rows"]:
            lines += ["", f"## {name}", "", *_tables(part["rows"])]
    return "\n".join(lines) + "\n"


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows, as one table for each run of rows with the same columns."""
    lines: list[str] = []
    columns: list[str] = []
    for row in rows:
        if list(row) != columns:
            columns = list(row)
            lines += [""] if lines else []
            lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        lines.append("| " + " | ".join(str(row[key]).replace("|", "\\|") for key in columns) + " |")
    return lines
