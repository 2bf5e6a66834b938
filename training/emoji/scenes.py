"""Builds "emoji scenes": a small pyramid with known truth, made from OpenMoji artwork without any download.

    python -m training.emoji.scenes --output-dir DIR [--seed 0] [--train 16000] [--validation 1000]

Three folders of shards (docs/data.md), each with `dataset.json`:

`train`: scenes of one to five objects. `KEY.txt` is a web-like caption: objects missing or said twice, file names,
shop words. Beside it a clean summary, tags, exact regions and their 2048-d descriptors
(`pictures.describe_regions`). `--detector-names` and `--detector-mistakes` spoil regions and tags the way a real
detector does; pictures, captions and summaries stay the same.

`validation`: scenes of two to five objects with at least one pair of objects that no training scene shows together,
no two scenes of the same objects. `KEY.txt` is a careful caption such as evaluation sets have (other sentences than
the training captions or summaries); the web-like one is in `KEY.json` as `web_caption`.

`objects`: single objects for zero-shot classification, `--per-object` pictures of each; `KEY.json` has `class_name`
and `class_index`, the folder has `classes.txt`, one name a line.

`--format coco` or `voc` writes the first two splits as `training.detection` reads them instead, for a detector: the
same pictures, with exact boxes and, in COCO's file, masks.

The pictures contain OpenMoji artwork (CC BY-SA 4.0); `dataset.json` carries the attribution. Each scene is a function
of (seed, split, number): the same settings give the same bytes with any number of workers, and a build that was
stopped continues with the shards that are missing.
"""

import io
import json
import math
import os
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from pyramidclip_command import run_command
from pyramidclip_hf.files import json_text, write_atomically, written_aside
from training.data.records import Region, Sample
from training.data.shard_index import index_path
from training.data.shards import ShardWriter, read_dataset_json, write_dataset_json
from training.emoji import pictures, words
from training.emoji.annotated import WRITERS, Drawn
from training.prepare.steps.flags import parse_dataclasses

SCENES_VERSION = 3
SPLITS = ("train", "validation", "objects")
# How many scenes of each (of a single object for the last) there are where nothing else is asked for.
TRAIN, VALIDATION, PER_OBJECT = 12_000, 500, 12
# x1, y1, x2, y2 in pixels.
PixelBox = tuple[int, int, int, int]


@dataclass
class SceneArguments:
    """What is drawn, and where it goes."""

    output_dir: str | None = field(default=None, metadata={"help": "Folder for train/, validation/ and objects/."})
    seed: int = field(default=0, metadata={"help": "Everything is a function of it."})
    train: int = field(default=16000, metadata={"help": "Number of training scenes."})
    validation: int = field(default=1000, metadata={"help": "Number of validation scenes, unseen combinations."})
    per_object: int = field(
        default=12, metadata={"help": "Pictures of each single object for zero-shot classification."}
    )
    picture_size: int = field(default=96, metadata={"help": "Side of the square pictures in pixels."})
    shard_size: int = field(default=1000, metadata={"help": "Samples in a shard."})
    detector_names: int = field(
        default=len(words.OBJECTS),
        metadata={"help": "How many kinds of objects the detector of the training scenes knows; it finds no other."},
    )
    detector_mistakes: float = field(
        default=0.0,
        metadata={"help": "Share of its objects that it misses, and again of those that it calls by another name."},
    )
    workers: int = field(default=2, metadata={"help": "Processes that draw."})
    format: Literal["shards", "coco", "voc"] = field(
        default="shards",
        metadata={"help": "coco, voc: the scenes with exact boxes (coco: and masks) for training.detection."},
    )
    contact_sheet: str | None = field(default=None, metadata={"help": "Draw some samples into this PNG file."})


@dataclass(frozen=True)
class Recipe:
    """What the content of the shards depends on, and nothing else."""

    seed: int
    train: int
    validation: int
    per_object: int
    picture_size: int
    shard_size: int
    detector_names: int = len(words.OBJECTS)
    detector_mistakes: float = 0.0
    version: int = SCENES_VERSION

    def __post_init__(self) -> None:
        for name in ("train", "validation", "per_object", "picture_size", "shard_size"):
            least = 1 if name.endswith("_size") else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected a number of at least {least}, got {getattr(self, name)}")
        if not 2 <= self.detector_names <= len(words.OBJECTS):
            raise ValueError(f"detector_names: expected 2 to {len(words.OBJECTS)} names, got {self.detector_names}")
        if not 0 <= self.detector_mistakes <= 0.5:
            raise ValueError(f"detector_mistakes: expected a share from 0 to 0.5, got {self.detector_mistakes}")

    def count(self, split: str) -> int:
        """Number of samples of a split."""
        return len(words.OBJECTS) * self.per_object if split == "objects" else getattr(self, split)


def scene_rng(recipe: Recipe, split: str, number: int) -> random.Random:
    """The random numbers of one sample."""
    return random.Random(f"emoji scenes {recipe.version} {recipe.seed} {split} {number}")


def plan_validation(recipe: Recipe) -> list[list[words.Thing]]:
    """The objects of every validation scene: no two scenes show the same objects."""
    seen: set[frozenset[str]] = set()
    plan: list[list[words.Thing]] = []
    for number in range(recipe.validation):
        rng = scene_rng(recipe, "validation objects", number)
        while True:
            things = words.validation_things(rng)
            names = frozenset(thing.name for thing in things)
            if names not in seen:
                break
        seen.add(names)
        plan.append(things)
    return plan


def names_of_detector(recipe: Recipe) -> tuple[str, ...]:
    """The names of objects that the detector of the training scenes knows, in the order of `OBJECTS`."""
    chosen = random.Random(f"detector {recipe.seed}").sample(words.OBJECTS, recipe.detector_names)
    return tuple(name for name in words.OBJECTS if name in chosen)


def detect(
    recipe: Recipe, number: int, things: Sequence[words.Thing], boxes: Sequence[PixelBox]
) -> tuple[list[words.Thing], list[PixelBox]]:
    """What the detector says of training scene `number`: the things that it finds, as it names them, and their boxes.

    All of them, rightly named, unless the recipe says otherwise.
    """
    rng, known = scene_rng(recipe, "detector", number), names_of_detector(recipe)
    found: list[tuple[words.Thing, PixelBox]] = []
    for thing, box in zip(things, boxes):
        luck, other = rng.random(), rng.choice([name for name in known if name != thing.name])
        if thing.name not in known or luck < recipe.detector_mistakes:
            continue
        found.append((replace(thing, name=other) if luck < 2 * recipe.detector_mistakes else thing, box))
    return [thing for thing, _ in found], [box for _, box in found]


def _chosen(
    recipe: Recipe, split: str, number: int, things: Sequence[words.Thing] | None, rng: random.Random
) -> tuple[Sequence[words.Thing], str]:
    """The things of a sample and its background, the first numbers that `rng` gives."""
    if split == "objects":
        things = [words.dress(words.OBJECTS[number % len(words.OBJECTS)], rng)]
    elif split == "train":
        things = words.training_things(rng)
    return things or [], rng.choice(sorted(pictures.BACKGROUNDS))


def make_annotated(recipe: Recipe, split: str, number: int, things: Sequence[words.Thing] | None = None) -> Drawn:
    """What a detector learns of sample `number`: its bytes as in the shards, names, exact boxes and masks."""
    rng = scene_rng(recipe, split, number)
    chosen, scene = _chosen(recipe, split, number, things, rng)
    masks: list[np.ndarray] = []
    picture, shown, boxes = draw_scene(chosen, scene, recipe.picture_size, rng, masks)
    kept = [i for i, mask in enumerate(masks) if mask.any()]  # what later ones cover whole is not to be seen
    return as_jpeg(picture), [shown[i].name for i in kept], [boxes[i] for i in kept], [masks[i] for i in kept]


def as_jpeg(picture: Image.Image) -> bytes:
    """Encoded as everywhere here."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def build_annotated(recipe: Recipe, folder: str | Path, form: str) -> None:
    """Draws the training and validation scenes into the folders of VOC or COCO, boxes and masks with them.

    Raises:
        ValueError: it holds scenes of another recipe, or the recipe has a detector that errs: boxes here are exact.
    """
    if recipe.detector_names < len(words.OBJECTS) or recipe.detector_mistakes:
        raise ValueError("boxes are exact here: leave out --detector-names and --detector-mistakes")
    claim_folder(recipe, folder)
    for split in SPLITS[:2]:
        plan = plan_validation(recipe) if split == "validation" else None
        scenes = [make_annotated(recipe, split, n, plan[n] if plan else None) for n in range(recipe.count(split))]
        WRITERS[form](Path(folder), split, scenes, recipe.picture_size)


def make_sample(recipe: Recipe, split: str, number: int, things: Sequence[words.Thing] | None = None) -> Sample:
    """Sample `number` of a split; `things` from `plan_validation` for validation scenes."""
    rng = scene_rng(recipe, split, number)
    extra: dict[str, str | int] = {}
    if split == "objects":
        index = number % len(words.OBJECTS)
        extra = {"class_name": words.OBJECTS[index], "class_index": index}
    chosen, scene = _chosen(recipe, split, number, things, rng)
    picture, things, boxes = draw_scene(chosen, scene, recipe.picture_size, rng)
    if split == "train":
        caption = words.web_caption(things, scene, rng)
    else:
        caption = words.human_caption(things, scene, rng)
        extra["web_caption"] = words.web_caption(things, scene, rng)
    found, boxes = detect(recipe, number, things, boxes) if split == "train" else (things, boxes)
    # Stands in for a detector's confidence: larger objects are surer, and regions come in that order.
    regions = [
        Region(
            thing.drawn_box,
            round(min(0.99, 0.5 + max(b[2] - b[0], b[3] - b[1]) / recipe.picture_size), 3),
            thing.name,
            thing.attributes,
        )
        for thing, b in zip(found, boxes)
    ]
    return Sample(
        key=f"{split}-{number:07d}",
        image=as_jpeg(picture),
        image_suffix="jpg",
        caption=caption,
        summary=words.summary(things, scene),
        tags=words.tags(found),
        regions=regions,
        roi=pictures.describe_regions(picture, boxes) if boxes else None,
        extra={"scene": scene, **extra},
    )


def draw_scene(
    things: Sequence[words.Thing],
    scene: str,
    size: int,
    rng: random.Random,
    masks: list[np.ndarray] | None = None,
) -> tuple[Image.Image, list[words.Thing], list[PixelBox]]:
    """Draws the objects on a background.

    Args:
        things: what is drawn; their boxes are filled in.
        scene: the background.
        size: side of the picture in pixels.
        rng: decides places and pixels.
        masks: gets (size, size) bool of each thing, what later ones cover left out, in the order of the result.

    Returns:
        The picture, the things and their boxes in pixels, largest first.
    """
    # NumPy's generator draws the pixels of backgrounds, seeded from the scene's own numbers.
    picture = pictures.background(scene, size, np.random.default_rng(rng.getrandbits(64)))
    sides = {thing.name: rng.uniform(*words.SIZES[thing.size]) * size for thing in things}
    things = sorted(things, key=lambda thing: -sides[thing.name])
    taken: list[tuple[tuple[float, float], float]] = []
    boxes: list[PixelBox] = []
    drawn: list[np.ndarray] = []
    for thing in things:
        side = sides[thing.name]
        centre = _free_place(side, size, taken, rng)
        box = pictures.place_sprite(
            picture, thing.name, thing.tint, side, centre, rng.uniform(-15, 15), rng.random() < 0.5, drawn
        )
        taken.append((centre, side))
        boxes.append(box)
        x1, y1, x2, y2 = (round(v / size, 4) for v in box)
        thing.box = (x1, y1, x2, y2)
    order = sorted(range(len(things)), key=lambda i: -max(boxes[i][2] - boxes[i][0], boxes[i][3] - boxes[i][1]))
    if masks is not None:
        masks.extend(drawn[i] for i in order)
    return picture, [things[i] for i in order], [boxes[i] for i in order]


def _free_place(
    side: float, size: int, taken: Sequence[tuple[tuple[float, float], float]], rng: random.Random
) -> tuple[float, float]:
    """A centre for a square of `side`, the one of 25 tries that is covered least by what is there."""
    best, least = (0.0, 0.0), math.inf
    for _ in range(25):
        x, y = (rng.uniform(side / 2, size - side / 2) for _ in range(2))
        covered = 0.0
        for (other_x, other_y), other in taken:
            half = (side + other) / 2
            covered += max(0.0, half - abs(x - other_x)) * max(0.0, half - abs(y - other_y)) / min(side, other) ** 2
        if covered < least:
            best, least = (x, y), covered
        if least == 0:
            break
    return best


def write_shard(recipe: Recipe, folder: str | Path, split: str, shard: int) -> int:
    """Writes shard number `shard` of a split, unless it is there; returns the number of samples in it."""
    path = Path(folder) / split / f"{split}-{shard:05d}.tar"
    numbers = range(shard * recipe.shard_size, min((shard + 1) * recipe.shard_size, recipe.count(split)))
    if path.exists() and index_path(path).exists():
        return len(numbers)
    plan = plan_validation(recipe) if split == "validation" else None
    with ShardWriter(path) as writer:
        for number in numbers:
            writer.write(make_sample(recipe, split, number, plan[number] if plan else None))
    return len(numbers)


def claim_folder(recipe: Recipe, folder: str | Path) -> None:
    """Writes the recipe into the folder, or checks that the one there is the same.

    A folder that was drawn before the detector had settings has one without mistakes.

    Raises:
        ValueError: it has another; the settings that differ are named.
    """
    path = Path(folder) / "recipe.json"
    wanted = asdict(recipe)
    if path.exists():
        without_mistakes = {"detector_names": Recipe.detector_names, "detector_mistakes": Recipe.detector_mistakes}
        found = without_mistakes | json.loads(path.read_text(encoding="utf-8"))
        if found != wanted:
            differ = [f"{k}: {found.get(k)!r} there, {v!r} asked for" for k, v in wanted.items() if found.get(k) != v]
            raise ValueError(
                f"{folder} holds scenes of other settings ({'; '.join(differ)}); use another folder or remove it"
            )
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json_text(wanted, indent=1) + "\n").encode())


def build(recipe: Recipe, folder: str | Path, workers: int = 2, progress: bool = True) -> None:
    """Builds the three splits in `folder`, continuing where an earlier build stopped.

    Raises:
        ValueError: it holds scenes of another recipe.
        ImportError: the extra is missing.
    """
    from tqdm.auto import tqdm

    claim_folder(recipe, folder)
    jobs = [(split, shard) for split in SPLITS for shard in range(-(-recipe.count(split) // recipe.shard_size))]
    total = sum(recipe.count(split) for split in SPLITS)
    with tqdm(total=total, unit="scene", desc="emoji scenes", disable=not progress) as bar:
        if workers <= 1:
            for split, shard in jobs:
                bar.update(write_shard(recipe, folder, split, shard))
        else:
            # Without a limit every process runs its small products on all cores, which made the build five times
            # slower.
            for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
                os.environ.setdefault(name, "1")
            pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
            try:
                running = [pool.submit(write_shard, recipe, folder, split, shard) for split, shard in jobs]
                for done in as_completed(running):
                    bar.update(done.result())
            finally:
                pool.shutdown(cancel_futures=True)
    for split in SPLITS:
        _describe_split(recipe, Path(folder), split)


def _describe_split(recipe: Recipe, folder: Path, split: str) -> None:
    if read_dataset_json(folder / split) is not None:
        return
    # Any: JSON.
    extra: dict[str, Any] = {}
    if split == "train":
        extra["detector"] = {"names": names_of_detector(recipe), "mistakes": recipe.detector_mistakes}
    if split == "objects":
        extra["classes"] = list(words.OBJECTS)
        write_atomically(folder / split / "classes.txt", ("\n".join(words.OBJECTS) + "\n").encode())
    write_dataset_json(
        folder / split,
        dict.fromkeys(("caption", "summary", "tags", "regions"), f"emoji_scenes version {recipe.version}"),
        pictures.DESCRIPTOR_SIZE,
        {"objects": len(words.OBJECTS)},
        attribution=pictures.ATTRIBUTION,
        license="CC BY-SA 4.0",
        **extra,
    )


def draw_contact_sheet(recipe: Recipe, path: str | Path) -> None:
    """Writes a labelled sheet of eight training scenes and one validation scene as PNG."""
    samples = [make_sample(recipe, "train", number) for number in range(8)]
    samples.append(make_sample(recipe, "validation", 0, plan_validation(recipe)[0]))
    sheet = pictures.contact_sheet(samples)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        sheet.quantize(192, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(aside, "PNG", optimize=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def parse(words: Sequence[str]) -> SceneArguments:
    """The words of the command as settings. Raises `ValueError`."""
    (arguments,) = parse_dataclasses(words, __doc__, SceneArguments)
    if not arguments.output_dir and not arguments.contact_sheet:
        raise ValueError("nothing to do: give --output-dir DIR, --contact-sheet FILE.png or both")
    return arguments


def run(arguments: SceneArguments) -> None:
    """Builds, and says what was built."""
    recipe = Recipe(**{name.name: getattr(arguments, name.name) for name in fields(Recipe) if name.name != "version"})
    if arguments.output_dir:
        start = time.monotonic()
        if arguments.format == "shards":
            build(recipe, arguments.output_dir, arguments.workers)
        else:
            build_annotated(recipe, arguments.output_dir, arguments.format)
        splits = SPLITS if arguments.format == "shards" else SPLITS[:2]
        counts = ", ".join(f"{recipe.count(split)} {split}" for split in splits)
        print(f"{arguments.output_dir}: {counts}; {time.monotonic() - start:.1f} s")
    if arguments.contact_sheet:
        draw_contact_sheet(recipe, arguments.contact_sheet)


if __name__ == "__main__":
    sys.exit(main())
