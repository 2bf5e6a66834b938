"""The settings of a pre-training run: one flat dataclass, read from a YAML file and the command line.

    accelerate launch -m training.pretrain --config training/configs/demo.yaml --learning-rate 1e-3 --loss-weights
    '{"global_caption": 1}'

YAML keys are the fields of `PretrainingArguments`; flags are the same names in kebab-case and win over the file;
mappings are JSON on the command line. A key or flag that does not exist is an error that names its nearest
neighbours. What depends on more than one field is checked in `PretrainingArguments.__post_init__`, what depends on
the number of processes in `per_device_batch_size`.
"""

import argparse
import dataclasses
import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pyramidclip_hf.loss_pyramidclip import check_loss_weights

MAPPING_FIELDS = ("model_config", "loss_weights")


def setting(default: Any, text: str) -> Any:
    """A dataclass field with its help text; lists get a factory, and argparse's % is escaped."""
    metadata = {"help": text.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class PretrainingArguments:
    """Everything that decides a run. Sizes of batches say whose they are; durations are optimizer steps unless the
    name says otherwise.

    Raises ValueError (from the constructor) naming the field, what was expected and what came.
    """

    program: ClassVar[str] = "accelerate launch -m training.pretrain"
    purpose: ClassVar[str] = "Pre-trains a PyramidCLIP model."

    # What is trained, and where it goes
    output_dir: str = setting("runs/pretrain", "folder of this run: checkpoints/, final/, metrics.jsonl, tensorboard/")
    model: str = setting(
        "ViT-B-32", "architecture name, folder with saved weights, or Hub id; the latter two continue from weights"
    )
    model_config: dict | str | None = setting(
        None,
        'changes to the architecture\'s config, e.g. {"vision_config": {"image_size": 64}}; only with an '
        "architecture name",
    )
    loss_weights: dict | str | None = setting(
        None, 'objective as {term: weight}, e.g. {"global_caption": 1} for CLIP; default: the model config\'s'
    )
    label_smoothing: float | None = setting(
        None, "share a of the targets spread over the negatives; default: the model config's"
    )
    multi_positive: bool = setting(
        False, "pairs of a batch with the same text are each other's positives (the paper: no); tags repeat often"
    )
    freeze: Literal["none", "vision", "text"] = setting(
        "none", "tower kept as it is, its projection and running statistics too"
    )
    seed: int = setting(0, "seed of initial weights, data order and augmentation")

    # Data
    train_data: list[str] = setting(
        [], "shard folders, shard lists or JSONL manifests; several are visited one after another"
    )
    validation_data: str | None = setting(None, "shard folder of the fixed validation set; none: no evaluation")
    validation_samples: int = setting(512, "how many samples of it, from its beginning")
    shuffle_window_shards: int = setting(8, "samples are permuted within this many shards")
    max_regions: int = setting(10, "regions kept of each picture, most confident first (paper: 10)")
    allow_mixed_regions: bool = setting(
        False, "region features of another width or detector count as missing instead of stopping the run"
    )
    global_crop_area: list[float] = setting(
        [0.9, 1.0], "smallest and largest share of the picture in the global view (paper)"
    )
    local_crop_area: list[float] = setting([0.5, 1.0], "the same for the local view (paper)")
    max_bad_fraction: float = setting(0.01, "the run stops when a larger share of samples than this cannot be read")
    max_image_pixels: int = setting(100_000_000, "pictures with more pixels are refused before they are decoded")
    dataloader_workers: int = setting(
        4, "reading processes beside each training process; 0 reads in the training process"
    )

    # Batches
    global_batch_size: int = setting(4096, "pairs in one optimizer step, all processes together (paper: 4096 or 8192)")
    per_device_chunk_size: int | None = setting(
        None,
        "gradient caching: pairs encoded at a time on each device; the loss still sees the global batch. "
        "Default: all at once",
    )
    gradient_accumulation_steps: int = setting(1, "must be 1: see the error message for the reason")

    # Schedule and optimizer
    epochs: int | None = setting(None, "passes over the data; give this or max_steps")
    max_steps: int | None = setting(None, "optimizer steps; give this or epochs")
    learning_rate: float = setting(5e-4, "peak of the cosine")
    warmup_fraction: float = setting(0.02, "share of all steps in which the learning rate rises linearly from 0")
    final_learning_rate_fraction: float = setting(0.0, "end of the cosine as a share of its peak")
    weight_decay: float = setting(
        0.2, "of AdamW; not on norms, biases, position and class embeddings, logit_scale (paper: 0.2)"
    )
    adam_beta1: float = setting(0.9, "decay of AdamW's first moment")
    adam_beta2: float = setting(0.98, "decay of AdamW's second moment")
    adam_epsilon: float = setting(1e-6, "added to AdamW's denominator")
    max_grad_norm: float | None = setting(1.0, "gradients are scaled down to this norm; 0: never")
    ema_decay: float = setting(
        0.0, "decay of an exponential moving average of the weights that is evaluated and saved beside them; 0: off"
    )

    # Precision, memory, speed
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "bf16", "of the autocast region; weights, loss and optimizer stay fp32"
    )
    gradient_checkpointing: bool = setting(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    torch_compile: bool = setting(False, "compile the encoders with torch.compile")
    sync_batch_norm: bool = setting(True, "batch statistics over all GPUs; without effect on CPU and on one GPU")

    # Watching, saving, stopping
    log_every_steps: int = setting(50, "steps averaged into one line of metrics.jsonl and the trackers")
    log_duplicate_rates: bool = setting(False, "also log the share of repeated texts of each level in the global batch")
    trackers: list[str] = setting(["tensorboard"], "names that Accelerate knows (tensorboard, wandb, ...), or none")
    eval_every_steps: int = setting(1000, "retrieval per level pair on the validation set; 0: only at the end")
    save_every_steps: int = setting(1000, "a checkpoint every so often, and one at the end; 0: only at the end")
    keep_checkpoints: int = setting(2, "older checkpoints are removed")
    resume: str | None = setting(None, "'latest' checkpoint of output_dir, or a checkpoint folder")
    push_to_hub: str | None = setting(None, "repository id that receives the final model")
    overfit_batches: int = setting(
        0, "train on the first so many batches over and over: the loss must reach its floor; 0: off"
    )
    dry_run: bool = setting(False, "two steps, then print what the run would be, and stop")

    def __post_init__(self):
        """Parses mappings, then checks every field and what fields say about each other."""
        for name in MAPPING_FIELDS:
            setattr(self, name, mapping_of(name, getattr(self, name)))
        if self.trackers == ["none"]:
            self.trackers = []
        self._check_ranges()
        self._check_batches()
        if self.loss_weights is not None:
            self.loss_weights = check_loss_weights(self.loss_weights)
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"give exactly one of epochs and max_steps (the length of the run), got epochs={self.epochs} "
                f"and max_steps={self.max_steps}"
            )
        for name in ("global_crop_area", "local_crop_area"):
            check_area(name, getattr(self, name))

    def _check_ranges(self):
        at_least = {
            0: (
                "dataloader_workers",
                "eval_every_steps",
                "save_every_steps",
                "overfit_batches",
                "max_grad_norm",
                "learning_rate",
            )
            + ("weight_decay", "seed"),
            1: (
                "epochs",
                "max_steps",
                "log_every_steps",
                "keep_checkpoints",
                "validation_samples",
                "shuffle_window_shards",
            )
            + ("max_regions", "max_image_pixels", "per_device_chunk_size"),
            2: ("global_batch_size",),
        }
        shares = (
            "warmup_fraction",
            "final_learning_rate_fraction",
            "adam_beta1",
            "adam_beta2",
            "ema_decay",
            "label_smoothing",
        )
        check_ranges(self, at_least, shares)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction: expected a share from 0 to 1, got {self.max_bad_fraction}")

    def _check_batches(self):
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps: only 1 is possible, got {self.gradient_accumulation_steps}. The "
                f"contrastive loss compares each "
                "pair with every other pair of the batch, so the sum over small batches is another objective "
                "(fewer negatives), not the same "
                "one with less memory. Set per_device_chunk_size instead: it encodes so many pairs at a time "
                "and computes the loss, exactly, "
                "over global_batch_size"
            )

    def per_device_batch_size(self, num_processes: int) -> int:
        """Pairs of the global batch that one of `num_processes` processes encodes; ValueError where it cannot be
        divided evenly.
        """
        size = divided_batch(self.global_batch_size, num_processes)
        if self.per_device_chunk_size and size % self.per_device_chunk_size:
            raise ValueError(
                f"per_device_chunk_size {self.per_device_chunk_size} must divide the batch of one process, "
                f"{size} (= global_batch_size "
                f"{self.global_batch_size} / {num_processes} processes): chunks of different sizes would get "
                f"different BatchNorm statistics"
            )
        return size

    def to_dict(self) -> dict[str, Any]:
        """Field name -> plain value, fit for YAML and JSON."""
        return dataclasses.asdict(self)


def check_ranges(settings: Any, at_least: Mapping[int, Sequence[str]], shares: Sequence[str]) -> None:
    """ValueError for a field that is below its bound (`at_least`: bound -> field names) or not a share in [0, 1)
    (`shares`: field names). None passes.
    """
    for bound, names in at_least.items():
        for name in names:
            value = getattr(settings, name)
            if value is not None and not (math.isfinite(value) and value >= bound):
                raise ValueError(f"{name}: expected a number of at least {bound}, got {value}")
    for name in shares:
        value = getattr(settings, name)
        if value is not None and not 0 <= value < 1:
            raise ValueError(f"{name}: expected a share from 0 to below 1, got {value}")


def check_area(name: str, area: Sequence[float]) -> None:
    """ValueError where `area` is not the smallest and largest share of a picture."""
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"{name}: expected two shares with 0 < smallest <= largest <= 1, got {area}")


def divided_batch(global_batch_size: int, num_processes: int) -> int:
    """Samples of the global batch for each process; ValueError where it cannot be divided evenly."""
    size, rest = divmod(global_batch_size, num_processes)
    if rest or size == 0:
        raise ValueError(
            f"global_batch_size {global_batch_size} cannot be divided among {num_processes} processes: "
            f"choose a multiple of {num_processes}"
        )
    return size


def mapping_of(name: str, value: dict | str | None) -> dict | None:
    """A mapping, given as such or as JSON; ValueError naming the field."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f'{name}: expected a JSON object such as {{"key": 1}}, got {value!r} ({error})') from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, got {type(value).__name__} {value!r}")
    return value


def _field_names(settings: type) -> list[str]:
    return [entry.name for entry in dataclasses.fields(settings)]


def _unknown(settings: type, kind: str, name: str, where: str) -> ValueError:
    known = _field_names(settings)
    near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(known)}"
    return ValueError(f"unknown {kind} {name!r} in {where}{hint}")


def _yaml_flags(settings_class: type, path: Path) -> tuple[list[str], list[str]]:
    """The settings of a YAML file as command line words, so that both sources go through one parser, and the names of
    empty lists, which words cannot say.
    """
    import yaml

    if not path.is_file():
        raise ValueError(f"--config: expected a YAML file, and {path} is not one")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected 'field: value' lines, got a {type(settings).__name__}")
    words, empty = [], []
    for name, value in settings.items():
        if name not in _field_names(settings_class):
            raise _unknown(settings_class, "key", str(name), str(path))
        if value is None:  # an empty value leaves the default
            continue
        if isinstance(value, dict):
            if name not in MAPPING_FIELDS:
                raise ValueError(f"{path}: {name} takes no mapping, got {value}")
            value = json.dumps(value)
        if value == []:
            empty.append(name)
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={value}")
    return words, empty


def argument_parser(settings: type = PretrainingArguments) -> argparse.ArgumentParser:
    """The parser of the command line: `--config` and one flag for each field of a dataclass, whose class variables
    `program` and `purpose` head the help.
    """
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message):
            raise ValueError(message)

    parser = Parser(
        settings,
        prog=settings.program,
        description=settings.purpose,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file with any of the settings below; flags win over it")
    return parser


def parse_arguments(argv: Sequence[str], settings_class: type = PretrainingArguments) -> Any:
    """The settings, a `settings_class`, that the words of a command line (without the program's name) stand for.

    Raises ValueError for an unknown key or flag (naming near ones), a value of the wrong type, and what the dataclass
    refuses.
    """
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    config, flags = config_parser.parse_known_args(list(argv))
    words, empty = _yaml_flags(settings_class, Path(config.config)) if config.config else ([], [])
    parser = argument_parser(settings_class)
    settings, left_over = parser.parse_known_args(words + flags)
    if left_over:
        kind = "flag" if left_over[0].startswith("-") else "word"
        raise _unknown(settings_class, kind, left_over[0].split("=")[0], "the command line")
    settings = vars(settings)
    settings.pop("config")
    settings |= {name: [] for name in empty if settings[name] == parser.get_default(name)}
    return settings_class(**settings)
