"""Evaluates a saved model: image-text retrieval and zero-shot classification.

    python -m training.evaluate --model DIR --task retrieval --data SHARDS --levels global_caption roi_tags
    python -m training.evaluate --model DIR --task zero-shot --data FOLDER_OR_SHARDS --output results.json
    accelerate launch --num_processes 4 -m training.evaluate ...

Retrieval runs on shards, for any of the nine level pairs. Zero-shot classification runs on a folder with one sub-folder
of pictures for each class, or on shards whose `KEY.json` has `class_name`; a class is the mean of its prompts (80
templates by default). No sample is skipped or counted twice, and scores are equal on any number of processes.

A further task is a function `(model, processor, args) -> list of EvalResult` in `TASKS`. Exit codes: 0, or 2 where
settings or data are wrong.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import EvalResult

from training.embedding import embed_levels, levels_of_pairs, map_batches
from training.evaluation_data import LabelledPictures, ShardSamples, labelled_folder, labelled_shards
from training.results import results_table, write_csv, write_json
from training.retrieval import check_pairs, level_metrics, rank_counts

EXIT_WRONG_SETTING = 2


@dataclass(kw_only=True)
class EvaluationArguments:
    """Settings of `python -m training.evaluate`."""

    model: str = field(metadata={"help": "folder of a saved model, or Hub id"})
    data: str = field(metadata={"help": "folder of shards, one shard, or a folder with a sub-folder a class"})
    task: Literal["retrieval", "zero-shot"] = field(default="retrieval", metadata={"help": "what to measure"})
    levels: list[str] = field(
        default_factory=lambda: ["global_caption"], metadata={"help": "retrieval: level pairs, named as the loss terms"}
    )
    local_view_area: float = field(
        default=1.0, metadata={"help": "retrieval: middle share of the picture that serves as local view; 1: all of it"}
    )
    classes: str | None = field(
        default=None, metadata={"help": "zero-shot: file with class names, one a line (folders also: folder<TAB>name)"}
    )
    templates: str | None = field(
        default=None,
        metadata={"help": "zero-shot: file with prompts, one a line, {} for the name; default: 80 templates"},
    )
    batch_size: int = field(default=64, metadata={"help": "samples encoded at a time by each process"})
    chunk_size: int = field(
        default=256, metadata={"help": "queries scored at a time; memory is chunk_size x candidates"}
    )
    max_samples: int | None = field(default=None, metadata={"help": "evaluate on so many samples only"})
    dataset_name: str | None = field(default=None, metadata={"help": "name in the results; default: the folder's name"})
    split: str | None = field(default=None, metadata={"help": "split in the results, e.g. test"})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results, a model index of the Hub"})
    csv: str | None = field(default=None, metadata={"help": "CSV file for the results"})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the model"})
    cpu: bool = field(default=False, metadata={"help": "use the CPU where there is a GPU"})

    def __post_init__(self):
        """What can be refused before anything is loaded."""
        self.levels = check_pairs(self.levels)
        for name in ("batch_size", "chunk_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {value}")
        if self.task == "zero-shot":
            read_templates(self.templates)


def load_model(name: str, dtype: str = "float32", device: torch.device | str = "cpu"):
    """The model in evaluation mode and its processor; ValueError where a part is missing, saying which."""
    from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
    from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: no config.json there; expected a folder written by save_pretrained")
        if not any((folder / part).is_file() for part in ("tokenizer.json", "vocab.json")):
            raise ValueError(
                f"--model {name}: the folder has no tokenizer (tokenizer.json), so texts cannot be encoded. Save it "
                "beside the weights: PyramidCLIPProcessor().save_pretrained(folder)"
            )
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise ValueError(f"--model {name}: there is no such folder")
    try:
        model = PyramidCLIPModel.from_pretrained(name, dtype=getattr(torch, dtype))
        processor = PyramidCLIPProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"--model {name}: expected a folder written by save_pretrained, or a Hub id ({error})"
        ) from error
    return model.eval().to(device), processor


def evaluate_retrieval(model, processor, args: EvaluationArguments) -> list[EvalResult]:
    """Recall at 1, 5, 10 and mean rank, both directions, for each level pair of `args.levels`."""
    samples = ShardSamples(args.data, args.max_samples)
    embedded = embed_levels(
        model, processor, samples, levels_of_pairs(args.levels), args.batch_size, args.local_view_area
    )
    metrics = level_metrics(embedded.embeds, args.levels, embedded.present, embedded.owners, args.chunk_size)
    return [
        _result(args, "image-text-retrieval", metric, value, dataset_config=pair)
        for pair, values in metrics.items()
        for metric, value in values.items()
    ]


def open_labelled(args: EvaluationArguments) -> LabelledPictures:
    """The pictures and class names that `--data` and `--classes` name."""
    is_folder_of_classes = Path(args.data).is_dir() and not any(Path(args.data).glob("*.tar"))
    reader = labelled_folder if is_folder_of_classes else labelled_shards
    return reader(args.data, args.classes, args.max_samples)


def evaluate_zero_shot(model, processor, args: EvaluationArguments) -> list[EvalResult]:
    """Top-1, top-5 and the mean over classes of top-1, with each class the mean of its prompts."""
    data = open_labelled(args)
    scores = zero_shot_scores(model, processor, data, read_templates(args.templates), args.batch_size)
    metrics = classification_metrics(scores, torch.tensor(data.labels))
    return [_result(args, "zero-shot-image-classification", metric, value) for metric, value in metrics.items()]


def read_templates(path: str | None) -> list[str] | None:
    """Prompts of a file, one a line, blank lines left out; None for none. ValueError for a line without `{}`."""
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no template file {path}; expected one prompt a line, {{}} for the class name"
        )
    templates = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            f"{path}: every prompt needs {{}} once, where the class name goes; got {wrong[:3] or 'no lines'}"
        )
    return templates


@torch.inference_mode()
def zero_shot_scores(model, processor, data: LabelledPictures, templates: Sequence[str] | None, batch_size: int):
    """(N, C) float32 cosines of pictures and classes, the same on any number of processes."""
    from pyramidclip_hf.zero_shot import class_embeddings

    options = {} if templates is None else {"templates": templates}

    def encode_classes(numbers: range):
        names = [data.class_names[number] for number in numbers]
        return class_embeddings(model, processor, names, **options).float().cpu()

    def encode_pictures(numbers: range):
        pictures = processor(images=[data.read(number) for number in numbers], return_tensors="pt")
        return model.encode_image(pictures["pixel_values"].to(model.device, model.dtype), normalize=True).float().cpu()

    classes = torch.cat(map_batches(encode_classes, len(data.class_names), 16, "class prompts"))
    pictures = torch.cat(map_batches(encode_pictures, len(data), batch_size, "pictures"))
    return (pictures.double() @ classes.double().T).float()


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """scores: (N, C). labels: (N,) int64. Equal scores share the place among them, as in `training.retrieval`.

    Returns `top_1`, `top_5`, `mean_per_class` (of top-1, over the classes met), and the numbers of `pictures` and
    `classes`.
    """
    classes = scores.shape[1]
    counts = rank_counts(scores, torch.eye(classes), labels, torch.arange(classes))
    top_1 = counts.recall(1)
    pictures = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=top_1.dtype).scatter_add(0, labels, top_1)[pictures > 0]
    return {
        "top_1": float(top_1.mean()),
        "top_5": float(counts.recall(5).mean()),
        "mean_per_class": float((per_class / pictures[pictures > 0]).mean()),
        "pictures": len(labels),
        "classes": classes,
    }


def _result(args: EvaluationArguments, task: str, metric: str, value: float | int, **fields) -> EvalResult:
    name = args.dataset_name or Path(args.data).stem
    return EvalResult(
        task_type=task,
        dataset_type=name,
        dataset_name=name,
        dataset_split=args.split,
        metric_type=metric,
        metric_value=value,
        **fields,
    )


TASKS = {"retrieval": evaluate_retrieval, "zero-shot": evaluate_zero_shot}


def evaluate(args: EvaluationArguments) -> list[EvalResult]:
    """Runs the task; every process returns the same results, and process 0 writes and prints them."""
    from accelerate import PartialState

    state = PartialState(cpu=args.cpu)
    started = time.perf_counter()
    model, processor = load_model(args.model, args.dtype, state.device)
    results = TASKS[args.task](model, processor, args)
    if state.is_main_process:
        details = vars(args) | {"seconds": round(time.perf_counter() - started, 2), "processes": state.num_processes}
        if args.output:
            write_json(results, args.output, Path(args.model).name, details)
        if args.csv:
            write_csv(results, args.csv)
        print(results_table(results))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates, and returns the exit code."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(EvaluationArguments, description=__doc__.split("\n")[0], allow_abbrev=False)
    try:
        (args,) = parser.parse_args_into_dataclasses(argv)
        evaluate(args)
    except (ValueError, FileNotFoundError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
