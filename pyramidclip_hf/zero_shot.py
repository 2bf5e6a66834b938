# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot use of a trained model: prompt ensembles, classification of pictures, retrieval by embedding.

    >>> predictions = classify(model, processor, ["cat.jpg"], ["cat", "dog", "bird"])
    >>> predictions[0][0].name, round(predictions[0][0].probability, 2)
    ('cat', 0.97)

Everything runs in evaluation mode and without gradients; the model's mode is put back afterwards. Embeddings come back
as float32 unit vectors on the CPU, so that only one batch is ever on the model's device.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from transformers.utils import logging

SIMPLE_TEMPLATES: tuple[str, ...] = ("a photo of a {}.",)

# OpenAI CLIP's prompts for ImageNet (MIT License, Copyright (c) 2021 OpenAI), as open_clip_torch distributes them.
IMAGENET_TEMPLATES: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

# Scores held at a time while retrieving; 64 MB as float32.
_SCORES_AT_A_TIME = 1 << 24


Key = TypeVar("Key")


class Prediction(NamedTuple):
    """A class and its probability among the classes that were asked for."""

    name: str
    probability: float


class Matches(NamedTuple):
    """`scores` (Q, k) float32, highest first, and `indices` (Q, k) int64 into the candidates."""

    scores: torch.Tensor
    indices: torch.Tensor


def class_embeddings(
    model: Any,
    processor: Any,
    names: Sequence[str],
    templates: Sequence[str] = IMAGENET_TEMPLATES,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """One unit vector a class: the mean of the unit embeddings of its prompts, normalised again (CLIP, section 3.1.4).

    Args:
        model: a `PyramidCLIPModel`, or anything with its `encode_text`.
        processor: a processor or a tokenizer.
        names: the classes, each once; "_" is not replaced.
        templates: each with exactly one "{}", where the name goes.
        batch_size: prompts a forward pass.
        device: where the model is; None: `model.device`.
        progress: shows a bar with rate and time left.

    Returns:
        (C, D) float32 on the CPU, in the order of `names`.

    Raises:
        ValueError: no names, empty or repeated ones, a template without exactly one "{}"; embeddings that are no finite
            numbers.
    """
    _check_names(names)
    templates = _checked_templates(templates)
    prompts = [template.replace("{}", name) for name in names for template in templates]
    sums = torch.zeros(0)
    with _evaluation(model):
        for places, embeds in _encoded_texts(model, processor, prompts, batch_size, device, progress):
            if not len(sums):
                sums = embeds.new_zeros(len(names), embeds.shape[1])
            sums.index_add_(0, places // len(templates), embeds)
    return torch.nn.functional.normalize(sums, dim=-1)


def text_embeddings(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    batch_size: int = 256,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Unit embeddings of texts; see `class_embeddings` for the arguments.

    Returns:
        (N, D) float32 on the CPU, in the order of `texts`.

    Raises:
        ValueError: no texts, or something that is no text; embeddings that are no finite numbers.
    """
    result = torch.zeros(0)
    with _evaluation(model):
        for places, embeds in _encoded_texts(model, processor, texts, batch_size, device, progress):
            if not len(result):
                result = embeds.new_empty(len(texts), embeds.shape[1])
            result[places] = embeds
    return result


def image_embeddings(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Unit embeddings of pictures, paths, arrays or whatever else the image processor takes.

    `images` may be a generator: one batch is held at a time. Without a processor (None) they are pixel values already:
    (N, 3, H, W), or an iterable of (3, H, W). See `class_embeddings` for the other arguments.

    Returns:
        (N, D) float32 on the CPU.

    Raises:
        ValueError: no pictures, or one that the image processor refuses; embeddings that are no finite numbers.
    """
    if not isinstance(images, Iterable) or isinstance(images, str) or getattr(images, "ndim", 4) != 4:
        raise ValueError(f"Expected a list of pictures, got one {type(images).__name__}; put it into a list.")
    image_processor = getattr(processor, "image_processor", processor)
    device = model.device if device is None else device
    total = len(images) if isinstance(images, Sized) else None
    with logging.tqdm(total=total, unit="picture", disable=not progress) as bar:
        batches = _pixels_of(iter(images), image_processor, _positive(batch_size))
        parts = []
        for count, embeds in embeddings_ahead(model, batches, device):
            parts.append(embeds)
            bar.update(count)
    if not parts:
        raise ValueError("Expected at least one picture, got none.")
    return torch.cat(parts)


def _pixels_of(pictures: Iterator[Any], image_processor: Any, batch_size: int) -> Iterator[tuple[int, torch.Tensor]]:
    while batch := list(islice(pictures, batch_size)):
        if image_processor is None:
            yield len(batch), torch.stack(batch)
        else:
            yield len(batch), image_processor(batch, return_tensors="pt")["pixel_values"]


def embeddings_ahead(
    model: Any, batches: Iterable[tuple[Key, torch.Tensor]], device: torch.device | str | None = None
) -> Iterator[tuple[Key, torch.Tensor]]:
    """Unit embeddings of batches of pixel values, in order, begun before they are waited for.

    A GPU has two batches at a time: while it works on one, the next is read and copied, and the one before is used.

    Args:
        model: see `class_embeddings`.
        batches: (key, (n, 3, H, W)).
        device: where the model is; None: `model.device`.

    Yields:
        Each key with (n, D) float32 on the CPU.

    Raises:
        ValueError: an embedding is no finite number.
    """
    device = model.device if device is None else torch.device(device)
    waiting: deque[tuple[Key, Callable[[], torch.Tensor]]] = deque()
    for key, pixel_values in batches:
        with _evaluation(model):
            waiting.append((key, _begun(model, pixel_values, device)))
        if len(waiting) == _batches_at_a_time(device):
            first, finish = waiting.popleft()
            yield first, _finite(finish())
    for key, finish in waiting:
        yield key, _finite(finish())


def _finite(embeds: torch.Tensor) -> torch.Tensor:
    """The embeddings; `ValueError` where some are no numbers, which would be ranked as if they were."""
    if not torch.isfinite(embeds).all():
        raise ValueError(
            "Expected embeddings of finite numbers, got NaN or infinity: the model's weights are damaged, or its dtype "
            "is too narrow for them; try float32."
        )
    return embeds


def _batches_at_a_time(device: torch.device) -> int:
    return 2 if device.type == "cuda" else 1


def _begun(model: Any, pixel_values: torch.Tensor, device: torch.device) -> Callable[[], torch.Tensor]:
    """Asks for the embeddings of a batch, which may be empty; what comes back waits for them and returns them."""
    if not len(pixel_values):
        return lambda: torch.zeros(0, model.config.projection_dim)
    if device.type != "cuda":
        embeds = model.encode_image(pixel_values.to(device, model.dtype), normalize=True).float().cpu()
        return lambda: embeds
    # Copies from and to pinned memory are what the host need not wait for; there they are as narrow as the model.
    pinned = torch.empty(pixel_values.shape, dtype=model.dtype, pin_memory=True).copy_(pixel_values)
    embeds = model.encode_image(pinned.to(device, non_blocking=True), normalize=True).float()
    result = torch.empty(embeds.shape, pin_memory=True)
    result.copy_(embeds, non_blocking=True)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))

    def finish() -> torch.Tensor:
        done.synchronize()
        return result

    return finish


def classify(
    model: Any,
    processor: Any,
    images: Iterable[Any],
    names: Sequence[str],
    templates: Sequence[str] = SIMPLE_TEMPLATES,
    class_embeds: torch.Tensor | None = None,
    top_k: int | None = None,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> list[list[Prediction]]:
    """For each picture the `top_k` classes (None: all), most probable first.

    Probabilities are the softmax over the classes of the scaled cosine similarities.

    Args:
        model: see `class_embeddings`.
        processor: None where `images` are pixel values, see `image_embeddings`; `class_embeds` is needed then.
        images: see `image_embeddings`.
        names: the classes, each once.
        templates: see `class_embeddings`; not read where `class_embeds` is given.
        class_embeds: (C, D), what `class_embeddings` gave for `names`; None: computed here.
        top_k: how many classes a picture.
        batch_size: pictures a forward pass.
        device: where the model is; None: `model.device`.
        progress: shows a bar with rate and time left.

    Raises:
        ValueError: see `class_embeddings` and `image_embeddings`; `class_embeds` of another number of classes; `top_k`
            below 1.
    """
    _check_names(names)
    if class_embeds is None:
        class_embeds = class_embeddings(model, processor, names, templates, device=device, progress=progress)
    # Before pictures are encoded for nothing.
    _check_classes(names, class_embeds, top_k)
    image_embeds = image_embeddings(model, processor, images, batch_size, device, progress)
    return classify_embeddings(model, image_embeds, names, class_embeds, top_k)


def classify_embeddings(
    model: Any, image_embeds: torch.Tensor, names: Sequence[str], class_embeds: torch.Tensor, top_k: int | None = None
) -> list[list[Prediction]]:
    """`classify` of pictures whose unit embeddings (N, D) are there already; see there for the rest."""
    top_k = _check_classes(names, class_embeds, top_k)
    scale = model.logit_scale.detach().float().exp().cpu()
    probabilities = torch.softmax(scale * image_embeds @ class_embeds.float().cpu().T, dim=-1)
    best = probabilities.topk(top_k, dim=-1)
    return [
        [Prediction(names[place], probability) for place, probability in zip(places, row)]
        for places, row in zip(best.indices.tolist(), best.values.tolist())
    ]


def _check_classes(names: Sequence[str], class_embeds: torch.Tensor, top_k: int | None) -> int:
    """How many classes a picture gets."""
    if len(class_embeds) != len(names):
        raise ValueError(f"Expected one row a class in class_embeds, got {len(class_embeds)} for {len(names)} names.")
    return len(names) if top_k is None else min(_positive(top_k), len(names))


def retrieve(queries: torch.Tensor, candidates: torch.Tensor, k: int = 10) -> Matches:
    """The `k` candidates of highest dot product for each query.

    Queries are taken in chunks, so that memory grows with Q + C and not with Q x C. For recall with ties counted
    fairly, see `training.evaluation.retrieval`.

    Args:
        queries: (Q, D).
        candidates: (C, D), on the same device.
        k: how many; fewer come back where there are fewer candidates.

    Raises:
        ValueError: shapes that do not fit, no candidates, or `k` below 1.
    """
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1] or not len(candidates):
        raise ValueError(
            f"Expected queries (Q, D) and at least one candidate (C, D), got {tuple(queries.shape)} and "
            f"{tuple(candidates.shape)}."
        )
    k = min(_positive(k), len(candidates))
    rows = max(1, _SCORES_AT_A_TIME // len(candidates))
    scores = queries.new_empty(len(queries), k, dtype=torch.float32)
    indices = torch.empty_like(scores, dtype=torch.int64)
    for start in range(0, len(queries), rows):
        best = (queries[start : start + rows] @ candidates.T).float().topk(k, dim=-1)
        scores[start : start + rows], indices[start : start + rows] = best
    return Matches(scores, indices)


def _encoded_texts(
    model: Any,
    processor: Any,
    texts: Sequence[str],
    batch_size: int,
    device: torch.device | str | None,
    progress: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields places (n,) in `texts` and unit embeddings (n, D), long texts first: alike lengths need little padding."""
    if isinstance(texts, str) or not texts:
        raise ValueError(f"Expected a list of at least one text, got {texts!r}.")
    tokenizer = getattr(processor, "tokenizer", processor)
    device = model.device if device is None else device
    order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
    with logging.tqdm(total=len(texts), unit="text", disable=not progress) as bar:
        for start in range(0, len(order), _positive(batch_size)):
            places = order[start : start + batch_size]
            batch = tokenizer([texts[place] for place in places], padding=True, truncation=True, return_tensors="pt")
            embeds = model.encode_text(
                batch["input_ids"].to(device), batch["attention_mask"].to(device), normalize=True
            )
            yield torch.tensor(places), _finite(embeds.float().cpu())
            bar.update(len(places))


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _positive(number: int) -> int:
    if not isinstance(number, int) or number < 1:
        raise ValueError(f"batch_size, top_k and k must be integers of at least 1, got {number!r}.")
    return number


def _check_names(names: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise ValueError(f"Expected a list of at least one class name, got {names!r}.")
    blank = [place for place, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if blank:
        raise ValueError(f"Expected class names that are not blank, got {names[blank[0]]!r} at place {blank[0]}.")
    repeated = [name for name, count in Counter(" ".join(name.lower().split()) for name in names).items() if count > 1]
    if repeated:
        raise ValueError(
            f"Class names must differ (case and spaces do not count, they are not encoded), repeated: {repeated[:10]}."
        )


def _checked_templates(templates: Sequence[str]) -> list[str]:
    if isinstance(templates, str) or not templates:
        raise ValueError(f"Expected a list of at least one template, got {templates!r}.")
    wrong = [template for template in templates if not isinstance(template, str) or template.count("{}") != 1]
    if wrong:
        raise ValueError(f'Expected templates with exactly one "{{}}" for the name, got {wrong[0]!r}.')
    return list(templates)
