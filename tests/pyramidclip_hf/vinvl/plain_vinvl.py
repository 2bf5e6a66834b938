"""The detector once more, in its straightforward form: what the fast one in `pyramidclip_hf/vinvl` is compared with.

Trunk and fourth stage are torchvision's; suppression is one `nms` a class; the attribute head pools its boxes again.
Written from the published description, not from the package: it shares nothing with it but the weights.
"""

import math
from functools import partial

import numpy as np
import torch
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d, nms, roi_align


def plain_anchor_table(sizes, ratios):
    """The legacy anchors with numpy, each box written as centre and sides."""
    rows = []
    for ratio in ratios:
        width = np.round(np.sqrt(256 / ratio))
        height = np.round(width * ratio)
        for scale in np.array(sizes) / 16:
            w, h = width * scale, height * scale
            rows.append([7.5 - 0.5 * (w - 1), 7.5 - 0.5 * (h - 1), 7.5 + 0.5 * (w - 1), 7.5 + 0.5 * (h - 1)])
    return np.array(rows)


def plain_decode(deltas, box, weights):
    """One box and its four deltas, as Python numbers."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1 + 1, y2 - y1 + 1
    dx, dy, dw, dh = (d / k for d, k in zip(deltas, weights))
    dw, dh = min(dw, math.log(1000 / 16)), min(dh, math.log(1000 / 16))
    cx, cy = x1 + 0.5 * w + dx * w, y1 + 0.5 * h + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    return cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w - 1, cy + 0.5 * h - 1


def plain_clip(box, height, width):
    x1, y1, x2, y2 = box
    return (
        min(max(x1, 0), width - 1),
        min(max(y1, 0), height - 1),
        min(max(x2, 0), width - 1),
        min(max(y2, 0), height - 1),
    )


def plain_suppression(probabilities, boxes, threshold):
    """One call of torchvision's nms for each class; boxes (N, 4) or (N, C, 4). Returns (N, C) bool."""
    kept = torch.zeros(probabilities.shape, dtype=torch.bool)
    for label in range(probabilities.shape[1]):
        class_boxes = boxes if boxes.dim() == 2 else boxes[:, label].contiguous()
        kept[nms(class_boxes, probabilities[:, label].contiguous(), threshold), label] = True
    return kept


def plain_selection(probabilities, boxes, threshold, score_threshold, least, most):
    """ "Filter 1" over all pairs of proposal and class. Returns proposal indices, scores, labels by falling score."""
    kept = plain_suppression(probabilities, boxes, threshold)
    kept[:, 0] = False
    rows = []
    for index, (probability, keep) in enumerate(zip(probabilities, kept)):
        masked = probability * keep
        label = int(masked.argmax())
        if masked[label] > 0:
            rows.append((float(masked[label]), index, label))
    rows.sort(key=lambda row: -row[0])
    confident = sum(np.float32(row[0]) >= np.float32(score_threshold) for row in rows)
    rows = rows[: min(max(confident, least), most)]
    return [row[1] for row in rows], [row[0] for row in rows], [row[2] for row in rows]


def plain_trunk(model):
    """A torchvision ResNeXt with the weights of `model`; needs 64 stem channels."""
    config = model.config
    norm = partial(FrozenBatchNorm2d, eps=0)
    trunk = ResNet(
        Bottleneck, list(config.layers), groups=config.groups, width_per_group=config.width_per_group, norm_layer=norm
    )
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("backbone."):
            state[name.removeprefix("backbone.").removeprefix("stem.")] = tensor
        elif name.startswith("roi_head.layer4"):
            state[name.removeprefix("roi_head.")] = tensor
    missing, unexpected = trunk.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == {"fc.weight", "fc.bias"}
    return trunk.eval()


def plain_map(trunk, picture):
    """(3, H, W) -> (C, h, w) of the third stage."""
    hidden = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(picture[None]))))
    return trunk.layer3(trunk.layer2(trunk.layer1(hidden)))[0]


def plain_pool(trunk, feature_map, boxes):
    rows = [roi_align(feature_map[None], [box[None]], 14, 1 / 16, -1, False) for box in boxes]
    return torch.cat([trunk.layer4(row).flatten(2).mean(-1) for row in rows])


def plain_proposals(model, feature_map, size):
    """Every anchor decoded on its own."""
    config, rpn = model.config, model.rpn
    hidden = torch.relu(rpn.conv(feature_map[None]))
    scores, deltas = rpn.cls_logits(hidden)[0].sigmoid(), rpn.bbox_pred(hidden)[0]
    table = plain_anchor_table(config.anchor_sizes, config.anchor_ratios)
    boxes, objectness = [], []
    for row in range(feature_map.shape[1]):
        for column in range(feature_map.shape[2]):
            for anchor, cell in enumerate(table):
                box = cell + 16 * np.array([column, row, column, row])
                delta = deltas[4 * anchor : 4 * anchor + 4, row, column].tolist()
                boxes.append(plain_clip(plain_decode(delta, box, (1, 1, 1, 1)), *size))
                objectness.append(float(scores[anchor, row, column]))
    order = sorted(range(len(boxes)), key=lambda i: -objectness[i])[: config.rpn_pre_nms_top_n]
    boxes, objectness = torch.tensor(boxes).float()[order], torch.tensor(objectness)[order]
    return boxes[nms(boxes, objectness, config.rpn_nms_threshold)[: config.rpn_post_nms_top_n]]


def plain_detect(model, picture, original_size):
    """One picture (3, H, W) from pixels to attributes, as a dict of lists and tensors."""
    config, trunk = model.config, plain_trunk(model)
    size = picture.shape[1:]
    feature_map = plain_map(trunk, picture)
    proposals = plain_proposals(model, feature_map, size)
    features = plain_pool(trunk, feature_map, proposals)
    probabilities = model.roi_head.cls_score(features).softmax(1)
    boxes = proposals[:, None].repeat(1, config.num_labels, 1)
    if not config.ignore_box_regression:
        deltas = model.roi_head.bbox_pred(features)
        for i in range(len(proposals)):
            for label in range(config.num_labels):
                delta = deltas[i, 4 * label : 4 * label + 4].tolist()
                box = plain_decode(delta, proposals[i].tolist(), config.box_regression_weights)
                boxes[i, label] = torch.tensor(plain_clip(box, *size))
    limits = (config.nms_threshold, config.score_threshold, config.min_detections, config.max_detections)
    chosen, scores, labels = plain_selection(probabilities, boxes, *limits)
    final = boxes[chosen, labels]
    pooled = plain_pool(trunk, feature_map, final)
    head = model.attribute_head
    embedded = head.cls_embedding.weight[labels]
    logits = head.attr_score(torch.relu(head.fc_attr(torch.cat([pooled, embedded], 1))))
    attributes = []
    for row in logits.softmax(1).tolist():
        pairs = [(score, i) for i, score in enumerate(row) if i > 0 and score > config.attribute_threshold]
        attributes.append(sorted(pairs, key=lambda pair: -pair[0])[: config.max_attributes_per_object])
    (height, width), (original_height, original_width) = size, original_size
    scale = torch.tensor([original_width / width, original_height / height] * 2)
    return {
        "boxes": final * scale,
        "scores": torch.tensor(scores),
        "labels": labels,
        "features": features[chosen],
        "attribute_ids": [[i for _, i in row] for row in attributes],
        "attribute_scores": [[score for score, _ in row] for row in attributes],
    }
