r"""Fine-tunes the picture encoder as a classifier (paper, appendices B.2 and E).

    python -m training.finetune --model DIR --train-data TRAIN_FOLDER \
        --validation-data VALIDATION_FOLDER [--resume latest]

The new head alone for 8 epochs, then everything, 128 epochs in total, AdamW with a learning rate of 1e-3 on a cosine
without warm-up: these are the paper's; `training.settings.finetuning` says what is ours. Also ours: one cosine and one
optimizer span both stages; while the head learns alone, the encoder is in evaluation mode, so that its BatchNorm
statistics stay as they were trained; a ViT's patch convolution stays frozen throughout, as in pre-training.

Loop, checkpoints, log and exit codes are those of `training.pretrain` (0 finished, 2 a setting or the data is wrong, 75
stopped by SIGTERM after saving, 1 anything else). `docs/transfer.md` explains settings and results.
"""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidclip_command import EXIT_STOPPED, answer_words, run_command
from training.settings.fields import check_named
from training.settings.finetuning import FinetuneArguments
from training.settings.reading import parse_settings


def parse(words: Sequence[str]) -> FinetuneArguments:
    """The settings that the words of a command line stand for."""
    return check_named(parse_settings(FinetuneArguments, words, __doc__, exit_codes=(EXIT_STOPPED,)))


if __name__ == "__main__":
    answer_words(parse)

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from pyramidclip_hf.files import json_text
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPForImageClassification
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.evaluation.classification import classification_metrics
from training.evaluation.results import metric_results, write_json
from training.loop.agreement import together
from training.loop.distributed import broadcast_buffers, sum_over_processes, world_size
from training.loop.identity import Identity
from training.loop.run import RunResult, complete_run, exit_code
from training.loop.task import AUTOCAST, Batch, Metrics, Plan, Reader, StepLoss, Task, plan_steps
from training.transfer.batches import LabelledReader
from training.transfer.classifier import ClassificationObjective, classify, initial_classifier
from training.transfer.parts import Part, measurable, open_parts

KEPT_METRICS = ("top_1", "top_5", "mean_per_class")


@dataclass
class ClassificationTask(Task):
    """A classifier on the picture encoder, in two stages.

    Attributes:
        settings: Those of the run.
        objective: The classifier under cross-entropy.
        processor: Saved beside the model.
        reader: The training data of this process.
        plan: How long the run is.
        parts: "train", and "validation", "test" where named.
        bad: Pictures that were left out of "validation".
    """

    settings: FinetuneArguments
    objective: ClassificationObjective
    processor: PyramidCLIPProcessor
    reader: Reader
    plan: Plan
    parts: Mapping[str, Part]
    bad: int

    name = "finetune"

    def begin_epoch(self, epoch: int) -> None:
        """Goes to the stage that the epoch belongs to."""
        self.objective.set_head_only(epoch < self.settings.head_epochs)

    def backward(self, accelerator: Any, wrapped: nn.Module, batch: Batch) -> StepLoss:
        """Of everything, or of the head alone."""
        if not self.objective.head_only:
            return super().backward(accelerator, wrapped, batch)
        # Around DDP, which expects gradients of everything that it was built with.
        losses = self.objective(batch)
        accelerator.backward(losses.loss)
        for parameter in self.objective.model.classifier.parameters():
            if parameter.grad is not None:
                parameter.grad.copy_(sum_over_processes(parameter.grad) / world_size())
        return losses

    def identity(self) -> Identity:
        """With the names of the classes, in their order."""
        known, names = super().identity(), self.parts["train"].data.class_names
        classes = f"{len(names)}: {hashlib.sha256(json_text(names).encode()).hexdigest()[:16]}"
        return {**known, "data": {**known["data"], "classes": classes}}

    @property
    def eval_every_steps(self) -> int:
        """After so many epochs as set."""
        return self.settings.eval_every_epochs * self.plan.steps_per_epoch

    def batch_metrics(self, batch: Batch) -> Metrics:
        """`head_only`: 1 in the first stage, 0 in the second."""
        return {"head_only": float(self.objective.head_only)}

    def evaluate(self) -> Metrics:
        """`validation/METRIC`, and `validation/bad` where pictures were left out."""
        return self.measured("validation") | ({"validation/bad": float(self.bad)} if self.bad else {})

    def final_metrics(self) -> Metrics:
        """`test/METRIC`."""
        return self.measured("test")

    def measured(self, name: str) -> Metrics:
        """`NAME/METRIC` of a part; empty where there is no such part. See `classification_metrics`."""
        if name not in self.parts:
            return {}
        pictures, model = self.parts[name].pictures, self.objective.model
        broadcast_buffers(model)
        self.objective.eval()
        autocast = AUTOCAST[self.settings.precision]
        scores = classify(model, self.processor, pictures, self.settings.eval_batch_size, autocast)
        metrics = classification_metrics(scores, torch.tensor(pictures.labels))
        return {f"{name}/{metric}": metrics[metric] for metric in KEPT_METRICS}

    def describe_objective(self) -> str:
        """Classes, smoothing and stages."""
        args, classes = self.settings, self.objective.model.config.num_labels
        return (
            f"cross-entropy over {classes} classes, label smoothing {args.label_smoothing}; "
            f"{args.head_epochs} of {args.epochs} epochs the head alone"
        )

    def record(self) -> dict[str, Any]:
        """What the model does, and the size of each part."""
        pictures = {name: len(part.numbers) for name, part in self.parts.items()}
        return {"task": "image-classification", "pictures": pictures}

    def write_card(self, folder: Path, record: Mapping[str, Any]) -> None:
        """README.md, and `results.json` as `training.evaluate` writes it."""
        args, name = self.settings, Path(self.settings.output_dir).name
        results = self.results(record["metrics"])
        write_json(results, folder / "results.json", name, {"settings": record["settings"]})
        data = ModelCardData(
            model_name=name if results else None,
            library_name="transformers",
            pipeline_tag="image-classification",
            tags=["pyramidclip"],
            eval_results=results or None,
        )
        class_names = self.parts["train"].data.class_names
        classes, names = len(class_names), ", ".join(class_names[:10])
        rows = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in record["metrics"].items())
        ours = isinstance(self.objective.model, PyramidCLIPForImageClassification)
        kind = "a PyramidCLIP model" if ours else "a supervised ResNet"
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nA classifier of {classes} classes ({names}"
            f"{', ...' if classes > 10 else ''}): the picture encoder of {kind} "
            f"({args.model}), fine-tuned with `training.finetune` for {args.epochs} epochs, the "
            f"first {args.head_epochs} of them the head alone.\n\n```python\nimport pyramidclip_hf\n"
            'from transformers import pipeline\n\nclassify = pipeline("image-classification", model=FOLDER)\n```\n\n'
            f"| metric | value |\n|---|---|\n{rows}\n\nAll settings are in training.json.\n"
        ).save(folder / "README.md")

    def results(self, metrics: Metrics) -> list[EvalResult]:
        """What was measured of each part, as the Hub keeps it."""
        results: list[EvalResult] = []
        for split in ("validation", "test"):
            found = {name.split("/")[1]: value for name, value in metrics.items() if name.startswith(f"{split}/")}
            if found:
                data = self.parts[split].data
                results += metric_results("image-classification", data, split, found, config="fine-tuned")
        return results


def classification_task(args: FinetuneArguments, accelerator: Any, folder: Path) -> ClassificationTask:
    """The task of these settings; `accelerator` decides the device."""
    parts = together(lambda: open_parts(args, args.dataset))  # before the processes share the looking at pictures
    parts, bad = measurable(parts)
    if bad:
        told = f"{parts['validation'].source}: {len(bad)} of {len(bad) + len(parts['validation'].numbers)}"
        accelerator.print(f"{told} pictures cannot be read and are left out of validation: {bad[0]}", file=sys.stderr)
    model, processor = initial_classifier(args, parts["train"].data.class_names)
    plan = plan_steps(len(parts["train"].numbers), args.global_batch_size, epochs=args.epochs)
    reader = LabelledReader(parts["train"], processor, args, accelerator.device)
    objective = ClassificationObjective(model, args.label_smoothing, AUTOCAST[args.precision]).to(accelerator.device)
    return ClassificationTask(args, objective, processor, reader, plan, parts, len(bad))


def run(args: FinetuneArguments) -> RunResult:
    """The whole run, see `training.loop.run.complete_run`."""
    return complete_run(args, classification_task)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(parse, lambda args: exit_code(run(args), args), argv)


if __name__ == "__main__":
    sys.exit(main())
