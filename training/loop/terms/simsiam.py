"""SimSiam between two distorted views, DeCLIP's image term (arXiv 2110.05208): `views_simsiam`.

z is a perceptron's output on the projected embedding before it is normalised, p another's on z. Each view's p is to
point where the other view's z points, which is held: -1/2 (cos(p1, z2) + cos(p2, z1)), the mean over pictures. No
negatives, so no smoothing, and nothing that chance would give.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from training.loop.distributed import world_size
from training.loop.task import NO_CHOICE
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
    wide,
)

VIEWS = ("view1", "view2")


class ImageLikeness(Term):
    """`views_simsiam`.

    Args:
        name: Of the term.
        weight: In the objective.
        options: `width` of the projector's layers, `bottleneck` of the predictor's.
        config: Of the model.
    """

    def __init__(self, name: str, weight: float, options: Mapping[str, Any], config: PyramidCLIPConfig):
        super().__init__()
        self.name, self.weight = name, weight
        self._options = read_options(name, options, width=1024, bottleneck=512)
        at_least(name, self._options, width=1, bottleneck=1)
        width, bottleneck = self._options["width"], self._options["bottleneck"]
        self.wanted = tuple(Wanted(view, "embedding") for view in VIEWS)
        self.projector = nn.Sequential(
            nn.Linear(config.projection_dim, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
        )
        self.predictor = nn.Sequential(
            nn.Linear(width, bottleneck), nn.BatchNorm1d(bottleneck), nn.ReLU(), nn.Linear(bottleneck, width)
        )

    def options(self) -> dict[str, Any]:
        """As given, defaults filled in."""
        return self._options

    def loss_bytes(self, own: int, everyone: int, tokens: Mapping[str, int]) -> int:
        """Activations of two passes through both perceptrons."""
        return 4 * 2 * own * (9 * self._options["width"] + 3 * self._options["bottleneck"])

    def loss_operations(self, everyone: int, tokens: Mapping[str, int]) -> float:
        """Two passes through the heads and back: six for each weight and view."""
        return 2.0 * 6 * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() > 1)

    def rows(self, encoded: Encoded, batch: Tensors) -> dict[str, torch.Tensor]:
        """What the projector reads: its BatchNorm has to see the whole batch."""
        return {one.level: wide(encoded[one]) for one in self.wanted}

    def share(self, rows: Rows, step: Step) -> Share:
        """See the module."""
        with self.autocast(step.scale.device):
            targets = [self.projector(rows[view]) for view in VIEWS]
            predicted = [self.predictor(target) for target in targets]
        cosines = [
            F.cosine_similarity(wide(own), wide(other.detach()), dim=1)
            for own, other in zip(predicted, reversed(targets), strict=True)
        ]
        total = len(cosines[0]) * world_size()
        return Share(-(cosines[0] + cosines[1]).sum() / (2 * total), torch.tensor(NO_CHOICE, device=step.scale.device))
