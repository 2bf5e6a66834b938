"""Evaluates a saved model: image-text retrieval and zero-shot classification.

    python -m training.evaluate --model DIR --task retrieval --data SHARDS --levels global_caption roi_tags
    python -m training.evaluate --model DIR --task retrieval --data ROOT --dataset flickr30k mscoco
    python -m training.evaluate --model DIR --task zero-shot --data ROOT --dataset imagenet pets --output results.json
    python -m training.evaluate --model DIR --task zero-shot --data FOLDER_OR_SHARDS_OR_HUB_DATA_SET
    python -m training.evaluate --bench --model DIR --dataset cifar10 --dataset_root ROOT
    accelerate launch --num_processes 4 -m training.evaluate ...

Retrieval runs on shards and manifests, for any of the nine level pairs, and on pictures with captions of other formats.
Zero-shot classification runs on the data sets of the paper's Table 7, on a folder with one sub-folder of pictures for
each class, on shards whose `KEY.json` has `class_name`, and on data sets of the Hub; a class is the mean of its prompts
(80 templates by default). No sample is skipped or counted twice, and scores are equal on any number of processes.
`--bench` hands what follows to clip-benchmark's own command. All of it: docs/evaluation.md.

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

from training.data.labelled import LabelledPictures, ShardSamples, labelled_folder, labelled_shards
from training.data.remote import DownloadError
from training.evaluation.captions import CAPTION_SETS, CaptionedPictures, captioned_folder, open_captions
from training.evaluation.clip_benchmark import run_clip_benchmark
from training.evaluation.embedding import embed_levels, levels_of_pairs, map_batches
from training.evaluation.hub import CaptionedRows, is_hub_data, labelled_hub
from training.evaluation.results import hub_identifier, results_table, write_csv, write_json
from training.evaluation.retrieval import check_pairs, level_metrics, rank_counts
from training.evaluation.sets import TABLE_7, open_set

EXIT_WRONG_SETTING = 2
# Without either the processor would silently take the tokenizer that the package comes with.
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


@dataclass(kw_only=True)
class EvaluationArguments:
    """Settings of `python -m training.evaluate`."""

    model: str = field(metadata={"help": "folder of a saved model, or Hub id"})
    data: str = field(
        metadata={
            "help": "folder of shards, one shard, a .jsonl manifest, a folder with a sub-folder a class, a data set of "
            "the Hub (hf://datasets/OWNER/NAME), or with --dataset the folder that holds the data sets"
        }
    )
    task: Literal["retrieval", "zero-shot"] = field(default="retrieval", metadata={"help": "what to measure"})
    dataset: list[str] = field(
        default_factory=list,
        metadata={"help": f"zero-shot: {', '.join(TABLE_7)}; retrieval: {', '.join(CAPTION_SETS)}; several at once"},
    )
    split_file: str | None = field(
        default=None, metadata={"help": "with one --dataset: the pictures that count, lines relative/path<TAB>label"}
    )
    captions: str | None = field(
        default=None,
        metadata={
            "help": "retrieval: captions of the pictures in --data (Karpathy's or COCO's JSON, or picture,caption)"
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
    split: str | None = field(
        default=None,
        metadata={
            "help": "split to read where the data has several (default: test); otherwise only named in the results"
        },
    )
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
        known = {"zero-shot": TABLE_7, "retrieval": CAPTION_SETS}
        for name in self.dataset:
            if name not in known[self.task]:
                tasks = [task for task, names in known.items() if name in names]
                advice = f"it is for --task {tasks[0]}" if tasks else f"there are {', '.join(known[self.task])}"
                raise ValueError(f"--dataset {name}: no data set of --task {self.task} is called so; {advice}")
        several = [name for name in ("split_file", "classes", "dataset_name") if getattr(self, name)]
        if len(self.dataset) > 1 and several:
            raise ValueError(f"--{several[0].replace('_', '-')} is for one data set, --dataset names {self.dataset}")
        if self.split_file and (not self.dataset or self.task == "retrieval"):
            raise ValueError("--split-file goes with --task zero-shot and one --dataset")


def load_model(name: str, dtype: str = "float32", device: torch.device | str = "cpu"):
    """The model in evaluation mode and its processor; ValueError where a part is missing, saying which."""
    from transformers.utils import cached_file

    from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
    from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor

    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model {name}: no config.json there; expected a folder written by save_pretrained")
    elif name.startswith((".", "/")) or name.count("/") > 1:
        raise ValueError(f"--model {name}: there is no such folder")
    try:
        files = [cached_file(name, one, _raise_exceptions_for_missing_entries=False) for one in _TOKENIZER_FILES]
        if not any(files):
            raise ValueError(
                f"--model {name} has no tokenizer (tokenizer.json), so texts cannot be encoded. Save it "
                "beside the weights: PyramidCLIPProcessor().save_pretrained(folder)"
            )
        model, info = PyramidCLIPModel.from_pretrained(name, dtype=getattr(torch, dtype), output_loading_info=True)
        processor = PyramidCLIPProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(
            f"--model {name}: expected a folder written by save_pretrained, or a Hub id ({error})"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # they would be drawn at random, and every result with them
        raise ValueError(
            f"--model {name}: {len(missing)} weights of the model are not in the file ({', '.join(missing[:3])}, ...); "
            "expected a whole PyramidCLIPModel, with both towers"
        )
    return model.eval().to(device), processor


def open_samples(args: EvaluationArguments, dataset: str | None = None) -> Sequence:
    """The samples for retrieval that `dataset`, or else `--captions` or `--data`, names."""
    if dataset:
        return open_captions(dataset, args.data, args.split, args.max_samples)
    if args.captions:
        return captioned_folder(args.captions, args.data, args.split, args.max_samples)
    if is_hub_data(args.data):
        columns = (args.image_column, args.caption_column)
        return CaptionedRows(args.data, args.split, args.subset, *columns, args.max_samples)
    return ShardSamples(args.data, args.max_samples)


def evaluate_retrieval(model, processor, args: EvaluationArguments) -> list[EvalResult]:
    """Recall at 1, 5, 10 and mean rank, both directions, for each data set and level pair of the arguments."""
    results = []
    for samples in [open_samples(args, name) for name in args.dataset or [None]]:
        if isinstance(samples, (CaptionedPictures, CaptionedRows)):
            _check_levels_of_captions(args.levels, samples.name)
        levels = levels_of_pairs(args.levels)
        embedded = embed_levels(model, processor, samples, levels, args.batch_size, args.local_view_area)
        metrics = level_metrics(embedded.embeds, args.levels, embedded.present, embedded.owners, args.chunk_size)
        results += [
            _result(args, samples, "image-text-retrieval", metric, value, dataset_config=pair)
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
    """The pictures and class names that `dataset`, or else `--data`, names."""
    if dataset:
        split = args.split or "test"
        return open_set(dataset, args.data, split, args.split_file, args.classes, args.max_samples)
    if is_hub_data(args.data):
        columns = (args.image_column, args.label_column)
        return labelled_hub(args.data, args.split, args.subset, *columns, args.classes, args.max_samples)
    is_folder_of_classes = Path(args.data).is_dir() and not any(Path(args.data).glob("*.tar"))
    reader = labelled_folder if is_folder_of_classes else labelled_shards
    return reader(args.data, args.classes, args.max_samples)


def evaluate_zero_shot(model, processor, args: EvaluationArguments) -> list[EvalResult]:
    """Top-1, top-5 and the mean over classes of top-1 for each data set, with each class the mean of its prompts."""
    results = []
    templates = read_templates(args.templates)
    for data in [open_labelled(args, name) for name in args.dataset or [None]]:
        scores = zero_shot_scores(model, processor, data, templates, args.batch_size)
        metrics = classification_metrics(scores, torch.tensor(data.labels))
        main, note = data.main_metric or (None, None)
        results += [
            _result(
                *(args, data, "zero-shot-image-classification", metric, value),
                metric_name=note if metric == main else None,
            )
            for metric, value in metrics.items()
        ]
    return results


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
    """(N, C) float32 cosines of pictures and classes, the same on any number of processes.

    Classes of one name (CLIP's list for ImageNet has two such pairs) get one embedding, so their scores are equal.
    """
    from pyramidclip_hf.zero_shot import class_embeddings

    options = {} if templates is None else {"templates": templates}
    folded = [" ".join(name.lower().split()) for name in data.class_names]
    distinct = list(dict.fromkeys(folded))
    first_names = [data.class_names[folded.index(name)] for name in distinct]

    def encode_classes(numbers: range):
        names = [first_names[number] for number in numbers]
        return class_embeddings(model, processor, names, **options).float().cpu()

    def encode_pictures(numbers: range):
        pictures = processor(images=[data.read(number) for number in numbers], return_tensors="pt")
        return model.encode_image(pictures["pixel_values"].to(model.device, model.dtype), normalize=True).float().cpu()

    classes = torch.cat(map_batches(encode_classes, len(distinct), 16, "class prompts"))
    classes = classes[[distinct.index(name) for name in folded]]
    pictures = torch.cat(map_batches(encode_pictures, len(data), batch_size, "pictures"))
    return (pictures.double() @ classes.double().T).float()


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """scores: (N, C). labels: (N,) int64. Equal scores share the place among them, as in
    `training.evaluation.retrieval`.

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


def _result(args: EvaluationArguments, data, task: str, metric: str, value: float | int, **fields) -> EvalResult:
    """One number on `data`, which says by `name` and `described` what it is; shards are called after their folder."""
    name = args.dataset_name or (Path(args.data).resolve().stem if isinstance(data, ShardSamples) else data.name)
    described = {name: value for name, value in getattr(data, "described", {}).items() if value}
    standard = {"dataset_type": name, "dataset_split": args.split} | described
    standard["dataset_type"] = hub_identifier(standard["dataset_type"])
    return EvalResult(**standard | fields, task_type=task, dataset_name=name, metric_type=metric, metric_value=value)


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

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        EvaluationArguments,
        description=__doc__.split("\n")[0],
        epilog="--bench ARGS hands over to clip-benchmark's own command, with this model (docs/evaluation.md)",
        allow_abbrev=False,
    )
    try:
        if "--bench" in argv:
            return run_clip_benchmark(argv)
        (args,) = parser.parse_args_into_dataclasses(argv)
        evaluate(args)
    except (ValueError, FileNotFoundError, ImportError, DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
