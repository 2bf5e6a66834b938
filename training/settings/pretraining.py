"""The settings of a pre-training run: one flat dataclass, read from a YAML file and the command line.

    python -m training.pretrain --config training/configs/demo.yaml --learning-rate 1e-3

What depends on more than one field is checked in `PretrainingArguments.__post_init__`, what depends on the number of
processes in `per_device_batch_size`.
"""

from dataclasses import dataclass
from typing import Any, Literal

from pyramidclip_hf.levels_pyramidclip import check_loss_weights
from training.data.mixing import check_shares, positions_of
from training.settings.fields import (
    Through,
    check_above_0,
    check_area,
    check_lengths,
    check_repo_id,
    check_share_or_all,
    setting,
)
from training.settings.run import RunSettings, changed, told_processes


@dataclass(kw_only=True)
class PretrainingArguments(RunSettings):
    """Everything that decides a run of `training.pretrain`.

    Raises:
        ValueError: A value, or two together, cannot be; the message names the field, what was expected and what came.
    """

    output_dir: str = changed("output_dir", "runs/pretrain")
    model: str = changed("model", "ViT-B-32")
    train_data: list[str] = changed(
        "train_data",
        [],
        "shard folders, shard lists or JSONL manifests; several are visited one after another, or mixed: data_shares",
    )
    validation_data: str | None = changed(
        "validation_data", None, "shard folder of the fixed validation set; none: no evaluation"
    )
    global_batch_size: int = changed(
        "global_batch_size",
        4096,
        "pairs in one optimizer step, all processes together (paper: 4096 or 8192)",
        at_least=2,
    )
    epochs: int | None = changed("epochs", None, "passes over the data; give this or max_steps")
    max_steps: int | None = setting(
        None,
        "optimizer steps; give this or epochs",
        section="first",
        identity=Through("schedule", "total_steps"),
        at_least=1,
    )

    loss_weights: dict[str, float] | None = setting(
        None,
        'objective as {term: weight}, e.g. {"global_summary": 0.5, "local_caption": 0.5}; default: the model '
        "config's; CLIP is more than a term: training/configs/clip.yaml",
        section="trained",
        identity=Through("objective", "loss_weights"),
    )
    objective: dict[str, Any] | None = setting(
        None,
        "terms of other kinds beside them, which the saved model does not know, as {term: weight} or "
        '{term: {"weight": 1.0, option: value}}: docs/objectives.md',
        section="trained",
        identity=Through("objective", "further"),
    )
    label_smoothing: float | None = setting(
        None,
        "share a of the targets spread over the negatives; default: the model config's",
        section="trained",
        identity=Through("objective", "label_smoothing"),
        share=True,
    )
    allow_empty_terms: bool = setting(
        False,
        "train although no pair has the levels of some term, which then stays 0",
        section="trained",
        identity=None,
    )
    multi_positive: bool = setting(
        False,
        "pairs of a batch with the same text are each other's positives (the paper: no); tags repeat often",
        section="trained",
        identity="objective",
    )
    freeze: Literal["none", "vision", "text"] = setting(
        "none",
        "tower kept as it is, its projection and running statistics too",
        section="trained",
        identity="objective",
    )

    validation_samples: int = setting(
        512, "how many samples of it, from its beginning", section="data", identity=None, at_least=1
    )
    data_shares: list[float] = setting(
        [],
        "share of each of train_data in every global batch, in their order; default: one after another (paper)",
        section="data",
        identity="data",
    )
    shuffle_window_samples: int | None = setting(
        None,
        "samples are permuted in windows of so many; default: 16 global batches, 131072 or more (manifests 4194304)",
        section="data",
        identity="data",
        at_least=1,
    )
    max_regions: int = setting(
        10,
        "objects kept of each picture, most confident first: regions, and the tags that name them (paper: 10)",
        section="data",
        identity="data",
        at_least=1,
    )
    drop_repeated_tags: bool = setting(
        False,
        "a tag that names several objects of a picture comes once (the paper: as often as there are such objects)",
        section="data",
        identity="data",
    )
    allow_mixed_regions: bool = setting(
        False,
        "region features of another width or detector count as missing instead of stopping the run",
        section="data",
        identity="data",
    )
    allow_unfinished: bool = setting(
        False,
        "also read data of which a step of preparation has begun and not ended",
        section="data",
        identity=None,
    )
    global_crop_area: list[float] = setting(
        [0.9, 1.0],
        "smallest and largest share of the picture in the global view (paper)",
        section="data",
        identity="data",
        check=check_area,
    )
    local_crop_area: list[float] = setting(
        [0.5, 1.0], "the same for the local view (paper)", section="data", identity="data", check=check_area
    )
    view_crop_area: list[float] = setting(
        [0.08, 1.0],
        "the same for the two distorted views that terms of `objective` may read (SLIP)",
        section="data",
        identity="data",
        check=check_area,
    )
    synonyms: str | None = setting(
        None,
        "file of synonyms for changed captions, see training.prepare.synonyms; default: words are swapped and left out "
        "only",
        section="data",
        identity=Through("data", "synonyms"),
        names="path",
    )
    # It says when a run stops, and nothing of what it sees until then.
    max_bad_fraction: float = setting(
        0.01,
        "the run stops when a larger share of the samples read lately cannot be read",
        section="data",
        identity=None,
        check=check_share_or_all,
    )
    fetch_attempts: int = setting(
        10,
        "how often a shard is tried whose store is away or stumbles (no connection, HTTP 429 or 5xx, ESTALE)",
        section="data",
        identity=None,
        at_least=1,
    )
    fetch_seconds: float = setting(
        600.0,
        "for how long, with growing pauses; then the run stops, to be continued",
        section="data",
        identity=None,
        at_least=0,
    )
    cache_gigabytes: float = setting(
        64.0,
        "of fetched shards that a machine keeps; room for two windows at least",
        section="data",
        identity=None,
        check=check_above_0,
    )
    # What is refused is replaced by another sample.
    max_image_pixels: int = setting(
        100_000_000,
        "pictures with more pixels are refused before they are decoded",
        section="data",
        identity="data",
        at_least=1,
    )

    per_device_chunk_size: int | None = setting(
        None,
        "gradient caching: pairs encoded at a time on each device; the loss still sees the global batch. "
        "Default: all at once",
        section="batches",
        identity="how",
        at_least=1,
    )
    gradient_accumulation_steps: int = setting(
        1, "must be 1: see the error message for the reason", section="batches", identity=None
    )

    weight_decay: float = changed(
        "weight_decay",
        0.2,
        "of AdamW; not on norms, biases, position and class embeddings, logit_scale (paper: 0.2)",
    )
    ema_decay: float = setting(
        0.0,
        "decay of an exponential moving average of the weights that is evaluated and saved beside them; 0: off",
        section="schedule",
        identity="optimizer",
        share=True,
    )

    torch_compile: bool = setting(
        False, "compile the towers with torch.compile, block by block", section="precision", identity="how"
    )
    torch_compile_mode: Literal["default", "reduce-overhead"] = setting(
        "default",
        "reduce-overhead replays CUDA graphs of the compiled blocks, for batches of fixed shapes (`text_lengths`)",
        section="precision",
        identity="how",
    )
    text_lengths: list[int] = setting(
        [],
        "tokens, e.g. 32: texts of a level are padded to the smallest of these that holds the longest of the batch, "
        "else to the context; default: to the longest. Only under pooling eos, and it changes no text",
        section="precision",
        identity="how",
        check=check_lengths,
    )

    log_duplicate_rates: bool = setting(
        False,
        "also log the share of repeated texts of each level in the global batch",
        section="watching",
        identity=None,
    )
    eval_every_steps: int = setting(
        1000,
        "retrieval per level pair on the validation set; 0: only at the end",
        section="watching",
        identity=None,
        at_least=0,
    )
    push_to_hub: str | None = setting(
        None,
        "repository id that receives the final model",
        section="watching",
        identity=None,
        check=check_repo_id,
    )
    overfit_batches: int = setting(
        0,
        "train on the first so many batches over and over: the loss must reach its floor; 0: off",
        section="watching",
        identity="data",
        at_least=0,
    )

    def __post_init__(self) -> None:
        """Checks each field, then what fields say about each other."""
        super().__post_init__()
        if self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"gradient_accumulation_steps: only 1 is possible, got {self.gradient_accumulation_steps}. The "
                "contrastive loss compares each pair with every other pair of the batch, so the sum over small batches "
                "is another objective (fewer negatives), not the same one with less memory. Set per_device_chunk_size "
                "instead: it encodes so many pairs at a time and computes the loss, exactly, over global_batch_size"
            )
        self._check_graphs()
        if self.data_shares:
            check_shares(self.data_shares, len(self.train_data))
            positions_of(self.data_shares, self.global_batch_size)
        if self.loss_weights or (self.loss_weights is not None and not self.objective):  # {}: those of objective alone
            self.loss_weights = check_loss_weights(self.loss_weights)
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"give exactly one of epochs and max_steps (the length of the run), got epochs={self.epochs} "
                f"and max_steps={self.max_steps}"
            )

    @property
    def replays_graphs(self) -> bool:
        """Whether steps replay CUDA graphs, which needs batches of fixed shapes."""
        return self.torch_compile_mode == "reduce-overhead"

    def _check_graphs(self) -> None:
        if not self.replays_graphs:
            return
        if not self.torch_compile:
            raise ValueError("torch_compile_mode: reduce-overhead needs torch_compile, which is off")
        again = {
            "gradient_checkpointing": self.gradient_checkpointing,
            "per_device_chunk_size": self.per_device_chunk_size,
        }
        if refused := [name for name, value in again.items() if value]:
            raise ValueError(
                f"torch_compile_mode: reduce-overhead with {' and '.join(refused)} is not possible: blocks that run a "
                "second time in a step would overwrite what their CUDA graphs left before. Leave one of them out"
            )

    def per_device_batch_size(self, num_processes: int) -> int:
        """Pairs of the global batch that one of `num_processes` processes encodes.

        Raises:
            ValueError: The global batch cannot be divided evenly, or not into chunks.
        """
        size = super().per_device_batch_size(num_processes)
        if self.per_device_chunk_size and size % self.per_device_chunk_size:
            raise ValueError(
                f"per_device_chunk_size {self.per_device_chunk_size} must divide the batch of one process, "
                f"{size} (= global_batch_size {self.global_batch_size} / {told_processes(num_processes)}): chunks of "
                "different sizes would get different BatchNorm statistics"
            )
        return size
