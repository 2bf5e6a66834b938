"""Publishes the final model of a run on the Hub, in one commit.

    python -m training.publish RUN REPO_ID [--private]

RUN is the folder of a finished run (its `final/` is published) or a model folder itself. The model card is written from
`training.json`, which the run left beside the weights; the code goes along, so that `AutoModel` can load the repository
with `trust_remote_code=True`. Exit codes: 0, or 2 where the folder or the repository is not what is needed.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from pyramidclip_hf.hub import PublishError, add_remote_code, build_model_card, publish_folder

EXIT_WRONG_SETTING = 2
# What a reader of the card wants to know; all settings are in training.json.
CARD_SETTINGS = (
    "model", "global_batch_size", "learning_rate", "warmup_fraction", "weight_decay", "adam_beta2", "precision", "seed",
)  # fmt: skip


def write_card(folder: Path, record: Mapping[str, Any], repo_id: str | None = None, remote_code: bool = False) -> None:
    """Writes `folder/README.md`: the model card of a run.

    record: what `training.json` holds (settings, data, length, metrics). repo_id: what the card's example loads.
    """
    settings = record["settings"]
    training = {name.replace("_", " "): settings[name] for name in CARD_SETTINGS}
    training |= {"steps": record["steps"], "samples seen": record["samples_seen"], "processes": record["processes"]}
    training["hours"] = f"{record['seconds'] / 3600:.2f}"
    data = "; ".join(f"{name}: {value}" for name, value in record["data"].items())
    card = build_model_card(
        PyramidCLIPConfig.from_pretrained(folder),
        model_name=(repo_id or Path(settings["output_dir"]).name).split("/")[-1],
        repo_id=repo_id,
        provenance="Trained with `training.pretrain` of PyramidCLIP for Transformers.",
        training_data=f"{data}. Trained on: {', '.join(settings['train_data']) or 'not named'}.",
        training=training,
        results=_results(record["metrics"], settings["validation_data"] or "validation"),
        remote_code=remote_code,
    )
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _results(metrics: Mapping[str, float], data: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-text-retrieval",
            dataset_type=Path(data).name,
            dataset_name=Path(data).name,
            metric_type=name.removeprefix("validation/"),
            metric_value=round(value, 4),
        )
        for name, value in metrics.items()
        if "R@" in name
    ]


def model_folder(path: Path) -> Path:
    """The model folder that a run or model folder means; ValueError where it is neither."""
    for folder in (path / "final", path):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{path} is neither a finished run (no final/config.json) nor a model folder (no config.json)")


def publish(path: Path, repo_id: str, private: bool | None = None) -> str:
    """Publishes the model of a run; returns the address of the commit.

    Raises ValueError where there is no model or the id cannot be, PublishError where the Hub refuses.
    """
    folder = model_folder(Path(path))
    record = folder / "training.json"
    if record.is_file():
        write_card(folder, json.loads(record.read_text(encoding="utf-8")), repo_id, remote_code=True)
    add_remote_code(folder)
    return publish_folder(folder, repo_id, private=private)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, publishes, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m training.publish", description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run, or a model folder")
    parser.add_argument("repo_id", help="owner/name on the Hub")
    parser.add_argument("--private", action="store_true", default=None, help="make the repository private if it is new")
    args = parser.parse_args(argv)
    try:
        print(publish(args.run, args.repo_id, args.private))
    except (ValueError, PublishError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
