"""The page of a dry run: what each rule takes and what stays, with pictures drawn at random; it loads nothing."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pyramidclip_hf.pages import data_uri, render
from training.data.records import BadSample
from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.decide import Decision, Selection
from training.prepare.selecting.reading import said
from training.prepare.sources import RawPair

SHOWN = 10
_SIDE = 320
_LETTERS = 240
_TEMPLATE = Path(__file__).with_name("selection_template.html")


@dataclass(frozen=True)
class Example:
    """A sample as the page shows it: its picture as the address of a small JPEG (empty: none), and words."""

    key: str
    text: str
    picture: str
    told: str


@dataclass(frozen=True)
class Group:
    """What one rule took, what cannot be used, or what stays."""

    name: str
    count: int
    left: int
    settings: str
    examples: list[Example]


# The pairs of a part (by its number) at some positions.
ReadAt = Callable[[int, Sequence[int]], Iterable[RawPair]]


def page(selection: Selection, decision: Decision, inputs: Sequence[str], read: ReadAt, max_image_pixels: int) -> str:
    """The HTML.

    Args:
        selection: the rules.
        decision: what they took.
        inputs: names of the data, for the title.
        read: gives pairs.
        max_image_pixels: larger pictures are not shown.

    Raises:
        ImportError: Jinja is missing; it names the extra.
    """
    facts = decision.facts

    def group(name: str, rows: np.ndarray, left: int, settings: str) -> Group:
        drawn = np.random.default_rng(selection.seed).permutation(len(rows))[:SHOWN]
        examples = []
        for row in np.sort(rows[drawn]).tolist():
            part, position = facts.place(row)
            examples += [_example(raw, max_image_pixels) for raw in read(part, [position])]
        return Group(name, len(rows), left, settings, examples)

    unusable = np.flatnonzero(facts.verdicts >= facts.SAME_KEY)
    groups = [group("cannot be used", unusable, len(facts) - len(unusable), "what pack refuses too")]
    for number, ((name, rule), taken) in enumerate(zip(selection.rules.items(), decision.taken)):
        told = ", ".join(f"{key}: {value}" for key, value in said(rule).items())
        groups.append(group(name, np.flatnonzero(facts.verdicts == number + 1), taken.left, f"{rule.kind}; {told}"))
    stays = facts.verdicts == 0
    if selection.split is not None:
        groups.append(group("validation", np.flatnonzero(stays & decision.validation), facts.left, "of what stays"))
    groups.append(group("stays", np.flatnonzero(stays & ~decision.validation), facts.left, ""))
    shown = ", ".join(Path(name).name for name in inputs[:5]) + (", ..." if len(inputs) > 5 else "")
    return render(_TEMPLATE, {"total": len(facts), "inputs": shown, "groups": groups})


def _example(raw: RawPair, max_image_pixels: int) -> Example:
    candidate = Candidate(raw, max_image_pixels)
    told = [] if raw.fault is None else [raw.fault.reason]
    text = picture = ""
    try:
        text = candidate.text("caption")
        told += [f"{name} {value:g}" for name, value in candidate.record.items() if isinstance(value, float)][:3]
    except BadSample as bad:
        told.append(bad.reason)
    if raw.picture is not None:
        try:
            told.append(f"{candidate.header.width}\u00a0x\u00a0{candidate.header.height}")
            picture = _small(candidate.pixels)
        except BadSample as bad:
            told.append(bad.reason)
    text = text[:_LETTERS] + ("..." if len(text) > _LETTERS else "")
    return Example(candidate.key, text or "(no text)", picture, ", ".join(dict.fromkeys(told)))


def _small(picture: Image.Image) -> str:
    shown = picture.copy()
    shown.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=80)
    return data_uri(file.getvalue(), "image/jpeg")
