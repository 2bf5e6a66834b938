r"""Asks whether pre-training helps a detector: `training.detection` from several models, under several seeds each.

    python -m training.detection_table --recipe training/configs/emoji_detection.yaml --output-dir DIR \
        --models random=RN50 clip=DIR pyramid=DIR/seed{seed}/final --seeds 0 1 2

Each run has its folder, DIR/NAME-SEED, and the same steps on the same data. {seed} in a model is the run's seed: each
run then starts from an encoder of its own, and the deviation has theirs in it. The command can be stopped at any moment
(SIGTERM: exit code 75) and given again: finished runs are left alone, the one that was on its way continues. After each
run DIR/table.md has mean and standard deviation over the seeds, DIR/table.json every value.
"""

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pyramidclip_command import EXIT_STOPPED, answer_words, run_command
from training.settings.fields import check_named
from training.settings.reading import parse_settings


@dataclass(kw_only=True)
class TableArguments:
    """Settings of `python -m training.detection_table`.

    Raises:
        ValueError: A value cannot be; the message names the field.
    """

    recipe: str = field(
        metadata={"names": "path", "help": "settings of training.detection, with train_data and test_data"}
    )
    output_dir: str = field(metadata={"help": "folder of all runs and of the table"})
    models: list[str] = field(
        metadata={"help": "NAME=MODEL, as --model of training.detection; {seed} in it is the run's"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of each model"})

    def __post_init__(self) -> None:
        """Checks what fields say by themselves."""
        names = [entry.partition("=")[0] for entry in self.models]
        wrong = [entry for entry in self.models if not all(entry.partition("="))]
        if wrong or len(set(names)) < len(names) or not names:
            raise ValueError(f"models: expected NAME=MODEL with different names, got {wrong or self.models}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: expected different numbers, got {self.seeds}")


def parse(words: Sequence[str]) -> TableArguments:
    """The settings that the words of a command line stand for."""
    return check_named(parse_settings(TableArguments, words, __doc__, config=False, exit_codes=(EXIT_STOPPED,)))


if __name__ == "__main__":
    answer_words(parse)

from pyramidclip_hf.architectures_pyramidclip import ARCHITECTURES
from pyramidclip_hf.files import json_text, write_atomically
from training import detection
from training.settings.detecting import DetectionArguments

COLUMNS = ("voc_ap", "voc_ap50", "voc_ap75", "box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")


def settings_of(args: TableArguments, name: str, model: str, seed: int) -> DetectionArguments:
    """Those of one run. The recipe's `model_config` is for new weights alone.

    Raises:
        ValueError: The recipe names no data to measure on, or what `training.detection` refuses.
    """
    model = model.replace("{seed}", str(seed))
    words = ["--config", args.recipe, "--model", model, "--seed", str(seed)]
    chosen = parse_settings(DetectionArguments, [*words, "--output-dir", str(Path(args.output_dir) / f"{name}-{seed}")])
    if not chosen.test_data:
        raise ValueError(f"recipe {args.recipe}: expected test_data, on which the models are compared")
    chosen.resume = "latest"
    if model not in ARCHITECTURES:
        chosen.model_config = None
    return chosen


def table_of(values: Mapping[str, Mapping[int, Mapping[str, float]]]) -> str:
    """Markdown: percent, mean and standard deviation over the seeds that are finished.

    Args:
        values: name -> seed -> metric -> value.
    """
    measured = {metric for seeds in values.values() for metrics in seeds.values() for metric in metrics}
    columns = [column for column in COLUMNS if f"test/{column}" in measured]  # masks only where they are learnt
    lines = [f"| from | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in values.items():
        cells = []
        for column in columns:
            found = [100 * metrics[f"test/{column}"] for metrics in seeds.values()]
            spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}")
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run(args: TableArguments) -> int:
    """All runs, seed by seed, so that an unfinished table has all models; the exit code."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    models = [entry.partition("=")[::2] for entry in args.models]
    wanted = [(name, model, seed) for seed in args.seeds for name, model in models]
    every = [(name, seed, settings_of(args, name, model, seed)) for name, model, seed in wanted]
    for name, seed, settings in every:
        print(f"{name}, seed {seed}: {settings.output_dir}", flush=True)
        result = detection.run(settings)
        if not result.finished:
            return EXIT_STOPPED
        values.setdefault(name, {})[seed] = dict(result.metrics)
        folder = Path(args.output_dir)
        write_atomically(folder / "table.json", (json_text(values, indent=1) + "\n").encode())
        write_atomically(folder / "table.md", table_of(values).encode())
    print(table_of(values))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, runs, and returns the exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
