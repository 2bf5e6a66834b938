"""One process of a group, started by `tests.gpu`: `python -m tests.gpu.processes BACKEND DEVICE STORE`.

Each computes the whole batch by itself first, then its rows of it as one of the group; the first prints, a JSON line a
case, how far losses and gradients of the two are apart. All processes use the same device.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from pyramidclip_hf.loss_pyramidclip import DEFAULT_LOSS_WEIGHTS
from tests.training.tiny import RESNET, VIT, rows_of, tiny_batch, tiny_model
from training.loop.distributed import sum_over_processes
from training.loop.objective import ContrastiveObjective

# BatchNorm sees the whole batch only under SyncBatchNorm, which refuses CPU tensors.
CASES: dict[str, tuple[Mapping, bool]] = {
    "ViT without BatchNorm": ({**VIT, "num_leff_layers": 0}, False),
    "ViT, SyncBatchNorm": (VIT, True),
    "ResNet, SyncBatchNorm": (RESNET, True),
}


def gradients_of(
    tower: Mapping, batch: Mapping[str, torch.Tensor], device: torch.device, grouped: bool, synchronised: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(losses, gradients by name) of a step; `grouped`: as one of a group, under DDP."""
    model = tiny_model(tower)
    if synchronised:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    objective = ContrastiveObjective(model, DEFAULT_LOSS_WEIGHTS, 0.2).to(device)
    wrapped: nn.Module = objective
    if grouped:
        wrapped = nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    losses = wrapped({name: value.to(device) for name, value in batch.items()})
    losses.loss.backward()
    found = {name: value.grad for name, value in objective.named_parameters() if value.grad is not None}
    return sum_over_processes(losses.shares), found


def main(argv: Sequence[str]) -> int:
    """Runs the cases; see the module."""
    backend, device, store = argv[0], torch.device(argv[1]), argv[2]
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.backends.cudnn.allow_tf32 = False
    cases = {name: case for name, case in CASES.items() if device.type == "cuda" or not case[1]}
    batches = {name: tiny_batch(image_size=tower["image_size"]) for name, (tower, _) in cases.items()}
    whole = {name: gradients_of(tower, batches[name], device, False, False) for name, (tower, _) in cases.items()}
    # Two processes of a busy CPU begin far apart; on a GPU a part has its seconds.
    patience = timedelta(seconds=50 if device.type == "cuda" else 600)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    for name, (tower, synchronised) in cases.items():
        losses, gradients = gradients_of(tower, rows_of(batches[name], rank, count), device, True, synchronised)
        scale = max(value.abs().max().item() for value in whole[name][1].values())
        apart = max((value - whole[name][1][key]).abs().max().item() for key, value in gradients.items()) / scale
        if rank == 0:
            of_losses = (losses - whole[name][0]).abs().max().item()
            print(json.dumps({"case": name, "losses": of_losses, "gradients": apart}), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
