# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Faster and Mask R-CNN in C4 form on the ResNet picture tower (paper, tables 5, 10 and 13).

Three stages make one map at stride 16, on which regions are proposed; the fourth runs on each pooled region, behind it
one more BatchNorm, its mean and a linear layer. The parts are torchvision's (proposals, matching, box coding,
selection, mask loss); what differs from its defaults follows detectron2 and MoCo: RoIAlign is aligned by half a cell
and adapts its sampling, anchors are exact, box losses are plain L1, the proposal losses are divided by `rpn_samples` a
picture, masks are read off the features that the boxes were.

    >>> from pyramidclip_hf.modeling_detection import PyramidCLIPForObjectDetection  # needs torchvision
    >>> model = PyramidCLIPForObjectDetection.from_pretrained(folder)
    >>> found = model.detect([picture])[0]  # found.boxes, found.scores, found.labels, found.masks

Shape letters: B pictures, N objects or regions of one, K classes. Boxes are x1, y1, x2, y2 in pixels from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForObjectDetection, ResNetConfig, ResNetModel
from transformers import initialization as init

from .configuration_detection import PyramidCLIPDetectionConfig
from .configuration_pyramidclip import PyramidCLIPVisionConfig
from .image_processing_pyramidclip import upright_rgb
from .modeling_pyramidclip_base import PyramidCLIPPreTrainedModel
from .modeling_pyramidclip_resnet import PyramidCLIPResNet

try:
    import torchvision
    from torchvision.models.detection import faster_rcnn, mask_rcnn, roi_heads, rpn
except ImportError:
    torchvision = None

STRIDE = 16
# What is drawn for a picture: anchors, regions.
_ANCHORS, _REGIONS = range(2)


@dataclass
class Objects:
    """What a picture shows, true or found.

    Attributes:
        boxes: (N, 4) float.
        labels: (N,) int64, from 0.
        masks: (N, H, W) bool or float, None where there are none.
        scores: (N,) float, of what was found, by falling score.
    """

    boxes: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor | None = None
    scores: torch.Tensor | None = None


@dataclass
class LossSums:
    """Losses of some pictures, summed, and what each sum is divided by: both add up over processes.

    Attributes:
        sums: name -> 0-d.
        counts: name -> 0-d, without gradient.
    """

    sums: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]

    def means(self) -> dict[str, torch.Tensor]:
        """Name -> 0-d, 0 where nothing was counted."""
        return {name: total / self.counts[name].clamp(min=1) for name, total in self.sums.items()}


class PlainTrunk(nn.Module):
    """Transformers' ResNet, which is torchvision's, with the names of `PyramidCLIPResNet`: a stem and four stages."""

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__()
        sizes = [4 * config.width * 2**stage for stage in range(4)]
        model = ResNetModel(ResNetConfig(embedding_size=config.width, hidden_sizes=sizes, depths=list(config.layers)))
        self.stem, self.stages = model.embedder, model.encoder.stages

    def maps(self, pixel_values: torch.Tensor, last: int = 4) -> list[torch.Tensor]:
        """As `PyramidCLIPResNet.maps`; where sides are odd, a stride rounds up."""
        maps = [self.stem(pixel_values)]
        for stage in self.stages[:last]:
            maps.append(stage(maps[-1]))
        return maps


class PyramidCLIPForObjectDetection(PyramidCLIPPreTrainedModel):
    """The detector; see the module's head. `trunk` has the names that it has in the tower."""

    config: PyramidCLIPDetectionConfig
    base_model_prefix = "detector"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: PyramidCLIPDetectionConfig):
        super().__init__(config)
        if torchvision is None:
            raise ImportError(
                'the detector is made of torchvision\'s parts: pip install "pyramidclip-hf[detection]" '
                '(from a checkout: pip install -e ".[detection]")'
            )
        width, classes = 32 * config.vision_config.width, (config.num_labels or 0) + 1
        self.trunk = (PlainTrunk if config.plain else PyramidCLIPResNet)(config.vision_config)
        self.extra_norm = nn.BatchNorm2d(width) if config.extra_norm else nn.Identity()
        anchors = len(config.anchor_sizes) * len(config.anchor_ratios)
        before, after = (
            {"training": train, "testing": test} for train, test in zip(config.train_proposals, config.test_proposals)
        )
        self.proposals = rpn.RegionProposalNetwork(
            nn.Identity(), rpn.RPNHead(width // 2, anchors), 0.7, 0.3, config.rpn_samples, config.rpn_positive,
            before, after, config.rpn_nms_threshold,
        )  # fmt: skip
        self.proposals.min_size = 0.0
        self.regions = roi_heads.RoIHeads(
            None, None, faster_rcnn.FastRCNNPredictor(width, classes), 0.5, 0.5, config.roi_samples,
            config.roi_positive, None, config.score_threshold, config.nms_threshold, config.max_detections,
        )  # fmt: skip
        if config.with_masks:
            self.regions.mask_predictor = mask_rcnn.MaskRCNNPredictor(width, min(256, width // 2), classes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if torchvision is None:
            return
        stds: dict[Any, float] = {}
        if isinstance(module, rpn.RPNHead):
            stds = {layer: 0.01 for layer in module.modules() if isinstance(layer, nn.Conv2d)}
        elif isinstance(module, faster_rcnn.FastRCNNPredictor):
            stds = {module.cls_score: 0.01, module.bbox_pred: 0.001}
        elif isinstance(module, mask_rcnn.MaskRCNNPredictor):
            stds = {module.mask_fcn_logits: 0.001}
            init.kaiming_normal_(module.conv5_mask.weight, mode="fan_out", nonlinearity="relu")
            init.zeros_(module.conv5_mask.bias)
        for layer, std in stds.items():
            init.normal_(layer.weight, std=std)
            init.zeros_(layer.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the pixels."""
        return self.trunk.stem.get_submodule("embedder.convolution" if self.config.plain else "conv1")

    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        targets: Sequence[Objects] | None = None,
        draws: Sequence[int] | torch.Tensor | None = None,
    ) -> LossSums | list[Objects]:
        """In training mode the losses of B pictures, else what is found in each, masks as 0..1 within the picture.

        Args:
            pixel_values: (B, 3, H, W) normalised, padded with 0 at the right and below.
            image_sizes: (B, 2) height and width without padding; None: there is none.
            targets: of each picture, in its pixels; needed in training mode.
            draws: (B,) seeds of what is sampled of each picture; None: torch's own generator draws them.

        Raises:
            ValueError: training mode without `targets`, or masks are to be learnt and absent.
        """
        sizes = [(int(h), int(w)) for h, w in (image_sizes if image_sizes is not None else ())]
        sizes = sizes or [(pixel_values.shape[2], pixel_values.shape[3])] * len(pixel_values)
        features = self.trunk.maps(pixel_values, 3)[-1]
        objectness, deltas = self.proposals.head([features])
        anchors = grid_anchors(self.config, *features.shape[2:]).to(features.device)
        objectness_rows = objectness[0].permute(0, 2, 3, 1).reshape(len(sizes), -1)
        delta_rows = deltas[0].unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(len(sizes), -1, 4)
        with torch.no_grad():
            decoded = self.proposals.box_coder.decode(
                delta_rows.detach().float().flatten(0, 1), [anchors] * len(sizes)
            ).view(len(sizes), -1, 4)
            found, _ = self.proposals.filter_proposals(decoded, objectness_rows.float(), sizes, [len(anchors)])
        if not self.training:
            return self._detections(features, found, sizes)
        if targets is None:
            raise ValueError("in training mode the detector needs targets: boxes and labels of each picture")
        if self.config.with_masks and any(one.masks is None for one in targets):
            raise ValueError("the detector has a mask head, and targets have no masks; with_masks=False leaves it out")
        seeds = torch.randint(2**62, (len(sizes),)).tolist() if draws is None else [int(draw) for draw in draws]
        losses = self._proposal_losses(anchors, objectness_rows, delta_rows, targets, seeds)
        more = self._region_losses(features, found, targets, seeds)
        return LossSums(losses.sums | more.sums, losses.counts | more.counts)

    def _proposal_losses(
        self,
        anchors: torch.Tensor,
        objectness: torch.Tensor,
        deltas: torch.Tensor,
        targets: Sequence[Objects],
        seeds: Sequence[int],
    ) -> LossSums:
        """Of objectness and boxes at the sampled anchors, divided by `rpn_samples` a picture."""
        rows = [anchors] * len(targets)
        labels, matched = self.proposals.assign_targets_to_anchors(rows, [{"boxes": one.boxes} for one in targets])
        wanted = self.proposals.box_coder.encode(matched, rows)
        config = self.config
        total = {"objectness": objectness.sum() * 0, "rpn_box": deltas.sum() * 0}
        for number, seed in enumerate(seeds):
            positive, negative = sampled(labels[number], config.rpn_samples, config.rpn_positive, seed, _ANCHORS)
            chosen = torch.cat([positive, negative])
            logits = objectness[number, chosen].float()
            total["objectness"] = total["objectness"] + F.binary_cross_entropy_with_logits(
                logits, labels[number][chosen].to(logits.dtype), reduction="sum"
            )
            error = (deltas[number, positive].float() - wanted[number][positive]).abs().sum()
            total["rpn_box"] = total["rpn_box"] + error
        count = objectness.new_tensor(float(config.rpn_samples * len(targets)))
        return LossSums(total, dict.fromkeys(total, count))

    def _region_losses(
        self,
        features: torch.Tensor,
        proposals: Sequence[torch.Tensor],
        targets: Sequence[Objects],
        seeds: Sequence[int],
    ) -> LossSums:
        """Of class, box and mask at the sampled regions."""
        boxes = [one.boxes.to(torch.float32) for one in targets]
        regions = self.regions.add_gt_proposals(list(proposals), boxes)
        matches, labels = self.regions.assign_targets_to_proposals(regions, boxes, [one.labels + 1 for one in targets])
        config = self.config
        for number, seed in enumerate(seeds):
            drawn = sampled(labels[number], config.roi_samples, config.roi_positive, seed, _REGIONS)
            chosen = torch.cat(drawn).sort().values
            regions[number], labels[number] = regions[number][chosen], labels[number][chosen]
            matches[number] = matches[number][chosen]
        matched = [
            one[match] if len(one) else regions[number] for number, (one, match) in enumerate(zip(boxes, matches))
        ]
        wanted = torch.cat(self.regions.box_coder.encode(matched, regions))
        flat = torch.cat(labels)
        maps = self._region_maps(features, regions)
        scores, deltas = self.regions.box_predictor(maps.mean(dim=(2, 3)))
        scores, deltas = scores.float(), deltas.float().unflatten(1, (-1, 4))
        on_object = torch.where(flat > 0)[0]
        sums = {
            "classification": F.cross_entropy(scores, flat, reduction="sum"),
            "box": (deltas[on_object, flat[on_object]] - wanted[on_object]).abs().sum(),
        }
        counts = dict.fromkeys(sums, scores.new_tensor(float(len(flat))))
        if config.with_masks:
            logits = self.regions.mask_predictor(maps[on_object]).float()
            sums["mask"] = self._mask_loss(logits, regions, labels, matches, targets)
            counts["mask"] = scores.new_tensor(float(len(on_object)))
        return LossSums(sums, counts)

    def _mask_loss(
        self,
        logits: torch.Tensor,
        regions: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        matches: Sequence[torch.Tensor],
        targets: Sequence[Objects],
    ) -> torch.Tensor:
        """Sum over objects of the mean over cells, as torchvision's loss, which is the mean of both."""
        if not len(logits):
            return logits.sum() * 0
        kept = [torch.where(one > 0)[0] for one in labels]
        masks = [one.masks if one.masks is not None else one.boxes.new_zeros(0, 1, 1) for one in targets]
        some = [number for number, chosen in enumerate(kept) if len(chosen)]
        mean = roi_heads.maskrcnn_loss(
            logits,
            [regions[number][kept[number]] for number in some],
            [masks[number].float() for number in some],
            [targets[number].labels + 1 for number in some],
            [matches[number][kept[number]] for number in some],
        )
        return mean * len(logits)

    def _region_maps(self, features: torch.Tensor, regions: Sequence[torch.Tensor]) -> torch.Tensor:
        """(regions of all pictures, 32 `width`, `roi_size` / 2, `roi_size` / 2)."""
        size = (self.config.roi_size, self.config.roi_size)
        boxes = [one.to(features.dtype) for one in regions]
        pooled = torchvision.ops.roi_align(features, boxes, size, 1 / STRIDE, sampling_ratio=-1, aligned=True)
        return self.extra_norm(self.trunk.stages[3](pooled))

    def _detections(
        self, features: torch.Tensor, proposals: Sequence[torch.Tensor], sizes: Sequence[tuple[int, int]]
    ) -> list[Objects]:
        if not sum(map(len, proposals)):
            none = features.new_zeros(0)
            empty = [none.reshape(0, *size) if self.config.with_masks else None for size in sizes]
            return [Objects(none.reshape(0, 4), none.long(), one, none) for one in empty]
        scores, deltas = self.regions.box_predictor(self._region_maps(features, proposals).mean(dim=(2, 3)))
        boxes, kept, labels = self.regions.postprocess_detections(
            scores.float(), deltas.float(), list(proposals), list(sizes)
        )
        masks: list[torch.Tensor | None] = [] if self.config.with_masks else [None] * len(sizes)
        if self.config.with_masks:
            maps = self._region_maps(features, boxes) if sum(map(len, boxes)) else None
            logits = features.new_zeros(0, scores.shape[1], self.config.roi_size, self.config.roi_size)
            logits = logits if maps is None else self.regions.mask_predictor(maps).float()
            small = roi_heads.maskrcnn_inference(logits, labels)
            masks += [
                roi_heads.paste_masks_in_image(mask, box, size)[:, 0] for mask, box, size in zip(small, boxes, sizes)
            ]
        return [Objects(*one) for one in zip(boxes, [label - 1 for label in labels], masks, kept)]

    @torch.inference_mode()
    def detect(self, pictures: Sequence[Image.Image]) -> list[Objects]:
        """What is in each picture, one at a time, in its own pixels; masks (N, H, W) bool.

        Padding would change the features of the smaller picture of a batch, and so what is found.

        Raises:
            ValueError: the detector is in training mode, or a picture is too small.
        """
        if self.training:
            raise ValueError("detect() needs evaluation mode: call eval() first")
        found = []
        for picture in pictures:
            picture = upright_rgb(picture)
            width, height = picture.size
            resized = resized_picture(picture, self.config.short_side, self.config.long_side)
            pixels = normalised(resized, self.config).to(self.device, self.dtype)[None]
            (one,) = self(pixels)
            scale = one.boxes.new_tensor([width / resized.width, height / resized.height] * 2)
            one.boxes = one.boxes * scale
            if one.masks is not None and len(one.masks):
                full = F.interpolate(one.masks[None], size=(height, width), mode="bilinear", align_corners=False)[0]
                one.masks = full > 0.5
            elif one.masks is not None:
                one.masks = one.masks.new_zeros(0, height, width, dtype=torch.bool)
            found.append(one)
        return found


def scaled_size(width: int, height: int, short_side: int, long_side: int) -> tuple[int, int]:
    """Width and height with `short_side` as the shorter one, less where the longer would exceed `long_side`."""
    scale = min(short_side / min(width, height), long_side / max(width, height))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def resized_picture(picture: Image.Image, short_side: int, long_side: int) -> Image.Image:
    """The RGB picture at `scaled_size`, bilinear with anti-aliasing.

    Raises:
        ValueError: it comes out smaller than one place of the map.
    """
    size = scaled_size(*picture.size, short_side, long_side)
    if min(size) < STRIDE:
        raise ValueError(
            f"a picture of {picture.width} x {picture.height} becomes {size[0]} x {size[1]} at a short side of "
            f"{short_side} and a long side of at most {long_side}, less than one place of the map of {STRIDE} pixels: "
            "raise both, or leave it out"
        )
    return picture.resize(size, Image.Resampling.BILINEAR)


def normalised(picture: Image.Image, config: PyramidCLIPDetectionConfig) -> torch.Tensor:
    """(3, H, W) float32, less the mean that the configuration has, over its standard deviation."""
    data = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    pixels = data.view(picture.height, picture.width, 3).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(config.image_mean)[:, None, None]) / torch.tensor(config.image_std)[:, None, None]


def grid_anchors(config: PyramidCLIPDetectionConfig, rows: int, columns: int) -> torch.Tensor:
    """(rows * columns * A, 4) float32, place by place: around a place's corner, in all sizes, each in all ratios."""
    cells = []
    for size in config.anchor_sizes:
        for ratio in config.anchor_ratios:
            width = (size * size / ratio) ** 0.5
            cells.append([-width / 2, -width * ratio / 2, width / 2, width * ratio / 2])
    y, x = torch.meshgrid(torch.arange(rows) * STRIDE, torch.arange(columns) * STRIDE, indexing="ij")
    corners = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4).float()
    return (corners + torch.tensor(cells)).reshape(-1, 4)


def sampled(
    labels: torch.Tensor, number: int, positive_share: float, seed: int, what: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of at most `number` entries: those above 0, at most their share, then those that are 0.

    The same for the same seed on every device and with any number of processes, unlike torchvision's sampler.

    Args:
        labels: (N,), below 0 where nothing is to be said.
        number: in all.
        positive_share: of those above 0.
        seed: of the picture in this epoch.
        what: is drawn.
    """
    generator = torch.Generator().manual_seed(seed * 2 + what)
    positive, negative = torch.where(labels >= 1)[0], torch.where(labels == 0)[0]

    def some(entries: torch.Tensor, wanted: int) -> torch.Tensor:
        order = torch.randperm(len(entries), generator=generator)[:wanted]
        return entries[order.to(entries.device)]

    positive = some(positive, int(number * positive_share))
    return positive, some(negative, number - len(positive))


AutoConfig.register(PyramidCLIPDetectionConfig.model_type, PyramidCLIPDetectionConfig, exist_ok=True)
AutoModelForObjectDetection.register(PyramidCLIPDetectionConfig, PyramidCLIPForObjectDetection, exist_ok=True)

__all__ = ["LossSums", "Objects", "PyramidCLIPForObjectDetection"]
