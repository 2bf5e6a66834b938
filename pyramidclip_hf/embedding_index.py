# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Search in a file of embeddings that is larger than memory: block by block and exact, or by an index beside it.

The index (FAISS, extra `search`) keeps a vector in D / 8 bytes and is read where a query needs it. What it finds is
scored again with the file's own vectors, so that scores are exact and only what it overlooks is lost. It belongs to one
file: a JSON file beside it says to which.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embedding_files import embedding_blocks, read_metadata, rows_at
from .files import json_text, locked, write_atomically, written_aside
from .zero_shot import Matches, retrieve

# Vectors a cell of the index is trained with, and cells that a query looks into.
_TRAINED_A_CELL = 64
_CELLS_A_QUERY = 32
# Candidates that are scored again, for each hit that is asked for.
_CANDIDATES_A_HIT = 10
_LEAST_CANDIDATES = 100
# Bytes at the end of a file that identify it: there Parquet and zip keep where everything is, and its checksums.
_TAIL = 1 << 20


def search_blocks(path: Path, queries: torch.Tensor, k: int) -> Matches:
    """The `k` rows of highest dot product for each query (Q, D), exactly, with one block of the file in memory."""
    best: Matches | None = None
    start = 0
    for block in embedding_blocks(path):
        found = retrieve(queries, torch.from_numpy(block), k)
        found = Matches(found.scores, found.indices + start)
        start += len(block)
        if best is not None:
            scores = torch.cat([best.scores, found.scores], dim=1)
            order = scores.topk(min(k, scores.shape[1]), dim=1)
            found = Matches(order.values, torch.cat([best.indices, found.indices], dim=1).gather(1, order.indices))
        best = found
    if best is None:
        raise ValueError(f"{path}: holds no embeddings.")
    return best


def build_index(path: Path, index_path: Path) -> None:
    """Makes the index of a file of embeddings, unless it is there.

    Raises:
        ValueError: it is of another file.
        ImportError: FAISS is not installed; names the extra.
    """
    faiss = _faiss()
    with locked(index_path.with_name(f"{index_path.name}.lock")):
        if index_path.exists():
            check_index(path, index_path)
            return
        rows = read_metadata(path)["rows"]
        # About as many cells as a cell has vectors.
        cells = 1 << max(0, round(np.log2(max(1, rows)) / 2))
        sample = _sample(path, rows, max(_TRAINED_A_CELL * cells, 256 * 64))
        width = sample.shape[1]
        bits = 8 if len(sample) >= 256 else int(np.log2(len(sample)))
        parts = next(parts for parts in range(max(1, width // 8), 0, -1) if width % parts == 0)
        cells_of = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFPQ(cells_of, width, cells, parts, bits, faiss.METRIC_INNER_PRODUCT)
        index.train(sample)
        del sample
        for block in embedding_blocks(path):
            index.add(block)
        with written_aside(index_path) as aside:
            faiss.write_index(index, str(aside))
        write_atomically(_record(index_path), json_text(_identity(path)).encode())


def check_index(path: Path, index_path: Path) -> None:
    """Whether an index is that of a file.

    Raises:
        ValueError: it is of another file, or none that was made here.
    """
    try:
        record = json.loads(_record(index_path).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--index {index_path}: is no index that `pyramidclip search` made ({error}). Name a file that is not "
            "there, and it is made."
        ) from error
    if record != _identity(path):
        raise ValueError(
            f"--index {index_path}: was made of another file than {path}, or {path.name} has changed since. Delete it, "
            "and the same command makes it again."
        )


def search_index(path: Path, index_path: Path, queries: torch.Tensor, k: int) -> Matches:
    """As `search_blocks`, but only among what the index finds.

    Raises:
        ValueError: the index is of another file, or damaged.
        ImportError: FAISS is not installed; names the extra.
    """
    faiss = _faiss()
    check_index(path, index_path)
    try:
        index = faiss.read_index(str(index_path), faiss.IO_FLAG_MMAP)
        index.nprobe = min(_CELLS_A_QUERY, index.nlist)
        count = min(index.ntotal, max(_LEAST_CANDIDATES, _CANDIDATES_A_HIT * k))
        _, places = index.search(queries.numpy(), count)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"--index {index_path}: cannot be read ({str(error).splitlines()[0]}). Delete it.") from error
    rows = np.unique(places[places >= 0])
    vectors = torch.from_numpy(rows_at(path, rows, "embedding"))
    scores = queries @ vectors.T
    # A query keeps what was found for it: what was found for others only may be further than what it overlooked.
    own = torch.from_numpy(np.stack([np.isin(rows, one) for one in places]))
    best = scores.masked_fill(~own, -torch.inf).topk(min(k, len(rows)), dim=1)
    return Matches(best.values, torch.from_numpy(rows)[best.indices])


def _sample(path: Path, rows: int, count: int) -> np.ndarray:
    """About `count` rows from all over the file, (n, D)."""
    share, generator = min(1.0, count / max(1, rows)), np.random.default_rng(0)
    parts = [block[generator.random(len(block)) < share] for block in embedding_blocks(path)]
    return np.concatenate(parts)


def _identity(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = hashlib.sha256(file.read()).hexdigest()
    return {"bytes": size, "tail_sha256": tail, "model_sha256": read_metadata(path)["model_sha256"]}


def _record(index_path: Path) -> Path:
    return index_path.with_name(f"{index_path.name}.json")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError('--index needs FAISS: pip install "pyramidclip-hf[search]"') from error
    return faiss
