"""This process of an evaluation, and where it computes."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState

from pyramidclip_hf.loading import choose_device


def this_process(device: str, cpu: bool = False) -> "tuple[PartialState, torch.device]":
    """What Accelerate knows of the processes that were started together, and the device of this one.

    Args:
        device: "auto": an accelerator if there is one, for each process its own; or one that `choose_device` takes.
        cpu: the same as device "cpu".

    Raises:
        ValueError: no such device, both were asked for, or one device for several processes.
    """
    from accelerate import PartialState

    if cpu and device not in ("auto", "cpu"):
        raise ValueError(f"--device {device} and --cpu contradict each other")
    on_processor = cpu or device == "cpu"
    state = PartialState(cpu=on_processor)
    if on_processor or device == "auto":
        return state, state.device
    if state.num_processes > 1:
        raise ValueError(
            f"--device {device}: each of {state.num_processes} processes takes its own; expected auto or cpu"
        )
    return state, choose_device(device)
