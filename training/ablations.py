"""Does the method work? Every row of the paper's ablations (Tables 5, 14 and 15, Figure 6) on emoji scenes.

    python -m training.ablations [--output-dir runs/ablations] [--only components] [--families resnet] [--seeds 0]

Trains each distinct row of `training/configs/ablations.yaml`, with equal steps within a family, for the ResNet and the
ViT family of `training/configs/ablations_runs.yaml`, evaluates all of them in the same way, and writes the page that
sets them beside the paper's numbers. Rows that are the same training (Table 14's `peer` and Table 5's first row) are
trained once.

It can be stopped (Ctrl-C, SIGTERM, kill -9) and started again at any time: finished runs are kept, a training continues
from its last checkpoint. Seed 0 of everything comes first, so a stopped command has every row once. A run that fails is
reported and does not stop the others. Exit codes: 0 all runs are there; 1 some failed; 2 a setting is wrong; 130
stopped. The folder:

    plan.json                  the settings of every run, as they were when the folder was started
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
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from pyramidclip_command import EXIT_FAILED, EXIT_STOPPED, answer_words, run_command
from training.settings.fields import usable_cores
from training.settings.reading import parse_settings


@dataclass(kw_only=True)
class AblationArguments:
    """Settings of `python -m training.ablations`."""

    output_dir: str = field(default="runs/ablations", metadata={"help": "folder of the ablations"})
    config: str = field(
        default="training/configs/ablations_runs.yaml", metadata={"help": "families, seeds and steps of the runs"}
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
    only: list[str] | None = field(
        default=None, metadata={"help": "tables: components, peer_level, mismatched, front; default: all"}
    )
    rows: list[str] | None = field(default=None, metadata={"help": "rows of these tables by name; default: all"})
    families: list[str] | None = field(default=None, metadata={"help": "resnet, vit; default: all"})
    seeds: list[int] | None = field(
        default=None, metadata={"help": "seeds of every table; default: the config's (three for components, else one)"}
    )
    parallel: int = field(
        default_factory=lambda: min(2, usable_cores()),
        metadata={"help": "trainings at a time, one thread each; default: one a core, at most 2"},
    )
    keep_settings: bool = field(
        default=False,
        metadata={"help": "continue with the settings in plan.json, whatever the YAML files say by now"},
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

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @property
    def scenes(self) -> Path:
        """Where the data are."""
        return Path(self.data) if self.data else self.folder / "scenes"


def parse(argv: Sequence[str]) -> AblationArguments:
    """The settings that the words of the command line stand for."""
    return parse_settings(AblationArguments, argv, __doc__, config=False)


if __name__ == "__main__":
    answer_words(parse)

import yaml

from pyramidclip_hf.files import json_text, locked, write_atomically
from training import pretrain
from training.data.shards import read_dataset_json
from training.emoji.scenes import PER_OBJECT, SPLITS, TRAIN, VALIDATION
from training.emoji.scoring import draw_scenes, score_model
from training.reports.ablations_page import Family, Plan, write_page
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import read_settings, with_changes

SECONDS_TO_STOP = 120


SCENES = {"train": TRAIN, "validation": VALIDATION, "per_object": PER_OBJECT}


# Settings of a ViT that count blocks, and how many of these the paper's ViTs have.
BLOCKS, PAPER_DEPTH = ("num_leff_layers", "num_picture_layers"), 12


# What has to do with where a run is and how it is watched, not with its result.
WATCHING: dict[str, Any] = {"validation_data": None, "trackers": [], "eval_every_steps": 0, "push_to_hub": None}


##################################################################################################
#  From the tables to runs                                                                       #
##################################################################################################


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: There is no such file, or no mapping in it.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}; run the command in the checkout's folder")
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(content).__name__}")
    return content


def family_settings(base: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all rows of a family share. The family's towers replace those of the base whole."""
    settings = {**base, **family, **WATCHING}
    settings["model_config"] = {**base.get("model_config", {}), **family.get("model_config", {})}
    return settings


def row_settings(shared: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row. Its numbers of blocks become the same share of the family's ViT; a ResNet has no such."""
    towers, changes = shared["model_config"], row.get("model_config", {})
    vision = dict(changes.get("vision_config", {}))
    asked = {name: vision.pop(name) for name in BLOCKS if name in vision}
    if str(shared["model"]).startswith("ViT"):
        if "num_leff_layers" not in towers["vision_config"]:
            raise ValueError(
                f"a ViT family must state num_leff_layers, its vision_config has {sorted(towers['vision_config'])}"
            )
        depth = towers["vision_config"].get("num_hidden_layers", PAPER_DEPTH)
        vision |= {name: round(number * depth / PAPER_DEPTH) for name, number in asked.items()}
    return {**shared, **row, "model_config": with_changes(towers, {**changes, "vision_config": vision})}


def expand(
    tables: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, str]]]:
    """Distinct runs of a family, and which run each row is.

    Returns:
        {run: settings} and {table: {row: run}}; rows with equal settings are one run, named by the first of them. A
        table whose rows are all one run, such as LeFF's of a ResNet, is left out.
    """
    runs: dict[str, dict[str, Any]] = {}
    rows: dict[str, dict[str, str]] = {}
    for table, entries in tables.items():
        every = {row: row_settings(shared, changes) for row, changes in entries.items()}
        first = next(iter(every.values()))
        if len(every) > 1 and all(settings == first for settings in every.values()):
            continue
        rows[table] = {}
        for row, settings in every.items():
            same = next((name for name, known in runs.items() if known == settings), None)
            if same is None:
                same = f"{table}_{row}" if row in runs else row
                runs[same] = settings
            rows[table][row] = same
    return runs, rows


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


def make_plan(args: AblationArguments) -> Plan:
    """What the YAML files and the command line ask for; plain values, see plan.json."""
    path = Path(args.config)
    config = read_yaml(path)
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


def claim(args: AblationArguments) -> Plan:
    """The plan of the folder, written at the first start.

    Raises:
        ValueError: It is another one than is asked for now.
    """
    path, asked = args.folder / "plan.json", make_plan(args)
    if not path.is_file():
        args.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json_text(asked, indent=1) + "\n").encode())
        return asked
    found: Plan = json.loads(path.read_text(encoding="utf-8"))
    # Which seeds are run is a choice of every start.
    differ = differences({**found, "seeds": None}, {**asked, "seeds": None})
    if args.keep_settings:
        steps = sorted({run["max_steps"] for family in found["families"].values() for run in family["runs"].values()})
        if args.steps and steps != [args.steps]:
            there = ", ".join(map(str, steps))
            raise ValueError(f"--keep-settings: {args.folder} has {there} steps, --steps asks for {args.steps}")
        return {"scenes": found["scenes"], "families": found["families"], "seeds": asked["seeds"]}
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise ValueError(
            f"{args.folder} holds runs of other settings ({'; '.join(differ[:3])}{more}): --keep-settings continues "
            "with its own, or choose another --output-dir, or remove it"
        )
    return asked


@dataclass(frozen=True)
class Job:
    """One training with its evaluation; `run` is a name in the family's runs."""

    family: str
    run: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder and its files."""
        return f"{self.family}-{self.run}-seed{self.seed}"


def chosen(kind: str, wanted: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    """`known`, or those of it that are wanted.

    Raises:
        ValueError: One that is wanted is unknown; the message names the flag `kind`.
    """
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ValueError(f"--{kind}: there is no {', '.join(unknown)}; known: {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def jobs_of(plan: Plan, args: AblationArguments) -> list[Job]:
    """The distinct runs in the order in which they are started: by seed, then by table."""
    families = chosen("families", args.families, list(plan["families"]))
    found = [plan["families"][family]["rows"] for family in families]
    tables = chosen("only", args.only, list(dict.fromkeys(table for rows in found for table in rows)))
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
    """Trains and evaluates the run `name` in this process; its result is written last."""
    end_with_parent()
    plan = json.loads((args.folder / "plan.json").read_text(encoding="utf-8"))
    family, run, seed = name.split("-")
    folder = args.folder / "runs" / name
    with locked(folder / "lock", wait=True):  # the process of a killed command may still be saving
        settings = plan["families"][family]["runs"][run]
        settings |= {"output_dir": str(folder), "train_data": [str(args.scenes / "train")], "resume": "latest"}
        settings |= {"seed": int(seed.removeprefix("seed"))}
        result = pretrain.run(PretrainingArguments(**settings))
        if not result.finished:
            return EXIT_STOPPED
        scores, _ = score_model(folder / "final", args.scenes)
        record = json.loads((folder / "final/training.json").read_text(encoding="utf-8"))
        measured = {key: record[key] for key in ("steps", "samples_seen", "seconds")}
        content = {"family": family, "run": run, "seed": record["settings"]["seed"], **measured, **scores}
        write_result(args.folder, name, content)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return 0


def result_path(folder: Path, name: str) -> Path:
    """Where the result of a run is, once it is finished."""
    return folder / "results" / f"{name}.json"


def write_result(folder: Path, name: str, content: Mapping[str, Any]) -> None:
    """The result, there whole or not at all."""
    path = result_path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json_text(content, indent=1) + "\n").encode())


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results that are there, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "results").glob("*.json"))]


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
    words = ["--output-dir", args.output_dir, "--config", args.config, "--run", job.name]
    words += ["--data", str(args.scenes)]
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


def run_ablations(args: AblationArguments) -> tuple[Path, list[Job]]:
    """All runs that are asked for and not there yet, and the page; returns the page and the runs that failed."""
    plan = claim(args)
    jobs = jobs_of(plan, args)
    try:
        with locked(args.folder / "lock", wait=False):
            prepare_scenes(args, plan["scenes"])
            failed = run_jobs(args, jobs, lambda: write_page(plan, read_results(args.folder), args.folder))
            return write_page(plan, read_results(args.folder), args.folder), failed
    except BlockingIOError as error:
        raise ValueError(f"{args.folder}: another process of this command is at work there") from error


def run(args: AblationArguments) -> int:
    """The ablations, or the one run that the process was started for."""
    if args.run:
        return run_here(args, args.run)
    with termination_as_interrupt():
        page, failed = run_ablations(args)
    print(f"report: {page}")
    if failed:
        print(f"failed: {', '.join(job.name for job in failed)}; the same command tries them again", file=sys.stderr)
    return EXIT_FAILED if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv, advice=lambda args: "The same command continues.")


if __name__ == "__main__":
    sys.exit(main())
