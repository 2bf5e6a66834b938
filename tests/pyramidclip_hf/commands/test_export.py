"""`pyramidclip export`, and the other subcommands with `--backend`."""

import json
import shutil

import numpy as np
import pytest

from pyramidclip_hf import commands
from pyramidclip_hf.embedding_files import read_embeddings, read_metadata
from pyramidclip_hf.export import compare_on_data
from pyramidclip_hf.loading import load_model
from tests.pyramidclip_hf.commands.plain import COLOURS, run

pytest.importorskip("onnxruntime", reason="needs the extra export")


@pytest.fixture(scope="module")
def exported(model_dir, pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(model_dir, folder)
    return folder


@pytest.fixture
def manifest(pictures, tmp_path):
    pairs = [{"image": str(pictures / name), "caption": name} for name in COLOURS]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


def test_the_whole_way(exported, pictures, manifest, model_dir, embedded, capsys, tmp_path):
    """Export, embed, classify and search; what the report says is what the files do."""
    good = [pictures / name for name in COLOURS]
    command = ["export", "--model", exported, "--dtype", "float32", "int8", "--calibration", *good]
    code, out, err = run(capsys, *command, "--pairs", manifest, "--json", "--quiet")
    assert (code, err) == (0, "")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["file"] for row in rows[:4]] == [
        f"{tower}_model{ending}.onnx" for tower in ("vision", "text") for ending in ("", "_quantized")
    ]
    assert [(row["dtype"], row["measure"]) for row in rows[4:]] == [
        (dtype, f"{way}, recall at 1") for dtype in ("float32", "int8") for way in ("image to text", "text to image")
    ]
    assert all(row["model"] == row["exported"] for row in rows[4:6])

    output = tmp_path / "onnx.npz"
    command = ["embed", "--model", exported, "--backend", "onnx", *good, "--output", output, "--quiet"]
    assert run(capsys, *command)[0] == 0
    stored, plain = read_embeddings(output), read_embeddings(embedded)
    own = [plain.names.index(name) for name in stored.names]
    assert np.allclose(stored.embeddings, plain.embeddings[own], atol=1e-5)
    engine = read_metadata(output)["settings"]["engine"]
    assert (engine["backend"], engine["dtype"]) == ("onnx", "float32") and engine["disagreement"] < 1e-4
    # Embeddings of two engines meet in one search where they agree.
    query = ["--text", "fox", "--top-k", 1, "--quiet"]
    found = run(capsys, "search", output, "--model", model_dir, *query)
    assert found[0] == 0 and found[1] == run(capsys, "search", output, "--backend", "onnx", *query)[1]
    code, _, err = run(capsys, "search", output, "--backend", "onnx", "--dtype", "int8", *query)
    assert code == 2 and "was made with onnx in float32, the query is embedded with onnx in int8" in err

    labels = ["--labels", "bat", "fox", "--json", "--quiet"]
    ours = run(capsys, "classify", "--model", exported, "--backend", "onnx", *good, *labels)
    theirs = run(capsys, "classify", "--model", model_dir, *good, *labels)
    assert ours[0] == theirs[0] == 0
    for one, other in zip(ours[1].splitlines(), theirs[1].splitlines(), strict=True):
        (mine,), (plain_one,) = json.loads(one)["predictions"], json.loads(other)["predictions"]
        assert mine["label"] == plain_one["label"]
        assert mine["probability"] == pytest.approx(plain_one["probability"], abs=1e-4)


def test_what_does_not_go_together(model_dir, pictures, capsys, tmp_path):
    def refused(message, *argv):
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "") and message in err, err

    one = pictures / "blue.jpg"
    classify = ["classify", "--model", model_dir, one, "--labels", "a", "b"]
    refused("--dtype int8 needs --backend onnx or openvino", *classify, "--dtype", "int8")
    refused("holds no exported model", *classify, "--backend", "onnx")
    refused(
        "--dtype bfloat16: onnx models come in float32, float16, int8",
        *classify,
        "--backend",
        "onnx",
        "--dtype",
        "bfloat16",
    )
    refused(
        "--device cuda: --backend onnx computes on the processor", *classify, "--backend", "onnx", "--device", "cuda"
    )
    refused("int8 needs pictures", "export", "--model", model_dir, "--output", tmp_path / "out", "--dtype", "int8")
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.png"}\n')
    refused(
        "line 1: expected",
        "export",
        "--model",
        model_dir,
        "--output",
        tmp_path / "out",
        "--pairs",
        tmp_path / "pairs.jsonl",
    )
    into = ["export", "--model", model_dir, "--output", tmp_path / "out", "--dtype", "int8", "--calibration"]
    refused("pairs.jsonl: cannot be read: ", *into, tmp_path / "pairs.jsonl")
    refused("expected pictures: files, folders with all below them, or globs in", *into, tmp_path / "pairs.jsonl")
    assert not (tmp_path / "out").exists()


def test_an_engine_that_is_absent_names_the_extra(model_dir, pictures, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    code, _, err = run(
        capsys, "classify", "--model", model_dir, pictures / "blue.jpg", "--labels", "a", "b", "--backend", "onnx"
    )
    assert code == 2 and 'pip install "pyramidclip-hf[export]"' in err


def test_what_calibration_and_classes_pass_over_is_said_before_anything_is_loaded(pictures, capsys, tmp_path):
    for folder, other in (("bat", "b.heic"), ("fox", "notes.txt")):
        (tmp_path / folder).mkdir()
        shutil.copy(pictures / "blue.jpg", tmp_path / folder)
        (tmp_path / folder / other).write_bytes(b"")
    command = ["export", "--model", pictures, "--calibration", tmp_path / "bat", "--classes", tmp_path]
    code, _, err = run(capsys, *command, "--quiet")
    assert code == 2 and err.startswith("passed over: 1 .heic; .heic: Pillow")
    assert err.splitlines()[1].startswith(f"--classes {tmp_path}: passed over: 1 .heic, 1 .txt; .heic: Pillow")


def test_classes_without_sub_folders_are_refused_and_not_left_out(model_dir, pictures, capsys, tmp_path):
    command = ["export", "--model", model_dir, "--output", tmp_path / "out", "--classes", pictures / "a"]
    code, _, err = run(capsys, *command)
    assert code == 2 and "sub-folder of pictures for each of at least two classes, found none" in err
    assert not (tmp_path / "out").exists()


def test_a_single_class_and_pictures_beside_the_classes_are_said(model_dir, pictures, capsys, tmp_path):
    (tmp_path / "classes" / "bat").mkdir(parents=True)
    for name in ("bat/a.jpg", "b.jpg", "c.jpg"):
        shutil.copy(pictures / "blue.jpg", tmp_path / "classes" / name)
    command = ["export", "--model", model_dir, "--output", tmp_path / "out", "--classes", tmp_path / "classes"]
    code, _, err = run(capsys, *command)
    assert code == 2 and "sub-folder of pictures for each of at least two classes, found bat" in err
    shutil.copytree(tmp_path / "classes" / "bat", tmp_path / "classes" / "fox")
    code, _, err = run(capsys, *command[:2], pictures, *command[3:])  # no model, which is opened after that
    assert code == 2 and err.startswith(f"--classes {tmp_path / 'classes'}: passed over: 2 .jpg beside the folders of")
    assert not (tmp_path / "out").exists()


def test_a_picture_of_a_pair_that_is_not_there_is_said_before_anything_is_written(
    model_dir, pictures, capsys, tmp_path, monkeypatch
):
    """One that cannot be read is met after the files are written, which is no wrong usage any more."""
    (tmp_path / "pairs.jsonl").write_text('{"image": "a.jpg", "caption": "a"}\n')
    command = ["export", "--model", model_dir, "--output", tmp_path / "out", "--pairs", tmp_path / "pairs.jsonl"]
    code, out, err = run(capsys, *command)
    assert (code, out) == (2, "") and f"line 1: there is no picture {tmp_path / 'a.jpg'}; paths count from" in err
    assert not (tmp_path / "out").exists()
    (tmp_path / "a.jpg").write_text("no picture")
    monkeypatch.setattr(commands, "export_model", lambda *arguments, **options: [])
    monkeypatch.setattr(commands, "load_exported", lambda *arguments, **options: load_model(str(model_dir)))
    code, out, err = run(capsys, *command)
    assert code == 1 and f"the files are exported, but not compared on data: {tmp_path / 'a.jpg'}: " in err


def test_pictures_of_classes_are_compared(model_dir, pictures):
    """The model in both places: half of two classes of one picture is always first."""
    loaded, blue = load_model(str(model_dir)), str(pictures / "blue.jpg")
    classes = {"bat": [blue], "fox": [blue]}
    [(measure, before, after)] = compare_on_data(loaded, loaded.model, None, classes, 10**6)
    assert measure.startswith("zero-shot") and before == after == 0.5
