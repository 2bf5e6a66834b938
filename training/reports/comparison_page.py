"""The page of `python -m training.ablations --table comparison`: the methods of Table 2, ours and theirs.

`write_comparison` is the entry; everything else is a pure function of the plan, the costs and the results. Published
figures are those of the paper (arXiv 2204.14095) and of the sources named beside them.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.pages import render
from training.reports.ablations_page import (
    AGREES,
    DISAGREES,
    GAIN,
    METRICS,
    NO_GAIN,
    NOISE,
    OPEN,
    STANDARD_ERRORS,
    markdown_table,
    pooled_deviation,
    score,
    signed,
    verdict,
    with_deviation,
)


class ComparedFamily(TypedDict):
    """A family of a plan.

    steps: Of every row with equal samples. search_steps: Of every run of the search. rates: The grid, ascending.
    rows: Row -> settings of its trainings but seed, place, learning rate and steps.
    """

    title: str
    steps: int
    search_steps: int
    rates: list[float]
    rows: dict[str, dict[str, Any]]


class Comparison(TypedDict):
    """What `--table comparison` runs.

    scenes: Split -> how many. tables: "methods" and "combinations" -> rows. seeds: Of these two. search_seed: Of the
    search. costs: `rounds` of `warm` steps and `steps` that count, and `pairs` that are embedded.
    """

    scenes: dict[str, int]
    families: dict[str, ComparedFamily]
    tables: dict[str, list[str]]
    seeds: dict[str, list[int]]
    search_seed: int
    costs: dict[str, int]


class Search(TypedDict):
    """Learning rates of a row.

    tried: Rate -> `criterion`. best: None while the search is not done. at_the_end: Whether that is the lowest or the
    highest that was tried.
    """

    tried: dict[float, float]
    best: float | None
    at_the_end: bool


class Schedule(TypedDict):
    """What follows from costs and search.

    searches: Family -> row -> its search. runs: Family -> budget -> row -> its `run`, `steps` and `rate`.
    """

    searches: dict[str, dict[str, Search]]
    runs: dict[str, dict[str, dict[str, dict[str, Any]]]]


Results = Sequence[Mapping[str, Any]]
Costs = Mapping[str, Mapping[str, Mapping[str, Any]]]

TEMPLATE = Path(__file__).with_name("comparison_template.html")
# Whose time all rows get where time is equal, and what is set against the others.
REFERENCE, PLAIN = "pyramidclip", "clip"
BUDGETS = {"samples": "Equal samples", "time": "Equal time"}
TITLES = {
    "clip": "CLIP",
    "slip": "SLIP",
    "filip": "FILIP",
    "declip": "DeCLIP",
    "defilip": "DeFILIP",
    "pyramidclip": "PyramidCLIP",
    "pyramidclip_simclr": "PyramidCLIP + SimCLR between views (SLIP)",
    "pyramidclip_mlm": "PyramidCLIP + masked words (DeCLIP)",
    "pyramidclip_tokens": "PyramidCLIP + tokens of (local, caption) (FILIP)",
}
# The paper's Table 2: ImageNet zero-shot top-1, YFCC15M-V2, 32 epochs. ResNet50 stands for our ResNet, ViT-B/32 for our
# ViT. All but PyramidCLIP's are those of DeCLIP's benchmark (arXiv 2203.05796).
TABLE_2 = {
    "resnet": {"clip": 37.2, "slip": 28.5, "filip": 21.3, "declip": 44.4, "pyramidclip": 47.8},
    "vit": {"clip": 32.8, "slip": 34.3, "filip": 39.5, "declip": 43.2, "defilip": 45.0, "pyramidclip": 46.0},
}
# What others published, ImageNet zero-shot top-1 unless it says something else: data, encoder, CLIP's, the method's.
PUBLISHED = (
    ("SLIP", "YFCC15M-V1, 25 epochs", "ViT-S/16", "32.7", "38.3", "SLIP's repository"),
    ("SLIP", "YFCC15M-V1, 25 epochs", "ViT-B/16", "37.6", "42.8", "SLIP's repository"),
    ("SLIP", "YFCC15M-V1, 25 epochs", "ViT-L/16", "40.4", "46.2", "SLIP's repository"),
    ("SLIP", "CC3M, 40 epochs, best epoch", "ViT-B/16", "17.1", "23.0", "SLIP's repository"),
    ("DeCLIP", "CC3M, 32 epochs", "ResNet50", "20.6", "27.2", "a reading note of arXiv 2110.05208"),
    ("SLIP", "YFCC15M-V2, mean of 11 data sets", "ViT-B/32", "31.8", "30.0", "ALIP's repository"),
    ("FILIP", "YFCC15M-V2, mean of 11 data sets", "ViT-B/32", "31.8", "37.2", "ALIP's repository"),
    ("DeCLIP", "YFCC15M-V2, mean of 11 data sets", "ViT-B/32", "31.8", "41.3", "ALIP's repository"),
    ("DeFILIP", "YFCC15M-V2, mean of 11 data sets", "ViT-B/32", "31.8", "44.2", "ALIP's repository"),
    ("HiCLIP", "YFCC15M-V2", "ViT-B/32", "32.8", "40.5", "ALIP's repository"),
    ("HiDeCLIP", "YFCC15M-V2", "ViT-B/32", "32.8", "45.9", "ALIP's repository"),
    ("ALIP", "YFCC15M-V2", "ViT-B/32", "32.8", "40.3", "ALIP's repository"),
)
MORE, LESS = "better", "worse"


def criterion(result: Mapping[str, Any]) -> float:
    """What the search goes by, in percent; 0 where the loss was no number.

    The mean of three means: zero-shot top-1 and top-5; recall at 1, 5 and 10 of pictures to captions; of captions to
    pictures. After so few steps top-1 and recall at 1 alone are near chance for some methods, and would choose by it.
    """
    if "diverged" in result:
        return 0.0
    recall = result["retrieval"]["global_caption"]
    parts = [statistics.fmean(result["zero_shot"][f"top_{k}"] for k in (1, 5))]
    parts += [
        statistics.fmean(recall[f"{way}_R@{k}"] for k in (1, 5, 10)) for way in ("image_to_text", "text_to_image")
    ]
    return 100 * statistics.fmean(parts)


class Compared:
    """The results of one family.

    Args:
        name: Of the family.
        plan: The plan.
        results: Of all families.
        schedule: Which runs the rows are.
    """

    def __init__(self, name: str, plan: Comparison, results: Results, schedule: Schedule):
        self.name, self.family, self.tables = name, plan["families"][name], plan["tables"]
        self.title = self.family["title"]
        self.runs = schedule["runs"].get(name, {budget: {} for budget in BUDGETS})
        self.searches = schedule["searches"][name]
        self.results = [r for r in results if r["family"] == name and r["seed"] != plan["search_seed"]]

    def of(self, budget: str, row: str) -> list[Mapping[str, Any]]:
        """The results of a row, by seed."""
        run = self.runs[budget].get(row, {}).get("run")
        return sorted((r for r in self.results if r["run"] == run), key=lambda r: r["seed"])

    def values(self, budget: str, row: str, metric: str) -> list[float]:
        """A metric of a row, one value a seed, in percent."""
        return [score(result, metric) for result in self.of(budget, row)]

    def deviation(self, metric: str) -> float | None:
        """Standard deviation between seeds, over all rows that have several."""
        names = sorted({place["run"] for rows in self.runs.values() for place in rows.values()})
        return pooled_deviation([score(r, metric) for r in self.results if r["run"] == run] for run in names)

    def difference(self, budget: str, before: str, after: str, metric: str) -> tuple[float, float | None] | None:
        """`after` minus `before` in percentage points, and its standard error; None where one has no results."""
        old, new = self.values(budget, before, metric), self.values(budget, after, metric)
        if not old or not new:
            return None
        deviation = self.deviation(metric)
        error = None if deviation is None else deviation * math.sqrt(1 / len(old) + 1 / len(new))
        return statistics.fmean(new) - statistics.fmean(old), error


class Direction(NamedTuple):
    """From one method to another, zero-shot: ours in percentage points with its standard error, and the paper's."""

    budget: str
    before: str
    after: str
    ours: float
    error: float | None
    paper: float
    verdict: str


def directions(compared: Compared) -> list[Direction]:
    """CLIP to each method and each method to PyramidCLIP, of those that Table 2 has and that have results."""
    told = TABLE_2.get(compared.name, {})
    pairs = [(PLAIN, row) for row in told if row != PLAIN]
    pairs += [(row, REFERENCE) for row in told if row not in (PLAIN, REFERENCE)]
    found = []
    for budget in BUDGETS:
        for before, after in pairs:
            ours = compared.difference(budget, before, after, "zero_shot")
            if ours is not None:
                paper = told[after] - told[before]
                claim = GAIN if paper > 0 else NO_GAIN
                found.append(Direction(budget, before, after, *ours, paper, verdict(claim, *ours)))
    return found


##################################################################################################
#  Words                                                                                         #
##################################################################################################


def with_error(found: tuple[float, float | None] | None) -> str:
    """A difference as "+2.0 ± 0.6"."""
    if found is None:
        return "\u2013"
    difference, error = found
    return signed(difference) + ("" if error is None else f" ± {error:.1f}")


ROW_HEAD = ["row", "seeds", "steps", "learning rate", *(ours for ours, _ in METRICS.values()), "paper, Table 2"]


def row_cells(compared: Compared, budget: str) -> list[list[str]]:
    """The rows of a table of results. A row whose tokens were measured beside its embeddings has a second line."""
    cells = []
    for row in compared.family["rows"]:
        place, results = compared.runs[budget].get(row), compared.of(budget, row)
        told = TABLE_2.get(compared.name, {}).get(row)
        head = [TITLES.get(row, row), str(len(results))]
        head += ["\u2013"] * 2 if place is None else [str(place["steps"]), f"{place['rate']:g}"]
        values = [with_deviation(compared.values(budget, row, metric)) for metric in METRICS]
        cells.append([*head, *values, "\u2013" if told is None else f"{told:.1f}"])
        tokens = [result["tokens"] for result in results if "tokens" in result]
        if tokens:
            values = [with_deviation([score(one, metric) for one in tokens]) for metric in METRICS]
            cells.append([f"{TITLES.get(row, row)}, by its tokens", str(len(tokens)), *head[2:], *values, "\u2013"])
    return cells


DIRECTION_HEAD = ["zero-shot top-1", "paper", *(f"{title.lower()}{more}" for title in BUDGETS.values() for more in
                                                (": ours", ": verdict"))]  # fmt: skip


def direction_cells(found: Sequence[Direction]) -> list[list[str]]:
    """Directions as text, both budgets in a line."""
    rows: dict[tuple[str, str], dict[str, Direction]] = {}
    for one in found:
        rows.setdefault((one.before, one.after), {})[one.budget] = one
    cells = []
    for (before, after), budgets in rows.items():
        paper = next(iter(budgets.values())).paper
        line = [f"{TITLES[before]} \u2192 {TITLES[after]}", signed(paper)]
        for budget in BUDGETS:
            there = budgets.get(budget)
            line += ["\u2013", OPEN] if there is None else [with_error((there.ours, there.error)), there.verdict]
        cells.append(line)
    return cells


COMBINATION_HEAD = ["against PyramidCLIP", "seeds", "a step costs", *(ours for ours, _ in METRICS.values()), "verdict"]


def combination_cells(compared: Compared, costs: Costs, budget: str) -> list[list[str]]:
    """Each combination against PyramidCLIP: differences, and whether the mean of the three is beyond noise."""
    cells = []
    for row in compared.tables["combinations"]:
        found = [compared.difference(budget, REFERENCE, row, metric) for metric in METRICS]
        ratio = costs[compared.name][row]["seconds"] / costs[compared.name][REFERENCE]["seconds"]
        judged = sorted({beyond_noise(*one) for one in found if one is not None})
        cells.append(
            [TITLES.get(row, row), str(len(compared.of(budget, row))), f"{ratio:.2f} x", *map(with_error, found)]
            + [", ".join(judged) or OPEN]
        )
    return cells


def beyond_noise(difference: float, error: float | None) -> str:
    """Whether a difference is larger than two standard errors."""
    if error is None:
        return OPEN
    if abs(difference) <= STANDARD_ERRORS * error:
        return NOISE
    return MORE if difference > 0 else LESS


def search_cells(compared: Compared) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the search: `criterion` at each rate."""
    rates = sorted({rate for search in compared.searches.values() for rate in search["tried"]})
    cells = []
    for row, search in compared.searches.items():
        tried, best = search["tried"], search["best"]
        said = "not done" if best is None else f"{best:g}" + (" (the last)" if search["at_the_end"] else "")
        cells.append(
            [TITLES.get(row, row), *(f"{tried[rate]:.1f}" if rate in tried else "\u2013" for rate in rates), said]
        )
    return ["method", *(f"{rate:g}" for rate in rates), "chosen"], cells


COST_HEAD = ["row", "processor seconds a step", "beside CLIP", "least and most of the rounds", "memory, MB"]
USE_HEAD = ["row", "ms a picture", "ms a text", "\u00b5s a pair"]


def cost_cells(costs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What training costs."""
    cells = []
    for row, cost in costs.items():
        memory = "\u2013" if cost.get("megabytes") is None else f"{cost['megabytes']:.0f}"
        ratio = cost["seconds"] / costs[PLAIN]["seconds"]
        spread = f"{min(cost['rounds']):.3f} to {max(cost['rounds']):.3f}"
        cells.append([TITLES.get(row, row), f"{cost['seconds']:.3f}", f"{ratio:.2f} x", spread, memory])
    return cells


def use_cells(costs: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What a trained model costs; by tokens in a line of its own."""
    cells = []
    for row, cost in costs.items():
        for first, said in (("", ""), ("token_", ", by its tokens")):
            names = (f"{first}picture_milliseconds", f"{first}text_milliseconds", f"{first}pair_microseconds")
            if all(name in cost for name in names):
                numbers = [f"{cost[name]:.3f}" for name in names]
                cells.append([f"{TITLES.get(row, row)}{said}", *numbers])
    return cells


def outcome(found: Sequence[Direction]) -> str:
    """The verdicts counted, in a sentence."""
    if not found:
        return "No direction can be judged yet."
    counts = {name: sum(one.verdict == name for one in found) for name in (AGREES, DISAGREES, NOISE, OPEN)}
    text = (
        f"Of {len(found)} directions (CLIP to a method, a method to PyramidCLIP; zero-shot; both tables), "
        f"{counts[AGREES]} agree with Table 2, {counts[DISAGREES]} disagree, {counts[NOISE]} are within "
        "noise"
    )
    return text + (f", {counts[OPEN]} cannot be judged without a second seed." if counts[OPEN] else ".")


def setup_text(plan: Comparison) -> str:
    """What is run, and how it is judged."""
    parts = [
        f"{family['title']}: {family['steps']} steps of {next(iter(family['rows'].values()))['global_batch_size']} "
        f"pairs with equal samples, {family['search_steps']} in the search."
        for family in plan["families"].values()
    ]
    return (
        f"{' '.join(parts)} {plan['scenes']['train']:,} scenes to train on. In equal time a row makes as many steps as "
        f"take the processor time of PyramidCLIP's, by the costs below. All rows share data and their order, towers, "
        f"schedule, batch and weight decay; crops and further views are each recipe's. Measured are top-1 on pictures "
        f"of single objects and recall at 1 among {plan['scenes']['validation']} held-out scenes. FILIP trains no "
        f"embeddings and is measured by its tokens; DeFILIP trains tokens beside embeddings, is measured by both, and "
        f"judged by embeddings. \u00b1 is the standard deviation between seeds in tables of rows, the standard "
        f"error in tables of differences, from the deviation pooled over all rows of the family that have several "
        f"seeds. A difference within two standard errors is noise."
    )


LEVELS = (
    "The paper's figures are ImageNet zero-shot top-1 of ResNet50 and ViT-B/32 after 32 epochs of YFCC15M-V2; all but "
    "PyramidCLIP's are those of DeCLIP's own benchmark (arXiv 2203.05796). Their levels and ours have nothing in "
    "common; the directions can be compared."
)


##################################################################################################
#  The page                                                                                      #
##################################################################################################


def page_content(plan: Comparison, costs: Costs, results: Results, schedule: Schedule) -> dict[str, Any]:
    """The values that the template and the Markdown name."""
    families, every = [], []
    for name in costs:
        compared = Compared(name, plan, results, schedule)
        found = directions(compared)
        every += found
        searched_head, searched = search_cells(compared)
        families.append(
            {
                "title": compared.title,
                "results": [(title, row_cells(compared, budget)) for budget, title in BUDGETS.items()],
                "directions": direction_cells(found),
                "combinations": [
                    (title, combination_cells(compared, costs, budget)) for budget, title in BUDGETS.items()
                ],
                "search_head": searched_head,
                "search": searched,
                "costs": cost_cells(costs[name]),
                "use": use_cells(costs[name]),
            }
        )
    wanted = {
        (family, place["run"], seed)
        for family, budgets in schedule["runs"].items()
        for rows in budgets.values()
        for row, place in rows.items()
        for table, names in plan["tables"].items()
        if row in names
        for seed in plan["seeds"][table]
    }
    there = {(r["family"], r["run"], r["seed"]) for r in results}
    return {
        "outcome": outcome(every),
        "finished": f"{len(wanted & there)} of {len(wanted)} runs of the tables are finished.",
        "setup": setup_text(plan),
        "levels": LEVELS,
        "families": families,
        "row_head": ROW_HEAD,
        "direction_head": DIRECTION_HEAD,
        "combination_head": COMBINATION_HEAD,
        "cost_head": COST_HEAD,
        "use_head": USE_HEAD,
        "table_2_head": ["Table 2", *(plan["families"][name]["title"] for name in plan["families"])],
        "table_2": [
            [
                TITLES[row],
                *(
                    "\u2013" if (v := TABLE_2.get(name, {}).get(row)) is None else f"{v:.1f}"
                    for name in plan["families"]
                ),
            ]  # fmt: skip
            for row in TABLE_2["vit"]
        ],
        "published_head": ["method", "data", "encoder", "CLIP", "the method", "source"],
        "published": [list(row) for row in PUBLISHED],
    }


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of the page as Markdown."""
    parts = [content[name] for name in ("outcome", "finished", "setup", "levels")]
    for family in content["families"]:
        parts.append(f"## {family['title']}")
        for title, rows in family["results"]:
            parts += [f"### {title}", markdown_table(content["row_head"], rows)]
        if family["directions"]:
            parts += ["### Directions", markdown_table(content["direction_head"], family["directions"])]
        for title, rows in family["combinations"]:
            parts += [f"### One term more, {title.lower()}", markdown_table(content["combination_head"], rows)]
        parts += ["### Search", markdown_table(family["search_head"], family["search"])]
        parts += ["### Costs", markdown_table(content["cost_head"], family["costs"])]
        parts += ["### Use", markdown_table(content["use_head"], family["use"])]
    parts += ["## Published", markdown_table(content["table_2_head"], content["table_2"])]
    parts.append(markdown_table(content["published_head"], content["published"]))
    return "\n\n".join(parts) + "\n"


def write_comparison(plan: Comparison, costs: Costs, results: Results, schedule: Schedule, folder: Path) -> Path:
    """Writes report.html and report.md into `folder`; returns the page's path.

    Args:
        plan: The plan.
        costs: Family -> row -> what was measured; other families are left out.
        results: All that there are, of the search too.
        schedule: What follows from both.
        folder: Of the comparison.
    """
    content = page_content(plan, costs, [r for r in results if "costs" not in r], schedule)
    page = folder / "report.html"
    write_atomically(page, render(TEMPLATE, content).encode())
    write_atomically(folder / "report.md", markdown(content).encode())
    return page
