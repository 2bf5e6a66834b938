"""SimCLR between two distorted views, SLIP's image term (arXiv 2112.12750): `views_simclr`.

Unit vectors a_i and b_i of N pictures: row a_i chooses b_i among all b_j and all other a_j, at a fixed temperature, and
row b_i likewise; the mean over 2 N rows. The vectors come from a perceptron on the towers' pooled output, before the
projection, which is thrown away after training.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from training.loop.distributed import gather_rows, rank, world_size
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

VIEWS = ("view1", "view2")


class ImageContrast(Term):
    """`views_simclr`.

    Args:
        name: Of the term.
        weight: In the objective.
        options: `hidden` and `out`, widths of the perceptron, and `temperature`.
        config: Of the model.
    """

    def __init__(self, name: str, weight: float, options: Mapping[str, Any], config: PyramidCLIPConfig):
        super().__init__()
        self.name, self.weight = name, weight
        self._options = read_options(name, options, hidden=4096, out=256, temperature=0.1)
        at_least(name, self._options, hidden=1, out=1, temperature=1e-3)
        self.wanted = tuple(Wanted(view, "pooled") for view in VIEWS)
        hidden = self._options["hidden"]
        self.head = nn.Sequential(
            nn.Linear(config.vision_config.hidden_size, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, self._options["out"]),
        )

    def options(self) -> dict[str, Any]:
        """As given, defaults filled in."""
        return self._options

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """Activations of two passes through the head, vectors of everyone, and logits of 2 own x 2 everyone."""
        hidden, out = self._options["hidden"], self._options["out"]
        return 4 * (2 * own * (6 * hidden + 3 * out) + 4 * everyone * out + 4 * (2 * own) * (2 * everyone))

    def loss_operations(self, everyone: int, tokens: Mapping[str, int]) -> float:
        """Two passes through the heads and back: six for each weight and view."""
        return 2.0 * 6 * sum(parameter.numel() for parameter in self.head.parameters() if parameter.dim() > 1)

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """What the head reads: its BatchNorm has to see the whole batch."""
        return {one.level: wide(encoded[one]) for one in self.wanted}

    def share(self, rows: Rows, step: Step) -> Share:
        """See the module."""
        with self.autocast(step.scale.device):
            projected = [self.head(rows[view]) for view in VIEWS]
        first, second = (F.normalize(wide(one), dim=-1) for one in projected)
        number, total = len(first), len(first) * world_size()
        everyone = gather_rows(torch.stack([first, second], dim=1))
        columns = torch.cat([everyone[:, 0], everyone[:, 1]])
        logits = torch.cat([first, second]) @ columns.T / self._options["temperature"]
        own = rank() * number + torch.arange(number, device=logits.device)
        oneself = torch.cat([own, own + total])[:, None]
        partner = torch.cat([own + total, own])[:, None]
        others = logits.scatter(1, oneself, float("-inf"))
        losses = softened_choice(
            torch.logsumexp(others, dim=1),
            logits.gather(1, partner)[:, 0],
            logits.sum(1) - logits.gather(1, oneself)[:, 0],
            2 * total - 1,
            step.smoothing if total > 1 else 0.0,
        )
        answers = torch.tensor(2 * total - 1, device=logits.device)
        return Share(losses.sum() / (2 * total), answers)
