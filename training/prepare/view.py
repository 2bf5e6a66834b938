"""Writes a page that shows samples of a shard: the picture with its boxes and phrases, caption, summary, tags.

    python -m training.prepare.view data/mine/00000.tar --output page.html --number 20

The page holds everything in itself and loads nothing.
"""

import html
import io
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramidclip_command import CommandParser, answer_words, check_there, run_command


def parse(words: Sequence[str]) -> Namespace:
    """The words of the command as settings. Raises `ValueError`."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("shard", help="a shard, by path or URL")
    parser.add_argument("--output", required=True, help="the page to write")
    parser.add_argument("--number", type=int, default=20, help="how many samples (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: %(default)s)")
    parser.add_argument(
        "--max-image-pixels", type=int, default=100_000_000, help="larger pictures are not shown (default: %(default)s)"
    )
    arguments = parser.parse_args(words)
    check_there("", arguments.shard, "a shard", "data")
    return arguments


if __name__ == "__main__":
    answer_words(parse)

from PIL import Image

from pyramidclip_hf.files import write_text
from pyramidclip_hf.pages import data_uri, render
from training.data.records import BadSample, Region, phrase, sample_from_members
from training.data.shards import ShardReader, read_dataset_json
from training.data.views import decoded_picture

# White words can be read on each of them.
COLOURS = ("#d0143c", "#1e7d34", "#0069b4", "#b35400", "#911eb4", "#00797a", "#806400", "#c2189e", "#7a4a1e", "#444444")


_WIDTH, _LEAST = 640, 384
# More cannot be told apart, and finding places for their words takes the square of their number.
_MOST_REGIONS = 100


_TEMPLATE = Path(__file__).with_name("view_template.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(arguments: Namespace) -> None:
    """Writes the page."""
    if Path(arguments.output).exists() and Path(arguments.output).suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {arguments.output} is there and is no page: choose a name that ends in .html")
    text = page(arguments.shard, arguments.number, arguments.first, arguments.max_image_pixels)
    write_text(arguments.output, text)
    print(f"{arguments.output}: {text.count('<article>')} samples of {arguments.shard}")


def page(shard: str | Path, number: int, first: int = 0, max_pixels: int = 100_000_000) -> str:
    """The HTML of `number` samples of a shard, from the `first` one on. Raises `ValueError` outside the shard."""
    if Path(shard).is_dir():
        raise IsADirectoryError(f"{shard} is a folder: expected one of its shards, as {Path(shard) / '00000.tar'}")
    with ShardReader(shard) as reader:
        if number < 1 or not 0 <= first < len(reader):
            raise ValueError(
                f"{shard}, which has {len(reader)} samples, from 0 on: expected --first among them and 1 or more as "
                f"--number, got {first} and {number}"
            )
        samples = [_shown(reader, i, max_pixels) for i in range(first, min(first + number, len(reader)))]
        size = len(reader)
    folder = str(shard).rpartition("/")[0] or "."
    made_by = (read_dataset_json(folder) or {}).get("made_by", {})
    named = {level: made.get("maker") if isinstance(made, dict) else made for level, made in made_by.items()}
    makers = "; ".join(f"{level} by {maker}" for level, maker in named.items() if maker)
    content = {"shard": str(shard), "name": Path(str(shard)).name, "size": size, "samples": samples, "makers": makers}
    return render(_TEMPLATE, content)


def _shown(reader: ShardReader, i: int, max_pixels: int) -> dict[str, Any]:
    """What the template shows of a sample, or what is wrong with it."""
    key = reader.keys[i]
    try:
        sample = sample_from_members(reader.read(i), key, reader.name)
        picture = decoded_picture(sample.image or b"", max_pixels)
    except (BadSample, ValueError) as bad:
        return {"key": key, "fault": str(bad)}
    regions = (sample.regions or [])[:_MOST_REGIONS]
    return {
        "key": key,
        "fault": None,
        "drawing": drawing(picture, regions),
        "width": picture.width,
        "height": picture.height,
        "caption": sample.caption,
        "summary": sample.summary,
        "tags": ", ".join(sample.tags or []),
        "features": "no features" if sample.roi is None else f"features {sample.roi.shape[0]} x {sample.roi.shape[1]}",
        "number": len(sample.regions or []),
        "regions": [
            {
                "phrase": phrase(region),
                "score": "no score" if region.score is None else f"{region.score:.3f}",
                "colour": COLOURS[number % len(COLOURS)],
            }
            for number, region in enumerate(regions)
        ],
    }


def drawing(picture: Image.Image, regions: Sequence[Region]) -> str:
    """SVG of an RGB picture, 384 to 640 on its longer side, with the boxes of `regions` and their phrases."""
    # Small ones are enlarged, or the words would hide them.
    scale = min(_WIDTH / max(picture.size), max(1.0, _LEAST / max(picture.size)))
    width, height = (max(1, round(side * scale)) for side in picture.size)
    buffer = io.BytesIO()
    picture.resize((width, height), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=85)
    data = data_uri(buffer.getvalue(), "image/jpeg")
    boxes: list[str] = []
    words: list[str] = []
    taken: list[tuple[float, float, float]] = []
    for number, region in enumerate(regions):
        x1, y1, x2, y2 = (v * side for v, side in zip(region.box, (width, height) * 2))
        colour = COLOURS[number % len(COLOURS)]
        boxes.append(
            f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{x2 - x1:.1f}" height="{y2 - y1:.1f}" '
            f'fill="none" stroke="{colour}" stroke-width="2"/>'
        )
        text = f"{number + 1} {phrase(region)}"
        left, top = _free_place(x1, y1, 7.2 * len(text) + 6, width, height, taken)
        words.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{7.2 * len(text) + 6:.1f}" height="16" fill="{colour}"/>'
            f'<text x="{left + 3:.1f}" y="{top + 12.5:.1f}" font-family="monospace" '
            f'font-size="12" fill="#fff">{html.escape(text)}</text>'
        )
    # Words last: a box drawn later must not hide them.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}">'
        f'<image href="{data}" width="{width}" height="{height}"/>{"".join(boxes + words)}</svg>'
    )


def _free_place(
    x: float, y: float, wide: float, width: int, height: int, taken: list[tuple[float, float, float]]
) -> tuple[float, float]:
    """Where a label of 16 pixels' height goes: at the box's corner, or below the labels that are there already."""
    left, top = max(0.0, min(x, width - wide)), max(0.0, min(y, height - 16))
    while any(left < other + w and other < left + wide and abs(top - at) < 16 for other, at, w in taken):
        top += 16
    if top > height - 16:
        top = max(0.0, min(y, height - 16))
    taken.append((left, top, wide))
    return left, top


if __name__ == "__main__":
    sys.exit(main())
