"""How cost grows: `python -m tests.bench.growth [--only loss load] [--output FILE.json] [--figure FILE.png]`

Seconds and peak memory of a training step over batch size, text length, picture size and number of regions; of the loss
of one term over N, up to 65,536; of `from_pretrained` over the size of the model; and the time from `accelerate launch`
to the end of the first step. Every point runs in a process of its own, so that its peak memory is its own: the peak is
what the process takes above what it took before the model was built. With `--only` the other series stay as they are in
the output file.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.bench.paired import peak_bytes

# What is varied, and the rest of the point. The model is a ViT of 12 blocks, 384 wide, patches of 16 px.
BASE = {"pairs": 16, "tokens": 16, "image_size": 96, "regions": 10}
STEPS = {
    "pairs": [8, 16, 32, 64],
    "tokens": [10, 20, 40, 77],
    "image_size": [64, 96, 128, 192],
    "regions": [5, 10, 20, 40],
}
LOSS_SIZES = [4096, 8192, 16384, 32768, 65536]
LOSS_WIDTH = 128
MODELS = ["RN50", "ViT-B-32", "ViT-B-16", "ViT-L-14"]
AXES = {
    "pairs": "pairs in a batch",
    "tokens": "tokens of each text",
    "image_size": "patches of a picture",
    "regions": "regions of a picture",
    "loss": "N of the loss in thousands (one term, D = 128)",
    "load": "model, MB of weights",
}


def step_point(pairs: int, tokens: int, image_size: int, regions: int) -> dict[str, float]:
    """Median of three steps after one."""
    import torch

    from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
    from tests.bench import bench_training

    before = peak_bytes()
    bench_training.TOKENS = dict.fromkeys(bench_training.TOKENS, tokens)
    vision = {"image_size": image_size, "patch_size": 16, "hidden_size": 384, "num_attention_heads": 6}
    config = PyramidCLIPConfig.from_architecture(
        "ViT-B-32", vision_config=vision, text_config={"pooling": "eos", "hidden_size": 256, "num_attention_heads": 4}
    )
    torch.manual_seed(0)
    step = bench_training.OurStep(PyramidCLIPModel(config), bench_training.training_batch(config, pairs, regions))
    step()
    return {"seconds": median_of(step, 3), "peak_mb": (peak_bytes() - before) / 1e6}


def loss_point(samples: int) -> dict[str, float]:
    """One term, forward and backward, once."""
    import torch

    from pyramidclip_hf.loss_pyramidclip import pyramid_loss

    embeds = {level: torch.randn(samples, LOSS_WIDTH, requires_grad=True) for level in ("global", "caption")}
    units = {level: torch.nn.functional.normalize(value, dim=-1) for level, value in embeds.items()}
    before = peak_bytes()

    def both_ways():
        pyramid_loss(units, torch.tensor(14.3), {"global_caption": 1.0}, 0.2).loss.backward(retain_graph=True)

    return {"seconds": median_of(both_ways, 1), "peak_mb": (peak_bytes() - before) / 1e6}


def load_point(folder: str) -> dict[str, float]:
    """`from_pretrained` of a saved folder, the first in this process, and one look at every weight: they are mapped
    from the file, and take memory when they are used."""
    from pyramidclip_hf import PyramidCLIPModel

    PyramidCLIPModel.config_class()  # what importing takes is not what loading takes
    before = peak_bytes()

    def load():
        return sum(float(weight.sum()) for weight in PyramidCLIPModel.from_pretrained(folder).parameters())

    return {"seconds": median_of(load, 1), "peak_mb": (peak_bytes() - before) / 1e6}


def median_of(call, times: int) -> float:
    """Median seconds of a call."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def in_own_process(kind: str, **values) -> dict[str, float]:
    """One point, measured in a new process; prints it."""
    code = f"import json; from tests.bench import growth; print(json.dumps(growth.{kind}_point(**{values!r})))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    point = json.loads(shown.splitlines()[-1])
    print(f"{kind} {values}: {point['seconds']:.2f} s, {point['peak_mb']:.0f} MB", flush=True)
    return point


def load_points() -> list[dict[str, float]]:
    """The named architectures with random weights, saved and loaded."""
    points = []
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            code = (
                "import sys; from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel; "
                "PyramidCLIPModel(PyramidCLIPConfig.from_architecture(sys.argv[1])).save_pretrained(sys.argv[2])"
            )
            subprocess.run([sys.executable, "-c", code, name, folder], check=True, capture_output=True)
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors")) / 1e6
            points.append({"x": size, "name": name, **in_own_process("load", folder=folder)})
    return sorted(points, key=lambda point: point["x"])


def start_up_seconds() -> dict[str, float]:
    """From `accelerate launch` to the first line of metrics.jsonl, demo's model, 64 scenes that are there already."""
    with tempfile.TemporaryDirectory() as folder:
        scenes = [sys.executable, "-m", "training.emoji.scenes", "--output-dir", f"{folder}/scenes"]
        subprocess.run([*scenes, "--train", "64", "--validation", "4", "--per-object", "1"], check=True)
        words = ["--config", "training/configs/demo.yaml", "--train-data", f"{folder}/scenes/train", "--max-steps", "1"]
        words += ["--validation-data", f"{folder}/scenes/validation", "--log-every-steps", "1"]
        words += ["--output-dir", f"{folder}/run"]
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
        start = time.monotonic()
        process = subprocess.Popen([*launch, "-m", "training.pretrain", *words], stderr=subprocess.DEVNULL)
        log = Path(folder, "run", "metrics.jsonl")
        while process.poll() is None and not (log.is_file() and log.stat().st_size):
            time.sleep(0.05)
        seconds = time.monotonic() - start
        if process.wait():
            raise RuntimeError(f"the run ended with code {process.returncode}")
    return {"seconds": seconds}


def step_points(name: str) -> list[dict[str, float]]:
    """A training step over one of `STEPS`."""
    points = []
    for value in STEPS[name]:
        point = in_own_process("step", **{**BASE, name: value})
        points.append({"x": (value // 16) ** 2 if name == "image_size" else value, **point})
    return points


def measure(wanted: Sequence[str], result: dict) -> dict:
    """The result with the wanted series measured: name -> points with `x`, `seconds`, `peak_mb`."""
    series = dict(result.get("series", {}))
    for name in wanted:
        if name in STEPS:
            series[name] = step_points(name)
        elif name == "loss":
            series[name] = [{"x": samples, **in_own_process("loss", samples=samples)} for samples in LOSS_SIZES]
        elif name == "load":
            series[name] = load_points()
    start_up = start_up_seconds() if "start_up" in wanted else result["start_up"]
    return {"base": BASE, "series": {name: series[name] for name in AXES}, "start_up": start_up}


def draw(result: dict, path: Path) -> None:
    """Seconds (left axis) and peak memory (right axis) of each series, from zero, so that a straight line looks it; of
    the loss, whose time is quadratic, the root of the seconds."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (name, points) in zip(axes.flat, result["series"].items(), strict=True):
        x = [point["x"] / (1000 if name == "loss" else 1) for point in points]
        power, label = (0.5, "square root of seconds") if name == "loss" else (1, "seconds")
        axis.plot(x, [point["seconds"] ** power for point in points], "o-", color="#1f5fa8")
        axis.set(xlabel=AXES[name], xlim=(0, None), ylim=(0, None))
        axis.set_ylabel(label, color="#1f5fa8")
        memory = axis.twinx()
        memory.plot(x, [point["peak_mb"] for point in points], "s--", color="#b4541a")
        memory.set_ylim(0, None)
        memory.set_ylabel("peak MB", color="#b4541a")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.bench.growth", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("tests/bench/results/growth.json"))
    parser.add_argument("--figure", type=Path, default=Path("docs/growth.png"))
    parser.add_argument("--only", nargs="+", choices=[*AXES, "start_up"], default=[*AXES, "start_up"])
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    before = json.loads(args.output.read_text(encoding="utf8")) if args.output.is_file() else {}
    if len(args.only) <= len(AXES) and not before:
        parser.error(f"--only needs the other series in {args.output}")
    result = measure(args.only, before)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    draw(result, args.figure)
    print(f"start-up {result['start_up']['seconds']:.1f} s; written to {args.output} and {args.figure}")


if __name__ == "__main__":
    main()
