"""Picture embeddings on every engine that people run, in turn in one process

    python -m tests.bench.engines [--architectures ViT-B-32 RN50 ViT-B-16] [--rounds 21] [--output runs/engines.json]
    python -m tests.bench.engines --threads 1     # seconds of the processor, for a machine that does other work too
    python -m tests.bench.engines --write     # and into results/engines.json and the table of docs/engines.md

About 20 minutes on two idle cores. On one thread seconds are those of the processor, into which other work on the
machine does not count. Of each architecture all engines in all types are called once a round, so that what
else the machine does hits all. Ratios are those of a round against transformers' CLIPModel in fp32, of a ResNet against
its plain form. What an engine computes is compared with the plain form before anything is timed.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPImageProcessor, PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.backends import Backend, load_exported
from pyramidclip_hf.export import export_model
from pyramidclip_hf.loading import load_model
from tests.bench.bench_model import clip_model, has_bf16_instructions
from tests.plain_forms import lively

PAGE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
RESULT = Path(__file__).resolve().parent / "results" / "engines.json"
# Fewer pictures of what takes longest.
PICTURES = {"ViT-B-32": 8, "RN50": 8, "ViT-B-16": 4}
DTYPES = ("float32", "bfloat16", "int8")
TORCH = ("plain", "fused", "compiled", "fused, compiled")
OTHERS = ("ONNX Runtime", "OpenVINO")
ENGINES = ("CLIPModel", *TORCH, *OTHERS)
# Least cosine with the plain form in fp32: what is further off computes something else.
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "int8": 0.9}

Call = Callable[[], torch.Tensor]


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call: on one thread those of the processor, of all threads of this process."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    call()
    return clock() - start


def torch_calls(model: PyramidCLIPModel, pixels: torch.Tensor, dtype: torch.dtype, compiled: bool) -> dict[str, Call]:
    """The ways of torch in one type."""
    plain, pixels = copy.deepcopy(model).to(dtype), pixels.to(dtype)
    fused = copy.deepcopy(plain).fuse()
    calls: dict[str, Call] = {"plain": lambda: plain.encode_image(pixels), "fused": lambda: fused.encode_image(pixels)}
    if compiled:
        for name, form in (("compiled", plain), ("fused, compiled", fused)):
            # A form of its own, so that freezing finds nothing that another call uses.
            encode = torch.compile(copy.deepcopy(form).encode_image)
            with torch._inductor.config.patch(freezing=True):
                encode(pixels)
            calls[name] = lambda encode=encode: encode(pixels)
    return calls


def openvino_in_bf16(path: Path, pixels: torch.Tensor) -> Call:
    """OpenVINO's own choice on a processor with bf16, which `load_exported` switches off."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    return lambda: torch.from_numpy(compiled([pixels.numpy()])[0].copy())


def engine_calls(model: PyramidCLIPModel, pixels: torch.Tensor, folder: Path) -> Iterator[tuple[str, str, Call]]:
    """(type, engine, call) of all that is exported: `pyramidclip export`'s files, called as the commands call them."""
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=size)).save_pretrained(folder)
    noise = torch.randint(0, 256, (16, size, size, 3), dtype=torch.uint8).numpy()
    seen = [Image.fromarray(picture) for picture in noise]
    backends: dict[Backend, str] = {"onnx": "ONNX Runtime", "openvino": "OpenVINO"}
    for backend, name in backends.items():
        export_model(
            load_model(str(folder)), folder, backend=backend, dtypes=("float32", "int8"), calibration=seen, say=show
        )
        for dtype in ("float32", "int8"):
            engine = load_exported(str(folder), backend=backend, dtype=dtype).model
            yield dtype, name, lambda engine=engine: engine.encode_image(pixels)
    if has_bf16_instructions():
        yield "bfloat16", "OpenVINO", openvino_in_bf16(folder / "openvino" / "vision_model.xml", pixels)


def measure(
    name: str, config: PyramidCLIPConfig, rounds: int, batch: int, compiled: bool = True
) -> list[dict[str, Any]]:
    """Rows of one architecture: one a type, with each engine's pictures a second and ratios.

    Args:
        name: of the architecture.
        config: its sizes.
        rounds: timed calls of each way.
        batch: pictures a call.
        compiled: also through `torch.compile` with freezing.
    """
    torch.manual_seed(0)
    model = lively(PyramidCLIPModel(config)).eval()
    size = config.vision_config.image_size
    pixels = torch.randn(batch, 3, size, size)
    calls: dict[tuple[str, str], Call] = {}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        if config.vision_config.tower == "vit":
            for dtype in dtypes()[:2]:
                clip, narrow = clip_model(config).to(getattr(torch, dtype)), pixels.to(getattr(torch, dtype))
                calls[dtype, "CLIPModel"] = lambda clip=clip, narrow=narrow: clip.get_image_features(narrow)
        for dtype in (one for one in dtypes() if one != "int8"):
            for engine, call in torch_calls(model, pixels, getattr(torch, dtype), compiled).items():
                show(f"{name}: {dtype}, {engine}")
                calls[dtype, engine] = call
        for dtype, engine, call in engine_calls(model, pixels, Path(folder)):
            calls[dtype, engine] = call
        cosines = check(calls)
        seconds: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
        for _ in range(rounds):
            for key, call in calls.items():
                seconds[key].append(seconds_of(call))
    return [row_of(name, dtype, batch, seconds, cosines) for dtype in dtypes()]


def dtypes() -> list[str]:
    """The types that this processor multiplies itself."""
    return [dtype for dtype in DTYPES if dtype != "bfloat16" or has_bf16_instructions()]


def check(calls: dict[tuple[str, str], Call]) -> dict[tuple[str, str], float]:
    """Least cosine of each way with the plain form in fp32, which also warms them up; CLIPModel is another model.

    Raises:
        RuntimeError: one computes something else.
    """
    wanted = calls["float32", "plain"]().float()
    cosines = {}
    for (dtype, engine), call in calls.items():
        found = call()
        if engine != "CLIPModel":
            cosines[dtype, engine] = F.cosine_similarity(found.float(), wanted).min().item()
            if not cosines[dtype, engine] >= LEAST_COSINE[dtype]:
                raise RuntimeError(f"{engine} in {dtype}: cosine {cosines[dtype, engine]:.4f} with the plain form")
    return cosines


def row_of(
    name: str,
    dtype: str,
    batch: int,
    seconds: dict[tuple[str, str], list[float]],
    cosines: dict[tuple[str, str], float],
) -> dict[str, Any]:
    """One line of the table."""
    base = seconds.get(("float32", "CLIPModel"), seconds["float32", "plain"])
    cells = {}
    for engine in ENGINES:
        if (dtype, engine) in seconds:
            own = seconds[dtype, engine]
            cells[engine] = {
                "per_second": round(batch / statistics.median(own), 2),
                **ratio_of(base, own),
                "least_cosine": round(cosines.get((dtype, engine), 1.0), 5),
            }
    row = {"row": f"{name}, {dtype}", "pictures": batch, "rounds": len(base), "engines": cells}
    ours = [engine for engine in TORCH if engine in cells]
    theirs = [engine for engine in ("CLIPModel", *OTHERS) if engine in cells]
    if ours and theirs:
        best, other = (max(group, key=lambda engine: cells[engine]["ratio"]) for group in (ours, theirs))
        row["best_of_torch"] = {"ours": best, "other": other, **ratio_of(seconds[dtype, other], seconds[dtype, best])}
    return row


def ratio_of(base: list[float], own: list[float]) -> dict[str, Any]:
    """How many times faster `own` is, round by round: the median, the smallest and the largest."""
    ratios = [first / second for first, second in zip(base, own, strict=True)]
    spread = [round(min(ratios), 2), round(max(ratios), 2)]
    return {"ratio": round(statistics.median(ratios), 2), "spread": spread}


def product_gigaflops(dtype: str, size: int = 2048) -> float:
    """What a square matrix product reaches here, int8 with sums in int32: the best of five."""
    ones = torch.ones(size, size, dtype=getattr(torch, dtype))
    product = torch._int_mm if dtype == "int8" else torch.matmul
    return 2 * size**3 / min(seconds_of(lambda: product(ones, ones)) for _ in range(5)) / 1e9


def ceilings() -> dict[str, Any]:
    """The processor, and what one large product reaches there in each type."""
    model = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf8"))
    packages = ("torch", "transformers", "onnxruntime", "openvino")
    return {
        "processor": model[1] if model else platform.machine(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 1),
        "seconds": "processor" if torch.get_num_threads() == 1 else "wall clock",
        "product_gigaflops": {dtype: round(product_gigaflops(dtype), 1) for dtype in dtypes()},
        **{package: importlib.metadata.version(package) for package in packages},
    }


def engines_table(result: dict[str, Any]) -> str:
    """The rows as docs/engines.md shows them: pictures a second, the ratio to the first column, and its spread."""
    head = [*ENGINES, "best torch / best other", "one product"]
    lines = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for row in result["rows"]:
        cells = [_cell(row["engines"].get(engine)) for engine in ENGINES]
        best = row.get("best_of_torch")
        cells.append(f"{best['ours']} / {best['other']}: {_ratio(best)}" if best else "")
        dtype = row["row"].split(", ")[1]
        machine = row.get("machine", result["machine"])  # of a row that was measured apart
        cells.append(f"{machine['product_gigaflops'][dtype]:g} GF/s")
        lines.append("| " + " | ".join([row["row"], *cells]).replace("|  |", "| |").replace("|  |", "| |") + " |")
    return "\n".join(lines) + "\n"


def _cell(cell: dict[str, Any] | None) -> str:
    return "" if cell is None else f"{cell['per_second']:.3g}: {_ratio(cell)}"


def _ratio(cell: dict[str, Any]) -> str:
    low, high = cell["spread"]
    return f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})"


def show(text: str) -> None:
    """A line on the terminal, at once."""
    print(text, flush=True)


def parse_arguments() -> argparse.Namespace:
    """The words of the command."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.engines", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--architectures", nargs="+", default=list(PICTURES), choices=list(PICTURES))
    parser.add_argument("--rounds", type=int, default=21, help="timed calls of each way")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="1: by seconds of the processor")
    parser.add_argument("--output", type=Path, default=Path("runs/engines.json"))
    parser.add_argument("--write", action="store_true", help="into the checkout's result file and docs/engines.md too")
    return parser.parse_args()


def main() -> None:
    """Measures, shows and writes."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"machine": ceilings(), "rows": []}
    show(json.dumps(result["machine"]))
    for name in args.architectures:
        config = PyramidCLIPConfig.from_architecture(name, text_config={"num_hidden_layers": 1, "pooling": "eos"})
        result["rows"] += measure(name, config, args.rounds, PICTURES[name])
        show(engines_table(result))
        # After each architecture: what was measured stays when the rest is stopped.
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
        if args.write:
            RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf8")
            page = PAGE.read_text(encoding="utf8")
            PAGE.write_text(re.sub(r"(^\|.*\n)+", lambda _: engines_table(result), page, count=1, flags=re.M), "utf8")


if __name__ == "__main__":
    main()
