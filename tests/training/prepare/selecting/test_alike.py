"""Near duplicates by embeddings against comparing each with each in NumPy."""

import numpy as np
import pytest

from training.prepare.selecting.alike import _SCALE, alike_an_earlier
from training.prepare.selecting.facts import FAULTY, Column, Facts

pytest.importorskip("faiss", reason='needs FAISS: pip install -e ".[search]"')

COLUMN = Column(("x",), "i2", lambda candidates: [], (12,))


def some_vectors(count, seed):
    """Unit vectors (n, 12) of which many are near each other, in 1/2048."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 12))
    vectors = centres[rng.integers(0, 40, count)] + rng.normal(size=(count, 12)) * rng.choice([0.05, 0.3], (count, 1))
    return np.rint(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * _SCALE).astype(np.int16)


def facts_of(folder, vectors, ends, faulty=()):
    """Facts of parts that end before the rows `ends`."""
    folder.mkdir()
    files = {}
    for number, (start, end) in enumerate(zip([0, *ends], [*ends, len(vectors)])):
        flags = np.isin(np.arange(start, end), faulty).astype(np.uint8)
        files[str(number)] = [folder / f"{number}.npz"]
        np.savez(files[str(number)][0], **{COLUMN.name: vectors[start:end], FAULTY: flags})
    return Facts(files)


def plain(vectors, others, cosine, faulty):
    """The rows that go, one after the other, each compared with all that stayed before."""
    staying, gone = [other.astype(float) / _SCALE for other in others], []
    for row, vector in enumerate(vectors.astype(float) / _SCALE):
        if row in faulty:
            continue
        if any(float(np.dot(vector, other)) >= cosine for other in staying):
            gone.append(row)
        else:
            staying.append(vector)
    return gone


@pytest.mark.parametrize("cosine", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("against", [False, True])
def test_what_goes_is_what_a_loop_takes(cosine, against, tmp_path, monkeypatch):
    monkeypatch.setattr("training.prepare.selecting.alike._STEP", 64)
    vectors, faulty = some_vectors(900, 1), (5, 6, 400)
    others = some_vectors(150, 2) if against else np.zeros((0, 12), np.int16)
    facts = facts_of(tmp_path / "own", vectors, (1, 300, 301, 850), faulty)
    foreign = facts_of(tmp_path / "others", others, (70,)) if against else None
    gone = []
    # Blocks of 100 rows, which end in the middle of parts.
    for rows in alike_an_earlier(facts, foreign, COLUMN, cosine, block_bytes=100 * 12 * 4):
        facts.reject(rows, 0)
        gone += rows.tolist()
    expected = plain(vectors, others, cosine, faulty)
    assert gone == expected and 100 < len(expected) < 890


def test_blocks_are_all_that_is_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("training.prepare.selecting.alike._STEP", 16)
    facts, most = facts_of(tmp_path / "own", some_vectors(600, 3), (200,)), []
    real = Facts.alive

    def alive(self, *columns, **window):
        found = list(real(self, *columns, **window))
        most.append(sum(len(one.rows) for one in found))
        return iter(found)

    monkeypatch.setattr(Facts, "alive", alive)
    for rows in alike_an_earlier(facts, None, COLUMN, 0.95, block_bytes=50 * 12 * 4):
        facts.reject(rows, 0)
    # Of 12 blocks each is compared with those before it, of which only what stays is read.
    assert max(most) == 50 and len(most) == 12 + 11 * 12 // 2
    assert sum(most[-11:]) < facts.left <= sum(most[-11:]) + 50
