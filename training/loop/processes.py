"""The processes of a run: Accelerate's start, engines that are refused, and BatchNorm over several of them."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from pyramidclip_hf.loading import check_device, warn_of_slow_type
from training.evaluation.process import check_own_gpu
from training.loop.agreement import together
from training.loop.network import choose_gloo_interface
from training.settings.run import RunSettings

# Engines of Accelerate, values of `DistributedType`, that no model of ours can be trained under -> why.
REFUSED = {
    "FSDP": "BatchNorm's running statistics are buffers that FSDP neither shards nor keeps equal, the 0-d logit_scale "
    "cannot be sharded",
    "DEEPSPEED": "DeepSpeed cannot send a 0-d parameter, which logit_scale is (0.19.8 ends in its first broadcast), "
    "ZeRO-3 would save empty weights, and under ZeRO-1 and 2 the optimizer steps from a copy of logit_scale that its "
    "bound does not reach",
}

# Engines of Accelerate and the variables in which its launcher asks for them.
ENGINES = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED", "FSDP": "ACCELERATE_USE_FSDP"}

# What CUDA's matrix products need to run in one order, and the values with which they do.
WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


@contextlib.contextmanager
def algorithms(deterministic: bool) -> Iterator[None]:
    """Inside, torch uses deterministic algorithms alone, where asked for; afterwards, what it used before.

    Raises:
        ValueError: CUDA has started in this process without the workspace that this needs.
        RuntimeError: Inside, torch's own, of an operation that has no deterministic algorithm.
    """
    if not deterministic:
        yield
        return
    workspace = os.environ.get(WORKSPACE)
    if workspace not in WORKSPACES:
        if torch.cuda.is_initialized():
            raise ValueError(
                f"deterministic: CUDA has started in this process already, without {WORKSPACE}: set it to "
                f"{WORKSPACES[0]} before Python starts, or train in a process of its own"
            )
        os.environ[WORKSPACE] = WORKSPACES[0]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
        if not torch.cuda.is_initialized():  # else it is what CUDA goes on with
            os.environ.pop(WORKSPACE)
            os.environ.update({} if workspace is None else {WORKSPACE: workspace})


def form_group(settings: RunSettings) -> Any:
    """Makes the group of the processes that were started together; Accelerate's `PartialState`.

    No engine has a part in it, so that processes of which only some were told to use one meet, and end together.

    Raises:
        ImportError: Accelerate is not installed; the message names the extra.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('pre-training needs accelerate: pip install -e ".[train]"') from error
    choose_gloo_interface()
    with _without_engines():
        # The first call makes the group of the processes, so their time-out has to be said here.
        return PartialState(cpu=_on_processors(), timeout=process_timeout(settings))


def start_accelerator(settings: RunSettings, folder: Path) -> Any:
    """Accelerate's `Accelerator` for a run in `folder`: device, fp16 scaler, trackers; after `form_group`.

    All processes call it together, and where one cannot, none can.

    Raises:
        ValueError: The engine or the precision is one that cannot be trained under here, torch was not built for the
            GPU, or there are fewer GPUs than processes.
        ImportError: A tracker is not installed.
        OtherProcessFailed: What another process raised.
    """
    accelerator = together(lambda: _accelerator(settings, folder))
    # DDP says this of depth-wise convolutions, whose gradients may have either of two equal layouts.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warn_of_slow_type("--precision", settings.precision, accelerator.device)
    return accelerator


def _accelerator(settings: RunSettings, folder: Path) -> Any:
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    for engine, variable in ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":
            check_engine(engine)
    check_trackers(settings.trackers)
    check_own_gpu()
    device = PartialState().device
    check_device(device)
    if device.type == "cpu" and settings.precision == "fp16":
        raise ValueError("precision fp16 needs a GPU; on CPU use bf16 or fp32")
    # Without SyncBatchNorm the first process's running statistics are everyone's, so that what is evaluated and saved
    # does not depend on who does it; with it they are equal by themselves.
    own_statistics = not synchronised_batch_norm(settings)
    accelerator = Accelerator(
        cpu=_on_processors(),
        # bf16 is the objective's own autocast; only fp16 needs Accelerate's gradient scaler.
        mixed_precision="fp16" if settings.precision == "fp16" else "no",
        log_with=settings.trackers or None,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=own_statistics, gradient_as_bucket_view=True)],
    )
    check_engine(accelerator.distributed_type)
    return accelerator


def _on_processors() -> bool:
    # Said because a launcher without --cpu leaves several processes on a machine without GPU unconnected.
    return os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" or not torch.accelerator.is_available()


@contextlib.contextmanager
def _without_engines() -> Iterator[None]:
    """Inside, Accelerate does not know which engine its launcher was asked for."""
    asked = {name: os.environ.pop(name) for name in ENGINES.values() if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(asked)


def check_trackers(names: Sequence[str]) -> None:
    """Refuses trackers that would log nothing, which Accelerate leaves out with a warning.

    Raises:
        ValueError: Accelerate knows none of that name.
        ImportError: The tracker is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    usable = {str(kind) for kind in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(
                f"trackers: expected some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}, or none; got {name}"
            )
        if name not in usable:
            package = '-e ".[train]"' if name == "tensorboard" else name
            raise ImportError(f"trackers: {name} is not installed: pip install {package}, or set trackers: none")


def process_timeout(settings: RunSettings) -> timedelta:
    """How long a device's collective waits: a minute longer than the watch, which says for whom (`loop.watch`)."""
    return timedelta(minutes=settings.process_timeout_minutes + 1)


def check_engine(distributed_type: str) -> None:
    """Refuses an engine of Accelerate, a value of `DistributedType`.

    Raises:
        ValueError: No model of ours can be trained under it.
    """
    if distributed_type in REFUSED:
        raise ValueError(
            f"the engine is refused: {REFUSED[distributed_type]}, and there is nothing to gain: weights, "
            "gradients and AdamW of ViT-L-14 take 7 GB. Use DDP (training/configs/accelerate/one_node.yaml)"
        )


def synchronised_batch_norm(settings: RunSettings) -> bool:
    """Whether BatchNorm takes its statistics over all processes."""
    from accelerate import PartialState

    processes = PartialState()  # SyncBatchNorm refuses CPU tensors
    return settings.sync_batch_norm and processes.num_processes > 1 and processes.device.type == "cuda"
