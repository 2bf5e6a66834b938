# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Configurations of PyramidCLIP (arXiv 2204.14095).

>>> config = PyramidCLIPConfig.from_architecture("ViT-B-16")
>>> config.vision_config.num_leff_layers
9
"""

from .versions_pyramidclip import BUILDS_SUB_CONFIGS  # isort: skip  # first: it says which versions this needs

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

from .architectures_pyramidclip import ARCHITECTURES
from .levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, check_loss_weights
from .saved_folders_pyramidclip import LoadedFromFolder

# What a saved configuration may hold beside its fields. A list, because a version of transformers does not know all the
# keys that earlier and later ones write.
_BASE_CONFIG_KEYS = {
    "model_type", "torch_dtype", "num_labels", "name_or_path", "auto_map", "attn_implementation", "output_attentions",
    "experts_implementation", "per_layer_config", "quantization_config", "custom_pipelines", "tie_word_embeddings",
    "tokenizer_class", "use_cache", "tie_last_hidden_states", "transformers_weights", "use_bfloat16", "torchscript",
    "processor_class", "tie_encoder_decoder", "finetuning_task", "task_specific_params", "pruned_heads",
}  # fmt: skip


def _reject_unknown_keys(config: PreTrainedConfig, kwargs: Mapping[str, Any]) -> None:
    allowed = _BASE_CONFIG_KEYS | set(GenerationConfig._get_default_generation_params())
    unknown = [key for key in kwargs if key not in allowed and not key.startswith("_")]
    kind = kwargs.get("model_type")
    if unknown and kind not in (None, config.model_type):
        raise ValueError(f"The configuration is of the kind {kind!r}, expected {config.model_type!r}.")
    if unknown:
        base = PreTrainedConfig.__dataclass_fields__
        fields = [name for name in type(config).__dataclass_fields__ if name not in base]
        hints = [f"{key} (did you mean {near[0]}?)" if near else key for key in unknown
                 for near in [difflib.get_close_matches(key, fields, 1)]]  # fmt: skip
        raise ValueError(f"{type(config).__name__} has no field {', '.join(hints)}. Its fields: {fields}.")


def _check_heads(name: str, hidden_size: int, num_attention_heads: int) -> None:
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        raise ValueError(
            f"{name}: num_attention_heads ({num_attention_heads}) must divide hidden_size ({hidden_size})."
        )


# Fields that follow from others where they are not given: `None` or a dictionary may come in, which transformers'
# check of types needs to hear; code that reads a configuration finds what the second name says.
_NOT_GIVEN: Any = None
if TYPE_CHECKING:
    Derived: TypeAlias = int
    TextConfig: TypeAlias = "PyramidCLIPTextConfig"
    VisionConfig: TypeAlias = "PyramidCLIPVisionConfig"
    LossWeights: TypeAlias = dict[str, float]
    LossTerms: TypeAlias = list[str]
else:
    Derived = int | None
    TextConfig = VisionConfig = dict | PreTrainedConfig | None
    LossWeights = dict | None
    LossTerms = list | None


@strict
class PyramidCLIPTextConfig(PreTrainedConfig):
    """The text tower: a causal pre-LN transformer (CLIP's names and defaults).

    Args:
        pooling: `"max"` takes the maximum over all `max_position_embeddings` positions, padding included, as the
            released weights need it; `"eos"` takes the end-of-text position, as the paper describes it.
        pad_token_id: what padded positions hold; under `"max"` it is part of the function, so it is 0 as in CLIP.
        projection_dim: width of the shared embedding space; inside a [`PyramidCLIPConfig`] it follows the composed one.
        bos_token_id: the vocabulary's last entry but one when not given, as CLIP orders them.
        eos_token_id: the last one when not given.
        num_attention_heads: `hidden_size / 64` when not given.
        intermediate_size: four times `hidden_size` when not given.
    """

    model_type = "pyramidclip_text_model"
    base_config_key = "text_config"

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: Derived = _NOT_GIVEN
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: Derived = _NOT_GIVEN
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    pooling: Literal["max", "eos"] = "max"
    pad_token_id: int | None = 0
    bos_token_id: Derived = _NOT_GIVEN
    eos_token_id: Derived = _NOT_GIVEN

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, kwargs)
        self.bos_token_id = self.vocab_size - 2 if self.bos_token_id is None else self.bos_token_id
        self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_attention_heads = self.num_attention_heads or max(1, self.hidden_size // 64)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks; run by `@strict` at construction and on saving."""
        _check_heads("text_config", self.hidden_size, self.num_attention_heads)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise ValueError(f"text_config: {name} ({value}) must lie in the vocabulary of {self.vocab_size}.")
        if self.pooling == "max" and self.pad_token_id is None:
            raise ValueError('text_config: pooling "max" pools over the padding, so pad_token_id must be set (0).')


@strict
class PyramidCLIPVisionConfig(PreTrainedConfig):
    """The image tower: a ViT whose first blocks have LeFF, or CLIP's modified ResNet.

    Args:
        tower: `"vit"` or `"resnet"`.
        image_size: side of the square picture, pixels; a multiple of `patch_size` (ViT) or of 32 (ResNet).
        hidden_size: token width. ViT 768 by default; ResNet always `32 * width`, the width of the pooled vector.
        num_leff_layers: how many blocks, from the first, have the locally-enhanced feed-forward (paper, section 3.3).
        num_picture_layers: how many blocks, from the first, only pictures run through; the region branch enters behind
            them (the paper's M). `num_leff_layers` when not given, as in the paper, and at least that: LeFF needs a
            grid, which regions do not have.
        freeze_patch_embedding: keep the patch convolution at its initial value in training, as the reference does.
        layers: blocks per stage of the ResNet.
        width: stem width of the ResNet.
        roi_feature_size: width of a region's feature; 4 box numbers are appended to it.
        num_attention_heads: `hidden_size / 64` when not given.
        intermediate_size: four times `hidden_size` when not given.
    """

    model_type = "pyramidclip_vision_model"
    base_config_key = "vision_config"

    tower: Literal["vit", "resnet"] = "vit"
    image_size: int = 224
    num_channels: int = 3
    hidden_size: Derived = _NOT_GIVEN
    intermediate_size: Derived = _NOT_GIVEN
    projection_dim: int = 512
    num_hidden_layers: Derived = _NOT_GIVEN
    num_attention_heads: Derived = _NOT_GIVEN
    patch_size: int = 16
    num_leff_layers: Derived = _NOT_GIVEN
    num_picture_layers: Derived = _NOT_GIVEN
    freeze_patch_embedding: bool = True
    layers: list[int] | tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    roi_feature_size: int = 2048
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, kwargs)
        vit = self.tower == "vit"
        self.hidden_size = self.hidden_size or (768 if vit else 32 * self.width)
        self.num_hidden_layers = self.num_hidden_layers or (12 if vit else len(self.layers))
        if self.num_leff_layers is None:
            self.num_leff_layers = min(9, self.num_hidden_layers) if vit else 0
        if self.num_picture_layers is None:
            self.num_picture_layers = self.num_leff_layers
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        self.num_attention_heads = self.num_attention_heads or max(1, self.hidden_size // 64)
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Cross-field checks; run by `@strict` at construction and on saving."""
        _check_heads("vision_config", self.hidden_size, self.num_attention_heads)
        if self.roi_feature_size < 1:
            raise ValueError(f"vision_config: roi_feature_size must be positive, got {self.roi_feature_size}.")
        stride = self.patch_size if self.tower == "vit" else 32
        if self.image_size < stride or self.image_size % stride:
            what = "patch_size" if self.tower == "vit" else "the ResNet's stride of"
            raise ValueError(f"vision_config: image_size ({self.image_size}) must be a multiple of {what} ({stride}).")
        if self.tower == "vit":
            if not 0 <= self.num_leff_layers <= self.num_hidden_layers:
                raise ValueError(
                    f"vision_config: num_leff_layers ({self.num_leff_layers}) must lie between 0 and "
                    f"num_hidden_layers ({self.num_hidden_layers})."
                )
            if not self.num_leff_layers <= self.num_picture_layers <= self.num_hidden_layers:
                raise ValueError(
                    f"vision_config: num_picture_layers ({self.num_picture_layers}) must lie between num_leff_layers "
                    f"({self.num_leff_layers}), as regions have no grid for LeFF, and num_hidden_layers "
                    f"({self.num_hidden_layers})."
                )
        else:
            if len(self.layers) != 4 or min(self.layers) < 1:
                raise ValueError(f"vision_config: layers must hold four positive block counts, got {self.layers}.")
            if self.width % 2 or self.hidden_size != 32 * self.width:
                raise ValueError(
                    f"vision_config: a ResNet needs an even width and hidden_size = 32 * width, got width "
                    f"{self.width} and hidden_size {self.hidden_size}."
                )
            for name in ("num_leff_layers", "num_picture_layers"):
                if getattr(self, name):
                    raise ValueError(f"vision_config: {name} is for the ViT, got {getattr(self, name)}.")

    @property
    def grid_size(self) -> int:
        """Side of the square token grid that the tower makes of a picture of `image_size`."""
        return self.image_size // (self.patch_size if self.tower == "vit" else 32)


@strict
class PyramidCLIPBackboneConfig(BackboneConfigMixin, PyramidCLIPVisionConfig):
    """The image tower as a backbone: the fields of [`PyramidCLIPVisionConfig`], and which stages' maps come out.

    `stage_names` are "stem" and "stage1" to "stage4" of a ResNet, or "stage1" to the last block of a ViT, whose "stem"
    is what its first block reads. The model's name holds no "resnet": DETR freezes a trunk of such a name, here whole.

    Args:
        out_features: names of stages, in their order; the last one where neither this nor `out_indices` is given.
        out_indices: the same as numbers, from 0 for the stem.
    """

    model_type = "pyramidclip_backbone"

    def __post_init__(self, **kwargs: Any) -> None:
        chosen = {name: kwargs.pop(name, None) for name in ("out_features", "out_indices")}
        kwargs.pop("stage_names", None)
        super().__post_init__(**kwargs)
        self.stage_names = ["stem", *(f"stage{number + 1}" for number in range(self.num_hidden_layers))]
        self.set_output_features_output_indices(**chosen)

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in the base class; of a saved model of ours its picture tower, which is the same tower."""
        found, kwargs = super().get_config_dict(*args, **kwargs)
        tower = found.get(cls.base_config_key, found)
        if tower.get("model_type") == PyramidCLIPVisionConfig.model_type:
            tower = {**tower, "model_type": cls.model_type}
        return tower, kwargs

    @property
    def stage_channels(self) -> list[int]:
        """Of each stage's map, the stem's first."""
        if self.tower == "vit":
            return [self.hidden_size] * len(self.stage_names)
        return [self.width, *(4 * self.width * 2**number for number in range(4))]

    @property
    def stage_strides(self) -> list[int]:
        """Pixels of a step of each stage's map, the stem's first."""
        return [self.patch_size] * len(self.stage_names) if self.tower == "vit" else [4, 4, 8, 16, 32]


TowerConfig: TypeAlias = PyramidCLIPTextConfig | PyramidCLIPVisionConfig
_TOWERS: dict[str, type[TowerConfig]] = {"vision_config": PyramidCLIPVisionConfig, "text_config": PyramidCLIPTextConfig}


@strict
class PyramidCLIPConfig(LoadedFromFolder, PreTrainedConfig):
    """A dual encoder: text tower, image tower, and the objective as data.

    Args:
        text_config: a configuration, a dictionary of one, or `None` for the defaults.
        vision_config: the same for the image tower.
        projection_dim: width of the shared embedding space; both towers' `projection_dim` follow it.
        logit_scale_init_value: initial logarithm of the softmax scale; ln(1 / 0.07).
        loss_weights: term name -> weight, used as given; `{"global_caption": 1.0}` with `label_smoothing` 0 is CLIP's.
            Empty only where `further_loss_terms` says what was trained instead.
        further_loss_terms: names of terms of the training that need more than the model, for the record.
        label_smoothing: the mass `a` of softened targets that goes to the N - 1 negatives (paper, section 3.4).
    """

    model_type = "pyramidclip"
    if BUILDS_SUB_CONFIGS:
        sub_configs_defaults: ClassVar[dict[str, Any]] = _TOWERS
    else:
        sub_configs: ClassVar[dict[str, Any]] = _TOWERS

    text_config: TextConfig = _NOT_GIVEN
    vision_config: VisionConfig = _NOT_GIVEN
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592600369327779
    loss_weights: LossWeights = _NOT_GIVEN
    label_smoothing: float | int = 0.2
    further_loss_terms: LossTerms = _NOT_GIVEN

    if TYPE_CHECKING:  # the towers' configurations may be given as dictionaries

        def __init__(self, **kwargs: Any) -> None: ...

    def __post_init__(self, **kwargs: Any) -> None:
        _reject_unknown_keys(self, kwargs)
        if self.loss_weights is None:
            self.loss_weights = dict(DEFAULT_LOSS_WEIGHTS)
        self.further_loss_terms = list(self.further_loss_terms or ())
        if not BUILDS_SUB_CONFIGS:
            for name, config_class in _TOWERS.items():
                if not isinstance(given := getattr(self, name), PreTrainedConfig):
                    setattr(self, name, config_class(**(given or {})))
        super().__post_init__(**kwargs)
        for tower in (self.text_config, self.vision_config):
            tower.projection_dim = self.projection_dim

    def validate_architecture(self) -> None:
        """Cross-field checks; run by `@strict` at construction and on saving."""
        if self.loss_weights or not self.further_loss_terms:
            check_loss_weights(self.loss_weights)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), got {self.label_smoothing}.")
        if self.projection_dim < 1:
            raise ValueError(f"projection_dim must be positive, got {self.projection_dim}.")

    @classmethod
    def from_architecture(cls, name: str, **kwargs: Any) -> "PyramidCLIPConfig":
        """The configuration of a named architecture, e.g. `"RN50"` or `"ViT-B-16"`.

        Args:
            name: one of `ARCHITECTURES`.
            **kwargs: fields of the composed configuration; `text_config` and `vision_config` may be dictionaries
                whose entries override the architecture's.

        Raises:
            ValueError: the name is not known.
        """
        if name not in ARCHITECTURES:
            raise ValueError(f"Unknown architecture {name!r}; the named ones are {list(ARCHITECTURES)}.")
        projection_dim, vision, text = ARCHITECTURES[name]
        return cls(
            text_config={**text, **kwargs.pop("text_config", {})},
            vision_config={**vision, **kwargs.pop("vision_config", {})},
            **{"projection_dim": projection_dim, **kwargs},
        )


__all__ = [
    "ARCHITECTURES",
    "PyramidCLIPBackboneConfig",
    "PyramidCLIPConfig",
    "PyramidCLIPTextConfig",
    "PyramidCLIPVisionConfig",
]
