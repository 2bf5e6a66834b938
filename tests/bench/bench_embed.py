"""Pictures a second of `pyramidclip embed` against a plain loop over the model: the same pictures, batches and weights.

    python -m tests.bench.bench_embed [--architecture ViT-B-32] [--pictures 128] [--side 512] [--rounds 5]
    python -m tests.bench.bench_embed --accelerator-ms 500

Both ways are whole jobs, from loading the model to a file of embeddings, in turn in one process; the loop opens,
prepares and encodes one batch after the other. That the two files agree is checked. Weights are random.

On a CPU, decoding and the model want the same processors. With `--accelerator-ms`, encoding a batch is a wait of so
long instead, which leaves the processors to the decoding, as an accelerator does.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pyramidclip_command
from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.embedding_files import read_embeddings
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from tests.bench.paired import compare
from tests.bench.prepare_throughput import pictures

BATCH_SIZE = 32


def plain_loop(model_dir: Path, folder: Path, output: Path) -> None:
    """What one writes without the command."""
    model = PyramidCLIPModel.from_pretrained(model_dir).eval()
    processor = PyramidCLIPProcessor.from_pretrained(model_dir)
    paths, parts = sorted(folder.iterdir()), []
    for start in range(0, len(paths), BATCH_SIZE):
        batch = [Image.open(path) for path in paths[start : start + BATCH_SIZE]]
        with torch.inference_mode():
            pixels = processor(images=batch, return_tensors="pt")["pixel_values"]
            parts.append(model.encode_image(pixels, normalize=True).numpy())
    np.savez(output, embedding=np.concatenate(parts))


def waited(rows: int, width: int, milliseconds: float) -> torch.Tensor:
    """In the place of embeddings: unit vectors after a wait."""
    time.sleep(milliseconds / 1000)
    return torch.nn.functional.normalize(torch.ones(rows, width), dim=-1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", default="ViT-B-32")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--side", type=int, default=512, help="of the JPEGs, in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accelerator-ms", type=float, help="a batch takes so long, and no processor time")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        config = PyramidCLIPConfig.from_architecture(args.architecture)
        if args.accelerator_ms is not None:
            # Its values do not matter, and loading it is not what is measured.
            config.vision_config.num_hidden_layers = 1
            config.vision_config.num_leff_layers = config.vision_config.num_picture_layers = 1
            config.text_config.num_hidden_layers = 1
        PyramidCLIPModel(config).save_pretrained(folder / "model")
        image_processor = PyramidCLIPImageProcessor(size=config.vision_config.image_size)
        PyramidCLIPProcessor(image_processor).save_pretrained(folder / "model")
        (folder / "pictures").mkdir()
        for number, data in enumerate(pictures(args.pictures, args.side)):
            (folder / "pictures" / f"{number:06d}.jpg").write_bytes(data)
        ours, theirs = folder / "ours.npz", folder / "theirs.npz"
        argv = ["embed", "--model", folder / "model", folder / "pictures", "--output", ours, "--batch-size", BATCH_SIZE]
        words = [str(word) for word in [*argv, "--device", "cpu", "--overwrite", "--quiet"]]

        def command():
            assert pyramidclip_command.main(words) == 0

        if args.accelerator_ms is not None:
            PyramidCLIPModel.encode_image = lambda self, pixels, normalize: waited(
                len(pixels), self.config.projection_dim, args.accelerator_ms
            )
        measured = compare(command, lambda: plain_loop(folder / "model", folder / "pictures", theirs), args.rounds)
        difference = np.abs(read_embeddings(ours).embeddings - np.load(theirs)["embedding"]).max()
    assert difference < 1e-4, difference
    low, high = measured.spread
    model = args.architecture if args.accelerator_ms is None else f"{args.accelerator_ms:g} ms a batch of {BATCH_SIZE}"
    print(
        f"pyramidclip embed, {model}, {args.pictures} JPEGs of {args.side} px, {torch.get_num_threads()} "
        f"threads: {args.pictures / measured.ours:.1f} pictures/s, the loop {args.pictures / measured.theirs:.1f}, "
        f"ratio {measured.ratio:.2f} ({low:.2f} to {high:.2f}), embeddings differ by {difference:.1e}"
    )


if __name__ == "__main__":
    main()
