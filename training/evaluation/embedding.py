"""Embeddings of whole data sets, in batches that are the same on any number of processes.

Batch b holds the same items whatever the number of processes; process p of P takes batches p, p + P, ...; results are
put together by batch number. So every item is encoded exactly once, in the same company (the shape of a matrix product
decides its last bits), and the scores are equal on 1, 2 or 3 processes.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from transformers import BatchFeature

from pyramidclip_hf.image_processing_pyramidclip import MAX_IMAGE_PIXELS
from pyramidclip_hf.levels_pyramidclip import LEVELS, TERMS, levels_of_kind
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.picture_files import read_ahead
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.records import MAX_REGIONS, Sample, best_objects
from training.data.samples import open_picture
from training.evaluation.arguments import check_pairs
from training.evaluation.process import hosts

Result = TypeVar("Result")
Inputs: TypeAlias = BatchFeature | dict[str, torch.Tensor]
# Batches of each process that are gathered at a time: 8 MB of 64 pictures each with 2048 features.
PIECE = 16
_AS_TENSORS: dict[str, Any] = {"padding": True, "return_tensors": "pt"}


def processes() -> tuple[int, int]:
    """This process's number and how many there are, as Accelerate knows them."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('evaluation needs accelerate: pip install "pyramidclip-hf[train]"') from error
    state = PartialState()
    return state.process_index, state.num_processes


def map_batches(
    function: Callable[[Any], Result],
    items: int,
    batch_size: int,
    what: str,
    alone: bool = False,
    prepare: Callable[[range], Any] = lambda indices: indices,
    device: torch.device | None = None,
) -> list[Result]:
    """[function(indices of batch 0), function(of batch 1), ...], on every process, computed by all of them together.

    Args:
        function: a range of item numbers, or what `prepare` made of it -> anything that pickles.
        items: how many there are.
        batch_size: items of a batch; the last may have fewer.
        what: the name of the progress bar.
        alone: this process computes all, and no other needs to take part.
        prepare: reads and decodes, in threads that are ahead of `function`.
        device: where `function` computes. A GPU has a thread for each core of this process, a CPU one.

    Raises:
        ValueError: `batch_size` is below 1.
        ImportError: Accelerate is absent.
    """
    from tqdm.auto import tqdm

    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    rank, size = (0, 1) if alone else processes()
    batches = range(math.ceil(items / batch_size))
    own = batches[rank::size]
    numbers = [range(batch * batch_size, min((batch + 1) * batch_size, items)) for batch in own]
    threads = 1
    if device is not None and device.type != "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with closing(read_ahead(numbers, prepare, threads, threads)) as prepared:
        bar = tqdm(zip(own, prepared), total=len(own), desc=what, unit="batch", disable=rank != 0)
        results = [(batch, function(inputs)) for batch, (_, inputs) in bar]
    by_number = dict(_gathered(results, len(batches), size))
    return [by_number[batch] for batch in batches]


def _gathered(own: list[tuple[int, Result]], batches: int, size: int) -> list[tuple[int, Result]]:
    """Those of all processes, piece by piece, so that none holds the packed results of all at once."""
    if size == 1:
        return own
    every: list[tuple[int, Result]] = []
    for first in range(0, math.ceil(batches / size), PIECE):
        found: list[Any] = [None] * size
        dist.all_gather_object(found, own[first : first + PIECE], group=hosts())
        every += itertools.chain.from_iterable(found)
    return every


@dataclass
class LevelEmbeddings:
    """Embeddings of the levels of N samples, ready for `retrieval.level_metrics`.

    Attributes:
        embeds: level -> (N, D) float32, not normalised; for "caption" (T, D), all captions of all samples.
        present: level -> (N,) bool.
        owners: {"caption": (T,) int64}, the sample of each caption.
        keys: (N,) sample keys.
    """

    embeds: dict[str, torch.Tensor]
    present: dict[str, torch.Tensor]
    owners: dict[str, torch.Tensor]
    keys: list[str] = field(default_factory=list)


def local_view(picture: Image.Image, area: float) -> Image.Image:
    """The middle of a picture, `area` of it in the picture's own aspect: a local view without chance.

    Raises:
        ValueError: `area` is no share in (0, 1].
    """
    if not 0 < area <= 1:
        raise ValueError(f"local view area must be a share in (0, 1], got {area}")
    cut = (1 - math.sqrt(area)) / 2
    width, height = picture.size
    box = (round(cut * width), round(cut * height), round((1 - cut) * width), round((1 - cut) * height))
    return picture.crop((box[0], box[1], max(box[2], box[0] + 1), max(box[3], box[1] + 1)))


def embed_levels(
    model: PyramidCLIPModel,
    processor: PyramidCLIPProcessor,
    samples: Sequence[Sample],
    levels: Sequence[str],
    batch_size: int = 64,
    local_area: float = 1.0,
    alone: bool = False,
    max_regions: int | None = MAX_REGIONS,
    drop_repeated_tags: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> LevelEmbeddings:
    """Encodes the named levels of all samples with `model.encode_levels`, in evaluation mode, without gradient.

    The global view is the processor's (resize, centre crop).

    Args:
        model: put back into the mode it was in.
        processor: of the model.
        samples: N of them.
        levels: of the pyramid.
        batch_size: samples encoded at a time by each process.
        local_area: the local view is the middle `local_area` of the picture, seen as the global one; by default all of
            it, as in the evaluation while training.
        alone: see `map_batches`.
        max_regions: the most confident objects of each sample, see `best_objects`; None: the samples are cut already.
        drop_repeated_tags: see `best_objects`.
        max_image_pixels: see `open_picture`.

    Returns:
        The embeddings; a level that a sample lacks is marked in `present`.

    Raises:
        ValueError: no sample has a level, or a picture cannot be read.
    """
    levels = list(dict.fromkeys(levels))

    def prepare(indices: range) -> tuple[list[Sample], Inputs]:
        chosen = [samples[i] for i in indices]
        if max_regions is not None:
            chosen = [best_objects(sample, max_regions, drop_repeated_tags) for sample in chosen]
        return chosen, seen_inputs(processor, chosen, levels, local_area, max_image_pixels)

    def encode(prepared: tuple[list[Sample], Inputs]) -> _EncodedBatch:
        return _encode_batch(model, processor, *prepared, levels)

    was_training = model.training
    model.eval()
    try:
        batches = map_batches(encode, len(samples), batch_size, "embedding", alone, prepare, model.device)
    finally:
        model.train(was_training)
    offsets = np.cumsum([0] + [len(batch.keys) for batch in batches])
    result = LevelEmbeddings({}, {}, {}, [key for batch in batches for key in batch.keys])
    for level in levels:
        result.embeds[level] = torch.from_numpy(np.concatenate([batch.embeds[level] for batch in batches]))
        present = np.concatenate([batch.present[level] for batch in batches])
        if not present.any():
            met = ", ".join(sorted(samples[0].extra))
            told = f"; the record of the first one has {met}" if met else ""
            raise ValueError(f"none of the {len(samples)} samples has the level {level!r}{told}")
        result.present[level] = torch.from_numpy(present)
    if "caption" in levels:
        owners = [batch.owners + offset for batch, offset in zip(batches, offsets)]
        result.owners["caption"] = torch.from_numpy(np.concatenate(owners))
    return result


def levels_of_pairs(pairs: Sequence[str]) -> list[str]:
    """The levels that the named pairs need, each once."""
    return list(dict.fromkeys(level for name in check_pairs(pairs) for level in TERMS[name]))


@dataclass
class _EncodedBatch:
    """`LevelEmbeddings` of one batch as numpy, which pickles; owners: of the captions, numbers within the batch."""

    embeds: dict[str, np.ndarray]
    present: dict[str, np.ndarray]
    owners: np.ndarray
    keys: list[str]


@torch.inference_mode()
def _encode_batch(
    model: PyramidCLIPModel,
    processor: PyramidCLIPProcessor,
    samples: list[Sample],
    seen: Inputs,
    levels: list[str],
) -> _EncodedBatch:
    captions = [(row, text) for row, one in enumerate(samples) for text in one.captions or (one.caption,) if text]
    inputs = {**seen, **_text_inputs(processor, samples, levels)}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    rest = [level for level in levels if level != "caption"]
    embeds = model.encode_levels(rest, **inputs) if rest else {}
    if "caption" in levels:
        width = model.config.projection_dim
        embeds["caption"] = torch.zeros(0, width)
        if captions:
            texts = processor(text=[text for _, text in captions], **_AS_TENSORS)
            embeds["caption"] = model.encode_text(texts["input_ids"].to(model.device))
    owners = np.array([row for row, _ in captions], np.int64)
    present = {level: np.ones(len(samples), bool) for level in levels}
    for level in levels:
        mask = inputs.get(LEVELS[level].mask)
        if level == "caption":
            present[level] = np.bincount(owners, minlength=len(samples)) > 0
        elif mask is not None:
            present[level] = (mask.any(dim=1) if mask.dim() == 2 else mask).cpu().numpy()
    as_numpy = {level: embeds[level].float().cpu().numpy() for level in levels}
    return _EncodedBatch(as_numpy, present, owners, [sample.key for sample in samples])


def seen_inputs(
    processor: PyramidCLIPProcessor,
    samples: list[Sample],
    levels: Sequence[str],
    local_area: float,
    max_image_pixels: int,
) -> Inputs:
    """The model's inputs of pictures and regions: what takes time, and may be done by several threads."""
    wanted: dict[str, Any] = {}
    if levels_of_kind("picture", levels):
        pictures = [open_picture(sample.image, sample.key, max_image_pixels) for sample in samples]
        if "global" in levels:
            wanted["images"] = pictures
        if "local" in levels:
            wanted["local_images"] = [local_view(picture, local_area) for picture in pictures]
    if "roi" in levels:
        wanted["regions"] = [
            None if sample.roi is None else (sample.roi, np.array([region.box for region in sample.regions or ()]))
            for sample in samples
        ]
    return processor(**wanted, **_AS_TENSORS) if wanted else {}


def _text_inputs(processor: PyramidCLIPProcessor, samples: list[Sample], levels: list[str]) -> Inputs:
    """Of texts but captions, of which a sample may have several. A tokenizer serves one thread at a time."""
    texts = [level for level in levels_of_kind("text", levels) if level != "caption"]
    wanted = {LEVELS[level].argument: [getattr(sample, level) for sample in samples] for level in texts}
    return processor(**wanted, **_AS_TENSORS) if wanted else {}
