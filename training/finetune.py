"""Fine-tunes the picture encoder as a classifier (paper, appendices B.2 and E).

    accelerate launch -m training.finetune --model DIR --train-data FOLDER --validation-data FOLDER [--resume latest]

The new head alone for 8 epochs, then everything, 128 epochs in total, AdamW with a learning rate of 1e-3 on a cosine
without warm-up: these are the paper's; `training.settings.finetuning` says what is ours. Also ours: one cosine and one
optimizer span both stages; while the head learns alone, the encoder is in evaluation mode, so that its BatchNorm
statistics stay as they were trained; a ViT's patch convolution stays frozen throughout, as in pre-training.

Loop, checkpoints, log and exit codes are those of `training.pretrain` (0 finished, 2 a setting or the data is wrong, 75
stopped by SIGTERM after saving, 1 anything else). `docs/transfer.md` explains settings and results.

Read from the bottom: `main` parses, `build` makes the parts, `FinetuneRun` is what differs from pre-training.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from pyramidclip_hf.image_processing_pyramidclip import upright_rgb
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPForImageClassification
from training.data.batches import BatchReport, DataError
from training.data.labelled import LabelledPictures
from training.data.loader import BatchReader
from training.data.order import SampleOrder
from training.data.views import crop_box, cut_view
from training.evaluate import classification_metrics
from training.evaluation.embedding import map_batches
from training.evaluation.results import write_json
from training.loop.checkpoint import IDENTITY_WITHOUT
from training.loop.distributed import broadcast_buffers, rank, sum_over_processes, world_size
from training.loop.initial_model import named_model
from training.loop.objective import StepLoss
from training.loop.optim import build_optimizer, set_learning_rate
from training.pretrain import (
    AUTOCAST,
    Run,
    RunResult,
    complete_run,
    plan_steps,
    run_command,
    start_processes,
    synchronised_batch_norm,
)
from training.settings.finetuning import FinetuneArguments
from training.settings.pretraining import parse_arguments
from training.transfer.parts import Part, fingerprint, metric_results, open_parts

ASPECT = (3 / 4, 4 / 3)
# What is drawn for a picture in an epoch.
_CROP, _FLIP = range(2)


##################################################################################################
#  Data                                                                                          #
##################################################################################################


class LabelledBatches(torch.utils.data.Dataset):
    """Makes training batches of labelled pictures; runs inside loader workers.

    data: the pictures. order: `SampleOrder` over one shard of them. height, width, mean, std: of the pictures made.
    area: shares of the picture in a crop. flip: mirror half of them. Crop and mirroring are functions of (seed, epoch,
    picture) alone.
    """

    def __init__(self, data: LabelledPictures, order: SampleOrder, processor, area: Sequence[float], flip: bool):
        images = processor.image_processor
        self.data, self.order, self.area, self.flip = data, order, tuple(area), flip
        self.height, self.width = images.crop_size["height"], images.crop_size["width"]
        self.mean = torch.tensor(images.image_mean).view(1, 3, 1, 1)
        self.std = torch.tensor(images.image_std).view(1, 3, 1, 1)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, epoch_and_positions) -> dict[str, Any]:
        """`pixel_values` (B, 3, height, width) float32, `labels` (B,) int64, `sample_keys`, `report`.

        A picture that cannot be read is named in `report`, and the batch holds nothing else then.
        """
        epoch, positions = epoch_and_positions
        numbers = [self.order.locate(epoch, position)[2] for position in positions]
        report, views = BatchReport(), []
        for number in numbers:
            try:
                views.append(self.view(epoch, number))
            except ValueError as error:
                report.bad.append((str(number), self.data.name, "bad-picture", str(error)))
        keys = [str(number) for number in numbers]
        if report.bad:
            return {"sample_keys": keys, "report": report}
        pixels = (torch.stack(views).float() / 255 - self.mean) / self.std
        labels = torch.tensor([self.data.labels[number] for number in numbers])
        return {"pixel_values": pixels, "labels": labels, "sample_keys": keys, "report": report}

    def view(self, epoch: int, number: int) -> torch.Tensor:
        """uint8 (3, height, width): the random crop of a picture, perhaps mirrored."""
        picture = np.array(upright_rgb(self.data.read(number)))
        draws = [np.random.default_rng((self.order.seed, epoch, number, what)) for what in (_CROP, _FLIP)]
        box = crop_box(picture.shape[1], picture.shape[0], self.area, ASPECT, draws[_CROP])
        view = cut_view(torch.from_numpy(picture).permute(2, 0, 1)[None], box, self.height, self.width)
        return view.flip(-1) if self.flip and draws[_FLIP].random() < 0.5 else view


class LabelledReader(BatchReader):
    """The training batches of this process; a picture that cannot be read ends the run with its name."""

    def __init__(self, part: Part, processor, args: FinetuneArguments):
        data = part.pictures
        order = SampleOrder([[len(data)]], args.seed, window_shards=1)
        super().__init__(
            LabelledBatches(data, order, processor, args.crop_area, args.flip),
            order,
            args.global_batch_size,
            rank(),
            world_size(),
            workers=args.dataloader_workers,
            pin_memory=torch.cuda.is_available(),
            # The pictures are read through functions that cannot be pickled.
            start_method="fork",
        )
        self.fingerprint = fingerprint(part)
        self.description = [{"name": part.source, "samples": len(data), "classes": len(data.class_names)}]

    def _account(self, report: BatchReport, samples: int, epoch: int) -> None:
        if report.bad:
            self.close()
            number, name, _, detail = report.bad[0]
            raise DataError(
                f"picture {number} of {name}: {detail}. Training on labelled pictures replaces none of them: repair or "
                "remove it, and continue with --resume latest where only its pixels change"
            )
        self._counts["samples"] += samples


@torch.inference_mode()
def classify(
    model: PyramidCLIPForImageClassification, processor, data: LabelledPictures, batch_size: int, autocast_dtype=None
) -> torch.Tensor:
    """(N, C) float32 logits of all pictures, resized and centre-cropped, in the model's present mode; the same on any
    number of processes.
    """

    def scores(numbers: range) -> torch.Tensor:
        pixels = processor.image_processor([data.read(number) for number in numbers], return_tensors="pt")
        with torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return model(pixel_values=pixels["pixel_values"].to(model.device)).logits.float().cpu()

    return torch.cat(map_batches(scores, len(data), batch_size, f"classifying {data.name}"))


##################################################################################################
#  Model and objective                                                                           #
##################################################################################################


def distinct_labels(class_names: Sequence[str]) -> list[str]:
    """The names, with its number behind one that several classes have, as in CLIP's list for ImageNet."""
    count = Counter(class_names)
    return [f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(class_names)]


def initial_classifier(args: FinetuneArguments, class_names: Sequence[str]):
    """(classifier in fp32 with a new head for these classes, processor): the encoder of the model that `args` name.

    Parameters that pictures do not reach (those of the region branch) lose `requires_grad`.
    """
    encoder, processor = named_model(args.model, args.model_config, args.seed)
    config = encoder.config
    config.id2label = dict(enumerate(distinct_labels(class_names)))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "single_label_classification"
    torch.manual_seed(args.seed)
    model = PyramidCLIPForImageClassification(config)
    model.vision_model = encoder.vision_model
    reached = set(encoder.level_parameters(("global",)))
    for name, parameter in model.named_parameters():
        if not name.startswith("classifier.") and name not in reached:
            parameter.requires_grad_(False)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, processor


class ClassificationObjective(nn.Module):
    """Cross-entropy of a classifier; one forward a step.

    model: the classifier, the submodule `model`. label_smoothing: share of the target spread over all classes.
    autocast_dtype: of the model's forward, None for fp32. `head_only`: the encoder is a fixed function, without
    gradient and in evaluation mode.
    """

    terms = ()

    def __init__(self, model: nn.Module, label_smoothing: float = 0.0, autocast_dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.label_smoothing, self.autocast_dtype = model, label_smoothing, autocast_dtype
        self.head_only = False
        self.train()  # the model freezes its patch convolution here

    def train(self, mode: bool = True) -> "ClassificationObjective":
        """Sets the mode; with `head_only` the encoder stays in evaluation mode."""
        super().train(mode)
        if self.head_only:
            self.model.vision_model.eval()
        return self

    def set_head_only(self, head_only: bool) -> None:
        """Changes the stage."""
        if head_only != self.head_only:
            self.head_only = head_only
            self.train(self.training)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> StepLoss:
        """batch: `pixel_values` (B, 3, H, W), `labels` (B,) int64. The loss is the mean over this process's B; shares
        add up to the mean over all processes, which have equally many.
        """
        pixels, labels = batch["pixel_values"], batch["labels"]
        with torch.autocast(pixels.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
                pooled = self.model.vision_model(pixels).pooler_output
            logits = self.model.classifier(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepLoss(loss, loss.detach()[None] / world_size(), torch.zeros(0, dtype=torch.int64))


##################################################################################################
#  The run                                                                                       #
##################################################################################################


@dataclass(kw_only=True)
class FinetuneRun(Run):
    """A run of pre-training's loop with a classifier in it. parts: "train", and "validation", "test" where named."""

    parts: dict[str, Part]

    name = "finetune"
    logit_scale = None

    @property
    def eval_every_steps(self) -> int:
        return self.args.eval_every_epochs * self.plan.steps_per_epoch

    def identity(self) -> dict[str, Any]:
        args, config = self.args, self.model.config.to_dict()
        for name in (*IDENTITY_WITHOUT, "id2label", "label2id"):
            config.pop(name, None)
        names = self.parts["train"].data.class_names

        def chosen(names: str) -> dict[str, Any]:
            return {name: getattr(args, name) for name in names.split()}

        return {
            "data": {
                "fingerprint": self.reader.fingerprint,
                "samples": self.plan.samples,
                "classes": f"{len(names)}: {hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}",
                **chosen("seed crop_area flip"),
            },
            "objective": chosen("label_smoothing"),
            "schedule": {
                "total_steps": self.plan.total_steps,
                **chosen("head_epochs global_batch_size learning_rate warmup_fraction final_learning_rate_fraction"),
            },
            "optimizer": chosen("weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm"),
            "model": config,
            "how": chosen("precision sync_batch_norm gradient_checkpointing"),
        }

    def take_step(self, batch: dict[str, torch.Tensor], learning_rate: float) -> tuple[StepLoss, torch.Tensor]:
        """One step of the stage that the epoch belongs to."""
        objective, accelerator = self.objective, self.accelerator
        objective.set_head_only(self.progress.epoch < self.args.head_epochs)
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.zero_grad()
        if objective.head_only:
            # Around DDP, which expects gradients of everything that it was built with.
            losses = objective(batch)
            accelerator.backward(losses.loss)
            for parameter in self.model.classifier.parameters():
                parameter.grad.copy_(sum_over_processes(parameter.grad) / world_size())
        else:
            losses = self.wrapped(batch)
            accelerator.backward(losses.loss)
        norm = accelerator.clip_grad_norm_(objective.parameters(), self.args.max_grad_norm or float("inf"))
        self.optimizer.step()
        return losses, torch.as_tensor(norm, device=losses.shares.device)

    def batch_metrics(self, batch: dict[str, torch.Tensor]) -> dict[str, float]:
        return {"head_only": float(self.objective.head_only)}

    def measured(self, name: str) -> dict[str, float]:
        """`NAME/METRIC` of a part, logged; empty where there is no such part. See `classification_metrics`."""
        if name not in self.parts:
            return {}
        pictures = self.parts[name].pictures
        broadcast_buffers(self.model)
        self.objective.eval()
        autocast = AUTOCAST[self.args.precision]
        scores = classify(self.model, self.processor, pictures, self.args.eval_batch_size, autocast)
        self.objective.train()
        metrics = classification_metrics(scores, torch.tensor(pictures.labels))
        metrics = {f"{name}/{metric}": metrics[metric] for metric in ("top_1", "top_5", "mean_per_class")}
        self.log.write(self.progress.step, metrics)
        return metrics

    def evaluate(self) -> dict[str, float]:
        return self.measured("validation")

    def final_metrics(self) -> dict[str, float]:
        return self.measured("test")

    def record(self, metrics: dict[str, float]) -> dict[str, Any]:
        return super().record(metrics) | {
            "task": "image-classification",
            "pictures": {name: len(part.numbers) for name, part in self.parts.items()},
        }

    def write_card(self, folder: Path, record: dict[str, Any]) -> None:
        """README.md, and `results.json` as `training.evaluate` writes it."""
        results = []
        for split in ("validation", "test"):
            found = {name.split("/")[1]: v for name, v in record["metrics"].items() if name.startswith(f"{split}/")}
            if found:
                data = self.parts[split].data
                results += metric_results("image-classification", data, split, found, config="fine-tuned")
        name = self.folder.name
        write_json(results, folder / "results.json", name, {"settings": record["settings"]})
        data = ModelCardData(
            model_name=name if results else None,
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["pyramidclip"],
            eval_results=results or None,
        )
        names = ", ".join(self.parts["train"].data.class_names[:10])
        rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in record["metrics"].items())
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nA classifier of {self.model.config.num_labels} classes ({names}"
            f"{', ...' if self.model.config.num_labels > 10 else ''}): the picture encoder of a PyramidCLIP model "
            f"({record['settings']['model']}), fine-tuned with `training.finetune` for {self.args.epochs} epochs, the "
            f"first {self.args.head_epochs} of them the head alone.\n\n```python\nimport pyramidclip_hf\n"
            'from transformers import pipeline\n\nclassify = pipeline("image-classification", model=FOLDER)\n```\n\n'
            f"| metric | value |\n|---|---|\n{rows}\n\nAll settings are in training.json.\n"
        ).save(folder / "README.md")

    def describe_objective(self) -> str:
        return (
            f"cross-entropy over {self.model.config.num_labels} classes, label smoothing {self.args.label_smoothing}; "
            f"{self.args.head_epochs} of {self.args.epochs} epochs the head alone"
        )


def build(args: FinetuneArguments, folder: Path) -> FinetuneRun:
    """All parts of the run, not yet resumed."""
    accelerator = start_processes(args, folder)
    if accelerator.distributed_type == "DEEPSPEED":
        raise ValueError("fine-tuning runs under DDP, not DeepSpeed: its first epochs train a part of the model alone")
    args.per_device_batch_size(accelerator.num_processes)  # refused before any data is opened
    parts = open_parts(args)
    model, processor = initial_classifier(args, parts["train"].data.class_names)
    plan = plan_steps(args, len(parts["train"].numbers), accelerator.num_processes)
    reader = LabelledReader(parts["train"], processor, args)
    if synchronised_batch_norm(args):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    objective = ClassificationObjective(model, args.label_smoothing, AUTOCAST[args.precision]).to(accelerator.device)
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = build_optimizer(objective, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)
    wrapped, optimizer = accelerator.prepare(objective, optimizer)
    torch.manual_seed(args.seed * 1_000_003 + rank())  # each process its own dropout, if the model has any
    return FinetuneRun(
        args=args,
        accelerator=accelerator,
        folder=folder,
        processor=processor,
        reader=reader,
        plan=plan,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        cache=None,
        average=None,
        validation=None,
        parts=parts,
    )


def run(args: FinetuneArguments) -> RunResult:
    """The whole run, in this process and those that `accelerate launch` started beside it; raises as
    `training.pretrain.run`.
    """
    return complete_run(args, build)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(lambda words: parse_arguments(words, FinetuneArguments), run, argv)


if __name__ == "__main__":
    sys.exit(main())
