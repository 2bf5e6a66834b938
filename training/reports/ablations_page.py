"""The page of `python -m training.ablations`: our numbers beside the paper's, and whether they point the same way.

`write_page` is the entry; everything else is a pure function of the plan and the results. The paper's figures are those
of Tables 5, 13, 14 and 15 (arXiv 2204.14095): ImageNet zero-shot top-1 and MS-COCO recall at 1, 15M pairs, 8 epochs.
"""

import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from pyramidclip_hf.files import write_atomically
from pyramidclip_hf.pages import render
from training.reports.plots import row_panels


class Family(TypedDict):
    """A family of a plan. runs: name -> settings; rows: table -> row -> name of its run."""

    title: str
    runs: dict[str, dict[str, Any]]
    rows: dict[str, dict[str, str]]


class Plan(TypedDict):
    """What `training.ablations` runs. scenes: split -> how many; seeds: table -> which."""

    scenes: dict[str, int]
    families: dict[str, Family]
    seeds: dict[str, list[int]]


TEMPLATE = Path(__file__).with_name("ablations_template.html")
# metric -> (what we measure, what the paper measured), in percent
METRICS = {
    "zero_shot": ("zero-shot top-1", "ImageNet top-1"),
    "image_to_text": ("picture to caption R@1", "MS-COCO I2T R@1"),
    "text_to_image": ("caption to picture R@1", "MS-COCO T2I R@1"),
}
_RESNET_FULL, _VIT_FULL = (38.6, 36.4, 21.1), (35.9, 31.7, 18.8)
_RESNET_PEER, _VIT_PEER = (32.8, 28.5, 16.6), (28.8, 24.3, 13.4)
# family -> table -> row -> the three metrics. ResNet50 stands for our ResNet, ViT-B/32 for our ViT.
# None: the row is a point of Figure 6, of which no number is in the paper's text.
PAPER: dict[str, dict[str, dict[str, tuple[float, float, float] | None]]] = {
    "resnet": {
        "components": {
            "peer": _RESNET_PEER,
            "global_relation": (35.0, 31.9, 18.5),
            "local_relation": (36.7, 34.6, 19.6),
            "softened": _RESNET_FULL,
        },
        "peer_level": {
            "clip": (30.0, 26.0, 13.5),
            "clip_local_crop": (30.8, 26.5, 14.0),
            "peer": _RESNET_PEER,
            "peer_and_regions": (32.7, 28.5, 16.7),
        },
        "mismatched": {
            "full": _RESNET_FULL,
            "with_global_caption": (38.3, 36.1, 20.9),
            "with_local_summary": (38.4, 35.7, 20.8),
            "with_both": (38.4, 36.3, 21.1),
        },
    },
    "vit": {
        "components": {
            "peer": _VIT_PEER,
            "global_relation": (32.1, 27.9, 16.0),
            "local_relation": (33.4, 29.3, 17.7),
            "softened": (35.0, 31.4, 18.2),
            "leff": _VIT_FULL,
        },
        "peer_level": {
            "clip": (24.1, 19.4, 9.8),
            "clip_local_crop": (25.7, 21.6, 11.3),
            "peer": _VIT_PEER,
            "peer_and_regions": (29.0, 24.1, 13.5),
        },
        "mismatched": {
            "full": _VIT_FULL,
            "with_global_caption": (35.6, 32.2, 18.7),
            "with_local_summary": (35.5, 29.6, 17.8),
            "with_both": (35.5, 30.9, 18.1),
        },
        "front": dict.fromkeys(("m_0", "m_3", "m_6", "m_9", "m_12", "m_9_without_leff")),
    },
}
TABLES = {
    "components": ("Components", "Table 5 and Table 13: each row adds one part to the row before."),
    "peer_level": ("Peer level", "Table 14: what the peer level is made of, beside CLIP."),
    "mismatched": ("Mismatched alignments", "Table 15: levels that do not match, added to the whole method."),
    "front": (
        "Blocks in front of the regions",
        "Figure 6: M of the 12 blocks have LeFF, and regions enter behind them; here the same share of fewer blocks. "
        "The paper finds M = 9 best and M = 12 poor. The last row is ours: regions enter behind 9, no block has LeFF.",
    ),
}
ROW_TITLES = {
    "peer": "peer level",
    "global_relation": "+ global relation",
    "local_relation": "+ local relation",
    "softened": "+ softened targets",
    "leff": "+ LeFF",
    "clip": "CLIP (global, caption)",
    "clip_local_crop": "CLIP on local crops (local, caption)",
    "peer_and_regions": "peer level + (regions, tags)",
    "full": "the whole method",
    "with_global_caption": "+ (global, caption)",
    "with_local_summary": "+ (local, summary)",
    "with_both": "+ both",
    "m_0": "M = 0",
    "m_3": "M = 3",
    "m_6": "M = 6",
    "m_9": "M = 9",
    "m_12": "M = 12",
    "m_9_without_leff": "M = 9, without LeFF",
}
GAIN, NO_GAIN = "gain", "no gain"
# (table, row) -> (table, row), and what the paper says of the step
STEPS = [
    (("peer_level", "clip"), ("mismatched", "full"), GAIN),
    *(
        (("components", before), ("components", after), GAIN)
        for before, after in zip(
            ("peer", "global_relation", "local_relation", "softened"),
            ("global_relation", "local_relation", "softened", "leff"),
        )
    ),
    (("peer_level", "clip"), ("peer_level", "clip_local_crop"), GAIN),
    (("peer_level", "clip"), ("peer_level", "peer"), GAIN),
    (("peer_level", "peer"), ("peer_level", "peer_and_regions"), NO_GAIN),
    *(
        (("mismatched", "full"), ("mismatched", row), NO_GAIN)
        for row in ("with_global_caption", "with_local_summary", "with_both")
    ),
]
AGREES, DISAGREES, NOISE, OPEN = "agrees", "disagrees", "within noise", "not judged"
STANDARD_ERRORS = 2
MINUS = "\u2212"


##################################################################################################
#  Numbers                                                                                       #
##################################################################################################


def score(result: Mapping[str, Any], metric: str) -> float:
    """A metric of one run, in percent."""
    if metric == "zero_shot":
        return 100 * result["zero_shot"]["top_1"]
    return 100 * result["retrieval"]["global_caption"][f"{metric}_R@1"]


def pooled_deviation(groups: Iterable[Sequence[float]]) -> float | None:
    """Standard deviation within groups, each around its own mean; None where no group has two values."""
    groups = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    return math.sqrt(sum((len(g) - 1) * statistics.variance(g) for g in groups) / freedom) if freedom else None


def verdict(claim: str, difference: float, error: float | None) -> str:
    """Whether a difference of two rows goes the paper's way.

    claim: `GAIN` or `NO_GAIN`. error: standard error of the difference, same unit; None where it is not known. What is
    not larger than two of it is noise.
    """
    if error is None:
        return OPEN
    if abs(difference) <= STANDARD_ERRORS * error:
        return NOISE
    return AGREES if (difference > 0) == (claim == GAIN) else DISAGREES


class Measured:
    """The results of one family.

    Args:
        name: Of the family, in the plan.
        family: It.
        results: Those of all families, as `training.ablations.read_results` gives them.
    """

    def __init__(self, name: str, family: Family, results: Iterable[Mapping[str, Any]]):
        self.name, self.title, self.rows = name, family["title"], family["rows"]
        self.results = [result for result in results if result["family"] == name]

    def of(self, table: str, row: str) -> list[Mapping[str, Any]]:
        """The results of a row, by seed."""
        run = self.rows.get(table, {}).get(row)
        return sorted((r for r in self.results if r["run"] == run), key=lambda r: r["seed"])

    def values(self, table: str, row: str, metric: str) -> list[float]:
        """A metric of a row, one value a seed, in percent."""
        return [score(result, metric) for result in self.of(table, row)]

    def deviation(self, metric: str) -> float | None:
        """Standard deviation between seeds, over all rows that have several."""
        return pooled_deviation(
            [score(r, metric) for r in self.results if r["run"] == run]
            for run in sorted({r["run"] for r in self.results})
        )


@dataclass
class Step:
    """From one row to another: our difference and the paper's, in percentage points; `error` is that of ours."""

    family: str
    before: tuple[str, str]
    after: tuple[str, str]
    claim: str
    metric: str
    ours: float
    error: float | None
    paper: float
    verdict: str

    @property
    def title(self) -> str:
        """Both rows, such as "peer level -> + global relation"."""
        return f"{ROW_TITLES[self.before[1]]} \u2192 {ROW_TITLES[self.after[1]]}"


def paper_value(family: str, row: tuple[str, str], place: int) -> float:
    """A number of the paper, of a (table, row) and the metric at `place` of `METRICS`; NaN where it has none."""
    values = PAPER[family][row[0]][row[1]]
    return math.nan if values is None else values[place]


def steps_of(measured: Measured) -> list[Step]:
    """All steps of a family whose both ends have results and are different runs."""
    steps = []
    for before, after, claim in STEPS:
        same = measured.rows[before[0]].get(before[1]) == measured.rows[after[0]].get(after[1])
        for place, metric in enumerate(METRICS):
            old, new = measured.values(*before, metric), measured.values(*after, metric)
            if same or not old or not new:
                continue
            deviation = measured.deviation(metric)
            error = None if deviation is None else deviation * math.sqrt(1 / len(old) + 1 / len(new))
            ours = statistics.fmean(new) - statistics.fmean(old)
            told = paper_value(measured.name, after, place) - paper_value(measured.name, before, place)
            found = verdict(claim, ours, error)
            steps.append(Step(measured.name, before, after, claim, metric, ours, error, told, found))
    return steps


##################################################################################################
#  Words                                                                                         #
##################################################################################################


def with_deviation(values: Sequence[float]) -> str:
    """Mean and deviation, as "41.3 ± 0.6"; "41.3" of one value, "–" of none."""
    if not values:
        return "\u2013"
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def signed(number: float) -> str:
    """The number as "+2.0" or "−2.0"; what rounds to nothing is "0.0"."""
    text = f"{abs(number):.1f}"
    return text if text == "0.0" else ("+" if number > 0 else MINUS) + text


def table_rows(measured: Measured, table: str) -> list[list[str]]:
    """The rows of a results table: title, seeds, then for each metric ours and the paper's."""
    rows = []
    for row in PAPER[measured.name][table]:
        cells = [ROW_TITLES[row], str(len(measured.of(table, row)))]
        for place, metric in enumerate(METRICS):
            told = paper_value(measured.name, (table, row), place)
            cells += [
                with_deviation(measured.values(table, row, metric)),
                with_deviation([] if math.isnan(told) else [told]),
            ]
        rows.append(cells)
    return rows


def table_head() -> list[str]:
    """The head of `table_rows`."""
    return [
        "row",
        "seeds",
        *(text for ours, paper in METRICS.values() for text in (f"ours: {ours}", f"paper: {paper}")),
    ]


def step_rows(steps: Sequence[Step]) -> list[list[str]]:
    """Steps as text: step, what the paper says, then for each metric ours, the paper's and the verdict."""
    rows: dict[str, list[str]] = {}
    for step in steps:
        cells = rows.setdefault(step.title, [step.title, step.claim])
        error = "" if step.error is None else f" ± {step.error:.1f}"
        cells += [f"{signed(step.ours)}{error}", signed(step.paper), step.verdict]
    return list(rows.values())


def step_head() -> list[str]:
    """The head of `step_rows`."""
    return [
        "step",
        "paper says",
        *(text for ours, _ in METRICS.values() for text in (f"ours: {ours}", "paper", "verdict")),
    ]


def more_rows(measured: Measured) -> list[list[str]]:
    """Every distinct run once: retrieval at 1 and 5 with captions and with summaries, and zero-shot top-5."""
    rows, seen = [], set()
    for table, entries in measured.rows.items():
        for row, run in entries.items():
            results = measured.of(table, row)
            if run in seen or not results:
                continue
            seen.add(run)
            cells = [f"{TABLES[table][0]}: {ROW_TITLES[row]}"]
            for pair in ("global_caption", "global_summary"):
                for direction in ("text_to_image", "image_to_text"):
                    for k in (1, 5):
                        values = [100 * result["retrieval"][pair][f"{direction}_R@{k}"] for result in results]
                        cells.append(with_deviation(values))
            cells += [with_deviation([100 * result["zero_shot"][f"top_{k}"] for result in results]) for k in (1, 5)]
            cells.append(f"{statistics.fmean(1000 * r['seconds'] / r['samples_seen'] for r in results):.1f}")
            rows.append(cells)
    return rows


MORE_HEAD = (
    ["row"]
    + [
        f"{text} {direction} R@{k}"
        for text in ("caption:", "summary:")
        for direction in ("to picture", "from picture")
        for k in (1, 5)
    ]
    + ["zero-shot top-1", "top-5", "ms a sample"]
)


def outcome(steps: Sequence[Step]) -> str:
    """The verdicts counted, in a sentence."""
    if not steps:
        return "No step can be judged yet."
    counts = {name: sum(step.verdict == name for step in steps) for name in (AGREES, DISAGREES, NOISE, OPEN)}
    text = (
        f"Of {len(steps)} differences (steps x metrics), {counts[AGREES]} agree with the paper, {counts[DISAGREES]} "
        f"disagree, {counts[NOISE]} are within noise"
    )
    return text + (f", {counts[OPEN]} cannot be judged without a second seed." if counts[OPEN] else ".")


def disagreements(steps: Sequence[Step], titles: Mapping[str, str]) -> list[str]:
    """One line for each difference that goes the other way."""
    return [
        f"{titles[step.family]}, {step.title}, {METRICS[step.metric][0]}: ours {signed(step.ours)} ± {step.error:.1f}, "
        f"the paper {signed(step.paper)} ({step.claim})."
        for step in steps
        if step.verdict == DISAGREES
    ]


def how_judged() -> str:
    """What the verdicts mean."""
    return (
        "Differences are in percentage points; ± is the standard deviation between seeds in tables of rows, and the "
        "standard error of the difference in tables of steps. Its yardstick is the deviation between seeds pooled over "
        "all rows of the family that have several seeds. A difference within two standard errors is noise. Where the "
        "paper finds a gain, a larger rise agrees and a larger fall disagrees; where it finds no gain (regions against "
        "their own tags, mismatched levels), a rise disagrees, a fall agrees, and noise is what its finding predicts."
    )


def setup_text(plan: Plan, results: Sequence[Mapping[str, Any]]) -> str:
    """What was run, on what."""
    import torch

    scenes, parts = plan["scenes"]["train"], []
    for family in plan["families"].values():
        settings = next(iter(family["runs"].values()))
        samples = settings["max_steps"] * settings["global_batch_size"]
        parts.append(
            f"{family['title']}: {settings['max_steps']} optimizer steps of {settings['global_batch_size']} pairs in "
            f"every run ({samples:,} samples, {samples / scenes:.1f} passes over {scenes:,} scenes), peak learning "
            f"rate {settings['learning_rate']:g}."
        )
    hours = sum(result["seconds"] for result in results) / 3600
    return (
        f"{' '.join(parts)} {len(results)} trainings, {hours:.1f} hours of them added up, one thread each. The page "
        f"was written on {platform.machine()} with {os.cpu_count()} cores, Python {platform.python_version()}, PyTorch "
        f"{torch.__version__}."
    )


def metric_text(plan: Plan) -> str:
    """What is measured, in both."""
    return (
        f"Ours: top-1 on pictures of single objects with prompts, and recall at 1 among {plan['scenes']['validation']} "
        "held-out scenes with careful captions, each row by its global picture and caption embeddings whatever it was "
        "trained on. The paper's: ResNet50 and ViT-B/32, 15M pairs, 8 epochs, ImageNet and MS-COCO. The levels of the "
        "numbers have nothing in common; the directions can be compared. Which terms a row has was read from the "
        "paper's words, as the symbols of its tables are lost."
    )


##################################################################################################
#  The page                                                                                      #
##################################################################################################


def plot(measured: Measured, table: str) -> str | None:
    """Our values of each seed and the paper's, over the rows; None without results."""
    rows = PAPER[measured.name][table]
    panels = {
        title: (
            [measured.values(table, row, metric) for row in rows],
            [paper_value(measured.name, (table, row), place) for row in rows],
        )
        for place, (metric, (title, _)) in enumerate(METRICS.items())
    }
    if not any(values for ours, _ in panels.values() for values in ours):
        return None
    return row_panels([ROW_TITLES[row] for row in rows], panels)


def page_content(plan: Plan, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The values that the template and the Markdown name."""
    families = [Measured(name, family, results) for name, family in plan["families"].items() if name in PAPER]
    steps = {measured.name: steps_of(measured) for measured in families}
    every = [step for some in steps.values() for step in some]
    sections = []
    for table, (title, text) in TABLES.items():
        parts = [
            {
                "family": measured.title,
                "rows": table_rows(measured, table),
                "steps": step_rows([s for s in steps[measured.name] if s.before[0] == s.after[0] == table]),
                "plot": plot(measured, table),
            }
            for measured in families
            if any(measured.of(table, row) for row in PAPER[measured.name].get(table, {}))
        ]
        if parts:  # a run of some tables or one family has no empty ones
            sections.append({"title": title, "text": text, "parts": parts})
    overall = [
        {"family": measured.title, "steps": step_rows(across)}
        for measured in families
        if (across := [step for step in steps[measured.name] if step.before[0] != step.after[0]])
    ]
    return {
        "outcome": outcome(every),
        "disagreements": disagreements(every, {measured.name: measured.title for measured in families}),
        "how_judged": how_judged(),
        "setup": setup_text(plan, results),
        "metric_text": metric_text(plan),
        "table_head": table_head(),
        "step_head": step_head(),
        "sections": sections,
        "overall": overall,
        "more_head": MORE_HEAD,
        "more": [{"family": measured.title, "rows": rows} for measured in families if (rows := more_rows(measured))],
        "finished": len(results),
    }


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(content: Mapping[str, Any]) -> str:
    """The tables of the page as Markdown."""
    parts = [content["outcome"], content["setup"], content["metric_text"], content["how_judged"]]
    if content["disagreements"]:
        parts.append("Where they disagree:\n\n" + "\n".join(f"- {line}" for line in content["disagreements"]))
    if content["overall"]:
        parts.append("## CLIP against the whole method")
    for part in content["overall"]:
        parts += [f"### {part['family']}", markdown_table(content["step_head"], part["steps"])]
    for section in content["sections"]:
        parts += [f"## {section['title']}", section["text"]]
        for part in section["parts"]:
            parts += [f"### {part['family']}", markdown_table(content["table_head"], part["rows"])]
            if part["steps"]:
                parts.append(markdown_table(content["step_head"], part["steps"]))
    parts.append("## All numbers")
    for part in content["more"]:
        parts += [f"### {part['family']}", markdown_table(content["more_head"], part["rows"])]
    return "\n\n".join(parts) + "\n"


def write_page(plan: Plan, results: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Writes report.html and report.md into `folder`; returns the page's path."""
    content = page_content(plan, results)
    page = folder / "report.html"
    write_atomically(page, render(TEMPLATE, content).encode())
    write_atomically(folder / "report.md", markdown(content).encode())
    return page
