"""Data made on the spot: JPEG pictures of 512 x 384 px that weigh what photographs weigh, and shards of them."""

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from tests.gpu.session import Session
from training.data.records import Region, Sample
from training.data.shards import ShardWriter

REGIONS, SHARD = 10, 1024


def jpeg(seed: int, width: int = 512, height: int = 384) -> bytes:
    """A picture of soft shapes and grain, about 70 kB at the default size."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    soft = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grainy = np.clip(soft + draw.normal(0, 6, soft.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grainy).save(file, "JPEG", quality=88)
    return file.getvalue()


def picture_folder(session: Session) -> Path:
    """A folder of JPEG files, made once."""
    folder = session.folder / "pictures"
    if not folder.is_dir():
        folder.mkdir()
        with ThreadPoolExecutor() as pool:
            files = list(pool.map(jpeg, range(session.size(128, 4))))
        for number, data in enumerate(files):
            (folder / f"{number:04d}.jpg").write_bytes(data)
    return folder


def shards(session: Session, name: str, samples: int) -> Path:
    """A shard folder of `samples` samples with all levels, made once for a name."""
    folder = session.folder / name
    if folder.is_dir():
        return folder
    files = [path.read_bytes() for path in sorted(picture_folder(session).iterdir())]
    draw = np.random.default_rng(1)
    for first in range(0, samples, SHARD):
        with ShardWriter(folder / f"{first // SHARD:05d}.tar") as writer:
            for number in range(first, min(samples, first + SHARD)):
                writer.write(sample(number, files[number % len(files)], draw))
    return folder


def sample(number: int, picture: bytes, draw: np.random.Generator) -> Sample:
    """A sample with all levels."""
    boxes = [(0.1, 0.1, 0.5 + 0.04 * place, 0.9) for place in range(REGIONS)]
    return Sample(
        key=f"{number:08d}",
        image=picture,
        image_suffix="jpg",
        caption=f"a photo number {number} of some thing that somebody saw on a walk",
        summary=f"thing {number}",
        tags=["red ball", f"dog {number % 7}"],
        regions=[Region(box, 0.9, "ball", ["red"]) for box in boxes],
        roi=draw.standard_normal((REGIONS, 2048)).astype(np.float16),
    )
