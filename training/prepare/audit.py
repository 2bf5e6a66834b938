"""Looks at data before a month is spent on it.

    python -m training.prepare.audit SOURCE [SOURCE ...] [--output-dir DIR] [--json] [--workers 4]

A source is what training takes: a folder of shards, a glob, a list, a URL, a JSONL manifest
(`training.data.sources`). Every sample is read and its picture decoded. The report says, for each text level, how
many texts are repeated and how many are cut at 77 tokens; which levels are there together; which samples are bad,
why, and where; how large and how long the pictures are. It is printed; with `--output-dir` it is also kept as
`audit.txt`, `audit.json`, `audit.png` and `bad-samples.jsonl`, and an audit that was stopped continues with the
shards that are missing.

Memory does not grow with the data: repeated texts are counted by hashes, of which a random share is kept once there
are too many.
"""

import argparse
import collections
import hashlib
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyramidclip_hf import PyramidCLIPTokenizer
from pyramidclip_hf.configuration_pyramidclip import levels_of_kind
from pyramidclip_hf.files import write_atomically
from training.data.records import BadSample, has_level, level_text, sample_from_members
from training.data.sources import open_data_set
from training.data.views import BadPicture, open_picture, upright_size

TEXTS = levels_of_kind("text")
# What every good sample has comes first.
OPTIONAL_TEXTS = tuple(level for level in TEXTS if level != "caption")
LEVELS = ("picture", "caption", *OPTIONAL_TEXTS, "regions")
# Lower edges; the last bin is open.
SIDE_EDGES = (0, 32, 64, 128, 224, 256, 384, 512, 768, 1024, 2048, 4096)
ASPECT_EDGES = (0.0, 0.34, 0.5, 0.75, 0.95, 1.05, 1.34, 2.0, 3.0)
MAX_TOKENS = 77
NAMED = 20
_FREQUENT = 2000
_TEXTS_AT_ONCE = 512


class RepeatCounter:
    """How many of many texts are repeated, from 64-bit hashes in bounded memory.

    When more than `limit` hashes are kept, only those that end in k zero bits stay, k growing as needed. All copies
    of a text share their hash, so the share of copies among what is kept estimates the share among all; up to `limit`
    texts it is exact.
    """

    def __init__(self, limit=20_000_000):
        self.limit, self.bits = limit, 0
        self._parts, self._kept = [], 0

    def add(self, hashes):
        """Takes a uint64 array."""
        hashes = hashes[(hashes & np.uint64((1 << self.bits) - 1)) == 0] if self.bits else hashes
        self._parts.append(hashes)
        self._kept += len(hashes)
        while self._kept > self.limit:
            self.bits += 1
            kept = np.concatenate(self._parts)
            kept = kept[(kept & np.uint64((1 << self.bits) - 1)) == 0]
            self._parts, self._kept = [kept], len(kept)

    def result(self, batch_size):
        """Share of texts that repeat another one (distinct texts counted once), and the expected share of samples
        that meet their own text again in a random batch of `batch_size`."""
        if not self._kept:
            return {"repeated": 0.0, "twin_in_batch": 0.0, "exact": True}
        _, counts = np.unique(np.concatenate(self._parts), return_counts=True)
        total = self._kept * 2.0**self.bits
        others = (counts - 1) / max(total - 1, 1)
        twins = (counts * (1 - (1 - others) ** (batch_size - 1))).sum() / self._kept
        return {"repeated": float(1 - len(counts) / self._kept), "twin_in_batch": float(twins), "exact": self.bits == 0}


@dataclass
class Tally:
    """What is counted; two of them add up."""

    samples: int = 0
    bad: list = field(default_factory=list)
    bad_reasons: collections.Counter = field(default_factory=collections.Counter)
    levels: collections.Counter = field(default_factory=collections.Counter)
    truncated: collections.Counter = field(default_factory=collections.Counter)
    lengths: dict = field(default_factory=lambda: {level: [0] * (MAX_TOKENS + 1) for level in TEXTS})
    sides: list = field(default_factory=lambda: [0] * len(SIDE_EDGES))
    aspects: list = field(default_factory=lambda: [0] * len(ASPECT_EDGES))
    kinds: collections.Counter = field(default_factory=collections.Counter)
    region_counts: collections.Counter = field(default_factory=collections.Counter)
    region_widths: collections.Counter = field(default_factory=collections.Counter)
    frequent: dict = field(default_factory=lambda: {level: collections.Counter() for level in TEXTS})

    def add(self, other):
        """Adds the counts of another tally to this one."""
        self.samples += other.samples
        self.bad += other.bad
        for name in ("bad_reasons", "levels", "truncated", "kinds", "region_counts", "region_widths"):
            getattr(self, name).update(getattr(other, name))
        for name in ("sides", "aspects"):
            setattr(self, name, [a + b for a, b in zip(getattr(self, name), getattr(other, name))])
        for level in TEXTS:
            self.lengths[level] = [a + b for a, b in zip(self.lengths[level], other.lengths[level])]
            self.frequent[level].update(other.frequent[level])
            if len(self.frequent[level]) > 5 * _FREQUENT:
                self.frequent[level] = collections.Counter(dict(self.frequent[level].most_common(_FREQUENT)))

    def dumps(self):
        """JSON; counters become lists of pairs, for their keys need not be strings."""
        return json.dumps({name: _pairs(value) for name, value in vars(self).items()})

    @classmethod
    def loads(cls, text):
        """The inverse of `dumps`."""
        data = json.loads(text)
        for name in ("bad_reasons", "levels", "truncated", "kinds", "region_counts", "region_widths"):
            data[name] = _counter(data[name])
        data["frequent"] = {level: _counter(pairs) for level, pairs in data["frequent"].items()}
        data["bad"] = [tuple(entry) for entry in data["bad"]]
        return cls(**data)


def _pairs(value):
    if isinstance(value, collections.Counter):
        return [[list(key) if isinstance(key, tuple) else key, count] for key, count in value.items()]
    if isinstance(value, dict):
        return {name: _pairs(one) for name, one in value.items()}
    return value


def _counter(pairs):
    return collections.Counter({tuple(key) if isinstance(key, list) else key: count for key, count in pairs})


def audit_unit(data, unit, tokenizer, max_image_pixels=None):
    """Reads one unit of a `DataSet`. Returns its `Tally` and {text level: uint64 hashes of its texts}."""
    tally, texts = Tally(), {level: [] for level in TEXTS}
    hashes = {level: [] for level in TEXTS}
    reader = data.open(unit)
    try:
        for number in range(len(reader)):
            tally.samples += 1
            try:
                sample = _read(reader, number, tally, max_image_pixels)
            except BadSample as bad:
                tally.bad.append(bad.args)
                tally.bad_reasons[bad.reason] += 1
                continue
            for level, text in _texts(sample):
                texts[level].append(text)
                if len(texts[level]) == _TEXTS_AT_ONCE:
                    hashes[level].append(_count_texts(texts[level], level, tokenizer, tally))
                    texts[level] = []
    finally:
        reader.close()
    for level in TEXTS:
        hashes[level].append(_count_texts(texts[level], level, tokenizer, tally))
        tally.frequent[level] = collections.Counter(dict(tally.frequent[level].most_common(_FREQUENT)))
    return tally, {level: np.concatenate(parts) for level, parts in hashes.items()}


def _texts(sample):
    """(level, text) of what a sample can show the text tower: each of several captions counts."""
    for caption in sample.captions or [sample.caption]:
        yield "caption", caption
    for level in OPTIONAL_TEXTS:
        if has_level(sample, level):
            yield level, level_text(sample, level)


def _read(reader, number, tally, max_image_pixels):
    """Reads and decodes a sample and counts what it has; `BadSample` where training would not take it."""
    members = reader.read(number)
    key = reader.key(number)
    sample = sample_from_members(members, key, reader.name)
    if sample.caption is None:
        raise BadSample(key, reader.name, "no-caption", "expected KEY.txt, or `caption` in KEY.json")
    try:
        picture = open_picture(sample.image, max_image_pixels)
        width, height = upright_size(picture) if picture.format in ("JPEG", "MPO") else picture.size
        mode = f"{picture.format} {picture.mode}"
        # At an eighth of the size all data are still read, which is what finds broken ones.
        picture.draft(None, (max(picture.width // 8, 1), max(picture.height // 8, 1)))
        picture.load()
    except BadPicture as bad:
        raise BadSample(key, reader.name, bad.reason, str(bad)) from None
    except (OSError, SyntaxError, ValueError, TypeError, IndexError, OverflowError, MemoryError) as error:
        raise BadSample(key, reader.name, "bad-picture", f"{type(error).__name__}: {error}") from None
    there = (True, True, *(has_level(sample, level) for level in (*OPTIONAL_TEXTS, "roi")))
    tally.levels[there] += 1
    tally.kinds[mode] += 1
    tally.sides[int(np.searchsorted(SIDE_EDGES, min(width, height), "right")) - 1] += 1
    tally.aspects[int(np.searchsorted(ASPECT_EDGES, width / height, "right")) - 1] += 1
    tally.region_counts[min(len(sample.regions or ()), 100)] += 1
    if sample.roi is not None:
        tally.region_widths[sample.roi.shape[1]] += 1
    return sample


def _count_texts(texts, level, tokenizer, tally):
    if not texts:
        return np.zeros(0, np.uint64)
    encoded = tokenizer(
        texts, truncation=True, max_length=MAX_TOKENS, return_attention_mask=False, return_truncation=True
    )
    for ids in encoded["input_ids"]:
        tally.lengths[level][len(ids)] += 1
    tally.truncated[level] += sum(encoded["truncated"])
    # What the model sees decides whether two texts are the same: their ids.
    rows = [np.asarray(ids, np.int32).tobytes() for ids in encoded["input_ids"]]
    tally.frequent[level].update(texts)
    if len(tally.frequent[level]) > 5 * _FREQUENT:
        tally.frequent[level] = collections.Counter(dict(tally.frequent[level].most_common(_FREQUENT)))
    return np.array([int.from_bytes(hashlib.blake2b(row, digest_size=8).digest(), "little") for row in rows], np.uint64)


_worker = {}


def _start_worker(sources, max_image_pixels):
    _worker.update(data=sources, tokenizer=PyramidCLIPTokenizer(), limit=max_image_pixels)


def _audit_job(job):
    data_set, unit = job
    data = _worker["data"][data_set]
    return job, *audit_unit(data, data.units[unit], _worker["tokenizer"], _worker["limit"])


def audit(sources, workers=1, parts=None, max_image_pixels=100_000_000, progress=True):
    """Audits data sets (list of `DataSet`) and returns the `Tally` and {text level: RepeatCounter}.

    `parts`, a folder, keeps the result of each unit, so that a later call with the same data takes them up.
    """
    from tqdm.auto import tqdm

    tally, repeats = Tally(), {level: RepeatCounter() for level in TEXTS}
    jobs, done = [], []
    for d, data in enumerate(sources):
        for u, unit in enumerate(data.units):
            (done if parts is not None and _part_path(parts, unit).exists() else jobs).append((d, u))
    with tqdm(total=sum(data.samples for data in sources), unit="sample", desc="audit", disable=not progress) as bar:

        def take(found, hashes):
            tally.add(found)
            for level in TEXTS:
                repeats[level].add(hashes[level])
            bar.update(found.samples)

        for d, u in done:
            take(*_load_part(_part_path(parts, sources[d].units[u])))
        for (d, u), found, hashes in _results(sources, jobs, workers, max_image_pixels):
            if parts is not None:
                _save_part(_part_path(parts, sources[d].units[u]), found, hashes)
            take(found, hashes)
    tally.bad.sort(key=lambda entry: (entry[1], entry[0]))
    return tally, repeats


def _results(sources, jobs, workers, max_image_pixels):
    if workers <= 1:
        _start_worker(sources, max_image_pixels)
        yield from map(_audit_job, jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(sources, max_image_pixels))
    try:
        # A few ahead of the workers: the results of all would not fit into memory.
        waiting, rest = set(), iter(jobs)
        for job in rest:
            waiting.add(pool.submit(_audit_job, job))
            if len(waiting) >= 2 * workers:
                first = next(as_completed(waiting))
                waiting.remove(first)
                yield first.result()
        for last in as_completed(waiting):
            yield last.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _part_path(parts, unit):
    name = hashlib.sha256(json.dumps([unit.name, unit.identity, unit.first]).encode()).hexdigest()[:24]
    return Path(parts) / f"{name}.npz"


def _save_part(path, tally, hashes):
    import io

    file = io.BytesIO()
    np.savez(file, tally=np.frombuffer(tally.dumps().encode(), np.uint8), **hashes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())


def _load_part(path):
    with np.load(path, allow_pickle=False) as data:
        return Tally.loads(data["tally"].tobytes().decode()), {level: data[level] for level in TEXTS}


def summarise(sources, tally, repeats, batch_size):
    """The report as a dict that JSON can hold; shares are 0..1."""
    good = sum(tally.levels.values())
    both = [[0] * len(LEVELS) for _ in LEVELS]
    for there, count in tally.levels.items():
        for i in range(len(LEVELS)):
            for j in range(len(LEVELS)):
                both[i][j] += count * (there[i] and there[j])
    texts = {}
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


def as_text(report, bad):
    """The report for people."""
    total, good = report["samples"], report["samples"] - report["bad"]["count"]
    lines = [f"{s['name']}: {s['samples']} samples in {s['shards']} units" for s in report["sources"]]
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
    lines += [f"  shorter side  {label:>12} px  {n:>9}" for label, n in _bins(report["shorter_side"], ":d")]
    lines += [f"  width/height  {label:>12}     {n:>9}" for label, n in _bins(report["aspect"], ":.2f")]
    lines += [f"  {kind:<26}   {n:>9}" for kind, n in report["picture_kinds"].items()]
    counts = report["regions"]["counts"]
    if any(counts):
        mean = sum(int(k) * n for k, n in counts.items()) / max(good, 1)
        widths = ", ".join(f"{w} ({n} samples)" for w, n in report["regions"]["feature_widths"].items()) or "none"
        lines += ["", f"Regions: {mean:.1f} a picture; feature widths: {widths}"]
    return "\n".join(lines) + "\n"


def _bins(histogram, form):
    edges = histogram["edges"]
    for i, count in enumerate(histogram["counts"]):
        if count:
            low = format(edges[i], form[1:])
            yield (f"{low}-{format(edges[i + 1], form[1:])}" if i + 1 < len(edges) else f"{low}-"), count


def draw(report, path):
    """Draws the report as a PNG. Raises `ImportError` naming the extra where matplotlib is missing."""
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
    for axis, name, title, form in (
        (axes[1, 0], "shorter_side", "Shorter side of the pictures, px", ":d"),
        (axes[1, 1], "aspect", "Width over height", ":.2f"),
    ):
        labels = [f"{format(edge, form[1:])}–" for edge in report[name]["edges"]]
        axis.bar(labels, report[name]["counts"], color="#6080a0")
        axis.set(title=title, ylabel="pictures")
        axis.tick_params(axis="x", rotation=60)
    reasons = report["bad"]["reasons"]
    axes[1, 2].barh(list(reasons), list(reasons.values()), color="#b04040")
    axes[1, 2].set(title=f"Bad samples: {report['bad']['count']} of {report['samples']}", xlabel="samples")
    if not reasons:
        axes[1, 2].set_axis_off()
    figure.suptitle(", ".join(source["name"] for source in report["sources"])[:150])
    figure.savefig(path, dpi=110)


def _draw_levels(axis, report):
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


def _draw_texts(axis, report):
    places = np.arange(len(TEXTS))
    for shift, name, label in (
        (-0.27, "repeated", "repeats another"),
        (0.0, "twin_in_batch", f"twin in a batch of {report['batch_size']}"),
        (0.27, "truncated", "cut at 77 tokens"),
    ):
        shares = [100 * report["texts"][level][name] for level in TEXTS]
        bars = axis.bar(places + shift, shares, 0.26, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set_xticks(places, TEXTS)
    axis.set(title="Texts", ylabel="% of texts")
    axis.legend(fontsize=8)


def parse_arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="folder of shards, glob, list, URL or JSONL manifest"
    )
    parser.add_argument(
        "--output-dir",
        help="keeps the report as text, JSON and PNG, and the list of bad samples; a stopped audit continues",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=4096, help="global batch in which twins are expected (default: %(default)s)"
    )
    parser.add_argument(
        "--max-image-pixels", type=int, default=100_000_000, help="as in training (default: %(default)s)"
    )
    return parser.parse_args(argv)


def keep(report, bad, folder):
    """Writes the report into a folder and removes the parts that it was put together from."""
    (folder / "audit.txt").write_text(as_text(report, bad), encoding="utf-8")
    write_atomically(folder / "audit.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    draw(report, folder / "audit.png")
    named = ("key", "where", "reason", "detail")
    lines = [json.dumps(dict(zip(named, entry)), ensure_ascii=False) + "\n" for entry in bad]
    write_atomically(folder / "bad-samples.jsonl", "".join(lines).encode())
    for part in (folder / "parts").glob("*.npz"):
        part.unlink()
    if (folder / "parts").exists():
        (folder / "parts").rmdir()


def main(argv=None):
    """Audits and reports."""
    args = parse_arguments(argv)
    folder = Path(args.output_dir) if args.output_dir else None
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    sources = [open_data_set(name) for name in args.sources]
    parts = folder / "parts" if folder else None
    tally, repeats = audit(sources, args.workers, parts, args.max_image_pixels, sys.stderr.isatty())
    report = summarise(sources, tally, repeats, args.batch_size)
    if folder:
        keep(report, tally.bad, folder)
    sys.stdout.write(json.dumps(report) + "\n" if args.json else as_text(report, tally.bad))


if __name__ == "__main__":
    main()
