"""The demo's report: one self-contained HTML page from the results that `training.demo` collected.

`write_report` is the only entry. It reads nothing but its argument; what a number means and where it comes from is
decided in `training.demo`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.pages import data_uri, render
from training.data.records import Region, Sample, phrase, tag_text
from training.evaluation.retrieval import rank_counts
from training.reports.plots import COLOURS, class_bars, loss_curves, loss_floor, recall_curves

TEMPLATE = Path(__file__).with_name("demo_template.html")
MEDIA_TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
HITS_SHOWN, QUERIES_SHOWN, GUESSES_SHOWN, SCENES_SHOWN, ANSWERS_SHOWN = 5, 8, 12, 6, 3
AIM_RECALL_OVER_CHANCE, AIM_TOP_1 = 50, 0.40
CAPTION_PAIR = "global_caption"


@dataclass
class ReportedRun:
    """One trained model.

    Attributes:
        name: "pyramid", "clip" or "clip_same_time".
        title: Its name for readers.
        objective: Its terms and weights.
        smoothing: Share of the targets that is spread over the other pairs, in training.
        steps: Optimizer steps.
        samples: Samples seen.
        seconds: Of training.
        log: Lines of metrics.jsonl.
        retrieval: Pair -> `retrieval_metrics`.
        zero_shot: `classification_metrics`.
        caption_scores: (Q, I) float32, cosines of held-out captions and pictures, in one order.
        object_scores: (N, C) float32, cosines of single-object pictures and classes.
    """

    name: str
    title: str
    objective: str
    smoothing: float
    steps: int
    samples: int
    seconds: float
    log: list[dict[str, Any]]
    retrieval: dict[str, dict[str, float]]
    zero_shot: Mapping[str, float | int]
    caption_scores: torch.Tensor
    object_scores: torch.Tensor


@dataclass
class ReportedDemo:
    """Everything on the page.

    Attributes:
        runs: The pyramid first, then CLIP.
        scenes: Training samples to show.
        validation: The held-out samples, in the order of `caption_scores`.
        objects: The single objects, in the order of `object_scores`.
        labels: Their class numbers.
        class_names: Names of the classes, the columns of `object_scores`.
        template_count: Prompts of a class.
        scale: The pyramid's softmax scale.
        batch_size: Pairs in an optimizer step.
        parameters: How many the model has.
        training_scenes: How many there were.
        attribution: The line that pictures made of the data must carry.
        reload: Process numbers, and what of the embeddings was compared, see `training.demo.reload_stage`.
        stages: Title, seconds, and CPU seconds of all processes, of each stage.
        setup: Machine, versions and settings.
        commands: How to repeat the parts by hand.
    """

    runs: list[ReportedRun]
    scenes: list[Sample]
    validation: list[Sample]
    objects: list[Sample]
    labels: list[int]
    class_names: list[str]
    template_count: int
    scale: float
    batch_size: int
    parameters: int
    training_scenes: int
    attribution: str
    reload: dict[str, Any]
    stages: list[tuple[str, float, float]]
    setup: str
    commands: str


def write_report(demo: ReportedDemo, path: str | Path) -> None:
    """Renders the page and writes it to `path`, whole or not at all."""
    write_atomically(path, render(TEMPLATE, page_content(demo)).encode())


def page_content(demo: ReportedDemo) -> dict[str, Any]:
    """The values that the template names: texts, data URIs, rows of tables."""
    return {
        "title": "emoji scenes",
        "colours": COLOURS,
        "attribution": demo.attribution,
        **_introduction(demo),
        **_comparison(demo),
        **_losses(demo),
        **_retrieval(demo),
        **_zero_shot(demo),
        **_reload_and_setup(demo),
    }


def picture_uri(sample: Sample) -> str:
    """The sample's picture, as it is stored, as a data URI."""
    if sample.image is None:
        raise ValueError(f"sample {sample.key} has no picture")
    return data_uri(sample.image, MEDIA_TYPES[sample.image_suffix])


def _box(region: Region) -> dict[str, Any]:
    """A region's frame in percent of the picture."""
    x1, y1, x2, y2 = (round(100 * edge, 1) for edge in region.box)
    return {"phrase": phrase(region), "left": x1, "top": y1, "width": round(x2 - x1, 1), "height": round(y2 - y1, 1)}


def percent(share: float) -> str:
    """Writes 0.1234 as "12.3 %"."""
    return f"{100 * share:.1f} %"


def _recall(run: ReportedRun, k: int = 1) -> float:
    return run.retrieval[CAPTION_PAIR][f"text_to_image_R@{k}"]


def _introduction(demo: ReportedDemo) -> dict[str, Any]:
    pyramid, clip = demo.runs[:2]
    chance = 1 / len(demo.validation)
    recall, top_1 = _recall(pyramid), pyramid.zero_shot["top_1"]
    ahead = recall > _recall(clip) and top_1 > clip.zero_shot["top_1"]
    cards = [
        {
            "label": f"Finds the right one of {len(demo.validation)} unseen pictures for a caption",
            "value": percent(recall),
            "detail": f"{recall / chance:.0f} x chance; aim {AIM_RECALL_OVER_CHANCE} x.",
            "reached": recall >= AIM_RECALL_OVER_CHANCE * chance,
        },
        {
            "label": f"Names a single object, out of {len(demo.class_names)} names, without training for it",
            "value": percent(top_1),
            "detail": f"chance {percent(1 / len(demo.class_names))}; aim {percent(AIM_TOP_1)}.",
            "reached": top_1 >= AIM_TOP_1,
        },
        {
            "label": "The same two for CLIP, equal samples",
            "value": f"{percent(_recall(clip))} · {percent(clip.zero_shot['top_1'])}",
            "detail": "The pyramid is ahead on both." if ahead else "The pyramid should be ahead on both.",
            "reached": ahead,
        },
        {
            "label": "Embeddings after saving and loading in a new process",
            "value": "bit-equal" if demo.reload["equal"] else "different",
            "detail": f"{demo.reload['numbers']:,} numbers compared.",
            "reached": demo.reload["equal"],
        },
    ]
    lead = (
        "A small PyramidCLIP was trained from scratch on noisy picture-caption pairs, on this machine. Beside "
        "the whole picture and its caption it aligns a local crop and the regions of the picture with a summary and "
        "the regions' tags. This page shows what it learned, next to CLIP (one term, hard targets) trained by the "
        "same code on the same pictures."
    )
    data_text = (
        f"{demo.training_scenes:,} training scenes of one to five objects were drawn from OpenMoji artwork. The "
        "caption is what a web page might say: objects missing or said twice, file names, shop words. CLIP sees the "
        "picture and this caption. The pyramid also gets a summary, and regions with their tags. These are the first "
        "training scenes, not chosen."
    )
    scenes = [
        {
            "picture": picture_uri(sample),
            "caption": sample.caption,
            "summary": sample.summary,
            "tags": tag_text(sample.tags or []),
            "boxes": [_box(region) for region in sample.regions or []],
        }
        for sample in demo.scenes[:SCENES_SHOWN]
    ]
    return {"cards": cards, "lead": lead, "data_text": data_text, "scenes": scenes}


def _row(
    label: str,
    values: Sequence[float],
    chance: float | None,
    best: Callable[[Sequence[float]], float] | None = max,
    text: Callable[[float], str] = percent,
) -> dict[str, Any]:
    """A row of the comparison; the best of its values stands out."""
    top = best(values) if best else None
    cells = [{"text": text(value), "best": best is not None and value == top} for value in values]
    return {"section": None, "label": label, "cells": cells, "chance": "" if chance is None else text(chance)}


def _targets(run: ReportedRun) -> str:
    """What the targets of a run's losses are."""
    return f"targets softened by {run.smoothing:g}" if run.smoothing else "hard targets"


def _comparison(demo: ReportedDemo) -> dict[str, Any]:
    runs, scenes, classes = demo.runs, len(demo.validation), len(demo.class_names)
    rows = [
        _row("samples seen", [run.samples for run in runs], None, None, "{:,}".format),
        _row("optimizer steps", [run.steps for run in runs], None, None, "{:,}".format),
        _row("training time", [run.seconds for run in runs], None, None, "{:.0f} s".format),
        _row("samples a second", [run.samples / run.seconds for run in runs], None, None, "{:.0f}".format),
    ]
    directions = {
        "text_to_image": f"Caption to picture, among {scenes} unseen scenes",
        "image_to_text": f"Picture to caption, among {scenes}",
    }
    for direction, title in directions.items():
        rows.append({"section": title})
        for k in (1, 5, 10):
            values = [run.retrieval[CAPTION_PAIR][f"{direction}_R@{k}"] for run in runs]
            rows.append(_row(f"R@{k}", values, k / scenes))
        ranks = [run.retrieval[CAPTION_PAIR][f"{direction}_mean_rank"] for run in runs]
        rows.append(_row("mean rank", ranks, (scenes + 1) / 2, min, "{:.1f}".format))
    rows.append({"section": f"Zero-shot classification of {len(demo.objects):,} pictures of single objects"})
    for k in (1, 5):
        rows.append(_row(f"top-{k}", [run.zero_shot[f"top_{k}"] for run in runs], k / classes))
    text = (
        "All models come from the same code and the same settings; only the objective differs: "
        + "; ".join(f"{run.title}: {run.objective}, {_targets(run)}" for run in runs[:2])
        + ". A step of the pyramid costs more, since it encodes more levels, so CLIP was trained once more for as "
        "long as the pyramid took."
    )
    note = (
        "R@k: the share of queries whose right answer is among the first k. The held-out scenes show pairs of objects "
        "that no training scene shows together, and their captions are careful sentences, other than all training "
        "texts. Bold: best of the row. One run each, one seed. Of the learning rates 2e-3, 1e-3, 5e-4 and 2.5e-4, "
        "the pyramid does best with 1e-3, which all runs here use, and CLIP a little better with 5e-4 "
        "(docs/ablations.md)."
    )
    return {
        "runs": runs,
        "comparison": rows,
        "comparison_text": text,
        "comparison_note": note,
        **_recall_plot(demo),
    }


def _recall_plot(demo: ReportedDemo) -> dict[str, Any]:
    key, curves = f"validation/{CAPTION_PAIR}/text_to_image_R@1", {}
    for run in demo.runs:
        measured = [line for line in run.log if key in line]
        if len(measured) > 1:
            seconds = [line["step"] / run.steps * run.seconds for line in measured]
            curves[run.name] = (run.title, seconds, [line[key] for line in measured])
    caption = (
        "Caption-to-picture R@1 on the held-out scenes while training, against time. Each run ends at its own length."
    )
    plot = recall_curves(curves, 1 / len(demo.validation)) if curves else None
    return {"recall_plot": plot, "recall_caption": caption}


def _losses(demo: ReportedDemo) -> dict[str, Any]:
    chance, pyramid = math.log(demo.batch_size), demo.runs[0]
    plots = []
    for run in demo.runs:
        lines = [line for line in run.log if "loss/total" in line]
        if not lines:
            continue
        names = [name.removeprefix("loss/") for name in lines[0] if name.startswith("loss/") and name != "loss/total"]
        terms = {name: [line[f"loss/{name}"] for line in lines] for name in names}
        last = ", ".join(f"{name} {values[-1]:.2f}" for name, values in terms.items())
        floor = loss_floor(run.smoothing, demo.batch_size)
        picture = loss_curves([line["step"] for line in lines], terms, chance, floor)
        plots.append({"picture": picture, "title": run.title, "caption": f"{run.title}. At the end: {last}."})
    text = (
        f"Each term compares one level of the picture with one level of the text, over all {demo.batch_size} pairs of "
        f"a batch. A model that knows nothing has ln {demo.batch_size} = {chance:.2f}. The pyramid's targets are "
        f"softened (a share of {pyramid.smoothing:g} goes to the other pairs, since web captions often fit other "
        f"pictures too), so even a perfect one keeps {loss_floor(pyramid.smoothing, demo.batch_size):.2f}. CLIP's are "
        "not, so its losses are lower for that reason alone."
    )
    return {"loss_plots": plots, "loss_text": text}


def _retrieval(demo: ReportedDemo) -> dict[str, Any]:
    ids = torch.arange(len(demo.validation))
    ranks = [_ranks(run.caption_scores, ids) for run in demo.runs[:2]]
    queries = []
    for number in range(min(QUERIES_SHOWN, len(demo.validation))):
        rankings = []
        for run, rank in zip(demo.runs[:2], ranks):
            best = run.caption_scores[number].argsort(descending=True, stable=True)[:HITS_SHOWN].tolist()
            hits = [
                {
                    "right": place == number,
                    "picture": picture_uri(demo.validation[place]),
                    "alt": tag_text(demo.validation[place].tags or []),
                }
                for place in best
            ]
            rankings.append({"name": run.name, "title": run.title, "rank": f"{rank[number]:g}", "hits": hits})
        sample = demo.validation[number]
        queries.append({"caption": sample.caption, "picture": picture_uri(sample), "rankings": rankings})
    text = (
        f"The first {len(queries)} held-out captions, not chosen, and the {HITS_SHOWN} nearest of all "
        f"{len(demo.validation)} held-out pictures for each model, nearest first. ✓ marks the picture that the "
        "caption was written for, ✗ another one; the picture that was sought stands at the right."
    )
    return {"queries": queries, "retrieval_text": text}


def _ranks(scores: torch.Tensor, ids: torch.Tensor) -> list[float]:
    """The place of the right candidate of each row, from 1, ties averaged."""
    return rank_counts(scores, torch.eye(scores.shape[1]), ids, torch.arange(scores.shape[1])).rank().tolist()


def _zero_shot(demo: ReportedDemo) -> dict[str, Any]:
    run, labels = demo.runs[0], torch.tensor(demo.labels)
    right = rank_counts(
        run.object_scores, torch.eye(len(demo.class_names)), labels, torch.arange(len(demo.class_names))
    ).recall(1)
    accuracy = {
        name: float(right[labels == number].mean())
        for number, name in enumerate(demo.class_names)
        if (labels == number).any()
    }
    guesses = []
    names_shown = min(GUESSES_SHOWN, len(accuracy))
    shown = [demo.labels.index(place * len(demo.class_names) // names_shown) for place in range(names_shown)]
    for number in shown:
        probabilities = torch.softmax(demo.scale * run.object_scores[number], dim=0)
        best = probabilities.topk(min(ANSWERS_SHOWN, len(demo.class_names))).indices.tolist()
        answers = [
            {
                "name": demo.class_names[place],
                "percent": round(100 * float(probabilities[place])),
                "right": place == demo.labels[number],
            }
            for place in best
        ]
        name = demo.class_names[demo.labels[number]]
        guesses.append({"picture": picture_uri(demo.objects[number]), "name": name, "answers": answers})
    text = (
        f"Pictures of one object, and {len(demo.class_names)} names to choose from. Each name is put into "
        f"{demo.template_count} prompts (“a photo of a fox.”, “a drawing of the fox.”), whose embeddings are "
        "averaged; the picture gets the nearest name. Nothing was trained for this. Here are the first pictures of "
        f"{len(shown)} names at even distances in the list, with the pyramid's {ANSWERS_SHOWN} most probable answers:"
    )
    perfect = sum(value == 1 for value in accuracy.values())
    never = sum(value == 0 for value in accuracy.values())
    counts = f"{perfect} of {len(accuracy)} always right, {never} never"
    caption = f"The pyramid's top-1 for each name ({counts}). Dashed: guessing."
    return {
        "guesses": guesses,
        "zero_shot_text": text,
        "class_plot": class_bars(accuracy, 1 / len(demo.class_names)),
        "class_caption": caption,
    }


def _reload_and_setup(demo: ReportedDemo) -> dict[str, Any]:
    reload = demo.reload
    text = (
        f"The training process (number {reload['training_process']}) embedded {reload['pictures']:,} pictures and "
        f"{reload['texts']:,} captions with the model in its memory. Then another process (number "
        f"{reload['loading_process']}) loaded the saved folder with from_pretrained and embedded them again. "
        + (
            f"All {reload['numbers']:,} numbers are equal in every bit."
            if reload["equal"]
            else f"{reload['different']:,} of {reload['numbers']:,} numbers differ, by at most {reload['largest']:.3g}."
        )
    )
    code = (
        "from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor\n\n"
        f'folder = "{reload["folder"]}"\n'
        "model, processor = PyramidCLIPModel.from_pretrained(folder), PyramidCLIPProcessor.from_pretrained(folder)"
    )
    rows = [*demo.stages, ("together", sum(row[1] for row in demo.stages), sum(row[2] for row in demo.stages))]
    stages = [{"title": title, "seconds": f"{seconds:.1f}", "cpu": f"{cpu:.1f}"} for title, seconds, cpu in rows]
    return {
        "reload_text": text,
        "reload_code": code,
        "stages": stages,
        "setup_text": f"A model of {demo.parameters:,} parameters. {demo.setup}",
        "commands": demo.commands,
    }
