"""Does the method work? The paper's ablations (Tables 5, 14 and 15, Figure 6) and comparison (Table 2) on emoji scenes.

    python -m training.ablations [--output-dir runs/ablations] [--table components] [--families resnet] [--seeds 0]
    python -m training.ablations --table comparison [--output-dir runs/comparison] [--dry-run]

The first trains each distinct row of `training/configs/ablations.yaml`, with equal steps within a family, for the
ResNet and the ViT family of `training/configs/ablations_runs.yaml`, evaluates all of them in the same way, and writes
the page that sets them beside the paper's numbers. Rows that are the same training (Table 14's `peer` and Table 5's
first row) are trained once.

`--table comparison` sets CLIP, SLIP, FILIP, DeCLIP, DeFILIP and PyramidCLIP beside each other, and PyramidCLIP with one
term more, by `training/configs/comparison.yaml`: it measures what a step of each costs, searches a learning rate for
each method, and trains them with equal samples and in equal time (docs/comparison.md).

Both can be stopped (Ctrl-C, SIGTERM, kill -9) and started again at any time: finished runs are kept, a training
continues from its last checkpoint. Seed 0 of everything comes first, so a stopped command has every row once. A run
that fails is reported and does not stop the others. Exit codes: 0 all runs are there; 1 some failed; 2 a setting is
wrong; 130 stopped. The folder:

    plan.json                  the settings of every run, as they were when the folder was started
    costs.json                 of the comparison: what a step of each row costs
    scenes/                    the data: train/, validation/, objects/
    runs/FAMILY-ROW-seedN/     log.txt, metrics.jsonl, the model in final/
    results/FAMILY-ROW-seedN.json
    report.html, report.md     the page, and its tables as Markdown; written again after every run
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from pyramidclip_command import EXIT_FAILED, EXIT_STOPPED, answer_words, run_command
from training.settings.fields import usable_cores
from training.settings.reading import parse_settings

COMPARISON = "comparison"


@dataclass(kw_only=True)
class AblationArguments:
    """Settings of `python -m training.ablations`."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder of the runs; default: runs/ablations, or runs/comparison"},
    )
    config: str | None = field(
        default=None,
        metadata={
            "help": "families, seeds and steps of the runs; default: training/configs/ablations_runs.yaml, of the "
            "comparison training/configs/comparison.yaml"
        },
    )
    table: list[str] | None = field(
        default=None,
        metadata={
            "help": "components, peer_level, mismatched, front; or comparison, alone, which is hours of its own; "
            "default: all but that"
        },
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "emoji scenes: train/, validation/, objects/; drawn where absent; default: OUTPUT_DIR/scenes"
        },
    )
    train: int | None = field(
        default=None, metadata={"help": "training scenes; default: as many as there are, or as the demo draws"}
    )
    validation: int | None = field(default=None, metadata={"help": "held-out scenes, likewise"})
    per_object: int | None = field(default=None, metadata={"help": "pictures of each single object, likewise"})
    steps: int | None = field(
        default=None, metadata={"help": "optimizer steps of every row; default: the config's, equal within a family"}
    )
    rows: list[str] | None = field(default=None, metadata={"help": "rows of these tables by name; default: all"})
    families: list[str] | None = field(default=None, metadata={"help": "resnet, vit; default: all"})
    seeds: list[int] | None = field(
        default=None,
        metadata={"help": "seeds of every table; default: the config's (three for components and methods, else one)"},
    )
    parallel: int = field(
        default_factory=lambda: min(2, usable_cores()),
        metadata={"help": "trainings at a time, one thread each; default: one a core, at most 2"},
    )
    keep_settings: bool = field(
        default=False,
        metadata={"help": "continue with the settings in plan.json, whatever the YAML files say by now"},
    )
    dry_run: bool = field(
        default=False,
        metadata={"help": "of the comparison: measure the costs, say how long the rest takes, and stop"},
    )
    run: str | None = field(
        default=None, metadata={"help": "one run in this process; the command starts such processes itself"}
    )

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, least in (("parallel", 1), ("steps", 1), ("train", 2), ("validation", 2), ("per_object", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least {least}, got {value}")
        if self.seeds and min(self.seeds) < 0:
            raise ValueError(f"--seeds: expected numbers from 0, got {self.seeds}")
        if self.compares and len(set(self.table or [])) > 1:
            raise ValueError(f"--table: {COMPARISON} is a command of its own, give it alone; got {self.table}")
        if self.dry_run and not self.compares:
            raise ValueError(f"--dry-run is for --table {COMPARISON}")

    @property
    def compares(self) -> bool:
        """Whether it is the comparison that is asked for."""
        return COMPARISON in (self.table or ())

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir or ("runs/comparison" if self.compares else "runs/ablations"))

    @property
    def settings_file(self) -> Path:
        """`config` as a path."""
        return Path(self.config or f"training/configs/{'comparison' if self.compares else 'ablations_runs'}.yaml")

    @property
    def scenes(self) -> Path:
        """Where the data are."""
        return Path(self.data) if self.data else self.folder / "scenes"


def parse(argv: Sequence[str]) -> AblationArguments:
    """The settings that the words of the command line stand for."""
    return parse_settings(AblationArguments, argv, __doc__, config=False)


if __name__ == "__main__":
    answer_words(parse)

from pyramidclip_hf.files import json_text, locked, write_atomically
from training import pretrain
from training.data.shards import read_dataset_json
from training.emoji.comparison import (
    Training,
    by_tokens,
    cost_jobs,
    estimated_seconds,
    gathered_costs,
    is_cost,
    make_comparison,
    scheduled,
    search_jobs,
    table_jobs,
)
from training.emoji.runs import (
    Job,
    chosen,
    expand,
    family_settings,
    name_parts,
    read_results,
    read_yaml,
    result_path,
    write_result,
)
from training.emoji.scenes import PER_OBJECT, SPLITS, TRAIN, VALIDATION
from training.emoji.scoring import draw_scenes, score_model, score_tokens
from training.emoji.step_costs import measure
from training.loop.tracking import NonFiniteLoss
from training.reports import comparison_page
from training.reports.ablations_page import Family, Plan, write_page
from training.reports.comparison_page import Comparison
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import read_settings

SECONDS_TO_STOP = 120
SCENES = {"train": TRAIN, "validation": VALIDATION, "per_object": PER_OBJECT}


##################################################################################################
#  From the tables to runs                                                                       #
##################################################################################################


def scene_counts(args: AblationArguments) -> dict[str, int]:
    """How many scenes there are: of the data where they are drawn, else as asked for, else as the demo draws.

    Raises:
        ValueError: Data that are there have other numbers than are asked for.
    """
    path = args.scenes / "recipe.json"
    drawn = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    counts = {}
    for name in ("train", "validation", "per_object"):
        asked, there = getattr(args, name), drawn.get(name)
        if asked and there and asked != there:
            raise ValueError(f"--{name.replace('_', '-')} {asked}: {args.scenes} was drawn with {there}")
        counts[name] = there or asked or SCENES[name]
    return counts


def make_plan(args: AblationArguments) -> Any:
    """What the YAML files and the command line ask for, a `Plan` or a `Comparison`; plain values, see plan.json."""
    path = args.settings_file
    if args.compares:
        return json.loads(json_text(make_comparison(path, scene_counts(args), args.steps)))
    config = read_yaml(path)
    if missing := [name for name in ("base", "rows", "families", "seeds") if name not in config]:
        raise ValueError(f"--config {path} has no {missing[0]}: expected a file as training/configs/ablations.yaml is")
    base, tables = path.parent / config["base"], read_yaml(path.parent / config["rows"])
    read_yaml(base)  # said here where it is not there
    settings = read_settings(PretrainingArguments, base)
    families: dict[str, Family] = {}
    for name, family in config["families"].items():
        steps = args.steps or family["steps"]
        shared = family_settings(settings, {**family["settings"], "max_steps": steps, "epochs": None})
        for place in ("output_dir", "train_data", "seed"):
            shared.pop(place, None)
        runs, rows = expand(tables, shared)
        families[name] = {"title": family["title"], "runs": runs, "rows": rows}
    plan: Plan = {"scenes": scene_counts(args), "families": families, "seeds": config["seeds"]}
    return json.loads(json_text(plan))


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two plans differ, as "path: old, now new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*old, *(name for name in new if name not in old)]
        inner = ((name, old.get(name), new.get(name)) for name in names)
        return [text for name, a, b in inner for text in differences(a, b, f"{where}.{name}" if where else name)]
    return [] if old == new else [f"{where}: {old!r}, now {new!r}"]


def steps_of(plan: Any) -> list[int]:
    """The numbers of steps that a plan has, of the comparison those with equal samples."""
    families = plan["families"].values()
    if is_comparison(plan):
        return sorted({family["steps"] for family in families})
    return sorted({run["max_steps"] for family in families for run in family["runs"].values()})


def is_comparison(plan: Any) -> bool:
    """Which of the two kinds a plan is."""
    return "search_seed" in plan


def claim(args: AblationArguments) -> Any:
    """The plan of the folder, written at the first start.

    Raises:
        ValueError: It is another one than is asked for now.
    """
    path, asked = args.folder / "plan.json", make_plan(args)
    if not path.is_file():
        args.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_text(asked, indent=1) + "\n").encode())
        return asked
    found = json.loads(path.read_text(encoding="utf-8"))
    if is_comparison(found) != is_comparison(asked):
        holds = "the comparison" if is_comparison(found) else "runs of the ablation tables"
        raise ValueError(f"{args.folder} holds {holds}: choose another --output-dir")
    # Which seeds are run is a choice of every start.
    differ = differences({**found, "seeds": None}, {**asked, "seeds": None})
    if args.keep_settings:
        steps = steps_of(found)
        if args.steps and steps != [args.steps]:
            there = ", ".join(map(str, steps))
            raise ValueError(f"--keep-settings: {args.folder} has {there} steps, --steps asks for {args.steps}")
        return {**found, "seeds": asked["seeds"]}
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"{args.folder} holds runs of other settings ({'; '.join(differ[:3])}{more}): --keep-settings continues "
            "with its own, or choose another --output-dir, or remove it"
        )
    return asked


def jobs_of(plan: Plan, args: AblationArguments) -> list[Job]:
    """The distinct runs in the order in which they are started: by seed, then by table."""
    families = chosen("families", args.families, list(plan["families"]))
    found = [plan["families"][family]["rows"] for family in families]
    tables = chosen("table", args.table, list(dict.fromkeys(table for rows in found for table in rows)))
    known = [row for table in tables for rows in found for row in rows.get(table, {})]
    names = chosen("rows", args.rows, list(dict.fromkeys(known)))
    seeds = {table: args.seeds or plan["seeds"][table] for table in tables}
    wanted = [
        (seed, place, number, Job(family, run, seed))
        for place, table in enumerate(tables)
        for family in families
        for number, (row, run) in enumerate(plan["families"][family]["rows"].get(table, {}).items())
        if row in names
        for seed in seeds[table]
    ]
    return list(dict.fromkeys(job for *_, job in sorted(wanted, key=lambda entry: entry[:3])))


##################################################################################################
#  One run, in a process of its own                                                              #
##################################################################################################


def end_with_parent() -> None:
    """SIGTERM to this process once its parent is gone: a training saves and stops when the command was killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def run_here(args: AblationArguments, name: str) -> int:
    """Trains and evaluates the run `name` in this process, or measures what it costs; its result is written last."""
    end_with_parent()
    plan = json.loads((args.folder / "plan.json").read_text(encoding="utf-8"))
    family, run, seed = name_parts(name)
    folder = args.folder / "runs" / name
    known = {"family": family, "run": run, "seed": seed}
    with locked(folder / "lock", wait=True):  # the process of a killed command may still be saving
        if args.compares:
            training: Training = json.loads(training_path(args.folder, name).read_text(encoding="utf-8"))
            settings, known = training["settings"], known | {"row": training["row"]}
        else:
            settings = plan["families"][family]["runs"][run] | {"seed": seed}
        settings |= {"output_dir": str(folder), "train_data": [str(args.scenes / "train")], "resume": "latest"}
        if is_cost(run):
            measured = measured_costs(args, settings, plan["costs"])
        else:
            searches = args.compares and seed == plan["search_seed"]
            found = train_and_score(args, settings, searches=searches)
            if found is None:
                return EXIT_STOPPED
            measured = found
        write_result(args.folder, name, {**known, **measured})
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return 0


def measured_costs(args: AblationArguments, settings: Mapping[str, Any], costs: Mapping[str, int]) -> dict[str, Any]:
    """The result of a run that measures what its row costs."""
    own = PretrainingArguments(**{**settings, "resume": None})
    found = measure(own, pretrain.contrastive_task, args.scenes / "validation", costs["warm"], costs["pairs"])
    return {"costs": found}


def train_and_score(args: AblationArguments, settings: dict[str, Any], *, searches: bool) -> dict[str, Any] | None:
    """The result of a training, by the way in which its model can be asked; None where it was stopped.

    Args:
        args: Settings of the command.
        settings: Of the run.
        searches: A learning rate at which the loss is no number is a result, and not a failure.
    """
    folder = Path(settings["output_dir"])
    try:
        result = pretrain.run(PretrainingArguments(**settings))
    except NonFiniteLoss as error:
        if not searches:
            raise
        return {"steps": settings["max_steps"], "learning_rate": settings["learning_rate"], "diverged": str(error)}
    if not result.finished:
        return None
    final = folder / "final"
    record = json.loads((final / "training.json").read_text(encoding="utf-8"))
    measured = {key: record[key] for key in ("steps", "samples_seen", "seconds")}
    if not args.compares:
        return {**measured, **score_model(final, args.scenes)[0]}
    measured["learning_rate"] = settings["learning_rate"]
    # Tokens that were trained beside embeddings are worth a look, but not in a search.
    alone = by_tokens(settings)
    tokens = score_tokens(final, args.scenes) if alone or not searches else None
    if alone and tokens:
        return {**measured, **tokens}
    return {**measured, **score_model(final, args.scenes)[0], **({"tokens": tokens} if tokens else {})}


def training_path(folder: Path, name: str) -> Path:
    """Where the comparison says what a run is, before it starts."""
    return folder / "runs" / name / "training_run.json"


##################################################################################################
#  All runs                                                                                      #
##################################################################################################


def prepare_scenes(args: AblationArguments, scenes: Mapping[str, int]) -> None:
    """Draws the data where they are not there; shards that are there are kept.

    Args:
        args: Settings of the command.
        scenes: How many there are to be, see `Plan`.

    Raises:
        ValueError: `--data` names a folder that holds some of the splits, and was not drawn.
    """
    missing = [name for name in SPLITS if read_dataset_json(args.scenes / name) is None]
    if not missing:
        return
    if args.data and len(missing) < len(SPLITS) and not (args.scenes / "recipe.json").is_file():
        raise ValueError(f"--data {args.data}: expected the folders {', '.join(SPLITS)}; {', '.join(missing)} missing")
    print("ablations: drawing the scenes", flush=True)
    draw_scenes(args.scenes, **scenes, workers=args.parallel)


def start_run(args: AblationArguments, job: Job) -> subprocess.Popen:
    """A process with one thread that trains and evaluates the run; its messages go to log.txt."""
    folder = args.folder / "runs" / job.name
    folder.mkdir(parents=True, exist_ok=True)
    words = ["--output-dir", str(args.folder), "--config", str(args.settings_file), "--run", job.name]
    words += ["--data", str(args.scenes), *(["--table", COMPARISON] if args.compares else [])]
    limits = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | limits | {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    with open(folder / "log.txt", "ab") as log:
        # A session of its own: Ctrl-C reaches this process only, which then asks the trainings to save.
        return subprocess.Popen(
            [sys.executable, "-m", "training.ablations", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def stop_all(running: Mapping[Job, subprocess.Popen]) -> None:
    """Asks the trainings to save and end, and waits for them."""
    for process in running.values():
        process.terminate()
    end = time.monotonic() + SECONDS_TO_STOP
    for process in running.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def last_words(args: AblationArguments, job: Job) -> str:
    """The end of the log of a run that failed."""
    path = args.folder / "runs" / job.name / "log.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return "\n".join(f"    {line}" for line in [line for line in lines if line.strip()][-3:]) + f"\n    ({path})"


def run_jobs(args: AblationArguments, jobs: Sequence[Job], after_each: Callable[[], object]) -> list[Job]:
    """Runs what has no result yet, `args.parallel` at a time; returns those that failed.

    Args:
        args: Settings of the command.
        jobs: The runs.
        after_each: Called after every finished run.

    Raises:
        KeyboardInterrupt: The command was stopped, and the trainings have saved.
    """
    from tqdm.auto import tqdm

    waiting = deque(job for job in jobs if not result_path(args.folder, job.name).is_file())
    running: dict[Job, subprocess.Popen] = {}
    failed: list[Job] = []
    with tqdm(total=len(jobs), initial=len(jobs) - len(waiting), unit="run", desc="ablations", smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < args.parallel:
                    job = waiting.popleft()
                    running[job] = start_run(args, job)
                    bar.set_postfix_str(", ".join(job.name for job in running))
                time.sleep(0.2)
                for job in [job for job, process in running.items() if process.poll() is not None]:
                    code = running.pop(job).returncode
                    bar.update()
                    if code or not result_path(args.folder, job.name).is_file():
                        failed.append(job)
                        tqdm.write(f"{job.name} ended with code {code}:\n{last_words(args, job)}", file=sys.stderr)
                    else:
                        after_each()
        finally:
            stop_all(running)
    return failed


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Within the block SIGTERM is Ctrl-C."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_ablations(args: AblationArguments, plan: Plan) -> list[Job]:
    """All runs of the ablation tables that are asked for and not there yet, and the page; the runs that failed."""
    jobs = jobs_of(plan, args)
    prepare_scenes(args, plan["scenes"])
    failed = run_jobs(args, jobs, lambda: write_page(plan, read_results(args.folder), args.folder))
    write_page(plan, read_results(args.folder), args.folder)
    return failed


def run_comparison(args: AblationArguments, plan: Comparison) -> list[Job]:
    """Costs, search, table; each stage is what the one before left to do. The page, and the runs that failed."""
    families = chosen("families", args.families, list(plan["families"]))
    rows = chosen("rows", args.rows, [row for names in plan["tables"].values() for row in names])
    searched = [*rows, *([comparison_page.REFERENCE] if set(rows) & set(plan["tables"]["combinations"]) else [])]
    prepare_scenes(args, plan["scenes"])
    failed = run_trainings(replace(args, parallel=1), cost_jobs(plan, families), lambda: None)
    costs = settled_costs(args, plan)
    if failed or not set(families) <= set(costs):
        return failed

    def page() -> None:
        results = read_results(args.folder)
        schedule = scheduled(plan, costs, results)
        comparison_page.write_comparison(plan, costs, results, schedule, args.folder)

    results = read_results(args.folder)
    foreseen = table_jobs(plan, scheduled(plan, costs, results, foreseen=True), families, rows, args.seeds)
    left = {
        job: training
        for job, training in {**search_jobs(plan, results, families, searched), **foreseen}.items()
        if not result_path(args.folder, job.name).is_file()
    }
    hours = estimated_seconds(plan, costs, left) / 3600 / args.parallel
    print(f"comparison: {len(left)} runs are left, about {hours:.1f} hours on {args.parallel} free cores", flush=True)
    page()
    if args.dry_run:
        return []
    while jobs := missing(args, search_jobs(plan, read_results(args.folder), families, searched)):
        if failed := run_trainings(args, jobs, page):
            break  # without them nobody knows which rate is the best; rows whose search is done go on
    schedule = scheduled(plan, costs, read_results(args.folder))
    failed += run_trainings(args, table_jobs(plan, schedule, families, rows, args.seeds), page)
    page()
    return failed


def missing(args: AblationArguments, jobs: Mapping[Job, Training]) -> dict[Job, Training]:
    """Those without a result; none if all are there."""
    return {job: jobs[job] for job in jobs if not result_path(args.folder, job.name).is_file()}


def run_trainings(args: AblationArguments, jobs: Mapping[Job, Training], after_each: Callable[[], object]) -> list[Job]:
    """`run_jobs` of the comparison, whose runs find what they are in a file."""
    for job, training in missing(args, jobs).items():
        path = training_path(args.folder, job.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_text(training, indent=1) + "\n").encode())
    return run_jobs(args, list(jobs), after_each)


def settled_costs(args: AblationArguments, plan: Comparison) -> dict[str, Any]:
    """Family -> row -> costs, of the families that costs.json has; written as soon as another family is measured."""
    path = args.folder / "costs.json"
    found = json.loads(path.read_text(encoding="utf-8"))["families"] if path.is_file() else {}
    gathered = gathered_costs(plan, read_results(args.folder))
    if set(gathered["families"]) - set(found):
        write_atomically(path, (json_text(gathered, indent=1) + "\n").encode())
        return gathered["families"]
    return found


def run(args: AblationArguments) -> int:
    """The tables, or the one run that the process was started for."""
    if args.run:
        return run_here(args, args.run)
    plan = claim(args)
    try:
        with termination_as_interrupt(), locked(args.folder / "lock", wait=False):
            failed = run_comparison(args, plan) if args.compares else run_ablations(args, plan)
    except BlockingIOError as error:
        raise ValueError(f"{args.folder}: another process of this command is at work there") from error
    print(f"report: {args.folder / 'report.html'}")
    if failed:
        print(f"failed: {', '.join(job.name for job in failed)}; the same command tries them again", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv, advice=lambda args: "The same command continues.")


if __name__ == "__main__":
    sys.exit(main())
