"""The model card of a run, and how its final model is published."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from pyramidclip_command import Failure
from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.hub import PublishError, as_markdown, build_model_card, publish_folder
from pyramidclip_hf.loading import check_weights
from pyramidclip_hf.saved_folders_pyramidclip import damaged_settings
from training.evaluation.results import hub_identifier, read_json

# What a reader of the card wants to know; all settings are in training.json.
CARD_SETTINGS = (
    "model", "global_batch_size", "learning_rate", "warmup_fraction", "weight_decay", "adam_beta2", "precision", "seed",
)  # fmt: skip


def run_card(
    folder: Path,
    record: Mapping[str, Any],
    repo_id: str | None = None,
    results: Sequence[EvalResult] = (),
    remote_code: bool = False,
) -> ModelCard:
    """The model card of a run.

    Args:
        folder: Of the model.
        record: What `training.json` holds: settings, data, length, metrics.
        repo_id: What the card's example loads.
        results: Beside those of the run's own validation.
        remote_code: The code lies beside the weights.
    """
    settings = record["settings"]
    training = {name.replace("_", " "): settings[name] for name in CARD_SETTINGS}
    training |= {"steps": record["steps"], "samples seen": record["samples_seen"], "processes": record["processes"]}
    if shares := record.get("shares_of_pairs"):
        training["pairs that each term got"] = ", ".join(f"{term} {share:.0%}" for term, share in shares.items())
    training["hours"] = f"{record['seconds'] / 3600:.2f}"
    return build_model_card(
        PyramidCLIPConfig.from_pretrained(folder),
        model_name=(repo_id or Path(settings["output_dir"]).name).split("/")[-1],
        repo_id=repo_id,
        provenance="Trained with `training.pretrain` of PyramidCLIP for Transformers.",
        training_data=_data_sentences(record["data"]),
        training=training,
        results=[*_validation_results(record["metrics"], settings["validation_data"]), *results],
        remote_code=remote_code,
    )


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes `folder/README.md`: the model card of a run as it is before it is published."""
    run_card(folder, record).save(folder / "README.md")


def _data_sentences(data_sets: Sequence[Mapping[str, Any]]) -> str:
    """A line for each data set: name, size, what made its levels, attribution and licence."""
    lines = []
    for data in data_sets:
        told = [f"{key}: {as_markdown(data[key])}" for key in ("made_by", "attribution", "license") if data.get(key)]
        name = as_markdown(Path(data["name"]).name)
        share = f", {data['share']:.1%} of each batch" if "share" in data else ""
        lines.append(f"- {name}: {data['samples']:,} samples{share}. {' '.join(told)}".rstrip())
    return "\n".join(lines)


def _validation_results(metrics: Mapping[str, float], data: str | None) -> list[EvalResult]:
    name_of_data = Path(data or "validation").name
    return [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type=hub_identifier(name_of_data),
            dataset_name=name_of_data,
            metric_type=name.removeprefix("validation/"),
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
        if "R@" in name
    ]


def model_folder(path: Path) -> Path:
    """The model folder that a run or model folder means.

    Raises:
        ValueError: It is neither.
    """
    for folder in (path / "final", path):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{path} is neither a finished run (no final/config.json) nor a model folder (no config.json)")


def publish(path: Path, repo_id: str, private: bool | None = None, result_files: Sequence[Path] = ()) -> str:
    """Publishes the model of a run; returns the address of the commit.

    Args:
        path: Folder of the run, or of the model.
        repo_id: owner/name.
        private: Whether a new repository is; None: as the account has it.
        result_files: Of `training.evaluate`, for the card.

    Raises:
        ValueError: There is no model, a file of it is cut short, a result file is something else, or the id cannot be.
        Failure: The Hub refuses.
    """
    folder = model_folder(Path(path))
    check_weights(folder, str(folder))
    if told := damaged_settings(folder):
        raise ValueError(told)
    results = [result for file in result_files for result in read_json(file)[1]]
    record, card = folder / "training.json", None
    described = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if described and described.get("task") == "image-classification":
        if results:
            raise ValueError(f"{folder} is a classifier, whose card holds its own results: leave --results out")
    elif described:
        card = run_card(folder, described, repo_id, results, remote_code=True)
    elif results:
        raise ValueError(f"{folder} has no training.json, so there is no card that the results could go into")
    try:
        return publish_folder(folder, repo_id, card=card, remote_code=True, private=private)
    except PublishError as error:
        raise Failure(str(error)) from error
