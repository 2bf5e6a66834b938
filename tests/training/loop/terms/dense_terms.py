"""Each kind of term in a plain form, for the tests here: loops and whole matrices, on one process."""

import torch
import torch.nn.functional as F

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from tests.training.tiny import TEXT, VIT

CONFIG = PyramidCLIPConfig(text_config={**TEXT, "pooling": "eos"}, vision_config=VIT, projection_dim=8)


def choice(logits, right, smoothing):
    """Mean cross-entropy of rows of logits, -inf where nothing can be chosen, with softened targets."""
    losses = []
    for row, place in zip(logits, right):
        there = torch.isfinite(row)
        log_probabilities = row[there].log_softmax(0)
        at = int(there[:place].sum())
        target = torch.full_like(log_probabilities, smoothing / max(1, len(log_probabilities) - 1))
        target[at] = 1 - smoothing if len(log_probabilities) > 1 else 1.0
        losses.append(-(target * log_probabilities).sum())
    return torch.stack(losses).mean()


def simclr(first, second, temperature, smoothing=0.0):
    """SimCLR over the (2N, 2N) matrix of unit vectors."""
    both = F.normalize(torch.cat([first, second]), dim=1)
    logits = (both @ both.T / temperature).fill_diagonal_(float("-inf"))
    number = len(first)
    return choice(logits, [*range(number, 2 * number), *range(number)], smoothing)


def simsiam(projector, predictor, first, second):
    """Cosines, written out."""
    z1, z2 = projector(first), projector(second)
    total = 0.0
    for p, z in ((predictor(z1), z2.detach()), (predictor(z2), z1.detach())):
        for one, other in zip(p, z):
            total = total - (one @ other) / (one.norm() * other.norm()) / (2 * len(z1))
    return total


def token_score(row, row_mask, column, column_mask):
    """The mean over real row tokens of the largest product with a real column token; four loops in all."""
    best = []
    for token in row[row_mask]:
        products = [token @ other for other in column[column_mask]]
        best.append(max(products, key=lambda product: product.item()))
    return torch.stack(best).mean()


def tokens(images, texts, mask, present, scale, smoothing=0.0):
    """FILIP's two contrasts of the pairs that are present."""
    keep = present.nonzero()[:, 0].tolist()
    if len(keep) < 2:
        return images.sum() * 0
    full = torch.ones(images.shape[:2], dtype=torch.bool)
    to_texts = [[token_score(images[i], full[i], texts[j], mask[j]) for j in keep] for i in keep]
    to_images = [[token_score(texts[j], mask[j], images[i], full[i]) for i in keep] for j in keep]
    return sum(
        choice(scale * torch.stack([torch.stack(row) for row in rows]), range(len(keep)), smoothing) / 2
        for rows in (to_texts, to_images)
    )
