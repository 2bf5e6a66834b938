"""How the preparation commands run: shard by shard, on any number of processes, stopped and continued at any moment.

A shard is done or not done. Its tar is written aside and renamed (`training.data.shards.ShardWriter`); after that its
report is, in `FOLDER/reports/STAGE/`, and only the report counts as done. So a run that was killed does the
interrupted shard again and leaves the same bytes as one that was not.

Two engines hand shards out. The local one: shard i belongs to process i mod P; processes never wait for each other, so
it does not matter whether they are those of one `accelerate launch`, of several machines or of a Slurm array whose
tasks run days apart. Whoever finds all reports there adds them up. Ray (`pyramidclip_hf.ray_engine`): the next shard
goes to whoever is free, on all machines of a cluster, and one whose worker died to another.

What could not be used is never dropped silently: every report lists it with place and reason, and what came in equals
what went out and what was rejected, or the run stops.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import torch
from tqdm import tqdm

from pyramidclip_command import Failure
from pyramidclip_hf.files import json_text, visible, write_text
from pyramidclip_hf.handing_out import Advance, Phase
from pyramidclip_hf.loading import choose_device
from pyramidclip_hf.ray_engine import RayOptions, run_on_ray
from training.prepare.steps.flags import WorkArguments

Item = TypeVar("Item")
Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Worker:
    """One of `count` processes that share the work; `device` is where its models run."""

    index: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")

    def share(self, items: Iterable[Item]) -> list[Item]:
        """The items of this process."""
        return list(items)[self.index :: self.count]

    def shared_after_own(self, items: Iterable[Item]) -> list[Item]:
        """All items, this process's own first: for small jobs that anybody may do where their owner has not."""
        items = list(items)
        own = self.share(items)
        chosen = set(own)
        # Those of others from behind: they come from the front, and nobody waits for who does not come.
        return own + [item for item in reversed(items) if item not in chosen]


def this_worker(arguments: WorkArguments, has_model: bool = True) -> Worker:
    """The `Worker` of this process from `accelerate launch` (or torchrun) and --part-index / --part-count.

    Without a model no accelerator is touched, so there may be more processes than accelerators.

    Raises:
        ValueError: a part outside the count, or a device that is not there.
        ImportError: accelerate is missing; it names the extra.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError('preparing data needs accelerate: pip install -e ".[train]"') from error
    if not 0 <= arguments.part_index < arguments.part_count:
        raise ValueError(
            f"part_index {arguments.part_index} of part_count {arguments.part_count}: expected 0 <= index < count"
        )
    device = choose_device(arguments.device) if has_model and arguments.device != "auto" else None
    state = PartialState(cpu=not has_model or (device is not None and device.type == "cpu"))
    worker = Worker(
        index=arguments.part_index * state.num_processes + state.process_index,
        count=arguments.part_count * state.num_processes,
        device=device or state.device,
    )
    # Nothing is ever exchanged, and an idle process group ends jobs whose processes finish hours apart.
    if state.num_processes > 1:
        # gloo connects all with all at once: who left first would cut off those that are still connecting.
        if torch.distributed.get_backend() == "gloo":
            torch.distributed.barrier()
        state.destroy_process_group()
    return worker


class StageJob(Protocol):
    """A preparation step as the engines see it: a `pyramidclip_hf.handing_out.Job` whose result is a `Tally`."""

    def phases(self) -> Iterator[Phase]:
        """The phases in turn."""
        ...

    def finish(self) -> "Tally | None":
        """The total, or None while shards are missing."""
        ...

    def told(self, result: "Tally | None") -> str:
        """What people are told of it."""
        ...


def run_job(
    target: str,
    open_job: Callable[[Settings, Worker], StageJob],
    settings: Settings,
    work: WorkArguments,
    has_model: bool = False,
    gives_total: bool = True,
) -> "Tally | None":
    """Does a step with the engine of the flags; prints what is told of it, and returns the total or None.

    Args:
        target: "module:function", by which an actor of Ray opens the job for the settings alone.
        open_job: gives the job for the settings and the worker.
        settings: of the command.
        work: its flags on how it is run.
        has_model: whether its workers have a model, and so an accelerator each.
        gives_total: whether it has a total in the end; not where it only looks.

    Raises:
        ValueError: flags of one engine for the other.
        Failure: no total although all was done.
    """
    if work.engine == "local":
        if work.ray_address is not None or work.ray_workers is not None:
            raise ValueError("--ray-address and --ray-workers are of --engine ray; processes are started by a launcher")
        worker = this_worker(work, has_model)
        return run_here(open_job(settings, worker), worker)
    if work.part_count != 1:
        raise ValueError("--part-count is of --engine local: Ray hands out shards itself")
    if work.ray_workers is not None and work.ray_workers < 1:
        raise ValueError(f"ray_workers is {work.ray_workers}, expected 1 or more")
    with_gpu = False if not has_model or work.device == "cpu" else None if work.device == "auto" else True
    total, told = run_on_ray(target, settings, RayOptions(work.ray_address, work.ray_workers, with_gpu))
    if total is None and gives_total:
        raise Failure(
            "all is done, and not all is there: the machines of the cluster do not see one and the same output folder"
        )
    print(told)
    return total


def run_here(job: StageJob, worker: Worker) -> "Tally | None":
    """Does this process's share of a job, which the number of the process says."""
    for phase in job.phases():
        own = worker.shared_after_own(phase.items) if phase.wanted_whole else worker.share(phase.items)
        waiting = [item for item in own if not phase.is_done(item)]
        sizes = [phase.items[item] for item in waiting]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        title = phase.name if worker.count == 1 else f"{phase.name} (process 1 of {worker.count})"
        silent = worker.index > 0 or (phase.wanted_whole and not waiting)
        with tqdm(total=total, unit=phase.unit, desc=title, disable=silent, smoothing=0.05) as bar:
            for done, item in enumerate(waiting, start=1):
                if not phase.is_done(item):  # by another process meanwhile
                    phase.do(item, bar.update)
                bar.set_postfix(shards=f"{done}/{len(waiting)}", refresh=False)
    total_tally = job.finish()
    if worker.index == 0 or total_tally is not None:
        print(job.told(total_tally))
    return total_tally


def ray_worker(work: WorkArguments, has_model: bool = True) -> Worker:
    """The `Worker` of an actor of Ray, which has shown it its GPU and no other."""
    return Worker(device=choose_device(work.device) if has_model else torch.device("cpu"))


class Problem(TypedDict, total=False):
    """What could not be used: `what` is "rejected", or "kept" where only a part of it is faulty."""

    what: str
    path: str
    line: int
    key: str
    reason: str
    detail: str


class StageReport(TypedDict):
    """What is kept of a finished shard; it counts only with the settings of its `fingerprint`."""

    fingerprint: str
    counts: dict[str, int]
    problems: list[Problem]


class Tally:
    """What happened to the contents of one shard, or of several.

    Attributes:
        counts: {name: number}; `in`, `out` and `rejected` are always there.
        problems: what could not be used, in order.
    """

    def __init__(self) -> None:
        self.counts = Counter({"in": 0, "out": 0, "rejected": 0})
        self.problems: list[Problem] = []

    def count(self, name: str, number: int = 1) -> None:
        """Adds to a count."""
        self.counts[name] += number

    def reject(self, where: object, key: str | None, reason: str, detail: str = "", line: int | None = None) -> None:
        """Names a sample or row that does not go on."""
        self.counts["rejected"] += 1
        self._name("rejected", where, key, reason, detail, line)

    def note(self, where: object, key: str | None, reason: str, detail: str = "", line: int | None = None) -> None:
        """Names a fault of something that goes on without the faulty part."""
        self._name("kept", where, key, reason, detail, line)

    def _name(self, what: str, where: object, key: str | None, reason: str, detail: str, line: int | None) -> None:
        problem: Problem = {"what": what, "path": str(where)}
        if line is not None:
            problem["line"] = line
        if key is not None and key != "":
            problem["key"] = key
        problem["reason"] = reason
        if detail:
            problem["detail"] = detail
        self.problems.append(problem)

    def check(self, name: str) -> None:
        """Raises `RuntimeError` unless samples in = samples out + rejected."""
        counts = self.counts
        if counts["in"] != counts["out"] + counts["rejected"]:
            raise RuntimeError(
                f"{name}: {counts['in']} in, but {counts['out']} out and "
                f"{counts['rejected']} rejected: samples were lost"
            )

    def add(self, report: StageReport) -> None:
        """Adds a stored report to this one."""
        self.counts.update(report["counts"])
        self.problems += report["problems"]


def refuse_nothing(total: Tally | None, inputs: Sequence[str]) -> None:
    """Raises `ValueError` where no pair came in, with the first fault where there is one."""
    if total is not None and not total.counts["in"]:
        raise ValueError(f"there is no pair in {', '.join(inputs)}{first_fault(total)}")


def first_fault(total: Tally) -> str:
    """The end of a sentence; empty where nothing was wrong."""
    for first in total.problems[:1]:
        return f"; the first fault, in {first.get('path')}: {first['reason']}: {first.get('detail', '')}"
    return ""


class Stage:
    """One preparation step on one folder: which of its shards are done, and with which settings.

    Args:
        folder: where the results go.
        name: of the step.
        settings: all that decides the result, as JSON types.
        overwrite: do again what was done with other settings.
        anew: its shards are not those that lie in the folder, changed, but take their places.

    Raises:
        ValueError: the step was begun here with other settings, and `overwrite` is not set; or with `anew`, what others
            did to the shards that lie here would be lost.
    """

    def __init__(
        self, folder: str | Path, name: str, settings: Mapping[str, Any], overwrite: bool = False, anew: bool = False
    ):
        self.folder, self.name = Path(folder), name
        self.reports = self.folder / "reports" / name
        # As it will be read again: tuples are lists.
        self.settings: dict[str, Any] = json.loads(json_text(settings))
        text = json_text(self.settings, sort_keys=True, ensure_ascii=False)
        self.fingerprint = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
        path = self.reports / "settings.json"
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if before != self.settings:
            if before is not None and not overwrite and self._holds_pairs():
                raise ValueError(
                    f"{self.folder} holds shards of `{name}` made with other settings "
                    f"({_settings_that_differ(before, self.settings)}). "
                    "Use the same settings to continue, another folder, or --overwrite to do all of them again"
                )
            if others := self._others(before is None) if anew else "":
                raise ValueError(
                    f"{self.folder} holds shards {others}, which `{name}` would write over: give another --output-dir, "
                    "or remove that folder first"
                )
        self.reports.mkdir(parents=True, exist_ok=True)
        write_text(path, json_text(self.settings, indent=1, ensure_ascii=False) + "\n")

    def _others(self, is_new: bool) -> str:
        """Whose work the shards that lie in the folder hold, beside this step's; empty where none of it would be lost.

        Steps that change shards in place leave reports named by the shard.
        """
        changed = {path.parent.name for path in self.reports.parent.glob("*/*.tar.json")} - {self.name}
        if changed:
            return "that " + " and ".join(f"`{name}`" for name in sorted(changed)) + " changed"
        return "that it did not make" if is_new and visible(self.folder, "*.tar") else ""

    def _holds_pairs(self) -> bool:
        """Whether a shard was made here that has anything in it: what took nothing may begin anew otherwise."""
        reports = (path for path in self.reports.glob("*.json") if path.stem not in ("settings", "plan"))
        return any(json.loads(path.read_text(encoding="utf-8"))["counts"].get("out") for path in reports)

    def report(self, item: str) -> StageReport | None:
        """The stored report of a shard, or None where it is not done with these settings."""
        try:
            report: StageReport = json.loads((self.reports / f"{item}.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        return report if report["fingerprint"] == self.fingerprint else None

    def save(self, item: str, tally: Tally) -> StageReport:
        """Marks a shard as done and returns its report. Raises `RuntimeError` where its counts do not add up."""
        tally.check(item)
        report: StageReport = {
            "fingerprint": self.fingerprint,
            "counts": dict(sorted(tally.counts.items())),
            "problems": tally.problems,
        }
        write_text(self.reports / f"{item}.json", json_text(report, ensure_ascii=False) + "\n")
        return report

    def phase(
        self,
        items: Mapping[str, int | None],
        do: Callable[[str, Tally, Advance], None],
        unit: str = "pair",
    ) -> Phase:
        """The shards of this step as a phase of a job; a shard is done when its report is stored.

        Args:
            items: {name: expected number of samples, or None}.
            do: gets the name, a tally to fill, and a function that moves the progress bar.
            unit: what is counted, for the progress bar.
        """

        def one(item: str, advance: Advance) -> None:
            tally = Tally()
            do(item, tally, advance)
            self.save(item, tally)

        return Phase(self.name, items, lambda item: self.report(item) is not None, one, unit)

    def finish(self, items: Iterable[str], closing: Callable[[Tally], None] | None = None) -> Tally | None:
        """Adds up the reports once all are there: `reports/STAGE.json` and `reports/STAGE.problems.jsonl`.

        Args:
            items: all names.
            closing: may add to the total what no single shard knows.

        Returns:
            The total, or None while shards are missing.
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
        for leftover in [*self.reports.rglob(".*.partial"), *self.folder.glob(".*.tar.index.json.*.partial")]:
            leftover.unlink(missing_ok=True)
        reasons = Counter(f"{problem['what']}: {problem['reason']}" for problem in total.problems)
        content = {
            "settings": self.settings,
            "counts": dict(sorted(total.counts.items())),
            "problems": dict(reasons.most_common()),
        }
        lines = "".join(json_text(problem, ensure_ascii=False) + "\n" for problem in total.problems)
        write_text(self._problems_file(), lines)
        text = json_text(content, indent=1, ensure_ascii=False) + "\n"
        write_text(self.reports.with_name(f"{self.name}.json"), text)
        return total

    def summary(self, total: Tally | None) -> str:
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
            lines.append(f"  each one with its place: {self._problems_file()}")
        return "\n".join(lines)

    def _problems_file(self) -> Path:
        return self.reports.with_name(f"{self.name}.problems.jsonl")


def _settings_that_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return ", ".join(f"{name}: then {before.get(name)!r}, now {now.get(name)!r}" for name in names)[:600]
