"""Pictures and texts by their tokens, FILIP's term (arXiv 2111.07783): `IMAGE_TEXT_tokens`, so `global_caption_tokens`.

A picture finds for each of its tokens the most similar token of a text, and its similarity to the text is the mean of
these maxima; a text does likewise, and the two are not each other's transpose. Real tokens alone take part: of a
picture all but the global one, of a text begin and end too and padding never. Tokens go through projections of their
own, and the two contrasts have a scale of their own.

`keep` below 1 is the paper's cut, an approximation that lets less be gathered and compared: of each picture and text
that share of its tokens, those with the largest similarity to any token of the texts, or pictures, of the same process.
Which those are has no gradient, and hangs on the number of processes.

All similarities of N pictures and texts would be N x N x L x L numbers. They are computed in blocks of rows and
columns, streamed into one log-sum-exp a row, and computed again in the backward pass, where each maximum sends its
gradient to the token that had it (of equals the first). That is four products of one direction's similarities, for each
direction.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.modeling_pyramidclip import MAX_LOGIT_SCALE
from pyramidclip_hf.versions_pyramidclip import exact_products
from training.data.inputs import RUN_LEVELS, any_level
from training.loop.distributed import gather_rows, largest_everywhere
from training.loop.terms.encoding import token_mask
from training.loop.terms.term import (
    Encoded,
    Rows,
    Share,
    Step,
    Tensors,
    Term,
    Wanted,
    at_least,
    read_options,
    softened_choice,
    wide,
)

SUFFIX = "_tokens"
# Similarities of tokens held at once: what a processor's cache serves, and what fills a device.
_CPU_ENTRIES = 1 << 20
_DEVICE_ENTRIES = 1 << 26
_LEVELS = {**LEVELS, **RUN_LEVELS}
TOKEN_PAIRS: dict[str, tuple[str, str]] = {
    f"{image}_{text}{SUFFIX}": (image, text)
    for image, picture in _LEVELS.items()
    if picture.kind == "picture"
    for text, words in _LEVELS.items()
    if words.kind == "text" and text != "masked"
}


def block_of(rows: int, columns: int, row_tokens: int, column_tokens: int, device: torch.device) -> tuple[int, int]:
    """(height, width) in samples of the blocks in which similarities of tokens are worked on."""
    entries = _CPU_ENTRIES if device.type == "cpu" else _DEVICE_ENTRIES
    samples = max(1, entries // (row_tokens * column_tokens))
    width = max(1, min(columns, max(math.isqrt(samples), samples // rows)))
    return max(1, min(rows, samples // width)), width


class _Block(NamedTuple):
    """A part of the scores.

    Attributes:
        rows: Where it lies.
        columns: Where it lies.
        best: (rows, row tokens, columns), the largest similarities; 0 where a row's token is padding.
        places: (rows, row tokens, columns), for each token of a row the column's token that is most similar.
        scores: (rows, columns), the means of these similarities, not scaled.
    """

    rows: slice
    columns: slice
    best: torch.Tensor
    places: torch.Tensor
    scores: torch.Tensor


def _blocks(
    rows: torch.Tensor,
    row_mask: torch.Tensor,
    columns: torch.Tensor,
    column_mask: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> Iterator[_Block]:
    """dtype: what the similarities are computed in; None: that of the rows."""
    dtype = dtype or rows.dtype
    height, width = block_of(len(rows), len(columns), rows.shape[1], columns.shape[1], rows.device)
    shares = row_mask.to(dtype) / row_mask.sum(1, keepdim=True).clamp(min=1)
    for top in range(0, len(rows), height):
        part = slice(top, min(top + height, len(rows)))
        for left in range(0, len(columns), width):
            others = slice(left, min(left + width, len(columns)))
            similar = rows[part].flatten(0, 1).to(dtype) @ columns[others].flatten(0, 1).to(dtype).T
            similar = similar.view(part.stop - top, -1, others.stop - left, columns.shape[1])
            similar = similar.masked_fill_(~column_mask[others], float("-inf"))
            best, places = similar.max(3)
            del similar
            scores = (best.masked_fill_(~row_mask[part, :, None], 0) * shares[part, :, None]).sum(1)
            yield _Block(part, others, best, places, scores)


class _TokenScores(torch.autograd.Function):
    """Of the scaled scores s of rows (n) with columns (N): log-sum-exp and sum over the columns that are present.

    Args:
        rows: (n, L, d).
        row_mask: (n, L) bool, real tokens, at least one of each row.
        columns: (N, M, d).
        column_mask: (N, M) bool, likewise.
        present: (N,) bool; absent columns count nowhere.
        scale: 0-d.

    Returns:
        Log-sum-exps (n,), -inf where no column is present, and sums (n,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        row_mask: torch.Tensor,
        columns: torch.Tensor,
        column_mask: torch.Tensor,
        present: torch.Tensor,
        scale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        sums, totals = rows.new_full((len(rows),), float("-inf")), rows.new_zeros(len(rows))
        with exact_products(rows.device.type):
            for block in _blocks(rows, row_mask, columns, column_mask):
                scores, here = block.scores * scale, present[block.columns]
                found = torch.logsumexp(scores.masked_fill(~here, float("-inf")), dim=1)
                sums[block.rows] = torch.logaddexp(sums[block.rows], found)
                totals[block.rows] += scores.masked_fill(~here, 0).sum(1)
        ctx.save_for_backward(rows, row_mask, columns, column_mask, present, scale, sums)
        return sums, totals

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_sums: torch.Tensor, grad_totals: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, row_mask, columns, column_mask, present, scale, sums = ctx.saved_tensors
        grad_rows, grad_columns = torch.zeros_like(rows), torch.zeros_like(columns)
        grad_scale = torch.zeros_like(scale)
        shares = row_mask.to(rows.dtype) / row_mask.sum(1, keepdim=True).clamp(min=1)
        width, tokens = rows.shape[2], columns.shape[1]
        device = rows.device.type
        with torch.autocast(device, enabled=False), exact_products(device):
            for block in _blocks(rows, row_mask, columns, column_mask):
                part, others = block.rows, block.columns
                softmax = (block.scores * scale - sums[part, None]).exp_()
                weights = grad_sums[part, None] * softmax + grad_totals[part, None]
                weights = weights.masked_fill(~present[others], 0)
                grad_scale += (weights * block.scores).sum()
                # One entry for each token of a row and each column: where its maximum was.
                each = (scale * weights)[:, None, :] * shares[part, :, None]
                sent = each.new_zeros(*each.shape, tokens).scatter_(3, block.places[..., None], each[..., None])
                sent = sent.view(each.shape[0] * each.shape[1], -1)
                grad_rows[part] += (sent @ columns[others].reshape(-1, width)).view_as(rows[part])
                grad_columns[others] += (sent.T @ rows[part].reshape(-1, width)).view_as(columns[others])
        return grad_rows, None, grad_columns, None, None, grad_scale


def token_scores(
    rows: torch.Tensor,
    row_mask: torch.Tensor,
    columns: torch.Tensor,
    column_mask: torch.Tensor,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """(n, N): the mean over a row's real tokens of the largest similarity among a column's, without gradient.

    dtype: what is computed in, block by block; None: that of the rows, which the scores have in any case.
    """
    found = rows.new_empty(len(rows), len(columns))
    device = rows.device.type
    with torch.no_grad(), torch.autocast(device, enabled=False), exact_products(device):
        for block in _blocks(rows, row_mask, columns, column_mask, dtype):
            found[block.rows, block.columns] = block.scores.to(rows.dtype)
    return found


def _own_scores(
    rows: torch.Tensor, row_mask: torch.Tensor, columns: torch.Tensor, column_mask: torch.Tensor
) -> torch.Tensor:
    """(n,): the scores of rows (n, L, d) with their own partners (n, M, d), with gradient."""
    similar = (rows @ columns.transpose(1, 2)).masked_fill(~column_mask[:, None], float("-inf"))
    best = similar.max(2).values.masked_fill(~row_mask, 0)
    return best.sum(1) / row_mask.sum(1).clamp(min=1)


def _share_of(keep: float, tokens: torch.Tensor) -> torch.Tensor:
    """int64, how many of so many tokens are kept: rounded up, so at least one of any."""
    return (tokens.double() * keep).round(decimals=6).ceil().long()


@torch.no_grad()
def _kept(
    keep: float,
    rows: torch.Tensor,
    row_mask: torch.Tensor,
    columns: torch.Tensor,
    column_mask: torch.Tensor,
    present: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are kept of rows (n, L, d): numbers (n, K) and which of them are real (n, K) bool.

    The most similar to any token of the columns (m, M, d) that are `present` (m,) come first, of equals the first.
    """
    strongest = rows.new_full(row_mask.shape, float("-inf"))
    with exact_products(rows.device.type):
        for block in _blocks(rows, row_mask, columns, column_mask):
            best = block.best.masked_fill(~present[block.columns], float("-inf")).amax(2)
            strongest[block.rows] = torch.maximum(strongest[block.rows], best)
    # Below any cosine: real tokens come before padding even where no column is present.
    strongest = strongest.clamp(min=-2).masked_fill(~row_mask, float("-inf"))
    counts = _share_of(keep, row_mask.sum(1))
    most = int(_share_of(keep, torch.tensor(row_mask.shape[1])))
    order = strongest.argsort(dim=1, descending=True, stable=True)[:, :most]
    return order, torch.arange(most, device=rows.device) < counts[:, None]


class TokenPair(Term):
    """`IMAGE_TEXT_tokens`.

    Args:
        name: Of the term, one of `TOKEN_PAIRS`.
        weight: In the objective.
        options: `width` of the projected tokens; `keep`, the share of the tokens that take part.
        config: Of the model.
    """

    def __init__(self, name: str, weight: float, options: Mapping[str, Any], config: PyramidCLIPConfig):
        super().__init__()
        self.name, self.weight = name, weight
        self._options = read_options(name, options, width=256, keep=1.0)
        at_least(name, self._options, width=1)
        if not 0 < self._options["keep"] <= 1:
            raise ValueError(f"objective: {name}: keep: expected a share in (0, 1], got {self._options['keep']}")
        self.image, self.text = TOKEN_PAIRS[name]
        self.wanted = (Wanted(self.image, "tokens"), Wanted(self.text, "tokens"))
        self.image_projection = nn.Linear(config.vision_config.hidden_size, self._options["width"])
        self.text_projection = nn.Linear(config.text_config.hidden_size, self._options["width"])
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self._end_id = config.text_config.eos_token_id

    def options(self) -> dict[str, Any]:
        """As given, defaults filled in."""
        return self._options

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """Tokens of everyone and the gradients of all, for either direction, and what a block takes."""
        vectors = (tokens[self.image] + tokens[self.text]) * self._options["width"] * self._options["keep"]
        return int(4 * (vectors * (everyone + 5 * (own + everyone) // 3) + 2 * _DEVICE_ENTRIES))

    def loss_operations(self, everyone: int, tokens: Mapping[str, int]) -> float:
        """Four products of a pair's tokens with those of everyone, in either direction.

        With a cut, one of all tokens in either direction before it, counted as on one process, which is the most.
        """
        keep = self._options["keep"]
        product = 2.0 * 2 * everyone * tokens[self.image] * tokens[self.text] * self._options["width"]
        return product * (4 * keep**2 + (keep < 1))

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """Unit vectors of tokens, and which are real."""
        texts, mask = self.text_rows(encoded[self.wanted[1]], batch[any_level(self.text).input])
        present = batch.get(any_level(self.text).mask or "")
        return {
            "images": self.image_rows(encoded[self.wanted[0]]),
            "texts": texts,
            "mask": mask,
            "present": mask.new_ones(len(mask)) if present is None else present,
        }

    def image_rows(self, tokens: torch.Tensor) -> torch.Tensor:
        """(n, L, d) unit vectors of pictures' tokens (n, L, W)."""
        with self.autocast(self.logit_scale.device):
            projected = self.image_projection(tokens)
        return F.normalize(wide(projected), dim=-1)

    def text_rows(self, tokens: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, L, d) unit vectors of texts' tokens (n, L, W), and (n, L) bool, which are real by `ids`."""
        with self.autocast(self.logit_scale.device):
            projected = self.text_projection(tokens)
        mask = token_mask(ids, self._end_id)
        if mask.shape[1] < projected.shape[1]:  # a tower that takes the maximum over all positions fills them up
            mask = F.pad(mask, (0, projected.shape[1] - mask.shape[1]))
        return F.normalize(wide(projected), dim=-1), mask

    def share(self, rows: Rows, step: Step) -> Share:
        """See the module; pairs whose text is missing are no part of it."""
        images, texts, mask, present = rows["images"], rows["texts"], rows["mask"], rows["present"]
        scale = self.logit_scale.to(images.dtype).exp()
        all_of_image = mask.new_ones(images.shape[:2])
        keep = self._options["keep"]
        if keep < 1:
            of_images, all_of_image = _kept(keep, images, all_of_image, texts, mask, present)
            of_texts, kept_mask = _kept(keep, texts, mask, images, mask.new_ones(images.shape[:2]), present)
            images = images.take_along_dim(of_images[..., None], 1)
            texts, mask = texts.take_along_dim(of_texts[..., None], 1), kept_mask
        more = largest_everywhere(texts.shape[1]) - texts.shape[1]  # processes pad to the longest text of their own
        everyone_mask, everyone_present = gather_rows(F.pad(mask, (0, more))), gather_rows(present)
        everyone_texts = gather_rows(F.pad(texts, (0, 0, 0, more)))
        everyone_images = gather_rows(images)
        of_everyone = everyone_mask.new_ones(everyone_images.shape[:2])
        count = everyone_present.sum()
        losses = []
        for own, own_mask, other, other_mask, partner, partner_mask in (
            (images, all_of_image, everyone_texts, everyone_mask, texts, mask),
            (texts, mask, everyone_images, of_everyone, images, all_of_image),
        ):
            sums, totals = _TokenScores.apply(own, own_mask, other, other_mask, everyone_present, scale)
            positive = scale * _own_scores(own, own_mask, partner, partner_mask)
            losses.append(softened_choice(sums, positive, totals, count, step.smoothing))
        both = (losses[0] + losses[1]).where(present, 0)
        return Share(both.sum() * (count >= 2) / (2 * count.clamp(min=1)), count)

    @torch.no_grad()
    def after_step(self, stepped: bool) -> None:
        """Keeps the scale at or below 100, as the model's own."""
        self.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
