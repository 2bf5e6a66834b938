"""Features of labelled pictures from a frozen encoder, computed once by all processes and kept on disk."""

import hashlib
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

import pyramidclip_hf
from pyramidclip_hf.files import cache_folder, json_text, write_atomically
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.labelled import LabelledPictures
from training.evaluation.embedding import map_batches
from training.loop.distributed import any_process
from training.transfer.parts import Part, content_digest, pictures_of, told_unreadable

_CACHE_FORMAT = 1


FeatureKind = Literal["backbone", "projected"]
Features = np.ndarray[Any, np.dtype[np.float32]]


class FeatureSettings(Protocol):
    """How features are computed and kept.

    Attributes:
        features: See `picture_features`.
        batch_size: Pictures encoded at a time by each process.
        cache_dir: Folder of kept features; "none": they are not kept; None: one in the project's cache.
    """

    features: FeatureKind
    batch_size: int
    cache_dir: str | None


@torch.inference_mode()
def picture_features(
    model: PyramidCLIPModel, processor: PyramidCLIPProcessor, data: LabelledPictures, kind: FeatureKind, batch_size: int
) -> torch.Tensor:
    """(N, D) float32 features of all pictures, equal on any number of processes.

    Args:
        model: In evaluation mode afterwards.
        processor: Of the model.
        data: N pictures.
        kind: "backbone", the vision tower's `pooler_output` (ViT: the class token after the last norm; ResNet: the
            attention pooling before its output projection), or "projected", the embedding without normalisation.
        batch_size: Pictures encoded at a time by each process.

    Raises:
        ValueError: Pictures cannot be read; how many, and the first ones.
    """
    model.eval()

    def prepare(numbers: range) -> tuple[torch.Tensor, dict[int, str]]:
        pictures, problems = pictures_of(data, numbers)
        if problems:
            return torch.empty(0), problems
        return processor.image_processor(pictures, return_tensors="pt")["pixel_values"], problems

    def encode(prepared: tuple[torch.Tensor, dict[int, str]]) -> tuple[torch.Tensor, dict[int, str]]:
        pixels, problems = prepared
        if problems:
            return pixels, problems
        pixels = pixels.to(model.device, model.dtype)
        pooled = model.vision_model(pixels).pooler_output if kind == "backbone" else model.encode_image(pixels)
        return pooled.float().cpu(), {}

    what = f"features of {data.name}"
    found = map_batches(encode, len(data), batch_size, what, prepare=prepare, device=model.device)
    if bad := {number: problem for _, problems in found for number, problem in problems.items()}:
        raise ValueError(f"{data.name}: {told_unreadable(bad, len(data))}. Nothing is skipped: repair or remove them")
    return torch.cat([features for features, _ in found])


def features_key(
    model: PyramidCLIPModel, processor: PyramidCLIPProcessor, part: Part, args: FeatureSettings
) -> dict[str, Any]:
    """All that features depend on: weights, configuration, pixels, preprocessing, how they are computed."""
    modules: list[nn.Module] = [model.vision_model]
    if args.features == "projected":
        modules.append(model.visual_projection)
    weights = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {
        "format": _CACHE_FORMAT,
        "weights": weights.hexdigest(),
        "config": model.config.vision_config.to_json_string(use_diff=False),
        "preprocessing": processor.image_processor.to_json_string(),
        "pictures": content_digest(part),
        "features": args.features,
        # These change the last bits only.
        "computed": [args.batch_size, str(model.dtype), model.device.type],
        "versions": [pyramidclip_hf.__version__, torch.__version__, transformers.__version__],
    }


def read_features(path: Path, key: str) -> Features | None:
    """The features kept in a file under `key`; None where there are none, or the file is damaged or another's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "numpy") as file:
            return file.get_tensor("features") if (file.metadata() or {}).get("key") == key else None
    except (SafetensorError, OSError):
        print(f"{path} is damaged; its features are computed again", file=sys.stderr)
        return None


def cached_features(
    model: PyramidCLIPModel, processor: PyramidCLIPProcessor, part: Part, args: FeatureSettings
) -> Features:
    """(N, D) float32 features of the pictures of a part, from the cache where it has those of its whole source.

    All processes call it together; what is kept on disk is written once, whole or not at all.
    """
    if args.cache_dir == "none":
        return picture_features(model, processor, part.data, args.features, args.batch_size).numpy()[part.numbers]
    key = json_text(features_key(model, processor, part, args), sort_keys=True)
    folder = Path(args.cache_dir) if args.cache_dir else cache_folder() / "features"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
    features = read_features(path, key)
    if any_process(features is None) or features is None:  # one without it needs all of them
        features = picture_features(model, processor, part.data, args.features, args.batch_size).numpy()
        if _is_first_process():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, save({"features": features}, metadata={"key": key}))
    return features[part.numbers]


def _is_first_process() -> bool:
    from accelerate import PartialState

    first: bool = PartialState().is_main_process
    return first
