"""`formats/`: an input is told by its beginning, and a format brings its own flags."""

from dataclasses import dataclass, field

import pytest

from training.prepare import formats, import_features
from training.prepare.formats import FORMATS, open_format, open_formats
from training.prepare.formats.tsv import FormatOptions, Head, TsvRows
from training.prepare.steps.flags import FORMAT_FLAGS, LxmertOptions, OscarOptions
from training.prepare.steps.regions import Detections


@pytest.mark.parametrize(
    ("columns", "record", "name"),
    [
        ([b"k"] * 10, None, "lxmert"),
        ([b"k", b"3", b"AAAA"], None, "oscar"),
        ([b"k", b"{}"], {"features": "", "num_boxes": 0}, "oscar"),
        ([b"k", b"{}"], {"objects": []}, "scene-graph-benchmark"),
        ([b"k", b"{}"], {"objects": [], "features": ""}, "scene-graph-benchmark"),
        ([b"k", b"{}"], {"something": "else"}, None),
        ([b"k", b"[]"], [], None),
        ([b"k", b"text"], None, None),
    ],
)
def test_at_most_one_format_recognises_an_input(tmp_path, columns, record, name):
    head = Head(tmp_path / "t.tsv", columns=columns, record=record)
    assert [known.name for known in FORMATS if known.recognises(head)] == ([name] if name else [])


def test_a_folder_is_a_store(tmp_path):
    assert [known.name for known in FORMATS if known.recognises(Head(tmp_path))] == ["store"]


def test_flags_belong_to_one_format_and_each_has_a_default():
    names = [name for kind in FORMAT_FLAGS for name in kind.__dataclass_fields__]
    assert len(names) == len(set(names)) and all(kind() == kind() for kind in FORMAT_FLAGS)
    options = FormatOptions(OscarOptions(["a", "b"]), number=1)
    assert options.of(OscarOptions).predictions == ["a", "b"] and options.of(LxmertOptions) == LxmertOptions()
    assert [FormatOptions(number=n).companion(files) for n, files in ((0, []), (1, ["a"]), (1, ["a", "b"]))] == [
        None,
        "a",
        "b",
    ]


@dataclass
class GreetingOptions:
    """The flag of a format that is made up here."""

    word: str = field(default="hello", metadata={"help": "What rows begin with."})

    def check(self, inputs):
        if not self.word:
            raise ValueError("--word is empty")


class GreetingRows(TsvRows):
    """A format that is made up here: a key, and a word."""

    name, options = "greeting", GreetingOptions

    @classmethod
    def recognises(cls, head):
        return len(head.columns) == 2 and head.columns[1].startswith(b"hello")

    @classmethod
    def open(cls, head, options):
        assert options.of(GreetingOptions).word == "hello there"
        return cls(head.rows)

    def size(self, row):
        return 10, 10

    def read(self, row, size):
        return Detections([[0, 0, 1, 1]], [0.5], ["cat"], [[1.0, 2.0]])


def test_flags_of_formats_are_named_once_more_where_help_is_quick():
    assert tuple(known.options for known in FORMATS if known.options is not None) == FORMAT_FLAGS


def test_a_new_format_is_a_class_and_a_name_in_one_tuple_and_its_flags_in_another(tmp_path, monkeypatch):
    (tmp_path / "t.tsv").write_text("a\thello there\nb\thello\n")
    with pytest.raises(ValueError, match="its first row has 2 columns and is none of"):
        open_format(tmp_path / "t.tsv")
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, GreetingRows))
    monkeypatch.setattr(import_features, "FORMAT_FLAGS", (*FORMAT_FLAGS, GreetingOptions))
    rows = open_formats([str(tmp_path / "t.tsv")] * 2, None, GreetingOptions("hello there"))
    assert len(rows) == 4 and rows.name == "greeting" and rows.key(3) == "b" and rows.place(3).line == 2
    with pytest.raises(ValueError, match="--word is empty"):
        open_formats([str(tmp_path / "t.tsv")], None, GreetingOptions(""))
    words = ["--input", tmp_path / "t.tsv", "--word", "hello there", "--made-by", "me", "--store-dir", tmp_path / "out"]
    assert import_features.main([*map(str, words), "--device", "cpu"]) == 0
    assert '"greeting"' not in (tmp_path / "out" / "dataset.json").read_text()
    assert "import_features, greeting" in (tmp_path / "out" / "dataset.json").read_text()


def test_columns_that_are_no_format_are_told(tmp_path):
    (tmp_path / "t.tsv").write_text("k\t" + "\t".join("x" * 11) + "\n")
    with pytest.raises(ValueError, match="its first row has 12 columns and is none of"):
        open_format(tmp_path / "t.tsv")
