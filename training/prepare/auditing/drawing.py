"""Draws the report of an audit."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pyramidclip_hf.files import written_aside
from training.prepare.auditing.counts import LEVELS, MAX_TOKENS, TEXTS
from training.prepare.auditing.report import AuditReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(report: AuditReport, path: Path) -> None:
    """Draws the report as a PNG.

    Raises:
        ImportError: matplotlib is missing; it names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'the picture needs matplotlib: pip install "pyramidclip-hf[eval]" '
            '(from a checkout: pip install -e ".[eval]")'
        ) from error
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_levels(axes[0, 0], report)
    _draw_texts(axes[0, 1], report)
    colours = dict(zip(TEXTS, ("#d07020", "#2070b0", "#509040")))
    for level, found in report["texts"].items():
        counts = np.array(found["token_histogram"])
        axes[0, 2].step(range(len(counts)), counts / max(counts.sum(), 1), label=level, color=colours[level])
    axes[0, 2].set(
        title="Tokens of a text, both ends included", xlabel="tokens", ylabel="share of texts", xlim=(0, MAX_TOKENS + 1)
    )
    axes[0, 2].legend()
    for axis, histogram, title, form in (
        (axes[1, 0], report["shorter_side"], "Shorter side of the pictures, px", "d"),
        (axes[1, 1], report["aspect"], "Width over height", ".2f"),
    ):
        axis.bar([f"{edge:{form}}–" for edge in histogram["edges"]], histogram["counts"], color="#6080a0")
        axis.set(title=title, ylabel="pictures")
        axis.tick_params(axis="x", rotation=60)
    reasons = report["bad"]["reasons"]
    axes[1, 2].barh(list(reasons), list(reasons.values()), color="#b04040")
    axes[1, 2].set(title=f"Bad samples: {report['bad']['count']} of {report['samples']}", xlabel="samples")
    if not reasons:
        axes[1, 2].set_axis_off()
    figure.suptitle(", ".join(source["name"] for source in report["sources"])[:150])
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=110)


def _draw_levels(axis: "Axes", report: AuditReport) -> None:
    shares = np.array(report["both_present"])
    axis.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            axis.text(
                j, i, f"{share:.0%}", ha="center", va="center", color="white" if share > 0.6 else "black", fontsize=9
            )
    axis.set_xticks(range(len(LEVELS)), LEVELS, rotation=30)
    axis.set_yticks(range(len(LEVELS)), LEVELS)
    axis.set_title("Samples that have both levels")


def _draw_texts(axis: "Axes", report: AuditReport) -> None:
    places = np.arange(len(TEXTS))
    texts = [report["texts"][level] for level in TEXTS]
    for shift, values, label in (
        (-0.27, [found["repeated"] for found in texts], "repeats another"),
        (0.0, [found["twin_in_batch"] for found in texts], f"twin in a batch of {report['batch_size']}"),
        (0.27, [found["truncated"] for found in texts], "cut at 77 tokens"),
    ):
        shares = [100 * value for value in values]
        bars = axis.bar(places + shift, shares, 0.26, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(places, TEXTS)
    axis.set(title="Texts", ylabel="% of texts")
    axis.legend(fontsize=8)
