"""Pictures that are alike by a model: embeddings whose cosine is at least so much, compared each with each, exactly.

Embeddings are kept as whole numbers of 1/2048. A product of two has 22 bits and so have sums of them, which float32
holds without rounding: the comparison comes out the same on every processor, in every order and in every company.
Blocks of rows are compared with one another by FAISS, two of them in memory at a time.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from training.data.records import BadSample
from training.prepare.selecting.candidates import Candidate
from training.prepare.selecting.encoders import Encoder
from training.prepare.selecting.facts import Column, Facts

_SCALE = 1 << 11
# Rounding moves a cosine by 0.0003 (one in 20 pairs, of 512 numbers), so what is the same is above this.
MOST_COSINE = 0.998
# Of a block of rows as float32.
BLOCK_BYTES = 1 << 28
# Rows of a block that are compared with each other at a time.
_STEP = 1 << 10


def embedding_column(encoder: Encoder) -> Column:
    """The embedding of a picture, (D,) int16 in 1/2048. Raises `ValueError` where there is no model."""

    def measure(candidates: Sequence[Candidate]) -> list[np.ndarray | BadSample]:
        vectors = encoder.pictures(candidates)
        for candidate, vector in zip(candidates, vectors):
            if isinstance(vector, np.ndarray) and not np.isfinite(vector).all():
                raise ValueError(
                    f"{encoder.called} gives numbers that are not finite for the picture of key {candidate.key!r} of "
                    f"{candidate.where}: its weights are damaged, or too large for float16"
                )
        return [v if isinstance(v, BadSample) else np.rint(v * _SCALE).astype(np.int16) for v in vectors]

    identity = ("picture_embedding", encoder.content, encoder.dtype, _SCALE)
    return Column(identity, "i2", measure, (encoder.config.projection_dim,), encoder.content)


def import_faiss() -> Any:
    """FAISS; raises ImportError, naming the extra, where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise ImportError('near duplicates by a model need FAISS: pip install -e ".[search]"') from error
    return faiss


def alike_an_earlier(
    facts: Facts, others: Facts | None, column: Column, cosine: float, block_bytes: int = BLOCK_BYTES
) -> Iterator[np.ndarray]:
    """Rows whose picture is alike one of `others`, or alike an earlier one that stays; a block of rows at a time.

    Args:
        facts: of the data; whoever takes the rows marks them as rejected before asking for the next.
        others: of other data sets.
        column: of the embeddings.
        cosine: from which on pictures are alike.
        block_bytes: of a block of rows as float32.
    """
    rows = max(block_bytes // (4 * column.shape[0]), _STEP)
    # In the unit of the products; a float of Python holds it exactly enough, as they are whole numbers.
    limit = cosine * _SCALE**2

    def blocks(of: Facts, end: int) -> Iterator[np.ndarray]:
        for begin in range(0, end, rows):
            yield _block(of, column, begin, min(begin + rows, end))[1]

    for begin in range(0, len(facts), rows):
        numbers, vectors = _block(facts, column, begin, begin + rows)
        alike = np.zeros(len(numbers), bool)
        foreign = blocks(others, len(others)) if others is not None else ()
        for block in itertools.chain(foreign, blocks(facts, begin)):
            left = np.flatnonzero(~alike)
            alike[left] = _near(_index(block), vectors[left], limit)
        left = np.flatnonzero(~alike)
        alike[left] = _near_earlier_ones(vectors[left], limit)
        yield numbers[alike]


def _block(facts: Facts, column: Column, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """What is left of some rows: their numbers (n,) and vectors (n, D) float32."""
    alive = list(facts.alive(column.name, begin=begin, end=end))
    numbers = np.concatenate([np.zeros(0, np.int64), *(one.rows for one in alive)])
    vectors = np.concatenate([np.zeros((0, *column.shape), np.float32), *(one.values[0] for one in alive)])
    return numbers, np.ascontiguousarray(vectors, np.float32)


# Any: FAISS has no types.
def _index(vectors: np.ndarray) -> Any:
    index = import_faiss().IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return index


def _near(index: Any, vectors: np.ndarray, limit: float) -> np.ndarray:
    """Whether each of some vectors (n, D) has a product of at least `limit` with one of an index: (n,) bool."""
    if not index.ntotal or not len(vectors):
        return np.zeros(len(vectors), bool)
    return index.search(vectors, 1)[0][:, 0] >= limit


def _near_earlier_ones(vectors: np.ndarray, limit: float) -> np.ndarray:
    """Whether each vector (n, D) is near an earlier one that is not itself near an earlier one: (n,) bool."""
    near = np.zeros(len(vectors), bool)
    staying = _index(vectors[:0])
    for start in range(0, len(vectors), _STEP):
        own = vectors[start : start + _STEP]
        here = _near(staying, own, limit)
        close = own @ own.T >= limit
        for number in range(len(own)):
            if not here[number]:
                here[number + 1 :] |= close[number, number + 1 :]
        near[start : start + _STEP] = here
        staying.add(own[~here])
    return near
