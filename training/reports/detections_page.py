"""A page with pictures of a test: what was found beside what is there, those with most mistakes first."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.image_processing_pyramidclip import open_undecoded, upright_rgb
from pyramidclip_hf.pages import data_uri, render
from training.data.annotations import AnnotatedPicture, AnnotatedPictures
from training.evaluation.detection import Found, Measured, overlaps_of

_TEMPLATE = Path(__file__).with_name("detections_template.html")
SHOWN = 48
SURE = 0.5
_SIDE = 320
# White words can be read on each of them.
_RIGHT, _WRONG, _MISSED = "#1f7f3b", "#d02438", "#a85d00"
_LETTERS = 15


@dataclass(frozen=True)
class Compared:
    """A picture at an overlap of 0.5 and a score of at least `SURE`.

    Attributes:
        right: numbers of detections that meet an object of their class, each object once.
        wrong: the other detections.
        missed: numbers of objects that nothing meets.
    """

    right: list[int]
    wrong: list[int]
    missed: list[int]


def compare(picture: AnnotatedPicture, found: Found) -> Compared:
    """Detections by falling score, each with the free object of its class that it covers best."""
    boxes = np.array([thing.box for thing in picture.objects], np.float64).reshape(-1, 4)
    free = {n for n, thing in enumerate(picture.objects) if not thing.crowd}
    right, wrong = [], []
    for number in np.argsort(-found.scores, kind="stable").tolist():
        if found.scores[number] < SURE:
            break
        shared = overlaps_of(found.boxes[number], boxes) if len(boxes) else np.zeros(0)
        able = [n for n in free if picture.objects[n].label == found.labels[number] and shared[n] >= 0.5]
        if able:
            free.remove(max(able, key=lambda n: shared[n]))
            right.append(number)
        else:
            wrong.append(number)
    return Compared(right, wrong, sorted(free))


def write_page(path: Path, data: AnnotatedPictures, found: Sequence[Found], measured: Measured) -> None:
    """Writes the page, whole or not at all."""
    compared = [compare(picture, one) for picture, one in zip(data.pictures, found)]
    order = sorted(range(len(compared)), key=lambda n: -len(compared[n].wrong) - len(compared[n].missed))
    wrong, missed = (sum(len(getattr(one, name)) for one in compared) for name in ("wrong", "missed"))
    right = sum(len(one.right) for one in compared)
    content = {
        "name": data.name,
        "pictures": len(data),
        "sure": SURE,
        "right": right,
        "wrong": wrong,
        "missed": missed,
        "figures": [_figure(data, found[n], compared[n], data.pictures[n]) for n in order[:SHOWN]],
        "metrics": [(name, f"{100 * value:.1f}") for name, value in measured.metrics.items()],
        "head": list(next(iter(measured.per_class.values()))),
        "classes": [
            [name, *map(_percent, values.values())]
            for name, values in sorted(measured.per_class.items(), key=lambda item: _worst_first(item[1]["voc_ap"]))
        ],
    }
    write_atomically(path, render(_TEMPLATE, content).encode())


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if value == value else "no object"


def _worst_first(value: float) -> float:
    return value if value == value else 2.0


def _figure(data: AnnotatedPictures, found: Found, compared: Compared, picture: AnnotatedPicture) -> dict[str, str]:
    """What the template shows of a picture: two drawings side by side, and what they show in words."""
    with open_undecoded(picture.path) as opened:
        plain = upright_rgb(opened)
    scale = _SIDE / max(plain.size)
    plain = plain.resize((round(plain.width * scale), round(plain.height * scale)), Image.Resampling.BICUBIC)
    names = data.class_names
    seen = [(found.boxes[n], _WRONG, f"{names[found.labels[n]]} {found.scores[n]:.2f}") for n in compared.wrong]
    seen += [(found.boxes[n], _RIGHT, "") for n in compared.right]  # last, or the others cover them
    there = [
        (np.array(thing.box), _MISSED if n in compared.missed else _RIGHT, names[thing.label])
        for n, thing in enumerate(picture.objects)
    ]
    both = Image.new("RGB", (2 * plain.width + 8, plain.height), "white")
    for place, entries in ((0, seen), (plain.width + 8, there)):
        both.paste(_drawn(plain.copy(), entries, scale), (place, 0))
    file = io.BytesIO()
    both.save(file, "JPEG", quality=85)
    told = f"{len(compared.right)} right, {len(compared.wrong)} wrong, {len(compared.missed)} missed"
    return {"name": picture.path.name, "told": told, "picture": data_uri(file.getvalue(), "image/jpeg")}


def _drawn(picture: Image.Image, entries: Sequence[tuple[np.ndarray, str, str]], scale: float) -> Image.Image:
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_LETTERS)
    for box, colour, text in entries:
        x1, y1, x2, y2 = (float(side) * scale for side in box)
        pen.rectangle((x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)), outline=colour, width=2)
        if text:
            place = (max(0.0, x1) + 2, max(0.0, y1 - _LETTERS - 2))
            left, top, right, bottom = pen.textbbox(place, text, font=font)
            pen.rectangle((left - 1, top - 1, right + 1, bottom + 1), fill=colour)
            pen.text(place, text, fill="white", font=font)
    return picture
