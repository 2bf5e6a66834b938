# Copyright 2026 The PyramidCLIP for Transformers authors. Licensed under the Apache License, Version 2.0.
"""Search in a file of embeddings by the model that made it: whether it is that one, and what is found by name."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .backends import MAX_DISAGREEMENT, ExportedModel
from .embedding_files import read_embeddings, rows_at
from .embedding_index import build_index, search_blocks, search_index
from .loading import Loaded
from .picture_files import Hit
from .zero_shot import Matches, retrieve

# Bytes from which on a file of embeddings is read block by block.
_LARGE_FILE = 1 << 30


def check_made_by(metadata: dict[str, Any], loaded: Loaded[Any], path: str) -> None:
    """Whether queries of a model can be compared with a file of embeddings.

    Args:
        metadata: what `read_metadata` read of the file.
        loaded: the model that embeds the queries.
        path: the file's, for the messages.

    Raises:
        ValueError: another model made the file, or the same one on an engine that is too far away.
    """
    if loaded.sha256() != metadata["model_sha256"]:
        raise ValueError(
            f"{path} was made by another model: {metadata['model']} (weights "
            f"{metadata['model_sha256'][:12]}), but {loaded.name} has the weights {loaded.sha256()[:12]}. "
            "Embeddings of two models cannot be compared: take that --model, or embed again."
        )
    _check_engines(metadata, loaded, path)


def _check_engines(metadata: dict[str, Any], loaded: Loaded[Any], path: str) -> None:
    """ValueError where embeddings of one model come from engines that are further apart than a search can bear."""
    there = metadata["settings"].get("engine")
    here = loaded.model.engine._asdict() if isinstance(loaded.model, ExportedModel) else None
    if there and not (isinstance(there, dict) and {"backend", "dtype"} <= there.keys() and _is_share(there)):
        raise ValueError(f"{path}: what its settings say of the engine cannot be read. Make the file again.")
    apart = sum(one["disagreement"] for one in (there, here) if one)
    same = {name: (there or {}).get(name) == (here or {}).get(name) for name in ("backend", "dtype")}
    if apart > MAX_DISAGREEMENT and not all(same.values()):
        names = [f"{one['backend']} in {one['dtype']}" if one else "torch" for one in (there, here)]
        raise ValueError(
            f"{path} was made with {names[0]}, the query is embedded with {names[1]}: their unit embeddings are up to "
            f"{apart:.1e} apart, more than the {MAX_DISAGREEMENT:.0e} that a search can bear. Take the same --backend "
            "and --dtype."
        )


def _is_share(engine: dict[str, Any]) -> bool:
    return isinstance(engine.get("disagreement"), float) and engine["disagreement"] >= 0


def best_hits(path: str, kind: str, queries: torch.Tensor, top_k: int, index: str | None = None) -> list[list[Hit]]:
    """The hits of each query (Q, D) in a file of embeddings, best first.

    Args:
        path: the file.
        kind: of its names, "path" or "text", see `read_metadata`.
        queries: unit vectors, float32.
        top_k: hits a query.
        index: file of the index to search through, made where it is not there; None: the whole file is searched.
    """
    matches = _matches(Path(path), queries, top_k, index)
    rows = np.unique(matches.indices)
    names = dict(zip(rows.tolist(), rows_at(path, rows, kind).tolist(), strict=True))
    return [
        [Hit(rank, score, names[place]) for rank, (score, place) in enumerate(zip(scores, places), start=1)]
        for scores, places in zip(matches.scores.tolist(), matches.indices.tolist())
    ]


def _matches(path: Path, queries: torch.Tensor, top_k: int, index: str | None) -> Matches:
    """Through the index that was named, else exactly: in memory, or block by block where the file is large."""
    if index:
        build_index(path, Path(index))
        return search_index(path, Path(index), queries, top_k)
    if path.stat().st_size >= _LARGE_FILE:
        return search_blocks(path, queries, top_k)
    return retrieve(queries, torch.from_numpy(read_embeddings(path).embeddings), top_k)
