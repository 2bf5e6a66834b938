# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""The objective: softened InfoNCE over pairs of pyramid levels (paper, section 3.4), in closed form.

For N pairs of unit vectors v_i, t_j, scale s and z = s V T^T, the softened target of row i puts 1 - a on the pair and
a / (N - 1) on each of the other N - 1 entries. The cross-entropy of that row is then

    logsumexp_j z_ij - (1 - a) z_ii - a / (N - 1) (sum_j z_ij - z_ii),      sum_j z_ij = s v_i . (sum_j t_j)

so neither the targets nor z need to be held: both directions' log-sum-exps come from one product, block by block, and
the blocks are computed again in the backward pass. That is four products of N x N x D a term, and memory O(N D +
block). A level pair's loss is the mean over rows and columns (image to text, text to image).

Over several processes each has its own pictures against everybody's texts, so its share of the work is that of its
rows; what a column's log-sum-exp lacks are the other processes' rows, one number a column and process (`merge`).

Where texts repeat (tags do, often), the m pairs with the same text can share the positives' mass (`groups`; not the
paper's): (1 - a) / m on each of them and a / (N - m) elsewhere. The closed form holds with the mean of the m partners
in place of the partner.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F

from .levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS, check_loss_weights
from .versions_pyramidclip import exact_products

# Keys of a process's texts (n,) and of the global batch's (N,), int64: equal texts have equal keys.
Groups: TypeAlias = tuple[torch.Tensor, torch.Tensor]
# Of each term, the places of its two levels in a list of embeddings.
Pairs: TypeAlias = Sequence[tuple[int, int]]
# From a process's column log-sum-exps (terms, N) to those of its own columns over the rows of all processes (terms, n).
Merge: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# Entries of z that a term holds at once: on a processor what its cache serves, elsewhere what fills the device.
_CPU_ENTRIES = 1 << 20
_DEVICE_ENTRIES = 1 << 22
# Of N x N entries, the share that all terms together hold at once where that is more, and the part of a device's memory
# that this may take. Not of what happens to be free: the order of sums hangs on it, and a run that was stopped must
# continue to the bit.
_SHARE_OF_ENTRIES = 16
_SHARE_OF_MEMORY = 32
# Two of z's size while it is worked on, in fp32.
BYTES_PER_ENTRY = 8


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


class _LogSumExp(torch.autograd.Function):
    """Of z = `scale * rows @ columns.T` of several terms, both log-sum-exps, in blocks that backward computes again.

    One product gives both directions, and what follows it is done for all terms at once.

    Args:
        pairs: term -> (place of its rows, place of its columns) in `embeds`.
        scale: 0-d.
        rows_present: (terms, n) bool or None (all).
        columns_present: (terms, N) bool or None.
        embeds: levels (n, D) that are rows, and levels (N, D) that are columns.

    Returns:
        Over present columns (terms, n), and over present rows (terms, N); 0 for what is absent, and -inf for a present
        column without a present row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pairs: Pairs,
        scale: torch.Tensor,
        rows_present: torch.Tensor | None,
        columns_present: torch.Tensor | None,
        *embeds: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = (len(embeds[place]) for place in pairs[0])
        of_rows = embeds[0].new_full((len(pairs), height), float("-inf"))
        of_columns = embeds[0].new_full((len(pairs), width), float("-inf"))
        with exact_products(scale.device.type):
            for block in _blocks(pairs, scale, rows_present, columns_present, embeds):
                for result, axis in ((of_rows[:, block.rows], 2), (of_columns[:, block.columns], 1)):
                    torch.logaddexp(result, _log_sum_exp(block, axis), out=result)
        ctx.pairs = pairs
        # exp(z - inf) is 0: what nothing was summed up for has no weight.
        saved = (result.masked_fill(result == float("-inf"), float("inf")) for result in (of_rows, of_columns))
        ctx.save_for_backward(scale, rows_present, columns_present, *saved, *embeds)
        if rows_present is not None and columns_present is not None:
            of_rows.masked_fill_(~rows_present, 0)
            of_columns.masked_fill_(~columns_present, 0)
        return of_rows, of_columns

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_columns: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale, rows_present, columns_present, of_rows, of_columns, *embeds = ctx.saved_tensors
        grads = [torch.zeros_like(embed) for embed in embeds]
        # Where backward() is called inside of an autocast block, it is off here.
        with torch.autocast(scale.device.type, enabled=False), exact_products(scale.device.type):
            for block in _blocks(ctx.pairs, scale, rows_present, columns_present, embeds):
                weights, part, others = block.logits, block.rows, block.columns
                torch.sub(weights, of_columns[:, None, others], out=block.spare).exp_()
                weights.sub_(of_rows[:, part, None]).exp_().mul_(grad_rows[:, part, None])
                weights.addcmul_(block.spare, grad_columns[:, None, others])
                for term, (row, column) in zip(weights, ctx.pairs, strict=True):
                    grads[row][part].addmm_(term, embeds[column][others])
                    grads[column][others].addmm_(term.T, block.scaled[row])
            del block, weights, term  # their memory is needed no more
        places = sorted({row for row, _ in ctx.pairs})
        grad_scale = torch.stack([(embeds[row] * grads[row]).sum() for row in places]).sum()
        for row in places:
            grads[row].mul_(scale)
        return None, grad_scale, None, None, *grads


class _Block(NamedTuple):
    """A part of z, of all terms.

    Attributes:
        logits: (terms, height, width), -inf where row or column is absent.
        spare: memory of the same shape.
        rows: where it lies.
        columns: where it lies.
        scaled: place in the list of embeddings -> these rows of it, times the scale.
    """

    logits: torch.Tensor
    spare: torch.Tensor
    rows: slice
    columns: slice
    scaled: dict[int, torch.Tensor]


def _log_sum_exp(block: _Block, axis: int) -> torch.Tensor:
    """`logsumexp` without memory of its own; -inf where all is absent."""
    highest = block.logits.amax(axis, keepdim=True).clamp_(min=torch.finfo(block.logits.dtype).min)
    sums = torch.sub(block.logits, highest, out=block.spare).exp_().sum(axis)
    return sums.log_().add_(highest.squeeze(axis))


def _blocks(
    pairs: Pairs,
    scale: torch.Tensor,
    rows_present: torch.Tensor | None,
    columns_present: torch.Tensor | None,
    embeds: Sequence[torch.Tensor],
) -> Iterator[_Block]:
    """All of z in blocks; the memory of one is the next one's."""
    rows, columns = (len(embeds[place]) for place in pairs[0])
    height, width = block_of(rows, columns, len(pairs), scale.device)
    memory = embeds[0].new_empty(2, len(pairs) * height * width)
    for part in _slices(rows, height):
        scaled = {row: embeds[row][part] * scale for row in sorted({row for row, _ in pairs})}
        for others in _slices(columns, width):
            shape = (len(pairs), part.stop - part.start, others.stop - others.start)
            logits, spare = (half[: math.prod(shape)].view(shape) for half in memory)
            for term, (row, column) in zip(logits, pairs, strict=True):
                torch.mm(scaled[row], embeds[column][others].T, out=term)
            if rows_present is not None and columns_present is not None:
                absent = ~(rows_present[:, part, None] & columns_present[:, None, others])
                logits.masked_fill_(absent, float("-inf"))
            yield _Block(logits, spare, part, others, scaled)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def block_of(rows: int, columns: int, terms: int, device: torch.device) -> tuple[int, int]:
    """(height, width) of the blocks in which `terms` matrices of `rows` x `columns` similarities are worked on.

    A processor's fit its cache. A GPU's are wide enough to fill it, and grow with the matrix up to a share of its
    memory; about square, so that neither gradient is read and written more often than the other.
    """
    if device.type == "cpu":
        entries = _CPU_ENTRIES // terms
    else:
        entries = max(_DEVICE_ENTRIES, rows * columns // (_SHARE_OF_ENTRIES * terms))
        entries = min(entries, _memory_of(device) // (_SHARE_OF_MEMORY * BYTES_PER_ENTRY * terms))
    width = max(1, min(columns, max(math.isqrt(entries), entries // rows)))
    return max(1, min(rows, entries // width)), width


@cache
def _memory_of(device: torch.device) -> int:
    """Bytes of a device; that of a GPU of 80 GB where it cannot be asked."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    return 80 * 10**9


class _Partners(NamedTuple):
    """The right answers of each term's rows.

    Attributes:
        logits: (terms, n); where several pairs have the same text, the mean of theirs.
        number: 1, or (terms, n) where some have several.
    """

    logits: torch.Tensor
    number: int | torch.Tensor


def _linear_part(
    rows: Sequence[torch.Tensor],
    columns: Sequence[torch.Tensor],
    partners: _Partners,
    scale: torch.Tensor,
    smoothing: float,
    columns_present: torch.Tensor | None,
    counts: torch.Tensor,
) -> torch.Tensor:
    """What a softened cross-entropy takes off its log-sum-exp.

    Args:
        rows: of each term, (n, D).
        columns: of each term, (N, D).
        partners: of the rows.
        scale: 0-d.
        smoothing: the mass on the negatives.
        columns_present: (terms, N) bool or None (all).
        counts: (terms,), how many that are.

    Returns:
        (terms, n).
    """
    positive, number = partners
    if not smoothing:
        return positive
    counts = counts[:, None]
    # Where nobody else is there to take the negatives' mass, it is not there.
    share = smoothing if isinstance(number, int) else smoothing * (number < counts).to(positive.dtype)
    if columns_present is None:
        totals = [column.sum(0) for column in columns]
    else:
        totals = [here @ column for here, column in zip(columns_present.to(positive.dtype), columns, strict=True)]
    everything = scale * torch.stack([row @ total for row, total in zip(rows, totals, strict=True)])
    negative = (everything - number * positive) / (counts - number).clamp(min=1)
    return (1 - share) * positive + share * negative


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


def pyramid_loss(
    embeds: Mapping[str, torch.Tensor],
    logit_scale: torch.Tensor,
    loss_weights: Mapping[str, float] = DEFAULT_LOSS_WEIGHTS,
    label_smoothing: float = 0.2,
    *,
    present: Mapping[str, torch.Tensor | None] | None = None,
    columns: Mapping[str, torch.Tensor] | None = None,
    columns_present: Mapping[str, torch.Tensor | None] | None = None,
    merge: Merge | None = None,
    groups: Mapping[str, Groups] | None = None,
    terms: Mapping[str, tuple[str, str]] = TERMS,
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
        merge: given together with `columns`: takes this process's (terms, N) log-sum-exps over its own rows, gives
            those of its own columns over the rows of all processes (terms, n), with gradient.
        groups: text level name -> keys of this process's texts (n,) and of the global batch's (N,), int64, where pairs
            with equal texts are to be each other's positives; `None` (the paper) means no two pairs are.
        terms: term name -> (image level, text level): the pyramid's, or those of a training that has further levels.

    Returns:
        [`PyramidLoss`]: this process's share (its pairs, divided by the global number N_t of those that a term runs on;
        summed over processes it is the loss). Below two such pairs a term is exactly 0, with zero gradients. Computed
        in fp32, or in fp64 where the embeddings are fp64; never under autocast, and never in TF32.

    Raises:
        ValueError: weights that name no term or an unknown one, a level of a named term that is absent, levels of
            different sizes, no samples, `columns` without `merge` or the reverse.
    """
    weights = check_loss_weights(loss_weights, terms)
    pairs = {name: terms[name] for name in weights}
    if (columns is None) != (merge is None):
        raise ValueError("columns and merge belong together: one of them is missing.")
    levels = tuple(dict.fromkeys(level for pair in pairs.values() for level in pair))
    _check_levels(pairs, embeds, columns or embeds)
    with torch.autocast(logit_scale.device.type, enabled=False):
        own = {level: _wide(embeds[level]) for level in levels}
        everyone = own if columns is None else {level: _wide(columns[level]) for level in levels}
        own_present = _presence(present, pairs, own)
        everyone_present = own_present if columns is None else _presence(columns_present, pairs, everyone)
        losses, counts = _losses(
            own,
            everyone,
            _wide(logit_scale),
            list(pairs.values()),
            label_smoothing,
            own_present,
            everyone_present,
            merge,
            groups or {},
        )
        if own_present is not None:
            losses = losses.where(own_present, 0)
        shares = losses.sum(1) * (counts >= 2) / (2 * counts.clamp(min=1))
        found = dict(zip(weights, shares.unbind(), strict=True))
        weighted = (weight * found[name] for name, weight in weights.items())
        loss = sum(weighted, start=torch.zeros((), device=logit_scale.device))
    return PyramidLoss(loss, found, dict(zip(weights, counts.unbind(), strict=True)))


def _check_levels(
    pairs: Mapping[str, tuple[str, str]],
    embeds: Mapping[str, torch.Tensor],
    everyone: Mapping[str, torch.Tensor],
) -> None:
    absent = {name: missing for name, pair in pairs.items() if (missing := [lv for lv in pair if lv not in embeds])}
    if absent:
        raise ValueError(f"These loss terms lack embeddings of a level: {absent}. Given: {sorted(embeds)}.")
    sizes = {level: len(everyone[level]) for pair in pairs.values() for level in pair}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"All levels must hold the same number of samples, got {sizes}.")
    total = next(iter(sizes.values()))
    if not total:
        raise ValueError("A contrastive loss needs samples in the global batch, got none.")


def _presence(
    masks: Mapping[str, torch.Tensor | None] | None,
    pairs: Mapping[str, tuple[str, str]],
    embeds: Mapping[str, torch.Tensor],
) -> torch.Tensor | None:
    """(terms, N) bool: the pairs with both levels of a term; `None` where no level has a mask."""
    given = {level: mask for level, mask in (masks or {}).items() if mask is not None}
    if not any(level in given for pair in pairs.values() for level in pair):
        return None
    first = next(iter(embeds.values()))
    given = dict.fromkeys(embeds, first.new_ones(len(first), dtype=torch.bool)) | given
    return torch.stack([given[image] & given[text] for image, text in pairs.values()])


def _losses(
    own: Mapping[str, torch.Tensor],
    everyone: Mapping[str, torch.Tensor],
    scale: torch.Tensor,
    pairs: Sequence[tuple[str, str]],
    smoothing: float,
    own_present: torch.Tensor | None,
    everyone_present: torch.Tensor | None,
    merge: Merge | None,
    groups: Mapping[str, Groups],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both directions' cross-entropies of this process's pairs (terms, n), and N_t (terms,) int64."""
    images, texts = zip(*pairs)
    if everyone_present is not None:
        counts = everyone_present.sum(1)
    else:
        counts = scale.new_full((len(pairs),), len(everyone[images[0]]), dtype=torch.int64)
    of_images = _partners(own, everyone, images, texts, scale, groups, everyone_present)
    of_texts = _partners(own, everyone, texts, images, scale, groups, everyone_present) if groups else of_images
    rest = (scale, smoothing, everyone_present, counts)
    image_rows, text_rows = [own[level] for level in images], [own[level] for level in texts]
    # Before the log-sum-exps: backward is over with their blocks before it holds the gradients of this.
    linear = _linear_part(image_rows, [everyone[level] for level in texts], of_images, *rest)
    linear = linear + _linear_part(text_rows, [everyone[level] for level in images], of_texts, *rest)
    rows, columns = list(dict.fromkeys(images)), list(dict.fromkeys(texts))
    places = [(rows.index(image), len(rows) + columns.index(text)) for image, text in pairs]
    operands = [*(own[level] for level in rows), *(everyone[level] for level in columns)]
    row_sums, column_sums = _LogSumExp.apply(places, scale, own_present, everyone_present, *operands)
    return row_sums + (column_sums if merge is None else merge(column_sums)) - linear, counts


def _partners(
    own: Mapping[str, torch.Tensor],
    everyone: Mapping[str, torch.Tensor],
    sides: Sequence[str],
    others: Sequence[str],
    scale: torch.Tensor,
    groups: Mapping[str, Groups],
    present: torch.Tensor | None,
) -> _Partners:
    """The partners of each term's `sides` among `others`."""
    partners, sizes = [], []
    for term, (side, other) in enumerate(zip(sides, others, strict=True)):
        found = groups.get(side) or groups.get(other)
        partner, size = own[other], None
        if found is not None:
            partner, size = _group_means(everyone[other], None if present is None else present[term], *found)
        partners.append((own[side] * partner).sum(1))
        sizes.append(torch.ones_like(partners[term]) if size is None else size)
    return _Partners(scale * torch.stack(partners), torch.stack(sizes) if groups else 1)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def normalize_embeds(embeds: torch.Tensor) -> torch.Tensor:
    """Unit vectors along the last axis, computed in fp32 (fp64 stays fp64); a zero row stays zero, not NaN."""
    with torch.autocast(embeds.device.type, enabled=False):
        return F.normalize(_wide(embeds), dim=-1)


__all__ = ["BYTES_PER_ENTRY", "PyramidLoss", "block_of", "normalize_embeds", "pyramid_loss"]
