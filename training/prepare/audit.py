"""Looks at data before a month is spent on it.

    python -m training.prepare.audit SOURCE [SOURCE ...] [--output-dir DIR] [--json] [--workers 4]

A source is what training takes: a folder of shards, a glob, a list, a URL, a JSONL manifest
(`training.data.sources`). Every sample is read and its picture decoded. The report says, for each text level, how
many texts are repeated and how many are cut at 77 tokens; which levels are there together; which samples are bad,
why, and where; how large and how long the pictures are. It is printed; with `--output-dir` it is also kept as
`audit.txt`, `audit.json`, `audit.png` and `bad-samples.jsonl`, and an audit that was stopped continues with the
shards that are missing.

Each member is compared with its checksum where the index has them, and each index with all headers of its tar.

Memory does not grow with the data: repeated texts are counted by hashes, of which a random share is kept once there
are too many.
"""

import argparse
import contextlib
import sys
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command
from training.data.records import MAX_REGIONS


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The words of the command as settings. Raises `ValueError`."""
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="folder of shards, glob, list, URL or JSONL manifest"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
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
    parser.add_argument(
        "--max-regions",
        type=int,
        default=MAX_REGIONS,
        help="objects of a picture, as in training (default: %(default)s)",
    )
    parser.add_argument(
        "--drop-repeated-tags", action="store_true", help="as in training: a tag of several objects comes once"
    )
    parser.add_argument(
        "--add-checksums",
        action="store_true",
        help="keep a checksum of each member with the index of a shard that has none, so that damage is noticed later",
    )
    parser.add_argument(
        "--allow-unfinished", action="store_true", help="also data of which a step has begun and not ended"
    )
    arguments = parser.parse_args(words)
    for name in ("workers", "batch_size", "max_image_pixels", "max_regions"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: expected 1 or more, got {getattr(arguments, name)}")
    check_there("", arguments.sources, "shards or a manifest", "data")
    return arguments


if __name__ == "__main__":
    answer_words(parse)

from tqdm.auto import tqdm

from pyramidclip_hf import PyramidCLIPTokenizer
from pyramidclip_hf.files import json_text, write_text
from training.data.sources import DataSet, open_data_set
from training.prepare.auditing.counts import (
    AS_BY_DEFAULT,
    TEXTS,
    AuditCounts,
    AuditLimits,
    BadEntry,
    Hashes,
    RepeatCounter,
    audit_unit,
    load_part,
    part_path,
    save_part,
)
from training.prepare.auditing.drawing import draw
from training.prepare.auditing.report import AuditReport, as_text, summarise

# (number of the data set, number of its unit).
Job = tuple[int, int]


Audited = tuple[Job, AuditCounts, Hashes]


class _Auditor:
    """What a process reads units with."""

    def __init__(self, sources: Sequence[DataSet], limits: AuditLimits):
        self.sources, self.limits = sources, limits
        self.tokenizer = PyramidCLIPTokenizer()

    def audit(self, job: Job) -> Audited:
        data = self.sources[job[0]]
        return job, *audit_unit(data, data.units[job[1]], self.tokenizer, self.limits)


# Of this process, made when a pool starts it.
_auditors: list[_Auditor] = []


def _start_worker(sources: Sequence[DataSet], limits: AuditLimits) -> None:
    _auditors[:] = [_Auditor(sources, limits)]


def _audit_job(job: Job) -> Audited:
    return _auditors[0].audit(job)


def audit(
    sources: Sequence[DataSet],
    workers: int = 1,
    parts: Path | None = None,
    limits: AuditLimits = AS_BY_DEFAULT,
    progress: bool = True,
) -> tuple[AuditCounts, dict[str, RepeatCounter]]:
    """Audits data sets.

    Args:
        sources: the data sets.
        workers: processes that read.
        parts: a folder that keeps the result of each unit, so that a later call with the same data takes them up.
        limits: as in training.
        progress: shows a bar.

    Returns:
        The counts, and {text level: how often its texts repeat}.
    """
    tally, repeats = AuditCounts(), {level: RepeatCounter() for level in TEXTS}
    everything = [(d, u) for d, data in enumerate(sources) for u in range(len(data.units))]
    kept = {(d, u): part_path(parts, sources[d].units[u], limits) for d, u in everything} if parts is not None else {}
    jobs = [job for job in everything if job not in kept or not kept[job].exists()]
    to_do = set(jobs)
    total = sum(data.samples for data in sources)
    with (
        contextlib.closing(_results(sources, jobs, workers, limits)) as results,
        tqdm(total=total, unit="sample", desc="audit", disable=not progress) as bar,
    ):
        # In the order of the units, whoever read them and when: sums of floats depend on it in their last place.
        for job in everything:
            if job in to_do:
                _, found, hashes = next(results)
                if job in kept:
                    save_part(kept[job], found, hashes)
            else:
                found, hashes = load_part(kept[job])
            tally.add(found)
            for level in TEXTS:
                repeats[level].add(hashes[level])
            bar.update(found.samples)
    tally.bad.sort(key=lambda entry: (entry.where, entry.key))
    return tally, repeats


def _results(
    sources: Sequence[DataSet], jobs: Sequence[Job], workers: int, limits: AuditLimits
) -> Generator[Audited, None, None]:
    if workers <= 1:
        auditor = _Auditor(sources, limits)
        yield from map(auditor.audit, jobs)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start_worker, initargs=(sources, limits))
    try:
        # A few ahead of the workers: the results of all would not fit into memory.
        waiting: deque[Future[Audited]] = deque()
        for job in jobs:
            waiting.append(pool.submit(_audit_job, job))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        for last in waiting:
            yield last.result()
    finally:
        pool.shutdown(cancel_futures=True)


def keep(report: AuditReport, bad: Sequence[BadEntry], folder: Path) -> None:
    """Writes the report into a folder and removes the parts that it was put together from."""
    write_text(folder / "audit.txt", as_text(report, bad))
    write_text(folder / "audit.json", json_text(report, indent=1, ensure_ascii=False) + "\n")
    draw(report, folder / "audit.png")
    lines = [json_text(entry._asdict(), ensure_ascii=False) + "\n" for entry in bad]
    write_text(folder / "bad-samples.jsonl", "".join(lines))
    for part in (folder / "parts").glob("*.npz"):
        part.unlink()
    if (folder / "parts").exists():
        (folder / "parts").rmdir()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(arguments: argparse.Namespace) -> None:
    """Audits and reports."""
    folder: Path | None = arguments.output_dir
    sources = [open_data_set(name, allow_unfinished=arguments.allow_unfinished) for name in arguments.sources]
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    parts = folder / "parts" if folder else None
    limits = AuditLimits(
        arguments.max_image_pixels, arguments.max_regions, arguments.drop_repeated_tags, arguments.add_checksums
    )
    tally, repeats = audit(sources, arguments.workers, parts, limits, progress=sys.stderr.isatty())
    report = summarise(sources, tally, repeats, arguments.batch_size)
    if folder:
        keep(report, tally.bad, folder)
    sys.stdout.write(json_text(report) + "\n" if arguments.json else as_text(report, tally.bad))


if __name__ == "__main__":
    sys.exit(main())
