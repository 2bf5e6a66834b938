"""Chooses pairs by rules: from shards or tables to shards, or to a list of keys.

    python -m training.prepare.select --input data/laion --rules laion99m.yaml --output-dir data/chosen --dry-run
    python -m training.prepare.select --input data/laion --rules laion99m.yaml --output-dir data/chosen
    python -m training.prepare.select --input meta.parquet --image-column URL --keys-only --rules RULES --output-dir OUT

Every sample is measured once, part by part; the rules decide over all of them, in their order, each on what those
before it left; then the chosen samples are copied byte for byte. `--dry-run` says what each rule would take, with
pictures. See docs/prepare.md.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyramidclip_command import answer_words, check_there, run_command
from training.prepare.steps.flags import PAIRS, SourceArguments, WorkArguments, parse_dataclasses


@dataclass
class SelectArguments:
    """What to choose, and where it goes."""

    output_dir: str = field(metadata={"help": "Folder of the chosen shards."})
    rules: str = field(metadata={"help": "YAML file of the rules."})
    keys_only: bool = field(
        default=False, metadata={"help": "Write keys.txt and no shards; pictures may be URLs that nothing looks at."}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "Write selection.html, what each rule takes and ten examples, and no shards."}
    )
    max_image_pixels: int = field(
        default=100_000_000, metadata={"help": "Larger pictures are refused by their header."}
    )


@dataclass
class SelectSettings:
    """All flags."""

    source: SourceArguments
    select: SelectArguments
    work: WorkArguments


def parse(words: Sequence[str]) -> SelectSettings:
    """The words of the command as settings. Raises `ValueError`, `FileNotFoundError`."""
    settings = SelectSettings(*parse_dataclasses(words, __doc__, SourceArguments, SelectArguments, WorkArguments))
    check_there("--input", settings.source.input, PAIRS, "data")
    check_there("--rules", settings.select.rules, "a YAML file, see docs/prepare.md")
    return settings


if __name__ == "__main__":
    answer_words(parse)

import numpy as np

from pyramidclip_hf.files import json_text, remove_leftovers, write_text, written_aside
from pyramidclip_hf.handing_out import Advance, Phase
from pyramidclip_hf.loading import warn_of_slow_type
from training.data.records import BadSample, json_bytes
from training.data.remote import is_url
from training.data.shards import ShardWriter, write_dataset_json
from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.decide import Decision, Output, Selection, decide, outputs
from training.prepare.selecting.facts import Column, Facts, is_whole, measure_part
from training.prepare.selecting.page import page
from training.prepare.selecting.reading import read_rules
from training.prepare.sources import (
    PairSource,
    RawPair,
    expand_inputs,
    is_hub_name,
    open_source,
    refuse_own_folder,
)
from training.prepare.sources.tars import TarSource, described_whole
from training.prepare.steps.rewriting import mark_unfinished
from training.prepare.steps.work import Stage, Tally, Worker, ray_worker, refuse_nothing, run_job

STAGE = "select"


_NO_LEVELS = ("format", "made_by", "roi_feature_size", "counts", "shards", "unfinished")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


def run(settings: SelectSettings) -> None:
    """Chooses and reports."""
    total = select(settings)
    refuse_nothing(total, settings.source.input)
    if total is not None and not total.counts["out"]:
        raise ValueError(
            f"the rules leave none of the {total.counts['in']} pairs; --dry-run shows what each of them takes"
        )


def select(settings: SelectSettings) -> Tally | None:
    """Chooses this process's share; returns the total, or None after a dry run or while others are not finished.

    Raises:
        ValueError: input or rules cannot be used, or the output holds something else.
        FileNotFoundError: the input is not there.
    """
    has_model = bool(read_rules(settings.select.rules).encoders)
    target = "training.prepare.select:worker_job"
    return run_job(target, open_job, settings, settings.work, has_model, gives_total=not settings.select.dry_run)


def worker_job(settings: SelectSettings) -> "Chooser":
    """The job of a worker of Ray."""
    has_model = bool(read_rules(settings.select.rules).encoders)
    return open_job(settings, ray_worker(settings.work, has_model))


def open_job(settings: SelectSettings, worker: Worker) -> "Chooser":
    """The step as a job; raises as `select`."""
    return Chooser(settings, worker)


class _Data:
    """One input: the source, its parts, and the `dataset.json` beside its shards."""

    def __init__(self, arguments: SourceArguments, called: str):
        arguments.input = expand_inputs(arguments.input)
        for name in arguments.input:  # before the Hub is asked, which may take a minute without a network
            if is_hub_name(name):
                what = "a data set of the Hub" if Path(name).exists() else "no file or folder here"
                raise ValueError(f"{called} {name} is {what}: a data set of the Hub is packed first (prepare.pack)")
        self.source: PairSource = open_source(arguments)
        self.names = list(arguments.input)
        self.described = described_whole(self.source)
        self.parts = {part.name: part for part in self.source.parts()}

    def identity(self) -> list[Any]:
        """What the parts are known by."""
        found = []
        for part in self.parts.values():
            size = None if is_url(part.path) else Path(part.path).stat().st_size
            found.append([part.name, Path(part.path).name, size, part.start, part.rows])
        return found


class Chooser:
    """Measures, decides and writes, as a job: what is measured and written are parts that do not know of each other.

    Raises:
        ValueError: input or rules cannot be used.
        FileNotFoundError: the input is not there.
    """

    def __init__(self, settings: SelectSettings, worker: Worker):
        self.settings, own, self.worker = settings, settings.select, worker
        self.selection: Selection = read_rules(own.rules)
        for encoder in self.selection.encoders:
            encoder.device = worker.device
            warn_of_slow_type(f"{encoder.called}: dtype", encoder.dtype, worker.device)
        self.data = _Data(settings.source, "--input")
        refuse_own_folder(self.data.names, own.output_dir)
        self.against = {name: _Data(SourceArguments(input=[name]), "against:") for name in self.selection.against()}
        # Shards need pictures that can be written, and so that none of the best is lost on the way, it is seen before.
        self.with_pictures = not own.keys_only or self.selection.looks_at_pictures
        self.merged = _merged(self.data.described)
        self.folder = Path(own.output_dir)

    def phases(self) -> Iterator[Phase]:
        """What has not been measured, of every data set; then, unless it is a dry run, the outputs."""
        own, measuring = self._measuring(self.data, self.selection.columns())
        yield from measuring
        against = {}
        for name, of_others in self.selection.against().items():
            against[name], measuring = self._measuring(self.against[name], of_others)
            yield from measuring
            if not Facts(against[name]).left:
                raise ValueError(f"against: {name}: nothing in it can be used, so that nothing would be found in it")
        self.decision = decide(self.selection, own, against, self.data.source.has_keys)
        if not self.settings.select.dry_run:
            yield self._writing(self.decision)

    def _measuring(self, data: _Data, columns: Mapping[str, Column]) -> tuple[dict[str, list[Path]], list[Phase]]:
        """{part: where its facts are kept}, and the phases that measure them: one, and one for each model."""
        files: dict[str, list[Path]] = {part: [] for part in data.parts}
        phases = []
        for model in dict.fromkeys(["", *(column.model for column in columns.values())]):
            of_model = {name: column for name, column in columns.items() if column.model == model}
            with_pictures = bool(model) or data is not self.data or self.with_pictures
            folder = self._facts(data, of_model, with_pictures)
            for part, paths in files.items():
                paths.append(folder / f"{part}.npz")
            phases.append(self._measuring_into(folder, data, of_model, with_pictures))
        return files, phases

    def _facts(self, data: _Data, columns: Mapping[str, Column], with_pictures: bool) -> Path:
        """The folder of some facts, by what is measured of which data."""
        limit = self.settings.select.max_image_pixels
        table = asdict(self.settings.source) | {"input": None, "samples_per_shard": None}
        times = [None if is_url(name) else Path(name).stat().st_mtime_ns for name in data.names if Path(name).is_file()]
        told = [
            data.identity(),
            times,
            sorted(columns),
            with_pictures,
            limit,
            table if data is self.data else "compared with",
        ]
        name = hashlib.sha256(json_text(told).encode()).hexdigest()[:16]
        return self.folder / "reports" / STAGE / f"facts-{name}"

    def _measuring_into(self, folder: Path, data: _Data, columns: Mapping[str, Column], with_pictures: bool) -> Phase:
        limit = self.settings.select.max_image_pixels

        def measure(name: str, advance: Advance) -> None:
            path = folder / f"{name}.npz"
            is_own = data is self.data
            measure_part(data.source, data.parts[name], columns, path, limit, with_pictures, is_own, advance)

        rows = {name: part.rows for name, part in data.parts.items()}
        return Phase("measure", rows, lambda name: is_whole(folder / f"{name}.npz"), measure, wanted_whole=True)

    def read(self, part: int, positions: Sequence[int]) -> Iterator[RawPair]:
        """The pairs of part number `part` at rising positions."""
        source, of_part = self.data.source, list(self.data.parts.values())[part]
        if isinstance(source, TarSource):
            yield from source.read_at(of_part, positions)
            return
        wanted = set(positions)
        pairs = (raw for raw in source.read(of_part) if not raw.is_note)
        yield from (raw for position, raw in enumerate(pairs) if position in wanted)

    def finish(self) -> Tally | None:
        """The total, or None after a dry run or while outputs are missing."""
        if self.settings.select.dry_run:
            if self.worker.index == 0:
                limit = self.settings.select.max_image_pixels
                write_text(self.page, page(self.selection, self.decision, self.data.names, self.read, limit))
            return None
        total = self.stage.finish(self.plan)
        if total is not None:
            self._close(self.stage, self.plan, self.sides, total)
        return total

    def told(self, result: Tally | None) -> str:
        """What people are told: of a dry run what each rule took, else the total."""
        if not self.settings.select.dry_run:
            return self.stage.summary(result)
        facts = self.decision.facts
        faults = int(np.count_nonzero(facts.verdicts >= facts.SAME_KEY))
        lines = [f"select: {len(facts)} in, {faults} that cannot be used"]
        lines += [f"  {rule}: takes {taken}, leaves {left}" for rule, taken, left in self.decision.taken]
        if self.selection.split is not None:
            lines.append(f"  split: {int(self.decision.validation.sum())} to validation")
        return "\n".join([*lines, f"  with examples: {self.page}"])

    @property
    def page(self) -> Path:
        """Where a dry run shows examples."""
        return self.folder / "selection.html"

    def _writing(self, decision: Decision) -> Phase:
        own = self.settings.select
        is_split = self.selection.split is not None
        plan = self.plan = outputs(decision, is_split, self.settings.source.samples_per_shard)
        settings, anew = self._that_decide(), not own.keys_only
        stage = self.stage = Stage(self.folder, STAGE, settings, self.settings.work.overwrite, anew)
        self.sides = {
            side: Stage(self.folder / side, STAGE, settings, True, anew) if side else stage
            for side in dict.fromkeys(output.side for output in plan.values())
        }
        if not own.keys_only and any(stage.report(item) is None for item in self.worker.share(plan)):
            for side in self.sides.values():
                mark_unfinished(side)
        writer = _Writer(self, decision, stage)

        def do(item: str, tally: Tally, advance: Advance) -> None:
            writer.write(item, plan[item], tally, advance)

        return stage.phase({item: output.samples for item, output in plan.items()}, do)

    def _that_decide(self) -> dict[str, Any]:
        source = {**asdict(self.settings.source), "input": [Path(name).name for name in self.data.names]}
        own = self.settings.select
        against = {name: [part[1:] for part in data.identity()] for name, data in self.against.items()}
        # A list, for the order of the rules counts.
        limits: dict[str, Any] = {"keys_only": own.keys_only, "max_image_pixels": own.max_image_pixels}
        if models := [encoder.told for encoder in self.selection.encoders]:
            limits["models"] = models
        return {**source, **limits, **self.selection.told, "against": against, "parts": self.data.identity()}

    def _close(self, stage: Stage, plan: Mapping[str, Output], sides: Mapping[str, Stage], total: Tally) -> None:
        """Takes away what was made with other settings, and describes what is there."""
        for path in stage.reports.glob("*.json"):
            if path.stem != "settings" and path.stem not in plan:
                side, _, name = path.stem.rpartition("-")
                for suffix in (".tar", ".tar.index.json"):
                    (self.folder / side / f"{name}{suffix}").unlink(missing_ok=True)
                for suffix in (".json", ".rejected.jsonl", ".keys.txt"):
                    path.with_name(f"{path.stem}{suffix}").unlink(missing_ok=True)
        made_by = {"rules": self.selection.told, "input": [Path(name).name for name in self.data.names][:20]}
        for side in sides:
            items = [item for item, output in plan.items() if output.side == side]
            if self.settings.select.keys_only:
                (self.folder / side).mkdir(exist_ok=True)
                _concatenate([stage.reports / f"{item}.keys.txt" for item in items], self.folder / side / "keys.txt")
                continue
            counts = {**self.merged["counts"], STAGE: dict(sorted(total.counts.items()))}
            write_dataset_json(
                self.folder / side,
                {**self.merged["made_by"], STAGE: made_by},
                self.merged["roi_feature_size"],
                counts,
                **self.merged["extra"],
            )
        if self.worker.count == 1:
            remove_leftovers(self.folder)


def _concatenate(files: Sequence[Path], path: Path) -> None:
    with written_aside(path) as aside, open(aside, "wb") as to:
        for name in files:
            with open(name, "rb") as file:
                shutil.copyfileobj(file, to)


def _merged(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What `dataset.json` of several folders say together.

    Raises:
        ValueError: a level or the region features of one are not those of another.
    """
    made_by: dict[str, Any] = {}
    extra: dict[str, list[Any]] = {}
    widths = {}
    for folder, content in described.items():
        for level, made in content.get("made_by", {}).items():
            if level in ("summary", "regions") and made_by.setdefault(level, made) != made:
                raise ValueError(
                    f"{folder} has {level} made by {made}, another input by {made_by[level]}: select them one by one"
                )
            made_by.setdefault(level, made)
        if content.get("roi_feature_size") is not None:
            widths[content["roi_feature_size"]] = folder
        for name, value in content.items():
            if name not in _NO_LEVELS and value not in extra.setdefault(name, []):
                extra[name].append(value)
    if len(widths) > 1:
        told = ", ".join(f"{width} in {folder}" for width, folder in widths.items())
        raise ValueError(f"region features of different widths ({told}): select them one by one")
    (counts, *_) = [content.get("counts", {}) for content in described.values()] if len(described) == 1 else [{}]
    return {
        "made_by": made_by,
        "roi_feature_size": next(iter(widths), None),
        "counts": {name: value for name, value in counts.items() if name != "samples"},
        "extra": {name: values[0] if len(values) == 1 else values for name, values in extra.items()},
    }


class _Writer:
    """Copies the chosen samples of one output after the other, and names the others."""

    def __init__(self, chooser: Chooser, decision: Decision, stage: Stage):
        self.chooser, self.decision, self.stage = chooser, decision, stage
        self.names = list(chooser.selection.rules)
        self.part_names = list(chooser.data.parts)

    def write(self, item: str, output: Output, tally: Tally, advance: Advance) -> None:
        """One output: a shard, or the keys alone; beside its report, which samples were taken by which rule."""
        with written_aside(self.stage.reports / f"{item}.rejected.jsonl") as aside, open(aside, "w") as rejected:
            if self.chooser.settings.select.keys_only:
                with written_aside(self.stage.reports / f"{item}.keys.txt") as keys, open(keys, "w") as to:
                    for part in output.parts:
                        names = self.decision.facts.parts[part].keys
                        chosen = self._account(part, output.side, tally, rejected.write)
                        to.writelines(f"{names[position]}\n" for position in chosen)
                        tally.count("out", len(chosen))
                        advance(len(chosen))
            else:
                self._write_shard(output, tally, advance, rejected.write)

    def _write_shard(self, output: Output, tally: Tally, advance: Advance, say: Callable[[str], object]) -> None:
        path = self.chooser.folder / output.side / f"{output.name}.tar"
        path.unlink(missing_ok=True)
        with ShardWriter(path) as writer:
            for part in output.parts:
                chosen = self._account(part, output.side, tally, say)
                recorded = self._recorded(part)
                for position, raw in zip(chosen, self.chooser.read(part, chosen)):
                    advance(1)
                    candidate = Candidate(raw, self.chooser.settings.select.max_image_pixels)
                    try:
                        if raw.fault is not None:
                            raise BadSample(raw.key, raw.where, *raw.fault)
                        _record(raw, {name: value[position] for name, value in recorded.items()})
                        writer.write_members(candidate.key, {candidate.suffix: candidate.picture, **raw.members})
                    except BadSample as bad:  # damaged since it was measured
                        tally.reject(raw.where, raw.key, bad.reason, bad.detail, raw.line)
                        continue
                    tally.count("out")
        if not tally.counts["out"]:
            path.unlink()
            Path(f"{path}.index.json").unlink()

    def _recorded(self, part: int) -> dict[str, Sequence[Any]]:
        """{field: its value for each sample of a part} of what goes into the records."""
        found: dict[str, Sequence[Any]] = {}
        for rule in self.chooser.selection.rules.values():
            for name, column in rule.recorded().items():
                values = self.decision.facts.parts[part].column(column.name).tolist()
                found |= {name: values, f"{name}_model": [rule.encoder.told if rule.encoder else None] * len(values)}
        return found

    def _account(self, part: int, side: str, tally: Tally, say: Callable[[str], object]) -> list[int]:
        """Counts the samples of a part and names those that were taken; returns the positions of those for a side.

        What was taken is the business of the first side.
        """
        facts = self.decision.facts
        begin, end = facts.starts[part : part + 2].tolist()
        verdicts = facts.verdicts[begin:end]
        chosen = (verdicts == 0) & (self.decision.validation[begin:end] == (side == "validation"))
        positions = np.flatnonzero(chosen).tolist()
        tally.count("in", len(positions))
        if side == "validation":
            return positions
        taken = np.flatnonzero(verdicts).tolist()
        tally.count("in", len(taken))
        here = facts.parts[part]
        keys, where = here.keys, self.part_names[part]
        for fault in here.faults:
            told = (fault["where"], fault["key"], fault["reason"], fault["detail"], fault["line"])
            (tally.note if fault["position"] is None else tally.reject)(*told)
        for position in taken:
            verdict = int(verdicts[position])
            if verdict == facts.SAME_KEY:
                tally.reject(where, keys[position], "duplicate-key", "the key came before")
            elif verdict != facts.FAULT:
                rule = self.names[verdict - 1]
                tally.count("rejected")
                tally.count(f"rejected_{rule}")
                say(json_text({"part": where, "key": keys[position], "rule": rule}, ensure_ascii=False) + "\n")
        return positions


def _record(raw: RawPair, values: Mapping[str, Any]) -> None:
    """Puts values into a record; one that has them stays as it is, byte for byte."""
    record = json.loads(raw.members.get("json", b"{}"))
    if any(record.get(name) != value for name, value in values.items()):
        raw.members["json"] = json_bytes({**record, **values})


if __name__ == "__main__":
    sys.exit(main())
