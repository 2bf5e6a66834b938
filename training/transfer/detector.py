"""A detector on the ResNet picture tower: its first weights, its objective, what it finds."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pyramidclip_hf.configuration_detection import PyramidCLIPDetectionConfig
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPVisionConfig
from pyramidclip_hf.modeling_detection import Objects, PyramidCLIPForObjectDetection, scaled_size
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.annotations import AnnotatedPictures
from training.data.order import batch_positions
from training.evaluation.detection import Found, run_lengths_of
from training.evaluation.embedding import map_batches
from training.loop.distributed import rank, sum_over_processes, world_size
from training.loop.initial_model import named_model
from training.loop.task import Objective, StepLoss
from training.settings.detecting import DetectionArguments
from training.transfer.detection_batches import DetectionReader, read_picture
from training.transfer.supervised import is_supervised_resnet, supervised_resnet


def _trunk_of(args: DetectionArguments) -> tuple[dict[str, Any], dict[str, torch.Tensor], PyramidCLIPProcessor]:
    """What the detector's config says of the trunk that `args` name, its weights, and the processor beside it."""
    if is_supervised_resnet(args.model):
        classifier, processor = supervised_resnet(args.model, args.model_config)
        sizes, images = classifier.config, processor.image_processor
        tower = PyramidCLIPVisionConfig(tower="resnet", layers=tuple(sizes.depths or ()), width=sizes.embedding_size)
        resnet = classifier.resnet
        trunk = {f"stem.{name}": value for name, value in resnet.embedder.state_dict().items()}
        trunk |= {f"stages.{name}": value for name, value in resnet.encoder.stages.state_dict().items()}
        pixels = {"image_mean": images.image_mean, "image_std": images.image_std}
        return {"vision_config": tower, "plain": True, **pixels}, trunk, processor
    encoder, processor = named_model(args.model, args.model_config, args.seed)
    if encoder.config.vision_config.tower != "resnet":
        raise ValueError(
            f"model {args.model}: its picture tower is a ViT, and the detector is of C4 form, three stages of a ResNet "
            "below and the fourth on each region. Take a ResNet model (RN50); a ViT is a backbone for the detectors of "
            "transformers, see PyramidCLIPBackbone in docs/ecosystem.md"
        )
    return {"vision_config": encoder.config.vision_config}, encoder.vision_model.trunk.state_dict(), processor


def initial_detector(
    args: DetectionArguments, class_names: list[str]
) -> tuple[PyramidCLIPForObjectDetection, PyramidCLIPProcessor]:
    """The picture tower of the model that `args` name under new heads for these classes, in fp32, and its processor.

    Raises:
        ValueError: As `named_model` or `supervised_resnet`, the tower is a ViT, or pictures are below every anchor.
    """
    tower, trunk, processor = _trunk_of(args)
    torch.manual_seed(args.seed)
    config = PyramidCLIPDetectionConfig(
        with_masks=args.with_masks,
        short_side=args.test_short_side,
        long_side=args.long_side,
        id2label=dict(enumerate(class_names)),
        label2id={name: number for number, name in enumerate(class_names)},
        **tower,
        **(args.detector or {}),
    )
    smallest, sides = min(config.anchor_sizes), [*args.short_sides, args.test_short_side]
    if min(sides) < smallest:
        raise ValueError(
            f"a short side of {min(sides)} is smaller than the smallest anchor of {smallest}: nothing "
            "could be proposed there. Raise short_sides, or give smaller ones: "
            "--detector '{\"anchor_sizes\": [32, 64]}'"
        )
    model = PyramidCLIPForObjectDetection(config)
    model.trunk.load_state_dict(trunk)
    if args.batch_norm == "frozen":
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.requires_grad_(False)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, processor


def refuse_small_pictures(parts: Mapping[str, AnnotatedPictures], args: DetectionArguments, least: int) -> None:
    """Looks at every picture at the smallest size that it will have.

    Args:
        parts: "train" and others.
        args: Of the run.
        least: The smallest anchor, pixels.

    Raises:
        ValueError: Pictures so narrow that `long_side` makes them smaller than every anchor.
    """
    for name, data in parts.items():
        side = min(args.short_sides) if name == "train" else args.test_short_side
        small = [one for one in data.pictures if min(scaled_size(one.width, one.height, side, args.long_side)) < least]
        if small:
            one = small[0]
            width, height = scaled_size(one.width, one.height, side, args.long_side)
            raise ValueError(
                f"{len(small)} of {len(data)} pictures of {data.name} are so narrow that they become smaller than the "
                f"smallest anchor of {least}: {one.path} of {one.width} x {one.height} becomes {width} x {height}. "
                "Take them out of the annotations, raise long_side, or give smaller anchor_sizes with --detector"
            )


class DetectionObjective(Objective):
    """The losses of a detector over the global batch, whatever the number of processes.

    Args:
        model: The detector; becomes the submodule `model`.
        autocast_dtype: Of the model's forward, None for fp32.
    """

    model: PyramidCLIPForObjectDetection

    def __init__(self, model: PyramidCLIPForObjectDetection, autocast_dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.autocast_dtype = model, autocast_dtype
        masks = ("mask",) if model.config.with_masks else ()
        self.terms = ("objectness", "rpn_box", "classification", "box", *masks)
        self.train()

    def forward(self, batch: Mapping[str, torch.Tensor]) -> StepLoss:
        """Sums over this process's pictures, over counts of all processes, times their number.

        Args:
            batch: As `DetectionBatches` makes it.
        """
        counts = batch["box_counts"].tolist()
        masks = batch["masks"].split(counts) if "masks" in batch else [None] * len(counts)
        targets = [
            Objects(*one) for one in zip(batch["boxes"].split(counts), batch["class_labels"].split(counts), masks)
        ]
        pixels = batch["pixel_values"].to(next(self.model.parameters()).dtype)
        with torch.autocast(pixels.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            losses = self.model(pixels, batch["image_sizes"], targets, batch["draws"])
        sums = torch.stack([losses.sums[name] for name in self.terms])
        counted = sum_over_processes(torch.stack([losses.counts[name] for name in self.terms]))
        terms = sums / counted.clamp(min=1)
        shares = torch.cat([terms.sum()[None], terms]).detach()
        return StepLoss(terms.sum() * world_size(), shares, torch.zeros(0, dtype=torch.int64))


@torch.no_grad()
def take_statistics(objective: DetectionObjective, reader: DetectionReader, epoch: int, batches: int) -> None:
    """Makes BatchNorm's running statistics the means over so many training batches, in place.

    The same on any number of processes, but for the batches that each sees. All processes call it together.

    Args:
        objective: Whose weights it is about; stays in training mode.
        reader: Of the training data.
        epoch: A number that decides scales and mirroring.
        batches: Global ones; at most those of an epoch.
    """
    layers = [module for module in objective.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    layers = [module for module in layers if module.weight.requires_grad]
    kept = [layer.momentum for layer in layers]
    objective.train()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean of all
    device = next(objective.parameters()).device
    for batch in range(min(batches, reader.batches_per_epoch)):
        made = reader.maker[epoch, batch_positions(batch, reader.global_batch_size, rank(), world_size())]
        objective({name: value.to(device) for name, value in made.items() if isinstance(value, torch.Tensor)})
    for layer, momentum in zip(layers, kept):
        layer.momentum = momentum
        for statistics in (layer.running_mean, layer.running_var):
            if statistics is not None:
                statistics.copy_(sum_over_processes(statistics) / world_size())


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are what they were."""
    own = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(model.buffers(), own):
            buffer.copy_(value)


def find_objects(
    model: PyramidCLIPForObjectDetection, data: AnnotatedPictures, autocast_dtype: torch.dtype | None = None
) -> list[Found]:
    """What is found in each picture, one at a time; the same on any number of processes.

    Args:
        model: In evaluation mode.
        data: The pictures.
        autocast_dtype: Of the model's forward, None for fp32.
    """

    def found(numbers: range) -> list[Found]:
        pictures = [read_picture(data.pictures[number], data.max_image_pixels) for number in numbers]
        with torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            results = model.detect(pictures)
        return [_on_the_host(one) for one in results]

    return [one for batch in map_batches(found, len(data), 1, f"detecting in {data.name}") for one in batch]


def _on_the_host(one: Objects) -> Found:
    scores = one.scores if one.scores is not None else one.boxes.new_zeros(len(one.boxes))
    masks = None if one.masks is None else [run_lengths_of(np.asarray(mask)) for mask in one.masks.cpu()]
    return Found(one.boxes.double().cpu().numpy(), scores.double().cpu().numpy(), one.labels.cpu().numpy(), masks)
