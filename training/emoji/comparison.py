"""Objectives beside each other on emoji scenes: which trainings that takes, and which of them follow from others.

Three stages, each a list of jobs. The costs of a step are measured first. Then each method is trained briefly at
several learning rates; the best by `criterion` is its own, and where that is the last of the grid, one beyond is tried
too. Then come the runs of the table: with equal steps, and with as many as fit into the time of PyramidCLIP's. What a
later stage does is a pure function of the plan and of what the earlier ones left, so a stopped command finds its way.
"""

import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch

from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES
from training.emoji.runs import Job, family_settings, read_yaml, row_settings
from training.emoji.words import OBJECTS
from training.loop.terms.table import RUN_PAIRS
from training.reports.comparison_page import BUDGETS, REFERENCE, Comparison, Schedule, Search, criterion
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import read_settings

Results = Sequence[Mapping[str, Any]]
# Family -> row -> what `gathered_costs` says of it.
Costs = Mapping[str, Mapping[str, Mapping[str, Any]]]
# Ends the name of what measures the costs of a row.
COSTS = "_costs"

# Where a run is: not a part of its settings.
PLACES = ("output_dir", "train_data", "seed", "learning_rate", "max_steps", "epochs")


def make_comparison(path: Path, scenes: dict[str, int], steps: int | None) -> Comparison:
    """The plan that a file such as `training/configs/comparison.yaml` asks for, of plain values.

    Args:
        path: The file.
        scenes: See `Comparison`.
        steps: Optimizer steps of every row with equal samples, in place of the file's.
    """
    config = read_yaml(path)
    base = path.parent / config["base"]
    read_yaml(base)  # said here where it is not there
    settings = read_settings(PretrainingArguments, base)
    plan: Comparison = {
        "scenes": scenes,
        "families": {},
        "tables": {table: list(config[table]) for table in ("methods", "combinations")},
        "seeds": config["seeds"],
        "search_seed": config["search"]["seed"],
        "costs": config["costs"],
    }
    for name, family in config["families"].items():
        shared = family_settings(settings, family["settings"])
        rows = {
            row: row_settings(shared, read_settings(PretrainingArguments, f"{path}:{table}.{row}"))
            for table, names in plan["tables"].items()
            for row in names
        }
        for row in rows.values():
            for place in PLACES:
                row.pop(place, None)
        own = steps or family["steps"]
        plan["families"][name] = {
            "title": family["title"],
            "steps": own,
            "search_steps": max(1, round(own * config["search"]["share"])),
            "rates": sorted(map(float, family["rates"])),
            "rows": rows,
        }
    return plan


class Training(TypedDict):
    """A run. row: the row that it is of; settings: all of `training.pretrain` but where it is."""

    row: str
    settings: dict[str, Any]


def by_tokens(settings: Mapping[str, Any]) -> bool:
    """Whether a run trains no embeddings, so that its model can only be asked by its tokens."""
    return not settings["loss_weights"] and not any(name in RUN_PAIRS for name in settings["objective"] or {})


##################################################################################################
#  Jobs                                                                                          #
##################################################################################################


def run_name(row: str, steps: int, rate: float) -> str:
    """Of a training; two places of the table with the same settings are the same run."""
    return f"{row}_{steps}_{rate:g}"


def training_of(plan: Comparison, family: str, row: str, steps: int, rate: float, seed: int) -> Training:
    """What a run of a row is, but for where it is."""
    settings = plan["families"][family]["rows"][row]
    more = {"max_steps": steps, "epochs": None, "learning_rate": rate, "seed": seed}
    return {"row": row, "settings": {**settings, **more}}


def is_cost(run: str) -> bool:
    """Whether the run of this name measures costs."""
    return run.endswith(COSTS)


def cost_jobs(plan: Comparison, families: Sequence[str]) -> dict[Job, Training]:
    """Each row of each family in turn, all rounds; a job's seed is the number of its round."""
    found = {}
    steps = plan["costs"]["warm"] + plan["costs"]["steps"]
    for number in range(plan["costs"]["rounds"]):
        for family in families:
            own = plan["families"][family]
            for row in own["rows"]:
                training = training_of(plan, family, row, steps, own["rates"][0], 0)
                # Decoding belongs to a step, and so to the process that is measured.
                training["settings"]["dataloader_workers"] = 0
                found[Job(family, f"{row}{COSTS}", number)] = training
    return found


def search_jobs(
    plan: Comparison, results: Results, families: Sequence[str], rows: Sequence[str]
) -> dict[Job, Training]:
    """The short runs of the search, with those beyond the grid that are called for by now; rates vary slowest."""
    seed = plan["search_seed"]
    places = [
        (place, family, row, rate)
        for family in families
        for row in plan["tables"]["methods"]
        if row in rows
        for place, rate in enumerate(rates_of(plan, results, family, row))
    ]
    found = {}
    for _, family, row, rate in sorted(places, key=lambda entry: entry[0]):
        steps = plan["families"][family]["search_steps"]
        found[Job(family, run_name(row, steps, rate), seed)] = training_of(plan, family, row, steps, rate, seed)
    return found


def table_jobs(
    plan: Comparison,
    schedule: Schedule,
    families: Sequence[str],
    rows: Sequence[str],
    seeds: Sequence[int] | None = None,
) -> dict[Job, Training]:
    """The runs of the table: by seed, methods before combinations, equal samples before equal time.

    Args:
        plan: The plan.
        schedule: See `scheduled`. Rows without a learning rate have no runs yet.
        families: Which.
        rows: Which.
        seeds: Of all rows; None: the plan's.
    """
    wanted = [
        (seed, number, family, row, found[row])
        for number, (table, names) in enumerate(plan["tables"].items())
        for seed in seeds or plan["seeds"][table]
        for budget in BUDGETS
        for family in families
        for found in [schedule["runs"].get(family, {}).get(budget, {})]
        for row in names
        if row in rows and row in found
    ]
    jobs: dict[Job, Training] = {}
    for seed, _, family, row, place in sorted(wanted, key=lambda entry: entry[:2]):
        training = training_of(plan, family, row, place["steps"], place["rate"], seed)
        jobs.setdefault(Job(family, place["run"], seed), training)
    return jobs


##################################################################################################
#  What follows from results                                                                     #
##################################################################################################


def scores_of_search(plan: Comparison, results: Results, family: str, row: str) -> dict[float, float]:
    """Learning rate -> `criterion`, of the runs of the search that are there."""
    steps = plan["families"][family]["search_steps"]
    return {
        result["learning_rate"]: criterion(result)
        for result in results
        if (result["family"], result["row"], result["seed"]) == (family, row, plan["search_seed"])
        and result["steps"] == steps
    }


def rate_beyond(rates: Sequence[float], scores: Mapping[float, float]) -> float | None:
    """The rate to be tried beyond the grid `rates`, in ascending order; None where the best is not at its end.

    It is as far beyond as the grid's last two are from each other. None while the grid is not done, too.
    """
    if len(rates) < 2 or not set(rates) <= set(scores):
        return None
    best = max(rates, key=lambda rate: scores[rate])
    if best == rates[0]:
        return rates[0] * rates[0] / rates[1]
    return rates[-1] * rates[-1] / rates[-2] if best == rates[-1] else None


def rates_of(plan: Comparison, results: Results, family: str, row: str) -> list[float]:
    """The rates of a row's search: the family's grid, and once it is done, the one beyond it that is called for."""
    rates = plan["families"][family]["rates"]
    beyond = rate_beyond(rates, scores_of_search(plan, results, family, row))
    return [*rates] if beyond is None else [*rates, beyond]


def search_of(plan: Comparison, results: Results, family: str, row: str) -> Search:
    """What a row's search has found so far; there is no best rate before all that are to be tried are."""
    scores = scores_of_search(plan, results, family, row)
    rates = sorted(rates_of(plan, results, family, row))
    tried = {rate: scores[rate] for rate in rates if rate in scores}
    best = max(tried, key=lambda rate: tried[rate]) if len(tried) == len(rates) else None
    return {"tried": tried, "best": best, "at_the_end": best in (rates[0], rates[-1])}


def steps_in_the_same_time(steps: int, reference_seconds: float, seconds: float) -> int:
    """Optimizer steps of `seconds` each that take as long as `steps` of `reference_seconds`; at least one."""
    return max(1, round(steps * reference_seconds / seconds))


def scheduled(plan: Comparison, costs: Costs, results: Results, *, foreseen: bool = False) -> Schedule:
    """What costs and search say by now: each row's learning rate, and its runs. Combinations take PyramidCLIP's rate.

    foreseen: rows whose search is not done yet have runs too, with the first rate of the grid; for counting only.
    """
    schedule: Schedule = {"searches": {}, "runs": {}}
    for family, own in plan["families"].items():
        searches = {row: search_of(plan, results, family, row) for row in plan["tables"]["methods"]}
        schedule["searches"][family] = searches
        if family not in costs:
            continue
        seconds = {row: measured["seconds"] for row, measured in costs[family].items()}
        runs: dict[str, dict[str, Any]] = {budget: {} for budget in BUDGETS}
        for row in own["rows"]:
            rate = searches.get(row, searches[REFERENCE])["best"] or (own["rates"][0] if foreseen else None)
            if rate is None:
                continue
            same_time = steps_in_the_same_time(own["steps"], seconds[REFERENCE], seconds[row])
            for budget, steps in zip(BUDGETS, (own["steps"], same_time), strict=True):
                runs[budget][row] = {"run": run_name(row, steps, rate), "steps": steps, "rate": rate}
        schedule["runs"][family] = runs
    return schedule


def estimated_seconds(plan: Comparison, costs: Costs, jobs: Mapping[Job, Training]) -> float:
    """Processor seconds of trainings with their starts and their scoring, as the costs have them."""
    objects = len(OBJECTS)
    pictures = plan["scenes"]["validation"] + objects * plan["scenes"]["per_object"]
    texts = 3 * plan["scenes"]["validation"] + objects * len(IMAGENET_TEMPLATES)
    total = 0.0
    for job, training in jobs.items():
        cost = costs[job.family][training["row"]]
        scoring = (pictures * cost["picture_milliseconds"] + texts * cost["text_milliseconds"]) / 1000
        total += cost["start_seconds"] + training["settings"]["max_steps"] * cost["seconds"] + scoring
    return total


def gathered_costs(plan: Comparison, results: Results) -> dict[str, Any]:
    """costs.json's content: what the rounds say together, of the families of which all are there.

    Every number is the median over all measured steps, or over rounds; the load is the machine's before each.
    """
    families: dict[str, dict[str, Any]] = {}
    loads = []
    for family, own in plan["families"].items():
        rounds = {
            row: [r["costs"] for r in results if r["family"] == family and r["run"] == f"{row}{COSTS}"]
            for row in own["rows"]
        }
        if any(len(found) < plan["costs"]["rounds"] for found in rounds.values()):
            continue
        loads += [one["load"] for found in rounds.values() for one in found]
        families[family] = {row: _together(found) for row, found in rounds.items()}
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "torch": torch.__version__,
        "load": {"least": min(loads), "most": max(loads)} if loads else None,
        "families": families,
    }


def processor_name() -> str | None:
    """What Linux calls this machine's processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _together(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    numbers = [name for name, value in rounds[0].items() if isinstance(value, (int, float)) and name != "load"]
    found: dict[str, Any] = {name: statistics.median(one[name] for one in rounds) for name in numbers}
    found["seconds"] = statistics.median(step for one in rounds for step in one["steps"])
    found["rounds"] = [statistics.median(one["steps"]) for one in rounds]
    return found
