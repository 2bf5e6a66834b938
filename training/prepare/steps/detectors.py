"""Detectors behind one interface: `detect(pictures)` gives the `Detections` of each picture.

Only VinVL's features fit the region branch of the released PyramidCLIP checkpoints; the others are for models trained
on them.
"""

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

# Importing the package registers the configuration with AutoConfig.
from pyramidclip_hf.loading import warn_of_slow_type
from pyramidclip_hf.vinvl import VinVLForObjectAttributeDetection, VinVLImageProcessor, phrase_attributes
from training.prepare.steps.checkpoints import checkpoint_config, checkpoint_content, checkpoint_expected
from training.prepare.steps.flags import DetectorArguments, read_names
from training.prepare.steps.regions import Detections
from training.prepare.steps.rewriting import MadeBy


class Detector(Protocol):
    """What `training.prepare.detect.run` takes: one of those here, or your own.

    Attributes:
        made_by: what made the regions: class, checkpoint, content, settings.
        feature_size: width of the features; None until it has seen a picture.
    """

    made_by: MadeBy
    feature_size: int | None

    def detect(self, pictures: list[Image.Image]) -> list[Detections]:
        """The detections of each of some upright RGB pictures. Raises `ValueError` where it refuses one of them."""
        ...


def open_detector(arguments: DetectorArguments, device: str | torch.device = "cpu") -> Detector:
    """The detector of a checkpoint, told by its configuration.

    Raises:
        ValueError: there is no such checkpoint, it is no detector, or an open-vocabulary one without `names`.
        ImportError: an extra is missing; it is named.
    """
    warn_of_slow_type("--dtype", arguments.dtype, device)
    with checkpoint_expected(arguments.detector, "--detector"):
        return _open(arguments, torch.device(device))


def _open(arguments: DetectorArguments, device: torch.device) -> Detector:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,
    )

    config = checkpoint_config(arguments.detector, arguments.revision, "--detector")
    if config.model_type == "vinvl":
        return VinVLDetector(arguments, config, device)
    if config.model_type in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES:
        return OpenVocabularyDetector(arguments, config, device)
    if config.model_type in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        return TransformersDetector(arguments, config, device)
    raise ValueError(
        f"--detector {arguments.detector} is of the kind {config.model_type!r}, which finds no objects: expected VinVL "
        "(conversion.convert_vinvl), an object-detection model of Transformers (detr, rt_detr, d_fine, yolos, ...) or, "
        "with --names, an open-vocabulary one (owlvit, owlv2, grounding-dino, ...)"
    )


# Any: what JSON can hold.
def _made_by(arguments: DetectorArguments, config: Any, **settings: Any) -> MadeBy:
    """What made the regions; two data sets with equal entries may be mixed, so a folder's place is not part of it."""
    made: MadeBy = {
        "maker": config.model_type,
        "how": "detect",
        "checkpoint": arguments.detector,
        "content": checkpoint_content(arguments.detector, config),
        "settings": {"dtype": arguments.dtype, "top": arguments.top, **settings},
    }
    if os.path.isdir(arguments.detector):
        del made["checkpoint"]
    return made


class VinVLDetector:
    """The VinVL object-attribute detector (`pyramidclip_hf.vinvl`)."""

    # Any: each kind of detector has a configuration of its own.
    def __init__(self, arguments: DetectorArguments, config: Any, device: torch.device):
        # Names and attributes of regions that are not kept need not be found out.
        config.max_detections = arguments.top
        config.min_detections = min(config.min_detections, arguments.top)
        self.model = VinVLForObjectAttributeDetection.from_pretrained(
            arguments.detector,
            config=config,
            revision=arguments.revision or "main",
            dtype=getattr(torch, arguments.dtype),
        )
        self.model.eval().to(device)
        self.processor = VinVLImageProcessor.from_pretrained(arguments.detector, revision=arguments.revision or "main")
        self.device, self.feature_size = device, config.feature_size
        self.made_by = _made_by(
            arguments,
            config,
            score_threshold=config.score_threshold,
            nms_threshold=config.nms_threshold,
            attribute_threshold=config.attribute_threshold,
            ignore_box_regression=config.ignore_box_regression,
            size=dict(self.processor.size),
        )

    def detect(self, pictures: list[Image.Image]) -> list[Detections]:
        """The detections of each of some RGB pictures."""
        inputs = self.processor(pictures, return_tensors="pt").to(self.device)
        config, detections = self.model.config, []
        for found in self.model(**inputs).detections:
            attributes = [
                phrase_attributes(names, scores.tolist(), config)
                for names, scores in zip(found.attribute_names, found.attribute_scores)
            ]
            boxes, scores, features = (_array(t) for t in (found.normalized_boxes, found.scores, found.features))
            detections.append(Detections(boxes, scores, found.label_names, features, attributes))
        return detections


class TransformersDetector:
    """Any object-detection model of Transformers that gives `logits` and `pred_boxes`. It names no attributes.

    With `features="backbone"` the vector of a region is the mean of the backbone's feature map under its box (ROIAlign,
    7 x 7); with "queries" it is the decoder state that the box was read from.
    """

    # Any: each kind of detector has a configuration of its own.
    def __init__(self, arguments: DetectorArguments, config: Any, device: torch.device):
        from transformers import AutoImageProcessor, AutoModelForObjectDetection

        self.arguments, self.device = arguments, device
        self.model = AutoModelForObjectDetection.from_pretrained(
            arguments.detector, revision=arguments.revision or "main", dtype=getattr(torch, arguments.dtype)
        )
        self.model.eval().to(device)
        self.processor = AutoImageProcessor.from_pretrained(arguments.detector, revision=arguments.revision)
        self.feature_size: int | None = None
        self.maps = _watch_backbone(self.model) if arguments.features == "backbone" else None
        self.made_by = _made_by(
            arguments,
            config,
            features=arguments.features,
            feature_size=arguments.feature_size,
            score_threshold=arguments.score_threshold,
        )

    @torch.inference_mode()
    def detect(self, pictures: list[Image.Image]) -> list[Detections]:
        """The detections of each of some RGB pictures."""
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = _checked_outputs(self.model(**inputs), self.model)
        found = self.processor.post_process_object_detection(
            outputs, threshold=self.arguments.score_threshold, target_sizes=[(1, 1)] * len(pictures)
        )
        queries = queries_of(outputs, self.processor.post_process_object_detection, self.arguments.score_threshold)
        names, detections = self.model.config.id2label, []
        for i, (result, query) in enumerate(zip(found, queries)):
            boxes = result["boxes"].float().clamp(0, 1)
            best = _best_per_query(query)
            boxes, scores, labels, query = boxes[best], result["scores"][best], result["labels"][best], query[best]
            if self.maps is None:
                features = query_states(outputs, self.model)[i, query]
            else:
                features = self._pooled(i, boxes, inputs)
            self.feature_size = features.shape[1]
            labels = [names[label] for label in labels.tolist()]
            detections.append(Detections(_array(boxes), _array(scores), labels, _array(features)))
        return detections

    def _pooled(self, i: int, boxes: torch.Tensor, inputs: Any) -> torch.Tensor:
        """The means (n, C) of the feature map of picture i under its boxes."""
        from torchvision.ops import roi_align

        feature_map = choose_map(self.maps or (), self.arguments.feature_size)[i].float()
        height, width = feature_map.shape[-2:]
        # Boxes are fractions of the picture, which fills the top left of a padded batch.
        mask = inputs.get("pixel_mask")
        if mask is not None:
            height, width = height * mask[i].any(1).float().mean(), width * mask[i].any(0).float().mean()
        scale = boxes.new_tensor([float(width), float(height)]).repeat(2)
        return roi_align(feature_map[None], [boxes * scale], 7, aligned=True).mean((2, 3))


# Any: the output class of whatever model it is.
def _checked_outputs(outputs: Any, model: torch.nn.Module) -> Any:
    for name in ("logits", "pred_boxes"):
        if getattr(outputs, name, None) is None:
            raise ValueError(
                f"{type(model).__name__} gives no `{name}` (it gives "
                f"{', '.join(outputs.keys())}): it cannot be used here"
            )
    return outputs


def _watch_backbone(model: torch.nn.Module) -> list[torch.Tensor]:
    """A list that holds, after each forward, the feature maps (B, C, h, w) of the model's backbone, finest first."""
    backbones = [(name.count("."), name) for name, _ in model.named_modules() if name.split(".")[-1] == "backbone"]
    if not backbones:
        raise ValueError(f"{type(model).__name__} has no backbone with a feature map: use --features queries")
    maps: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, outputs: object) -> None:
        maps[:] = list(_four_dimensional(outputs))

    model.get_submodule(min(backbones)[1]).register_forward_hook(keep)
    return maps


def _four_dimensional(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.dim() == 4 and value.is_floating_point():
            yield value
    elif hasattr(value, "feature_maps"):
        yield from _four_dimensional(value.feature_maps)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _four_dimensional(item)


def choose_map(maps: Sequence[torch.Tensor], width: int | None) -> torch.Tensor:
    """The feature map (B, C, h, w) with `width` channels, the coarsest of them; without `width` the last one.

    Raises:
        ValueError: none has that width; it names those that are there.
    """
    fitting = [feature_map for feature_map in maps if width in (None, feature_map.shape[1])]
    if not fitting:
        raise ValueError(f"no feature map of {width} channels: the backbone gives {[m.shape[1] for m in maps]}")
    return fitting[-1]


def queries_of(outputs: Any, post_process: Callable[..., list[dict[str, Any]]], threshold: float) -> list[torch.Tensor]:
    """The index of the query behind each detection that `post_process` gives, a list of int64 tensors.

    Post-processing sorts and filters in ways of its own and does not say which query a box came from. So the boxes are
    replaced by the number of their query, and what comes back is read off.
    """
    outputs = copy.copy(outputs)
    batch, queries = outputs.logits.shape[:2]
    numbers = (torch.arange(queries, device=outputs.logits.device, dtype=torch.float64) + 0.5) / queries
    marked = torch.stack([numbers, numbers, torch.zeros_like(numbers), torch.zeros_like(numbers)], 1)
    outputs["pred_boxes"] = marked.expand(batch, -1, -1)
    return [(result["boxes"][:, 0] * queries).long() for result in post_process(outputs, threshold=threshold)]


def _best_per_query(query: torch.Tensor) -> torch.Tensor:
    """Rows that come first for their query: some models give one query under several classes, the likeliest first."""
    first: dict[int, int] = {}
    for row, number in enumerate(query.tolist()):
        first.setdefault(number, row)
    return torch.tensor(list(first.values()), dtype=torch.int64, device=query.device)


def query_states(outputs: Any, model: Any) -> torch.Tensor:
    """The states (B, Q, D) behind `logits`.

    Raises:
        ValueError: the model does not give them.
    """
    queries = outputs.logits.shape[1]
    states = getattr(outputs, "class_embeds", None)
    states = getattr(outputs, "last_hidden_state", None) if states is None else states
    if states is not None and model.config.model_type == "yolos":
        states = states[:, -queries:]  # behind the patches
    if states is None or states.dim() != 3 or states.shape[1] != queries:
        found = None if states is None else tuple(states.shape)
        raise ValueError(
            f"{type(model).__name__}: expected states of its {queries} queries, found {found}; use --features backbone"
        )
    return states


class OpenVocabularyDetector:
    """Detectors that are told what to look for: OWL-ViT, OWLv2, Grounding DINO. Names and attributes are prompted.

    Names are asked `names_per_prompt` at a time; boxes that overlap by more than `nms_threshold` are one region.
    Attributes are asked in the same way, and belong to the region that they overlap by more than `nms_threshold` and
    most. Features are the query states.
    """

    # Any: each kind of detector has a configuration of its own.
    def __init__(self, arguments: DetectorArguments, config: Any, device: torch.device):
        from transformers import AutoModelForZeroShotObjectDetection, AutoProcessor

        if not arguments.names:
            raise ValueError(
                f"{arguments.detector} finds what it is told: give class names with --names FILE (one a line)"
            )
        self.arguments, self.device = arguments, device
        self.names = read_names(arguments.names)
        self.attribute_names = read_names(arguments.attributes) if arguments.attributes else []
        self.model = AutoModelForZeroShotObjectDetection.from_pretrained(
            arguments.detector, revision=arguments.revision or "main", dtype=getattr(torch, arguments.dtype)
        )
        self.model.eval().to(device)
        self.processor = AutoProcessor.from_pretrained(arguments.detector, revision=arguments.revision)
        self.feature_size: int | None = None
        self.made_by = _made_by(
            arguments,
            config,
            features="queries",
            names=self.names,
            attributes=self.attribute_names,
            score_threshold=arguments.score_threshold,
            attribute_threshold=arguments.attribute_threshold,
            names_per_prompt=arguments.names_per_prompt,
            nms_threshold=arguments.nms_threshold,
        )

    @torch.inference_mode()
    def detect(self, pictures: list[Image.Image]) -> list[Detections]:
        """The detections of each of some RGB pictures."""
        regions = self._ask(pictures, self.names, self.arguments.score_threshold)
        described = [self._suppressed(region) for region in regions]
        if self.attribute_names:
            answers = self._ask(pictures, self.attribute_names, self.arguments.attribute_threshold)
            for region, answer in zip(described, answers):
                region.attributes = self._attributes(region, answer)
        return described

    def _ask(self, pictures: list[Image.Image], names: list[str], threshold: float) -> list[Detections]:
        """Everything that is found for `names`, as `Detections` a picture."""
        parts: list[list[Detections]] = [[] for _ in pictures]
        for start in range(0, len(names), self.arguments.names_per_prompt):
            asked = names[start : start + self.arguments.names_per_prompt]
            for part, found in zip(parts, self._ask_some(pictures, asked, threshold)):
                part.append(found)
        return [_joined(part) for part in parts]

    def _ask_some(self, pictures: list[Image.Image], names: list[str], threshold: float) -> list[Detections]:
        prompts = [names] * len(pictures)
        inputs = self.processor(text=prompts, images=pictures, return_tensors="pt").to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = _checked_outputs(self.model(**inputs), self.model)

        def post_process(outputs: Any, threshold: float, target_sizes: Any = None) -> list[dict[str, Any]]:
            return self.processor.post_process_grounded_object_detection(
                outputs, threshold=threshold, target_sizes=target_sizes, text_labels=prompts
            )

        sizes = [(picture.height, picture.width) for picture in pictures]
        found = post_process(outputs, threshold, sizes)
        states = query_states(outputs, self.model)
        self.feature_size = states.shape[-1]
        detections = []
        for i, (result, query) in enumerate(zip(found, queries_of(outputs, post_process, threshold))):
            boxes = _array(result["boxes"]) / np.array([sizes[i][1], sizes[i][0]] * 2)
            labels = [prompted_name(text, names) for text in result["text_labels"]]
            detections.append(Detections(boxes.clip(0, 1), _array(result["scores"]), labels, _array(states[i, query])))
        return detections

    def _suppressed(self, found: Detections) -> Detections:
        from torchvision.ops import nms

        boxes, scores = torch.as_tensor(found.boxes).float(), torch.as_tensor(found.scores).float()
        return _chosen(found, nms(boxes, scores, self.arguments.nms_threshold).numpy())

    def _attributes(self, region: Detections, answer: Detections) -> list[list[str]]:
        """For each region the attributes whose boxes overlap it, the most confident last."""
        from torchvision.ops import box_iou

        words: list[dict[str, float]] = [{} for _ in range(len(region))]
        if len(region) and len(answer):
            overlap = box_iou(torch.as_tensor(answer.boxes), torch.as_tensor(region.boxes))
            share, owner = (values.tolist() for values in overlap.max(1))
            for name, score, own, index in zip(answer.labels, answer.scores.tolist(), share, owner):
                if own > self.arguments.nms_threshold and name:
                    words[index][name] = max(score, words[index].get(name, 0.0))
        return [sorted(found, key=lambda name: found[name]) for found in words]


def prompted_name(text: str, names: Sequence[str]) -> str:
    """The prompted name behind the words that a detector gives back.

    It is the text itself, else the name that shares most words with it (Grounding DINO joins the words it finds
    likely), else "", which is no name and is refused further on.
    """
    if text in names:
        return text
    words = set(text.split())
    shared = [len(words & set(name.lower().split())) / len(name.split()) for name in names]
    best = int(np.argmax(shared))
    return names[best] if shared[best] else ""


def _joined(parts: Sequence[Detections]) -> Detections:
    return Detections(
        np.concatenate([part.boxes for part in parts]),
        np.concatenate([part.scores for part in parts]),
        [label for part in parts for label in part.labels],
        np.concatenate([part.features for part in parts]),
    )


def _chosen(found: Detections, rows: np.ndarray) -> Detections:
    return Detections(
        found.boxes[rows],
        found.scores[rows],
        [found.labels[row] for row in rows],
        found.features[rows],
        [found.attributes[row] for row in rows],
    )


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
