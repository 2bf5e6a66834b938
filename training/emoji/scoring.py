"""The emoji scenes as demo and ablations use them: drawn with one recipe, and models scored in one way."""

import io
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.loading import load_model
from training.data.labelled import labelled_shards
from training.data.samples import ShardSamples
from training.emoji.scenes import Recipe, build
from training.evaluation.arguments import EvaluationArguments
from training.evaluation.classification import classification_metrics, zero_shot_scores
from training.evaluation.embedding import embed_levels
from training.evaluation.retrieval import level_metrics
from training.loop.token_scoring import HEADS_FILE, TokenScoring, pairs_of_heads

_PICTURE_SIZE, _SHARD_SIZE, _SEED = 96, 500, 0
_BATCH_SIZE = 64


class Scores(TypedDict):
    """What is measured of a model. retrieval: pair -> metric -> share; zero_shot: metric -> share."""

    retrieval: dict[str, dict[str, float]]
    zero_shot: dict[str, float | int]
    parameters: int
    scale: float
    loss_weights: dict[str, float]
    label_smoothing: float


def draw_scenes(folder: Path, train: int, validation: int, per_object: int, workers: int) -> None:
    """Draws the three splits in `folder`; shards that are there are kept.

    Args:
        folder: For train/, validation/ and objects/.
        train: Scenes to train on.
        validation: Held-out scenes.
        per_object: Pictures of each single object.
        workers: Processes that draw.
    """
    build(Recipe(_SEED, train, validation, per_object, _PICTURE_SIZE, _SHARD_SIZE), folder, workers=workers)


def score_model(folder: Path, scenes: Path) -> tuple[Scores, dict[str, np.ndarray]]:
    """Retrieval on the held-out scenes and zero-shot classification of the single objects by the model in `folder`.

    Returns:
        The scores, and what is behind them: "caption_scores" (Q, I), cosines of captions and pictures, and
        "object_scores" (N, C), cosines of pictures and classes, float32.
    """
    loaded = load_model(str(folder))
    model, processor = loaded.model, loaded.processor
    samples = ShardSamples(str(scenes / "validation"))
    found = embed_levels(model, processor, samples, ["global", "caption", "summary"])
    retrieval = level_metrics(found.embeds, ["global_caption", "global_summary"], found.present, found.owners)
    objects = labelled_shards(str(scenes / "objects"))
    scores = zero_shot_scores(model, processor, objects, None, _BATCH_SIZE)
    texts, pictures = (torch.nn.functional.normalize(found.embeds[level], dim=1) for level in ("caption", "global"))
    measured: Scores = {
        "retrieval": retrieval,
        "zero_shot": classification_metrics(scores, torch.tensor(objects.labels)),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "scale": float(model.logit_scale.detach().exp()),
        "loss_weights": model.config.loss_weights,
        "label_smoothing": model.config.label_smoothing,
    }
    return measured, {"caption_scores": (texts @ pictures.T).numpy(), "object_scores": scores.numpy()}


def score_tokens(folder: Path, scenes: Path) -> dict[str, Any] | None:
    """The same two by the tokens of the model in `folder`.

    Returns:
        "retrieval" and "zero_shot" as in `Scores`; retrieval of the whole picture and the caption alone. None where no
        heads for these two lie beside the model.
    """
    if not (folder / HEADS_FILE).is_file():
        return None
    loaded = load_model(str(folder))
    scoring = TokenScoring.of_folder(folder, loaded.model, loaded.processor, str(folder))
    if "global_caption" not in pairs_of_heads(scoring.heads):
        return None
    objects = labelled_shards(str(scenes / "objects"))
    args = EvaluationArguments(model=str(folder), data=str(scenes), batch_size=_BATCH_SIZE)
    scores = scoring.zero_shot(objects, None, args)
    return {
        "retrieval": scoring.retrieval(ShardSamples(str(scenes / "validation")), args),
        "zero_shot": classification_metrics(scores, torch.tensor(objects.labels)),
    }


def save_arrays(path: Path, **arrays: Any) -> None:
    """Writes an .npz file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomically(path, file.getvalue())
