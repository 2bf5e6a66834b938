"""`data/hub_sets.py`: what is refused before the `datasets` library reads it."""

import gzip
import io
import json
import lzma
import zipfile

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from training.data.hub_sets import RefusedFile, load_checked, load_saved
from training.evaluation.hub import labelled_hub


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", tmp_path / "extracted")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def write_equal_rows(path, length=4 << 20):
    """A few kilobytes, in which one long text stands in 256 rows: 1 GiB."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 256), pyarrow.array(["c" * length]))
    table = pyarrow.table({"image": [b"x"] * 256, "label": texts})
    pyarrow.parquet.write_table(
        table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False, write_statistics=False
    )
    assert path.stat().st_size < 10_000


@pytest.mark.parametrize("as_folder", [True, False])
def test_parquet_that_stands_for_far_more_than_it_is_is_refused_before_it_is_read(tmp_path, as_folder):
    write_equal_rows(tmp_path / "test-00000-of-00001.parquet")
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.system_memory_pool())
    pyarrow.set_memory_pool(pool)
    try:
        with pytest.raises(ValueError, match=r"parquet is no Parquet file .* its rows may have 107\d+ bytes"):
            labelled_hub(str(tmp_path if as_folder else tmp_path / "test-00000-of-00001.parquet"))
    finally:
        pyarrow.set_memory_pool(before)
    assert pool.max_memory() < 100 << 20


def test_what_parquet_honestly_holds_is_read(tmp_path):
    """Few words in many rows, which a dictionary makes small, and pictures that do not get smaller."""
    rows = {"image": [bytes([i % 251]) * 3000 for i in range(5000)], "label": [f"word {i % 7}" for i in range(5000)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    found = load_checked("parquet", data_files=str(tmp_path / "a.parquet"), split="train")
    assert found[:]["label"] == rows["label"] and found[4999]["image"] == rows["image"][4999]


def zipped(content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", content)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"), [("a.zip", zipped), ("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)]
)
def test_archives_are_unpacked_as_far_as_the_limit(tmp_path, monkeypatch, name, pack):
    monkeypatch.setattr("training.data.hub_sets.ALWAYS_BYTES", 1 << 20)
    (tmp_path / name).write_bytes(pack(b"words\n" * 100_000))
    assert len(load_checked("text", data_files=str(tmp_path / name), split="train")) == 100_000
    (tmp_path / name).write_bytes(pack(b"words\n" * 1_000_000))
    with pytest.raises(RefusedFile, match="is an archive of .* more than 1048576"):
        load_checked("text", data_files=str(tmp_path / name), split="train")


def test_an_archive_whose_length_nobody_can_tell_is_refused(tmp_path):
    (tmp_path / "a.txt.zst").write_bytes(pyarrow.compress(b"words\n" * 10, "zstd", asbytes=True))
    with pytest.raises(RefusedFile, match="not known or more"):
        load_checked("text", data_files=str(tmp_path / "a.txt.zst"), split="train")


@pytest.fixture
def saved(tmp_path):
    datasets.Dataset.from_dict({"image": [b"x", b"yy"], "label": [["a"], ["b", "c"]]}).save_to_disk(tmp_path / "s")
    return tmp_path / "s"


def arrow(saved, batch, **options):
    (file,) = saved.glob("*.arrow")
    with pyarrow.ipc.new_stream(str(file), batch.schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as stream:
        stream.write_batch(batch)


def test_what_save_to_disk_wrote_is_read(saved):
    assert load_saved(str(saved))[:] == {"image": [b"x", b"yy"], "label": [["a"], ["b", "c"]]}


@pytest.mark.parametrize(
    ("column", "options", "told"),
    [
        (pyarrow.array(["a" * 9999]), {"compression": "zstd"}, "a packed part"),
        (pyarrow.array(["a", "a"]).dictionary_encode(), {}, "a dictionary"),
        (pyarrow.array(["a", "a"], pyarrow.string_view()), {}, "a column of string_view"),
        (pyarrow.array([["a"]], pyarrow.list_view(pyarrow.string())), {}, "a column of list_view"),
    ],
)
def test_arrow_that_stands_for_more_than_it_is_is_refused(saved, column, options, told):
    arrow(saved, pyarrow.record_batch({"label": column}), **options)
    with pytest.raises(RefusedFile, match=f"is not what save_to_disk writes.*{told}"):
        load_saved(str(saved))


def test_arrow_whose_texts_lie_outside_of_it_is_refused(saved):
    arrow(saved, pyarrow.record_batch({"label": pyarrow.array(["abcdefgh" * 9, "x"])}))
    (file,) = saved.glob("*.arrow")
    ends = b"".join(end.to_bytes(4, "little") for end in (0, 72, 73))
    assert file.read_bytes().count(ends) == 1
    file.write_bytes(file.read_bytes().replace(ends, ends[:4] + (1 << 30).to_bytes(4, "little") + ends[8:]))
    with pytest.raises(RefusedFile, match="is not what save_to_disk writes"):
        load_saved(str(saved))


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/hosts", "gone.arrow"])
def test_a_saved_data_set_keeps_to_its_folder(saved, name):
    state = json.loads((saved / "state.json").read_text())
    (saved / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))
    with pytest.raises(RefusedFile, match="leads out of the folder|no file there"):
        load_saved(str(saved))
