"""A classifier on a picture encoder: its first weights, its objective, its scores."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetForImageClassification
from transformers.configuration_utils import PreTrainedConfig

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPForImageClassification
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.labelled import LabelledPictures
from training.evaluation.embedding import map_batches
from training.loop.distributed import world_size
from training.loop.initial_model import named_model
from training.loop.task import Objective, StepLoss
from training.settings.finetuning import FinetuneArguments
from training.transfer.supervised import is_supervised_resnet, supervised_resnet

Classifier: TypeAlias = PyramidCLIPForImageClassification | ResNetForImageClassification
Config = TypeVar("Config", bound=PreTrainedConfig)


def distinct_labels(class_names: Sequence[str]) -> list[str]:
    """The names, with its number behind one that several classes have, as in CLIP's list for ImageNet."""
    count = Counter(class_names)
    return [f"{name} ({number})" if count[name] > 1 else name for number, name in enumerate(class_names)]


def initial_classifier(args: FinetuneArguments, class_names: Sequence[str]) -> tuple[Classifier, PyramidCLIPProcessor]:
    """The encoder of the model that `args` name under a new head for these classes, in fp32, and its processor.

    Parameters that pictures do not reach (those of the region branch) lose `requires_grad`.

    Raises:
        ValueError: As `named_model` or `supervised_resnet`; checkpointing of a supervised ResNet, which has none.
    """
    if is_supervised_resnet(args.model):
        return _initial_resnet(args, class_names)
    encoder, processor = named_model(args.model, args.model_config, args.seed)
    config = _named_classes(encoder.config, class_names)
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


def _named_classes(config: Config, class_names: Sequence[str]) -> Config:
    config.id2label = dict(enumerate(distinct_labels(class_names)))
    config.label2id = {name: number for number, name in config.id2label.items()}
    config.problem_type = "single_label_classification"
    return config


def _initial_resnet(args: FinetuneArguments, class_names: Sequence[str]) -> tuple[Classifier, PyramidCLIPProcessor]:
    if args.gradient_checkpointing:
        raise ValueError(f"gradient_checkpointing: transformers' ResNet (model {args.model}) has none; leave it out")
    trained, processor = supervised_resnet(args.model, args.model_config)
    torch.manual_seed(args.seed)
    model = ResNetForImageClassification(_named_classes(trained.config, class_names))
    model.resnet = trained.resnet
    return model, processor


def encoder_of(model: Classifier) -> nn.Module:
    """What lies below the head; its `pooler_output` is the head's input."""
    return model.vision_model if isinstance(model, PyramidCLIPForImageClassification) else model.resnet


class ClassificationObjective(Objective):
    """Cross-entropy of a classifier; one forward a step.

    Args:
        model: The classifier; becomes the submodule `model`.
        label_smoothing: Share of the target spread over all classes.
        autocast_dtype: Of the model's forward, None for fp32.

    Attributes:
        head_only: The encoder is a fixed function, without gradient and in evaluation mode.
    """

    model: Classifier
    terms = ()

    def __init__(
        self,
        model: Classifier,
        label_smoothing: float = 0.0,
        autocast_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.model, self.label_smoothing, self.autocast_dtype = model, label_smoothing, autocast_dtype
        self.head_only = False
        self.train()  # the model freezes its patch convolution here

    def train(self, mode: bool = True) -> "ClassificationObjective":
        """Sets the mode; with `head_only` the encoder stays in evaluation mode."""
        super().train(mode)
        if self.head_only:
            encoder_of(self.model).eval()
        return self

    def set_head_only(self, head_only: bool) -> None:
        """Changes the stage."""
        if head_only != self.head_only:
            self.head_only = head_only
            self.train(self.training)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> StepLoss:
        """The mean over this process's B; shares add up to the mean over all processes, which have equally many.

        Args:
            batch: `pixel_values` (B, 3, H, W), `labels` (B,) int64.
        """
        pixels, labels = batch["pixel_values"], batch["labels"]
        with torch.autocast(pixels.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.head_only):
                pooled = encoder_of(self.model)(pixels).pooler_output
            logits = self.model.classifier(pooled)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        return StepLoss(loss, loss.detach()[None] / world_size(), torch.zeros(0, dtype=torch.int64))


@torch.inference_mode()
def classify(
    model: Classifier,
    processor: PyramidCLIPProcessor,
    data: LabelledPictures,
    batch_size: int,
    autocast_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(N, C) float32 logits of all pictures, resized and centre-cropped; the same on any number of processes.

    Args:
        model: In the mode that it is to have.
        processor: Of the model.
        data: N pictures.
        batch_size: Pictures at a time.
        autocast_dtype: Of the model's forward, None for fp32.
    """

    def pixels_of(numbers: range) -> torch.Tensor:
        return processor.image_processor([data.read(number) for number in numbers], return_tensors="pt")["pixel_values"]

    def scores(pixels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(model.device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            return model(pixel_values=pixels.to(model.device)).logits.float().cpu()

    what = f"classifying {data.name}"
    return torch.cat(map_batches(scores, len(data), batch_size, what, prepare=pixels_of, device=model.device))
