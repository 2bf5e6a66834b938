"""What the loop knows of a kind of training: the contract `Task`, and the types that it speaks of.

A kind of training is one file with its task and one with its settings: `training.pretrain` is one, `training.finetune`
another. `training.loop.run` trains any of them and imports none.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from training.data.order import ORDER_RULE
from training.loop.checkpoint import Stateful
from training.loop.distributed import world_size
from training.loop.identity import Identity, model_identity
from training.loop.optim import build_optimizer, learning_rate_at
from training.settings.fields import identity_of
from training.settings.run import RunSettings, told_processes

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

# Among the `counts` of a `StepLoss`, for a term that chooses among nothing.
NO_CHOICE = -1

Batch = dict[str, torch.Tensor]
Metrics = dict[str, float]


class StepLoss(NamedTuple):
    """Losses of one step.

    Attributes:
        loss: Scalar with gradient, this process's share times the number of processes, by which DDP divides again.
        shares: (1 + terms,) float, without gradient: this process's share of the global loss, then of each term; their
            sums over processes are the global means.
        counts: (terms,) int64, pairs N_t that the term ran on, global, of which the right one is to be found; of other
            kinds, see `training.loop.terms.term.Share.answers`. (0,) where the terms are not over pairs.
    """

    loss: torch.Tensor
    shares: torch.Tensor
    counts: torch.Tensor


class Objective(nn.Module):
    """A model under a loss, so that a training step is one forward, which gives a `StepLoss`.

    Attributes:
        model: What is saved. Parameters of the objective outside of it are trained too; `Task.kept` keeps them.
        terms: Names of the losses that the log shows, in the order of `StepLoss.shares`.
    """

    model: PreTrainedModel
    terms: tuple[str, ...]


class Reader(Protocol):
    """The training data of one process; `training.data.loader.BatchReader` is one."""

    @property
    def fingerprint(self) -> str:
        """Equal where the data is, wherever it lies."""

    @property
    def description(self) -> list[dict[str, Any]]:
        """What the data is, for the model card: of each set its `name`, number of `samples`, and the like."""

    def batches(self, epoch: int, position: int) -> Iterator[dict[str, Any]]:
        """Tensors of this process's rows, and their `sample_keys`, from sample `position` of a pass to its end."""

    def read_here(self) -> None:
        """From the next call of `batches` on, without processes of its own, which have died."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: counts, of which those of several processes may be added up."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from `state()`."""

    def metrics(self) -> Metrics:
        """What the log says of the data."""

    @property
    def recent_bad(self) -> int:
        """Samples that could not be read, of those that this process came by lately."""

    def check_bad(self, number: int) -> None:
        """Raises `DataError` where so many in all processes together are too many."""

    def report(self) -> list[str]:
        """Lines for the end of a run; all processes call it together."""

    def close(self) -> None:
        """Ends the processes that read."""


@dataclass(frozen=True)
class Plan:
    """How long a run is. All sizes are samples; steps are optimizer steps."""

    samples: int
    steps_per_epoch: int
    total_steps: int
    per_device_batch_size: int


def plan_steps(
    samples: int,
    global_batch_size: int,
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
    overfit_batches: int = 0,
) -> Plan:
    """The length of a run on all processes.

    Args:
        samples: In one pass over the data.
        global_batch_size: Of all processes together, which share it evenly.
        epochs: Passes over the data, where `max_steps` is None.
        max_steps: Optimizer steps, where `epochs` is None.
        overfit_batches: The first so many batches are the whole data; 0: all of them.

    Raises:
        ValueError: The data is smaller than one global batch, or than `overfit_batches`; with the arithmetic.
    """
    per_device = global_batch_size // world_size()
    steps_per_epoch = samples // global_batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"the data has {samples} samples, fewer than one global batch: {told_processes(world_size())} x "
            f"{per_device} = {global_batch_size}. Lower global_batch_size to at most {samples}, or add data"
        )
    if overfit_batches:
        if overfit_batches > steps_per_epoch:
            raise ValueError(
                f"overfit_batches {overfit_batches}: the data has only {steps_per_epoch} batches of {global_batch_size}"
            )
        steps_per_epoch = overfit_batches
    return Plan(samples, steps_per_epoch, max_steps or (epochs or 0) * steps_per_epoch, per_device)


class Task(Protocol):
    """What is trained. A task derives from this class and says what differs from the bodies here.

    Attributes:
        name: Of the progress bar.
        settings: Those of the run.
        objective: On the device of its process. What the loss does not reach has lost `requires_grad`, as DDP expects.
        processor: Saved beside the model.
        reader: The training data of this process.
        plan: How long the run is.
    """

    name: str
    settings: RunSettings
    objective: Objective
    processor: PyramidCLIPProcessor
    reader: Reader
    plan: Plan

    # How it is trained

    def build_optimizer(self) -> torch.optim.Optimizer:
        """AdamW of the settings over the objective's parameters."""
        settings = self.settings
        betas = (settings.adam_beta1, settings.adam_beta2)
        return build_optimizer(
            self.objective, settings.learning_rate, settings.weight_decay, betas, settings.adam_epsilon
        )

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, from 0: a linear rise, then half a cosine."""
        settings = self.settings
        return learning_rate_at(
            step,
            self.plan.total_steps,
            settings.learning_rate,
            settings.warmup_fraction,
            settings.final_learning_rate_fraction,
        )

    def begin_epoch(self, epoch: int) -> None:
        """Called before the first step of a pass over the data, and where a run continues within one."""
        return

    def backward(self, accelerator: Any, wrapped: nn.Module, batch: Batch) -> StepLoss:
        """Adds the gradients of the global batch to the parameters.

        Args:
            accelerator: Accelerate's `Accelerator`, whose `backward` scales where fp16 needs it.
            wrapped: The prepared objective: DDP, or `objective` itself.
            batch: This process's rows, on its device.
        """
        losses: StepLoss = wrapped(batch)
        accelerator.backward(losses.loss)
        return losses

    def after_step(self, stepped: bool) -> None:
        """Called after the optimizer's step. stepped: it was made, and not skipped by the scaler of fp16."""
        return

    # What must stay the same, and what is kept

    def identity(self) -> Identity:
        """What a checkpoint must agree on to be continued, see `training.loop.identity`.

        What the settings say, and what is known of data, length and model once they are there.
        """
        said = identity_of(self.settings)
        return {
            **said,
            "data": {
                "fingerprint": self.reader.fingerprint,
                "samples": self.plan.samples,
                "order_rule": ORDER_RULE,
                **said["data"],
            },
            "schedule": {"total_steps": self.plan.total_steps, **said["schedule"]},
            "model": model_identity(self.objective.model.config),
        }

    @property
    def kept(self) -> Mapping[str, Stateful]:
        """File name -> what a checkpoint holds as NAME.safetensors beside model and optimizer: an average, a queue.

        The first process writes its own, and all read that.
        """
        return {}

    # What is measured and said

    @property
    def logit_scale(self) -> torch.Tensor | None:
        """The parameter, a logarithm, that the log shows, where the objective has one."""
        return None

    @property
    def eval_every_steps(self) -> int:
        """Optimizer steps from one `evaluate` to the next; 0: only at the end."""
        return 0

    def batch_metrics(self, batch: Batch) -> Metrics:
        """What the log says of the newest batch, on the host; all processes call it together."""
        return {}

    def evaluate(self) -> Metrics:
        """What is measured again and again; all processes call it together. The objective may be left in any mode."""
        return {}

    def final_metrics(self) -> Metrics:
        """What is measured of the finished model alone, beside `evaluate`."""
        return {}

    def describe_objective(self) -> str:
        """A line for the dry run."""
        ...

    # What is left behind

    @property
    def variants(self) -> Mapping[str, AbstractContextManager[None]]:
        """Name -> a context inside of which the model has other weights, measured and saved as RUN/final-NAME too."""
        return {}

    def record(self) -> dict[str, Any]:
        """What `training.json` holds beside settings, length, data and metrics."""
        return {}

    def write_beside(self, folder: Path) -> None:
        """Writes what belongs beside a saved model and is no part of it."""
        return

    def write_card(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Writes README.md beside a saved model. record: what its `training.json` holds."""
        ...

    @property
    def repository(self) -> str | None:
        """Id of the repository that receives the final model; None: it is not published."""
        return None
