"""`formats/tsv_index.py`: the rows of a table by key."""

import numpy as np
import pytest

from training.prepare.formats import tsv_index
from training.prepare.formats.tsv_index import TsvIndex


def test_lineidx_is_used_and_a_foreign_one_is_refused(tmp_path):
    lines = [f"k{i}\t" + "x" * (i * 7) for i in range(20)]
    path = tmp_path / "t.tsv"
    path.write_text("\n".join(lines) + "\n")
    plain = TsvIndex(path)
    starts = [sum(len(line) + 1 for line in lines[:i]) for i in range(20)]
    assert [plain.offset(row) for row in range(20)] == starts
    path.with_suffix(".lineidx").write_text("\n".join(map(str, starts)) + "\n")
    path.touch()
    indexed = TsvIndex(path)
    assert [indexed.offset(row) for row in range(20)] == starts
    assert [indexed.line(row) for row in range(20)] == list(range(1, 21))
    for i in (0, 7, 19):
        assert indexed.find(f"k{i}") == i and indexed.columns(i)[1] == b"x" * (i * 7)
    assert indexed.find("k20") is None
    for wrong in (["0", str(starts[1] + 1)], ["0", "99999"], ["3"], ["0", "x"]):
        path.with_suffix(".lineidx").write_text("\n".join(wrong) + "\n")
        path.touch()
        with pytest.raises(ValueError, match="does not belong to"):
            TsvIndex(path)


def test_lines_that_are_no_rows_are_named_in_the_order_of_the_file(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_bytes(b"a\t1\nno tab\n\nb\t2\na\t3\n\xff\t4\n\tno key\nb\t5")
    for _ in range(2):  # made, and found in the cache
        index = TsvIndex(path)
        assert [index.key(row) for row in range(len(index))] == ["a", "b", "\udcff"]
        assert [index.find(key) for key in ("a", "b", "\udcff", "c")] == [0, 1, 2, None]
        assert [index.columns(row)[1] for row in (2, 0, 1)] == [b"4", b"1", b"2"]
        named = [(problem.line, problem.key, problem.reason) for problem in index.problems]
        assert named == [(2, None, "no-key"), (5, "a", "duplicate-key"), (7, None, "no-key"), (8, "b", "duplicate-key")]
    assert len(list((tmp_path / "cache" / "tsv").iterdir())) == 1


def test_many_keys_are_found_as_in_a_dictionary(tmp_path):
    numbers = np.random.default_rng(0).integers(0, 5000, 6000).tolist()
    path = tmp_path / "t.tsv"
    path.write_text("".join(f"key {n}\t{line}\n" for line, n in enumerate(numbers, start=1)))
    first = {}
    for line, n in enumerate(numbers, start=1):
        first.setdefault(f"key {n}", line)
    index = TsvIndex(path)
    assert len(index) == len(first) and len(index) + len(index.problems) == len(numbers)
    assert {key: index.line(index.find(key)) for key in first} == first
    assert [index.key(row) for row in range(len(index))] == list(first)


def test_a_build_that_was_stopped_leaves_no_index(tmp_path, monkeypatch):
    path = tmp_path / "t.tsv"
    path.write_text("a\t1\nb\t2\n")
    monkeypatch.setattr(tsv_index, "_heads", lambda path: iter([(0, b"a\t1\n"), None]))
    with pytest.raises(TypeError):
        TsvIndex(path)
    monkeypatch.undo()
    monkeypatch.setenv("PYRAMIDCLIP_CACHE", str(tmp_path / "cache"))
    assert not list((tmp_path / "cache" / "tsv").iterdir())
    assert len(TsvIndex(path)) == 2
