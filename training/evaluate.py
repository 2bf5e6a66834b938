"""Evaluates a saved model: image-text retrieval and zero-shot classification.

    python -m training.evaluate --model DIR --task retrieval --data SHARDS --levels global_caption roi_tags
    python -m training.evaluate --model DIR --task retrieval --data ROOT --dataset flickr30k mscoco
    python -m training.evaluate --model DIR --task zero-shot --data ROOT --dataset imagenet pets --output results.json
    python -m training.evaluate --model DIR --task zero-shot --data FOLDER_OR_SHARDS_OR_HUB_DATA_SET
    python -m training.evaluate --bench --model DIR --dataset cifar10 --dataset_root ROOT
    accelerate launch --num_processes 4 -m training.evaluate ...

Retrieval runs on shards and manifests, for any of the nine level pairs, and on pictures with captions of other formats.
Zero-shot classification runs on the data sets of the paper's Table 7, on a folder with one sub-folder of pictures for
each class, on shards whose `KEY.json` has `class_name`, and on data sets of the Hub; a class is the mean of its prompts
(80 templates by default). No sample is skipped or counted twice, and scores are equal on any number of processes.
`--bench` hands what follows to clip-benchmark's own command. All of it: docs/evaluation.md.

A further task is a function in `training.evaluation.tasks`. Exit codes: 0, or 2 where settings or data are wrong.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import EvalResult

from training.data.remote import DownloadError
from training.evaluation.clip_benchmark import run_clip_benchmark
from training.evaluation.loading import load_model
from training.evaluation.results import results_table, write_csv, write_json
from training.evaluation.tasks import TASKS, EvaluationArguments

EXIT_WRONG_SETTING = 2


def evaluate(args: EvaluationArguments) -> list[EvalResult]:
    """Runs the task; every process returns the same results, and process 0 writes and prints them."""
    from accelerate import PartialState

    state = PartialState(cpu=args.cpu)
    started = time.perf_counter()
    model, processor = load_model(args.model, args.dtype, state.device)
    results = TASKS[args.task](model, processor, args)
    if state.is_main_process:
        details = vars(args) | {"seconds": round(time.perf_counter() - started, 2), "processes": state.num_processes}
        if args.output:
            write_json(results, args.output, Path(args.model).name, details)
        if args.csv:
            write_csv(results, args.csv)
        print(results_table(results))
    return results


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates, and returns the exit code."""
    from transformers import HfArgumentParser

    argv = sys.argv[1:] if argv is None else argv
    parser = HfArgumentParser(
        EvaluationArguments,
        description=__doc__.split("\n")[0],
        epilog="--bench ARGS hands over to clip-benchmark's own command, with this model (docs/evaluation.md)",
        allow_abbrev=False,
    )
    try:
        if "--bench" in argv:
            return run_clip_benchmark(argv)
        (args,) = parser.parse_args_into_dataclasses(argv)
        evaluate(args)
    except (ValueError, FileNotFoundError, ImportError, DownloadError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_WRONG_SETTING
    return 0


if __name__ == "__main__":
    sys.exit(main())
