"""`sources/tables.py`: how a table is cut into parts, and what a part lists."""

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.training.prepare.small_data import (
    read_tars,
    run_step,
    write_jsonl,
    write_pictures,
)
from training.data.shards import read_dataset_json
from training.prepare import pack, sources


def run(output, *flags):
    return run_step(pack, ["--output_dir", str(output), "--device", "cpu", *map(str, flags)])


CAPTIONS = ["None", "null", "NA", "NaN", "", "a, b", 'say "hi"', "two\nlines", " blanks ", "ünïcödé 猫", "plain"]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl", "t.parquet"])
def test_how_a_table_is_cut_does_not_matter(tmp_path, name):
    rng = np.random.default_rng(0)
    words = ["x", "line\nbreak", 'quote "q"', "tab\tand, comma", "\r\n", "é" * 50, "\n\n"]
    rows = [{"image": f"{i}.jpg", "caption": "c" + "".join(rng.choice(words, 3)), "id": f"k{i}"} for i in range(41)]
    write_pictures(tmp_path / "in", 41, (8, 8))
    path = tmp_path / "in" / name
    if name.endswith("parquet"):
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif name.endswith("jsonl"):
        path.write_text("\n".join(json.dumps(row) + ("\n" if i % 5 == 0 else "") for i, row in enumerate(rows)))
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    for step in (1, 5, 7, 40, 1000):
        out = tmp_path / f"out{step}"
        run(out, "--input", path, "--samples_per_shard", step, "--key_column", "id")
        samples = read_tars(out)
        assert list(samples) == [row["id"] for row in rows]
        assert [members["txt"].decode() for members in samples.values()] == [row["caption"] for row in rows]
        sizes = [shard["samples"] for shard in read_dataset_json(out)["shards"].values()]
        assert sizes == [min(step, 41 - start) for start in range(0, 41, step)]


def test_key_column_of_a_part_is_listed_as_it_is_read(tmp_path):
    table = write_jsonl(tmp_path / "t.jsonl", [{"image": "a", "caption": "c", "id": i} for i in (5, None, "", "x")])
    source = sources.open_source(sources.SourceArguments(input=[str(table)], key_column="id", samples_per_shard=3))
    assert [source.keys(part) for part in source.parts()] == [["5", None, None], ["x"]]


def test_equal_rows_of_parquet_are_not_all_unpacked_at_once(tmp_path):
    """A file of kilobytes, in which one value of 4 MB stands in 256 rows."""
    captions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256), pyarrow.array(["c" * (4 << 20)]))
    table = pyarrow.table({"image": ["x.jpg"] * 256, "caption": captions})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False
    )
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    source = sources.open_source(sources.SourceArguments(input=[str(tmp_path / "a.parquet")]))
    before, pool = pyarrow.default_memory_pool(), pyarrow.system_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        next(source.read(source.parts()[0]))
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 600 << 20
