"""The paper's pictures, and how well the heat maps find objects.

    python -m training.figures tsne --model DIR --data FOLDER_OR_SHARDS --output semantics.png
    python -m training.figures retrieval --models DIR DIR --data SHARDS --output retrieval.png
    python -m training.figures check --model DIR --data SHARDS

`tsne` (paper, Figure 4): t-SNE of pictures and class prompts together. `retrieval` (Figures 5 and 8): what each model
finds for a few captions, with heat maps. Both take the data that `training.evaluate` takes; `--data ROOT --dataset
cifar10` and `--data ROOT --dataset mscoco` are the paper's. `check` prints which share of a heat map lies in the box of
the object that the text names, beside the share of the picture that the box covers, and how often the region that
`pyramidclip_hf.explain` calls most relevant is that object's. Same input, same picture. Exit codes: 0, or 2 where
settings or data are wrong.
"""

import io
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyramidclip_command import CommandParser, answer_words, run_command
from training.data.records import MAX_IMAGE_PIXELS
from training.evaluation.arguments import EvaluationArguments
from training.settings.fields import check_named
from training.settings.reading import parse_settings


@dataclass(kw_only=True)
class FigureArguments:
    """What every figure takes."""

    data: str = field(
        metadata={"names": "id", "help": "folder of shards or one shard; tsne, retrieval: what training.evaluate takes"}
    )
    max_samples: int | None = field(default=None, metadata={"help": "use so many samples only"})
    allow_unfinished: bool = field(
        default=False, metadata={"help": "also shards of which a step of preparation has begun and not ended"}
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "a picture with more is an error, by its header"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the model"})
    device: str = field(default="auto", metadata={"help": "where the model runs: auto, cpu, cuda, mps"})

    def __post_init__(self) -> None:
        """Checks the name of the picture and the numbers."""
        output = getattr(self, "output", None)
        if output is not None and Path(output).suffix.lower() != ".png":
            raise ValueError(f"--output {output}: expected the name of a .png file")
        wrong = [name for name, value in vars(self).items() if type(value) in (int, float) and not value > 0]
        if wrong:
            raise ValueError(f"--{wrong[0].replace('_', '-')}: expected more than 0, got {getattr(self, wrong[0])}")


@dataclass(kw_only=True)
class SetArguments(FigureArguments):
    """What figures take that are drawn of any data that `training.evaluate` reads."""

    dataset: str | None = field(
        default=None, metadata={"help": "a named data set under --data, as in training.evaluate, e.g. cifar10, mscoco"}
    )
    split: str | None = field(default=None, metadata={"help": "split to read where the data has several"})

    def evaluation(self, model: str, **settings: Any) -> EvaluationArguments:
        """The same data as settings of `training.evaluate`.

        Args:
            model: Folder or Hub id.
            **settings: Further fields of `EvaluationArguments`.
        """
        sets = [self.dataset] if self.dataset else []
        return EvaluationArguments(
            model=model,
            data=self.data,
            dataset=sets,
            split=self.split,
            max_samples=self.max_samples,
            allow_unfinished=self.allow_unfinished,
            max_image_pixels=self.max_image_pixels,
            **settings,
        )


@dataclass(kw_only=True)
class TsneArguments(SetArguments):
    """Settings of `python -m training.figures tsne`."""

    model: str = field(metadata={"names": "id", "help": "folder of a saved model, or Hub id"})
    output: str = field(metadata={"help": "the PNG file"})
    classes: str | None = field(
        default=None,
        metadata={"names": "path", "help": "file with class names, one a line (folders also: folder<TAB>name)"},
    )
    templates: str | None = field(
        default=None,
        metadata={"names": "path", "help": "file with prompts, one a line, {} for the name; default: 80 templates"},
    )
    shown_classes: int = field(
        default=10, metadata={"help": "classes shown, spread evenly over those there are (10 as in the paper)"}
    )
    per_class: int = field(default=200, metadata={"help": "pictures of a class at most"})
    perplexity: float = field(default=30.0, metadata={"help": "of t-SNE; lowered where there are few points"})
    keep_gap: bool = field(
        default=False, metadata={"help": "do not take the mean off pictures and off prompts: the two then lie apart"}
    )


@dataclass(kw_only=True)
class RetrievalArguments(SetArguments):
    """Settings of `python -m training.figures retrieval`."""

    captions: str | None = field(
        default=None, metadata={"names": "path", "help": "captions of the pictures in --data, as in training.evaluate"}
    )
    models: list[str] = field(metadata={"names": "id", "help": "one or more folders of saved models, or Hub ids"})
    output: str = field(metadata={"help": "the PNG file"})
    titles: list[str] | None = field(default=None, metadata={"help": "names of the models in the picture"})
    queries: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "numbers of the samples whose captions are searched with"}
    )
    top: int = field(default=5, metadata={"help": "pictures shown for a caption"})

    def __post_init__(self) -> None:
        """Checks that there is a title for each model."""
        super().__post_init__()
        if self.titles is not None and len(self.titles) != len(self.models):
            raise ValueError(f"--titles: expected {len(self.models)}, one a model, got {len(self.titles)}")


@dataclass(kw_only=True)
class CheckArguments(FigureArguments):
    """Settings of `python -m training.figures check`."""

    model: str = field(metadata={"names": "id", "help": "folder of a saved model, or Hub id"})
    prompt: str = field(
        default="a {phrase}",
        metadata={
            "help": "text for an object; {label} its name, {phrase} with attributes, e.g. 'a photo of a {label}.'"
        },
    )

    def __post_init__(self) -> None:
        """Checks the names in the prompt."""
        super().__post_init__()
        rest = self.prompt.replace("{label}", "").replace("{phrase}", "")
        if rest == self.prompt or "{" in rest or "}" in rest:
            raise ValueError(f"--prompt {self.prompt!r}: expected a text with {{label}} or {{phrase}}")


# What can be asked for.
NAMES = {"tsne": TsneArguments, "retrieval": RetrievalArguments, "check": CheckArguments}


def parse(argv: Sequence[str]) -> FigureArguments:
    """The settings of the figure, or of the check, that the words of the command line stand for."""
    if argv and argv[0] in ("-h", "--help", "--version"):
        usage = f"%(prog)s {{{','.join(NAMES)}}} [--flag value ...]"
        CommandParser(usage=usage, description=__doc__).parse_args(argv[:1])
    if not argv or argv[0] not in NAMES:
        got = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"expected one of {', '.join(NAMES)}, as in `python -m training.figures tsne`, got {got}")
    name, *words = argv
    kind = NAMES[name]
    return check_named(parse_settings(kind, words, kind.__doc__, config=False, command=name))


if __name__ == "__main__":
    answer_words(parse)

import numpy as np
from PIL import Image

from pyramidclip_hf.explain import explain_image, explain_regions
from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.loading import load_model, warn_of_slow_type
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES, class_embeddings, image_embeddings, retrieve, text_embeddings
from training.data.records import Sample, best_objects, phrase
from training.data.samples import ShardSamples, open_picture
from training.data.shards import read_dataset_json
from training.evaluation.arguments import read_templates
from training.evaluation.tasks import open_labelled, open_samples
from training.reports.plots import INK, SOFT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


RIGHT_COLOUR = "#17804a"


def attribution_of(data: str) -> str | None:
    """The line that pictures made of this data must carry, where its `dataset.json` has one."""
    folder = (data.rpartition("/")[0] or ".") if data.endswith(".tar") else data
    return (read_dataset_json(folder) or {}).get("attribution")


def _picture(sample: Sample, max_image_pixels: int) -> Image.Image:
    if sample.image is None:
        raise ValueError(f"sample {sample.key} has no picture")
    return open_picture(sample.image, sample.key, max_image_pixels)


##################################################################################################
#  t-SNE                                                                                         #
##################################################################################################


def tsne_points(pictures: np.ndarray, prompts: np.ndarray, perplexity: float, keep_gap: bool = False) -> np.ndarray:
    """Places of N pictures and C prompts in the plane, by cosine distances; one seed.

    Pictures and texts of a contrastive model lie in two cones (Liang et al., NeurIPS 2022), which t-SNE would show and
    little else. Rankings do not depend on it, so the mean of each is taken off, unless `keep_gap`.

    Args:
        pictures: (N, D) float, unit vectors.
        prompts: (C, D) float, unit vectors.
        perplexity: Of t-SNE; lowered where there are few points.
        keep_gap: Whether the means stay.

    Returns:
        (N + C, 2) float32.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError('t-SNE needs scikit-learn: pip install -e ".[eval]"') from error
    if not keep_gap:
        pictures, prompts = pictures - pictures.mean(axis=0), prompts - prompts.mean(axis=0)
    points = np.concatenate([pictures, prompts]).astype(np.float64)
    perplexity = min(perplexity, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, metric="cosine", init="random", random_state=0).fit_transform(points)


def draw_tsne(args: TsneArguments) -> str:
    """Draws the figure and returns what it shows in a line."""
    data = open_labelled(args.evaluation(args.model, task="zero-shot", classes=args.classes), args.dataset)
    count = min(args.shown_classes, len(data.class_names))
    shown = [number * len(data.class_names) // count for number in range(count)]
    chosen = [
        picture
        for number in shown
        for picture in [p for p, label in enumerate(data.labels) if label == number][: args.per_class]
    ]
    if count < 2 or len(chosen) < 4:
        raise ValueError(f"{args.data}: t-SNE needs two classes and four pictures, got {count} and {len(chosen)}")
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    model, processor = loaded.model, loaded.processor
    names = [data.class_names[number] for number in shown]
    templates = read_templates(args.templates) or IMAGENET_TEMPLATES
    prompts = class_embeddings(model, processor, names, templates, progress=True)
    pictures = image_embeddings(model, processor, map(data.read, chosen), progress=True)
    points = tsne_points(pictures.numpy(), prompts.numpy(), args.perplexity, args.keep_gap)
    labels = np.array([shown.index(data.labels[picture]) for picture in chosen])

    figure = _figure((9, 7.4), _title(args.model), attribution_of(args.data))
    axes = figure.subplots()
    axes.set_axis_off()
    colours = _class_colours(count)
    for number, (name, colour) in enumerate(zip(names, colours)):
        along, up = points[: len(chosen)][labels == number].T
        axes.scatter(along, up, s=14, color=colour, alpha=0.55, linewidths=0)
        stars = points[len(chosen) :]
        x, y = stars[number]
        axes.scatter(x, y, s=230, marker="*", color=colour, edgecolors=INK, linewidths=0.9, zorder=3)
        others = np.delete(stars, number, axis=0) - stars[number]
        right, above = others[np.square(others).sum(axis=1).argmin()] <= 0  # the label points away from the nearest
        axes.annotate(
            name, (x, y), xytext=(8 if right else -8, 7 if above else -7), textcoords="offset points", fontsize=10,
            ha="left" if right else "right", va="bottom" if above else "top", color=INK, zorder=4,
            bbox={"facecolor": "white", "alpha": 0.6, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    _save(figure, args.output)
    return f"{args.output}: {len(chosen)} pictures and {count} prompts"


def _class_colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 20:
        return [colormaps["tab10" if count <= 10 else "tab20"](number) for number in range(count)]
    return [colormaps["hsv"](number / count) for number in range(count)]


##################################################################################################
#  Retrieval with heat maps                                                                      #
##################################################################################################


def draw_retrieval(args: RetrievalArguments) -> str:
    """Draws the figure and returns what it shows in a line."""
    samples = open_samples(args.evaluation(args.models[0], captions=args.captions), args.dataset)
    outside = [query for query in args.queries if not 0 <= query < len(samples)]
    if outside:
        raise ValueError(f"--queries {outside[0]}: {args.data} has samples 0 to {len(samples) - 1}")
    captions = []
    for query in args.queries:
        caption = samples[query].caption
        if caption is None:
            raise ValueError(f"--queries {query}: that sample has no caption")
        captions.append(caption)
    top = min(args.top, len(samples))
    rows = len(args.queries) * len(args.models)
    figure = _figure((1.85 * top + 1.3, 2.15 * rows + 0.5 * len(args.queries)), None, attribution_of(args.data))
    blocks = figure.subfigures(len(args.queries), 1, squeeze=False)[:, 0]
    grids = [np.reshape(block.subplots(len(args.models), top), (len(args.models), top)) for block in blocks]
    for block, caption in zip(blocks, captions):
        block.suptitle("\n".join(textwrap.wrap(f"“{caption}”", 21 * top)), fontsize=11, color=INK)
    hits = []
    for row, name in enumerate(args.models):
        loaded = load_model(name, dtype=args.dtype, device=args.device)
        model, processor = loaded.model, loaded.processor
        pictures = (_picture(sample, args.max_image_pixels) for sample in samples)
        matches = retrieve(
            text_embeddings(model, processor, captions),
            image_embeddings(model, processor, pictures, progress=True),
            top,
        )
        hits.append(0)
        for grid, query, caption, found in zip(grids, args.queries, captions, matches.indices.tolist()):
            hits[-1] += query in found
            grid[row, 0].set_ylabel(args.titles[row] if args.titles else _title(name), fontsize=10, color=INK)
            for axes, number in zip(grid[row], found):
                picture = _picture(samples[number], args.max_image_pixels)
                explanation = explain_image(model, processor, picture, caption)
                _draw_hit(axes, explanation.overlay(picture), explanation.score, number == query)
    _save(figure, args.output)
    found = ", ".join(f"{_title(name)} {count} of {len(captions)}" for name, count in zip(args.models, hits))
    return f"{args.output}: the right picture among the first {top}: {found}"


def _draw_hit(axes: "Axes", picture: Image.Image, score: float, right: bool) -> None:
    """One found picture; the right one has a green frame and says so."""
    axes.imshow(picture)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=RIGHT_COLOUR if right else "#c9cfda", linewidth=4 if right else 0.8)
    axes.set_xlabel(
        f"{score:.2f}{', the right one' if right else ''}", fontsize=9, color=RIGHT_COLOUR if right else SOFT
    )


##################################################################################################
#  The check                                                                                     #
##################################################################################################


@dataclass
class Localisation:
    """One entry an object that a text named, each list of the same length.

    Attributes:
        mass: Share of the heat inside the object's box.
        area: Share of the picture that the box covers.
        hit: Whether the hottest pixel lies in the box.
        found: Whether the most relevant region is the object's; None without features.
        chance: 1 / regions.
    """

    mass: list[float]
    area: list[float]
    hit: list[bool]
    found: list[bool | None]
    chance: list[float]


def localisation(
    model: PyramidCLIPModel,
    processor: PyramidCLIPProcessor,
    samples: Sequence[Sample],
    prompt: str = "a {phrase}",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> Localisation:
    """How well heat maps and region relevances find the objects of samples with labelled boxes.

    Each region with a label of its own in its picture is asked for. A map of zeros has mass 0.

    Args:
        model: In evaluation mode.
        processor: Its processor.
        samples: With pictures, and with regions that have labels.
        prompt: Text for an object, see `CheckArguments`.
        max_image_pixels: Of a picture, at most.

    Raises:
        ValueError: No sample has such a region.
    """
    from tqdm.auto import tqdm

    result = Localisation([], [], [], [], [])
    for sample in map(best_objects, tqdm(samples, unit="picture", desc="explaining")):
        regions, picture = sample.regions or [], None
        labels = [region.label for region in regions]
        for place, region in enumerate(regions):
            if not region.label or labels.count(region.label) > 1:
                continue
            picture = picture or _picture(sample, max_image_pixels)
            text = prompt.replace("{label}", region.label).replace("{phrase}", phrase(region))
            heat = explain_image(model, processor, picture, text).heat
            inside = _inside(region.box, heat.shape)
            total = float(heat.sum(dtype=np.float64))
            result.mass.append(float(heat[inside].sum(dtype=np.float64)) / total if total else 0.0)
            result.area.append(float(inside.mean()))
            result.hit.append(bool(total and inside.flat[heat.argmax()]))
            result.found.append(None)
            result.chance.append(1 / len(regions))
            if sample.roi is not None:
                boxes = [one.box for one in regions]
                inputs = processor(regions=[(sample.roi, boxes)], images_kwargs={"return_tensors": "pt"})
                relevance = explain_regions(model, processor, inputs["roi_features"], text).relevance
                result.found[-1] = int(relevance.argmax()) == place
    if not result.mass:
        raise ValueError("no sample has a region whose label no other region of the picture has; nothing to check")
    return result


def _inside(box: Sequence[float], shape: tuple[int, int]) -> np.ndarray:
    """(height, width) bool: pixels whose centre lies in the box x1, y1, x2, y2 (0..1)."""
    y, x = ((np.arange(length) + 0.5) / length for length in shape)
    return ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))


def print_check(args: CheckArguments) -> str:
    """Runs the check and returns its table."""
    loaded = load_model(args.model, dtype=args.dtype, device=args.device)
    model, processor = loaded.model, loaded.processor
    samples = ShardSamples(args.data, args.max_samples, args.allow_unfinished)
    found = localisation(model, processor, samples, args.prompt, args.max_image_pixels)
    mass, area = np.array(found.mass), np.array(found.area)
    asked = [one for one in found.found if one is not None]
    lines = [
        f"objects asked for                     {len(mass)}, as {args.prompt!r}",
        f"heat inside the object's box, mean    {mass.mean():.3f}",
        f"area of that box, mean                {area.mean():.3f}",
        f"more heat inside than area            {(mass > area).mean():.1%} of the objects",
        f"hottest pixel inside the box          {np.mean(found.hit):.1%}",
        f"no heat at all                        {(mass == 0).mean():.1%}" if (mass == 0).any() else "",
    ]
    if asked:
        chance = np.mean([share for share, one in zip(found.chance, found.found) if one is not None])
        lines.append(f"most relevant region is the object's  {np.mean(asked):.1%} (guessing: {chance:.1%})")
    return "\n".join(line for line in lines if line)


##################################################################################################
#  Drawing                                                                                       #
##################################################################################################


def _title(name: str) -> str:
    """What a model is called in a figure: its folder, or the run's where that is only called "final"."""
    path = Path(name)
    return path.parent.name if path.name == "final" and path.parent.name else path.name


def _figure(size: tuple[float, float], title: str | None, attribution: str | None) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install -e ".[eval]"') from error
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(title, fontsize=13, color=INK)
    if attribution:
        figure.supxlabel("\n".join(textwrap.wrap(attribution, int(13 * size[0]))), fontsize=7.5, color=SOFT)
    return figure


def _save(figure: "Figure", output: str) -> None:
    import matplotlib

    file = io.BytesIO()
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, file.getvalue())


# The function that draws and returns what to print.
FIGURES: dict[type[FigureArguments], Callable[[Any], str]] = {
    TsneArguments: draw_tsne,
    RetrievalArguments: draw_retrieval,
    CheckArguments: print_check,
}


def run(args: FigureArguments) -> None:
    """Draws or checks, and says what."""
    warn_of_slow_type("--dtype", args.dtype, args.device)
    print(FIGURES[type(args)](args))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
