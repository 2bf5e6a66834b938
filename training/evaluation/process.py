"""This process of an evaluation, and where it computes."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from accelerate import PartialState

from pyramidclip_hf.loading import choose_device


def this_process(device: str, cpu: bool = False) -> "tuple[PartialState, torch.device]":
    """What Accelerate knows of the processes that were started together, and the device of this one.

    Args:
        device: "auto": an accelerator if there is one, for each process its own; or one that `choose_device` takes.
        cpu: the same as device "cpu".

    Raises:
        ValueError: no such device, both were asked for, or one device for several processes, or fewer GPUs than
            processes.
    """
    from accelerate import PartialState

    if cpu and device not in ("auto", "cpu"):
        raise ValueError(f"--device {device} and --cpu contradict each other")
    on_processor = cpu or device == "cpu"
    state = PartialState(cpu=on_processor)
    check_own_gpu()
    if on_processor or device == "auto":
        return state, state.device
    if state.num_processes > 1:
        raise ValueError(
            f"--device {device}: each of {state.num_processes} processes takes its own; expected auto or cpu"
        )
    return state, choose_device(device)


def check_own_gpu() -> None:
    """After Accelerate's start, which lets processes share GPUs where there are too few: NCCL refuses that, later.

    Raises:
        ValueError: the processes of this machine talk through NCCL and are more than its GPUs.
    """
    if not dist.is_initialized() or dist.get_backend() != "nccl":
        return
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if here > gpus:
        raise ValueError(
            f"{here} processes were started on this machine, which shows {gpus} GPUs: NCCL refuses two processes on "
            f"one. Start {gpus} (--num_processes {gpus}, or --nproc-per-node {gpus}), or look at CUDA_VISIBLE_DEVICES"
        )


# The default group that it belongs to, and the group.
_hosts: list[tuple[Any, Any]] = []


def hosts() -> Any:
    """The gloo group in which hosts tell each other things; the first call makes it, on all processes together.

    Not the devices' group: what takes the first process an hour would end that, and what is told would lie on devices.
    """
    world = dist.group.WORLD
    if not _hosts or _hosts[-1][0] is not world:
        _hosts[:] = [(world, dist.new_group(backend="gloo", timeout=timedelta(days=1)))]
    return _hosts[-1][1]
