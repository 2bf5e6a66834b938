"""Where a run starts: a named architecture with new weights, or a folder or Hub repository with trained ones."""

import difflib
from pathlib import Path

import torch

from pyramidclip_hf.configuration_pyramidclip import ARCHITECTURES, PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.arguments import PretrainingArguments


def initial_model(args: PretrainingArguments) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    """The model in fp32 and its processor; the objective of `args` is written into the model's config.

    `args.model` is a name of `ARCHITECTURES` (changed by `args.model_config`), a folder, or a Hub id; new weights
    depend on `args.seed` only.

    Raises ValueError where it is none of these, naming near architectures, or where `model_config` meets trained
    weights.
    """
    if args.model in ARCHITECTURES:
        model, processor = _new_model(args)
    else:
        model, processor = _trained_model(args)
    if args.loss_weights is not None:
        model.config.loss_weights = dict(args.loss_weights)
    if args.label_smoothing is not None:
        model.config.label_smoothing = args.label_smoothing
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, processor


def _new_model(args):
    config = PyramidCLIPConfig.from_architecture(args.model, **(args.model_config or {}))
    torch.manual_seed(args.seed)
    model = PyramidCLIPModel(config)
    side = config.vision_config.image_size
    images = PyramidCLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return model, PyramidCLIPProcessor(images, roi_feature_size=config.vision_config.roi_feature_size)


def _trained_model(args):
    if not Path(args.model).is_dir() and "/" not in args.model:
        near = difflib.get_close_matches(args.model, ARCHITECTURES, n=3) or list(ARCHITECTURES)
        raise ValueError(
            f"model: expected an architecture, a folder or a Hub id (owner/name), got {args.model!r}; "
            f"architectures: {', '.join(near)}"
        )
    if args.model_config:
        raise ValueError(
            f"model_config changes an architecture's sizes, but model {args.model} has trained weights of a "
            f"fixed size; leave it out"
        )
    model = PyramidCLIPModel.from_pretrained(args.model, dtype=torch.float32)
    return model, PyramidCLIPProcessor.from_pretrained(args.model)
