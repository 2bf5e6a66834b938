"""The flags of the preparation commands: the fields of dataclasses. Light, so that `--help` need not wait for torch."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from transformers import HfArgumentParser

from pyramidclip_command import CommandParser
from pyramidclip_hf.files import read_utf8


class _DataclassParser(CommandParser, HfArgumentParser):
    """Flags from dataclasses, errors and help as every command has them."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        """The flags of one dataclass, in a group that its docstring's first line heads; shown with dashes alone."""
        before = len(self._actions)
        super()._add_dataclass_arguments(dtype)
        title = (dtype.__doc__ or "").partition("\n")[0].rstrip(".")
        group = self.add_argument_group(title[:1].lower() + title[1:])
        for action in self._actions[before:]:
            self._optionals._group_actions.remove(action)
            group._group_actions.append(action)
            flag = action.option_strings[-1]
            if action.const is True or isinstance(action, argparse._StoreFalseAction):
                action.metavar = "BOOL"
            if flag.startswith("--no-") and action.dest != flag[2:].replace("-", "_"):
                action.help = argparse.SUPPRESS  # beside the flag that it is the contrary of
            action.option_strings = [flag]


# Any: a tuple of instances of the classes in `kinds`, which the caller unpacks and names.
def parse_dataclasses(words: Sequence[str], description: str | None, *kinds: type) -> tuple[Any, ...]:
    """Parses the words of a command into one instance of each dataclass.

    Args:
        words: the words; both `--max-pixels` and `--max_pixels` are understood.
        description: the command's docstring, which `--help` shows.
        *kinds: dataclasses whose fields are the flags.

    Raises:
        ValueError: a word is no flag, or its value is not what the field takes.
    """
    parser = _DataclassParser(kinds, description=description)
    values = vars(parser.parse_args(words))
    return tuple(kind(**{field.name: values[field.name] for field in fields(kind)}) for kind in kinds)


# What columns are called where no flag names them; the first that is there is taken.
USUAL_COLUMNS = {
    "image": ("image", "file_name", "path", "jpg", "png", "webp", "img", "image_path"),
    "caption": ("caption", "text", "alt", "title", "txt", "TEXT"),
}
TABLE_SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")


# What pairs are read from.
PAIRS = "tars, manifests or tables (.jsonl .csv .tsv .parquet), folders of either"


@dataclass
class SourceArguments:
    """What to read."""

    input: list[str] = field(
        default_factory=list,
        metadata={"help": f"{PAIRS[0].upper()}{PAIRS[1:]}, or one Hub dataset name."},
    )
    picture_root: str | None = field(
        default=None, metadata={"help": "Folder that the paths of a table start from (default: the table's own)."}
    )
    image_column: str | None = field(
        default=None,
        metadata={"help": f"Column of the picture, path or bytes (default: {', '.join(USUAL_COLUMNS['image'])})."},
    )
    caption_column: str | None = field(
        default=None, metadata={"help": f"Column of the text (default: {', '.join(USUAL_COLUMNS['caption'])})."}
    )
    key_column: str | None = field(
        default=None, metadata={"help": "Column with a unique name of each row (default: rows are numbered)."}
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    subset: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub dataset."})
    streaming: bool = field(default=True, metadata={"help": "Read a Hub dataset as a stream, without a copy on disk."})
    samples_per_shard: int = field(default=10_000, metadata={"help": "Rows to a shard (tars keep their own size)."})


@dataclass
class WorkArguments:
    """How it is run; none of these flags changes the result."""

    engine: Literal["local", "ray"] = field(
        default="local",
        metadata={"help": "Who hands shards out: these processes themselves, or a Ray cluster (extra ray)."},
    )
    ray_address: str | None = field(
        default=None,
        metadata={"help": "HOST:PORT of a Ray cluster, or auto (default: $RAY_ADDRESS, else one on this machine)."},
    )
    ray_workers: int | None = field(
        default=None, metadata={"help": "With Ray: how many (default: one a GPU of the cluster, or one a core)."}
    )
    part_index: int = field(default=0, metadata={"help": "This launch's number among --part-count (Slurm array id)."})
    part_count: int = field(default=1, metadata={"help": "How many launches share the work, without talking."})
    overwrite: bool = field(
        default=False, metadata={"help": "Do finished shards again where they were made with other settings."}
    )
    device: str = field(
        default="auto", metadata={"help": "cpu, cuda, cuda:1, mps; auto: an accelerator a process if there is one."}
    )


@dataclass
class PackArguments:
    """What to write, and what to refuse."""

    output_dir: str = field(metadata={"help": "Folder of the shards."})
    max_image_pixels: int = field(
        default=100_000_000, metadata={"help": "Larger pictures are refused by their header."}
    )
    check: Literal["decode", "header"] = field(
        default="decode",
        metadata={
            "help": "`decode` finds pictures that break off; `header` only reads their first bytes and is faster."
        },
    )
    duplicates: Literal["dataset", "shard"] = field(
        default="dataset",
        metadata={"help": "Where keys must be unique: `dataset` lists all keys first, `shard` saves that pass."},
    )


@dataclass
class PackSettings:
    """All flags."""

    source: SourceArguments
    pack: PackArguments
    work: WorkArguments

    def that_decide(self) -> dict[str, Any]:
        """Those that the result depends on, as JSON."""
        settings = {**asdict(self.source), **asdict(self.pack)}
        del settings["output_dir"]
        return settings


@dataclass
class DetectorArguments:
    """Which detector, and how it is asked."""

    detector: str = field(
        metadata={"help": "Folder or Hub name: VinVL (conversion.convert_vinvl), or a Transformers detector."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of a Hub checkpoint."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of the weights."})
    top: int = field(default=10, metadata={"help": "Regions kept of a picture."})
    features: Literal["backbone", "queries"] = field(
        default="backbone",
        metadata={"help": "Transformers detectors: pooled from the feature map, or the query's state."},
    )
    feature_size: int | None = field(
        default=None,
        metadata={
            "help": "Required width: chooses the feature map of the backbone that has it (default: the last map)."
        },
    )
    score_threshold: float = field(
        default=0.05, metadata={"help": "Least confidence of a region (not VinVL, which has its own)."}
    )
    names: str | None = field(default=None, metadata={"help": "Open vocabulary: class names, one a line."})
    attributes: str | None = field(default=None, metadata={"help": "Open vocabulary: attribute names, one a line."})
    attribute_threshold: float = field(
        default=0.1, metadata={"help": "Open vocabulary: least confidence of an attribute."}
    )
    names_per_prompt: int = field(default=50, metadata={"help": "Open vocabulary: names asked at once."})
    nms_threshold: float = field(
        default=0.5, metadata={"help": "Open vocabulary: overlap above which the less likely goes."}
    )


class FormatFlags(Protocol):
    """Flags of `import_features` that belong to one format: a dataclass whose fields have defaults."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def check(self, inputs: int) -> None:
        """Raises `ValueError` where they do not fit so many inputs."""
        ...


@dataclass
class OscarOptions:
    """Flags of Oscar's features."""

    predictions: list[str] = field(
        default_factory=list, metadata={"help": "Oscar: the tables of names and scores (default: beside each input)."}
    )

    def check(self, inputs: int) -> None:
        """Raises `ValueError` where there are not as many as inputs."""
        if len(self.predictions) not in (0, inputs):
            raise ValueError(f"--predictions: {len(self.predictions)} files for {inputs} inputs")


@dataclass
class SceneGraphOptions:
    """Flags of scene-graph-benchmark."""

    hw: list[str] = field(
        default_factory=list,
        metadata={"help": "scene-graph-benchmark: hw.tsv with picture sizes, one or one an input."},
    )

    def check(self, inputs: int) -> None:
        """Raises `ValueError` where there are neither one nor as many as inputs."""
        if len(self.hw) not in (0, 1, inputs):
            raise ValueError(f"--hw: {len(self.hw)} files for {inputs} inputs")


def read_names(path: str | Path) -> list[str]:
    """One name a line, as bottom-up-attention's lists have them.

    The line number, from 0, is the id; of comma-separated synonyms the first is taken.

    Raises:
        ValueError: the file is empty or has a blank line in the middle (the ids behind it would be wrong).
        FileNotFoundError: it is not there.
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is not there: expected a file with one name a line")
    lines = read_utf8(path).rstrip().split("\n")
    names = [line.split(",")[0].strip() for line in lines]
    if not all(names):
        raise ValueError(f"{path}, line {names.index('') + 1}: expected one name a line, found a blank one")
    return names


@dataclass
class LxmertOptions:
    """Flags of LXMERT's columns."""

    objects: str | None = field(default=None, metadata={"help": "LXMERT: class names, one a line."})
    attributes: str | None = field(default=None, metadata={"help": "LXMERT: attribute names, one a line."})
    attribute_threshold: float = field(default=0.1, metadata={"help": "LXMERT: least confidence of an attribute."})

    def check(self, inputs: int) -> None:
        """Raises `ValueError` or `FileNotFoundError` where a list of names cannot be read; any number of inputs."""
        for path in filter(None, (self.objects, self.attributes)):
            read_names(path)


# In the order of `training.prepare.formats.FORMATS`, of those that have some.
FORMAT_FLAGS: tuple[type[FormatFlags], ...] = (OscarOptions, SceneGraphOptions, LxmertOptions)
