"""A third kind of training, written here against the contract alone: its own optimizer, schedule, losses and state."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from tests.training.processes import run_in_processes
from tests.training.runs import MODEL_CONFIG, MemoryReader, after_step, assert_equal_runs, die, logged
from training.loop import run as loop
from training.loop.identity import IdentityError
from training.loop.initial_model import named_model
from training.loop.run_folder import list_checkpoints
from training.loop.task import Objective, StepLoss, Task, plan_steps
from training.settings.run import RunSettings


class Queue(nn.Module):
    """The mean embedding of each of the last batches."""

    def __init__(self, size, width):
        super().__init__()
        self.rows = nn.Buffer(torch.zeros(size, width))
        self.last = None

    def push(self):
        self.rows.copy_(torch.cat([self.rows[1:], self.last[None]]))


class Spread(Objective):
    """Embeddings of pictures, pulled apart from those of the batches before, through a head that is not the model's."""

    terms = ("away", "small")

    def __init__(self, model, queue):
        super().__init__()
        self.model, self.queue, self.head = model, queue, nn.Linear(8, 8)

    def forward(self, batch):
        embeds = self.head(self.model.encode_image(batch["pixel_values"]))
        losses = torch.stack([(embeds @ self.queue.rows.T).square().mean(), embeds.square().mean()])
        self.queue.last = embeds.detach().mean(0)
        shares = torch.cat([losses.sum()[None], losses]).detach()
        return StepLoss(losses.sum(), shares, torch.zeros(0, dtype=torch.int64))


@dataclass
class SpreadTask(Task):
    settings: RunSettings
    objective: Spread
    processor: object
    reader: MemoryReader
    plan: object

    name = "spread"

    def build_optimizer(self):
        parameters = [p for p in self.objective.parameters() if p.requires_grad]
        return torch.optim.SGD(parameters, momentum=0.9)

    def learning_rate(self, step):
        return self.settings.learning_rate * 0.1 ** (step // 4)

    def after_step(self, stepped):
        self.objective.queue.push()

    @property
    def kept(self):
        return {"queue": self.objective.queue, "head": self.objective.head}

    def describe_objective(self):
        return "spread"

    def write_card(self, folder, record):
        (folder / "README.md").write_text("spread", encoding="utf8")


@dataclass(kw_only=True)
class SpreadSettings(RunSettings):
    overfit_batches = 0


def spread_task(args, accelerator, folder):
    model, processor = named_model("ViT-B-32", MODEL_CONFIG, args.seed)
    objective = Spread(model, Queue(3, 8)).train()  # the model freezes its patch convolution here
    reached = set(model.level_parameters(("global",))) - {"logit_scale"}
    for name, parameter in model.named_parameters():
        if name not in reached:
            parameter.requires_grad_(False)
    reader = MemoryReader(args)
    plan = plan_steps(reader.samples, args.global_batch_size, epochs=args.epochs)
    return SpreadTask(args, objective.to(accelerator.device), processor, reader, plan)


def settings(folder, **changes):
    chosen = {
        "output_dir": str(folder), "global_batch_size": 8, "epochs": 2, "learning_rate": 0.1, "precision": "fp32",
        "log_every_steps": 1, "save_every_steps": 3, "trackers": ["none"],
    }  # fmt: skip
    return SpreadSettings(**{**chosen, **changes})


def spread_run(rank, world_size, args, killed_after=None):
    if killed_after:
        after_step(killed_after, die)
    return loop.complete_run(args, spread_task).steps


def test_a_third_kind_of_training_needs_its_task_and_its_settings_alone(tmp_path):
    result = loop.complete_run(settings(tmp_path), spread_task)
    assert result.finished and result.steps == 10 and (result.final / "README.md").read_text() == "spread"
    assert logged(tmp_path, "learning_rate") == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 2)
    assert len(logged(tmp_path, "loss/away")) == 10
    assert not logged(tmp_path, "logit_scale") and not logged(tmp_path, "chance/away")
    with pytest.raises(IdentityError, match="schedule.learning_rate: was 0.1, is now 0.2"):
        loop.complete_run(settings(tmp_path, learning_rate=0.2, resume="latest"), spread_task)


def test_an_epoch_of_a_few_batches_is_those():
    plan = plan_steps(100, 8, epochs=3)
    assert (plan.steps_per_epoch, plan.total_steps) == (12, 36)
    plan = plan_steps(100, 8, epochs=3, overfit_batches=2)
    assert (plan.steps_per_epoch, plan.total_steps) == (2, 6)


def test_what_a_task_keeps_comes_back(tmp_path):
    plain, killed = tmp_path / "a", tmp_path / "b"
    assert run_in_processes(spread_run, 1, settings(plain)) == [10]
    with pytest.raises(AssertionError):
        run_in_processes(spread_run, 1, settings(killed), 7)
    assert list_checkpoints(killed)[-1].name == "step-00000006"
    run_in_processes(spread_run, 1, settings(killed, resume="latest"))
    assert_equal_runs(plain, killed, kept=("queue", "head"))
