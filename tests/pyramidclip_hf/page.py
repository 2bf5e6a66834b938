"""A page of `pyramidclip app` that runs, in a process of its own, for the tests of it."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
from PIL import Image

import pyramidclip_command
from tests.pyramidclip_hf.commands.plain import save_tiny_model

CHECKOUT = Path(__file__).resolve().parent.parent.parent
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def make_folder(folder):
    """Two tiny models, six pictures, one of them with regions, and the pictures' embeddings by either model."""
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, colour in enumerate(COLOURS):
        Image.new("RGB", (160 + 20 * number, 160), colour).save(pictures / f"{colour}.png")
    regions = [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    listed = ", ".join(f'{{"box": {box}, "label": "part{n}"}}' for n, box in enumerate(regions))
    (pictures / "red.json").write_text(f'{{"regions": [{listed}]}}')
    np.save(pictures / "red.roi.npy", np.random.default_rng(0).standard_normal((2, 2048)).astype(np.float16))
    for seed, name in enumerate(("one", "two")):
        save_tiny_model(folder / name, seed)
        words = ["--model", str(folder / name), "--output", str(folder / f"{name}.npz"), "--quiet"]
        assert pyramidclip_command.main(["embed", str(pictures), *words]) == 0
    (folder / "labels.txt").write_text("a cat\na dog\na red bat\n")
    return folder


@contextlib.contextmanager
def running_page(folder, *words, home):
    """The process, its address, and the lines of its stderr as they come; stopped at the end."""
    command = [sys.executable, "-m", "pyramidclip_command", "app", "--model", str(folder / "one"), *map(str, words)]
    environment = os.environ | {
        "PYTHONPATH": str(CHECKOUT),
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "HF_HUB_OFFLINE": "1",
    }
    (home / "tmp").mkdir(parents=True, exist_ok=True)
    (home / "here").mkdir(exist_ok=True)
    process = subprocess.Popen(
        command, cwd=home / "here", env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    errors = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    reader.start()
    try:
        address = process.stdout.readline().strip()
        assert address.startswith("http"), "".join(errors)
        yield process, address.rstrip("/"), errors
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        reader.join(10)


def files_below(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
