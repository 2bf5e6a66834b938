"""The runs of a table on emoji scenes: rows as settings of trainings, jobs, and where their results are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pyramidclip_hf.files import json_text, write_atomically
from training.settings.reading import with_changes

# Settings of a ViT that count blocks, and how many of these the paper's ViTs have.
BLOCKS, PAPER_DEPTH = ("num_leff_layers", "num_picture_layers"), 12


# What has to do with where a run is and how it is watched, not with its result.
WATCHING: dict[str, Any] = {"validation_data": None, "trackers": [], "eval_every_steps": 0, "push_to_hub": None}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: There is no such file, or no mapping in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; run the command in the checkout's folder")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def family_settings(base: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all rows of a family share. The family's towers replace those of the base whole."""
    settings = {**base, **family, **WATCHING}
    settings["model_config"] = {**base.get("model_config", {}), **family.get("model_config", {})}
    return settings


def row_settings(shared: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row. Its numbers of blocks become the same share of the family's ViT; a ResNet has no such."""
    towers, changes = shared["model_config"], row.get("model_config", {})
    vision = dict(changes.get("vision_config", {}))
    asked = {name: vision.pop(name) for name in BLOCKS if name in vision}
    if str(shared["model"]).startswith("ViT"):
        if "num_leff_layers" not in towers["vision_config"]:
            raise ValueError(
                f"a ViT family must state num_leff_layers, its vision_config has {sorted(towers['vision_config'])}"
            )
        depth = towers["vision_config"].get("num_hidden_layers", PAPER_DEPTH)
        vision |= {name: round(number * depth / PAPER_DEPTH) for name, number in asked.items()}
    return {**shared, **row, "model_config": with_changes(towers, {**changes, "vision_config": vision})}


def expand(
    tables: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Distinct runs of a family, and which run each row is.

    Returns:
        {run: settings} and {table: {row: run}}; rows with equal settings are one run, named by the first of them. A
        table whose rows are all one run, such as LeFF's of a ResNet, is left out.
    """
    runs: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, str]] = {}
    for table, entries in tables.items():
        every = {row: row_settings(shared, changes) for row, changes in entries.items()}
        first = next(iter(every.values()))
        if len(every) > 1 and all(settings == first for settings in every.values()):
            continue
        rows[table] = {}
        for row, settings in every.items():
            same = next((name for name, known in runs.items() if known == settings), None)
            if same is None:
                same = f"{table}_{row}" if row in runs else row
                runs[same] = settings
            rows[table][row] = same
    return runs, rows


@dataclass(frozen=True)
class Job:
    """One training with its evaluation; `run` is a name in the family's runs."""

    family: str
    run: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its files."""
        return f"{self.family}-{self.run}-seed{self.seed}"


def name_parts(name: str) -> tuple[str, str, int]:
    """Family, run and seed of a `Job.name`."""
    family, _, rest = name.partition("-")
    run, _, seed = rest.rpartition("-seed")
    return family, run, int(seed)


def chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """`known`, or those of it that are wanted.

    Raises:
        ValueError: One that is wanted is unknown; the message names the flag `kind`.
    """
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ValueError(f"--{kind}: there is no {', '.join(unknown)}; known: {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def result_path(folder: Path, name: str) -> Path:
    """Where the result of a run is, once it is finished."""
    return folder / "results" / f"{name}.json"


def write_result(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """The result, there whole or not at all."""
    path = result_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json_text(content, indent=1) + "\n").encode())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results that are there, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]
