# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The VinVL object-attribute detector (arXiv 2101.00529), inference only.

A ResNeXt whose third stage gives one feature map at stride 16 (C4); a region proposal network on it; the fourth stage
on each pooled proposal, whose mean is the exported feature; on that, class scores and class-specific boxes; last,
attribute scores from the feature and the embedded label. Every step is the published one but for these:

- Pictures of a batch do not touch: each is cut out of the padded batch before the trunk, which runs on pictures of one
  size together. So a picture gets the same result alone and in any batch (up to the rounding of batched arithmetic).
  The published code lets the padding into the convolutions, but was run on one picture at a time.
- With `ignore_box_regression` the final boxes are the proposals, so the attribute head takes their features as they are
  instead of pooling the same boxes once more.
- The limit of 100 attributes a picture is left out: as published it compares with the wrong rank and removes nothing.
- A picture with fewer than `min_detections` proposals that keep a class gives that many; the published code then
  falls back to another filter, which fails as soon as features are exported.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput

from .boxes_vinvl import (
    FEATURE_STRIDE,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    grid_anchors,
    select_detections,
)
from .configuration_vinvl import VinVLConfig

Size = tuple[int, int]  # height and width in pixels
Layer = TypeVar("Layer", bound=nn.Module)


def _torchvision_ops() -> ModuleType:
    try:
        from torchvision import ops
    except ImportError as error:
        raise ImportError(
            'The VinVL detector needs torchvision: pip install "pyramidclip-hf[vinvl]" '
            '(from a checkout: pip install -e ".[vinvl]").'
        ) from error
    return ops


@dataclass
class VinVLDetections:
    """The regions of one picture, by falling score; N may be 0. Tensors are on the model's device.

    Attributes:
        boxes (`Tensor` (N, 4) float32): x1, y1, x2, y2 in pixels of the original picture. A box counts its last pixel,
            so one narrower than a pixel has x2 < x1.
        normalized_boxes (`Tensor` (N, 4) float32): the same over width and height of the original picture, in 0..1 and
            with x1 <= x2, y1 <= y2.
        scores (`Tensor` (N,) float32): probability of the label.
        labels (`Tensor` (N,) int64): class ids, never the background 0.
        label_names (`list[str]`): `config.id2label` of them.
        attribute_ids (`list[Tensor]` of (k,) int64): for each region up to `max_attributes_per_object` attributes, the
            most confident first; `k` may be 0.
        attribute_scores (`list[Tensor]` of (k,) float32): their probabilities, all above `attribute_threshold`.
        attribute_names (`list[list[str]]`): `config.id2attribute` of them.
        features (`Tensor` (N, feature_size), the model's dtype): of the proposals, also where boxes are regressed.
    """

    boxes: torch.Tensor
    normalized_boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    label_names: list[str]
    attribute_ids: list[torch.Tensor]
    attribute_scores: list[torch.Tensor]
    attribute_names: list[list[str]]
    features: torch.Tensor

    def __len__(self) -> int:
        return len(self.boxes)


@dataclass
class VinVLObjectAttributeDetectionOutput(ModelOutput):
    """What the model returns.

    Attributes:
        detections (`tuple[VinVLDetections, ...]`): one entry a picture.
        proposals (`tuple[Tensor, ...]` of (P, 4) float32): the proposals that the detections were chosen from, in
            pixels of the resized pictures, most likely object first.
    """

    detections: tuple[VinVLDetections, ...] | None = None
    proposals: tuple[torch.Tensor, ...] | None = None


class VinVLFrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and no epsilon (torchvision's adds 1e-5)."""

    def __init__(self, channels: int, initial_weight: float = 1.0):
        super().__init__()
        self.initial_weight = initial_weight
        self.weight = nn.Buffer(torch.ones(channels))
        self.bias = nn.Buffer(torch.zeros(channels))
        self.running_mean = nn.Buffer(torch.zeros(channels))
        self.running_var = nn.Buffer(torch.ones(channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> the same shape."""
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return torch.addcmul(shift[:, None, None], hidden_states, scale[:, None, None])


class VinVLStem(nn.Module):
    """The 7x7 convolution and the pooling in front of the stages."""

    def __init__(self, config: VinVLConfig):
        super().__init__()
        self.conv1 = nn.Conv2d(3, config.stem_channels, kernel_size=7, stride=2, padding=3, bias=False)
        # Pixels are numbers of order 64.
        self.bn1 = VinVLFrozenBatchNorm2d(config.stem_channels, initial_weight=1 / 64)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, stem_channels, H / 4, W / 4), rounded up."""
        return self.pool(self.bn1(self.conv1(pixel_values)).relu_())


class VinVLBottleneck(nn.Module):
    """ResNeXt bottleneck with the stride on the grouped 3x3 convolution."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int, groups: int, num_blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=1, bias=False)
        self.bn1 = VinVLFrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, groups=groups, bias=False)
        self.bn2 = VinVLFrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, kernel_size=1, bias=False)
        # Each of n blocks adds 1 / n to the variance.
        self.bn3 = VinVLFrozenBatchNorm2d(out_channels, initial_weight=num_blocks**-0.5)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                VinVLFrozenBatchNorm2d(out_channels),
            )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) -> (B, out_channels, H / stride, W / stride), rounded up."""
        residual = self.downsample(hidden_states)
        hidden_states = self.bn1(self.conv1(hidden_states)).relu_()
        hidden_states = self.bn2(self.conv2(hidden_states)).relu_()
        return self.bn3(self.conv3(hidden_states)).add_(residual).relu_()


def _stage(config: VinVLConfig, index: int) -> nn.Sequential:
    """Stage `index` (0..3) of the trunk."""
    width = config.groups * config.width_per_group * 2**index
    out_channels = config.stem_channels * 4 * 2**index
    in_channels = config.stem_channels if index == 0 else out_channels // 2
    blocks = []
    for block in range(config.layers[index]):
        stride = 2 if index > 0 and block == 0 else 1
        blocks.append(VinVLBottleneck(in_channels, width, out_channels, stride, config.groups, sum(config.layers)))
        in_channels = out_channels
    return nn.Sequential(*blocks)


class VinVLBackbone(nn.Module):
    """Stem and the first three stages: pictures of one size to their feature maps."""

    def __init__(self, config: VinVLConfig):
        super().__init__()
        self.stem = VinVLStem(config)
        self.layer1 = _stage(config, 0)
        self.layer2 = _stage(config, 1)
        self.layer3 = _stage(config, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, feature_map_size, H / 16, W / 16), rounded up."""
        return self.layer3(self.layer2(self.layer1(self.stem(pixel_values))))


class VinVLRegionProposals(nn.Module):
    """Feature map of one picture -> boxes that may hold objects."""

    def __init__(self, config: VinVLConfig):
        super().__init__()
        self.config = config
        self.anchors = cell_anchors(config.anchor_sizes, config.anchor_ratios)
        channels = config.feature_map_size
        self.conv = _started(nn.Conv2d(channels, channels, kernel_size=3, padding=1), 0.01)
        self.cls_logits = _started(nn.Conv2d(channels, config.num_anchors, kernel_size=1), 0.01)
        self.bbox_pred = _started(nn.Conv2d(channels, 4 * config.num_anchors, kernel_size=1), 0.01)

    def forward(self, feature_map: torch.Tensor, size: Size) -> torch.Tensor:
        """Proposes boxes.

        Args:
            feature_map: (C, h, w).
            size: height and width of the resized picture.

        Returns:
            (P, 4) float32: clipped proposals, most likely object first, P <= `rpn_post_nms_top_n`.
        """
        hidden_states = self.conv(feature_map[None]).relu_()
        # Both outputs are anchor-major in their channels; anchors go by row, column, anchor.
        objectness = self.cls_logits(hidden_states)[0].float().permute(1, 2, 0).reshape(-1).sigmoid()
        deltas = self.bbox_pred(hidden_states)[0].float().permute(1, 2, 0).reshape(-1, 4)
        _require_finite(deltas, "box deltas of the proposals")
        objectness, top = objectness.sort(descending=True, stable=True)
        objectness, top = objectness[: self.config.rpn_pre_nms_top_n], top[: self.config.rpn_pre_nms_top_n]
        height, width = feature_map.shape[1:]
        anchors = grid_anchors(self.anchors, height, width, device=feature_map.device)
        boxes = clip_boxes(decode_boxes(deltas[top], anchors[top], (1, 1, 1, 1)), *size)
        large = (boxes[:, 2:] - boxes[:, :2] + 1 >= self.config.rpn_min_size).all(dim=1)
        boxes, objectness = boxes[large], objectness[large]
        kept = _torchvision_ops().nms(boxes, objectness, self.config.rpn_nms_threshold)
        return boxes[kept[: self.config.rpn_post_nms_top_n]]


class VinVLRegionHead(nn.Module):
    """Boxes on a feature map -> features, class logits and class-specific box deltas."""

    def __init__(self, config: VinVLConfig):
        super().__init__()
        self.config = config
        self.layer4 = _stage(config, 3)
        labels = config.num_labels or 0  # two or more, see `validate_names`
        self.cls_score = _started(nn.Linear(config.feature_size, labels), 0.01)
        self.bbox_pred = _started(nn.Linear(config.feature_size, 4 * labels), 0.001)

    def pool(self, feature_map: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(C, h, w) and (N, 4) float32 in pixels of the resized picture -> features (N, feature_size)."""
        dtype = self.cls_score.weight.dtype
        features = [feature_map.new_zeros((0, self.config.feature_size), dtype=dtype)]
        for chunk in boxes.split(self.config.roi_chunk_size):
            regions = align_regions(feature_map, chunk, self.config).to(dtype)
            features.append(self.layer4(_fast_layout(regions)).mean(dim=(2, 3)))
        return torch.cat(features)


class VinVLAttributeHead(nn.Module):
    """Attributes of regions whose labels are known."""

    def __init__(self, config: VinVLConfig):
        super().__init__()
        self.cls_embedding = nn.Embedding(config.num_labels or 0, config.label_embedding_size)
        self.fc_attr = nn.Linear(config.feature_size + config.label_embedding_size, config.attribute_hidden_size)
        self.attr_score = _started(nn.Linear(config.attribute_hidden_size, config.num_attributes), 0.01)

    def forward(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Features (N, feature_size) and labels (N,) -> attribute logits (N, num_attributes)."""
        hidden_states = torch.cat((features, self.cls_embedding(labels)), dim=1)
        return self.attr_score(self.fc_attr(hidden_states).relu())


class VinVLPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: VinVLConfig
    base_model_prefix = "vinvl"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    _no_split_modules = ["VinVLStem", "VinVLBottleneck", "VinVLAttributeHead"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the published code initialises the heads; the trunk so that random weights keep numbers of order 1.

        Layers say what they deviate in, since the loader does not call this for modules without tensors of their own.
        """
        super()._init_weights(module)
        if isinstance(module, VinVLFrozenBatchNorm2d):
            init.constant_(module.weight, module.initial_weight)
            init.zeros_(module.bias)
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
        elif (std := vars(module).get("initial_std")) is not None:
            init.normal_(module.weight, std=std)  # type: ignore[arg-type]  # set on layers with weights only
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")


class VinVLForObjectAttributeDetection(VinVLPreTrainedModel):
    """Pictures -> regions with names, attributes and features. See `VinVLConfig` for every setting."""

    def __init__(self, config: VinVLConfig):
        super().__init__(config)
        # A missing extra is told now rather than after minutes of loading and the first convolutions.
        _torchvision_ops()
        self.backbone = VinVLBackbone(config)
        self.rpn = VinVLRegionProposals(config)
        self.roi_head = VinVLRegionHead(config)
        self.attribute_head = VinVLAttributeHead(config)
        self.post_init()

    @torch.no_grad()
    def forward(
        self,
        pixel_values: torch.Tensor,
        image_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
    ) -> VinVLObjectAttributeDetectionOutput:
        """Detects in a batch of pictures; gradients are never recorded.

        Args:
            pixel_values: (B, 3, H, W) from `VinVLImageProcessor`; smaller pictures at the top left.
            image_sizes: (B, 2) int64, height and width of each picture in `pixel_values`; None means all of it.
            original_sizes: (B, 2) int64, height and width of the pictures that boxes are given for; None means
                `image_sizes`.

        Raises:
            ValueError: sizes that do not fit `pixel_values`, or numbers that are not finite on the way.
        """
        sizes, originals = _checked_sizes(pixel_values, image_sizes, original_sizes)
        proposals, detections = [], []
        for feature_map, size, original_size in zip(self.feature_maps(pixel_values, sizes), sizes, originals):
            proposals.append(self.rpn(feature_map, size))
            detections.append(self._detect(feature_map, proposals[-1], size, original_size))
        return VinVLObjectAttributeDetectionOutput(detections=tuple(detections), proposals=tuple(proposals))

    def feature_maps(self, pixel_values: torch.Tensor, sizes: Sequence[Size]) -> list[torch.Tensor]:
        """The C4 map of each picture without its padding: a list of (feature_map_size, h, w)."""
        same_size: dict[Size, list[int]] = defaultdict(list)
        for index, size in enumerate(sizes):
            same_size[size].append(index)
        maps: dict[int, torch.Tensor] = {}
        for (height, width), indices in same_size.items():
            pictures = pixel_values[indices, :, :height, :width].to(self.dtype)
            for index, feature_map in zip(indices, self.backbone(_fast_layout(pictures))):
                _require_finite(feature_map, f"feature map of picture {index} of the batch")
                maps[index] = feature_map
        return [maps[index] for index in range(len(sizes))]

    def _detect(
        self, feature_map: torch.Tensor, proposals: torch.Tensor, size: Size, original_size: Size
    ) -> VinVLDetections:
        features = self.roi_head.pool(feature_map, proposals)
        logits = self.roi_head.cls_score(features).float()
        _require_finite(logits, "class logits")
        boxes = proposals
        if not self.config.ignore_box_regression:
            deltas = self.roi_head.bbox_pred(features).float().unflatten(1, (-1, 4))
            boxes = clip_boxes(decode_boxes(deltas, proposals[:, None], self.config.box_regression_weights), *size)
        chosen, scores, labels = select_detections(logits.softmax(dim=1), boxes, self.config)
        features = features[chosen]
        if self.config.ignore_box_regression:
            boxes, attribute_features = boxes[chosen], features
        else:
            boxes = boxes[chosen, labels]
            attribute_features = self.roi_head.pool(feature_map, boxes)
        ids, attribute_scores = self._attributes(attribute_features, labels)
        id2label: Any = self.config.id2label  # its keys are numbers here, whatever they were in JSON
        id2attribute = self.config.id2attribute
        (height, width), (original_height, original_width) = size, original_size
        scale = boxes.new_tensor((original_width / width, original_height / height)).repeat(2)
        boxes = boxes * scale
        original = boxes.new_tensor((original_width, original_height)).repeat(2)
        normalized = (boxes / original).clamp(0, 1)
        normalized[:, 2:] = torch.maximum(normalized[:, :2], normalized[:, 2:])
        return VinVLDetections(
            boxes=boxes,
            normalized_boxes=normalized,
            scores=scores,
            labels=labels,
            label_names=[id2label[i] for i in labels.tolist()],
            attribute_ids=ids,
            attribute_scores=attribute_scores,
            attribute_names=[[id2attribute[i] for i in row.tolist()] for row in ids],
            features=features,
        )

    def _attributes(
        self, features: torch.Tensor, labels: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Ids and scores of each region's attributes, the most confident first."""
        scores = self.attribute_head(features, labels).float().softmax(dim=1)
        # Softmax over all, "no attribute" included, without dividing its share among the rest.
        scores, ids = scores[:, 1:].sort(dim=1, descending=True, stable=True)
        counts = (scores > self.config.attribute_threshold).sum(dim=1)
        counts = counts.clamp(max=self.config.max_attributes_per_object).tolist()
        return [row[:n] + 1 for row, n in zip(ids, counts)], [row[:n] for row, n in zip(scores, counts)]


def align_regions(feature_map: torch.Tensor, boxes: torch.Tensor, config: VinVLConfig) -> torch.Tensor:
    """ROIAlign as trained: (C, h, w) and (N, 4) float32 -> (N, C, r, r) float32 with r = `pooler_resolution`.

    Without the half-pixel shift of later versions, so a region is at least one cell of the feature map wide and high.
    """
    return _torchvision_ops().roi_align(
        feature_map[None].float(),  # boxes of hundreds of pixels do not fit into half precision
        [boxes],
        output_size=config.pooler_resolution,
        spatial_scale=1 / FEATURE_STRIDE,
        sampling_ratio=config.pooler_sampling_ratio,
        aligned=False,
    )


def _checked_sizes(
    pixel_values: torch.Tensor, image_sizes: torch.Tensor | None, original_sizes: torch.Tensor | None
) -> tuple[list[Size], list[Size]]:
    """Both size arguments as lists of (height, width), defaults filled in."""
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3 or not pixel_values.shape[0]:
        raise ValueError(f"pixel_values must be (pictures, 3, height, width), got {tuple(pixel_values.shape)}.")
    batch, _, height, width = pixel_values.shape
    sizes = [(height, width)] * batch if image_sizes is None else [(h, w) for h, w in image_sizes.tolist()]
    originals = sizes if original_sizes is None else [(h, w) for h, w in original_sizes.tolist()]
    if len(sizes) != batch or len(originals) != batch:
        raise ValueError(
            f"Expected one size a picture: {batch} pictures, {len(sizes)} image_sizes, {len(originals)} original_sizes."
        )
    wrong = [size for size in sizes if not (0 < size[0] <= height and 0 < size[1] <= width)]
    if wrong:
        raise ValueError(f"image_sizes {wrong} do not lie within pixel_values of {height} x {width} (height x width).")
    return sizes, originals


def _require_finite(tensor: torch.Tensor, what: str) -> None:
    # NaN boxes would make the pooling read anywhere.
    if not torch.isfinite(tensor).all():
        raise ValueError(
            f"The {what} holds NaN or infinity. Check the pixel values and the weights; in float16, which overflows, "
            "use bfloat16 or float32 instead."
        )


def _started(layer: Layer, std: float) -> Layer:
    """The layer with a note of what its first weights deviate in, which `_init_weights` reads."""
    vars(layer)["initial_std"] = std
    return layer


def _fast_layout(tensor: torch.Tensor) -> torch.Tensor:
    """Channels last where it pays: on CPUs the grouped convolutions run 1.7 to 3 times as fast."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.device.type == "cpu" else tensor
