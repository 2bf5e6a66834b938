"""Search in millions of vectors: seconds, memory and recall of `pyramidclip search`, each way in a process of its own

    python -m tests.bench.large_search [--rows 5000000] [--width 512] [--folder runs/large-search]

The file has unit vectors in clusters of different sizes, in no order: a centre and 0.7 times as much noise in 64
dimensions, turned into all, and a little noise in these. Queries are other draws from the clusters. A quarter of an
hour on two idle cores, and 5 bytes a number of disk; file and index stay in the folder and are not made again. Memory
is the most that a process had, with what it imports; "own" is without pages of files, which the system takes back where
it needs room. "CPU" are seconds of the processor, of all threads.
"""

import argparse
import json
import multiprocessing
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPImageProcessor, PyramidCLIPModel, PyramidCLIPProcessor
from tests.bench.paired import peak_bytes

_CLUSTERS = 20_000
_DIMENSIONS = 64
_NOISE = 0.7
_NOISE_EVERYWHERE = 0.01
_BLOCK = 8192
_QUERIES = 100
# Hits that count, as in recall@10.
_HITS = 10


def clustered(rows: int, width: int, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors (n, D) float32, block by block; the clusters are the same for all seeds."""
    centres = np.random.default_rng(0).standard_normal((_CLUSTERS, _DIMENSIONS), np.float32)
    share = np.random.default_rng(1).pareto(2, _CLUSTERS) + 0.1
    ends = np.cumsum(share / share.sum())
    turn = np.random.default_rng(2).standard_normal((_DIMENSIONS, width), np.float32) / np.sqrt(_DIMENSIONS)
    turn = turn.astype(np.float32)
    rng = np.random.default_rng(3 + seed)
    for start in range(0, rows, _BLOCK):
        count = min(_BLOCK, rows - start)
        of = np.minimum(np.searchsorted(ends, rng.random(count)), _CLUSTERS - 1)
        block = (centres[of] + _NOISE * rng.standard_normal((count, _DIMENSIONS), np.float32)) @ turn
        block += _NOISE_EVERYWHERE * rng.standard_normal(block.shape, np.float32)
        yield block / np.linalg.norm(block, axis=1, keepdims=True)


def make_model(folder: Path, width: int) -> Path:
    """A model of random weights in the size of the demo's, whose embeddings have that width."""
    if not (folder / "config.json").exists():
        tower = {"num_hidden_layers": 6, "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
        vision = {**tower, "image_size": 96, "patch_size": 16}
        config = PyramidCLIPConfig(projection_dim=width, vision_config=vision, text_config={**tower, "pooling": "eos"})
        PyramidCLIPModel(config).save_pretrained(folder)
        PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=96)).save_pretrained(folder)
    return folder


def make_file(path: Path, model: Path, rows: int, width: int) -> None:
    """The file of embeddings as `pyramidclip embed` writes it."""
    from pyramidclip_hf.embedding_files import _write_parquet
    from pyramidclip_hf.files import written_aside
    from pyramidclip_hf.loading import load_model

    sha = load_model(str(model)).sha256()
    names = [f"pictures/{row:08d}.jpg" for row in range(rows)]
    metadata = {"model": str(model), "model_sha256": sha, "kind": "path", "settings": {"kind": "path"}}
    with written_aside(path, sole_writer=True) as aside, open(aside, "wb") as file:
        _write_parquet(file, names, clustered(rows, width, seed=0), {**metadata, "rows": rows, "skipped": []})


def queries_of(width: int) -> Any:
    """(Q, D) unit vectors that are not in the file."""
    import torch

    return torch.from_numpy(next(clustered(_QUERIES, width, seed=1)))


def command(path: Path, *words: str) -> None:
    """`pyramidclip search`, its hits to nowhere."""
    import contextlib
    import io

    from pyramidclip_command import main

    with contextlib.redirect_stdout(io.StringIO()):
        code = main(["search", str(path), "--text", "a red bat", *words])
    if code:
        raise RuntimeError(f"pyramidclip search {path} {' '.join(words)}: exit code {code}")


def imports(path: Path, index: Path, width: int) -> None:
    """What a process has before it does anything."""
    import faiss  # noqa: F401
    import pyarrow.parquet  # noqa: F401

    from pyramidclip_hf import commands  # noqa: F401


def build(path: Path, index: Path, width: int) -> None:
    """The command, which makes the index."""
    command(path, "--index", str(index))


def one_query(path: Path, index: Path, width: int) -> None:
    """The command with the index that is there."""
    command(path, "--index", str(index))


def many_by_index(path: Path, index: Path, width: int) -> list[list[int]]:
    """Places of the hits of all queries."""
    from pyramidclip_hf.embedding_index import search_index

    return search_index(path, index, queries_of(width), _HITS).indices.tolist()


def many_exactly(path: Path, index: Path, width: int) -> list[list[int]]:
    """Places of the true hits, block by block."""
    from pyramidclip_hf.embedding_index import search_blocks

    return search_blocks(path, queries_of(width), _HITS).indices.tolist()


STAGES: dict[str, Callable[[Path, Path, int], Any]] = {
    "imports": imports,
    "command, index is made": build,
    "command, index is there": one_query,
    "100 queries by index": many_by_index,
    "100 queries, exact, block by block": many_exactly,
}


def _own_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))[1]) * 1024


def _measured(name: str, path: Path, index: Path, width: int, results: Any) -> None:
    """In a process of its own: puts what a stage gave, and what it took."""
    own, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            own[0] = max(own[0], _own_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        found = STAGES[name](path, index, width)
    finally:
        over.set()
        watcher.join()
    row = {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_mb": peak_bytes() // 10**6,
        "own_mb": own[0] // 10**6,
    }
    results.put((row, found))


def main() -> None:
    """Makes what is missing, measures, shows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--folder", type=Path, default=Path("runs/large-search"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    path = args.folder / f"{args.rows}x{args.width}.parquet"
    index = path.with_suffix(".faiss")
    model = make_model(args.folder / f"model-{args.width}", args.width)
    if not path.exists():
        make_file(path, model, args.rows, args.width)
    context, found, rows = multiprocessing.get_context("spawn"), {}, {}
    for name in STAGES:
        if name == "command, index is made" and index.exists():
            continue
        results = context.Queue()
        process = context.Process(target=_measured, args=(name, path, index, args.width, results))
        process.start()
        while True:
            try:
                rows[name], found[name] = results.get(timeout=5)
                break
            except Exception as error:
                if not process.is_alive():
                    raise RuntimeError(f"{name} died with {process.exitcode}") from error
        process.join()
        print(name, json.dumps(rows[name]), flush=True)
    pairs = zip(found["100 queries by index"], found["100 queries, exact, block by block"], strict=True)
    recall = float(np.mean([len({*one} & {*two}) / _HITS for one, two in pairs]))
    files = {one.name: one.stat().st_size for one in (path, index, index.with_name(f"{index.name}.lists"))}
    result = {"rows": args.rows, "width": args.width, "recall_at_10": recall, "load": os.getloadavg()[0], **rows}
    print(json.dumps({**result, "bytes": files}, indent=1))


if __name__ == "__main__":
    main()
