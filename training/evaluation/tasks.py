"""What `python -m training.evaluate` measures: the data that its settings name, and one function a task.

A task is a function `(scoring, args) -> list of EvalResult` in `TASKS`. A scoring says how pictures and texts are
compared: by their embeddings, as here, or by their tokens (`training.loop.token_scoring`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import EvalResult

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.picture_files import pictures_below
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.labelled import LabelledPictures, open_pictures
from training.data.samples import Samples, ShardSamples
from training.evaluation.arguments import EvaluationArguments, read_templates
from training.evaluation.captions import CaptionedPictures, captioned_folder, open_captions
from training.evaluation.classification import classification_metrics, zero_shot_scores
from training.evaluation.embedding import embed_levels, levels_of_pairs
from training.evaluation.hub import CaptionedRows, is_hub_data, labelled_hub
from training.evaluation.results import average_results, hub_identifier
from training.evaluation.retrieval import level_metrics
from training.evaluation.sets import open_set


def open_samples(args: EvaluationArguments, dataset: str | None = None) -> Samples:
    """The samples for retrieval that `dataset`, or else `--captions` or `--data`, names.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: the data is not what is expected.
        ImportError: a package is absent; the message names the extra.
    """
    if dataset:
        return open_captions(dataset, args.data, args.split, args.max_samples)
    if args.captions:
        return captioned_folder(args.captions, args.data, args.split, args.max_samples)
    if is_hub_data(args.data):
        columns = (args.image_column, args.caption_column)
        return CaptionedRows(args.data, args.split, args.subset, *columns, args.max_samples)
    no_shards = os.path.isdir(args.data) and not any(Path(args.data).glob("*.tar"))
    if no_shards and next(pictures_below(args.data), None) is not None:
        raise ValueError(
            f"--data {args.data} holds pictures without captions: --captions FILE names those for retrieval; classes, "
            "each in a sub-folder, are for --task zero-shot"
        )
    return ShardSamples(args.data, args.max_samples, args.allow_unfinished)


class Scoring(Protocol):
    """How pictures and texts are compared; all processes call it together and get the same.

    Attributes:
        name: what results say beside a level pair; "" for embeddings.
    """

    name: str

    def retrieval(self, samples: Samples, args: EvaluationArguments) -> Mapping[str, Mapping[str, float | int]]:
        """Pair of `args.levels` -> its metrics, see `retrieval_metrics`."""
        ...

    def zero_shot(
        self, data: LabelledPictures, templates: Sequence[str] | None, args: EvaluationArguments
    ) -> torch.Tensor:
        """(N, C) float32, scores of pictures and classes; `templates` as `zero_shot_scores`."""
        ...


@dataclass
class EmbeddingScoring:
    """By the cosine of two embeddings."""

    model: PyramidCLIPModel
    processor: PyramidCLIPProcessor
    name: str = ""

    def retrieval(self, samples: Samples, args: EvaluationArguments) -> Mapping[str, Mapping[str, float | int]]:
        """See `Scoring`."""
        embedded = embed_levels(
            self.model,
            self.processor,
            samples,
            levels_of_pairs(args.levels),
            args.batch_size,
            args.local_view_area,
            max_regions=args.max_regions,
            drop_repeated_tags=args.drop_repeated_tags,
            max_image_pixels=args.max_image_pixels,
        )
        return level_metrics(embedded.embeds, args.levels, embedded.present, embedded.owners, args.chunk_size)

    def zero_shot(
        self, data: LabelledPictures, templates: Sequence[str] | None, args: EvaluationArguments
    ) -> torch.Tensor:
        """See `Scoring`."""
        return zero_shot_scores(self.model, self.processor, data, templates, args.batch_size)


def evaluate_retrieval(scoring: Scoring, args: EvaluationArguments) -> list[EvalResult]:
    """Recall at 1, 5, 10 and mean rank, both directions, for each data set and level pair of the arguments."""
    results = []
    for samples in [open_samples(args, name) for name in args.dataset or (None,)]:
        if isinstance(samples, (CaptionedPictures, CaptionedRows)):
            _check_levels_of_captions(args.levels, samples.name)
        metrics = scoring.retrieval(samples, args)
        results += [
            _result(args, samples, "image-text-retrieval", metric, value, dataset_config=f"{pair}{scoring.name}")
            for pair, values in metrics.items()
            for metric, value in values.items()
        ]
    return results


def _check_levels_of_captions(pairs: Sequence[str], name: str) -> None:
    impossible = [pair for pair in pairs if pair not in ("global_caption", "local_caption")]
    if impossible:
        raise ValueError(
            f"{name} has pictures and captions only, so --levels {' '.join(impossible)} cannot be evaluated on it; "
            "that takes shards with summaries, tags or regions (python -m training.prepare.pack, summarize, detect)"
        )


def open_labelled(args: EvaluationArguments, dataset: str | None = None) -> LabelledPictures:
    """The pictures and class names that `dataset`, or else `--data`, names; raises as `open_samples`."""
    if dataset:
        split = args.split or "test"
        data = open_set(dataset, args.data, split, args.split_file, args.classes, args.max_samples)
    elif is_hub_data(args.data):
        columns = (args.image_column, args.label_column)
        data = labelled_hub(args.data, args.split, args.subset, *columns, args.classes, args.max_samples)
    else:
        data = open_pictures(args.data, args.classes, args.max_samples, args.allow_unfinished)
    return data.limited(args.max_image_pixels)


def evaluate_zero_shot(scoring: Scoring, args: EvaluationArguments) -> list[EvalResult]:
    """Top-1, top-5 and the mean over classes of top-1 for each data set, with each class the mean of its prompts.

    Raises:
        ValueError: a data set has a single class; and as `open_labelled`.
    """
    results, main_values = [], dict[str, float]()
    templates = read_templates(args.templates)
    sets = [open_labelled(args, name) for name in args.dataset or (None,)]
    for data in sets:
        if len(data.class_names) == 1:
            raise ValueError(
                f"{data.name} has a single class, {data.class_names[0]!r}, so that every answer would be right: "
                "expected pictures of two or more"
            )
    for data in sets:
        scores = scoring.zero_shot(data, templates, args)
        metrics = classification_metrics(scores, torch.tensor(data.labels))
        main, note = data.main_metric or (None, None)
        if main is not None:
            main_values[data.described.get("dataset_type") or data.name] = metrics[main]
        results += [
            _result(
                *(args, data, "zero-shot-image-classification", metric, value),
                metric_name=note if metric == main else None,
            )
            for metric, value in metrics.items()
        ]
    return results + average_results("zero-shot-image-classification", main_values)


def _result(
    args: EvaluationArguments,
    data: Samples | LabelledPictures,
    task: str,
    metric: str,
    value: float | int,
    **fields: str | None,
) -> EvalResult:
    """One number on `data`, which says by `name` and `described` what it is; shards are called after their folder."""
    name = args.dataset_name or (Path(args.data).resolve().stem if isinstance(data, ShardSamples) else data.name)
    described = {key: one for key, one in data.described.items() if one}
    standard: dict[str, Any] = {"dataset_type": name, "dataset_split": args.split} | described
    standard["dataset_type"] = hub_identifier(standard["dataset_type"])
    return EvalResult(**standard | fields, task_type=task, dataset_name=name, metric_type=metric, metric_value=value)


class Task(Protocol):
    """What a task does with a scoring and the settings."""

    def __call__(self, scoring: Scoring, args: EvaluationArguments) -> list[EvalResult]:
        """The results; every process calls it and gets the same."""
        ...


TASKS: dict[str, Task] = {"retrieval": evaluate_retrieval, "zero-shot": evaluate_zero_shot}
