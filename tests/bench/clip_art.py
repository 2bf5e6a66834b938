"""PyramidCLIP against CLIP on real, noisy pairs: clip art with its makers' texts, at equal samples and equal time.

    python -m tests.bench.clip_art --data data/openclipart-chosen --output-dir runs/openclipart

Needs the shards that docs/real-data.md makes. Nine trainings of training/configs/openclipart.yaml, three seeds each:
PyramidCLIP with the terms that need no regions, CLIP with as many samples, and CLIP with as much time, which is so many
more steps. Each has one thread, two run at a time. Stop it and start it again: finished runs are kept, others go on
from their last checkpoint. After each run table.md is written anew, of the held-out pictures.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramidclip_hf.files import write_text

CONFIGS = "training/configs"
STEPS = 600
# Of the steps, timed in turn on the processor that docs/real-data.md names.
CLIP_STEPS_IN_EQUAL_TIME = 1000
METHODS: dict[str, tuple[str, list[str], int]] = {
    "pyramid": ("PyramidCLIP, no regions", [], STEPS),
    "clip_samples": ("CLIP, equal samples", [f"{CONFIGS}/clip.yaml"], STEPS),
    "clip_time": ("CLIP, equal time", [f"{CONFIGS}/clip.yaml"], CLIP_STEPS_IN_EQUAL_TIME),
}
METRICS = [f"{way}_{metric}" for way in ("image_to_text", "text_to_image") for metric in ("R@1", "R@5", "R@10")]
MEAN_RANK = [f"{way}_mean_rank" for way in ("image_to_text", "text_to_image")]


def words_of(args: argparse.Namespace, method: str, seed: int) -> list[str]:
    """The command line of a training."""
    _, further, steps = METHODS[method]
    settings = {
        "output-dir": args.output_dir / f"{method}-{seed}",
        "train-data": args.data / "train",
        "validation-data": args.data / "validation",
        "max-steps": max(1, round(steps * args.share)),
        "seed": seed,
        "resume": "latest",
    }
    words = [sys.executable, "-m", "training.pretrain", "--config", f"{CONFIGS}/openclipart.yaml", *further]
    return words + [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def scores(folder: Path) -> dict[str, Any] | None:
    """The last validation of a finished run and its seconds, or None where it is not finished."""
    if not (folder / "final/training.json").is_file():
        return None
    trained = json.loads((folder / "final/training.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = [line for line in map(json.loads, lines) if "validation/global_caption/image_to_text_R@1" in line][-1]
    found = {name: last[f"validation/global_caption/{name}"] for name in METRICS + MEAN_RANK}
    return found | {"seconds": trained["seconds"], "steps": trained["steps"]}


def table(args: argparse.Namespace) -> str:
    """The runs that are there: mean over seeds, ± their standard deviation."""
    ways = ("picture to text", "text to picture")
    heads = [f"{way} {name}" for way in ways for name in ("R@1", "R@5", "R@10")] + [f"{way} mean rank" for way in ways]
    lines = ["| method | seeds | steps | seconds | " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) + 3)]
    for method, (title, _, _) in METHODS.items():
        runs = [found for seed in args.seeds if (found := scores(args.output_dir / f"{method}-{seed}"))]
        if not runs:
            continue
        cells = [str(len(runs)), str(runs[0]["steps"]), _spread([run["seconds"] for run in runs], 0)]
        cells += [_spread([100 * run[name] for run in runs], 1) for name in METRICS]
        cells += [_spread([run[name] for run in runs], 0) for name in MEAN_RANK]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    around = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{around}"


def run_all(args: argparse.Namespace) -> list[str]:
    """Trains what is not there, two at a time; returns the names of those that failed."""
    names = {"OMP": "1", "MKL": "1", "OPENBLAS": "1"}
    environment = os.environ | {f"{name}_NUM_THREADS": one for name, one in names.items()}
    environment |= {"ACCELERATE_USE_CPU": "true", "TOKENIZERS_PARALLELISM": "false"}
    waiting = [(method, seed) for seed in args.seeds for method in METHODS]
    waiting = [(method, seed) for method, seed in waiting if not scores(args.output_dir / f"{method}-{seed}")]
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            while waiting and len(running) < args.parallel:
                method, seed = waiting.pop(0)
                name = f"{method}-{seed}"
                with open(args.output_dir / f"{name}.log", "ab") as log:
                    running[name] = subprocess.Popen(
                        words_of(args, method, seed), env=environment, stdout=log, stderr=log
                    )
                print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            time.sleep(0.5)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    failed.append(name)
                write_text(args.output_dir / "table.md", table(args))
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def main() -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/openclipart-chosen"))
    parser.add_argument("--output-dir", type=Path, default=Path("runs/openclipart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=2, help="trainings at a time")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try it")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    failed = run_all(args)
    text = table(args)
    write_text(args.output_dir / "table.md", text)
    print(text)
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are in {args.output_dir}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
