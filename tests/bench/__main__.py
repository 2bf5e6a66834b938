"""Measures the speed table on this machine: `make bench`, or

    python -m tests.bench [--rows image bf16 text training loss load data] [--rounds 7] [--output runs/bench.json]

Each row is a ratio against transformers' CLIPModel of the same size, or against the straightforward form that it names,
both timed in turn in one process. Weights are random: they decide nothing about the time.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS
from pyramidclip_hf.loss_pyramidclip import pyramid_loss
from tests.bench.bench_data import loader_row, views_row
from tests.bench.bench_model import against_clip, against_plain_form, has_bf16_instructions, short_texts
from tests.bench.bench_training import training_step
from tests.bench.chart import draw_chart, markdown_table
from tests.bench.paired import Comparison, compare, copy_gigabytes, matmul_gigaflops, peak_bytes


def image_rows(rounds: int, batch: int = 8) -> Iterator[dict]:
    """Picture embeddings, fp32, `batch` pictures a call."""
    for name in ("ViT-B-32", "ViT-B-16"):
        yield as_row(f"image embedding, {name}, against CLIPModel", against_clip(name, rounds, batch), batch, 1.5)
    for name, wanted in (("ViT-B-16", 2.2), ("RN50", 1.9)):
        measured = against_plain_form(name, rounds, batch)
        yield as_row(f"image embedding, {name}, against the plain form", measured, batch, wanted)


def bf16_rows(rounds: int, batch: int = 8) -> Iterator[dict]:
    """The same in bf16; no rows where the processor would emulate it."""
    if not has_bf16_instructions():
        print("bf16 rows: not measured, this processor has no bf16 instructions", flush=True)
        return
    for name, wanted in {"ViT-B-16": 6, "RN50": 4.5}.items():
        measured = against_plain_form(name, rounds, batch, torch.bfloat16)
        yield as_row(f"image embedding, {name}, bf16, against the plain form in fp32", measured, batch, wanted)


def text_row(rounds: int, batch: int = 32, tokens: int = 16) -> dict:
    """Text embeddings with pooling "eos" of `tokens` tokens against the same texts padded to 77."""
    measured = short_texts(rounds, batch, tokens)
    return as_row(f"text embedding, eos, {tokens} tokens, against the plain form of 77", measured, batch, at_least=4)


def load_row(rounds: int) -> dict:
    """`from_pretrained` of ViT-B-16 against building the module and `torch.load` of a file of the same weights."""
    config = PyramidCLIPConfig.from_architecture("ViT-B-16")
    with tempfile.TemporaryDirectory() as folder:
        model = PyramidCLIPModel(config)
        model.save_pretrained(folder)
        file = Path(folder, "original.pth.tar")
        torch.save({"epoch": 0, "state_dict": model.state_dict()}, file)

        def build_and_load():
            built = PyramidCLIPModel(config)
            built.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])

        measured = compare(lambda: PyramidCLIPModel.from_pretrained(folder), build_and_load, rounds)
    return as_row("from_pretrained, ViT-B-16, against building and torch.load", measured, 1, at_least=3)


def loss_row(samples: int = 16_384, width: int = 512) -> dict:
    """Peak memory of the six-term loss, forward and backward, above what the process held before: its own process."""
    code = f"from tests.bench.__main__ import peak_of_loss; print(peak_of_loss({samples}, {width}))"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    gigabytes = float(shown.stdout)
    return {"row": f"six-term loss, N = {samples}, D = {width}: peak GB", "value": round(gigabytes, 2), "at_most": 1.5}


def peak_of_loss(samples: int, width: int) -> float:
    """Gigabytes (10^9 bytes) by which the largest resident size grows; runs once, in a process of its own."""
    embeds = {level: torch.randn(samples, width, requires_grad=True) for level in LEVELS}
    before = peak_bytes()
    units = {level: torch.nn.functional.normalize(value, dim=-1) for level, value in embeds.items()}
    pyramid_loss(units, torch.tensor(14.3), DEFAULT_LOSS_WEIGHTS, 0.2).loss.backward()
    return (peak_bytes() - before) / 1e9


def training_rows(rounds: int) -> Iterator[dict]:
    """Both poolings; a step takes seconds, so at most three rounds."""
    for pooling, wanted in {"max": 1.4, "eos": 2}.items():
        yield as_row(*training_step(pooling, min(rounds, 3)), wanted)


def data_rows(rounds: int) -> Iterator[dict]:
    """The rows of `tests.bench.bench_data`, which are per core: one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield views_row(rounds)
        yield loader_row(rounds)
    finally:
        torch.set_num_threads(threads)


def as_row(name: str, measured: Comparison, items: int, at_least: float) -> dict:
    """One line of the table; `items` are done in each call."""
    return {
        "row": name,
        "ratio": round(measured.ratio, 2),
        "spread": [round(value, 2) for value in measured.spread],
        "at_least": at_least,
        "items_per_second": round(items / measured.ours, 2),
        "items_per_second_of_the_other": round(items / measured.theirs, 2),
    }


def ceilings() -> dict:
    """What this machine can do at all, with the threads that the rows use."""
    return {
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "matmul_fp32_gigaflops": round(matmul_gigaflops(2048, torch.float32), 1),
        # Small: a processor without bf16 instructions takes a quarter of a second for each.
        "matmul_bf16_gigaflops": round(matmul_gigaflops(512, torch.bfloat16), 1),
        "copy_gigabytes_per_second": round(copy_gigabytes(), 1),
    }


def show(row: dict) -> None:
    """One line on the terminal: what was measured, and what it should be."""
    if "ratio" in row:
        low, high = row["spread"]
        print(
            f"{row['row']:<66} {row['ratio']:6.2f} x ({low:.2f} to {high:.2f})  wanted {row['at_least']:g} x",
            flush=True,
        )
    else:
        print(f"{row['row']:<66} {row['value']:6.2f}                 wanted at most {row['at_most']:g}", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["image", "bf16", "text", "training", "loss", "load", "data"],
        choices=["image", "bf16", "text", "training", "loss", "load", "data"],
    )
    parser.add_argument("--rounds", type=int, default=7, help="timed calls of each way")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"))
    return parser.parse_args()


def main():
    args = parse_arguments()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    measure = {
        "image": lambda: image_rows(args.rounds),
        "bf16": lambda: bf16_rows(args.rounds),
        "text": lambda: [text_row(args.rounds)],
        "training": lambda: training_rows(args.rounds),
        "loss": lambda: [loss_row()],
        "load": lambda: [load_row(args.rounds)],
        "data": lambda: data_rows(args.rounds),
    }
    result = {"machine": ceilings(), "rows": []}
    print(json.dumps(result["machine"]), flush=True)
    for name in args.rows:
        for row in measure[name]():
            show(row)
            result["rows"].append(row)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
    args.output.with_suffix(".md").write_text(markdown_table(result), encoding="utf8")
    draw_chart(result, args.output.with_suffix(".png"))
    print(f"written to {args.output}, with its table (.md) and chart (.png)")


if __name__ == "__main__":
    main()
