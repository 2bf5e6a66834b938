# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Search in a file of embeddings that is larger than memory: block by block and exact, or by an index beside it.

The index (FAISS, extra `search`) keeps a vector in D / 8 bytes and is read where a query needs it. What it finds is
scored again with the file's own vectors, so that scores are exact and only what it overlooks is lost. It is three
files: INDEX has the cells, INDEX.lists what lies in them, and INDEX.json says of which file of embeddings it is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .embedding_files import embedding_blocks, read_metadata, rows_at
from .files import json_text, locked, write_atomically, written_aside
from .zero_shot import Matches, retrieve

# Vectors a cell of the index, and each of the 256 codes of a part of a vector, is trained with; FAISS wants 39.
_TRAINED_A_CELL = 40
_TRAINED_A_CODE = 64
_CELLS_A_QUERY = 64
# Vectors whose codes are in memory while the index is made; they wait on disk for the others.
_CODED_AT_ONCE = 1 << 19
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
        ValueError: it is of another file, or the disk has too little room.
        ImportError: FAISS is not installed; names the extra.
    """
    faiss, ondisk = _faiss()
    with locked(index_path.with_name(f"{index_path.name}.lock")):
        if index_path.exists():
            check_index(path, index_path)
            return
        scratch = index_path.with_name(f"{index_path.name}.parts")
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        scratch.mkdir()
        try:
            index = _trained(faiss, path)
            _check_space(index, read_metadata(path)["rows"], index_path)
            shards = list(_shards(faiss, index, path, scratch))
            with written_aside(_lists(index_path), sole_writer=True) as aside:
                ondisk.merge_ondisk(index, shards, str(aside))
            faiss.downcast_InvertedLists(index.invlists).filename = str(_lists(index_path))
            # The index comes last: without it what is there counts as nothing.
            write_atomically(_record(index_path), json_text(_identity(path, index_path)).encode())
            with written_aside(index_path) as aside:
                faiss.write_index(index, str(aside))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _check_space(index: Any, rows: int, index_path: Path) -> None:
    """ValueError where the disk cannot hold the lists and, meanwhile, their parts: FAISS would die of it."""
    needed = 2 * rows * (index.code_size + 8)
    free = shutil.disk_usage(index_path.parent).free
    if free < needed:
        raise ValueError(
            f"--index {index_path}: needs {needed / 1e9:.1f} GB on that disk while it is made, and there are "
            f"{free / 1e9:.1f} GB free."
        )


def _trained(faiss: Any, path: Path) -> Any:
    """An empty index that fits the file's vectors."""
    rows = read_metadata(path)["rows"]
    # About as many cells as a cell has vectors.
    cells = 1 << max(0, round(np.log2(max(1, rows)) / 2))
    sample = _sample(path, rows, max(_TRAINED_A_CELL * cells, 256 * _TRAINED_A_CODE))
    width = sample.shape[1]
    bits = 8 if len(sample) >= 256 else int(np.log2(len(sample)))
    parts = next(parts for parts in range(max(1, width // 8), 0, -1) if width % parts == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(width), width, cells, parts, bits, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.max_points_per_centroid = _TRAINED_A_CODE
    index.train(sample)
    return index


def _shards(faiss: Any, index: Any, path: Path, folder: Path) -> Iterator[str]:
    """Files with all rows' codes, some rows each; `index` is empty again."""
    start = 0
    for block in embedding_blocks(path):
        index.add_with_ids(block, np.arange(start, start + len(block)))
        start += len(block)
        if index.ntotal >= _CODED_AT_ONCE:
            yield _shard(faiss, index, folder / f"{start}.faiss")
    if index.ntotal:
        yield _shard(faiss, index, folder / f"{start}.faiss")


def _shard(faiss: Any, index: Any, path: Path) -> str:
    faiss.write_index(index, str(path))
    index.reset()
    return str(path)


def check_index(path: Path, index_path: Path) -> None:
    """Whether an index is that of a file.

    Raises:
        ValueError: it is of another file, or none that was made here.
    """
    try:
        record = dict(json.loads(_record(index_path).read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"--index {index_path}: is no index that `pyramidclip search` made ({error}). Name a file that is not "
            "there, and it is made."
        ) from error
    identity = _identity(path, index_path)
    if record.get("lists_bytes") != identity["lists_bytes"]:
        raise ValueError(
            f"--index {index_path}: {_lists(index_path).name} beside it is missing or damaged. Delete the index, and "
            "the same command makes it again."
        )
    if record != identity:
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
    faiss, _ = _faiss()
    check_index(path, index_path)
    try:
        index = faiss.read_index(str(index_path), faiss.IO_FLAG_SKIP_IVF_DATA)
        # By the name that it has now: the index itself knows the one that it was made under.
        lists = faiss.downcast_InvertedLists(index.invlists)
        lists.filename, lists.read_only = str(_lists(index_path)), True
        lists.do_mmap()
        index.nprobe = min(_CELLS_A_QUERY, index.nlist)
        count = min(index.ntotal, max(_LEAST_CANDIDATES, _CANDIDATES_A_HIT * k))
        _, places = index.search(queries.numpy(), count)
    except (RuntimeError, AttributeError) as error:
        raise ValueError(f"--index {index_path}: cannot be read ({str(error).splitlines()[0]}). Delete it.") from error
    rows = np.unique(places[places >= 0])
    if not len(rows) or rows[-1] >= read_metadata(path)["rows"]:
        raise ValueError(f"--index {index_path}: is damaged: it names rows that {path} does not have. Delete it.")
    vectors = torch.from_numpy(rows_at(path, rows, "embedding"))
    scores = queries @ vectors.T
    # A query keeps what was found for it: what was found for others only may be further than what it overlooked.
    own = torch.from_numpy(np.stack([np.isin(rows, one) for one in places]))
    best = scores.masked_fill(~own, -torch.inf).topk(min(k, len(rows)), dim=1)
    return Matches(best.values, torch.from_numpy(rows)[best.indices])


def _sample(path: Path, rows: int, count: int) -> np.ndarray:
    """`count` rows from all over the file, (n, D), or all that there are."""
    places = np.sort(np.random.default_rng(0).permutation(rows)[:count])
    sample, start, done = np.empty((0, 0), np.float32), 0, 0
    for block in embedding_blocks(path):
        if not len(sample):
            sample = np.empty((len(places), block.shape[1]), np.float32)
        until = int(np.searchsorted(places, start + len(block)))
        sample[done:until] = block[places[done:until] - start]
        start, done = start + len(block), until
    return sample


def _identity(path: Path, index_path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        tail = hashlib.sha256(file.read()).hexdigest()
    lists = _lists(index_path)
    return {
        "bytes": size,
        "tail_sha256": tail,
        "model_sha256": read_metadata(path)["model_sha256"],
        "lists_bytes": lists.stat().st_size if lists.is_file() else None,
    }


def _lists(index_path: Path) -> Path:
    return index_path.with_name(f"{index_path.name}.lists")


def _record(index_path: Path) -> Path:
    return index_path.with_name(f"{index_path.name}.json")


def _faiss() -> tuple[Any, Any]:
    try:
        import faiss
        from faiss.contrib import ondisk
    except ImportError as error:
        raise ImportError('--index needs FAISS: pip install "pyramidclip-hf[search]"') from error
    return faiss, ondisk
