"""What `python -m training.evaluate` measures: its settings, the data that they name, and one function a task.

A task is a function `(scoring, args) -> list of EvalResult` in `TASKS`. A scoring says how pictures and texts are
compared: by their embeddings, as here, or by their tokens (`training.loop.token_scoring`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from huggingface_hub import EvalResult

from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.labelled import LabelledPictures, open_pictures
from training.data.records import MAX_REGIONS
from training.data.samples import Samples, ShardSamples
from training.evaluation.captions import CAPTION_SETS, CaptionedPictures, captioned_folder, open_captions
from training.evaluation.classification import classification_metrics, read_templates, zero_shot_scores
from training.evaluation.embedding import embed_levels, levels_of_pairs
from training.evaluation.hub import CaptionedRows, is_hub_data, labelled_hub
from training.evaluation.results import average_results, hub_identifier
from training.evaluation.retrieval import check_pairs, level_metrics
from training.evaluation.sets import TABLE_7, open_set


@dataclass(kw_only=True)
class EvaluationArguments:
    """Settings of `python -m training.evaluate`."""

    model: str = field(metadata={"names": "id", "help": "folder of a saved model, or Hub id"})
    data: str = field(
        metadata={
            "names": "id",
            "help": "shards or a manifest as in training (folder, tar, glob, range, URL, .txt list, .jsonl), a folder "
            "with a sub-folder a class, a data set of the Hub (hf://datasets/OWNER/NAME), or with --dataset the folder "
            "that holds the data sets",
        }
    )
    task: Literal["retrieval", "zero-shot"] = field(default="retrieval", metadata={"help": "what to measure"})
    dataset: list[str] = field(
        default_factory=list,
        metadata={"help": f"zero-shot: {', '.join(TABLE_7)}; retrieval: {', '.join(CAPTION_SETS)}; several at once"},
    )
    split_file: str | None = field(
        default=None,
        metadata={
            "names": "path",
            "help": "with one --dataset: the pictures that count, lines relative/path<TAB>label",
        },
    )
    captions: str | None = field(
        default=None,
        metadata={
            "names": "path",
            "help": "retrieval: captions of the pictures in --data (Karpathy's or COCO's JSON, or picture,caption)",
        },
    )
    subset: str | None = field(default=None, metadata={"help": "Hub data sets: the configuration"})
    image_column: str | None = field(default=None, metadata={"help": "Hub data sets: the column with the pictures"})
    label_column: str | None = field(default=None, metadata={"help": "Hub data sets: the column with the classes"})
    caption_column: str | None = field(default=None, metadata={"help": "Hub data sets: the column with the captions"})
    levels: list[str] = field(
        default_factory=lambda: ["global_caption"], metadata={"help": "retrieval: level pairs, named as the loss terms"}
    )
    local_view_area: float = field(
        default=1.0, metadata={"help": "retrieval: middle share of the picture that serves as local view; 1: all of it"}
    )
    max_regions: int = field(
        default=MAX_REGIONS,
        metadata={"help": "retrieval: objects of a picture that count, most confident first, as in training"},
    )
    drop_repeated_tags: bool = field(
        default=False, metadata={"help": "retrieval: a tag that names several objects of a picture comes once"}
    )
    classes: str | None = field(
        default=None,
        metadata={
            "names": "path",
            "help": "zero-shot: file with class names, one a line (folders also: folder<TAB>name)",
        },
    )
    scoring: Literal["embeddings", "tokens"] = field(
        default="embeddings",
        metadata={
            "help": "how pictures and texts are compared; tokens: as FILIP, with the heads.safetensors that a run with "
            "a token term leaves beside the model"
        },
    )
    templates: str | None = field(
        default=None,
        metadata={
            "names": "path",
            "help": "zero-shot: file with prompts, one a line, {} for the name; default: 80 templates",
        },
    )
    batch_size: int = field(default=64, metadata={"help": "samples encoded at a time by each process"})
    chunk_size: int = field(
        default=256, metadata={"help": "queries scored at a time; memory is chunk_size x candidates"}
    )
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "a picture with more is an error, by its header"}
    )
    max_samples: int | None = field(default=None, metadata={"help": "evaluate on so many samples only"})
    allow_unfinished: bool = field(
        default=False, metadata={"help": "also shards of which a step of preparation has begun and not ended"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "name in the results; default: the folder's name"})
    split: str | None = field(
        default=None,
        metadata={
            "help": "split to read where the data has several (default: test); otherwise only named in the results"
        },
    )
    output: str | None = field(default=None, metadata={"help": "JSON file for the results, a model index of the Hub"})
    csv: str | None = field(default=None, metadata={"help": "CSV file for the results"})
    backend: Literal["torch", "onnx", "openvino"] = field(
        default="torch", metadata={"help": "what computes; the others run what `pyramidclip export` wrote"}
    )
    dtype: Literal["float32", "bfloat16", "float16", "int8"] = field(
        default="float32", metadata={"help": "of the model; int8 with another --backend"}
    )
    device: str = field(
        default="auto",
        metadata={"help": "auto: an accelerator if there is one, for each process its own; cpu; or e.g. cuda:1"},
    )
    cpu: bool = field(default=False, metadata={"help": "the same as --device cpu"})

    def __post_init__(self) -> None:
        """What can be refused before anything is loaded."""
        self.levels = check_pairs(self.levels)
        for name in ("batch_size", "chunk_size", "max_samples", "max_regions", "max_image_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {value}")
        if self.task == "zero-shot":
            read_templates(self.templates)
        known: dict[str, Collection[str]] = {"zero-shot": TABLE_7, "retrieval": CAPTION_SETS}
        for name in self.dataset:
            if name not in known[self.task]:
                tasks = [task for task, names in known.items() if name in names]
                advice = f"it is for --task {tasks[0]}" if tasks else f"there are {', '.join(known[self.task])}"
                raise ValueError(f"--dataset {name}: no data set of --task {self.task} is called so; {advice}")
        if self.backend == "torch" and self.dtype == "int8":
            raise ValueError("--dtype int8 needs --backend onnx or openvino and a model that `pyramidclip export` made")
        if self.backend != "torch" and not (self.cpu or self.device in ("auto", "cpu")):
            raise ValueError(
                f"--device {self.device}: --backend {self.backend} computes on the processor; leave it out"
            )
        if self.scoring == "tokens" and self.backend != "torch":
            raise ValueError(
                f"--scoring tokens needs --backend torch: what --backend {self.backend} runs has no tokens"
            )
        several = [name for name in ("split_file", "classes", "dataset_name") if getattr(self, name)]
        if len(self.dataset) > 1 and several:
            raise ValueError(f"--{several[0].replace('_', '-')} is for one data set, --dataset names {self.dataset}")
        if self.split_file and (not self.dataset or self.task == "retrieval"):
            raise ValueError("--split-file goes with --task zero-shot and one --dataset")


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
    """Top-1, top-5 and the mean over classes of top-1 for each data set, with each class the mean of its prompts."""
    results, main_values = [], dict[str, float]()
    templates = read_templates(args.templates)
    for data in [open_labelled(args, name) for name in args.dataset or (None,)]:
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
