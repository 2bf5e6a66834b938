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

A further task is a function in `training.evaluation.tasks`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyramidclip_command import answer_words, run_command
from training.evaluation.arguments import EvaluationArguments
from training.settings.fields import check_named
from training.settings.reading import parse_settings


def parse(argv: Sequence[str]) -> EvaluationArguments | list[str]:
    """The settings, or the words themselves where they are for clip-benchmark."""
    if "--bench" in argv:
        return list(argv)
    return check_named(parse_settings(EvaluationArguments, argv, __doc__, config=False))


if __name__ == "__main__":
    answer_words(parse)

import torch
from huggingface_hub import EvalResult

from pyramidclip_hf.backends import load_exported
from pyramidclip_hf.loading import Loaded, load_model, warn_of_slow_type
from training.evaluation.clip_benchmark import run_clip_benchmark
from training.evaluation.process import this_process
from training.evaluation.results import make_place, results_table, write_csv, write_json
from training.evaluation.tasks import TASKS, EmbeddingScoring, Scoring
from training.loop.token_scoring import TokenScoring


def evaluate(args: EvaluationArguments) -> list[EvalResult]:
    """Runs the task; every process returns the same results, and process 0 writes and prints them.

    Raises:
        ValueError: the model, the data or a setting is not what is expected.
        FileNotFoundError: there is no such data.
        ImportError: a package is absent; the message names the extra.
    """
    make_place(args.output, args.csv)
    state, device = this_process(args.device, args.cpu)
    started = time.perf_counter()
    loaded = _load(args, device)
    results = TASKS[args.task](_scoring(args, loaded), args)
    if state.is_main_process:
        details = vars(args) | {"seconds": round(time.perf_counter() - started, 2), "processes": state.num_processes}
        if args.output:
            write_json(results, args.output, Path(args.model).name, details)
        if args.csv:
            write_csv(results, args.csv)
        print(results_table(results))
    return results


def _load(args: EvaluationArguments, device: torch.device) -> Loaded[Any]:
    if args.backend == "torch":
        warn_of_slow_type("--dtype", args.dtype, device)
        return load_model(args.model, device=device, dtype=args.dtype)
    return load_exported(args.model, backend=args.backend, dtype=args.dtype)


def _scoring(args: EvaluationArguments, loaded: Loaded[Any]) -> Scoring:
    if args.scoring == "tokens":
        return TokenScoring.of_folder(loaded.folder, loaded.model, loaded.processor, f"--model {loaded.name}")
    return EmbeddingScoring(loaded.model, loaded.processor)


def run(settings: EvaluationArguments | list[str]) -> int:
    """Evaluates and returns the exit code."""
    if isinstance(settings, list):
        return run_clip_benchmark(settings)
    evaluate(settings)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, evaluates, and returns the exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
