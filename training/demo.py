"""The whole way once, on real input, in at most ten minutes on two cores: `make demo`.

    python -m training.demo [--output-dir runs/demo]

Draws the emoji scenes, trains the pyramid with the settings of `training/configs/demo.yaml`, CLIP with those and
`training/configs/clip.yaml` (equal steps and samples) and CLIP once more for the pyramid's time, loads the pyramid in a
new process and compares its embeddings with those before saving, evaluates all three, and writes `report.html`.
Trains on the GPU where there is one (--device cpu: not); embeddings are compared and scored on the CPU.

A demo that was stopped continues: finished stages are kept, a training continues from its last checkpoint. The folder:

    scenes/                     shards: train/, validation/, objects/
    pyramid/ clip/ clip_same_time/    one run each (`training.pretrain`), the model in final/
    stages.json                 what is done, seconds and CPU seconds of each stage, and the settings
    evaluation/NAME.npz, .json  embeddings and scores of each run
    pictures/ examples/         held-out scenes as files, and their embeddings by pyramid and CLIP in pyramid.npz and
                                clip.npz: what `pyramidclip app` shows in this folder
    report.html
"""

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

from pyramidclip_command import EXIT_STOPPED, Failure, answer_words, run_command
from pyramidclip_command import main as pyramidclip
from training.emoji.scenes import PER_OBJECT, TRAIN, VALIDATION
from training.settings.fields import usable_cores
from training.settings.reading import parse_settings, read_chain

CLIP = "training/configs/clip.yaml"


@dataclass(kw_only=True)
class DemoArguments:
    """Settings of `python -m training.demo`."""

    output_dir: str = field(default="runs/demo", metadata={"help": "folder of the demo"})
    config: str = field(default="training/configs/demo.yaml", metadata={"help": "settings of the three trainings"})
    train: int = field(default=TRAIN, metadata={"help": "training scenes"})
    validation: int = field(default=VALIDATION, metadata={"help": "held-out scenes"})
    per_object: int = field(default=PER_OBJECT, metadata={"help": "pictures of each single object"})
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where the trainings run; auto: on the GPU if there is one"}
    )
    processes: int = field(
        default=0, metadata={"help": "training processes; 0: one a core, at most 2, or one on the GPU"}
    )
    stage: Literal["train", "reload"] | None = field(
        default=None, metadata={"help": "one stage in this process; the demo starts such processes itself"}
    )
    training: str = field(default="pyramid", metadata={"help": "which training the stage is about"})
    max_steps: int | None = field(default=None, metadata={"help": "length of that training"})

    def __post_init__(self) -> None:
        """Checks what is given; `settled` decides the rest."""
        for file in (self.config, CLIP):
            if not Path(file).is_file():
                raise ValueError(f"--config: there is no {file}; run the demo in the checkout's folder")
        for name in ("train", "validation", "per_object"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 2, got {getattr(self, name)}")
        if self.processes < 0:
            raise ValueError(f"--processes: expected 0 or more, got {self.processes}")
        if self.stage is None and (self.max_steps is not None or self.training != "pyramid"):
            raise ValueError(f"--training and --max-steps belong to --stage; the length of all is in {self.config}")

    @property
    def threads(self) -> int:
        """Of each training process."""
        return max(1, usable_cores() // max(1, self.processes))

    @property
    def folder(self) -> Path:
        """`output_dir` as a path."""
        return Path(self.output_dir)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that finished stages depend on."""
        content = b"".join(path.read_bytes() for path, _ in read_chain(self.config, CLIP))
        digest = hashlib.sha256(content).hexdigest()[:16]
        return {name: getattr(self, name) for name in ("train", "validation", "per_object")} | {"config": digest}


def parse(argv: Sequence[str]) -> DemoArguments:
    """The settings that the words of the command line stand for."""
    return parse_settings(DemoArguments, argv, __doc__, config=False)


if __name__ == "__main__":
    answer_words(parse)

import numpy as np
import torch
import transformers

from pyramidclip_hf.files import json_text, write_atomically
from pyramidclip_hf.loading import choose_device, load_model
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPModel
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES
from training import pretrain
from training.data.labelled import labelled_shards
from training.data.samples import ShardSamples
from training.emoji.pictures import ATTRIBUTION
from training.emoji.scoring import Scores, draw_scenes, save_arrays, score_model
from training.emoji.trying import write_pictures
from training.evaluation.embedding import embed_levels
from training.loop.tracking import read_metrics
from training.reports.demo_page import SCENES_SHOWN, ReportedDemo, ReportedRun, write_report
from training.settings.pretraining import PretrainingArguments

TITLES = {"pyramid": "Pyramid", "clip": "CLIP, same samples", "clip_same_time": "CLIP, same time"}


STAGE_TITLES = {
    "scenes": "drawing the scenes",
    "pyramid": "training the pyramid",
    "clip": "training CLIP, same samples",
    "clip_same_time": "training CLIP, same time",
    "reload": "loading in a new process and comparing",
    "evaluate": "evaluating the three models",
    "try": "pictures to try two of them on",
}


class Stages:
    """`stages.json`: which stages are finished, the seconds of all attempts at each, and what they left for others."""

    def __init__(self, folder: Path, identity: dict[str, Any]):
        """Reads what an earlier start left.

        Args:
            folder: Of the demo.
            identity: Of the demo, see `DemoArguments`.

        Raises:
            ValueError: The folder holds a demo of another identity.
        """
        self.path = folder / "stages.json"
        self.content = {"settings": identity, "seconds": {}, "cpu_seconds": {}, "results": {}}
        if self.path.is_file():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))
            if self.content["settings"] != identity:
                raise ValueError(
                    f"{folder} holds a demo of other settings ({self.content['settings']}, now {identity}): remove "
                    "it, or choose another --output-dir"
                )

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json_text(self.content, indent=1) + "\n").encode())

    def done(self, name: str) -> bool:
        """Whether the stage is finished."""
        return name in self.content["results"]

    def result(self, name: str) -> dict[str, Any]:
        """What the finished stage left."""
        return self.content["results"][name]

    def seconds(self, name: str, kind: str = "seconds") -> float:
        """Time of all attempts at the stage so far: "seconds" by the clock, or "cpu_seconds" of all its processes."""
        return self.content[kind].get(name, 0.0)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[dict[str, Any]]:
        """Times the block; the dictionary that it fills becomes the stage's result, unless it raises."""
        print(f"demo: {STAGE_TITLES[name]}", flush=True)
        started, used = time.monotonic(), _cpu_seconds()
        result: dict[str, Any] = {}
        try:
            yield result
            self.content["results"][name] = result
        finally:
            self.content["seconds"][name] = self.seconds(name) + time.monotonic() - started
            self.content["cpu_seconds"][name] = self.seconds(name, "cpu_seconds") + _cpu_seconds() - used
            self._write()


def _cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    return sum(os.times()[:4])


##################################################################################################
#  Stages in processes of their own                                                              #
##################################################################################################


def start(args: DemoArguments, stage: str, run: str, max_steps: int | None = None, processes: int = 1) -> None:
    """Runs one stage of the demo in new processes and waits.

    Args:
        args: Settings of the demo.
        stage: "train" or "reload".
        run: The training that it is about.
        max_steps: The length of that training; None: as configured.
        processes: How many.

    Raises:
        Failure: They failed.

    `accelerate launch --cpu` starts a single process whatever number it is told, so PyTorch's own launcher does it;
    Accelerate finds the processes the same way.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["--output-dir", args.output_dir, "--config", args.config, "--processes", str(processes)]
    words += ["--device", args.device]
    words += ["--stage", stage, "--training", run]
    if max_steps:
        words += ["--max-steps", str(max_steps)]
    threads = str(args.threads if processes > 1 else args.threads * args.processes)
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment["ACCELERATE_USE_CPU"] = str(args.device == "cpu").lower()
    code = subprocess.run([*launcher, "-m", "training.demo", *words], env=environment, check=False).returncode
    if code:
        raise Failure(
            f"the stage {stage!r} of {run} ended with code {code}; its messages are above. The same command continues"
        )


def training_settings(args: DemoArguments) -> PretrainingArguments:
    """The settings of one of the three runs."""
    words = ["--config", args.config, *([] if args.training == "pyramid" else [CLIP])]
    folder = args.folder / args.training
    words += ["--output-dir", str(folder)]
    # Made by all processes together, so that none sees what another does not.
    if any((folder / made).exists() for made in ("checkpoints", "final")):
        words += ["--resume", "latest"]
    words += ["--train-data", str(args.folder / "scenes/train")]
    words += ["--validation-data", str(args.folder / "scenes/validation")]
    if args.max_steps:
        words += ["--max-steps", str(args.max_steps)]
    return parse_settings(PretrainingArguments, words)


def train_stage(args: DemoArguments) -> int:
    """One training, in this process and its siblings; the pyramid's embeddings are kept before the model is loaded."""
    result = pretrain.run(training_settings(args))
    if not result.finished:
        return EXIT_STOPPED
    if args.training == "pyramid" and int(os.environ.get("RANK", 0)) == 0:
        model = cast(PyramidCLIPModel, result.model).cpu()  # what every pre-training trains
        embeds = compared_embeddings(model, result.processor, args.folder / "scenes/validation")
        save_arrays(args.folder / "pyramid/before_saving.npz", process=os.getpid(), **embeds)
    return 0


def compared_embeddings(model: PyramidCLIPModel, processor: PyramidCLIPProcessor, data: Path) -> dict[str, np.ndarray]:
    """Level -> (N, D) float32 embeddings of the held-out scenes.

    One thread computes them, since the last bits of a matrix product depend on how it is split.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    levels = ["global", "roi", "summary", "caption", "tags"]
    embedded = embed_levels(model, processor, ShardSamples(str(data)), levels, alone=True)
    torch.set_num_threads(threads)
    return {level: embeds.numpy() for level, embeds in embedded.embeds.items()}


def reload_stage(args: DemoArguments) -> int:
    """Loads the saved pyramid in this new process, embeds again, and writes how the embeddings compare."""
    with np.load(args.folder / "pyramid/before_saving.npz") as kept:
        before = {name: kept[name] for name in kept.files}
    training_process = int(before.pop("process"))
    loaded = load_model(str(args.folder / "pyramid/final"))
    model, processor = loaded.model, loaded.processor
    after = compared_embeddings(model, processor, args.folder / "scenes/validation")
    different = sum(int((before[level].view(np.uint32) != after[level].view(np.uint32)).sum()) for level in before)
    comparison = {
        "equal": different == 0 and before.keys() == after.keys(),
        "numbers": sum(array.size for array in before.values()),
        "different": different,
        "largest": max(float(np.abs(before[level] - after[level]).max()) for level in before),
        "pictures": len(before["global"]),
        "texts": len(before["caption"]),
        "training_process": training_process,
        "loading_process": os.getpid(),
        "folder": str(args.folder / "pyramid/final"),
    }
    write_atomically(args.folder / "reload.json", (json_text(comparison, indent=1) + "\n").encode())
    return 0


##################################################################################################
#  Stages in this process                                                                        #
##################################################################################################


def training_record(args: DemoArguments, name: str) -> dict[str, Any]:
    """`training.json` of a finished run: settings, steps, samples seen, seconds."""
    return json.loads((args.folder / name / "final/training.json").read_text(encoding="utf-8"))


def steps_in_the_same_time(args: DemoArguments) -> int:
    """Optimizer steps of CLIP that take as long as the pyramid's training took."""
    pyramid, clip = training_record(args, "pyramid"), training_record(args, "clip")
    return max(1, round(clip["steps"] * pyramid["seconds"] / clip["seconds"]))


def evaluate_run(args: DemoArguments, name: str) -> Scores:
    """The scores of a finished run; what is behind them goes to evaluation/NAME.npz."""
    scores, arrays = score_model(args.folder / name / "final", args.folder / "scenes")
    save_arrays(args.folder / f"evaluation/{name}.npz", **arrays)
    return scores


def embed_pictures(args: DemoArguments) -> int:
    """Writes the pictures to try the models on, and their embeddings by pyramid and CLIP; returns how many there are.

    Raises:
        Failure: They could not be embedded.
    """
    write_pictures(args.folder / "scenes", args.folder)
    pictures = args.folder / "pictures"
    for name in ("pyramid", "clip"):
        words = ["--model", str(args.folder / name / "final"), "--output", str(args.folder / f"{name}.npz")]
        code = pyramidclip(["embed", str(pictures), *words, "--device", "cpu", "--overwrite", "--quiet"])
        if code:
            raise Failure(
                f"the pictures could not be embedded by {name}; the reason is above. The same command continues"
            )
    return sum(1 for _ in pictures.iterdir())


##################################################################################################
#  The report                                                                                    #
##################################################################################################


def reported_run(args: DemoArguments, name: str, scores: Scores) -> ReportedRun:
    """What the report says about one run."""
    record = training_record(args, name)
    with np.load(args.folder / f"evaluation/{name}.npz") as arrays:
        caption_scores, object_scores = (torch.from_numpy(arrays[key]) for key in ("caption_scores", "object_scores"))
    return ReportedRun(
        name=name,
        title=TITLES[name],
        objective=", ".join(f"{term} {weight:.3g}" for term, weight in scores["loss_weights"].items()),
        smoothing=scores["label_smoothing"],
        steps=record["steps"],
        samples=record["samples_seen"],
        seconds=record["seconds"],
        log=read_metrics(args.folder / name / "metrics.jsonl"),
        retrieval=scores["retrieval"],
        zero_shot=scores["zero_shot"],
        caption_scores=caption_scores,
        object_scores=object_scores,
    )


def report(args: DemoArguments, stages: Stages) -> Path:
    """Collects what the stages left and writes report.html."""
    scenes = args.folder / "scenes"
    objects, results = labelled_shards(str(scenes / "objects")), stages.result("evaluate")
    path = args.folder / "report.html"
    demo = ReportedDemo(
        runs=[reported_run(args, name, results[name]) for name in TITLES],
        scenes=list(ShardSamples(str(scenes / "train"), SCENES_SHOWN)),
        validation=list(ShardSamples(str(scenes / "validation"))),
        objects=list(ShardSamples(str(scenes / "objects"))),
        labels=objects.labels,
        class_names=objects.class_names,
        template_count=len(IMAGENET_TEMPLATES),
        scale=results["pyramid"]["scale"],
        batch_size=training_record(args, "pyramid")["settings"]["global_batch_size"],
        parameters=results["pyramid"]["parameters"],
        training_scenes=args.train,
        attribution=ATTRIBUTION,
        reload=stages.result("reload"),
        stages=[
            (title, stages.seconds(name), stages.seconds(name, "cpu_seconds")) for name, title in STAGE_TITLES.items()
        ],
        setup=setup_text(args),
        commands=commands_text(args),
    )
    write_report(demo, path)
    return path


def _where(args: DemoArguments) -> str:
    """Which processes train, and on what."""
    on_gpu = f", {torch.cuda.get_device_name()}," if args.device == "cuda" else ""
    return f"{args.processes} training process{'es' if args.processes > 1 else ''}{on_gpu}"


def setup_text(args: DemoArguments) -> str:
    """Machine, versions and settings in a sentence or two."""
    settings = training_record(args, "pyramid")["settings"]
    return (
        f"{_where(args)} with {args.threads} threads each, {platform.machine()}, Python "
        f"{platform.python_version()}, PyTorch {torch.__version__}, Transformers {transformers.__version__}. Batches "
        f"of {settings['global_batch_size']}, AdamW with a peak learning rate of {settings['learning_rate']:g}, "
        f"{settings['precision']}. All settings: {args.config}."
    )


def commands_text(args: DemoArguments) -> str:
    """How to repeat the parts by hand."""
    scenes = f"--train-data {args.output_dir}/scenes/train --validation-data {args.output_dir}/scenes/validation"
    launch = f"torchrun --standalone --nproc-per-node {args.processes} -m training.pretrain --config {args.config}"
    model = f"--model {args.output_dir}/pyramid/final"
    return "\n".join(
        [
            f"python -m training.emoji.scenes --output-dir {args.output_dir}/scenes --train {args.train} "
            f"--validation {args.validation} --per-object {args.per_object}",
            f"{launch} {scenes} --output-dir my_pyramid",
            f"{launch} {CLIP} {scenes} --output-dir my_clip",
            f"python -m training.evaluate {model} --task retrieval --data {args.output_dir}/scenes/validation",
            f"python -m training.evaluate {model} --task zero-shot --data {args.output_dir}/scenes/objects",
        ]
    )


def run_demo(args: DemoArguments) -> Path:
    """All stages that are not done yet, then the report."""
    print(f"demo: training on the {torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}", flush=True)
    stages = Stages(args.folder, args.identity)
    if not stages.done("scenes"):
        with stages.clock("scenes"):
            workers = args.processes * args.threads
            draw_scenes(args.folder / "scenes", args.train, args.validation, args.per_object, workers)
    for name in TITLES:
        if not stages.done(name):
            with stages.clock(name) as result:
                steps = steps_in_the_same_time(args) if name == "clip_same_time" else None
                start(args, "train", name, steps, args.processes)
                result["steps"] = training_record(args, name)["steps"]
    if not stages.done("reload"):
        with stages.clock("reload") as result:
            start(args, "reload", "pyramid")
            result |= json.loads((args.folder / "reload.json").read_text(encoding="utf-8"))
    if not stages.done("evaluate"):
        with stages.clock("evaluate") as result:
            result |= {name: evaluate_run(args, name) for name in TITLES}
    if not stages.done("try"):
        with stages.clock("try") as result:
            result["pictures"] = embed_pictures(args)
    return report(args, stages)


def summary(stages: Stages, path: Path) -> str:
    """The numbers of the report's head, for the terminal."""
    lines = [f"{'':22}{'R@1':>8}{'R@5':>8}{'zero-shot':>11}{'seconds':>9}"]
    for name, title in TITLES.items():
        scores = stages.result("evaluate")[name]
        found = [scores["retrieval"]["global_caption"][f"text_to_image_R@{k}"] for k in (1, 5)]
        shares = "".join(f"{100 * share:7.1f}%" for share in found) + f"{100 * scores['zero_shot']['top_1']:10.1f}%"
        lines.append(f"{title:22}{shares}{stages.seconds(name):9.0f}")
    reload = stages.result("reload")
    equal = "bit-equal" if reload["equal"] else f"NOT equal: {reload['different']} numbers differ"
    lines.append(f"loaded in a new process: {equal}, {reload['numbers']:,} numbers")
    lines.append(f"report: {path}; a page to try the models on: pyramidclip app")
    return "\n".join(lines)


def settled(args: DemoArguments) -> DemoArguments:
    """With the device and the number of processes that `auto` and 0 stand for.

    Raises:
        ValueError: There is no such device.
    """
    device: Literal["cpu", "cuda"] = "cuda" if args.device == "cuda" else "cpu"
    if args.device == "auto" and torch.cuda.is_available():
        device = "cuda"
    if device == "cuda":
        choose_device("cuda")
    return replace(args, device=device, processes=args.processes or (1 if device == "cuda" else min(2, usable_cores())))


def run(args: DemoArguments) -> int | None:
    """The demo, or the one stage that the process was started for."""
    args = settled(args)
    if args.stage:
        return {"train": train_stage, "reload": reload_stage}[args.stage](args)
    path = run_demo(args)
    print(summary(Stages(args.folder, args.identity), path))
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv, advice=lambda args: "The same command continues.")


if __name__ == "__main__":
    sys.exit(main())
