"""Measures what only a GPU can show: `make gpu`, or

    python -m tests.gpu [--parts right fast] [--only NAME ...] [--minutes 8] [--wheels FOLDER] [--output FILE] [--dry]

First *right* (values, gradients, commands), then *fast* (steps, loss, embedding, loading, beside open_clip and
CLIPModel). Each part has its seconds and fails alone; the file is complete after every line, and keeps the parts of
another call on the same machine. `--list` names the parts. Exit codes: 0 all that ran passed; 1 a part failed; 2 the
arguments or this machine do not fit. Without a GPU every part runs on the CPU at toy size, into a file that is not
`tests/bench/results/gpu.json`.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
RESULTS, DRY_RESULTS = CHECKOUT / "tests/bench/results/gpu.json", CHECKOUT / "runs/gpu/gpu.json"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["right", "fast"], metavar="SUBJECT", help="right, fast")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts with one of these in their name")
    parser.add_argument("--minutes", type=float, default=8.0, help="nothing is begun or goes on after so many (8)")
    parser.add_argument("--wheels", type=Path, default=CHECKOUT / "wheels", help="folder of pure-Python wheels to use")
    parser.add_argument("--output", type=Path, help=f"file of the results (default: {RESULTS.relative_to(CHECKOUT)})")
    parser.add_argument("--dry", action="store_true", help="the dry pass, also where there is a GPU")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> Path:
    """A folder for everything, removed at the end; the environment of this process and those that it starts."""
    folder = Path(tempfile.mkdtemp(prefix="pyramidclip-gpu-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found = []
    for wheel in sorted(args.wheels.glob("*-none-any.whl")):
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder / "site")
        found = [str(folder / "site")]
    # Last on the path: what is installed comes first.
    sys.path[:0] = [str(CHECKOUT)]
    sys.path += found
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *found, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    os.environ.setdefault("MPLBACKEND", "Agg")
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts; see the module."""
    args = parse(argv)
    ends = time.monotonic() + 60 * args.minutes
    folder = prepare(args)
    try:
        return measure(args, folder, ends)
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def measure(args: argparse.Namespace, folder: Path, ends: float) -> int:
    """Runs the chosen parts on the device that is there; the exit code.

    Raises:
        ValueError: parts that do not exist; a GPU that this torch cannot use.
        ImportError: this transformers or torch is too old, or something is missing.
    """
    from tests.gpu import (
        fast_detection,
        fast_embedding,
        fast_loss,
        fast_run,
        fast_steps,
        right_commands,
        right_model,
        right_training,
    )
    from tests.gpu.record import Record
    from tests.gpu.session import Session, find_device, machine, named

    parts = [*right_training.PARTS, *right_model.PARTS, *right_commands.PARTS]
    parts += [*fast_steps.PARTS, *fast_loss.PARTS, *fast_embedding.PARTS, *fast_run.PARTS]
    parts += fast_detection.PARTS
    parts += [*fast_steps.LAST, *fast_embedding.LAST, *fast_run.LAST]
    chosen = named(parts, args.parts, args.only)
    if args.list:
        print("\n".join(f"{part.name:<40} at most {part.seconds:.0f} s" for part in chosen))
        return 0
    device, why = find_device(args.dry)
    names = [part.name for part in chosen]
    output = args.output or (RESULTS if device.type == "cuda" else DRY_RESULTS)
    if device.type == "cpu":
        print(f"No GPU is measured: {why}. A dry pass at toy size on the CPU follows; its numbers say nothing.")
    record = Record(output, machine(device), [part.name for part in parts], names)
    session = Session(record, device, folder, ends)
    for part in chosen:
        session.run(part)
        session.tidy()
    counts = record.counts(names)
    print(f"{output}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    for name in names:
        if record.parts[name]["state"] == "failed":
            print(f"failed: {name}: {record.parts[name]['reason']}")
    return 1 if "failed" in counts else 0


if __name__ == "__main__":
    sys.exit(main())
