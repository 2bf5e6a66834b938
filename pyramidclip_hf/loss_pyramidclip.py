# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The objective: softened InfoNCE over pairs of pyramid levels (paper, section 3.4), in closed form.

For N pairs of unit vectors v_i, t_j, scale s and z = s V T^T, the softened target of row i puts 1 - a on the pair and
a / (N - 1) on each of the other N - 1 entries. The cross-entropy of that row is then

    logsumexp_j z_ij - (1 - a) z_ii - a / (N - 1) (sum_j z_ij - z_ii),      sum_j z_ij = s v_i . (sum_j t_j)

so neither the targets nor z need to be held: the log-sum-exp runs over blocks of z and is recomputed in the backward
pass. Memory is O(N D + block). A level pair's loss is the mean over rows and columns (image to text, text to image).

Where texts repeat (tags do, often), the m pairs with the same text can share the positives' mass (`groups`; not the
paper's): (1 - a) / m on each of them and a / (N - m) elsewhere. The closed form holds with the mean of the m partners
in place of the partner.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

from .configuration_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS, check_loss_weights, levels_of

# Keys of a process's texts (n,) and of the global batch's (N,), int64: equal texts have equal keys.
Groups: TypeAlias = tuple[torch.Tensor, torch.Tensor]

# Entries of z held at once. 2^22 fp32 numbers are 16 MiB: large enough for full-speed matrix products.
_BLOCK_ENTRIES = 1 << 22
_BLOCK_COLUMNS = 1 << 12


class PyramidLoss(NamedTuple):
    """What `pyramid_loss` returns.

    Attributes:
        loss: weighted sum over terms, scalar; a process's share when columns were gathered.
        terms: term name -> unweighted scalar share.
        counts: term name -> N_t, the global number of samples that have both levels (0-d, int64).
    """

    loss: torch.Tensor
    terms: dict[str, torch.Tensor]
    counts: dict[str, torch.Tensor]


class _RowLogSumExp(torch.autograd.Function):
    """logsumexp_j of `rows @ columns.T` over the present columns, in blocks of both, recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, columns: torch.Tensor, present: torch.Tensor | None) -> torch.Tensor:
        result = rows.new_full((len(rows),), float("-inf"))
        for part, others in _blocks(len(rows), len(columns)):
            logits = rows[part] @ columns[others].T
            if present is not None:
                logits.masked_fill_(~present[others], float("-inf"))
            result[part] = torch.logaddexp(result[part], torch.logsumexp(logits, dim=1))
        ctx.save_for_backward(rows, columns, present, result)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, columns, present, result = ctx.saved_tensors
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        with torch.autocast(rows.device.type, enabled=False):  # where backward() is called inside of an autocast block
            for part, others in _blocks(len(rows), len(columns)):
                weights = rows[part] @ columns[others].T
                weights.sub_(result[part, None]).exp_()
                if present is not None:
                    weights.masked_fill_(~present[others], 0.0)
                weights.mul_(grad[part, None])
                grad_rows[part].addmm_(weights, columns[others])
                grad_columns[others].addmm_(weights.T, rows[part])
        return grad_rows, grad_columns, None


def _blocks(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of z as (rows, columns), none of more than `_BLOCK_ENTRIES`; a block of rows has all its columns in turn.

    Few columns stay whole. Many are cut, because low and wide blocks would read all of `columns` for a few rows.
    """
    width = max(1, min(columns, _BLOCK_COLUMNS))
    height = max(1, _BLOCK_ENTRIES // width)
    for start in range(0, rows, height):
        for first in range(0, columns, width):
            yield slice(start, start + height), slice(first, first + width)


def _direction(
    rows: torch.Tensor,
    columns: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    smoothing: float | torch.Tensor,
    row_present: torch.Tensor | None,
    column_present: torch.Tensor | None,
    count: torch.Tensor,
    groups: Groups | None,
) -> torch.Tensor:
    """Sum of the softened cross-entropies of `rows` (n, D) against `columns` (N, D); `own` (n, D) are the partners."""
    rows = rows * scale
    partners: int | torch.Tensor = 1
    if groups is not None:
        own, partners = _group_means(columns, column_present, *groups)
        smoothing = smoothing * (partners < count).to(rows.dtype)  # nobody else is there to take the negatives' mass
    positive = (rows * own).sum(dim=1)
    total = columns.sum(0) if column_present is None else (columns * column_present[:, None]).sum(0)
    negative = (rows @ total - partners * positive) / (count - partners).clamp(min=1)
    loss = _RowLogSumExp.apply(rows, columns, column_present) - (1 - smoothing) * positive - smoothing * negative
    return (loss if row_present is None else loss.where(row_present, 0)).sum()


def _group_means(
    columns: torch.Tensor, column_present: torch.Tensor | None, row_keys: torch.Tensor, column_keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row, the mean (n, D) of the present columns with its key, and how many they are (n,), at least 1."""
    ordered, order = column_keys.sort()
    starts = torch.cat([ordered.new_zeros(1), (ordered[1:] != ordered[:-1]).long()]).cumsum(0)
    weights = columns.new_ones(len(columns)) if column_present is None else column_present.to(columns.dtype)
    group = torch.empty_like(order).scatter_(0, order, starts)
    sums = torch.zeros_like(columns).index_add(0, group, columns * weights[:, None])
    sizes = weights.new_zeros(len(columns)).index_add(0, group, weights).clamp(min=1)
    of_row = starts[torch.searchsorted(ordered, row_keys)]
    return sums[of_row] / sizes[of_row, None], sizes[of_row]


def softened_info_nce(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    label_smoothing: float = 0.2,
    *,
    present: torch.Tensor | None = None,
    image_columns: torch.Tensor | None = None,
    text_columns: torch.Tensor | None = None,
    columns_present: torch.Tensor | None = None,
    groups: Groups | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softened InfoNCE of one level pair, both directions.

    Args:
        image_embeds: (n, D) unit vectors of this process's pictures.
        text_embeds: (n, D) unit vectors of their texts.
        logit_scale: scalar, the softmax scale itself (not its logarithm).
        label_smoothing: `a`, the mass on the negatives.
        present: (n,) bool, the pairs that take part; `None` means all.
        image_columns: (N, D) unit vectors of the global batch; `None` means this process is alone.
        text_columns: (N, D), given together with `image_columns`.
        columns_present: (N,) bool for the global batch.
        groups: keys (n,) of this process's pairs and (N,) of the global batch, int64; pairs with equal keys are each
            other's positives. `None`: a pair has itself alone.

    Returns:
        This process's share of the loss (its rows, divided by the global number of present pairs N_t; summed over
        processes it is the loss), and N_t. Below two present pairs the share is exactly 0, with zero gradients.
    """
    if image_columns is None or text_columns is None:
        if image_columns is not text_columns:
            raise ValueError("image_columns and text_columns belong together: one of them is missing.")
        image_columns, text_columns, columns_present = image_embeds, text_embeds, present
    count = columns_present.sum() if columns_present is not None else torch.full(
        (), len(image_columns), device=image_columns.device, dtype=torch.int64
    )  # fmt: skip
    if columns_present is not None:
        # With fewer than two pairs there is nothing to contrast. All columns then stand in, so that no empty
        # log-sum-exp makes a NaN, and the result is multiplied by 0: no look at the count leaves the device.
        columns_present = columns_present | (count < 2)
    rest = (label_smoothing, present, columns_present, count, groups)
    share = _direction(image_embeds, text_columns, text_embeds, logit_scale, *rest)
    share = share + _direction(text_embeds, image_columns, image_embeds, logit_scale, *rest)
    return share * (count >= 2) / (2 * count.clamp(min=1)), count


def _pair_presence(masks: Mapping[str, torch.Tensor | None] | None, image: str, text: str) -> torch.Tensor | None:
    found = [mask for mask in ((masks or {}).get(image), (masks or {}).get(text)) if mask is not None]
    return found[0] & found[1] if len(found) == 2 else found[0] if found else None


def pyramid_loss(
    embeds: Mapping[str, torch.Tensor],
    logit_scale: torch.Tensor,
    loss_weights: Mapping[str, float] = DEFAULT_LOSS_WEIGHTS,
    label_smoothing: float = 0.2,
    *,
    present: Mapping[str, torch.Tensor | None] | None = None,
    columns: Mapping[str, torch.Tensor] | None = None,
    columns_present: Mapping[str, torch.Tensor | None] | None = None,
    groups: Mapping[str, Groups] | None = None,
) -> PyramidLoss:
    """The weighted sum over level pairs.

    Args:
        embeds: level name -> (n, D) unit vectors of this process.
        logit_scale: scalar, the softmax scale itself (not its logarithm).
        loss_weights: term name -> weight, used as given.
        label_smoothing: `a` in [0, 1).
        present: level name -> (n,) bool, samples that have the level; a missing or `None` entry means all.
        columns: as `embeds`, for the global batch of N = processes x n samples, gathered with gradient; `None` when
            this process is alone.
        columns_present: as `present`, for the global batch.
        groups: text level name -> keys of this process's texts (n,) and of the global batch's (N,), int64, where pairs
            with equal texts are to be each other's positives; `None` (the paper) means no two pairs are.

    Returns:
        [`PyramidLoss`]. Computed in fp32, or in fp64 where the embeddings are fp64; never under autocast.

    Raises:
        ValueError: weights that name no term or an unknown one, a level of a named term that is absent, levels of
            different sizes, fewer than two samples.
    """
    weights = check_loss_weights(loss_weights)
    levels = levels_of(weights)
    absent = {name: missing for name in weights if (missing := [lv for lv in TERMS[name] if lv not in embeds])}
    if absent:
        raise ValueError(f"These loss terms lack embeddings of a level: {absent}. Given: {sorted(embeds)}.")
    sizes = {level: len((columns or embeds)[level]) for level in levels}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All levels must hold the same number of samples, got {sizes}.")
    total = next(iter(sizes.values()))
    if total < 2:
        raise ValueError(f"A contrastive loss needs at least two samples in the global batch, got {total}.")
    terms, counts = {}, {}
    with torch.autocast(logit_scale.device.type, enabled=False):
        for name in weights:
            image, text = TERMS[name]
            terms[name], counts[name] = softened_info_nce(
                _wide(embeds[image]),
                _wide(embeds[text]),
                _wide(logit_scale),
                label_smoothing,
                present=_pair_presence(present, image, text),
                image_columns=None if columns is None else _wide(columns[image]),
                text_columns=None if columns is None else _wide(columns[text]),
                columns_present=None if columns is None else _pair_presence(columns_present, image, text),
                groups=(groups or {}).get(text),
            )
        weighted = (weight * terms[name] for name, weight in weights.items())
        loss = sum(weighted, start=torch.zeros((), device=logit_scale.device))
    return PyramidLoss(loss, terms, counts)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def normalize_embeds(embeds: torch.Tensor) -> torch.Tensor:
    """Unit vectors along the last axis, computed in fp32 (fp64 stays fp64); a zero row stays zero, not NaN."""
    with torch.autocast(embeds.device.type, enabled=False):
        return F.normalize(_wide(embeds), dim=-1)


__all__ = ["PyramidLoss", "normalize_embeds", "pyramid_loss", "softened_info_nce"]
