r"""Linear probe: logistic regression on the features of a frozen picture encoder (paper, sections 4.4, B.2 and D).

    python -m training.linear_probe --model DIR --train-data TRAIN_FOLDER \
        --test-data TEST_FOLDER [--features backbone|projected]
    python -m training.linear_probe --model DIR --train-data ROOT --dataset pets cars
    accelerate launch --num_processes 4 -m training.linear_probe ...

From the paper (appendix B.2): scikit-learn's logistic regression by L-BFGS, at most 1000 iterations, the strength of
its L2 penalty swept on validation data, frozen features. From CLIP (appendix A.3), which the paper follows: 96 steps of
the penalty between 1e-6 and 1e6, 8 a decade, searched coarse to fine around the best, and the last fit on training and
validation data together. Ours: which features (neither paper settles it for a ResNet; `backbone` is the
pooled vector before the projection, `projected` the embedding, not normalised), no standardisation, the smallest C
among equals, the held-out share where a data set has no validation set, fp32.

Features are computed once, by all processes, and kept under `cache_dir`; fitting is done by the first process alone.
"""

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from pyramidclip_command import answer_words, run_command
from training.data.records import MAX_IMAGE_PIXELS
from training.evaluation.arguments import TABLE_7_SETS
from training.settings.fields import check_named
from training.settings.parts import check_part_settings
from training.settings.reading import parse_settings

Metric = Literal["top_1", "mean_per_class"]


@dataclass(kw_only=True)
class LinearProbeArguments:
    """Settings of `python -m training.linear_probe`.

    Raises:
        ValueError: A value cannot be, or two together; the message names the field.
    """

    model: str = field(metadata={"names": "id", "help": "folder of a saved model, or Hub id"})
    train_data: str = field(metadata={"names": "data", "help": "folder with a sub-folder a class, or labelled shards"})
    validation_data: str | None = field(
        default=None, metadata={"names": "data", "help": "for the sweep of C, in the form of train_data"}
    )
    test_data: str | None = field(
        default=None, metadata={"names": "data", "help": "for the result, in the form of train_data"}
    )
    dataset: list[str] = field(
        default_factory=list,
        metadata={
            "help": f"train and test part of {', '.join(TABLE_7_SETS)}; several at once; train_data is the folder that "
            "holds them"
        },
    )
    validation_fraction: float | None = field(
        default=None,
        metadata={
            "help": "share of each class held out of the training data; default: 0.2 without validation_data and c"
        },
    )
    test_fraction: float = field(default=0.0, metadata={"help": "share of each class held out in place of test_data"})
    classes: str | None = field(
        default=None,
        metadata={"names": "path", "help": "file with class names, one a line (folders also: folder<TAB>name)"},
    )
    features: Literal["backbone", "projected"] = field(
        default="backbone", metadata={"help": "pooled vector before the projection, or the embedding behind it"}
    )
    metric: Metric | None = field(
        default=None,
        metadata={"help": "what the sweep of C maximises on the validation data; default: the dataset's, or top_1"},
    )
    standardize: bool = field(
        default=False, metadata={"help": "features to mean 0 and variance 1, by the data that the fit sees"}
    )
    c: float | None = field(default=None, metadata={"help": "inverse strength of the L2 penalty; default: swept"})
    max_iterations: int = field(default=1000, metadata={"help": "of L-BFGS (paper: 1000)"})
    seed: int = field(default=0, metadata={"help": "of what is held out"})
    batch_size: int = field(default=64, metadata={"help": "pictures encoded at a time by each process"})
    max_image_pixels: int = field(
        default=MAX_IMAGE_PIXELS, metadata={"help": "a picture with more is an error, by its header"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "of the model"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of kept features, or none; default: features/ in the project's cache"}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "name in the results; default: the data's name"})
    split: str | None = field(default="test", metadata={"help": "split in the results"})
    output: str | None = field(default=None, metadata={"help": "JSON file for the results, a model index of the Hub"})
    csv: str | None = field(default=None, metadata={"help": "CSV file for the results"})
    device: str = field(
        default="auto",
        metadata={"help": "auto: an accelerator if there is one, for each process its own; cpu; or e.g. cuda:1"},
    )
    cpu: bool = field(default=False, metadata={"help": "the same as --device cpu"})

    def __post_init__(self) -> None:
        """What can be refused before anything is loaded."""
        if self.validation_fraction is None:
            self.validation_fraction = 0.0 if self.validation_data or self.c else 0.2
        check_part_settings(self, self.dataset)
        several = [name for name in ("validation_data", "classes", "dataset_name") if getattr(self, name)]
        if len(self.dataset) > 1 and several:
            raise ValueError(f"{several[0]} is for one data set, dataset names {self.dataset}")
        if repeated := [name for name in self.dataset if self.dataset.count(name) > 1]:
            raise ValueError(f"dataset names {repeated[0]} more than once")
        for name in ("batch_size", "max_iterations", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a number of at least 1, got {getattr(self, name)}")
        if self.c is not None and not self.c > 0:
            raise ValueError(f"c: expected a positive number, got {self.c}")
        if not (self.test_data or self.test_fraction or self.dataset):
            raise ValueError("nothing to measure on: give test_data, or test_fraction to hold out a share, or dataset")
        if self.c is None and not self.validation_data and not self.validation_fraction:
            raise ValueError("sweeping C needs validation data: give validation_data, validation_fraction or c")


def parse(words: Sequence[str]) -> LinearProbeArguments:
    """The settings that the words of a command line stand for."""
    return check_named(parse_settings(LinearProbeArguments, words, __doc__, config=False))


if __name__ == "__main__":
    answer_words(parse)

import numpy as np
import torch
from huggingface_hub import EvalResult

from pyramidclip_hf.loading import load_model, warn_of_slow_type
from training.evaluation.classification import classification_metrics
from training.evaluation.process import this_process
from training.evaluation.results import (
    average_results,
    make_place,
    metric_results,
    results_table,
    write_csv,
    write_json,
)
from training.evaluation.sets import TABLE_7
from training.transfer.features import Features, cached_features
from training.transfer.parts import Numbers, Part, open_parts, refuse_shared

Scores = np.ndarray[Any, np.dtype[np.floating[Any]]]


# The sweep (CLIP, appendix A.3): exponents of C from -6 to 6 in steps of 1/8, first every 16th of them.
STEPS_PER_DECADE, DECADES, COARSE = 8, (-6, 6), 16


@dataclass(frozen=True)
class Fit:
    """A fitted classifier.

    Attributes:
        scores: Features (N, D) -> (N, C) float.
        iterations: Of the solver.
        converged: Before the last iteration allowed.
    """

    scores: Callable[[Features], Scores]
    iterations: int
    converged: bool


def fit(features: Features, labels: Numbers, c: float, max_iterations: int = 1000, standardize: bool = False) -> Fit:
    """Multinomial logistic regression by L-BFGS with the L2 penalty 1 / (2 `c`), as scikit-learn has it.

    Args:
        features: (N, D).
        labels: (N,), each of the classes 0 to C - 1 among them.
        c: Inverse strength of the penalty.
        max_iterations: Of L-BFGS.
        standardize: The regression sees features with mean 0 and variance 1 over these N.

    Raises:
        ImportError: scikit-learn is not installed; the message names the extra.
    """
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError('the linear probe needs scikit-learn: pip install -e ".[eval]"') from error
    regression = LogisticRegression(C=c, solver="lbfgs", max_iter=max_iterations)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = make_pipeline(StandardScaler(), regression) if standardize else regression
        model.fit(features, labels)

    def scores(rows: Features) -> Scores:
        decision: Scores = model.decision_function(rows)
        return np.stack([-decision, decision], axis=1) if decision.ndim == 1 else decision

    converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
    return Fit(scores, int(np.max(regression.n_iter_)), converged)


@contextlib.contextmanager
def all_cores(processes: int) -> Iterator[int]:
    """Inside, the numerical libraries use all cores, where a launcher left each of several processes one.

    Yields:
        How many that are; 0: as it was.
    """
    if processes == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        yield 0
        return
    from threadpoolctl import threadpool_limits  # which scikit-learn needs

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(cores):
        yield cores


def c_of(step: int) -> float:
    """C at a step of the sweep, from 0."""
    return 10.0 ** (DECADES[0] + step / STEPS_PER_DECADE)


def sweep(score: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The best step of the sweep of C, and the score of each step that was tried.

    Every 16th step first, then the neighbours of the best at half the distance, down to one step (CLIP, appendix A.3):
    15 fits at most in place of 97. Among equal scores the smallest C counts as the best.
    """
    last = (DECADES[1] - DECADES[0]) * STEPS_PER_DECADE
    tried = {step: score(step) for step in range(0, last + 1, COARSE)}
    distance = COARSE // 2
    while distance:
        best = min(tried, key=lambda step: (-tried[step], step))
        for step in (best - distance, best + distance):
            if 0 <= step <= last and step not in tried:
                tried[step] = score(step)
        distance //= 2
    return min(tried, key=lambda step: (-tried[step], step)), tried


def metrics_of(fitted: Fit, features: Features, labels: Numbers) -> dict[str, float | int]:
    """See `classification_metrics`."""
    return classification_metrics(torch.from_numpy(fitted.scores(features)), torch.from_numpy(labels))


def chosen_c(
    found: Mapping[str, Features], labels: Mapping[str, Numbers], metric: Metric, args: LinearProbeArguments
) -> tuple[float, list[dict[str, Any]]]:
    """The C that the sweep finds, and what it saw: of each C `c`, the metric, `converged`.

    Args:
        found: Part -> its features.
        labels: Part -> its labels.
        metric: What is maximised.
        args: The settings.
    """
    from tqdm.auto import tqdm

    rows: list[dict[str, Any]] = []
    with tqdm(desc="sweep of C", unit="fit") as bar:

        def score(step: int) -> float:
            fitted = fit(found["train"], labels["train"], c_of(step), args.max_iterations, args.standardize)
            value = metrics_of(fitted, found["validation"], labels["validation"])[metric]
            rows.append({"c": c_of(step), metric: value, "converged": fitted.converged})
            bar.update()
            return value

        best, _ = sweep(score)
    return c_of(best), sorted(rows, key=lambda row: row["c"])


def probe(args: LinearProbeArguments) -> list[EvalResult] | None:
    """The whole probe, of each data set that is named, and their mean.

    Returns:
        In the first process the results, which it writes and prints too; None in the others, which end as soon as the
        features are there, so that none waits for a long fit.

    Raises:
        ValueError: The model, the data or a setting is not what is expected.
        FileNotFoundError: There is no such data.
        ImportError: A package is absent; the message names the extra.
    """
    make_place(args.output, args.csv)
    state, device = this_process(args.device, args.cpu)
    started = time.perf_counter()
    parts = {name: open_parts(args, name) for name in args.dataset or (None,)}
    for found_parts in parts.values():
        if args.validation_data and args.test_data:  # the last fit is on the validation data too
            refuse_shared(found_parts["validation"], found_parts["test"])
    warn_of_slow_type("--dtype", args.dtype, device)
    loaded = load_model(args.model, dtype=args.dtype, device=device)
    # Train last: a bad picture among those to measure on must not be found after the hours that the others take.
    order = [(name, part) for part in ("test", "validation", "train") for name in parts if part in parts[name]]
    found: dict[str | None, dict[str, Features]] = {name: {} for name in parts}
    for name, part in order:
        found[name][part] = cached_features(loaded.model, loaded.processor, parts[name][part], args)
    if not state.is_main_process:
        return None
    config = f"linear probe, {args.features}"
    results, main_values, told = [], dict[str, float](), dict[str, dict[str, Any]]()
    for name in parts:
        data = parts[name]["test"].data
        with all_cores(state.num_processes):  # the other processes are at their end
            metrics, one = fitted_to(parts[name], found.pop(name), metric_of(args, name), args)
        results += metric_results("image-classification", data, args.split, metrics, config, args.dataset_name)
        if name and data.main_metric:
            main_values[name] = metrics[data.main_metric[0]]
        told[name or data.name] = one
    results += average_results("image-classification", main_values, config)
    details = vars(args) | (one if len(told) == 1 else {"data_sets": told})
    details |= {"seconds": round(time.perf_counter() - started, 2), "processes": state.num_processes}
    if args.output:
        write_json(results, args.output, Path(args.model).name, details)
    if args.csv:
        write_csv(results, args.csv)
    print(results_table(results))
    for name, one in told.items():
        of = f"{name}: " if len(told) > 1 else ""
        print(f"{of}C {one['c']:.4g}, {one['iterations']} iterations, features of width {one['feature_size']}")
    return results


def metric_of(args: LinearProbeArguments, dataset: str | None) -> Metric:
    """What the sweep of C maximises on one of the data sets; None: on the data that `train_data` are."""
    return args.metric or (cast(Metric, TABLE_7[dataset].metric) if dataset else "top_1")


def fitted_to(
    parts: Mapping[str, Part], found: Mapping[str, Features], metric: Metric, args: LinearProbeArguments
) -> tuple[dict[str, float | int], dict[str, Any]]:
    """The metrics of one data set's test part, and what a result file tells of how they came about.

    Args:
        parts: Of the data set.
        found: Part -> its features.
        metric: What the sweep of C maximises.
        args: The settings.
    """
    labels = {name: part.labels for name, part in parts.items()}
    learnt = [name for name in ("train", "validation") if name in parts]
    c, swept = (args.c, []) if args.c else chosen_c(found, labels, metric, args)
    features, numbers = (np.concatenate([of[name] for name in learnt]) for of in (found, labels))
    fitted = fit(features, numbers, c, args.max_iterations, args.standardize)
    report_doubts(fitted, c, swept, args)
    return metrics_of(fitted, found["test"], labels["test"]), {
        "metric": metric,
        "c": c,
        "sweep": swept,
        "iterations": fitted.iterations,
        "converged": fitted.converged,
        "pictures": {name: len(part.numbers) for name, part in parts.items()},
        "feature_size": found["train"].shape[1],
    }


def report_doubts(fitted: Fit, c: float, swept: Sequence[Mapping[str, Any]], args: LinearProbeArguments) -> None:
    """Says on stderr what makes a result less than it seems.

    That is: features that hardly differ, no convergence, a C at the end of the range.
    """
    if not fitted.iterations:
        print(
            "the last fit stopped before its first iteration: the features hardly differ from picture to picture, so "
            "the result is chance. Look at the features, or set standardize",
            file=sys.stderr,
        )
    if not fitted.converged:
        print(
            f"the last fit had not converged after {args.max_iterations} iterations (the paper's limit is 1000); its "
            "result stands as it is. A larger max_iterations shows what is missing",
            file=sys.stderr,
        )
    unfinished = [f"{row['c']:.3g}" for row in swept if not row["converged"]]
    if unfinished:
        print(f"fits of the sweep that had not converged: C = {', '.join(unfinished)}", file=sys.stderr)
    if swept and c in (c_of(0), c_of((DECADES[1] - DECADES[0]) * STEPS_PER_DECADE)):
        print(f"the best C, {c:.3g}, is at the end of the range that was searched", file=sys.stderr)


def run(args: LinearProbeArguments) -> None:
    """See `probe`."""
    probe(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
