"""The objective as section 3.4 of the paper writes it, with every matrix in memory.

The closed form must equal it, and is timed against it."""

import torch
import torch.nn.functional as F

from pyramidclip_hf.levels_pyramidclip import TERMS


def dense_term(image, text, scale, smoothing):
    """One level pair. image, text: (N, D) unit vectors. scale: the softmax scale."""
    count = len(image)
    logits = scale * image @ text.T
    target = torch.full((count, count), smoothing / (count - 1), dtype=logits.dtype)
    target.fill_diagonal_(1 - smoothing)
    rows = -(target * F.log_softmax(logits, dim=1)).sum(1).mean()
    columns = -(target * F.log_softmax(logits.T, dim=1)).sum(1).mean()
    return (rows + columns) / 2


def dense_loss(embeds, scale, weights, smoothing, present):
    """The weighted sum over level pairs, each on the samples that have both levels (`present`: level -> (N,) bool)."""
    total = 0.0
    for name, weight in weights.items():
        both = present[TERMS[name][0]] & present[TERMS[name][1]]
        if both.sum() >= 2:
            image, text = (embeds[level][both] for level in TERMS[name])
            total = total + weight * dense_term(image, text, scale, smoothing)
    return total
