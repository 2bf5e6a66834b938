"""The plots of the reports, each as a data URI of an SVG picture. Pure functions of plain numbers."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pyramidclip_hf.pages import data_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of the runs, the same everywhere on the page; told apart in grey print and by the colour-blind too.
COLOURS = {"pyramid": "#1f5fbf", "clip": "#e07b1a", "clip_same_time": "#8f5a9e"}
TERM_COLOURS = ("#1f5fbf", "#e07b1a", "#17804a", "#b3342b", "#8f5a9e", "#6d6a2f", "#2b9cb3", "#c2568c", "#555f73")
INK, SOFT = "#1d2433", "#8a93a6"


def loss_floor(smoothing: float, pairs: int) -> float:
    """The least value of a softened cross-entropy over `pairs` entries: the entropy of its target, in nats."""
    if not smoothing:
        return 0.0
    spread = smoothing / (pairs - 1)
    return -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(spread)


def loss_curves(steps: Sequence[int], terms: Mapping[str, Sequence[float]], chance: float, floor: float) -> str:
    """Loss of each term against optimizer steps; dashed what guessing has, and the least possible value."""
    figure, (axes,) = _figure(9.6, 3.6)
    for (name, values), colour in zip(terms.items(), TERM_COLOURS):
        axes.plot(steps, values, color=colour, linewidth=1.7, label=name)
    for value, text in ((chance, f"guessing: ln N = {chance:.2f}"), (floor, f"least possible: {floor:.2f}")):
        axes.axhline(value, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            text, (steps[-1], value), xytext=(0, 4), textcoords="offset points", ha="right", fontsize=9, color=SOFT
        )
    low, high = min([floor, *map(min, terms.values())]), max([chance, *map(max, terms.values())])
    axes.set_ylim(low - 0.05 * (high - low), min(high, chance * 1.15) + 0.12 * (high - low))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("cross-entropy, nats")
    if len(terms) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9.5, borderaxespad=0)
    return _svg(figure)


def recall_curves(runs: Mapping[str, tuple[str, Sequence[float], Sequence[float]]], chance: float) -> str:
    """R@1 on unseen scenes against seconds of training.

    Args:
        runs: Name -> title, seconds, and the shares at these.
        chance: The share that guessing has.
    """
    figure, (axes,) = _figure(9.6, 3.4)
    for name, (title, seconds, shares) in runs.items():
        percent = [100 * share for share in shares]
        axes.plot(seconds, percent, color=COLOURS[name], linewidth=2, marker="o", markersize=4, label=title)
    axes.axhline(100 * chance, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        f"guessing: {100 * chance:.1f} %",
        (0, 100 * chance),
        xytext=(4, 4),
        textcoords="offset points",
        fontsize=9,
        color=SOFT,
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("caption to picture R@1, %")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9.5, borderaxespad=0)
    return _svg(figure)


def class_bars(accuracy: Mapping[str, float], chance: float) -> str:
    """Top-1 of each class as bars, best first."""
    order = sorted(accuracy, key=lambda name: (-accuracy[name], name))
    figure, (axes,) = _figure(11, 3.2)
    axes.bar(range(len(order)), [100 * accuracy[name] for name in order], color=COLOURS["pyramid"], width=0.75)
    axes.axhline(100 * chance, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=7.5)
    axes.set_xlim(-0.7, len(order) - 0.3)
    axes.set_ylim(0, 100)
    axes.set_ylabel("top-1, %")
    return _svg(figure)


def row_panels(rows: Sequence[str], panels: Mapping[str, tuple[Sequence[Sequence[float]], Sequence[float]]]) -> str:
    """Panels side by side: our values over the rows of a table, and, dashed on an axis of its own, the paper's.

    Args:
        rows: Names of the rows.
        panels: Title -> values of each row, one a seed and possibly none, and the paper's value of each; in percent.
    """
    figure, all_axes = _figure(4.0 * len(panels), 3.6, len(panels))
    places = range(len(rows))
    for axes, (title, (ours, paper)) in zip(all_axes, panels.items()):
        told = axes.twinx()
        told.plot(places, paper, color=SOFT, linestyle=(0, (4, 3)), marker="s", markersize=3.5, linewidth=1.2)
        told.tick_params(colors=SOFT, labelsize=8.5)
        told.spines[["top", "left", "right", "bottom"]].set_visible(False)
        dots = [(place, value) for place, values in zip(places, ours) for value in values]
        axes.scatter([place for place, _ in dots], [value for _, value in dots], color=COLOURS["clip"], s=16, zorder=3)
        means = [(place, sum(values) / len(values)) for place, values in zip(places, ours) if values]
        axes.plot(*zip(*means), color=COLOURS["pyramid"], linewidth=1.8)
        axes.set_xticks(places, rows, rotation=28, ha="right", fontsize=8)
        axes.set_title(title, fontsize=10, color=INK)
    return _svg(figure)


def _figure(width: float, height: float, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure, in inches, and its axes, one a column."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('the report needs matplotlib: pip install -e ".[eval]"') from error
    figure = Figure(figsize=(width, height), layout="constrained")
    every = figure.subplots(1, columns, squeeze=False)[0]
    for axes in every:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#c9cfda")
        axes.tick_params(color="#c9cfda", labelcolor=INK, labelsize=9.5)
        axes.grid(axis="y", color="#eceff4", linewidth=1)
        axes.set_axisbelow(True)
    return figure, list(every)


def _svg(figure: "Figure") -> str:
    import matplotlib

    file = io.BytesIO()
    # Without a date and with fixed ids, equal numbers give equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "pyramidclip", "font.family": "DejaVu Sans"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return data_uri(file.getvalue(), "image/svg+xml")
