"""Validation while training, over processes."""

import torch
from torch import nn

from tests.training.processes import run_in_processes
from training.loop.validation import ValidationSet


class Means(ValidationSet):
    """Measures the running mean of a BatchNorm and nothing else."""

    def __init__(self):
        self.bad, self.pairs, self.token_heads = [], ("global_caption",), ()

    def _by_embeddings(self, model):
        return {"global_caption": {"mean_rank": model.norm.running_mean.item()}}


def measured(rank, world_size):
    model = nn.Module()
    model.norm, model.logit_scale = nn.BatchNorm1d(1), nn.Parameter(torch.zeros(()))
    model.norm.running_mean.fill_(rank + 0.5)
    return Means().metrics(model)


def test_statistics_are_those_of_the_first_process_as_in_a_checkpoint():
    assert run_in_processes(measured, 2) == [{"validation/global_caption/mean_rank": 0.5}] * 2
