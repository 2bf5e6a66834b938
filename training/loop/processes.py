"""The processes of a run: Accelerate's start, engines that are refused, and BatchNorm over several of them."""

import importlib.util
import os
import warnings
from pathlib import Path

import torch

from training.settings.pretraining import PretrainingArguments


def start_processes(args: PretrainingArguments, folder: Path):
    """The Accelerator: processes, device, fp16 scaler, trackers. Refuses engines that this model cannot run under."""
    try:
        from accelerate import Accelerator, PartialState
        from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
    except ImportError as error:
        raise ImportError('pre-training needs accelerate: pip install -e ".[train]"') from error
    if "tensorboard" in args.trackers and importlib.util.find_spec("tensorboard") is None:
        raise ImportError('trackers: tensorboard is not installed: pip install -e ".[train]", or set trackers: none')
    # Said here because a launcher without --cpu leaves several processes on a machine without GPU unconnected.
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if PartialState(cpu=cpu).device.type == "cpu" and args.precision == "fp16":
        raise ValueError("precision fp16 needs a GPU; on CPU use bf16 or fp32")
    # Without SyncBatchNorm the first process's running statistics are everyone's, so that what is evaluated and saved
    # does not depend on who does it; with it they are equal by themselves.
    own_statistics = not synchronised_batch_norm(args)
    accelerator = Accelerator(
        cpu=cpu,
        # bf16 is the objective's own autocast; only fp16 needs Accelerate's gradient scaler.
        mixed_precision="fp16" if args.precision == "fp16" else "no",
        log_with=args.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=own_statistics, gradient_as_bucket_view=True)],
    )
    # DDP says this of depth-wise convolutions, whose gradients may have either of two equal layouts.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    check_engine(accelerator.distributed_type)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _settle_deepspeed(args, accelerator)
    return accelerator


def check_engine(distributed_type: str) -> None:
    """ValueError for an engine of Accelerate that the model cannot be trained under."""
    if distributed_type == "FSDP":
        raise ValueError(
            "FSDP is refused: BatchNorm's running statistics are buffers that FSDP neither shards nor keeps equal, the "
            "0-d logit_scale cannot be sharded, and there is nothing to gain: weights, gradients and AdamW of ViT-L-14 "
            "take 7 GB. Use DDP (training/configs/accelerate/one_node.yaml) or DeepSpeed ZeRO-2"
        )


def _settle_deepspeed(args, accelerator):
    if args.per_device_chunk_size or args.precision == "fp16":
        raise ValueError(
            "under DeepSpeed, per_device_chunk_size and precision fp16 are not possible; use DDP, "
            "or bf16 without chunks"
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = args.per_device_batch_size(accelerator.num_processes)
    config["gradient_accumulation_steps"] = 1
    config["gradient_clipping"] = args.max_grad_norm or 0.0


def synchronised_batch_norm(args: PretrainingArguments) -> bool:
    """Whether BatchNorm takes its statistics over all processes."""
    from accelerate import PartialState

    processes = PartialState()  # SyncBatchNorm refuses CPU tensors
    return args.sync_batch_norm and processes.num_processes > 1 and processes.device.type == "cuda"
