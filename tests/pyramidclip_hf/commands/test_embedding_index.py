"""Search in files that are not read whole: block by block, and through an index beside them."""

import json
import sys

import numpy as np
import pytest
import torch

from pyramidclip_hf import embedding_files, embedding_index, embedding_search
from pyramidclip_hf.embedding_files import EmbeddingJob, embedding_blocks, read_embeddings, rows_at
from tests.pyramidclip_hf.commands.plain import run


def written(path, rows=1000, width=32, seed=0, model_sha256="a" * 64):
    """A file of clustered unit vectors, as `embed` writes it."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, width))
    vectors = centres[rng.integers(0, 40, rows)] + 0.5 * rng.standard_normal((rows, width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    settings = {"kind": "path", "model_sha256": model_sha256}
    job = EmbeddingJob(path, "model", settings, [f"{i}.jpg" for i in range(rows)], part_size=300)
    for number in job.parts:
        names = job.items_of(number)
        first = number * 300
        job.save(number, names, vectors[first : first + len(names)], [])
    job.finish()
    return path, vectors


def queries_near(vectors, count=20):
    rng = np.random.default_rng(1)
    near = vectors[:count] + 0.1 * rng.standard_normal((count, vectors.shape[1]))
    return torch.from_numpy((near / np.linalg.norm(near, axis=1, keepdims=True)).astype(np.float32))


@pytest.fixture(params=[".npz", ".parquet"])
def stored(request, tmp_path, monkeypatch):
    if request.param == ".parquet":
        pytest.importorskip("pyarrow", reason='needs pyarrow: pip install "pyramidclip-hf[train]"')
    monkeypatch.setattr(embedding_files, "_ROW_GROUP", 128)
    monkeypatch.setattr(embedding_files, "_BLOCK", 200)
    monkeypatch.setattr(embedding_index, "_CODED_AT_ONCE", 400)
    return written(tmp_path / f"rows{request.param}")


def test_blocks_are_the_rows(stored):
    path, vectors = stored
    blocks = list(embedding_blocks(path))
    assert len(blocks) >= 4 and np.array_equal(np.concatenate(blocks), vectors)
    places = np.array([0, 5, 127, 128, 700, 999])
    assert np.array_equal(rows_at(path, places, "embedding"), vectors[places])
    assert rows_at(path, places, "path").tolist() == [f"{place}.jpg" for place in places]


def test_of_a_large_file_one_block_is_in_memory(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow", reason='needs pyarrow: pip install "pyramidclip-hf[train]"')
    monkeypatch.setattr(embedding_files, "_BLOCK", 2048)
    path, vectors = written(tmp_path / "rows.parquet", rows=40_000, width=128)
    pool, held = pyarrow.default_memory_pool(), []
    before = pool.bytes_allocated()
    for _ in embedding_blocks(path):
        held.append(pool.bytes_allocated() - before)
    assert max(held) < 6 * 128 * 4 * 2048 < vectors.nbytes / 3


def test_block_by_block_it_finds_what_all_at_once_does(stored):
    path, vectors = stored
    queries = queries_near(vectors)
    found = embedding_index.search_blocks(path, queries, 7)
    scores = queries.double().numpy() @ vectors.astype(np.float64).T
    best = np.argsort(-scores, axis=1)[:, :7]
    assert found.indices.tolist() == best.tolist()
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores, best, axis=1), atol=1e-6)
    assert embedding_index.search_blocks(path, queries, 5000).scores.shape == (20, 1000)


def test_an_index_finds_nearly_all_and_scores_exactly(stored):
    pytest.importorskip("faiss", reason='needs faiss-cpu: pip install "pyramidclip-hf[search]"')
    path, vectors = stored
    index, queries = path.with_name("rows.faiss"), queries_near(vectors)
    embedding_index.build_index(path, index)
    made = index.stat().st_mtime_ns
    embedding_index.build_index(path, index)
    assert index.stat().st_mtime_ns == made
    found, exact = (one(5) for one in (
        lambda k: embedding_index.search_index(path, index, queries, k),
        lambda k: embedding_index.search_blocks(path, queries, k),
    ))  # fmt: skip
    recall = np.mean([len({*one} & {*two}) / 5 for one, two in zip(found.indices.tolist(), exact.indices.tolist())])
    assert recall > 0.95
    wanted = (queries @ torch.from_numpy(vectors).T).gather(1, found.indices)
    torch.testing.assert_close(found.scores, wanted, atol=1e-6, rtol=0)


def test_an_index_of_something_else_is_refused(stored, tmp_path):
    pytest.importorskip("faiss", reason='needs faiss-cpu: pip install "pyramidclip-hf[search]"')
    path, vectors = stored
    index, queries = tmp_path / "rows.faiss", queries_near(vectors)
    embedding_index.build_index(path, index)
    (tmp_path / "other").mkdir()
    other, _ = written(tmp_path / "other" / path.name, seed=3)
    for call in (embedding_index.build_index, lambda *both: embedding_index.search_index(*both, queries, 5)):
        with pytest.raises(ValueError, match="was made of another file than .*Delete it"):
            call(other, index)
    moved = tmp_path / "other" / "moved.faiss"
    for ending in ("", ".lists", ".json"):
        (tmp_path / f"rows.faiss{ending}").rename(f"{moved}{ending}")
    assert embedding_index.search_index(path, moved, queries, 5).indices.shape == (20, 5)
    lists = moved.with_name("moved.faiss.lists")
    lists.write_bytes(lists.read_bytes()[:-1])
    with pytest.raises(ValueError, match="moved.faiss.lists beside it is missing or damaged. Delete the index"):
        embedding_index.search_index(path, moved, queries, 5)
    embedding_index.build_index(path, index)
    (tmp_path / "rows.faiss.json").unlink()
    with pytest.raises(ValueError, match="is no index that `pyramidclip search` made"):
        embedding_index.build_index(path, index)
    broken = tmp_path / "broken.faiss"
    embedding_index.build_index(path, broken)
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read .*Delete it"):
        embedding_index.search_index(path, broken, queries, 5)


def test_a_disk_without_room_is_said_and_nothing_is_left(stored, tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason='needs faiss-cpu: pip install "pyramidclip-hf[search]"')
    path, _ = stored
    (tmp_path / "full").mkdir()
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(embedding_index.shutil, "disk_usage", lambda folder: free)
    with pytest.raises(ValueError, match="needs 0.0 GB on that disk while it is made, and there are 0.0 GB free"):
        embedding_index.build_index(path, tmp_path / "full" / "rows.faiss")
    assert [one.name for one in (tmp_path / "full").iterdir()] == ["rows.faiss.lock"]


def test_one_row_of_a_parquet_file_costs_its_group(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason='needs pyarrow: pip install "pyramidclip-hf[train]"')
    path, vectors = written(tmp_path / "rows.parquet", rows=3000)
    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    assert max(group.num_rows for group in groups) <= 1024 and sum(group.num_rows for group in groups) == 3000
    assert np.array_equal(rows_at(path, np.array([1023, 1024, 2999]), "embedding"), vectors[[1023, 1024, 2999]])


def test_rows_that_are_no_unit_vectors_and_too_few_are_named(stored, tmp_path):
    path, _ = stored
    if path.suffix == ".parquet":
        return
    with np.load(path) as arrays:
        parts = dict(arrays)
    parts["embedding"][300] *= 2
    np.savez(tmp_path / "long.npz", **parts)
    with pytest.raises(ValueError, match="first is row 300 with length 2"):
        list(embedding_blocks(tmp_path / "long.npz"))
    parts["embedding"] = parts["embedding"][:200]
    np.savez(tmp_path / "short.npz", **parts)
    with pytest.raises(ValueError, match="expected 1000 rows, got 200"):
        list(embedding_blocks(tmp_path / "short.npz"))


def test_parquet_of_embeddings_that_stands_for_far_more_than_it_is_is_refused(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason='needs pyarrow: pip install "pyramidclip-hf[train]"')
    import pyarrow

    path, _ = written(tmp_path / "rows.parquet", rows=4)
    metadata = parquet.read_schema(path).metadata
    long = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256), pyarrow.array(["c" * (4 << 20)]))
    table = pyarrow.table({"path": long, "embedding": [[1.0, 0.0]] * 256}).replace_schema_metadata(metadata)
    parquet.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, write_statistics=False)
    assert path.stat().st_size < 20_000
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        for read in (read_embeddings, lambda path: rows_at(path, np.array([0]), "path")):
            with pytest.raises(ValueError, match=r"its rows may have 1\d{9} bytes|more than the file can hold"):
                read(path)
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 100 << 20


def test_npz_of_embeddings_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_files, "ALWAYS_BYTES", 1 << 20)
    path, _ = written(tmp_path / "rows.npz", rows=4)
    with np.load(path) as arrays:
        parts = {**arrays, "embedding": np.zeros((1000, 1000), np.float32)}
    np.savez_compressed(path, **parts)
    for read in (read_embeddings, lambda path: list(embedding_blocks(path))):
        with pytest.raises(ValueError, match=r"unpacks to 4\d{6} bytes"):
            read(path)


def test_the_command_gives_the_same_by_all_three_ways(embedded, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss", reason='needs faiss-cpu: pip install "pyramidclip-hf[search]"')
    argv = ["search", embedded, "--text", "a red bat", "fox", "--top-k", 3, "--json"]
    whole = run(capsys, *argv)
    monkeypatch.setattr(embedding_search, "read_embeddings", None)
    monkeypatch.setattr(embedding_search, "_LARGE_FILE", 1)
    for words in ([], ["--index", tmp_path / "new.faiss"], ["--index", tmp_path / "new.faiss"]):
        code, out, err = run(capsys, *argv, *words)
        assert code == 0
        for found, wanted in zip(out.splitlines(), whole[1].splitlines(), strict=True):
            found, wanted = json.loads(found), json.loads(wanted)
            assert found.pop("score") == pytest.approx(wanted.pop("score"), abs=1e-5) and found == wanted
    assert len(read_embeddings(embedded).names) == 7


def test_without_faiss_the_extra_is_named(embedded, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    code, out, err = run(capsys, "search", embedded, "--text", "fox", "--index", tmp_path / "new.faiss")
    assert (code, out) == (2, "") and 'pip install "pyramidclip-hf[search]"' in err
