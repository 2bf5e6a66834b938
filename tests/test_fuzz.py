"""Damaged bytes for each reader of files from strangers: what comes out is a value or the documented error."""

import base64
import contextlib
import io
import json
import random
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from conversion.checkpoint_file import read_checkpoint
from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPImageProcessor,
    PyramidCLIPModel,
    PyramidCLIPProcessor,
    PyramidCLIPTokenizer,
)
from pyramidclip_hf.embedding_files import read_embeddings
from pyramidclip_hf.files import cache_folder
from pyramidclip_hf.loading import load_dual_encoder, load_processor
from training.data.records import BadSample, sample_from_members
from training.data.shard_index import ShardIndex, build_index, index_path
from training.data.shards import ShardReader, ShardWriter
from training.data.sources import open_data_set
from training.prepare.formats import BadRow, FormatOptions, open_format
from training.prepare.formats.lxmert import LxmertOptions
from training.prepare.sources import open_source
from training.prepare.steps.flags import SourceArguments
from training.prepare.steps.pictures import picture_suffix
from training.prepare.steps.regions import best_regions
from training.prepare.steps.work import Tally
from training.settings.reading import read_chain

# Seconds that one small input may take on a machine that does other things beside it.
LONGEST = 20
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


def read_table(name: str) -> Read:
    def read(path: Path) -> None:
        source = open_source(SourceArguments(input=[str(path)]))
        for part in source.parts():
            for _ in source.read(part):
                pass

    return read_file(name, read)


def read_rows(data: bytes, folder: Path) -> None:
    """Of a table of region features, opened anew: its index is kept by size and time, which here may be equal."""
    shutil.rmtree(cache_folder() / "tsv", ignore_errors=True)
    (folder / "rows.tsv").write_bytes(data)
    (folder / "names.txt").write_text("dog\ncat\n")
    names = str(folder / "names.txt")
    rows = open_format(folder / "rows.tsv", options=FormatOptions(LxmertOptions(names, names)))
    for row in range(len(rows)):
        with contextlib.suppress(BadRow):
            rows.key(row)
            best_regions(rows.read(row, rows.size(row) or (640, 480)), 10, Tally(), "rows.tsv", "k")


def read_manifest(data: bytes, folder: Path) -> None:
    (folder / "m.jsonl").write_bytes(data)
    found = open_data_set(folder / "m.jsonl")
    for unit in found.units:
        reader = found.open(unit)
        for i in range(len(reader)):
            with contextlib.suppress(BadSample):
                sample_from_members(reader.read(i), reader.key(i), reader.name)
        reader.close()


def numbers(values: list[float], kind: str) -> str:
    return base64.b64encode(np.array(values, kind).tobytes()).decode()


FEATURE = numbers([0.5] * 8, "<f4")
SCENE = {"objects": [{"rect": [1, 2, 30, 40], "conf": 0.9, "class": "dog", "feature": FEATURE}]}
LXMERT = "\t".join([
    "k", "480", "640", numbers([0], "<i8"), numbers([0.9], "<f4"), numbers([1], "<i8"), numbers([0.9], "<f4"), "1",
    numbers([1, 2, 30, 40], "<f4"), FEATURE,
])  # fmt: skip


def parquet() -> bytes:
    table = pyarrow.table({"image": ["a.jpg"] * 40, "caption": [f"words {i % 3}" for i in range(40)]})
    return saved(lambda file: pyarrow.parquet.write_table(table, file))


def a_model(name: str) -> Callable[[Path], bytes]:
    """A file of a tiny saved model, whose other files stay in the folder."""

    def make(folder: Path) -> bytes:
        tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        vision = {**tower, "image_size": 16, "patch_size": 8, "num_leff_layers": 0, "roi_feature_size": 4}
        text = {**tower, "vocab_size": 300}
        config = PyramidCLIPConfig(text_config=text, vision_config=vision, projection_dim=4)
        PyramidCLIPModel(config).save_pretrained(folder)
        letters = {chr(code): code - 32 for code in range(33, 127)} | {"<|startoftext|>": 298, "<|endoftext|>": 299}
        tokenizer = PyramidCLIPTokenizer(vocab=letters, merges=[])
        PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=16), tokenizer).save_pretrained(folder)
        return (folder / name).read_bytes()

    return make


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
    "CSV": (lambda _: b'image,caption,n\na.jpg,"some, words",1\nb.jpg,more,2\n' * 3, read_table("t.csv"),
            (ValueError,)),
    "JSONL": (lambda _: b'{"image": "a.jpg", "caption": ["words"], "score": 0.5}\n' * 4, read_table("t.jsonl"),
              (ValueError,)),
    "Parquet": (lambda _: parquet(), read_table("t.parquet"), (ValueError,)),
    "manifest": (lambda _: b'{"image": "a.jpg", "caption": "c", "roi": "a.npy", "tags": ["x"]}\n' * 4, read_manifest,
                 (ValueError,)),
    "scene graph": (lambda _: b"k\t" + json.dumps(SCENE).encode() + b"\n", read_rows, (ValueError,)),
    "LXMERT": (lambda _: LXMERT.encode() + b"\n", read_rows, (ValueError,)),
    "YAML": (lambda _: b"a: &a {x: [1, 2.5], y: true}\nb: {<<: *a, z: 'text'}\nseed: 3\n",
             read_file("s.yaml", lambda path: read_chain(str(path))), (ValueError,)),
    "config.json": (a_model("config.json"), read_file("config.json", lambda path: load_dual_encoder(str(path.parent))),
                    (ValueError,)),
    "tokenizer.json": (a_model("tokenizer.json"),
                       read_file("tokenizer.json", lambda path: load_processor(path.parent, "it")), (ValueError,)),
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
        began = time.monotonic()
        try:
            read(data, folder)
        except documented:
            pass
        except Exception as error:
            pytest.fail(f"{name}: input {number} raises {error!r}")
        longest = time.monotonic() - began
        assert longest < LONGEST, f"{name}: input {number} takes {longest:.1f} s"
        number += 1
    return number


@pytest.mark.parametrize("name", READERS)
def test_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 10 / len(READERS), tmp_path) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_bytes_give_the_documented_error(name: str, tmp_path: Path) -> None:
    assert fuzz(name, 60 / len(READERS), tmp_path) > 10
