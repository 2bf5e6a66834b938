"""Evaluation results on their way out: a terminal table, a CSV file, and JSON that `huggingface_hub` reads.

The unit is `huggingface_hub.EvalResult`: one number with its task, data set and metric. The JSON file holds a model
index, the form that model cards carry (`huggingface_hub.repocard_data.model_index_to_eval_results` reads it).
"""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from pyramidclip_hf.files import json_text, parse_json, read_utf8, write_atomically
from training.data.labelled import LabelledPictures

COLUMNS = ("task", "dataset", "config", "split", "metric", "note", "value")


def result_rows(results: Iterable[EvalResult]) -> list[dict[str, Any]]:
    """One dict a result with the keys of `COLUMNS`, fit for a table; `note` marks the metric a data set is known by."""
    return [
        {
            "task": result.task_type,
            "dataset": result.dataset_name,
            "config": result.dataset_config or "",
            "split": result.dataset_split or "",
            "metric": result.metric_type,
            "note": result.metric_name or "",
            "value": result.metric_value,
        }
        for result in results
    ]


def results_table(results: Sequence[EvalResult]) -> str:
    """The results as aligned columns of text, shares (floats of at most 1) in percent, without empty columns."""
    rows = result_rows(results)
    for row in rows:
        if isinstance(row["value"], float):
            share = row["value"] <= 1 and "rank" not in row["metric"]
            row["value"] = f"{100 * row['value']:.2f} %" if share else f"{row['value']:.2f}"
    columns = [name for name in COLUMNS if any(str(row[name]) for row in rows)]
    cells = [columns] + [[str(row[name]) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line[:-1], widths)) for line in cells]
    return "\n".join(f"{line}  {cell[-1].rjust(widths[-1])}" for line, cell in zip(lines, cells))


def make_place(*paths: str | Path | None) -> None:
    """Makes the folders of result files before the work that fills them.

    Raises:
        OSError: A path is a folder, or its folder cannot be made.
    """
    for path in (Path(path) for path in paths if path):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder: expected the name of a file to write the results to")
        path.parent.mkdir(parents=True, exist_ok=True)


def write_csv(results: Iterable[EvalResult], path: str | Path) -> None:
    """The results as CSV with the columns of `COLUMNS`; values unrounded. The file appears whole or not at all."""
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, COLUMNS)
    writer.writeheader()
    writer.writerows(result_rows(results))
    _write(path, lines.getvalue())


def hub_identifier(title: str) -> str:
    """A title in the form that the Hub takes as `dataset.type` of a result.

    That is letters, digits, "_", "-", "." and one "/" between owner and name; what else it holds becomes "-".
    """
    owner, _, name = title.rpartition("/") if title.count("/") == 1 else ("", "", title)
    parts = [re.sub(r"[^A-Za-z0-9_-]+", "-", owner).strip("-"), re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")]
    return "/".join(part for part in parts if part) or "local"


def metric_results(
    task: str,
    data: LabelledPictures,
    split: str | None,
    metrics: Mapping[str, float | int],
    config: str | None = None,
    dataset_name: str | None = None,
) -> list[EvalResult]:
    """One result for each metric of a task on data; that which the data set is known by is marked.

    Args:
        task: its name on the Hub.
        data: what was measured on.
        split: of the data.
        metrics: name -> value.
        config: what was measured there, where there are several.
        dataset_name: default: that of the data.
    """
    kind = data.described.get("dataset_type") if dataset_name is None else None
    name = dataset_name or data.name
    main, note = data.main_metric or (None, None)
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_identifier(kind or name),
            dataset_name=name,
            dataset_config=config,
            dataset_split=split,
            metric_type=metric,
            metric_name=note if metric == main else None,
            metric_value=value,
        )
        for metric, value in metrics.items()
    ]


def averages(main_values: Mapping[str, float]) -> dict[str, float]:
    """What tables of several data sets end with: {"11 data sets": mean of the metric that each is known by}.

    Args:
        main_values: name of a data set -> its value. Where ImageNet is among more than two, the mean of the others is
            there as well, as in the paper's Tables 4, 11 and 12.
    """
    found = {}
    if len(main_values) > 1:
        found[f"{len(main_values)} data sets"] = statistics.fmean(main_values.values())
    others = [value for name, value in main_values.items() if name != "imagenet"]
    if len(main_values) > len(others) > 1:
        found[f"{len(others)} data sets without ImageNet"] = statistics.fmean(others)
    return found


def average_results(task: str, main_values: Mapping[str, float], config: str | None = None) -> list[EvalResult]:
    """The lines of `averages` behind the results of several data sets.

    Args:
        task: its name on the Hub.
        main_values: see `averages`.
        config: what was measured there, where there are several.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=hub_identifier(name),
            dataset_name=name,
            dataset_config=config,
            metric_type="mean_of_main_metrics",
            metric_value=value,
        )
        for name, value in averages(main_values).items()
    ]


def write_json(
    results: Sequence[EvalResult], path: str | Path, model_name: str, details: dict[str, Any] | None = None
) -> None:
    """The results as JSON: `model-index` (the form of model cards) and `details`, any further plain values."""
    document = {"model-index": eval_results_to_model_index(model_name, list(results)), "details": details or {}}
    _write(path, json_text(document, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> tuple[str, list[EvalResult], dict[str, Any]]:
    """Model name, results and details of a file of `write_json`; ValueError where it is something else."""
    try:
        document = parse_json(read_utf8(path))
        name, results = model_index_to_eval_results(document["model-index"])
        return name, results, document["details"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected a result file of training.evaluate ({error!r})") from error


def _write(path: str | Path, text: str) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
