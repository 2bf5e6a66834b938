"""Damaged bytes for each reader of files from strangers: what comes out is a value or the documented error."""

import io
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conversion.checkpoint_file import read_checkpoint
from pyramidclip_hf.embedding_files import read_embeddings
from training.data.records import BadSample, sample_from_members
from training.data.shard_index import ShardIndex, build_index, index_path
from training.data.shards import ShardReader, ShardWriter
from training.prepare.steps.pictures import picture_suffix

Read = Callable[[bytes, Path], object]
RECORD = b'{"tags": ["a"], "summary": "s", "regions": [{"box": [0, 0, 0.5, 1], "score": 0.5, "label": "dog"}]}'


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def a_shard(folder: Path) -> Path:
    with ShardWriter(folder / "a.tar") as writer:
        for i in range(3):
            writer.write_members(f"{i}", {"jpg": b"x" * 700, "txt": b"words", "json": RECORD})
    return folder / "a.tar"


def read_shard(data: bytes, folder: Path) -> None:
    path = folder / "a.tar"
    path.write_bytes(data)
    index_path(path).unlink(missing_ok=True)
    index = build_index(path)
    index_path(path).write_bytes(index.dumps().encode("utf-8", "surrogateescape"))
    with ShardReader(path) as reader:
        for i in range(len(reader)):
            sample_from_members(reader.read(i), reader.key(i), "a.tar")


def read_file(name: str, read: Callable[[Path], object]) -> Read:
    def written(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return written


def picture(kind: str) -> bytes:
    return saved(lambda file: Image.effect_noise((24, 16), 60).convert("RGB").save(file, kind))


def embeddings() -> bytes:
    rows = np.eye(3, 4, dtype=np.float32)
    metadata = '{"model": "m", "model_sha256": "0", "kind": "path", "settings": {}, "rows": 3, "skipped": []}'
    return saved(
        lambda file: np.savez_compressed(file, path=np.array(["a", "b", "c"]), embedding=rows, metadata=metadata)
    )


def checkpoint(archive: bool) -> bytes:
    content = {"state_dict": {"a": torch.ones(3)}, "best": np.float64(0.5)}
    return saved(lambda file: torch.save(content, file, _use_new_zipfile_serialization=archive))


# name: (whole bytes of a folder to work in, how they are read, the documented errors)
READERS: dict[str, tuple[Callable[[Path], bytes], Read, tuple[type[Exception], ...]]] = {
    "shard": (lambda folder: a_shard(folder).read_bytes(), read_shard, (ValueError, BadSample)),
    "index": (lambda folder: index_path(a_shard(folder)).read_bytes(),
              lambda data, _: ShardIndex.loads(data.decode("utf-8", "surrogateescape")), (ValueError,)),
    "record": (lambda _: RECORD,
               lambda data, _: sample_from_members({"jpg": b"x", "txt": b"t", "json": data}, "k", "w"),
               (BadSample,)),
    "jpeg": (lambda _: picture("JPEG"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "png": (lambda _: picture("PNG"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "webp": (lambda _: picture("WEBP"), lambda data, _: picture_suffix(data, 10**6), (BadSample,)),
    "checkpoint": (lambda _: checkpoint(True), read_file("x.pt", read_checkpoint), (ValueError,)),
    "old checkpoint": (lambda _: checkpoint(False), read_file("x.pt", read_checkpoint), (ValueError,)),
    "embeddings": (lambda _: embeddings(), read_file("x.npz", read_embeddings), (ValueError,)),
}  # fmt: skip


def damaged(whole: bytes, chance: random.Random) -> bytes:
    """Bits flipped, pieces cut out, doubled or replaced, numbers made absurd; one to four of these."""
    data = bytearray(whole)
    for _ in range(chance.randint(1, 4)):
        at, length = chance.randrange(len(data) + 1), chance.choice((1, 1, 4, 64))
        new = chance.choice((b"", chance.randbytes(length), b"\xff" * length, b"9" * 400, b"[" * 2000, b"-1", b"null"))
        if chance.random() < 0.5 and at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        elif chance.random() < 0.1:
            del data[at:]
        else:
            data[at : at + length] = new
    return bytes(data)


def fuzz(name: str, seconds: float, folder: Path) -> int:
    make, read, documented = READERS[name]
    whole, end, number = make(folder), time.monotonic() + seconds, 0
    read(whole, folder)
    while time.monotonic() < end:
        data = damaged(whole, random.Random(zlib.crc32(name.encode()) + number))
        try:
            read(data, folder)
        except documented:
            pass
        except Exception as error:
            pytest.fail(f"{name}: input {number} raises {error!r}")
        number += 1
    return number


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 1, tmp_path) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 7, tmp_path) > 100
