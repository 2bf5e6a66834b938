"""How the preparation commands run: shard by shard, on any number of processes, to be stopped and continued at any
moment.

A shard is done or not done. Its tar is written aside and renamed (`training.data.shards.ShardWriter`); after that its
report is, in `FOLDER/reports/STAGE/`, and only the report counts as done. So a run that was killed does the
interrupted shard again and leaves the same bytes as one that was not. Shard i belongs to process i mod P; processes
never wait for each other, so it does not matter whether they are those of one `accelerate launch`, of several
machines or of a Slurm array whose tasks run days apart. Whoever finds all reports there adds them up.

What could not be used is never dropped silently: every report lists it with place and reason, and what came in equals
what went out and what was rejected, or the run stops.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm
from transformers import HfArgumentParser

from pyramidclip_hf.files import write_atomically
from training.data.records import BadSample, Sample, members_from_sample, sample_from_members
from training.data.shards import ShardReader, ShardWriter, read_dataset_json, write_dataset_json


@dataclass
class WorkArguments:
    """The flags that every command has for how it is run; none of them changes the result."""

    part_index: int = field(default=0, metadata={"help": "This launch's number among --part_count (Slurm array id)."})
    part_count: int = field(default=1, metadata={"help": "How many launches share the work, without talking."})
    overwrite: bool = field(
        default=False, metadata={"help": "Do finished shards again where they were made with other settings."}
    )
    cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is an accelerator."})


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that share the work; `device` is where its models run."""

    index: int = 0
    count: int = 1
    device: object = "cpu"

    def share(self, items):
        """The items of this process."""
        return list(items)[self.index :: self.count]

    def shared_after_own(self, items):
        """All items, this process's own first: for small jobs that anybody may do where their owner has not."""
        items = list(items)
        own = self.share(items)
        return own + [item for item in items if item not in set(own)]


def parse(*dataclasses, argv=None):
    """Parses the command line into instances of `dataclasses`; both `--max-pixels` and `--max_pixels` are
    understood."""
    return HfArgumentParser(dataclasses).parse_args_into_dataclasses(args=argv)


def this_worker(arguments, has_model=True):
    """The `Worker` of this process from `accelerate launch` (or torchrun) and --part_index / --part_count.

    Without a model no accelerator is touched, so there may be more processes than accelerators.

    Raises `ValueError` on a part outside the count, `ImportError` naming the extra where accelerate is absent.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('preparing data needs accelerate: pip install -e ".[train]"') from error
    if not 0 <= arguments.part_index < arguments.part_count:
        raise ValueError(
            f"part_index {arguments.part_index} of part_count {arguments.part_count}: expected 0 <= index < count"
        )
    state = PartialState(cpu=arguments.cpu or not has_model)
    worker = Worker(
        index=arguments.part_index * state.num_processes + state.process_index,
        count=arguments.part_count * state.num_processes,
        device=state.device,
    )
    # Nothing is ever exchanged, and an idle process group ends jobs whose processes finish hours apart.
    if state.num_processes > 1:
        state.destroy_process_group()
    return worker


class Tally:
    """What happened to the contents of one shard: `counts` (name -> number) and `problems`, one dict each, in order."""

    def __init__(self):
        self.counts, self.problems = Counter({"in": 0, "out": 0, "rejected": 0}), []

    def count(self, name, number=1):
        """Adds to a count."""
        self.counts[name] += number

    def reject(self, where, key, reason, detail="", line=None):
        """Names a sample or row that does not go on."""
        self.counts["rejected"] += 1
        self._name("rejected", where, key, reason, detail, line)

    def note(self, where, key, reason, detail="", line=None):
        """Names a fault of something that goes on without the faulty part."""
        self._name("kept", where, key, reason, detail, line)

    def _name(self, what, where, key, reason, detail, line):
        entry = {"what": what, "path": str(where), "line": line, "key": key, "reason": reason, "detail": detail}
        self.problems.append({name: value for name, value in entry.items() if value is not None and value != ""})

    def check(self, name):
        """Raises `RuntimeError` unless samples in = samples out + rejected."""
        counts = self.counts
        if counts["in"] != counts["out"] + counts["rejected"]:
            raise RuntimeError(
                f"{name}: {counts['in']} in, but {counts['out']} out and "
                f"{counts['rejected']} rejected: samples were lost"
            )

    def add(self, report):
        """Adds a stored report to this one."""
        self.counts.update(report["counts"])
        self.problems += report["problems"]


class Stage:
    """One preparation step on one folder: which of its shards are done, and with which settings.

    Args: `folder` where the results go; `name` of the step; `settings` all that decides the result, as JSON types.
    Raises `ValueError` where the step was begun with other settings and `overwrite` is not set.
    """

    def __init__(self, folder, name, settings, overwrite=False):
        self.folder, self.name = Path(folder), name
        self.reports = self.folder / "reports" / name
        self.settings = json.loads(json.dumps(settings))
        text = json.dumps(self.settings, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.reports.mkdir(parents=True, exist_ok=True)
        path = self.reports / "settings.json"
        if path.exists() and not overwrite:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before != self.settings:
                raise ValueError(
                    f"{self.folder} holds shards of `{name}` made with other settings "
                    f"({_differences(before, self.settings)}). "
                    "Use the same settings to continue, another folder, or --overwrite to do all of them again"
                )
        write_atomically(path, (json.dumps(self.settings, indent=1, ensure_ascii=False) + "\n").encode())

    def report(self, item):
        """The stored report of a shard, or None where it is not done with these settings."""
        try:
            report = json.loads((self.reports / f"{item}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return report if report["fingerprint"] == self.fingerprint else None

    def save(self, item, tally, complete=True):
        """Marks a shard as done. Raises `RuntimeError` where its counts do not add up."""
        if complete:
            tally.check(item)
        report = {
            "fingerprint": self.fingerprint,
            "counts": dict(sorted(tally.counts.items())),
            "problems": tally.problems,
        }
        write_atomically(self.reports / f"{item}.json", (json.dumps(report, ensure_ascii=False) + "\n").encode())

    def run(self, items, do, worker, unit="pair"):
        """Calls `do(item, tally, advance)` for this process's items that are not done, and stores the reports.

        Args: `items` {name: expected number of samples, or None}; `do` fills the tally; its `advance(n)` moves the
        progress bar.
        """
        own = [item for item in worker.share(items) if self.report(item) is None]
        sizes = [items[item] for item in own]
        total = sum(sizes) if None not in sizes else None
        title = self.name if worker.count == 1 else f"{self.name} (process 1 of {worker.count})"
        with tqdm(total=total, unit=unit, desc=title, disable=worker.index > 0, smoothing=0.05) as bar:
            for done, item in enumerate(own, start=1):
                tally = Tally()
                do(item, tally, bar.update)
                self.save(item, tally)
                bar.set_postfix(shards=f"{done}/{len(own)}", refresh=False)

    def finish(self, items, closing=None):
        """Adds up the reports once all are there: `reports/STAGE.json` and `reports/STAGE.problems.jsonl`.

        Returns the total `Tally`, to which `closing(total)` may add what no single shard knows, or None while shards
        are missing.
        """
        total = Tally()
        for item in items:
            report = self.report(item)
            if report is None:
                return None
            total.add(report)
        if closing is not None:
            closing(total)
        # What writers that were killed left behind; nobody writes these names any more.
        for leftover in [*self.reports.glob(".*.json.*"), *self.folder.glob(".*.tar.index.json.*")]:
            leftover.unlink(missing_ok=True)
        reasons = Counter(f"{problem['what']}: {problem['reason']}" for problem in total.problems)
        content = {
            "settings": self.settings,
            "counts": dict(sorted(total.counts.items())),
            "problems": dict(reasons.most_common()),
        }
        lines = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in total.problems)
        write_atomically(
            self.reports.with_name(f"{self.name}.problems.jsonl"), lines.encode("utf-8", "surrogateescape")
        )
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_atomically(self.reports.with_name(f"{self.name}.json"), text.encode())
        return total

    def summary(self, total):
        """One paragraph for people on what `finish` returned."""
        if total is None:
            return f"{self.name}: this process is done; other processes still have shards to do"
        counts = total.counts
        lines = [f"{self.name}: {counts['in']} in = {counts['out']} out + {counts['rejected']} rejected"]
        lines += [
            f"  {name}: {number}" for name, number in sorted(counts.items()) if name not in ("in", "out", "rejected")
        ]
        reasons = Counter((problem["what"], problem["reason"]) for problem in total.problems)
        lines += [f"  {what}, {reason}: {number}" for (what, reason), number in reasons.most_common()]
        if reasons:
            lines.append(f"  each one with its place: {self.reports.with_name(f'{self.name}.problems.jsonl')}")
        return "\n".join(lines)


def _differences(before, now):
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name}: then {before.get(name)!r}, now {now.get(name)!r}" for name in names)[:600]


def rewrite_shards(stage, source, worker, change, closing=None):
    """Runs a step that adds levels to the samples of existing shards; returns the total `Tally` or None.

    Args: `source` folder of the shards (equal to `stage.folder`: in place); `change(reader, samples, tally, advance)`
    is a generator that takes the `Opened` samples of one shard as they are read and gives each back, in order, with
    its new `levels`. A sample whose members do not fit the schema (`sample` is None) is to be handed on; one whose
    bytes cannot be read is rejected here.

    Raises `FileNotFoundError` where `source` has no shards.
    """
    shards = {shard.name: shard for shard in sorted(Path(source).glob("*.tar"))}
    if not shards:
        raise FileNotFoundError(f"no *.tar in {source}: expected a folder that training.prepare.pack wrote")
    sizes = (read_dataset_json(source) or {}).get("shards", {})
    items = {name: sizes.get(name, {}).get("samples") for name in shards}
    if any(stage.report(name) is None for name in worker.share(items)):
        _mark_unfinished(stage)

    def do(name, tally, advance):
        with ShardReader(shards[name]) as reader, ShardWriter(stage.folder / name) as writer:
            if reader.truncated:
                tally.note(shards[name], None, "truncated-shard", "the tar ends in the middle: fetch it again")
            for opened in change(reader, _opened(reader, tally), tally, advance):
                try:
                    writer.write_members(opened.key, opened.members_now())
                except ValueError as error:  # a foreign shard with a key twice, or one that is no key
                    tally.reject(reader.name, opened.key, "bad-key", str(error))
                    continue
                tally.count("out")

    stage.run(items, do, worker)
    return stage.finish(items, closing)


@dataclass
class Opened:
    """A sample of a shard that is being changed: its members as read, the checked `sample` (None where it does not
    fit the schema), and `levels`, what a step adds: any of `summary`, `tags`, `regions`, `roi`; None takes a level
    away."""

    key: str
    where: str
    members: dict
    sample: Sample | None
    levels: dict = field(default_factory=dict)

    def members_now(self):
        """The members with the new levels in; everything else is as it was, byte for byte."""
        if not self.levels:
            return self.members
        levels = Sample(self.key, b"", "jpg", **self.levels)
        written = members_from_sample(levels)
        record = json.loads(self.members.get("json", b"{}"))
        for name in self.levels:
            record.pop(name, None)
        record.update(json.loads(written.get("json", b"{}")))
        members = {name: data for name, data in self.members.items() if name != "json"}
        if record:
            members["json"] = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        if "roi" in self.levels:
            members.pop("roi.npy", None)
            if "roi.npy" in written:
                members["roi.npy"] = written["roi.npy"]
        return members


def _opened(reader, tally):
    """The samples of a shard as `Opened`; those whose bytes cannot be read are rejected."""
    for i, key in enumerate(reader.keys):
        tally.count("in")
        try:
            members = reader.read(i)
        except BadSample as bad:
            tally.reject(bad.where, bad.key, bad.reason, bad.detail)
            continue
        try:
            sample = sample_from_members(members, key, reader.name)
        except BadSample as bad:
            tally.note(bad.where, bad.key, bad.reason, f"copied as it is: {bad.detail}")
            sample = None
        yield Opened(key, reader.name, members, sample)


def _mark_unfinished(stage):
    """Says in `dataset.json` that a step has begun on the shards beside it, so that half-made levels cannot pass for
    whole ones."""
    content = read_dataset_json(stage.folder)
    if content is None or stage.name in content.get("unfinished", []):
        return
    content["unfinished"] = sorted({*content.get("unfinished", []), stage.name})
    write_atomically(stage.folder / "dataset.json", (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


def refuse_other_maker(folder, level, made_by, overwrite):
    """What `dataset.json` says that `level` was made by, or None. Raises `ValueError` where that is something else than
    `made_by` and `overwrite` is not set."""
    before = (read_dataset_json(folder) or {}).get("made_by", {}).get(level)
    if before is not None and before != made_by and not overwrite:
        raise ValueError(
            f"{folder} already has {level} made by {before}, not by {made_by}. --overwrite replaces them all; else "
            "start from the shards as they were packed, with another --output_dir"
        )
    return before


def describe_dataset(stage, source, total, made_by, roi_feature_size=None):
    """Writes `dataset.json` beside the finished shards: that of `source` with this step's `made_by` entries and
    counts added."""
    before = read_dataset_json(source) or {}
    known = ("format", "made_by", "roi_feature_size", "counts", "shards", "unfinished")
    extra = {name: value for name, value in before.items() if name not in known}
    unfinished = [name for name in before.get("unfinished", []) if name != stage.name]
    if unfinished:
        extra["unfinished"] = unfinished
    counts = {name: value for name, value in before.get("counts", {}).items() if name != "samples"}
    counts[stage.name] = dict(sorted(total.counts.items()))
    width = before.get("roi_feature_size") if roi_feature_size is None else roi_feature_size
    return write_dataset_json(stage.folder, {**before.get("made_by", {}), **made_by}, width, counts, **extra)


def checkpoint_content(name, described):
    """What identifies a checkpoint: a hash of its files for a folder, the commit for a Hub name."""
    if os.path.isdir(name):
        digest = hashlib.sha256()
        for path in sorted(Path(name).iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.suffix.lower() != ".md":
                with open(path, "rb") as file:
                    digest.update(path.name.encode() + b"\0" + hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:32]
    return getattr(described, "_commit_hash", None) or name
