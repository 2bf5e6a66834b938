"""Writes a page that classifies pictures inside the browser: a folder to open from disk or to put on any file server.

    pyramidclip export --model runs/mine/final --output runs/mine-onnx
    npm install --prefix runs/npm onnxruntime-web@1.30.0 @huggingface/tokenizers@0.2.0
    python -m training.static_page --model runs/mine-onnx --packages runs/npm/node_modules --output-dir runs/page

The picture never leaves the machine: ONNX Runtime computes in WebAssembly, the tokenizer is the model's own
`tokenizer.json`, and pictures are resized as Pillow does it. In labels, entities, curly quotes and ligatures are read
as the model's tokenizer reads them; texts in a wrong encoding, which ftfy repairs there, are not. All is read before
the first answer: export with --dtype int8 where it is good enough.
"""

import argparse
import base64
import sys
from collections.abc import Sequence
from pathlib import Path

from pyramidclip_command import CommandParser, answer_words, check_there, run_command

_ENDINGS = {"float32": "", "float16": "_fp16", "int8": "_quantized"}


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The words of a command line as arguments. Raises `ValueError`, `FileNotFoundError`."""
    parser = CommandParser(description=__doc__)
    parser.add_argument("--model", required=True, help="folder that `pyramidclip export` wrote, with onnx/")
    parser.add_argument("--packages", required=True, type=Path, help="node_modules with the two packages above")
    parser.add_argument("--output-dir", required=True, type=Path, help="folder of the page, which is written anew")
    parser.add_argument(
        "--dtype", default="float32", choices=tuple(_ENDINGS), help="of the files (default: %(default)s)"
    )
    parser.add_argument("--labels-file", help="labels to begin with, one a line")
    args = parser.parse_args(words)
    check_there("--model", args.model, "a folder that `pyramidclip export` wrote", "id")
    check_there("--packages", args.packages, "the folder node_modules in which npm installed both packages")
    check_there("--labels-file", args.labels_file, "a file, one label a line")
    return args


if __name__ == "__main__":
    answer_words(parse)

from pyramidclip_hf.backends import load_exported
from pyramidclip_hf.files import folder_written_aside, json_text, read_utf8
from pyramidclip_hf.pages import render
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES

_TEMPLATE = Path(__file__).with_name("static_page_template.html")


_SCRIPT = Path(__file__).with_name("static_page.js")


# What the page needs of the two packages.
_PACKAGE_FILES = {
    "runtime": "onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
    "wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.wasm",
    "tokenizers": "@huggingface/tokenizers/dist/tokenizers.min.mjs",
}


def run(args: argparse.Namespace) -> None:
    """Writes the page.

    Raises:
        ValueError: no exported model, or a package's file is missing.
    """
    loaded = load_exported(args.model, backend="onnx", dtype=args.dtype)
    folder, processor = loaded.folder, loaded.processor.image_processor
    files = {name: args.packages / file for name, file in _PACKAGE_FILES.items()}
    missing = [str(path) for path in files.values() if not path.is_file()]
    if missing:
        raise ValueError(f"--packages {args.packages}: there is no {missing[0]}; install both packages with npm first")
    for tower in ("vision", "text"):
        files[tower] = folder / "onnx" / f"{tower}_model{_ENDINGS[args.dtype]}.onnx"
    files["tokenizer"] = folder / "tokenizer.json"
    if args.output_dir.exists() and not (args.output_dir / "static_page.js").is_file():
        raise ValueError(f"--output-dir {args.output_dir} is there and was not written by this command: move it away")
    settings = {
        "scale": float(loaded.model.logit_scale.exp()),
        "size": processor.size["shortest_edge"],
        "crop": [processor.crop_size["height"], processor.crop_size["width"]],
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "context": loaded.processor.tokenizer.model_max_length,
        "end": loaded.processor.tokenizer.eos_token_id,
        "templates": list(IMAGENET_TEMPLATES),
    }
    labels = read_utf8(args.labels_file).strip() if args.labels_file else "a cat\na dog\na red bat"
    with folder_written_aside(args.output_dir) as aside:
        for name, path in files.items():
            # Scripts are what a page from disk may read; plain files are not.
            text = base64.b64encode(path.read_bytes()).decode()
            (aside / f"{name}.js").write_text(f'(window.held ??= {{}})["{name}"] = "{text}";\n', encoding="ascii")
        script = f"const settings = {json_text(settings)};\n{_SCRIPT.read_text(encoding='utf8')}"
        (aside / "static_page.js").write_text(script, encoding="utf8")
        page = render(_TEMPLATE, {"name": Path(loaded.name).name, "held": list(files), "labels": labels})
        (aside / "index.html").write_text(page, encoding="utf8")
    size = sum(path.stat().st_size for path in args.output_dir.iterdir())
    print(f"{args.output_dir / 'index.html'}: {size / 1e6:.0f} MB with what it reads")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    return run_command(parse, run, argv)


if __name__ == "__main__":
    sys.exit(main())
