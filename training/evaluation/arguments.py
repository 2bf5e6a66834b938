"""The settings of `python -m training.evaluate`, and what can be said of them before torch is imported."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pyramidclip_hf.files import read_utf8
from pyramidclip_hf.levels_pyramidclip import TERMS
from training.data.records import MAX_IMAGE_PIXELS, MAX_REGIONS

# The names of `training.evaluation.sets.TABLE_7`, in its order, and of `training.evaluation.captions.CAPTION_SETS`.
TABLE_7_SETS = (
    "cifar10",
    "cifar100",
    "dtd",
    "cars",
    "food101",
    "pets",
    "flowers",
    "aircraft",
    "sun397",
    "caltech101",
    "imagenet",
)
KARPATHY_SETS = ("flickr30k", "mscoco")


def read_templates(path: str | None) -> list[str] | None:
    """The prompts of a file, one a line, blank lines left out.

    Args:
        path: of the file; None: no templates of one's own.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no lines, or one without `{}`.
    """
    if path is None:
        return None
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no template file {path}; expected one prompt a line, {{}} for the class name"
        )
    templates = [line.strip() for line in read_utf8(path).splitlines() if line.strip()]
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong or not templates:
        raise ValueError(
            f"{path}: every prompt needs {{}} once, where the class name goes; got {wrong[:3] or 'no lines'}"
        )
    return templates


def check_pairs(pairs: Iterable[str]) -> list[str]:
    """The names of level pairs as a list, each once; ValueError names an unknown one and lists the nine."""
    pairs = list(dict.fromkeys(pairs))
    unknown = [name for name in pairs if name not in TERMS]
    if unknown or not pairs:
        raise ValueError(f"unknown level pair(s) {unknown}: expected some of {', '.join(TERMS)}")
    return pairs


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
        metadata={
            "help": f"zero-shot: {', '.join(TABLE_7_SETS)}; retrieval: {', '.join(KARPATHY_SETS)}; several at once"
        },
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
        known: dict[str, Collection[str]] = {"zero-shot": TABLE_7_SETS, "retrieval": KARPATHY_SETS}
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
