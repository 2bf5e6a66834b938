r"""Trains a detector on the picture tower: Faster R-CNN, or Mask R-CNN with --with-masks (paper, tables 5, 10 and 13).

    python -m training.detection --config training/configs/voc_faster_rcnn.yaml --model DIR \
        --train-data VOC2007:trainval VOC2012:trainval --test-data VOC2007:test [--resume latest]
    python -m training.detection --config training/configs/coco_mask_rcnn.yaml --model DIR \
        --train-data instances_train2017.json:train2017 --test-data instances_val2017.json:val2017

The ResNet of a PyramidCLIP model, or of a CLIP model that `conversion.init_from_clip` converted, in C4 form: three
stages below, the fourth on each region; all of it learns. An architecture name (`--model RN50`) starts from new
weights, the paper's random row; the folder of `conversion.convert_torchvision` from supervised ones. Annotations are
checked before the first step, and faults are counted and named.

It leaves RUN/final with the model, results.json, results.csv, training.json and the card, RUN/detections.json in COCO's
form, and RUN/detections.html: pictures with what was found beside what is there, mistakes first.

Loop, checkpoints, log and exit codes are those of `training.pretrain` (0 finished, 2 a setting or the data is wrong, 75
stopped by SIGTERM after saving, 1 anything else). `docs/detection.md` explains settings and results.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramidclip_command import EXIT_STOPPED, answer_words, run_command
from training.settings.detecting import DetectionArguments
from training.settings.fields import check_named
from training.settings.reading import parse_settings


def parse(words: Sequence[str]) -> DetectionArguments:
    """The settings that the words of a command line stand for."""
    return check_named(parse_settings(DetectionArguments, words, __doc__, exit_codes=(EXIT_STOPPED,)))


if __name__ == "__main__":
    answer_words(parse)

import torch
from huggingface_hub import ModelCard, ModelCardData

from pyramidclip_hf.files import json_text, write_atomically
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.annotations import AnnotatedPictures, open_annotations
from training.data.shared_files import refuse_shared_files
from training.evaluation.detection import Found, Measured, detection_results, measure
from training.evaluation.results import results_table, write_csv, write_json
from training.loop.distributed import broadcast_buffers, rank
from training.loop.optim import build_optimizer, build_sgd, learning_rate_at
from training.loop.run import RunResult, complete_run, exit_code
from training.loop.task import AUTOCAST, Metrics, Plan, Reader, Task, plan_steps
from training.reports.detections_page import write_page
from training.transfer.detection_batches import DetectionReader
from training.transfer.detector import (
    DetectionObjective,
    find_objects,
    initial_detector,
    refuse_small_pictures,
    statistics_kept,
    take_statistics,
)


@dataclass
class DetectionTask(Task):
    """A detector.

    Attributes:
        settings: Those of the run.
        objective: The detector under its losses.
        processor: Saved beside the model.
        reader: The training data of this process.
        plan: How long the run is.
        parts: "train", and "validation", "test" where named.
        folder: Of the run.
        measured: Of each part measured last.
    """

    settings: DetectionArguments
    objective: DetectionObjective
    processor: PyramidCLIPProcessor
    reader: Reader
    plan: Plan
    parts: Mapping[str, AnnotatedPictures]
    folder: Path
    measured: dict[str, Measured]

    name = "detection"

    def build_optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum, or AdamW."""
        args = self.settings
        if args.optimizer == "sgd":
            return build_sgd(self.objective, args.learning_rate, args.momentum, args.weight_decay)
        betas = (args.adam_beta1, args.adam_beta2)
        return build_optimizer(self.objective, args.learning_rate, args.weight_decay, betas, args.adam_epsilon)

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, from 0: a linear rise, then steps down; without `decay_at` half a cosine."""
        args, total = self.settings, self.plan.total_steps
        if args.decay_at:
            return args.learning_rate_of(step, total)
        return learning_rate_at(
            step, total, args.learning_rate, args.warmup_fraction, args.final_learning_rate_fraction
        )

    @property
    def eval_every_steps(self) -> int:
        """As set, where there is something to measure."""
        return self.settings.eval_every_steps if "validation" in self.parts else 0

    def evaluate(self) -> Metrics:
        """`validation/METRIC`; the running statistics are afterwards what they were."""
        if "validation" not in self.parts:
            return {}
        with statistics_kept(self.objective):
            return self._measured("validation")

    def final_metrics(self) -> Metrics:
        """`test/METRIC`; the model keeps the statistics that it was measured with, and is saved with them."""
        if "test" in self.parts:
            return self._measured("test")
        self._take_statistics()
        return {}

    def _take_statistics(self) -> None:
        if self.settings.precise_batch_norm and isinstance(self.reader, DetectionReader):
            past_the_last = math.ceil(self.plan.total_steps / self.plan.steps_per_epoch) + 1
            take_statistics(self.objective, self.reader, past_the_last, self.settings.precise_batch_norm)
        broadcast_buffers(self.objective.model)

    def _measured(self, name: str) -> Metrics:
        data = self.parts[name]
        self._take_statistics()
        self.objective.eval()
        found = find_objects(self.objective.model, data, AUTOCAST[self.settings.precision])
        measured = measure(data, found, self.settings.with_masks and data.has_masks)
        self.measured[name] = measured
        if rank() == 0 and not self.settings.dry_run:
            self._write(name, data, found, measured)
        return {f"{name}/{metric}": value for metric, value in measured.metrics.items()}

    def _write(self, name: str, data: AnnotatedPictures, found: Sequence[Found], measured: Measured) -> None:
        """detections.json and detections.html of the test, or of the validation data where there is no test."""
        if name != "test" and "test" in self.parts:
            return
        entries = [
            {
                "image_id": picture.number,
                "category_id": data.class_ids[int(label)],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": float(score),
                **({} if one.masks is None else {"segmentation": one.masks[index]}),
            }
            for picture, one in zip(data.pictures, found)
            for index, ((x1, y1, x2, y2), score, label) in enumerate(
                zip(one.boxes.tolist(), one.scores.tolist(), one.labels.tolist())
            )
        ]
        write_atomically(self.folder / "detections.json", (json_text(entries) + "\n").encode())
        write_page(self.folder / "detections.html", data, found, measured)

    def describe_objective(self) -> str:
        """Kind, classes, sizes."""
        args, config = self.settings, self.objective.model.config
        kind = "Mask" if args.with_masks else "Faster"
        return (
            f"{kind} R-CNN over {config.num_labels} classes, {config.roi_samples} regions of a picture, short sides "
            f"{min(args.short_sides)} to {max(args.short_sides)}; {args.optimizer}, BatchNorm {args.batch_norm}"
        )

    def record(self) -> dict[str, Any]:
        """What the model does, the size of each part, and what was passed over in it."""
        return {
            "task": "object-detection",
            "pictures": {name: len(part) for name, part in self.parts.items()},
            "passed over": {name: part.told() for name, part in self.parts.items()},
            "per class": {name: one.per_class for name, one in self.measured.items()},
        }

    def write_card(self, folder: Path, record: Mapping[str, Any]) -> None:
        """README.md, and results.json and results.csv as `training.evaluate` writes them."""
        args, name = self.settings, Path(self.settings.output_dir).name
        overall = [row for part, one in self.measured.items() for row in detection_results(self.parts[part], part, one)]
        rows = [
            row for part, one in self.measured.items() for row in detection_results(self.parts[part], part, one, True)
        ]
        write_json(rows, folder / "results.json", name, {"settings": record["settings"]})
        write_csv(rows, folder / "results.csv")
        data = ModelCardData(
            model_name=name if overall else None,
            library_name="transformers",
            pipeline_tag="object-detection",
            tags=["pyramidclip"],
            eval_results=overall or None,
        )
        table = "\n".join(f"| {metric} | {value:.4f} |" for metric, value in record["metrics"].items())
        kind = "Mask" if args.with_masks else "Faster"
        tower = (
            "a supervised ResNet" if self.objective.model.config.plain else "the picture tower of a PyramidCLIP model"
        )
        ModelCard(
            f"---\n{data.to_yaml()}\n---\n\n# {name}\n\nA {kind} R-CNN of C4 form on {tower} "
            f"({args.model}), trained with `training.detection` for {self.plan.total_steps} steps of "
            f"{args.global_batch_size} pictures.\n\n```python\nfrom PIL import Image\nfrom pyramidclip_hf."
            "modeling_detection import PyramidCLIPForObjectDetection\n\nmodel = "
            "PyramidCLIPForObjectDetection.from_pretrained(FOLDER).eval()\n"
            "found = model.detect([Image.open(FILE)])[0]\n```\n\n`voc_` is VOC's 11-point rule, the others are "
            f"COCO's.\n\n| metric | value |\n|---|---|\n{table}\n\n"
            "All settings are in training.json, each class in results.csv.\n"
        ).save(folder / "README.md")
        if overall:
            print(results_table(overall))


def open_parts(args: DetectionArguments) -> dict[str, AnnotatedPictures]:
    """The parts "train", "validation" and "test" that settings name, checked.

    Raises:
        ValueError: As `open_annotations`; masks are to be learnt and absent; a picture is trained and measured on.
        FileNotFoundError: As `open_annotations`.
    """
    parts = {"train": open_annotations(args.train_data, training=True)}
    named = {"validation": [args.validation_data] if args.validation_data else [], "test": args.test_data}
    for name, sources in named.items():
        if sources:
            parts[name] = open_annotations(sources, training=False, class_names=parts["train"].class_names)
    if args.with_masks and not parts["train"].has_masks:
        raise ValueError(
            f"with_masks: objects of {parts['train'].name} have no masks (VOC's boxes have none). Leave the mask head "
            "out, or take COCO's annotations with segmentation"
        )
    for part in parts.values():
        part.max_image_pixels = args.max_image_pixels
    learnt = [one.path for one in parts["train"].pictures]
    for name in named.keys() & parts.keys():
        refuse_shared_files(learnt, [one.path for one in parts[name].pictures], parts[name].name)
    return parts


def detection_task(args: DetectionArguments, accelerator: Any, folder: Path) -> DetectionTask:
    """The task of these settings; `accelerator` decides the device."""
    parts = open_parts(args)
    for part in parts.values():
        for line in part.told():
            accelerator.print(line)
    model, processor = initial_detector(args, parts["train"].class_names)
    refuse_small_pictures(parts, args, min(model.config.anchor_sizes))
    plan = plan_steps(len(parts["train"]), args.global_batch_size, epochs=args.epochs, max_steps=args.max_steps)
    reader = DetectionReader(parts["train"], args, model.config, accelerator.device)
    objective = DetectionObjective(model, AUTOCAST[args.precision]).to(accelerator.device)
    return DetectionTask(args, objective, processor, reader, plan, parts, folder, {})


def run(args: DetectionArguments) -> RunResult:
    """The whole run, see `training.loop.run.complete_run`."""
    return complete_run(args, detection_task)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(parse, lambda args: exit_code(run(args), args), argv)


if __name__ == "__main__":
    sys.exit(main())
