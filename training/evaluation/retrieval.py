"""Image-text retrieval: recall at 1, 5 and 10 in both directions, from embeddings alone.

Everything here is a pure function of tensors: no model, no files, no processes. `retrieval_metrics` takes a matrix of
pictures and a matrix of texts; `level_metrics` takes the embeddings of several pyramid levels and gives retrieval
for each pair of levels asked for.

Ties are averaged over every order in which equal scores could have been sorted: R@k is the expected recall. A model
that has collapsed to one vector therefore scores exactly chance, k / N, where "number strictly better" would have
called it perfect.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from pyramidclip_hf.levels_pyramidclip import TERMS
from training.evaluation.arguments import check_pairs

DEFAULT_KS = (1, 5, 10)


@dataclass(frozen=True)
class RankCounts:
    """What decides the place of the right answer, for each of Q queries; every field is an int64 tensor of shape (Q,).

    Attributes:
        above: wrong candidates that score strictly higher than the best right one.
        tied: wrong candidates with the same score as it.
        right: right candidates with that score (at least 1).
    """

    above: torch.Tensor
    tied: torch.Tensor
    right: torch.Tensor

    def recall(self, k: int) -> torch.Tensor:
        """(Q,) float64: the chance that a right candidate is among the first `k` when ties fall at random."""
        free_places = (k - self.above).clamp(min=0)
        missed = torch.ones_like(self.above, dtype=torch.float64)
        for place in range(k):
            wrong_left = (self.tied - place).clamp(min=0)
            left = (self.tied + self.right - place).clamp(min=1)
            missed = torch.where(place < free_places, missed * wrong_left / left, missed)
        return 1.0 - missed

    def rank(self) -> torch.Tensor:
        """(Q,) float64: the expected place, from 1, of the first right candidate when ties fall at random."""
        return 1.0 + self.above + self.tied / (self.right + 1.0)


def _unit_rows(embeds: torch.Tensor, name: str) -> torch.Tensor:
    if not isinstance(embeds, torch.Tensor) or embeds.dim() != 2 or embeds.shape[0] == 0:
        shape = tuple(embeds.shape) if isinstance(embeds, torch.Tensor) else type(embeds).__name__
        raise ValueError(f"{name} must be a tensor of shape (N, D) with N of at least 1, got {shape}")
    if embeds.device.type == "mps":  # has no float64
        embeds = embeds.cpu()
    embeds = embeds.detach().to(torch.float64)
    bad = ~torch.isfinite(embeds).all(dim=1)
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinity in {int(bad.sum())} rows, first row {int(bad.nonzero()[0])}")
    return torch.nn.functional.normalize(embeds, dim=1)


def rank_counts(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
    chunk_size: int = 256,
) -> RankCounts:
    """Where the right candidate of each query stands by dot product.

    Dot products are taken in float64 and rounded to float32 before they are compared: equal candidates then get equal
    scores whatever the chunk size, which a float32 product does not promise.

    Args:
        queries: (Q, D).
        candidates: (C, D).
        query_ids: (Q,) int64.
        candidate_ids: (C,) int64; candidate c is right for query q when their ids are equal.
        chunk_size: queries scored at a time; memory is chunk_size x C scores.

    Raises:
        ValueError: a query without a right candidate, NaN or infinity, or `chunk_size` below 1.
    """
    for what, rows in (("query", queries), ("candidate", candidates)):
        bad = int((~rows.isfinite()).any(dim=1).sum())
        if bad:  # a comparison with NaN is never true, so no right answer would seem to be beaten
            raise ValueError(f"expected finite numbers, got NaN or infinity in {bad} of {len(rows)} {what} rows")
    transposed = candidates.to(torch.float64).T.contiguous()

    def scores_of(chunk: slice) -> torch.Tensor:
        return (queries[chunk].to(torch.float64) @ transposed).to(torch.float32)

    return counts_of_scores(scores_of, query_ids, candidate_ids, chunk_size)


def counts_of_scores(
    scores_of: Callable[[slice], torch.Tensor],
    query_ids: torch.Tensor,
    candidate_ids: torch.Tensor,
    chunk_size: int = 256,
) -> RankCounts:
    """Where the right candidate of each query stands by scores of any kind; else as `rank_counts`.

    Args:
        scores_of: which queries -> (queries, C) float32, equal whatever the chunk size.
        query_ids: (Q,) int64.
        candidate_ids: (C,) int64.
        chunk_size: queries scored at a time.

    Raises:
        ValueError: a query without a right candidate, or `chunk_size` below 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    by_id = candidate_ids.argsort()
    sorted_ids = candidate_ids[by_id]
    first, last = torch.searchsorted(sorted_ids, query_ids), torch.searchsorted(sorted_ids, query_ids, right=True)
    if (first == last).any():
        lost = int(query_ids[first == last][0])
        raise ValueError(
            f"the query with id {lost} has no candidate with the same id; every query needs a right answer"
        )
    counts = torch.zeros(3, len(query_ids), dtype=torch.int64, device=query_ids.device)
    for start in range(0, len(query_ids), chunk_size):
        chunk = slice(start, start + chunk_size)
        scores = scores_of(chunk)
        owned = (last - first)[chunk]
        query = torch.arange(len(scores), device=scores.device).repeat_interleave(owned)
        nth = torch.arange(len(query), device=scores.device) - (owned.cumsum(0) - owned)[query]
        own_scores = scores[query, by_id[first[chunk][query] + nth]]
        best = scores.new_full((len(scores),), -torch.inf).scatter_reduce(0, query, own_scores, "amax")
        right = torch.zeros_like(owned).scatter_add(0, query, (own_scores == best[query]).to(torch.int64))
        counts[0, chunk] = (scores > best[:, None]).sum(dim=1)  # none of its own can score above their best
        counts[1, chunk] = (scores == best[:, None]).sum(dim=1) - right
        counts[2, chunk] = right
    return RankCounts(*counts.cpu())


def retrieval_metrics(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    text_to_image: torch.Tensor | None = None,
    chunk_size: int = 256,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, float | int]:
    """Retrieval in both directions by cosine similarity.

    Several texts may name one picture: then a picture counts as found when any of its texts is (the usual protocol on
    Flickr30K and MS-COCO). Pictures without a text are candidates, not queries.

    Args:
        image_embeds: (I, D), any floating dtype, normalised here.
        text_embeds: (T, D), the same.
        text_to_image: (T,) int64, the row of the picture that each text belongs to; None: text i to picture i.
        chunk_size: queries scored at a time; memory is chunk_size x max(I, T).
        ks: the k of R@k.

    Returns:
        For each k of `ks`, `image_to_text_R@k` and `text_to_image_R@k` (shares in 0..1; ties averaged, see the module's
        docstring), `image_to_text_mean_rank` and `text_to_image_mean_rank` (from 1), and the counts `images`, `texts`
        and `images_without_text`.

    Raises:
        ValueError: shapes that do not fit, non-finite embeddings, or ids outside of the pictures.
    """
    images = _unit_rows(image_embeds, "image_embeds")
    texts = _unit_rows(text_embeds, "text_embeds").to(images.device)
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"image_embeds have width {images.shape[1]} but text_embeds {texts.shape[1]}; they must be equal"
        )
    if text_to_image is None:
        if len(images) != len(texts):
            raise ValueError(
                f"{len(images)} pictures and {len(texts)} texts: "
                "without text_to_image there must be one text per picture, in order"
            )
        text_to_image = torch.arange(len(images))
    owner = torch.as_tensor(text_to_image, dtype=torch.int64, device=images.device)
    if owner.shape != (len(texts),):
        raise ValueError(f"text_to_image must have shape ({len(texts)},), one entry per text, got {tuple(owner.shape)}")
    if int(owner.min()) < 0 or int(owner.max()) >= len(images):
        raise ValueError(
            f"text_to_image must hold rows 0..{len(images) - 1} of image_embeds, got {owner.min()}..{owner.max()}"
        )

    image_ids = torch.arange(len(images), device=images.device)
    named = torch.bincount(owner, minlength=len(images)) > 0
    directions = {
        "image_to_text": rank_counts(images[named], texts, image_ids[named], owner, chunk_size),
        "text_to_image": rank_counts(texts, images, owner, image_ids, chunk_size),
    }
    counted = {"images": len(images), "texts": len(texts), "images_without_text": int((~named).sum())}
    return metrics_of_counts(directions, ks) | counted


def metrics_of_counts(directions: Mapping[str, RankCounts], ks: Sequence[int] = DEFAULT_KS) -> dict[str, float | int]:
    """`DIRECTION_R@k` for each k of `ks` and `DIRECTION_mean_rank`, see `retrieval_metrics`."""
    metrics: dict[str, float | int] = {}
    for direction, counts in directions.items():
        for k in ks:
            metrics[f"{direction}_R@{k}"] = float(counts.recall(k).mean())
        metrics[f"{direction}_mean_rank"] = float(counts.rank().mean())
    return metrics


def level_metrics(
    embeds: Mapping[str, torch.Tensor],
    pairs: Iterable[str],
    present: Mapping[str, torch.Tensor] | None = None,
    owners: Mapping[str, torch.Tensor] | None = None,
    chunk_size: int = 256,
    ks: Sequence[int] = DEFAULT_KS,
) -> dict[str, dict[str, float | int]]:
    """Retrieval for each level pair, named as the terms of the objective (`local_caption`, `roi_tags`, ...).

    As in the objective, a pair runs on the samples that have both of its levels.

    Args:
        embeds: level -> (N, D), row i of every level from sample i.
        pairs: their names.
        present: level -> (N,) bool, False where sample i lacks that level (its row is ignored); a level not named is
            present everywhere.
        owners: text level -> (T,) int64, where a sample may have several texts of that level: its embeddings are
            (T, D), row j a text of sample owners[j]; a sample that is not named lacks the level.
        chunk_size: see `rank_counts`.
        ks: the k of R@k.

    Returns:
        Pair -> `retrieval_metrics` of it.

    Raises:
        ValueError: an unknown pair, a level without embeddings, or a pair with fewer than 2 samples.
    """
    present, owners = present or {}, owners or {}
    results = {}
    for name in check_pairs(pairs):
        image_level, text_level = TERMS[name]
        missing = [level for level in (image_level, text_level) if level not in embeds]
        if missing:
            raise ValueError(f"{name} needs the embeddings of level(s) {missing}; embeds has {sorted(embeds)}")
        owner = owners.get(text_level, torch.arange(len(embeds[text_level]))).cpu()
        keep = torch.bincount(owner, minlength=len(embeds[image_level])) > 0
        for level in (image_level, text_level):
            if level in present:
                keep &= present[level].cpu()
        if int(keep.sum()) < 2:
            raise ValueError(f"{name}: only {int(keep.sum())} samples have both levels; retrieval needs at least 2")
        text_to_image = (keep.cumsum(0) - 1)[owner]
        images, texts = embeds[image_level], embeds[text_level]
        results[name] = retrieval_metrics(
            images[keep.to(images.device)],
            texts[keep[owner].to(texts.device)],
            text_to_image[keep[owner]],
            chunk_size=chunk_size,
            ks=ks,
        )
    return results
