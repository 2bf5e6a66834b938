"""What stands in an emoji scene and how it is put into words: web captions, a person's captions, summaries, tags.

Everything is a pure function of a `random.Random`.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from training.emoji.pictures import TINTS

ANIMALS = (
    "bat bear butterfly camel crab duck elephant fish flamingo fox frog giraffe lion lobster octopus owl panda parrot "
    "peacock penguin pig rabbit rooster shark snail snake tiger turtle whale zebra"
)
FOOD = (
    "avocado banana broccoli carrot cherries cookie doughnut eggplant grapes hamburger lemon mushroom pineapple pizza "
    "strawberry tomato watermelon"
)
THINGS = (
    "airplane ambulance anchor balloon bell bicycle bus cactus camera castle crown drum guitar helicopter house key "
    "kite ladder locomotive rocket robot rose sailboat scissors snowman sunflower taxi teapot tent tractor trumpet "
    "umbrella volcano"
)
OBJECTS = tuple(f"{ANIMALS} {FOOD} {THINGS}".split())
SIZES = {"small": (0.28, 0.34), None: (0.36, 0.42), "big": (0.46, 0.56)}

_PLURALS = {"cherries", "grapes", "scissors"}
_SHOPS = (
    "PixelMart.com",
    "ArtBarn",
    "CraftHub.net",
    "wallpaperz",
    "ClipKing",
    "PosterPlanet",
    "StickerBox.de",
    "GiftHouse",
)
_NOUNS = (
    "sticker",
    "clipart",
    "art print",
    "poster",
    "greeting card",
    "illustration",
    "image",
    "photo",
    "wallpaper",
    "drawing",
)
_ADJECTIVES = ("cute", "funny", "vintage", "modern", "lovely", "amazing", "cool", "beautiful", "original", "kids")
# One pair in sixteen never meets in training.
_RESERVED_SHARE = 16


@dataclass
class Thing:
    """One object of a scene.

    Attributes:
        name: of `OBJECTS`.
        size: "small", "big" or None.
        tint: of `TINTS`, or None.
        box: x1, y1, x2, y2 in fractions of the picture, once it is drawn.
    """

    name: str
    size: str | None = None
    tint: str | None = None
    box: tuple[float, float, float, float] | None = None

    @property
    def attributes(self) -> list[str]:
        """Visible attributes, the surest last."""
        return [word for word in (self.size, self.tint) if word]

    def words(self, size: bool = True, tint: bool = True) -> str:
        """In words, as "a small red fox", leaving out what is not wanted."""
        parts = [word for word, wanted in ((self.size, size), (self.tint, tint), (self.name, True)) if wanted and word]
        if self.name in _PLURALS:
            return " ".join(["some", *parts])
        return " ".join(["an" if parts[0][0] in "aeiou" else "a", *parts])

    @property
    def drawn_box(self) -> tuple[float, float, float, float]:
        """Its box. Raises `ValueError` before it is drawn."""
        if self.box is None:
            raise ValueError(f"the {self.name} is not drawn yet")
        return self.box

    def place(self) -> str:
        """Where its middle lies: "at the top left", "in the middle", ..."""
        box = self.drawn_box
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        row = "top" if y < 0.36 else "bottom" if y > 0.64 else ""
        column = "left" if x < 0.36 else "right" if x > 0.64 else ""
        return f"at the {row} {column}".replace("  ", " ").strip() if row or column else "in the middle"


def is_reserved(first: str, second: str) -> bool:
    """Whether a pair of objects is kept for the validation scenes. No training scene shows the two together."""
    pair = "+".join(sorted((first, second)))
    return int(hashlib.sha256(pair.encode()).hexdigest(), 16) % _RESERVED_SHARE == 0


RESERVED_PAIRS = tuple(pair for pair in itertools.combinations(OBJECTS, 2) if is_reserved(*pair))


def training_things(rng: Random) -> list[Thing]:
    """One to five objects, no reserved pair among them."""
    count = rng.choices((1, 2, 3, 4, 5), (35, 25, 18, 13, 9))[0]
    while True:
        names = rng.sample(OBJECTS, count)
        if not any(is_reserved(*pair) for pair in itertools.combinations(names, 2)):
            return [dress(name, rng) for name in names]


def validation_things(rng: Random) -> list[Thing]:
    """Two to five objects, a reserved pair among them: a combination that training never shows."""
    names = list(rng.choice(RESERVED_PAIRS))
    count = rng.choices((2, 3, 4, 5), (30, 30, 25, 15))[0]
    names += rng.sample([name for name in OBJECTS if name not in names], count - 2)
    rng.shuffle(names)
    return [dress(name, rng) for name in names]


def dress(name: str, rng: Random) -> Thing:
    """Gives an object a size and, in a quarter of the cases, a tint."""
    size = rng.choice(("small", None, "big"))
    return Thing(name, size, rng.choice(sorted(TINTS)) if rng.random() < 0.25 else None)


def summary(things: Sequence[Thing], scene: str) -> str:
    """One clean sentence: every object with its tint, and where they are."""
    words = [thing.words(size=False) for thing in things]
    return f"{_joined(words)} {scene}.".capitalize()


def tags(things: Sequence[Thing]) -> list[str]:
    """Phrases in the order of the regions, attributes before the noun."""
    return [" ".join([*thing.attributes, thing.name]) for thing in things]


def human_caption(things: Sequence[Thing], scene: str, rng: Random) -> str:
    """A careful caption, as evaluation sets have them.

    It names every object, most attributes, a place or a relation, and the background.
    """
    order = rng.sample(things, len(things))
    words = [thing.words(size=rng.random() < 0.7, tint=rng.random() < 0.9) for thing in order]
    style = rng.randrange(4)
    if len(things) == 1:
        return f"{words[0]} {scene}" if style < 2 else f"there is {words[0]} {order[0].place()}, {scene}"
    if style == 0:
        return f"{words[0]} {_relation(order[0], order[1])} {_joined(words[1:])}, {scene}"
    if style == 1:
        return f"{scene} there is {_joined(words)}"
    if style == 2:
        return f"{_joined(words)} {scene}"
    return f"{words[0]} {order[0].place()} with {_joined(words[1:])}, {scene}"


def web_caption(things: Sequence[Thing], scene: str, rng: Random) -> str:
    """A caption as the web writes them.

    Some objects are missing, some said twice, hardly an attribute is there; file names and shop words stand around.
    """
    kept = [thing for thing in things if rng.random() < 0.55]
    if not kept and rng.random() < 0.75:
        kept = [rng.choice(things)]
    rng.shuffle(kept)
    words = [" ".join(([t.tint] if t.tint and rng.random() < 0.3 else []) + [t.name]) for t in kept]
    if kept and rng.random() < 0.06:
        words.append(rng.choice(OBJECTS))
    style = rng.randrange(6)
    noun, adjective = rng.choice(_NOUNS), rng.choice(_ADJECTIVES)
    if not words:
        body = rng.choice((f"{adjective} {noun}", f"{noun} {scene}", "untitled", f"{adjective} {noun} collection"))
    elif style == 0:
        body = f"{adjective} {noun} of {_joined(words)}"
    elif style == 1:
        body = ", ".join(words) + f" {noun}"
    elif style == 2:
        body = " ".join(f"{w} {noun}" for w in words) + f" {words[0]}"
    elif style == 3:
        body = " & ".join(words).title() + f" {noun}"
    elif style == 4:
        body = f"{words[0]} {words[0]} " + " ".join(words[1:] + [adjective])
    else:
        body = "me and the " + " and the ".join(words) + rng.choice(("", " lol", "!!", " :)", f" {scene}"))
    return _with_junk(body, rng)


def _with_junk(body: str, rng: Random) -> str:
    number = rng.randrange(1000, 9999)
    shop = rng.choice(_SHOPS)
    before = ("", f"IMG_{number}.JPG ", f"DSC0{number} - ", f"{shop}: ", "Buy ", "NEW! ", f"{number}px-")
    after = (
        "",
        "",
        f" | {shop}",
        f" - {shop}",
        " free download",
        f" {rng.choice((300, 640, 1024))}x{rng.choice((250, 480, 768))}",
        f" SKU {number}",
        " - free shipping",
        f" (pack of {rng.randrange(2, 50)})",
        ".jpg",
        f" #{rng.choice(_ADJECTIVES)}",
    )
    return (rng.choice(before) if rng.random() < 0.4 else "") + body + rng.choice(after)


def _relation(first: Thing, second: Thing) -> str:
    here, there = first.drawn_box, second.drawn_box
    dx = (there[0] + there[2] - here[0] - here[2]) / 2
    dy = (there[1] + there[3] - here[1] - here[3]) / 2
    if abs(dx) > abs(dy):
        return "to the left of" if dx > 0 else "to the right of"
    return "above" if dy > 0 else "below"


def _joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
