"""The commands of preparation on ordinary slips: one line says what came, what was expected and what to do."""

import json
import os
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from tests.training.prepare.small_data import (
    counts,
    picture,
    problems,
    read_tars,
    write_jsonl,
    write_pictures,
    write_tar,
)
from training.emoji import scenes
from training.prepare import audit, detect, import_features, pack, summarize, view
from training.prepare.formats import open_format
from training.prepare.formats.store import StoreRows
from training.prepare.sources import open_source
from training.prepare.steps.flags import USUAL_COLUMNS, SourceArguments
from training.prepare.steps.rewriting import shards_of

COMMANDS = {
    "pack": pack,
    "summarize": summarize,
    "detect": detect,
    "import_features": import_features,
    "audit": audit,
    "view": view,
    "scenes": scenes,
}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """{name: path} of what the flags below name; the working folder is empty but for them."""
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "pictures", 3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("words\n")
    write_jsonl(tmp_path / "pictures.jsonl", [{"image": "pictures/0.jpg", "caption": "a cat"}])
    write_jsonl(tmp_path / "others.jsonl", [{"image": "pictures/1.jpg", "caption": "a dog"}])
    write_tar(tmp_path / "shards" / "00000.tar", [("k", {"jpg": picture(0), "txt": b"a caption"})])
    for name, text in {
        "void.jsonl": "",
        "void.csv": "",
        "lost.csv": "image,caption\nnowhere/0.jpg,a cat\nnowhere/1.jpg,a dog\n",
        "head.csv": "image,caption\n",
        "semicolons.csv": "image;caption\npictures/0.jpg;a cat\n",
        "tabs.csv": "image\tcaption\npictures/0.jpg\ta cat\n",
        "commas.tsv": "image,caption\npictures/0.jpg,a cat\n",
        "words.parquet": "no parquet\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "wide.csv").write_bytes("image,caption\npictures/0.jpg,a cat\n".encode("utf-16"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    PyramidCLIPConfig().save_pretrained(tmp_path / "clip")
    PyramidCLIPConfig().save_pretrained(tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_text("not whole")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": "detr", ')
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "void.tar").touch()
    (tmp_path / "objects.tsv").write_text('k\t{"objects": []}\n')
    (tmp_path / "features.tsv").write_text("k\t{no json\n")


SLIPS = [
    # Files and folders that are not there.
    ("pack --input missing.jsonl --output_dir out", "missing.jsonl: there is no such .*: tars, manifests or tables"),
    ("pack --output_dir out", "--input is missing: expected tars, manifests or tables"),
    ("pack --input ./missing --output_dir out", "./missing: there is no such file or folder.*tables"),
    ("pack --input missing --output_dir out", "no such file or folder here.*dataset of the Hub.*give the path"),
    (
        "summarize --input_dir missing --model first-clause",
        "input-dir missing: there is no such file or folder.*pack writes",
    ),
    ("detect --input_dir missing --detector x", "input-dir missing: there is no such file or folder.*pack writes"),
    (
        "import_features --input missing.tsv --made_by x --merge_into shards",
        "missing.tsv: there is no such file or folder",
    ),
    (
        "import_features --input features.tsv --made_by x --merge_into missing",
        "merge-into missing: there is no such file or folder.*pack writes",
    ),
    ("import_features --input features.tsv --objects missing.txt --made_by x --store_dir out", "missing.txt"),
    ("audit missing", "missing"),
    ("view missing.tar --output page.html", "missing.tar: there is no such file or folder"),
    # A folder of pictures, an empty one, or a file of another kind.
    ("pack --input pictures --output_dir out", r"pictures holds no .*tar and no table.*holds 3 \*.jpg.*in a table"),
    ("pack --input empty --output_dir out", "empty holds no .*tar and no table.*it is empty"),
    (
        "pack --input words.txt --output_dir out",
        "words.txt: 1 of 1 tars are not there, first words; expected one tar",
    ),
    ("summarize --input_dir pictures --model first-clause", r"no .*tar in pictures.*it holds 3 \*.jpg"),
    ("summarize --input_dir words.txt --model first-clause", "no .*tar in words.txt.*it is a file"),
    ("detect --input_dir pictures --detector x", r"no .*tar in pictures.*it holds 3 \*.jpg"),
    ("detect --input_dir empty --detector x", "no .*tar in empty.*it is empty"),
    ("import_features --input pictures --made_by x --store_dir out", "pictures has no .*tar: expected a store"),
    ("import_features --input features.tsv --made_by x --store_dir out", "its first row has 2 columns and is none of"),
    ("import_features --input words.txt --made_by x --store_dir out", "words.txt has no row that begins with a key"),
    ("audit pictures", "pictures"),
    ("audit empty", "empty"),
    ("view pictures/0.jpg --output page.html", "0.jpg is not an uncompressed tar"),
    ("view pictures --output page.html", "pictures is a folder: expected one of its shards"),
    # Tables of another form.
    ("pack --input void.jsonl --output_dir out", "void.jsonl: no rows, expected a picture and a caption in each"),
    ("pack --input void.csv --output_dir out", "void.csv: no rows"),
    ("pack --input head.csv --output_dir out", "head.csv: no rows"),
    ("pack --input semicolons.csv --output_dir out", "columns seem to be parted by ';': .csv is read with ','"),
    ("pack --input tabs.csv --output_dir out", r"columns seem to be parted by '\\t': .csv is read with ','"),
    ("pack --input commas.tsv --output_dir out", r"columns seem to be parted by ',': .*.tsv with '\\t'"),
    ("pack --input wide.csv --output_dir out", "wide.csv: its first row is not UTF-8 text; save the table as UTF-8"),
    ("pack --input words.parquet --output_dir out", "words.parquet is no Parquet table that can be read: .*magic"),
    ("import_features --input features.tsv --objects latin.txt --made_by x --store_dir out", "latin.txt is not UTF-8"),
    ("import_features --input features.tsv --objects fifo --made_by x --store_dir out", "fifo is a folder, device or"),
    ("import_features --input objects.tsv --hw fifo --made_by x --store_dir out", "fifo is a folder, device or FIFO"),
    ("import_features --input objects.tsv --hw empty --made_by x --store_dir out", "empty is a folder, device or FIFO"),
    ("view void.tar --output page.html", "void.tar, which has 0"),
    ("view shards/00000.tar --output page.html --number 0", "1 or more as --number, got 0 and 0"),
    ("audit shards --batch-size 0", "--batch-size: expected 1 or more, got 0"),
    ("audit shards --workers 0", "--workers: expected 1 or more, got 0"),
    ("detect --input_dir shards --detector x --top 0", "top is 0, expected 1 or more"),
    (
        "detect --input_dir shards --detector clip",
        "detector clip is of the kind 'pyramidclip', which finds no objects: ",
    ),
    # The output of something else.
    ("view shards/00000.tar --output shards/00000.tar", "00000.tar is there and is no page: choose a name that ends"),
    (
        "pack --input others.jsonl --output_dir packed",
        "made with other settings.*pictures.jsonl.*another folder, or --overwrite",
    ),
    ("pack --input shards/00000.tar --output_dir shards", "shards holds the input .*00000.tar: choose another folder"),
    (
        "scenes --output-dir drawn --train 4 --validation 2",
        "drawn holds scenes of other settings.*train: 3 there, 4 asked for",
    ),
    # Models that are not there.
    (
        "summarize --input_dir shards --model nobody/nothing",
        "--model nobody/nothing is no folder here.*expected a folder",
    ),
    ("summarize --input_dir shards --model empty", "--model empty is .*expected a folder that save_pretrained wrote"),
    ("detect --input_dir shards --detector nobody/nothing", "--detector nobody/nothing is no folder here"),
    ("detect --input_dir shards --detector empty", "--detector empty is .*expected a folder"),
    ("summarize --input_dir shards --model first_clause", "--model first_clause: .*; did you mean first-clause?"),
    ("summarize --input_dir shards --model cut", "cut/model.safetensors, 9 bytes, is cut short or damaged.*copy or"),
    ("detect --input_dir shards --detector cut", "cut/model.safetensors, 9 bytes, is cut short or damaged.*copy or"),
    (
        "summarize --input_dir shards --model torn",
        "--model torn: torn/config.json is no JSON mapping .*copy or",
    ),
    ("detect --input_dir shards --detector torn", "torn/config.json is no JSON mapping .*copy or download it again"),
    # Flags.
    ("pack --input pictures.jsonl", "--output-dir"),
    ("pack --inputs pictures.jsonl --output_dir out", "unrecognized arguments: --inputs.*--help"),
    (
        "pack --input pictures.jsonl --output_dir out --samples_per_shard 0",
        "samples_per_shard is 0, expected 1 or more",
    ),
    ("pack --input pictures.jsonl --output_dir out --part_index 2", "part_index 2 of part_count 1"),
    ("summarize --input_dir shards --model first-clause --num_beams 0", "num_beams=0: expected 1 or more"),
    ("detect --input_dir shards --detector empty --batch_size 0", "batch_size is 0, expected 1 or more"),
    ("detect --input_dir shards --detector empty --device toaster", "--device toaster: expected auto, cpu, or cuda"),
    ("import_features --input features.tsv --made_by x", "give one of --merge-into"),
    ("import_features --input features.tsv --store_dir out --hw a --hw b c", "--hw: 2 files for 1 inputs"),
    ("view shards/00000.tar --output page.html --first 7", "which has 1"),
    ("scenes", "nothing to do: give --output-dir"),
    ("scenes --output-dir out --detector-mistakes 2", "detector_mistakes: expected a share from 0 to 0.5, got 2"),
]


@pytest.mark.parametrize(("words", "message"), SLIPS, ids=[words for words, _ in SLIPS])
def test_a_slip_is_one_line_and_exit_code_2(inputs, capsys, words, message):
    name, *flags = words.split()
    if "packed" in flags:
        assert pack.main(["--input", "pictures.jsonl", "--output_dir", "packed"]) == 0
    if "drawn" in flags:
        scenes.claim_folder(scenes.Recipe(0, 3, 2, 12, 96, 1000), "drawn")
    capsys.readouterr()
    assert COMMANDS[name].main(flags) == 2
    out, err = capsys.readouterr()
    line = err.splitlines()[-1]
    assert line.startswith("error: ") and "Traceback" not in err and not out
    assert re.search(message, line), line


@pytest.mark.parametrize(
    "words", [w for w, _ in SLIPS if " missing" in w and not w.startswith("import_features --input f")]
)
def test_nothing_is_made_where_nothing_could_be_read(inputs, tmp_path, words):
    before = sorted(tmp_path.rglob("*"))
    name, *flags = words.split()
    COMMANDS[name].main(flags)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_columns_that_are_taken_are_those_that_are_documented(checkout):
    page = " ".join((checkout / "docs" / "prepare.md").read_text().split())
    image, caption = (", ".join(f"`{name}`" for name in USUAL_COLUMNS[role]) for role in ("image", "caption"))
    assert f"name the columns where they are not called {image} and {caption}." in page


def test_hidden_files_beside_shards_are_passed_over(inputs, tmp_path):
    """macOS writes `._NAME` beside each file that it copies to another file system."""
    (tmp_path / "shards" / "._00000.tar").write_bytes(b"\0\5\x16\7" * 20)
    assert [Path(name).name for name in open_source(SourceArguments(["shards"])).files] == ["00000.tar"]
    assert list(shards_of("shards")) == ["00000.tar"]
    assert [Path(path).name for path in StoreRows(tmp_path / "shards").paths] == ["00000.tar"]


def test_names_that_are_not_utf8_go_through_every_step(tmp_path, capsys):
    good, bad = "g\udcffd", "b\udcffd"
    samples = [("plain", picture(0)), (good, picture(1)), (bad, b"broken")]
    write_tar(tmp_path / "in" / "0.tar", [(key, {"jpg": data, "txt": b"words"}) for key, data in samples])
    (tmp_path / "m.jsonl").write_text('{"image": "\\ud800.jpg", "caption": "words"}\n')
    words = [
        (pack, f"--input {tmp_path}/in --output_dir {tmp_path}/out"),
        (audit, f"{tmp_path}/in --output-dir {tmp_path}/audit"),
        (audit, f"{tmp_path}/m.jsonl --output-dir {tmp_path}/audit-manifest"),
        (view, f"{tmp_path}/in/0.tar --output {tmp_path}/page.html"),
        (summarize, f"--input_dir {tmp_path}/out --model first-clause"),
    ]
    for command, flags in words:
        assert command.main(flags.split()) == 0, ascii(capsys.readouterr().err)
    assert pack.main(f"--input {tmp_path}/m.jsonl --output_dir {tmp_path}/out-manifest".split()) == 2
    assert "no-image" in capsys.readouterr().err
    assert [key for _, key, _, _ in problems(tmp_path / "out", "pack")] == [bad]
    assert sorted(read_tars(tmp_path / "out")) == sorted(["plain", good])
    listed = [json.loads(line) for line in (tmp_path / "audit" / "bad-samples.jsonl").read_bytes().splitlines()]
    assert [entry["key"] for entry in listed] == [bad]
    assert "g\\udcffd" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_fifos_and_devices_are_named_and_never_read(inputs, tmp_path):
    for name in ("table.jsonl", "table.csv", "x.tsv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("table.jsonl", "table.csv", "zero.jsonl"):
        with pytest.raises(ValueError, match="device or FIFO"):
            open_source(SourceArguments(input=[name]))
    with pytest.raises(ValueError, match="device or FIFO"):
        open_format(tmp_path / "x.tsv")
    os.mkfifo(tmp_path / "fifo.jpg")
    for number, name in enumerate(("fifo.jpg", "/dev/zero")):
        write_jsonl(tmp_path / f"{number}.jsonl", [{"image": name, "caption": "a cat"}])
        source = open_source(SourceArguments(input=[f"{number}.jsonl"]))
        (raw,) = source.read(source.parts()[0])
        assert raw.fault is not None and raw.fault.reason == "no-image"


def test_pairs_of_which_none_can_be_used_are_said(inputs, capsys):
    """With the first reason; the report of all stays."""
    assert pack.main("--input lost.csv --output-dir out".split()) == 2
    said = capsys.readouterr()
    line = said.err.splitlines()[-1]
    assert line.startswith(
        "error: none of the 2 pairs could be used; the first fault, in lost.csv: no-image: nowhere/0.jpg"
    )
    assert "pack: 2 in = 0 out + 2 rejected" in said.out and len(problems("out", "pack")) == 2


def test_shards_and_tables_without_a_pair_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cut.tar").touch()
    with tarfile.open("bare.tar", "w"):
        pass
    for name in ("cut.tar", "bare.tar"):
        assert pack.main(["--input", name, "--output-dir", f"{name}-out"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        fault = "; the first fault, in cut.tar: truncated-shard: " if name == "cut.tar" else ""
        assert line.startswith(f"error: there is no pair in {name}{fault}")
    Path("shards").mkdir()
    Path("bare.tar").rename("shards/bare.tar")
    assert summarize.main(["--input-dir", "shards", "--model", "first-clause"]) == 2
    assert capsys.readouterr().err.endswith("error: there is no pair in shards\n")


def test_rows_of_a_table_with_other_signs_between_its_columns_say_so(tmp_path, monkeypatch, capsys):
    """The captions have commas, so that each row breaks before its columns are missed."""
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text("image\tcaption\n0.jpg\ta cat, and a dog\n")
    assert pack.main("--input a.csv --output-dir out".split()) == 2
    assert "2 values for 1 columns. Its columns seem to be parted by '\\t': .csv is read" in capsys.readouterr().err


def test_what_took_nothing_may_be_done_otherwise(inputs, capsys):
    """The answer to a slip can be followed: nothing is there that other settings could harm."""
    assert pack.main("--input pictures.jsonl --caption-column captoin --output-dir out".split()) == 2
    assert pack.main("--input lost.csv --output-dir out".split()) == 2
    assert pack.main("--input pictures.jsonl --output-dir out".split()) == 0, capsys.readouterr().err
    kept = counts("out", "pack")
    assert pack.main("--input lost.csv --output-dir out".split()) == 2
    assert "made with other settings" in capsys.readouterr().err and counts("out", "pack") == kept
