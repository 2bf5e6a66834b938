"""The model and its loss in one module, so that a training step is one DDP forward.

Every process encodes its own pairs, gathers the embeddings of all levels at once with gradient, and computes its
share of the global loss: its own rows and columns of each level pair against everybody's (docs/design.md). The
shares of all processes add up to the loss of the global batch. DDP averages gradients over processes, so the share is
multiplied by their number.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import LEVELS, check_loss_weights, levels_of, levels_of_kind
from pyramidclip_hf.loss_pyramidclip import pyramid_loss
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from training.data.pixels import Normalisation
from training.loop.distributed import gather_rows, merge_log_sum_exps, world_size
from training.loop.task import Objective, StepLoss


class ContrastiveObjective(Objective):
    """A `PyramidCLIPModel` under the objective that a mapping term -> weight names.

    Parameters that no named level reaches, and frozen ones, lose `requires_grad` here, before anything wraps the
    module: DDP then never meets a parameter without a gradient, whatever the mapping.

    Args:
        model: The dual encoder; becomes the submodule `model`.
        loss_weights: Term -> weight; zero weights are dropped.
        label_smoothing: Share of the targets that is spread over the negatives.
        freeze: "none", "vision" or "text": the tower and its projection are held, its BatchNorm in evaluation mode.
        autocast_dtype: bfloat16 or float16 for the encoders, None for fp32; all behind them is fp32 or wider.
        multi_positive: Pairs of the global batch with the same text are each other's positives (not the paper's); costs
            one gather of a number a text.
        normalisation: Of pixels that come as bytes; those that come as numbers are normalised already.

    Raises:
        ValueError: A term or `freeze` is unknown.
    """

    model: PyramidCLIPModel
    token_factors: torch.Tensor

    def __init__(
        self,
        model: PyramidCLIPModel,
        loss_weights: Mapping[str, float],
        label_smoothing: float,
        freeze: str = "none",
        autocast_dtype: torch.dtype | None = None,
        multi_positive: bool = False,
        normalisation: Normalisation | None = None,
    ):
        super().__init__()
        self.model = model
        self.normalisation = normalisation
        self.loss_weights = check_loss_weights(loss_weights)
        self.label_smoothing = label_smoothing
        self.levels = levels_of(self.loss_weights)
        # A caption and both views are always there; a sample without them is a bad one and never reaches a batch.
        self.masked_levels = tuple(level for level in self.levels if LEVELS[level].mask)
        self.grouped_levels = levels_of_kind("text", self.levels) if multi_positive else ()
        self.terms = tuple(self.loss_weights)
        self.freeze = freeze
        self.autocast_dtype = autocast_dtype
        if self.grouped_levels:
            generator = torch.Generator().manual_seed(0)  # the same on every process
            positions = model.config.text_config.max_position_embeddings
            self.token_factors = nn.Buffer(
                torch.randint(-(2**62), 2**62, (positions,), generator=generator), persistent=False
            )
        self.train()  # the model freezes its patch convolution here
        self._hold_parameters()

    def _frozen_modules(self) -> list[nn.Module]:
        parts: dict[str, list[nn.Module]] = {
            "none": [],
            "vision": [self.model.vision_model, self.model.visual_projection],
            "text": [self.model.text_model, self.model.text_projection],
        }
        if self.freeze not in parts:
            raise ValueError(f"freeze: expected one of {', '.join(parts)}, got {self.freeze!r}")
        return parts[self.freeze]

    def _hold_parameters(self) -> None:
        reached = set(self.model.level_parameters(self.levels))
        for module in self._frozen_modules():
            module.requires_grad_(False)
        for name, parameter in self.model.named_parameters():
            if name not in reached:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "ContrastiveObjective":
        """Sets the mode; frozen towers stay in evaluation mode, so that their running statistics stay as they are."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(
        self,
        batch: Mapping[str, torch.Tensor],
        embedding_gradients: torch.Tensor | None = None,
        scale_gradient: torch.Tensor | None = None,
    ) -> StepLoss | torch.Tensor:
        """The losses of a batch, or, for gradient caching, a scalar whose gradient is the given one.

        Args:
            batch: The model's inputs, each with n rows, of which those of the named levels are read.
            embedding_gradients: (n, levels, D), the loss's gradient at `embed(batch)`; then the return value is their
                inner product with the embeddings, plus `scale_gradient` times logit_scale where that is given.
            scale_gradient: 0-d, the loss's gradient at logit_scale.
        """
        embeddings = self.embed(batch)
        if embedding_gradients is None:
            return self.loss(embeddings, self.present(batch), self.text_keys(batch))
        surrogate = (embeddings * embedding_gradients).sum()
        if scale_gradient is not None and self.model.logit_scale.requires_grad:
            surrogate = surrogate + self.model.logit_scale * scale_gradient
        return surrogate

    def embed(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n, levels, D) unit vectors in fp32 (fp64 stays), levels in the order of `self.levels`."""
        names = {name for level in self.levels for name in (LEVELS[level].input, LEVELS[level].mask)}
        inputs = {name: value for name, value in batch.items() if name in names}
        if self.normalisation is not None:  # here, so that only what is encoded at a time is not bytes
            pictures = {LEVELS[level].input for level in levels_of_kind("picture", self.levels)}
            inputs |= {name: self.normalisation(inputs[name]) for name in pictures & inputs.keys()}
        device_type = self.model.logit_scale.device.type
        with torch.autocast(device_type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            embeds = self.model.encode_levels(self.levels, **inputs)
        with torch.autocast(device_type, enabled=False):
            stacked = torch.stack([embeds[level] for level in self.levels], dim=1)
            return F.normalize(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), dim=-1)

    def present(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n, masked levels) bool: which samples have which of `self.masked_levels`.

        A picture without regions lacks their level.
        """
        rows = batch[LEVELS[self.levels[0]].input]
        columns = [rows.new_ones((rows.shape[0], 0), dtype=torch.bool)]
        for level in self.masked_levels:
            mask = batch.get(LEVELS[level].mask or "")
            if mask is None:
                mask = rows.new_ones(rows.shape[0], dtype=torch.bool)
            columns.append((mask.any(dim=1) if mask.dim() == 2 else mask)[:, None])
        return torch.cat(columns, dim=1)

    def text_keys(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n, grouped levels) int64, equal where two texts have the same tokens up to the end token.

        The padding plays no part. Different texts meet in one key with a probability of about 2^-63 a pair.
        """
        rows = batch[LEVELS[self.levels[0]].input]
        keys = [torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)]
        for level in self.grouped_levels:
            ids = batch[LEVELS[level].input]
            ended = ids.eq(self.model.config.text_config.eos_token_id)
            words = ids.masked_fill(ended.cumsum(1) - ended.long() > 0, 0)
            # The products wrap around at 2^64, as a hash may.
            keys.append((words * self.token_factors[: words.shape[1]]).sum(1, keepdim=True))
        return torch.cat(keys, dim=1)

    def loss(self, embeddings: torch.Tensor, present: torch.Tensor, text_keys: torch.Tensor | None = None) -> StepLoss:
        """The losses at given embeddings.

        All processes call it together, with the same n.

        Args:
            embeddings: (n, levels, D) unit vectors of this process, fp32 or wider.
            present: (n, masked levels) bool, see `present`.
            text_keys: (n, grouped levels) int64, see `text_keys`; needed under `multi_positive` only.
        """
        groups = {}
        if self.grouped_levels:
            if text_keys is None:
                raise ValueError("multi_positive needs text_keys, which say whose texts are the same")
            everyone_keys = gather_rows(text_keys)
            groups = {
                level: (text_keys[:, i].contiguous(), everyone_keys[:, i].contiguous())
                for i, level in enumerate(self.grouped_levels)
            }
        with torch.autocast(embeddings.device.type, enabled=False):
            scale = self.model.logit_scale.to(embeddings.dtype).exp()
            everyone = gather_rows(embeddings)
            everyone_present = gather_rows(present)
            result = pyramid_loss(
                {level: embeddings[:, i] for i, level in enumerate(self.levels)},
                scale,
                self.loss_weights,
                self.label_smoothing,
                present={level: present[:, i] for i, level in enumerate(self.masked_levels)},
                columns={level: everyone[:, i] for i, level in enumerate(self.levels)},
                columns_present={level: everyone_present[:, i] for i, level in enumerate(self.masked_levels)},
                merge=merge_log_sum_exps,
                groups=groups,
            )
        shares = torch.stack([result.loss, *(result.terms[name] for name in self.terms)]).detach()
        counts = torch.stack([torch.as_tensor(result.counts[name], device=shares.device) for name in self.terms])
        return StepLoss(result.loss * world_size(), shares, counts)
