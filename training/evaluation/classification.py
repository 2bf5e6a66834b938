"""Zero-shot classification: scores of pictures and classes, and what is counted from them."""

from collections.abc import Sequence

import torch

from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES, class_embeddings
from training.data.labelled import LabelledPictures
from training.evaluation.embedding import map_batches
from training.evaluation.retrieval import rank_counts


def distinct_classes(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """Class names that are not the same but for case and blanks, and for each of `names` the number of its own."""
    folded = [" ".join(name.lower().split()) for name in names]
    distinct = list(dict.fromkeys(folded))
    return [names[folded.index(name)] for name in distinct], [distinct.index(name) for name in folded]


@torch.inference_mode()
def zero_shot_scores(
    model: PyramidCLIPModel,
    processor: PyramidCLIPProcessor,
    data: LabelledPictures,
    templates: Sequence[str] | None,
    batch_size: int,
) -> torch.Tensor:
    """Cosines of pictures and classes, the same on any number of processes, which all call it.

    Classes of one name (CLIP's list for ImageNet has two such pairs) get one embedding, so their scores are equal.

    Args:
        model: in evaluation mode.
        processor: of the model.
        data: N pictures, C classes.
        templates: prompts with `{}` for the class name; None: the 80 of the zero-shot module.
        batch_size: pictures encoded at a time.

    Returns:
        (N, C) float32.

    Raises:
        ValueError: a picture cannot be read.
    """
    templates = IMAGENET_TEMPLATES if templates is None else templates
    first_names, columns = distinct_classes(data.class_names)

    def encode_classes(numbers: range) -> torch.Tensor:
        names = [first_names[number] for number in numbers]
        return class_embeddings(model, processor, names, templates).float().cpu()

    def pixels_of(numbers: range) -> torch.Tensor:
        read = [data.read(number) for number in numbers]
        return processor.image_processor(read, return_tensors="pt")["pixel_values"]

    def encode_pictures(pixels: torch.Tensor) -> torch.Tensor:
        return model.encode_image(pixels.to(model.device, model.dtype), normalize=True).float().cpu()

    classes = torch.cat(map_batches(encode_classes, len(first_names), 16, "class prompts"))[columns]
    done = map_batches(encode_pictures, len(data), batch_size, "pictures", prepare=pixels_of, device=model.device)
    pictures = torch.cat(done)
    return (pictures.double() @ classes.double().T).float()


def classification_metrics(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float | int]:
    """What is reported of a classification; equal scores share the place among them, as in retrieval.

    Args:
        scores: (N, C), of each picture and class.
        labels: (N,) int64, the right classes.

    Returns:
        `top_1`, `top_5`, `mean_per_class` (of top-1, over the classes met), and the numbers of `pictures` and
        `classes`.

    Raises:
        ValueError: a score is NaN or infinite.
    """
    classes = scores.shape[1]
    counts = rank_counts(scores, torch.eye(classes), labels, torch.arange(classes))
    top_1 = counts.recall(1)
    pictures = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=top_1.dtype).scatter_add(0, labels, top_1)[pictures > 0]
    return {
        "top_1": float(top_1.mean()),
        "top_5": float(counts.recall(5).mean()),
        "mean_per_class": float((per_class / pictures[pictures > 0]).mean()),
        "pictures": len(labels),
        "classes": classes,
    }
