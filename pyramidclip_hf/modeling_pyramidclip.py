# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""PyramidCLIP (arXiv 2204.14095): the towers, the dual encoder, the heads.

Read from the top: outputs, the two towers, the dual encoder (`PyramidCLIPModel`), the single towers with projection,
the classifier. The base class and the towers' parts are in the siblings.
Shape letters: B batch, L tokens, K regions, D tower width, P `projection_dim`.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pyramidclip import (
    PyramidCLIPConfig,
    PyramidCLIPTextConfig,
    PyramidCLIPVisionConfig,
)
from .levels_pyramidclip import LEVELS, TERMS, levels_of, levels_of_kind
from .loss_pyramidclip import PyramidLoss, normalize_embeds, pyramid_loss
from .modeling_pyramidclip_base import PyramidCLIPPreTrainedModel
from .modeling_pyramidclip_resnet import PyramidCLIPAttentionPool, PyramidCLIPResNet
from .modeling_pyramidclip_text import (
    AttentionMask,
    Packing,
    PyramidCLIPEncoder,
    PyramidCLIPEncoderLayer,
    PyramidCLIPLayerNorm,
    PyramidCLIPTextEmbeddings,
    PyramidCLIPTextLayer,
    canonical_input_ids,
    checked_input_ids,
    end_positions,
    is_traced,
    keys_with_first,
    mask_of_keys,
    moved_left,
    packed,
    packed_positions,
    refuse_no_tensor,
    take_position,
    text_starts,
    unpacked,
)
from .modeling_pyramidclip_vit import PyramidCLIPLeFFLayer, PyramidCLIPVisionEmbeddings
from .versions_pyramidclip import NO_CACHE

MAX_LOGIT_SCALE = math.log(100.0)

logger = logging.get_logger(__name__)


@dataclass
class PyramidCLIPOutput(ModelOutput):
    """Output of [`PyramidCLIPModel`]. Only what was put in comes out; the rest is `None`.

    Args:
        loss: scalar, with `return_loss=True`.
        loss_terms: loss term name -> unweighted scalar, with `return_loss=True`.
        logits_per_image: (B_image, B_text) fp32, scaled cosine of `image_embeds` and `text_embeds`.
        logits_per_text: its transpose.
        image_embeds: (B, P) fp32 unit vectors of the global picture.
        local_image_embeds: (B, P) of the local crop.
        roi_embeds: (B, P) of the regions.
        text_embeds: (B, P) fp32 unit vectors of the caption.
        summary_embeds: (B, P) of the summary.
        tag_embeds: (B, P) of the tags.
        text_model_output: the tower's output for the caption, with the projected, not normalised embedding as
            `pooler_output`.
        vision_model_output: the same for the global picture.
    """

    loss: torch.Tensor | None = None
    loss_terms: dict[str, torch.Tensor] | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    local_image_embeds: torch.Tensor | None = None
    roi_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    summary_embeds: torch.Tensor | None = None
    tag_embeds: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The values that are there, outputs of the towers as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
class PyramidCLIPVisionModelOutput(ModelOutput):
    """`image_embeds` (B, P): projected, not normalised; the rest as the image tower gives it."""

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class PyramidCLIPTextModelOutput(ModelOutput):
    """`text_embeds` (B, P): projected, not normalised; the rest as the text tower gives it."""

    text_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class PyramidCLIPTextModel(PyramidCLIPPreTrainedModel):
    """The text tower without projection."""

    config: PyramidCLIPTextConfig
    input_modalities = ["text"]
    _input_embed_layer = "token_embedding"

    def __init__(self, config: PyramidCLIPTextConfig):
        super().__init__(config)
        self.embeddings = PyramidCLIPTextEmbeddings(config)
        self.encoder = PyramidCLIPEncoder(PyramidCLIPTextLayer(config) for _ in range(config.num_hidden_layers))
        self.final_layer_norm = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pooled_only: bool = False,
        cut_padding: bool = False,
        packing: Packing | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Hidden states (B, L, D) after the final LayerNorm, and the pooled vector (B, D).

        Args:
            input_ids: (B, L) int64, L at most `max_position_embeddings`, padded on the right by anybody with anything,
                or on the left with pad or end ids or where the mask is 0: such rows are moved to the left first, and
                the hidden states are those of the moved rows.
            attention_mask: (B, L), 1 on real tokens. Attention itself is causal and never masked: behind the end
                token nothing can reach it, and under `"max"` the padding belongs to the function.
            position_ids: (1 or B, L) int64, moved with the ids; by default 0, 1, ... of the moved rows.
            pooled_only: compute nothing that `pooler_output` does not need; there is no `last_hidden_state` then.
            cut_padding: under `"eos"` and with `pooled_only`, cut off what is behind the longest text. It reads a
                number off the device, so a training step would have to wait for it.
            packing: the rows are batches of texts, one after another: (texts, tokens) of each, whose padding beyond its
                own tokens is not computed. Under `"eos"` and with `pooled_only`; `attention_mask` hides that padding.
            **kwargs: transformers' own, such as `output_hidden_states`.

        Raises:
            ValueError: no ids, no texts, or more tokens than positions.
        """
        input_ids = checked_input_ids(input_ids, self.config)
        starts = text_starts(input_ids, attention_mask, self.config)
        kept = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).to(input_ids.dtype)
        attention_mask = moved_left(kept, starts, 0)
        input_ids = moved_left(input_ids, starts, self.config.pad_token_id or 0)
        if position_ids is not None:
            own = self.embeddings.position_ids[:, : input_ids.shape[1]]
            position_ids = moved_left(position_ids.expand(input_ids.shape[0], -1), starts, own)
        ends = end_positions(input_ids, attention_mask, self.config) if self.config.pooling == "eos" else None
        if cut_padding and pooled_only and ends is not None:
            length = int(ends.max()) + 1
            input_ids = input_ids[:, :length]
            position_ids = None if position_ids is None else position_ids[:, :length]
        if packing is not None and ends is not None:
            return self._pooled_of_packed(input_ids, ends, packing, **kwargs)
        if self.config.pooling == "max":
            if position_ids is not None:
                rest = self.embeddings.position_ids[:, position_ids.shape[1] :]
                position_ids = torch.cat([position_ids, rest.expand(position_ids.shape[0], -1)], dim=1)
            input_ids = canonical_input_ids(input_ids, attention_mask, self.config)
        hidden_states = self.embeddings(input_ids, position_ids)
        mask = create_causal_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=None, **NO_CACHE)
        kwargs.pop("is_causal", None)
        if pooled_only and ends is not None:
            kwargs |= {"query_at": ends, "query_mask": self._mask_behind(ends, hidden_states)}
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, mask, is_causal=True, **kwargs))
        if ends is None:
            pooled = hidden_states.amax(dim=1)
        else:
            pooled = hidden_states[:, 0] if pooled_only else take_position(hidden_states, ends)[:, 0]
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else hidden_states, pooler_output=pooled
        )

    def _pooled_of_packed(
        self, input_ids: torch.Tensor, ends: torch.Tensor, packing: Packing, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        hidden_states = self.embeddings(packed(input_ids, packing), packing=packing)
        parts = unpacked(hidden_states, packing)
        ends_of_parts = ends.split([rows for rows, _ in packing])
        masks = tuple(
            create_causal_mask(config=self.config, inputs_embeds=part, attention_mask=None, **NO_CACHE)
            for part in parts
        )
        kwargs["query_mask"] = tuple(self._mask_behind(end, part) for end, part in zip(ends_of_parts, parts))
        kwargs |= {"query_at": packed_positions(ends_of_parts, packing), "packing": packing, "is_causal": True}
        hidden_states = self.final_layer_norm(self.encoder(hidden_states, masks, **kwargs))
        return BaseModelOutputWithPooling(pooler_output=hidden_states[0])

    def _mask_behind(self, ends: torch.Tensor, hidden_states: torch.Tensor) -> AttentionMask:
        """What causal attention lets the one query at `ends` (B,) see."""
        keys = torch.arange(hidden_states.shape[1], device=ends.device) <= ends[:, None]
        return mask_of_keys(self.config, hidden_states[:, :1], keys, hidden_states)


class PyramidCLIPVisionModel(PyramidCLIPPreTrainedModel):
    """The image tower without projection: ViT or ResNet, for pictures or for a picture's regions."""

    config: PyramidCLIPVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__(config)
        if config.tower == "vit":
            self.embeddings = PyramidCLIPVisionEmbeddings(config)
            self.pre_layernorm = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.encoder = PyramidCLIPEncoder(
                (PyramidCLIPLeFFLayer if index < config.num_leff_layers else PyramidCLIPEncoderLayer)(config)
                for index in range(config.num_hidden_layers)
            )
            self.post_layernorm = PyramidCLIPLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.trunk = PyramidCLIPResNet(config)
            self.attention_pool = PyramidCLIPAttentionPool(config)
        self.post_init()

    @property
    def position_holder(self) -> PyramidCLIPVisionEmbeddings | PyramidCLIPAttentionPool:
        """The module with `position_embedding` and `position_ids`."""
        return self.embeddings if self.config.tower == "vit" else self.attention_pool

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the pixels."""
        return self.embeddings.patch_embedding if self.config.tower == "vit" else self.trunk.stem.conv1

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the convolution that sees the pixels."""
        if self.config.tower == "vit":
            self.embeddings.patch_embedding = value
        else:
            self.trunk.stem.conv1 = value

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a patch convolution that is to stay as it is gets no gradient."""
        # Here, not in __init__: loading replaces parameters, and ends with a call of eval().
        if self.config.tower == "vit" and self.config.freeze_patch_embedding:
            self.embeddings.patch_embedding.requires_grad_(False)
        return super().train(mode)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        roi_features: torch.Tensor | None = None,
        roi_mask: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        pooled_only: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Tokens (B, L, D), the first one global, and the pooled vector (B, D).

        The pooled vector is the class token after the last LayerNorm (ViT), or the output of the attention pooling
        before its output projection (ResNet).

        Args:
            pixel_values: (B, 3, `image_size`, `image_size`); another size needs `interpolate_pos_encoding`.
            roi_features: (B, K, `roi_feature_size` + 4), in place of pixels: features and x1, y1, x2, y2 in 0..1.
            roi_mask: (B, K) bool, True on real regions; `None` means all.
            interpolate_pos_encoding: resize the positions (bicubic) to the picture's own grid.
            pooled_only: compute nothing that `pooler_output` does not need; there is no `last_hidden_state` then.
            **kwargs: transformers' own, such as `output_hidden_states`.

        Raises:
            ValueError: neither or both inputs, no tensor of floats, an empty batch, or a shape that does not fit the
                configuration.
        """
        if pixel_values is not None and roi_features is None:
            self._check_pixels(pixel_values, interpolate_pos_encoding)
            inputs = {"pixel_values": pixel_values.to(self.dtype)}
        elif roi_features is not None and pixel_values is None:
            roi_features, roi_mask = self._checked_regions(roi_features, roi_mask)
            inputs = {"roi_features": roi_features}
        else:
            raise ValueError("The image tower needs pixel_values or roi_features, one of the two.")
        if self.config.tower == "vit":
            return self._forward_vit(inputs, roi_mask, interpolate_pos_encoding, pooled_only, **kwargs)
        if "pixel_values" in inputs:
            inputs = {"feature_map": self.trunk(inputs["pixel_values"])}
        tokens, pooled, _ = self.attention_pool(
            **inputs, roi_mask=roi_mask, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        return BaseModelOutputWithPooling(last_hidden_state=None if pooled_only else tokens, pooler_output=pooled)

    def _forward_vit(
        self,
        inputs: dict[str, torch.Tensor],
        roi_mask: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        pooled_only: bool,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        hidden_states = self.embeddings(**inputs, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.pre_layernorm(hidden_states)
        first, mask = 0, None  # the first block that runs, and what its tokens see
        # A last block with LeFF reads the patch tokens: the class token passes it, BatchNorm's statistics do not.
        if pooled_only and self.config.num_leff_layers < self.config.num_hidden_layers:
            kwargs["query_at"] = hidden_states.new_zeros(hidden_states.shape[0], dtype=torch.long)
        if "roi_features" in inputs:
            first = self.config.num_picture_layers
            if roi_mask is not None:
                keys = keys_with_first(roi_mask)
                mask = mask_of_keys(self.config, hidden_states, keys)
                kwargs["query_mask"] = mask_of_keys(self.config, hidden_states[:, :1], keys, hidden_states)
        else:
            height, width = inputs["pixel_values"].shape[2:]
            kwargs["grid_size"] = (height // self.config.patch_size, width // self.config.patch_size)
        hidden_states = self.encoder(hidden_states, mask, first=first, **kwargs)
        pooled = self.post_layernorm(hidden_states[:, 0])
        return BaseModelOutputWithPooling(
            last_hidden_state=None if pooled_only else hidden_states, pooler_output=pooled
        )

    def _check_pixels(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> None:
        size, stride = self.config.image_size, self.config.image_size // self.config.grid_size
        refuse_no_tensor("pixel_values", pixel_values, floats=True)
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels or 0 in pixel_values.shape:
            raise ValueError(
                f"pixel_values must be a non-empty (batch_size, {self.config.num_channels}, height, width) tensor, got "
                f"shape {tuple(pixel_values.shape)}."
            )
        height, width = pixel_values.shape[2:]
        if (height, width) == (size, size):
            return
        if not interpolate_pos_encoding:
            raise ValueError(
                f"The picture is {height} x {width}, the model takes {size} x {size}: let the image processor resize "
                "it, or pass interpolate_pos_encoding=True."
            )
        if height % stride or width % stride:
            raise ValueError(f"Height and width ({height} x {width}) must be multiples of {stride}.")

    def _checked_regions(
        self, roi_features: torch.Tensor, roi_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        width = self.config.roi_feature_size + 4
        refuse_no_tensor("roi_features", roi_features, floats=True)
        if roi_features.ndim != 3 or roi_features.shape[2] != width or 0 in roi_features.shape:
            raise ValueError(
                f"roi_features must be a non-empty (batch_size, regions, {width}) tensor, roi_feature_size + 4 box "
                f"numbers, got shape {tuple(roi_features.shape)}."
            )
        roi_features = roi_features.to(self.dtype)
        if roi_mask is None:
            return roi_features, None
        if roi_mask.shape != roi_features.shape[:2]:
            raise ValueError(
                f"roi_mask must be {tuple(roi_features.shape[:2])} like the regions, got {tuple(roi_mask.shape)}."
            )
        roi_mask = roi_mask.bool()
        # Padding may hold anything, NaN included; a masked NaN would still poison the sums.
        return roi_features.masked_fill(~roi_mask[..., None], 0.0), roi_mask


def _visual_projection(config: PyramidCLIPVisionConfig) -> nn.Linear:
    # The ResNet's is the output projection of CLIP's attention pooling, which has a bias.
    return nn.Linear(config.hidden_size, config.projection_dim, bias=config.tower == "resnet")


class PyramidCLIPModel(PyramidCLIPPreTrainedModel):
    """The dual encoder.

    At inference `pixel_values` and `input_ids` are all there is, as with CLIP. In training it takes any of the six
    levels (docs/design.md, Data) and computes the objective `config.loss_weights`.

        >>> model = PyramidCLIPModel.from_pretrained(folder)
        >>> similarity = model(**processor(images=pictures, text=texts, return_tensors="pt")).logits_per_image
    """

    config: PyramidCLIPConfig

    def __init__(self, config: PyramidCLIPConfig):
        super().__init__(config)
        self.text_model = PyramidCLIPTextModel._from_config(config.text_config)
        self.vision_model = PyramidCLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = _visual_projection(config.vision_config)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's token embedding, which `resize_token_embeddings` is about."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the text tower's token embedding."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithPooling:
        """The text tower's output, with the projected, not normalised embedding (B, P) as `pooler_output`."""
        outputs = self.text_model(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithPooling:
        """The image tower's output, with the projected, not normalised embedding (B, P) as `pooler_output`."""
        outputs = self.vision_model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
        )
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    def encode_image(self, pixel_values: torch.Tensor, normalize: bool = False, **kwargs: Any) -> torch.Tensor:
        """Picture embeddings (B, P); unit vectors in fp32 with `normalize=True`.

        The last block computes the class token only, so this is faster than `get_image_features`.
        """
        embeds = self.get_image_features(pixel_values, pooled_only=True, **kwargs).pooler_output
        return normalize_embeds(embeds) if normalize else embeds

    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        normalize: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Text embeddings (B, P); unit vectors in fp32 with `normalize=True`.

        Under `pooling="eos"` the last block computes the end token only, and without gradients the padding behind the
        longest text is cut off, so this is faster than `get_text_features`.
        """
        # A traced graph would keep the length of the texts that it was traced with.
        cut = not (torch.is_grad_enabled() or is_traced())
        embeds = self.get_text_features(
            input_ids, attention_mask, pooled_only=True, cut_padding=cut, **kwargs
        ).pooler_output
        return normalize_embeds(embeds) if normalize else embeds

    def encode_rois(
        self,
        roi_features: torch.Tensor,
        roi_mask: torch.Tensor | None = None,
        normalize: bool = False,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Embeddings (B, P) of region sequences (B, K, `roi_feature_size` + 4); unit vectors with `normalize=True`."""
        outputs = self.vision_model(roi_features=roi_features, roi_mask=roi_mask, pooled_only=True, **kwargs)
        pooled = outputs.pooler_output
        embeds = self.visual_projection(pooled)
        return normalize_embeds(embeds) if normalize else embeds

    def encode_levels(self, levels: Collection[str], **batch: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Embeddings (B, P), not normalised, of the named levels only.

        In training each picture level is a BatchNorm batch of its own, global first. A ViT takes them together, as
        BatchNorm is in LeFF alone; a ResNet takes one after the other. Texts go through theirs together, whatever
        their padded lengths: no part of this waits for the device.

        Args:
            levels: names of `LEVELS`.
            **batch: model inputs; what no level needs is ignored.

        Raises:
            ValueError: a level's input is missing.
        """
        found = {level: batch.get(LEVELS[level].input) for level in levels}
        inputs = {level: tensor for level, tensor in found.items() if tensor is not None}
        missing = {level: LEVELS[level].input for level in levels if level not in inputs}
        if missing:
            raise ValueError(f"These levels lack their input (level: input): {missing}.")
        pictures = {level: inputs[level] for level in levels_of_kind("picture", levels)}
        together = self.config.vision_config.tower == "vit" and len({one.shape for one in pictures.values()}) == 1
        if together and len(pictures) > 1:
            encoded = self.encode_image(torch.cat(list(pictures.values())), views=len(pictures))
            embeds = dict(zip(pictures, encoded.chunk(len(pictures))))
        else:
            embeds = {level: self.encode_image(pixel_values) for level, pixel_values in pictures.items()}
        for level in levels_of_kind("regions", levels):
            embeds[level] = self.encode_rois(inputs[level], batch.get(LEVELS[level].mask or ""))
        texts = {level: inputs[level] for level in levels_of_kind("text", levels)}
        if texts:
            embeds.update(zip(texts, self._encode_texts(list(texts.values()))))
        return {level: embeds[level] for level in levels}

    def freeze(self, tower: Literal["vision", "text"]) -> Self:
        """Keeps a tower and its projection as they are in training, the running statistics of BatchNorm too.

        Raises:
            ValueError: no such tower.
        """
        if tower not in ("vision", "text"):
            raise ValueError(f"freeze({tower!r}): expected 'vision' or 'text'.")
        modules = {
            "vision": (self.vision_model, self.visual_projection),
            "text": (self.text_model, self.text_projection),
        }
        for module in modules[tower]:
            module.requires_grad_(False)
        return self

    def _encode_texts(self, texts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Ids (B, L), each of its own B and L -> embeddings (B, P) of each, in one pass through the tower."""
        rows, lengths = [ids.shape[0] for ids in texts], [ids.shape[1] for ids in texts]
        if len(set(lengths)) == 1:
            outputs = self.get_text_features(torch.cat(texts), pooled_only=True)
        elif self.text_model.is_fused:
            return tuple(self.get_text_features(ids, pooled_only=True).pooler_output for ids in texts)
        else:
            missing = [max(lengths) - length for length in lengths]
            ids = torch.cat([F.pad(ids, (0, more)) for ids, more in zip(texts, missing)])
            mask = torch.cat([F.pad(torch.ones_like(ids), (0, more)) for ids, more in zip(texts, missing)])
            packing = tuple(zip(rows, lengths))
            outputs = self.get_text_features(ids, mask, pooled_only=True, packing=packing)
        return outputs.pooler_output.split(rows)

    def level_parameters(self, levels: Iterable[str]) -> list[str]:
        """Names of the parameters that these levels' embeddings and the loss depend on."""
        kinds = {LEVELS[level].kind for level in levels}
        prefixes = ["logit_scale"]
        if "text" in kinds:
            prefixes += ["text_model.", "text_projection."]
        if kinds & {"picture", "regions"}:
            prefixes.append("visual_projection.")
        names = {name for name, _ in self.named_parameters() if name.startswith(tuple(prefixes))}
        vision = [f"vision_model.{name}" for name, _ in self.vision_model.named_parameters()]
        region_only = ("vision_model.embeddings.roi_", "vision_model.attention_pool.roi_")
        if "picture" in kinds:
            names |= {name for name in vision if not name.startswith(region_only)}
        if "regions" in kinds:
            first = self.config.vision_config.num_picture_layers
            skipped = [f"vision_model.encoder.layers.{index}." for index in range(first)]
            skipped += ["vision_model.embeddings.patch_", "vision_model.embeddings.position_"]
            skipped += ["vision_model.trunk.", "vision_model.attention_pool.position_"]
            names |= {name for name in vision if not name.startswith(tuple(skipped))}
        return [name for name, _ in self.named_parameters() if name in names]

    @torch.no_grad()
    def clamp_logit_scale_(self) -> None:
        """Keeps the softmax scale at or below 100; to be called after each optimizer step."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        return_loss: bool | None = None,
        local_pixel_values: torch.Tensor | None = None,
        roi_features: torch.Tensor | None = None,
        roi_mask: torch.Tensor | None = None,
        summary_input_ids: torch.Tensor | None = None,
        has_summary: torch.Tensor | None = None,
        tag_input_ids: torch.Tensor | None = None,
        has_tags: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> PyramidCLIPOutput:
        """Embeds whatever levels are given; logits where picture and caption are; the objective on demand.

        Args:
            input_ids: (B, L) ids of the caption.
            pixel_values: (B, 3, H, W) the global crop.
            attention_mask: for the caption, see [`PyramidCLIPTextModel`].
            position_ids: for the caption.
            return_loss: compute `config.loss_weights` over this batch (one process).
            local_pixel_values: (B, 3, H, W) the local crop.
            roi_features: (B, K, `roi_feature_size` + 4).
            roi_mask: (B, K) bool, True on real regions; `None` means all.
            summary_input_ids: (B, L) ids of the summary.
            has_summary: (B,) bool; `None` means all.
            tag_input_ids: (B, L) ids of the tags.
            has_tags: (B,) bool; `None` means all.
            interpolate_pos_encoding: for `pixel_values` only.
            **kwargs: transformers' own, for the towers' outputs of global crop and caption.

        Raises:
            ValueError: no input at all, inputs of wrong shape, or `return_loss` without an input of a named term.
        """
        batch = {
            "pixel_values": pixel_values,
            "local_pixel_values": local_pixel_values,
            "roi_features": roi_features,
            "roi_mask": roi_mask,
            "summary_input_ids": summary_input_ids,
            "has_summary": has_summary,
            "input_ids": input_ids,
            "tag_input_ids": tag_input_ids,
            "has_tags": has_tags,
        }
        given = [name for name, level in LEVELS.items() if batch[level.input] is not None]
        if not given:
            raise ValueError(f"The model needs at least one of {[level.input for level in LEVELS.values()]}, got none.")
        if return_loss:
            self._check_loss_inputs(given)
        output = PyramidCLIPOutput()
        embeds: dict[str, torch.Tensor] = {}
        if "global" in given:
            image = self.get_image_features(pixel_values, interpolate_pos_encoding, **kwargs)
            output.vision_model_output, embeds["global"] = image, image.pooler_output
        if "caption" in given:
            text = self.get_text_features(input_ids, attention_mask, position_ids, **kwargs)
            output.text_model_output, embeds["caption"] = text, text.pooler_output
        embeds |= self.encode_levels([level for level in given if level not in embeds], **batch)
        embeds = {level: normalize_embeds(embed) for level, embed in embeds.items()}
        if {"global", "caption"} <= set(embeds):
            captions, pictures = embeds["caption"], embeds["global"]
            with torch.autocast(captions.device.type, enabled=False):
                scale = self.logit_scale.to(captions.device, captions.dtype).exp()
                logits = scale * captions @ pictures.to(captions.device).T
            output.logits_per_text, output.logits_per_image = logits, logits.T
        if return_loss:
            output.loss, output.loss_terms, _ = self._loss_of(embeds, batch)
        ordered = {**{LEVELS[level].output: embed for level, embed in embeds.items()}, **output}
        return PyramidCLIPOutput(**ordered)

    def _check_loss_inputs(self, given: list[str]) -> None:
        further = ", ".join(self.config.further_loss_terms)
        if not self.config.loss_weights:
            raise ValueError(
                f"return_loss=True: this model was trained with {further}, which need heads that are not part of it; "
                'set config.loss_weights to terms that it computes by itself, e.g. {"global_caption": 1.0}.'
            )
        if further:
            logger.warning_once(
                f"The loss is that of {', '.join(self.config.loss_weights)}; the model was also trained with "
                f"{further}, which need heads that are not part of it."
            )
        needed = levels_of(self.config.loss_weights)
        absent = [level for level in needed if level not in given]
        if absent:
            terms = [name for name in self.config.loss_weights if set(TERMS[name]) & set(absent)]
            raise ValueError(
                f"return_loss=True needs {[LEVELS[level].input for level in absent]} for the terms {terms} of "
                'config.loss_weights; pass them, or set config.loss_weights, e.g. {"global_caption": 1.0}.'
            )

    def _loss_of(self, embeds: dict[str, torch.Tensor], batch: dict[str, torch.Tensor | None]) -> PyramidLoss:
        """`config.loss_weights` over unit vectors (B, P), which may lie on several devices, and the batch's masks."""
        device = next(iter(embeds.values())).device
        masks = {name: _sample_mask(batch[level.mask]) for name, level in LEVELS.items() if level.mask}
        return pyramid_loss(
            {level: embed.to(device) for level, embed in embeds.items()},
            self.logit_scale.to(device).exp(),
            self.config.loss_weights,
            self.config.label_smoothing,
            present={level: mask if mask is None else mask.to(device) for level, mask in masks.items()},
        )


def _sample_mask(mask: torch.Tensor | None) -> torch.Tensor | None:
    """(B,) presence of a level: a picture without any real region has no region level."""
    return mask if mask is None or mask.dim() == 1 else mask.bool().any(dim=1)


class PyramidCLIPTextModelWithProjection(PyramidCLIPPreTrainedModel):
    """The text tower with its projection."""

    config: PyramidCLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ["text"]

    def __init__(self, config: PyramidCLIPTextConfig):
        super().__init__(config)
        self.text_model = PyramidCLIPTextModel._from_config(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> PyramidCLIPTextModelOutput:
        """As [`PyramidCLIPTextModel`], with `text_embeds` (B, P), not normalised."""
        outputs = self.text_model(input_ids, attention_mask, position_ids, **kwargs)
        return PyramidCLIPTextModelOutput(
            text_embeds=self.text_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PyramidCLIPVisionModelWithProjection(PyramidCLIPPreTrainedModel):
    """The image tower with its projection."""

    config: PyramidCLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: PyramidCLIPVisionConfig):
        super().__init__(config)
        self.vision_model = PyramidCLIPVisionModel._from_config(config)
        self.visual_projection = _visual_projection(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the pixels."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> PyramidCLIPVisionModelOutput:
        """As [`PyramidCLIPVisionModel`], with `image_embeds` (B, P), not normalised."""
        outputs = self.vision_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return PyramidCLIPVisionModelOutput(
            image_embeds=self.visual_projection(outputs.pooler_output),
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class PyramidCLIPForImageClassification(PyramidCLIPPreTrainedModel):
    """The image tower with a linear classifier on its pooled vector, for fine-tuning (paper, appendix E)."""

    config: PyramidCLIPConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]

    def __init__(self, config: PyramidCLIPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = PyramidCLIPVisionModel._from_config(config.vision_config)
        width, labels = config.vision_config.hidden_size, config.num_labels or 0
        self.classifier = nn.Linear(width, labels) if labels else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The convolution that sees the pixels."""
        return self.vision_model.get_input_embeddings()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ImageClassifierOutput:
        """Logits (B, num_labels); with `labels` (B,) the loss that `config.problem_type` names."""
        recorded = ("output_hidden_states", "output_attentions")
        outputs = self.vision_model(
            pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            pooled_only=not any(kwargs.get(name) or getattr(self.vision_model.config, name) for name in recorded),
            **kwargs,
        )
        logits = self.classifier(outputs.pooler_output)
        return ImageClassifierOutput(
            loss=self.loss_function(labels, logits, self.config) if labels is not None else None,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


# A tower's own class reads its part out of a dual encoder's checkpoint; transformers knows this of its own models only.
for _tower, _prefix in (("PyramidCLIPVisionModel", "vision_model"), ("PyramidCLIPTextModel", "text_model")):
    register_checkpoint_conversion_mapping(_tower, [PrefixChange(prefix_to_remove=_prefix)], overwrite=True)


__all__ = [
    "PyramidCLIPForImageClassification",
    "PyramidCLIPModel",
    "PyramidCLIPOutput",
    "PyramidCLIPPreTrainedModel",
    "PyramidCLIPTextModel",
    "PyramidCLIPTextModelWithProjection",
    "PyramidCLIPVisionModel",
    "PyramidCLIPVisionModelWithProjection",
]
