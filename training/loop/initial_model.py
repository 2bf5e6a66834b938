"""Where a run starts: a named architecture with new weights, or a folder or Hub repository with trained ones."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyramidclip_hf.configuration_pyramidclip import ARCHITECTURES, PyramidCLIPConfig
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.tokenization_pyramidclip import PyramidCLIPTokenizer
from training.settings.pretraining import PretrainingArguments


def initial_model(args: PretrainingArguments) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    """The model in fp32 and its processor; the objective of `args` is written into the model's config.

    `args.model` is a name of `ARCHITECTURES` (changed by `args.model_config`), a folder, or a Hub id; new weights
    depend on `args.seed` only.

    Raises:
        ValueError: It is none of these (near architectures are named), `model_config` meets trained weights, or the
            trained model is not whole.
    """
    model, processor = named_model(args.model, args.model_config, args.seed)
    model.config.further_loss_terms = sorted(args.objective or {})
    if args.loss_weights is not None:
        model.config.loss_weights = dict(args.loss_weights)
    if args.label_smoothing is not None:
        model.config.label_smoothing = args.label_smoothing
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model, processor


def named_model(
    name: str, changes: Mapping[str, Any] | None, seed: int
) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    """The dual encoder in fp32 and its processor that a name means.

    Args:
        name: As the setting `model`.
        changes: To an architecture's config.
        seed: Of new weights.

    Raises:
        ValueError: As `initial_model`.
    """
    return _new_model(name, changes, seed) if name in ARCHITECTURES else _trained_model(name, changes)


def _new_model(
    name: str, changes: Mapping[str, Any] | None, seed: int
) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    config = PyramidCLIPConfig.from_architecture(name, **(changes or {}))
    torch.manual_seed(seed)
    model = PyramidCLIPModel(config)
    side = config.vision_config.image_size
    images = PyramidCLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    # Saved with the model: whoever loads both gets texts that are no longer than it reads.
    texts = PyramidCLIPTokenizer(model_max_length=config.text_config.max_position_embeddings)
    return model, PyramidCLIPProcessor(images, texts, roi_feature_size=config.vision_config.roi_feature_size)


def _trained_model(name: str, changes: Mapping[str, Any] | None) -> tuple[PyramidCLIPModel, PyramidCLIPProcessor]:
    is_clips = name.replace("/", "-") in ARCHITECTURES  # ViT-B/32, as papers have it
    if not Path(name).is_dir() and ("/" not in name or is_clips):
        near = [name.replace("/", "-")] if is_clips else difflib.get_close_matches(name, ARCHITECTURES, n=3)
        told = f"did you mean {' or '.join(near)}?" if near else f"architectures: {', '.join(ARCHITECTURES)}"
        raise ValueError(f"model: expected an architecture, a folder or a Hub id (owner/name), got {name!r}; {told}")
    if changes:
        raise ValueError(
            f"model_config changes an architecture's sizes, but model {name} has trained weights of a "
            f"fixed size; leave it out"
        )
    loaded = load_model(name)
    return loaded.model, loaded.processor
