"""Judges the counts of an audit: the report as JSON holds it, and as people read it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np

from training.data.sources import DataSet
from training.prepare.auditing.counts import (
    ASPECT_EDGES,
    LEVELS,
    SIDE_EDGES,
    TEXTS,
    AuditCounts,
    BadEntry,
    RepeatCounter,
)

NAMED = 20


class TextReport(TypedDict):
    """What is said of the texts of a level; shares are 0..1."""

    texts: int
    repeated: float
    twin_in_batch: float
    exact: bool
    truncated: float
    mean_tokens: float
    token_histogram: list[int]
    most_frequent: list[list[str | int]]


class Histogram(TypedDict):
    """Lower edges of bins, of which the last is open, and how many fell into each."""

    edges: list[float]
    counts: list[int]


class BadReport(TypedDict):
    """How many samples are bad, and why."""

    count: int
    reasons: dict[str, int]


class RegionReport(TypedDict):
    """{number of regions: samples} and {width of the features: samples}."""

    counts: dict[int, int]
    feature_widths: dict[int, int]


class SourceReport(TypedDict):
    """One data set."""

    name: str
    samples: int
    shards: int


class Combination(TypedDict):
    """Levels that are there together, and in how many samples."""

    levels: list[str]
    samples: int


class AuditReport(TypedDict):
    """The report as JSON holds it; shares are 0..1."""

    sources: list[SourceReport]
    samples: int
    bad: BadReport
    batch_size: int
    texts: dict[str, TextReport]
    levels: list[str]
    both_present: list[list[float]]
    combinations: list[Combination]
    shorter_side: Histogram
    aspect: Histogram
    picture_kinds: dict[str, int]
    regions: RegionReport


def summarise(
    sources: Sequence[DataSet], tally: AuditCounts, repeats: Mapping[str, RepeatCounter], batch_size: int
) -> AuditReport:
    """The report.

    Args:
        sources: the data sets.
        tally: what was counted in all of them.
        repeats: {text level: its counter}.
        batch_size: global batch in which twins are expected.
    """
    good = sum(tally.levels.values())
    both = [[0] * len(LEVELS) for _ in LEVELS]
    for there, count in tally.levels.items():
        for i in range(len(LEVELS)):
            for j in range(len(LEVELS)):
                both[i][j] += count * (there[i] and there[j])
    texts: dict[str, TextReport] = {}
    for level in TEXTS:
        lengths = np.array(tally.lengths[level])
        total = int(lengths.sum())
        texts[level] = {
            "texts": total,
            **repeats[level].result(batch_size),
            "truncated": tally.truncated[level] / max(total, 1),
            "mean_tokens": float((lengths * np.arange(len(lengths))).sum() / max(total, 1)),
            "token_histogram": tally.lengths[level],
            "most_frequent": [[text[:200], n] for text, n in tally.frequent[level].most_common(5) if n > 1],
        }
    return {
        "sources": [{"name": data.name, "samples": data.samples, "shards": len(data.units)} for data in sources],
        "samples": tally.samples,
        "bad": {"count": len(tally.bad), "reasons": dict(tally.bad_reasons.most_common())},
        "batch_size": batch_size,
        "texts": texts,
        "levels": list(LEVELS),
        "both_present": [[n / max(good, 1) for n in row] for row in both],
        "combinations": [
            {"levels": [name for name, is_there in zip(LEVELS, there) if is_there], "samples": count}
            for there, count in tally.levels.most_common()
        ],
        "shorter_side": {"edges": list(SIDE_EDGES), "counts": tally.sides},
        "aspect": {"edges": list(ASPECT_EDGES), "counts": tally.aspects},
        "picture_kinds": dict(tally.kinds.most_common()),
        "regions": {"counts": dict(sorted(tally.region_counts.items())), "feature_widths": dict(tally.region_widths)},
    }


def as_text(report: AuditReport, bad: Sequence[BadEntry]) -> str:
    """The report for people; `bad` are the samples to name."""
    total, good = report["samples"], report["samples"] - report["bad"]["count"]
    lines = [f"{s['name']}: {s['samples']} samples, units: {s['shards']}" for s in report["sources"]]
    lines += ["", f"Bad samples: {report['bad']['count']} of {total} ({report['bad']['count'] / max(total, 1):.2%})"]
    lines += [f"  {count:>9} {reason}" for reason, count in report["bad"]["reasons"].items()]
    lines += [f"  {where}: {key}: {reason}: {detail}" for key, where, reason, detail in bad[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"  ... {len(bad) - NAMED} more (all of them in bad-samples.jsonl with --output-dir)")
    lines += ["", f"Texts{'':11}there  repeated  twin in a batch of {report['batch_size']:<6}  cut at 77  mean tokens"]
    for level, found in report["texts"].items():
        mark = "" if found["exact"] else " (estimated)"
        lines.append(
            f"  {level:<8} {found['texts']:>10}  {found['repeated']:>8.2%}  {found['twin_in_batch']:>25.2%}"
            f"  {found['truncated']:>9.2%}  {found['mean_tokens']:>11.1f}{mark}"
        )
    for level, found in report["texts"].items():
        lines += [f"  most frequent {level}: {n} x {text!r}" for text, n in found["most_frequent"][:3]]
    names = report["levels"]
    lines += ["", "Both present, of the good samples" + "".join(f"{name:>10}" for name in names)]
    lines += [
        f"  {name:<31}" + "".join(f"{share:>10.1%}" for share in row)
        for name, row in zip(names, report["both_present"])
    ]
    lines += ["", "Pictures (upright)"]
    lines += [f"  shorter side  {label:>12} px  {n:>9}" for label, n in _bins(report["shorter_side"], "d")]
    lines += [f"  width/height  {label:>12}     {n:>9}" for label, n in _bins(report["aspect"], ".2f")]
    lines += [f"  {kind:<26}   {n:>9}" for kind, n in report["picture_kinds"].items()]
    counts = report["regions"]["counts"]
    if any(counts):
        mean = sum(int(k) * n for k, n in counts.items()) / max(good, 1)
        widths = ", ".join(f"{w} ({n} samples)" for w, n in report["regions"]["feature_widths"].items()) or "none"
        lines += ["", f"Regions: {mean:.1f} a picture; feature widths: {widths}"]
    return "\n".join(lines) + "\n"


def _bins(histogram: Histogram, form: str) -> Iterator[tuple[str, int]]:
    edges = histogram["edges"]
    for i, count in enumerate(histogram["counts"]):
        if count:
            high = f"{edges[i + 1]:{form}}" if i + 1 < len(edges) else ""
            yield f"{edges[i]:{form}}-{high}", count
