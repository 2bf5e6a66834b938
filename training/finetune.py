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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from training.evaluation.classification import classification_metrics
from training.evaluation.results import metric_results, write_json
from training.loop.checkpoint import IDENTITY_WITHOUT
from training.loop.distributed import broadcast_buffers, rank, sum_over_processes, world_size
from training.loop.objective import StepLoss
from training.loop.optim import build_optimizer, set_learning_rate
from training.loop.processes import start_processes, synchronised_batch_norm
from training.loop.run import AUTOCAST, Run, RunResult, complete_run, plan_steps
from training.pretrain import run_command
from training.settings.finetuning import FinetuneArguments
from training.settings.reading import parse_settings
from training.transfer.batches import LabelledReader
from training.transfer.classifier import ClassificationObjective, classify, initial_classifier
from training.transfer.parts import Part, open_parts


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
    return run_command(lambda words: parse_settings(FinetuneArguments, words), run, argv)


if __name__ == "__main__":
    sys.exit(main())
