# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Which part of a picture, or which of its regions, speaks for a text.

    >>> explanation = explain_image(model, processor, picture, "a red umbrella")
    >>> explanation.overlay(picture).save("umbrella.png")

ResNet towers: Grad-CAM (Selvaraju et al., ICCV 2017) on the last stage, as the paper's Figure 5. ViT towers: attention
times its gradient (the product of Chefer et al., ICCV 2021), summed over heads and blocks. What is differentiated is
the cosine with the text *minus the mean cosine with texts that say nothing* (`NEUTRAL_TEXTS`). All texts share a large
part of their embedding, which cancels in every ranking; explained along with the rest it shows where the picture
resembles any text at all, and halves the share of the map that lies on the object (docs/explain.md).

Regions are explained by leaving each of them out, under the plain cosine: a difference of two scores of the same text
has no need of neutral ones. A map says what moved this model's score; it is no segmentation.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .image_processing_pyramidclip import upright_rgb
from .loss_pyramidclip import normalize_embeds
from .modeling_pyramidclip import PyramidCLIPModel
from .modeling_pyramidclip_text import PyramidCLIPAttention

METHODS = {"resnet": "grad_cam", "vit": "attention_gradient"}
NEUTRAL_TEXTS: tuple[str, ...] = ("", "a photo", "a picture")
# The last stage of a ResNet for small pictures has 2 x 2 cells: too few to tell objects apart. Such pictures are shown
# to the tower enlarged, with interpolated positions, until it has at least so many cells a side (7 at 224 px).
MIN_CELLS = 6
# Colours from cold to hot, for shares 0, 1/4, ... 1 of the greatest heat.
_HEAT_COLOURS = np.array([(70, 60, 220), (150, 30, 210), (220, 10, 150), (245, 10, 70), (255, 30, 0)], np.float32)
_NO_GRADIENTS = (
    "A map needs gradients and attention weights, which a fused, compiled or quantised model does not give: load it "
    "anew with from_pretrained and explain that."
)
_REGION_COLOUR, _QUIET_COLOUR = (230, 60, 30), (150, 150, 150)


@dataclass(frozen=True)
class Explanation:
    """Where a picture speaks for a text.

    Attributes:
        heat: (height, width) float32 over the upright original picture, 0 where nothing speaks for the text and outside
            of the centre crop, 1 at the maximum; all 0 where the method finds nothing that does.
        score: cosine of picture and text, as the model computes it without explanation.
        method: "grad_cam" or "attention_gradient".
    """

    heat: np.ndarray
    score: float
    method: str

    def overlay(self, image: Image.Image, strength: float = 0.6) -> Image.Image:
        """The upright picture as RGB with the heat painted over it; where there is none, its colours are paler.

        Args:
            image: the picture that was explained.
            strength: opacity of the colour at the greatest heat, 0 (the picture itself) to 1.

        Raises:
            ValueError: a picture of another size, or a strength outside of 0..1.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be between 0 and 1, got {strength!r}.")
        picture = upright_rgb(image)
        if picture.size != self.heat.shape[::-1]:
            raise ValueError(
                f"The heat is for a picture of {self.heat.shape[1]} x {self.heat.shape[0]} pixels (upright), got "
                f"{picture.width} x {picture.height}: overlay the picture that was explained."
            )
        steps = np.linspace(0, 1, len(_HEAT_COLOURS))
        colours = np.stack([np.interp(self.heat, steps, channel) for channel in _HEAT_COLOURS.T], axis=-1)
        opacity = strength * self.heat[..., None]
        # Warm heat on a warm object would not be seen: what is cold loses most of its colour.
        cold = strength * (1 - self.heat[..., None])
        pixels = np.asarray(picture, np.float32)
        pixels = pixels + cold * (np.asarray(picture.convert("L"), np.float32)[..., None] - pixels)
        return Image.fromarray(np.rint(pixels * (1 - opacity) + colours * opacity).astype(np.uint8))


@dataclass(frozen=True)
class RegionExplanation:
    """Which regions speak for a text.

    Attributes:
        relevance: (K,) float32, by how much the score falls when the region is left out; negative where the region
            speaks against the text, 0 for regions that are masked.
        score: cosine of the region sequence and the text.
    """

    relevance: np.ndarray
    score: float


def explain_image(
    model: PyramidCLIPModel, processor: Any, image: Image.Image, text: str, method: str | None = None
) -> Explanation:
    """Which part of the picture speaks for the text.

    The model stays as it is: mode, gradients, attention implementation. Callers may be under `torch.no_grad` or
    `torch.inference_mode`, but the model's weights must not have been created under the latter. Any device and floating
    dtype. Only the first 75 tokens of the text count, as in every use of the model.

    Args:
        model: not fused, compiled or quantised.
        processor: a `PyramidCLIPProcessor`, the one saved beside the model.
        image: a PIL picture of any mode and size.
        text: what to look for.
        method: None: the tower's ("grad_cam" for the ResNet, "attention_gradient" for the ViT).

    Raises:
        TypeError: a model or an image of another type.
        ValueError: a text without tokens, a method that is not the tower's, a model that cannot be explained.
    """
    _check_model(model)
    if not isinstance(image, Image.Image):
        raise TypeError(f"Expected a PIL picture, got {type(image).__name__}: open it with PIL.Image.open.")
    if any(getattr(part, "is_fused", False) for part in (model, model.vision_model)):
        raise ValueError(_NO_GRADIENTS)
    tower = model.config.vision_config.tower
    if method not in (None, METHODS[tower]):
        raise ValueError(f'A {tower} tower is explained by "{METHODS[tower]}", got method={method!r}.')
    text_embed, neutral_embed = _encode_texts(model, processor, text)
    image_processor = getattr(processor, "image_processor", processor)
    picture = upright_rgb(image)
    with _undisturbed(model):
        pixels = image_processor(picture, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
        with torch.no_grad():
            embed = model.encode_image(pixels, normalize=True, interpolate_pos_encoding=True)[0]
        contrast = text_embed - neutral_embed
        cells = (_grad_cam if tower == "resnet" else _attention_gradient)(model, pixels, contrast)
    heat = _spread(cells.float().cpu().numpy(), image_processor, picture.size)
    peak = heat.max()
    return Explanation(heat / peak if peak > 0 else heat, float(embed @ text_embed), METHODS[tower])


def explain_regions(
    model: PyramidCLIPModel, processor: Any, roi_features: Any, text: str, roi_mask: Any = None
) -> RegionExplanation:
    """Which regions speak for the text, through the tower's region branch.

    Each region is left out in turn (K + 1 sequences in one batch). That is exact for both towers: it counts what a
    region adds through attention and through the mean token, with its sign. Of two regions that show the same object
    neither is missed much, so both get little.

    Args:
        model: fused or not.
        processor: a `PyramidCLIPProcessor` or its tokenizer.
        roi_features: (K, `roi_feature_size` + 4) or (1, K, ...) array or tensor: features and x1, y1, x2, y2 in 0..1 of
            the picture's width and height, as `processor(regions=...)` gives them.
        text: see `explain_image`.
        roi_mask: (K,) or (1, K), true on real regions; None: all.

    Raises:
        TypeError: a model of another type.
        ValueError: a text without tokens, features of another width or not finite, no region that is not masked.
    """
    _check_model(model)
    features, mask = _checked_regions(model, roi_features, roi_mask)
    text_embed, _ = _encode_texts(model, processor, text)
    real = mask.nonzero()[:, 0]
    masks = mask.repeat(1 + len(real), 1)
    masks[torch.arange(1, 1 + len(real)), real] = False
    with _undisturbed(model), torch.no_grad():
        sequences = features.to(model.device).expand(len(masks), -1, -1)
        embeds = model.encode_rois(sequences, masks.to(model.device), normalize=True)
    scores = embeds @ text_embed
    relevance = np.zeros(len(mask), np.float32)
    relevance[real.numpy()] = (scores[0] - scores[1:]).cpu().numpy()
    return RegionExplanation(relevance, float(scores[0]))


def draw_regions(image: Image.Image, boxes: Any, relevance: Any, labels: Sequence[str] | None = None) -> Image.Image:
    """The upright picture as RGB with a frame a region: red and the thicker the more relevant, grey where nothing.

    Args:
        image: the picture that the regions are of.
        boxes: (K, 4) x1, y1, x2, y2 in 0..1 of the picture's width and height; zero-size ones are not drawn.
        relevance: (K,), see `RegionExplanation`.
        labels: K names, written at the frames with the share of the greatest relevance.

    Raises:
        ValueError: lengths that differ, or boxes that do not lie in 0..1.
    """
    boxes, relevance = np.asarray(boxes, np.float32), np.asarray(relevance, np.float32)
    if boxes.ndim != 2 or boxes.shape[1] != 4 or relevance.shape != (len(boxes),):
        raise ValueError(f"Expected boxes (K, 4) and relevance (K,), got shapes {boxes.shape} and {relevance.shape}.")
    if labels is not None and len(labels) != len(boxes):
        raise ValueError(f"Expected {len(boxes)} labels, one a box, got {len(labels)}.")
    if not (np.isfinite(boxes).all() and (boxes >= -0.01).all() and (boxes <= 1.01).all()):
        raise ValueError("Expected boxes as fractions 0..1 of the picture's width and height, got values outside.")
    picture = upright_rgb(image)
    if picture is image:
        picture = picture.copy()
    draw = ImageDraw.Draw(picture)
    shares = np.clip(relevance, 0, None) / max(float(relevance.max(initial=0)), 1e-12)
    scale = max(1.0, min(picture.size) / 150)
    for place in np.argsort(shares, kind="stable"):  # the most relevant last, on top
        x1, y1, x2, y2 = boxes[place] * np.tile(picture.size, 2)
        if x2 <= x1 or y2 <= y1:
            continue
        share = float(shares[place])
        colour = tuple(round(q + (r - q) * share) for q, r in zip(_QUIET_COLOUR, _REGION_COLOUR))
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=round(scale * (1 + 2 * share)))
        if labels is not None:
            _write_label(draw, f"{labels[place]} {share:.0%}", (x1, y1), colour, size=max(9, round(5 * scale)))
    return picture


def _write_label(
    draw: ImageDraw.ImageDraw, label: str, corner: tuple[float, float], colour: tuple[int, ...], size: int
) -> None:
    """Writes on a plate inside the box's upper left corner, further left where the picture would cut it."""
    width = draw.textlength(label, font_size=size)
    corner = (max(1, min(corner[0] + size / 5, draw.im.size[0] - width - 2)), corner[1] + size / 5)
    plate = draw.textbbox(corner, label, font_size=size)
    draw.rectangle((plate[0] - 1, plate[1] - 1, plate[2] + 1, plate[3] + 1), fill=colour)
    draw.text(corner, label, fill=(255, 255, 255), font_size=size)


def _check_model(model: Any) -> None:
    if not isinstance(model, PyramidCLIPModel):
        raise TypeError(
            f"Expected a PyramidCLIPModel, got {type(model).__name__}: pass the model itself, not a wrapper around it."
        )
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "The model's weights were created under torch.inference_mode, which rules out gradients: load the model "
            "outside of it."
        )


def _encode_texts(model: PyramidCLIPModel, processor: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) fp32 on the model's device: the text's unit embedding, and the mean of the neutral texts' ones."""
    if not isinstance(text, str):
        raise ValueError(f"Expected one text, got {type(text).__name__}.")
    tokenizer = getattr(processor, "tokenizer", processor)
    batch = tokenizer([text, *NEUTRAL_TEXTS], padding=True, truncation=True, return_tensors="pt")
    if int(batch["attention_mask"][0].sum()) <= 2:
        raise ValueError(f"The text {text!r} has no tokens besides begin and end: expected at least one word.")
    with _undisturbed(model), torch.no_grad():
        embeds = model.encode_text(
            batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device), normalize=True
        )
    return embeds[0], embeds[1:].mean(dim=0)


def _checked_regions(model: PyramidCLIPModel, roi_features: Any, roi_mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, F + 4) features and (K,) bool mask on the CPU."""
    width = model.config.vision_config.roi_feature_size + 4
    features = torch.as_tensor(roi_features).detach().cpu()
    features = features[0] if features.ndim == 3 and len(features) == 1 else features
    if features.ndim != 2 or features.shape[1] != width or not len(features):
        raise ValueError(
            f"Expected roi_features (K, {width}) of one picture, roi_feature_size + 4 box numbers, got shape "
            f"{tuple(torch.as_tensor(roi_features).shape)}."
        )
    if roi_mask is None:
        mask = torch.ones(len(features), dtype=torch.bool)
    else:
        mask = torch.as_tensor(roi_mask).detach().cpu().bool()
        mask = mask[0] if mask.ndim == 2 and len(mask) == 1 else mask
    if mask.shape != (len(features),):
        raise ValueError(f"Expected roi_mask ({len(features)},) like the regions, got shape {tuple(mask.shape)}.")
    if not mask.any():
        raise ValueError("Expected at least one region that roi_mask does not hide, got none.")
    if not torch.isfinite(features[mask]).all():
        raise ValueError("Expected finite region features, got NaN or infinity.")
    return features, mask


@contextmanager
def _undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients possible, and no trace of either afterwards."""
    # Not model.eval(): the image tower's `train` also sets requires_grad of its frozen convolution.
    training = [module for module in model.modules() if module.training]
    with torch.inference_mode(False), torch.enable_grad():
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


@contextmanager
def _hooked(modules: Sequence[torch.nn.Module], keep: Callable[[Any], torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The list of `keep(output)` of each call of the modules, while the block runs."""
    kept: list[torch.Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda module, inputs, output: kept.append(keep(output)))
            stack.callback(handle.remove)
        yield kept


def _gradients(
    model: PyramidCLIPModel,
    pixels: torch.Tensor,
    contrast: torch.Tensor,
    modules: Sequence[torch.nn.Module],
    keep: Callable[[Any], torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What `keep` takes from the modules' outputs, and the gradient of picture embedding . contrast for each."""
    # The pixels require it, so that a model whose parameters are all frozen has gradients too.
    pixels = pixels.detach().clone().requires_grad_()
    with _hooked(modules, keep) as kept:
        embed = model.encode_image(pixels, interpolate_pos_encoding=True)
    usable = [isinstance(one, torch.Tensor) and one.requires_grad for one in kept]
    if len(kept) != len(modules) or not all(usable):
        raise ValueError(f"{_NO_GRADIENTS} ({sum(usable)} of {len(modules)} layers gave them.)")
    found = torch.autograd.grad((normalize_embeds(embed)[0] * contrast).sum(), kept, allow_unused=True)
    gradients = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(kept, found)]
    return [one.detach().float() for one in kept], [grad.float() for grad in gradients]


def _grad_cam(model: PyramidCLIPModel, pixels: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """(rows, columns) >= 0: channels of the last stage weighted by their mean gradient (Selvaraju et al., eq. 1, 2)."""
    config = model.config.vision_config
    cells = min(pixels.shape[2:]) // (config.image_size // config.grid_size)
    if cells < MIN_CELLS:
        times = math.ceil(MIN_CELLS / cells)
        size = [times * side for side in pixels.shape[2:]]
        pixels = F.interpolate(pixels.float(), size=size, mode="bicubic", align_corners=False).to(pixels.dtype)
    last_stage = model.vision_model.trunk.stages[-1]
    (features,), (gradient,) = _gradients(model, pixels, contrast, [last_stage], lambda output: output)
    return _support((features * gradient.mean(dim=(2, 3), keepdim=True)).sum(dim=1)[0], pixels.dtype)


def _attention_gradient(model: PyramidCLIPModel, pixels: torch.Tensor, contrast: torch.Tensor) -> torch.Tensor:
    """(rows, columns) >= 0: to first order, what the score owes to the class token's attention to each patch.

    Attention times gradient, summed over heads and blocks with its sign. Rolling the products of all
    tokens out through the blocks, as Chefer et al. do, located less (docs/explain.md): it drops negative products in
    each block, and knows nothing of how LeFF mixes neighbouring patches.
    """
    attentions = [module for module in model.vision_model.modules() if isinstance(module, PyramidCLIPAttention)]
    configs = list({id(module.config): module.config for module in attentions}.values())
    implementations = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"  # the only one that returns its weights
        weights, gradients = _gradients(model, pixels, contrast, attentions, lambda output: output[1])
    finally:
        for config, implementation in zip(configs, implementations):
            config._attn_implementation = implementation
    products = ((weight * grad)[0, :, 0, 1:].sum(dim=0) for weight, grad in zip(weights, gradients))
    patches = sum(products, start=torch.zeros((), device=pixels.device))
    patch_size = model.config.vision_config.patch_size
    return _support(patches.view(*(side // patch_size for side in pixels.shape[2:])), pixels.dtype)


def _support(cells: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The positive part without rounding errors, which would become the whole heat where nothing else is positive."""
    error = max(1e-4, 4 * torch.finfo(dtype).eps) * cells.abs().max() + 1e-7  # cells are shares of a cosine
    return torch.where(cells > error, cells, 0)


def _spread(cells: np.ndarray, image_processor: Any, size: tuple[int, int]) -> np.ndarray:
    """The heat of the crop's cells, (height, width) float32 over the whole picture of `size` (width, height).

    Linear between the cells' centres; 0 outside of the crop.
    """
    axes = []
    for original, cell_count, (start, length, resized) in zip(size[::-1], cells.shape, _crop(image_processor, size)):
        places = ((np.arange(original) + 0.5) * resized / original - start) / length
        centres = (np.arange(cell_count) + 0.5) / cell_count
        weights = np.stack([np.interp(places, centres, row) for row in np.eye(cell_count)], axis=1)
        weights[(places < 0) | (places > 1)] = 0
        axes.append(weights.astype(np.float32))
    return axes[0] @ cells.astype(np.float32) @ axes[1].T


def _crop(image_processor: Any, size: tuple[int, int]) -> list[tuple[float, float, float]]:
    """For height and width: start and length of the crop, and the length it was cut from, in resized pixels."""
    resized = crop = (size[1], size[0])
    if image_processor.do_resize:
        resized = crop = image_processor._target_size(resized, image_processor.size)
    if resized is None:
        raise ValueError(
            "Expected an image processor that resizes by shortest edge or to height and width, got size "
            f"{image_processor.size}."
        )
    if image_processor.do_center_crop:
        crop = (image_processor.crop_size.height, image_processor.crop_size.width)
    # What is too small was padded on both sides, the odd pixel behind.
    starts = [
        -((wanted - have) // 2) if wanted > have else round((have - wanted) / 2) for have, wanted in zip(resized, crop)
    ]
    return list(zip(starts, crop, resized))
