"""The model and its loss in one module, so that a training step is one DDP forward.

Every process encodes its own pairs, gathers the embeddings of all levels at once with gradient, and computes its
share of the global loss: its own rows and columns of each level pair against everybody's (docs/design.md). The
shares of all processes add up to the loss of the global batch. DDP averages gradients over processes, so the share is
multiplied by their number.

Terms of other kinds than level pairs (`training.loop.terms`) are computed beside it from the same passes through the
towers. What they learn beside the model, their heads, belongs to the objective: `save_pretrained` never sees it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyramidclip_hf.levels_pyramidclip import LEVELS, TERMS, check_loss_weights, levels_of_kind
from pyramidclip_hf.loss_pyramidclip import pyramid_loss
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from training.data.inputs import any_level, inputs_of_kind
from training.data.pixels import Normalisation
from training.loop.checkpoint import Stateful
from training.loop.distributed import gather_rows, merge_log_sum_exps, world_size
from training.loop.task import Objective, StepLoss
from training.loop.terms.encoding import encode, levels_in, reached_parameters
from training.loop.terms.table import RUN_PAIRS
from training.loop.terms.term import Step, Term, Wanted

# Of `ContrastiveObjective.embed`, the levels that pairs are of; the rows of a term stand under its name and theirs.
PAIRS = "pairs"


class ContrastiveObjective(Objective):
    """A `PyramidCLIPModel` under the objective that a mapping term -> weight names, and terms of other kinds.

    Parameters that no named level reaches, and frozen ones, lose `requires_grad` here, before anything wraps the
    module: DDP then never meets a parameter without a gradient, whatever the mapping.

    Args:
        model: The dual encoder; becomes the submodule `model`.
        loss_weights: Level pair -> weight; zero weights are dropped.
        label_smoothing: Share of the targets that is spread over the negatives.
        freeze: "none", "vision" or "text": the tower and its projection are held, its BatchNorm in evaluation mode.
        autocast_dtype: bfloat16 or float16 for the encoders, None for fp32; all behind them is fp32 or wider.
        multi_positive: Pairs of the global batch with the same text are each other's positives (not the paper's); costs
            one gather of a number a text.
        normalisation: Of pixels that come as bytes; those that come as numbers are normalised already.
        further: Terms of other kinds; become the submodule `heads`, by name.
        run_pairs: Pairs of levels that only a training has, see `RUN_PAIRS` -> weight.

    Attributes:
        pairs: Level pair -> (image level, text level), the model's own and the run's.
        levels: Of these pairs.

    Raises:
        ValueError: A term or `freeze` is unknown, or there is no term at all.
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
        further: Sequence[Term] = (),
        run_pairs: Mapping[str, float] | None = None,
    ):
        super().__init__()
        self.model = model
        self.normalisation = normalisation
        self.loss_weights = check_loss_weights(loss_weights) if loss_weights or not (further or run_pairs) else {}
        self.label_smoothing = label_smoothing
        self.pair_weights = {**self.loss_weights, **(run_pairs or {})}
        self.heads = nn.ModuleDict({term.name: term for term in further})
        masked = any(one.level == "masked" for term in further for one in term.wanted if one.part == "embedding")
        self.pairs = {name: _pair(name, masked) for name in self.pair_weights}
        wanted = [Wanted(level, "embedding") for pair in self.pairs.values() for level in pair]
        self.levels = levels_in(wanted)
        trained = [*wanted, *(one for term in further for one in term.trained)]
        self.wanted = tuple(dict.fromkeys([*wanted, *(one for term in further for one in term.wanted)]))
        # A caption and both views are always there; a sample without them is a bad one and never reaches a batch.
        self.masked_levels = tuple(level for level in self.levels if any_level(level).mask)
        self.grouped_levels = levels_of_kind("text", self.levels) if multi_positive else ()
        self.weights = {**self.pair_weights, **{term.name: term.weight for term in further}}
        self.terms = tuple(self.weights)
        self.freeze = freeze
        self.autocast_dtype = autocast_dtype
        for term in further:
            term.autocast_dtype = autocast_dtype
        if self.grouped_levels:
            generator = torch.Generator().manual_seed(0)  # the same on every process
            positions = model.config.text_config.max_position_embeddings
            self.token_factors = nn.Buffer(
                torch.randint(-(2**62), 2**62, (positions,), generator=generator), persistent=False
            )
        self.train()  # the model freezes its patch convolution here
        self._hold_parameters(trained)

    @property
    def further(self) -> list[Term]:
        """The terms of other kinds than level pairs."""
        return list(self.heads.values())  # type: ignore[arg-type]  # a ModuleDict holds modules of any kind

    def _frozen_modules(self) -> list[nn.Module]:
        parts: dict[str, list[nn.Module]] = {
            "none": [],
            "vision": [self.model.vision_model, self.model.visual_projection],
            "text": [self.model.text_model, self.model.text_projection],
        }
        if self.freeze not in parts:
            raise ValueError(f"freeze: expected one of {', '.join(parts)}, got {self.freeze!r}")
        return parts[self.freeze]

    def _hold_parameters(self, trained: Sequence[Wanted]) -> None:
        uses_scale = bool(self.pairs) or any(term.uses_scale for term in self.further)
        reached = reached_parameters(self.model, trained, uses_scale)
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
        row_gradients: Mapping[str, torch.Tensor] | None = None,
        parameter_gradients: Mapping[str, torch.Tensor] | None = None,
    ) -> StepLoss | torch.Tensor:
        """The losses of a batch, or, for gradient caching, a scalar whose gradient is the given one.

        Args:
            batch: The model's inputs, each with n rows, of which those of the named levels are read.
            row_gradients: The loss's gradients at `embed(batch)`; then the return value is their inner product with
                it, plus that of `parameter_gradients` with the parameters, where they are given.
            parameter_gradients: Of `outer_parameters`, by name.
        """
        rows = self.embed(batch)
        if row_gradients is None:
            return self.loss(rows, batch)
        surrogate = sum((rows[name] * gradient).sum() for name, gradient in row_gradients.items())
        outer = self.outer_parameters() if parameter_gradients else {}
        for name, gradient in (parameter_gradients or {}).items():
            surrogate = surrogate + (outer[name] * gradient).sum()
        return torch.as_tensor(surrogate)

    def outer_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that `loss` may use, trained ones by name: the scale, and heads."""
        named = {"logit_scale": self.model.logit_scale, **dict(self.heads.named_parameters())}
        return {name: parameter for name, parameter in named.items() if parameter.requires_grad}

    def embed(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the losses are of, each with n rows, fp32 or wider; may be computed chunk by chunk.

        `PAIRS`: (n, levels, D) unit vectors, levels in the order of `self.levels`; and the rows of further terms.
        """
        levels = levels_in(self.wanted)
        names = {name for level in levels for name in (any_level(level).input, any_level(level).mask)}
        self._check_inputs(batch)
        inputs = {name: value for name, value in batch.items() if name in names}
        if self.normalisation is not None:  # here, so that only what is encoded at a time is not bytes
            pictures = {any_level(level).input for level in inputs_of_kind("picture", levels)}
            inputs |= {name: self.normalisation(inputs[name]) for name in pictures & inputs.keys()}
        device_type = self.model.logit_scale.device.type
        masked_word = next((word for term in self.further if (word := term.word_for_masks()) is not None), None)
        with torch.autocast(device_type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None):
            encoded = encode(self.model, self.wanted, inputs, masked_word)
        rows: dict[str, torch.Tensor] = {}
        with torch.autocast(device_type, enabled=False):
            if self.levels:
                stacked = torch.stack([encoded[Wanted(level, "embedding")] for level in self.levels], dim=1)
                rows[PAIRS] = F.normalize(stacked.to(torch.promote_types(stacked.dtype, torch.float32)), dim=-1)
            for term in self.further:
                rows |= {f"{term.name}.{name}": row for name, row in term.rows(encoded, batch).items()}
        return rows

    def _check_inputs(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError, naming term and inputs, where a batch lacks what a term reads."""
        needed = {
            term.name: (*(any_level(one.level).input for one in term.wanted), *term.reads) for term in self.further
        }
        lacking = {name: [one for one in inputs if one not in batch] for name, inputs in needed.items()}
        if lacking := {name: inputs for name, inputs in lacking.items() if inputs}:
            raise ValueError(f"these terms need inputs that the batch does not have (term: inputs): {lacking}")

    def present(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n, masked levels) bool: which samples have which of `self.masked_levels`.

        A picture without regions lacks their level.
        """
        rows = batch[any_level(self.levels[0]).input]
        columns = [rows.new_ones((rows.shape[0], 0), dtype=torch.bool)]
        for level in self.masked_levels:
            mask = batch.get(any_level(level).mask or "")
            if mask is None:
                mask = rows.new_ones(rows.shape[0], dtype=torch.bool)
            columns.append((mask.any(dim=1) if mask.dim() == 2 else mask)[:, None])
        return torch.cat(columns, dim=1)

    def text_keys(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(n, grouped levels) int64, equal where two texts have the same tokens up to the end token.

        The padding plays no part. Different texts meet in one key with a probability of about 2^-63 a pair.
        """
        rows = batch[any_level(self.levels[0]).input]
        keys = [torch.empty(rows.shape[0], 0, dtype=torch.int64, device=rows.device)]
        for level in self.grouped_levels:
            ids = batch[LEVELS[level].input]
            ended = ids.eq(self.model.config.text_config.eos_token_id)
            words = ids.masked_fill(ended.cumsum(1) - ended.long() > 0, 0)
            # The products wrap around at 2^64, as a hash may.
            keys.append((words * self.token_factors[: words.shape[1]]).sum(1, keepdim=True))
        return torch.cat(keys, dim=1)

    def loss(self, rows: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> StepLoss:
        """The losses at given rows of `embed`.

        All processes call it together, with the same n.

        Args:
            rows: Of this process, as `embed` gives them.
            batch: The inputs that they are of.
        """
        device = self.model.logit_scale.device
        losses: list[torch.Tensor] = []  # of each term, its share with gradient
        counts: list[torch.Tensor] = []
        with torch.autocast(device.type, enabled=False):
            if self.levels:
                total, losses, counts = self._pair_losses(rows[PAIRS], batch)
            else:
                total = torch.zeros((), device=device)
            if self.further:
                scale = self.model.logit_scale.exp()
                step = Step(batch, scale, self.label_smoothing)
                for term in self.further:
                    prefix = f"{term.name}."
                    own = {name.removeprefix(prefix): row for name, row in rows.items() if name.startswith(prefix)}
                    found = term.share(own, step)
                    total = total + term.weight * found.loss
                    losses.append(found.loss)
                    counts.append(found.answers)
        shares = torch.stack([total, *losses]).detach()
        return StepLoss(total * world_size(), shares, torch.stack([count.to(shares.device) for count in counts]))

    def _pair_losses(
        self, embeddings: torch.Tensor, batch: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Weighted sum, shares and counts of all level pairs. embeddings: (n, levels, D) unit vectors."""
        present, groups = self.present(batch), {}
        if self.grouped_levels:
            text_keys = self.text_keys(batch)
            everyone_keys = gather_rows(text_keys)
            groups = {
                level: (text_keys[:, i].contiguous(), everyone_keys[:, i].contiguous())
                for i, level in enumerate(self.grouped_levels)
            }
        scale = self.model.logit_scale.to(embeddings.dtype).exp()
        everyone = gather_rows(embeddings)
        everyone_present = gather_rows(present)
        result = pyramid_loss(
            {level: embeddings[:, i] for i, level in enumerate(self.levels)},
            scale,
            self.pair_weights,
            self.label_smoothing,
            present={level: present[:, i] for i, level in enumerate(self.masked_levels)},
            columns={level: everyone[:, i] for i, level in enumerate(self.levels)},
            columns_present={level: everyone_present[:, i] for i, level in enumerate(self.masked_levels)},
            merge=merge_log_sum_exps,
            groups=groups,
            terms=self.pairs,
        )
        names = list(self.pair_weights)
        return result.loss, [result.terms[name] for name in names], [result.counts[name] for name in names]

    def after_step(self, stepped: bool) -> None:
        """Bounds the softmax scales, and lets terms keep what they saw. stepped: the optimizer's step was made."""
        self.model.clamp_logit_scale_()
        for term in self.further:
            term.after_step(stepped)

    @property
    def kept(self) -> dict[str, Stateful]:
        """File name -> what a checkpoint keeps beside the model: heads with their statistics, and queues."""
        found: dict[str, Stateful] = {}
        if self.heads.state_dict():
            found["heads"] = self.heads
        for term in self.further:
            found |= {f"{term.name}_{name}": part for name, part in term.kept.items()}
        return found

    def options(self) -> dict[str, Any]:
        """What decides the terms that the model does not know, for the run's identity."""
        run_pairs = {name: weight for name, weight in self.pair_weights.items() if name not in self.loss_weights}
        return {**run_pairs, **{term.name: {"weight": term.weight, **term.options()} for term in self.further}}


def _pair(name: str, masked: bool) -> tuple[str, str]:
    """The levels of a pair; of the run's own, the masked caption stands for the caption where it is to."""
    if name in TERMS:
        return TERMS[name]
    image, text = RUN_PAIRS[name]
    return image, "masked" if masked and text == "caption" else text
