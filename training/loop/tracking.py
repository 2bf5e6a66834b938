"""What a run says about itself: metrics.jsonl, Accelerate's trackers, and the stop at a loss that is not finite.

Nothing here waits for the device during a step. `StepWindow` keeps the losses of recent steps where they were
computed, sums them over the processes and fetches them in one transfer every `log_every_steps`. A loss that is not
finite is therefore found at the end of its window, but reported with its own step, terms and sample keys.

One line of metrics.jsonl is one JSON object: `step`, and either training metrics

    loss/total, loss/TERM       global means over the window's steps
    chance/TERM                 ln N_t, what a model that knows nothing has; of a term that chooses among other things
                                than pairs, the logarithm of their number
    empty_steps/TERM            steps of the window in which fewer than two samples had both levels, or the term had
                                nothing to choose among, where there are any (the term was 0)
    learning_rate, logit_scale, temperature (its inverse), grad_norm (before clipping), epoch        the window's last
    samples_per_second, data_wait_share, seconds        of all processes, see `training.loop.pace`; these and the next
    data_wait_share_largest, slowest_process, slowest_time    three alone differ between two equal runs
    data/bad_fraction, data/bad_fraction_largest, data/truncated_LEVEL, duplicates/LEVEL
    data/share_NAME             of all samples so far, those of each data set, where there are several

or `validation/TERM/METRIC`.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from pyramidclip_command import Failure
from pyramidclip_hf.files import is_full, json_text, write_atomically
from pyramidclip_hf.levels_pyramidclip import LEVELS, levels_of_kind
from training.loop.distributed import everyone, rank, sum_over_processes
from training.loop.record import sum_of
from training.loop.task import NO_CHOICE, StepLoss


class NonFiniteLoss(Failure):
    """A loss or gradient norm was NaN or infinite; the message has step, each term, and where the sample keys are."""


# Of one step: `step`, `loss`, `terms` and `counts` by name, `grad_norm`, `learning_rate`, perhaps `logit_scale`.
Row = dict[str, Any]


class _Pending(NamedTuple):
    """A step whose numbers are still where they were computed; values: gradient norm, and the scale where it is."""

    step: int
    shares: torch.Tensor
    counts: torch.Tensor
    values: torch.Tensor
    learning_rate: float
    sample_keys: list[str]


class StepWindow:
    """The steps since the last line of the log.

    Args:
        terms: Names of the loss terms, in the order of `StepLoss.shares`.
        run_dir: Where sample keys go when a loss is not finite.
        check_gradients: Also stop at a gradient norm that is not finite; not under fp16, where the scaler skips such
            steps by design.
        rows: Those of a run that is continued.
    """

    def __init__(self, terms: Sequence[str], run_dir: Path, check_gradients: bool, rows: Sequence[Row] = ()):
        self.terms = tuple(terms)
        self.run_dir = Path(run_dir)
        self.check_gradients = check_gradients
        # A checkpoint spells what JSON has no number for: a norm that overflowed in fp16.
        self._rows = [row | {"grad_norm": float(row["grad_norm"])} for row in rows]
        self._pending: list[_Pending] = []

    def add(
        self,
        step: int,
        losses: StepLoss,
        grad_norm: torch.Tensor,
        logit_scale: torch.Tensor | None,
        learning_rate: float,
        sample_keys: Sequence[str],
    ) -> None:
        """Remembers a step.

        Args:
            step: Its number, from 1.
            losses: As the objective gave them.
            grad_norm: 0-d, before clipping.
            logit_scale: The parameter (a logarithm) after the step, None where the objective has none.
            learning_rate: Of the step.
            sample_keys: Of this process's rows.
        """
        scale = [] if logit_scale is None else [logit_scale.detach().float().exp()]
        values = torch.stack([grad_norm.detach().float(), *scale])
        pending = _Pending(step, losses.shares.float(), losses.counts, values, learning_rate, list(sample_keys))
        self._pending.append(pending)

    def rows(self) -> list[Row]:
        """One for each step of the window; all processes call it together.

        Raises:
            NonFiniteLoss: On every process, at the first step whose losses or gradient norm are not finite.
        """
        if self._pending:
            shares = sum_over_processes(torch.stack([entry.shares for entry in self._pending])).cpu()
            counts = torch.stack([entry.counts for entry in self._pending]).cpu()
            values = torch.stack([entry.values for entry in self._pending]).cpu()
            rows = [
                self._row(entry, shares[i].tolist(), counts[i].tolist(), values[i].tolist())
                for i, entry in enumerate(self._pending)
            ]
            own = next((i for i, row in enumerate(rows) if not self._is_finite(row)), len(rows))
            first = min(everyone(own))  # a norm may be finite elsewhere
            if first < len(rows):
                self._stop(rows[first], self._pending[first].sample_keys)
            self._rows += rows
            self._pending = []
        return self._rows

    def _row(self, entry: _Pending, shares: list[float], counts: list[int], values: list[float]) -> Row:
        return {
            "step": entry.step,
            "loss": shares[0],
            "terms": dict(zip(self.terms, shares[1:])),
            "counts": dict(zip(self.terms, counts)),
            "grad_norm": values[0],
            "learning_rate": entry.learning_rate,
        } | ({"logit_scale": values[1]} if len(values) > 1 else {})

    def _is_finite(self, row: Row) -> bool:
        values = [row["loss"], *row["terms"].values()] + ([row["grad_norm"]] if self.check_gradients else [])
        return all(map(math.isfinite, values))

    def _stop(self, row: Row, sample_keys: list[str]) -> NoReturn:
        folder = self.run_dir / "nonfinite"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{row['step']:08d}-process-{rank():05d}.json"
        path.write_text(json_text(row | {"sample_keys": sample_keys}, indent=1) + "\n", encoding="utf-8")
        everyone(None)  # every process has written its keys before one of them ends the run
        terms = ", ".join(f"{name} {value:.4g}" for name, value in row["terms"].items())
        scale = f"softmax scale {row['logit_scale']:.4g}, " if "logit_scale" in row else ""
        raise NonFiniteLoss(
            f"step {row['step']}: loss {row['loss']:.4g}{f' ({terms})' if terms else ''}, "
            f"gradient norm {row['grad_norm']:.4g}, {scale}"
            f"learning rate {row['learning_rate']:.3g}. The keys of this step's samples are in {folder}. The "
            f"last checkpoint is from before this "
            "window and intact. Usual causes: learning rate too high or warm-up too short, fp16 (use bf16), "
            "damaged region features"
        )

    def metrics(self) -> dict[str, float]:
        """The averages of the window, under the names of the module's docstring; empties the window."""
        rows = self.rows()
        if not rows:
            return {}
        last, metrics = rows[-1], {"loss/total": sum(row["loss"] for row in rows) / len(rows)}
        for name in self.terms:
            counts = [row["counts"].get(name, 2) for row in rows]
            full = [row for row, count in zip(rows, counts) if count >= 2 or count == NO_CHOICE]
            metrics[f"loss/{name}"] = sum(row["terms"][name] for row in full) / len(full) if full else 0.0
            if last["counts"].get(name, NO_CHOICE) != NO_CHOICE:
                chances = [math.log(count) for count in counts if count >= 2]
                metrics[f"chance/{name}"] = sum(chances) / len(chances) if chances else 0.0
            if len(full) < len(rows):
                metrics[f"empty_steps/{name}"] = len(rows) - len(full)
        metrics |= {name: last[name] for name in ("learning_rate", "logit_scale", "grad_norm") if name in last}
        if "logit_scale" in last:
            metrics["temperature"] = 1 / last["logit_scale"]
        self._rows = []
        return metrics


def duplicate_rates(batch: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """`duplicates/LEVEL`: the share of the global batch's texts that stand in it already.

    Equal texts in a batch are each other's negatives, so a level with many of them cannot reach its floor. All
    processes call it together.

    Args:
        batch: This process's, on the host.
    """
    from accelerate.utils import gather_object

    rates: dict[str, float] = {}
    for level in levels_of_kind("text"):
        ids = batch.get(LEVELS[level].input)
        if ids is None:
            continue
        present = batch.get(LEVELS[level].mask or "")
        rows = ids if present is None else ids[present]
        # Padding (0) is left out: its length may differ from process to process.
        texts = gather_object([tuple(row[row != 0].tolist()) for row in rows])
        rates[f"duplicates/{level}"] = 1 - len(set(texts)) / len(texts) if texts else 0.0
    return rates


class MetricsLog:
    """Appends lines to RUN/metrics.jsonl and hands the same numbers to Accelerate's trackers, in the first process.

    Args:
        run_dir: The run's folder.
        accelerator: Accelerate's `Accelerator`.
    """

    def __init__(self, run_dir: Path, accelerator: Any):
        self.path = Path(run_dir) / "metrics.jsonl"
        self.accelerator = accelerator

    def continue_at(self, step: int, written: Mapping[str, Any] | None = None) -> list[str]:
        """Removes what a run left after the step that it continues from.

        Args:
            step: Optimizer steps done.
            written: `bytes` and checksum of the log as the checkpoint of that step knew it; None: unknown.

        Returns:
            Messages for the user: the log is not as it was. What it was is kept beside it then.
        """
        if not self.accelerator.is_main_process:
            return []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a run that was killed here
            leftover.unlink()
        if not step or not self.path.is_file():
            write_atomically(self.path, b"")
            return []
        if written is not None and sum_of(self.path, written["bytes"]) == written:
            with open(self.path, "r+b") as file:
                file.truncate(written["bytes"])
            return []
        kept, messages = [], []
        for number, text in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            line = _line_of_log(text)
            if line is None:
                messages.append(f"{self.path}: line {number} cannot be read and is left out")
            elif line["step"] <= step:
                kept.append(text)
        if written is not None:
            messages.append(f"{self.path} is not what it was when step {step} was saved")
        if messages:
            copy = self.path.with_name(f"metrics-found-at-step-{step:08d}.jsonl")
            os.replace(self.path, copy)
            messages.append(f"as it was found it is {copy}")
        write_atomically(self.path, b"".join(kept))
        return messages

    def has_validation(self, step: int) -> bool:
        """Whether there is a line of that step with `validation/` in it, to be asked in the first process."""
        if not self.path.is_file():
            return False
        lines = map(_line_of_log, self.path.read_bytes().splitlines(keepends=True))
        return any(
            line["step"] == step and any(name.startswith("validation/") for name in line) for line in lines if line
        )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs numbers under an optimizer step."""
        if not self.accelerator.is_main_process:
            return
        path = str(self.path)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json_text({"step": step, **_as_json(metrics)}) + "\n")
            path = "the trackers' files"
            self.accelerator.log(dict(metrics), step=step)
        except OSError as error:
            advice = "make room" if is_full(error) else "mend it"
            told = f"{error.strerror}: the run stops at step {step}; {advice} and use --resume latest"
            raise OSError(error.errno, told, path) from error


def _line_of_log(text: bytes) -> dict[str, Any] | None:
    """A line as it was written; None: it is damaged, or its end is missing."""
    try:
        line = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """With null for what is no number in JSON: the gradient norm of a step that fp16 overflowed in, and left out."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in metrics.items()
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; an unfinished last line (the run was killed while writing) is left out.

    Raises:
        ValueError: Another line is damaged.
    """
    if not Path(path).is_file():
        return []
    found = []
    for number, text in enumerate(Path(path).read_bytes().splitlines(keepends=True), 1):
        if text.endswith(b"\n"):
            line = _line_of_log(text)
            if line is None:
                raise ValueError(f"{path}: line {number} is damaged: expected a JSON object with a step")
            found.append(line)
    return found


def start_trackers(accelerator: Any, run_dir: Path, settings: Mapping[str, Any], resumed_at: int) -> None:
    """Starts the trackers that the accelerator was made with.

    Args:
        accelerator: Accelerate's `Accelerator`.
        run_dir: The run's folder, whose name is the run's.
        settings: Field -> plain value.
        resumed_at: The step that a continued run starts from; TensorBoard drops what a killed run wrote after it.
    """
    flat = {
        name: value if isinstance(value, (int, float, str, bool)) else json_text(value)
        for name, value in settings.items()
    }
    options = {"tensorboard": {"purge_step": resumed_at + 1}} if resumed_at else {}
    accelerator.init_trackers(Path(run_dir).name, config=flat, init_kwargs=options)
