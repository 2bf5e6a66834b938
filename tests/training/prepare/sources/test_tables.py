"""`sources/tables.py`: how a table is cut into parts, and what a part lists."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from pyramidclip_hf import parquet_pages
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


def write_equal_rows(path, caption=4 << 20):
    """A file of kilobytes, in which one long value stands in 256 rows."""
    captions = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256), pyarrow.array(["c" * caption]))
    table = pyarrow.table({"image": ["x.jpg"] * 256, "caption": captions})
    pyarrow.parquet.write_table(
        table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False, write_statistics=False
    )
    assert path.stat().st_size < 100_000
    return pyarrow.parquet.read_metadata(path).row_group(0).column(1)


def varint(value, length=None):
    """As Thrift's compact protocol writes a number; to a length of bytes where one is asked for."""
    value = value << 1
    digits = []
    while value or len(digits) < (length or 1):
        digits.append(value & 127)
        value >>= 7
    return bytes(digit | 128 for digit in digits[:-1]) + bytes(digits[-1:])


def lie(path, value, said):
    """Puts `said` wherever a file says `value`."""
    data, true = path.read_bytes(), varint(value)
    assert true in data
    path.write_bytes(data.replace(true, varint(said, len(true))))


def first_row(path):
    source = sources.open_source(sources.SourceArguments(input=[str(path)]))
    return next(source.read(source.parts()[0]))


@pytest.mark.parametrize("lies", [False, True])
def test_equal_rows_of_parquet_are_not_all_unpacked_at_once(tmp_path, lies):
    column = write_equal_rows(tmp_path / "a.parquet")
    if lies:
        lie(tmp_path / "a.parquet", column.total_uncompressed_size, 1)
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        first_row(tmp_path / "a.parquet")
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 600 << 20


def test_a_page_that_unpacks_to_far_more_than_it_is_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "ALWAYS_BYTES", 1 << 20)
    write_equal_rows(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet.*column caption, row group 0: \d+ bytes unpack to more than"):
        first_row(tmp_path / "a.parquet")


def test_a_list_of_more_values_than_its_bytes_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_pages, "ALWAYS_BYTES", 1 << 20)
    kind = pyarrow.list_(pyarrow.int8())
    table = pyarrow.table({"image": ["x"], "caption": ["c"], "more": pyarrow.array([[None] * 2_000_000], kind)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"column more\.list\.element"):
        first_row(tmp_path / "a.parquet")


def test_columns_outside_of_the_file_are_refused(tmp_path):
    column = write_equal_rows(tmp_path / "a.parquet")
    lie(tmp_path / "a.parquet", column.total_compressed_size, (1 << 13) - 1)
    with pytest.raises(ValueError, match="column caption, row group 0: it says to lie at .* to 8|goes beyond|no end"):
        first_row(tmp_path / "a.parquet")


def test_more_rows_than_a_file_can_tell_apart_are_refused(tmp_path):
    """Each of them would be a part of a job, and a fault in its list."""
    equal = pyarrow.DictionaryArray.from_arrays(np.zeros(10_000_000, np.int8), pyarrow.array(["x"]))
    pyarrow.parquet.write_table(pyarrow.table({"image": equal, "caption": equal}), tmp_path / "a.parquet")
    source = sources.open_source(sources.SourceArguments(input=[str(tmp_path / "a.parquet")]))
    with pytest.raises(ValueError, match="10000000 rows in"):
        source.parts()


def test_no_byte_of_a_footer_ends_the_process(tmp_path):
    """pyarrow dies of being asked for a codec or a column of some of these, so another process reads them."""
    table = pyarrow.table({"image": ["a.jpg"] * 9, "caption": ["words"] * 9, "more": [["x", "y"]] * 9})
    pyarrow.parquet.write_table(table, tmp_path / "whole", store_schema=False)
    code = f"""
import contextlib, importlib.util, pathlib, pyarrow.parquet
found = importlib.util.spec_from_file_location("parquet_pages", {parquet_pages.__file__!r})  # alone: it is soon there
pages = importlib.util.module_from_spec(found)
found.loader.exec_module(pages)
whole = pathlib.Path({str(tmp_path / "whole")!r}).read_bytes()
footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
for at in range(footer, len(whole) - 8):
    path = pathlib.Path({str(tmp_path / "damaged")!r})
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 32]) + whole[at + 1 :])
    with contextlib.suppress(Exception), open(path, "rb") as file:
        table = pyarrow.parquet.ParquetFile(path)
        pages.row_bytes(file, table, 0)
        pages.check_whole(file, table)
        list(table.iter_batches())
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert ended.stdout == "done\n", ended.stderr[-500:]


def write_lists(path, lengths, text, **options):
    """Rows with lists of one text, which stands once in the file."""
    texts = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * sum(lengths), pyarrow.int32()), pyarrow.array([text])
    )
    ends = pyarrow.array(np.cumsum([0, *lengths]), pyarrow.int32())
    table = pyarrow.table(
        {
            "image": ["x.jpg"] * len(lengths),
            "caption": ["c"] * len(lengths),
            "more": pyarrow.ListArray.from_arrays(ends, texts),
        }
    )
    pyarrow.parquet.write_table(
        table, path, dictionary_pagesize_limit=1 << 30, store_schema=False, write_statistics=False, **options
    )


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_row_whose_list_repeats_a_long_text_is_refused_before_it_is_unpacked(tmp_path, version):
    """Few bytes that stand for a gigabyte in one row."""
    write_lists(tmp_path / "a.parquet", [1, 0, 1000], "c" * (1 << 20), compression="zstd", data_page_version=version)
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        with pytest.raises(
            ValueError, match=r"more\.list\.element.*the 1000 values of a row may have 1048576000 bytes"
        ):
            first_row(tmp_path / "a.parquet")
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 100 << 20


def test_as_many_long_texts_in_short_lists_are_read_some_rows_at_a_time(tmp_path):
    write_lists(tmp_path / "a.parquet", [10] * 60, "c" * (1 << 20), compression="zstd")
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        source = sources.open_source(sources.SourceArguments(input=[str(tmp_path / "a.parquet")]))
        assert sum(1 for part in source.parts() for _ in source.read(part)) == 60
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 500 << 20


def test_a_list_of_texts_that_go_on_from_the_one_before_is_refused(tmp_path, monkeypatch):
    """DELTA_BYTE_ARRAY repeats a text without a dictionary."""
    monkeypatch.setattr(parquet_pages, "ALWAYS_BYTES", 1 << 20)
    table = pyarrow.table({"image": ["x"], "caption": ["c"], "more": [["c" * 10_000] * 1000]})
    pyarrow.parquet.write_table(
        table, tmp_path / "a.parquet", use_dictionary=False, column_encoding={"more.list.element": "DELTA_BYTE_ARRAY"}
    )
    with pytest.raises(ValueError, match="the 1000 values of a row may have"):
        first_row(tmp_path / "a.parquet")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "brotli", "lz4", "zstd"])
@pytest.mark.parametrize("deep", [False, True])
def test_the_longest_row_is_counted_by_its_levels(tmp_path, version, compression, deep):
    rng = np.random.default_rng(0)
    rows = [["w" * int(rng.integers(1, 50))] * int(rng.integers(0, 40)) if i % 7 else None for i in range(1000)]
    lists = [row and [row[:3], row[3:]] for row in rows] if deep else rows
    longest = max(sum(max(1, len(inner)) for inner in row) if deep and row else max(1, len(row or ())) for row in lists)
    pyarrow.parquet.write_table(
        pyarrow.table({"more": lists}), tmp_path / "a.parquet", compression=compression, data_page_version=version,
        data_page_size=3000,
    )  # fmt: skip
    table = pyarrow.parquet.ParquetFile(tmp_path / "a.parquet")
    with open(tmp_path / "a.parquet", "rb") as file:
        (column,) = parquet_pages._columns(file, table, 0)
        assert len(column.pages) > 3 and parquet_pages._longest_row(file, column) == longest


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_unpacked_bytes_are_those_that_an_honest_footer_says(tmp_path, version, compression):
    """The footer's count the headers of the pages with them."""
    rng = np.random.default_rng(0)
    words = [None if i % 7 == 0 else "w" * int(rng.integers(1, 300)) for i in range(3000)]
    more = [[{"box": [0.5, i], "on": True}] * (i % 4) for i in range(3000)]
    table = pyarrow.table({"image": [f"{i}.jpg" for i in range(3000)], "caption": words, "more": more})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        table, path, compression=compression, data_page_version=version, row_group_size=1100, data_page_size=2000,
        use_dictionary=["caption"], column_encoding={"image": "DELTA_BYTE_ARRAY"},
    )  # fmt: skip
    read = pyarrow.parquet.ParquetFile(path)
    with open(path, "rb") as file:
        for group in range(3):
            described = read.metadata.row_group(group)
            said = sum(described.column(i).total_uncompressed_size for i in range(described.num_columns))
            assert 0.5 * said < parquet_pages.unpacked_bytes(file, read, group) <= said


def test_a_csv_whose_first_row_cannot_be_read_is_said(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"image\rcaption\na.jpg,some words\n")
    with pytest.raises(ValueError, match=r"t\.csv: its first row cannot be read as CSV: new-line"):
        first_row(tmp_path / "t.csv")
