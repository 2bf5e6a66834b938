"""`pyramidclip classify` against the plain softmax."""

import io
import json
import sys

import numpy as np
import pytest

from pyramidclip_command import EXIT_SKIPPED
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES
from tests.pyramidclip_hf.commands.plain import (
    BROKEN,
    WIDEST,
    good_ones,
    loaded,
    plain_image_embedding,
    plain_text_embeddings,
    run,
)
from tests.rounding import assert_equal_to_rounding


def test_classify_agrees_with_the_plain_softmax(pictures, capsys, model_dir, tmp_path):
    labels = ["cat", "a dog", "bird"]
    (tmp_path / "templates.txt").write_text("a {}\nmany {} here\n")
    embeds = plain_text_embeddings(model_dir, [t.replace("{}", x) for x in labels for t in ("a {}", "many {} here")])
    classes = embeds.reshape(3, 2, -1).mean(axis=1)
    classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    scale = np.exp(loaded(model_dir)[0].logit_scale.item())
    flags = ["--templates", tmp_path / "templates.txt", "--top-k", 2, "--batch-size", 3]
    code, out, err = run(capsys, "classify", "--model", model_dir, pictures, "--labels", *labels, *flags, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == EXIT_SKIPPED and {row["path"] for row in rows} == good_ones(pictures)
    assert all(f"skipped {pictures / name}: " in err for name in BROKEN) and "2 of 9 were skipped" in err
    for row in rows:
        logits = scale * classes @ plain_image_embedding(model_dir, row["path"])
        expected = np.exp(logits) / np.exp(logits).sum()
        best = np.argsort(-expected)[:2]
        assert [one["label"] for one in row["predictions"]] == [labels[place] for place in best]
        found = [one["probability"] for one in row["predictions"]]
        assert_equal_to_rounding(found, expected[best], WIDEST, terms=scale)  # a softmax passes on what logits are off


def test_classify_writes_tabs_and_takes_the_eighty_prompts(pictures, capsys, model_dir, tmp_path, monkeypatch):
    (tmp_path / "labels.txt").write_text("\ufeffcat\ndog\n", encoding="utf8")
    (tmp_path / "templates.txt").write_text("\n".join(IMAGENET_TEMPLATES))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{pictures / 'blue.jpg'}\n{pictures / 'gone.jpg'}\n"))
    flags = ["--model", model_dir, "--labels-file", tmp_path / "labels.txt", "--top-k", 2]
    code, out, err = run(capsys, "classify", *flags, "-", "--quiet")
    assert code == EXIT_SKIPPED and f"skipped {pictures / 'gone.jpg'}" in err
    path, first, probability, second, rest = out.rstrip("\n").split("\t")
    assert path == str(pictures / "blue.jpg") and {first, second} == {"cat", "dog"}
    assert float(probability) + float(rest) == pytest.approx(1, abs=2e-4)
    again = run(capsys, "classify", *flags, pictures / "blue.jpg", "--templates", tmp_path / "templates.txt")
    assert again[:2] == (0, out)


@pytest.mark.parametrize(
    ("labels", "message"),
    [("cat\n\ndog\n", "line 2 is blank"), ("", "it is empty"), ("cat\nCat\n", "repeated"), (b"\xff\xfe", "UTF-8")],
)
def test_labels_that_cannot_be(labels, message, pictures, capsys, model_dir, tmp_path):
    data = labels if isinstance(labels, bytes) else labels.encode()
    (tmp_path / "labels.txt").write_bytes(data)
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels-file", tmp_path / "labels.txt"]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and message in err


def test_pictures_that_were_taken_for_labels_are_told(pictures, capsys, model_dir):
    code, _, err = run(capsys, "classify", "--model", model_dir, "--labels", "cat", "dog", pictures)
    assert code == 2 and "all that follows --labels is labels, so pictures come before it" in err


def test_a_file_where_labels_are_expected_names_the_flag_for_files(pictures, capsys, model_dir, tmp_path, monkeypatch):
    """The name of the file would be the one class, of which each picture is with certainty."""
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    (tmp_path / "cat").touch()
    monkeypatch.chdir(tmp_path)
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", "--labels"]
    code, out, err = run(capsys, *argv, "labels.txt")
    assert (
        (code, out) == (2, "") and "--labels labels.txt: that is a file" in err and "--labels-file reads labels" in err
    )
    assert run(capsys, *argv, "cat", "nothing.txt")[0] == 0
    code, out, err = run(capsys, *argv, "cat, a dog")  # as if commas parted them
    assert (code, out) == (2, "") and "got one label, 'cat, a dog'" in err and "--labels cat 'a dog'" in err


@pytest.mark.parametrize("prompt", ["many of them", "{} beside {}"])
def test_a_prompt_without_its_place_is_named_before_the_model_is_read(prompt, pictures, capsys, tmp_path):
    (tmp_path / "own.txt").write_text(f"a {{}}\n{prompt}\n")
    argv = [
        "classify",
        "--model",
        "none",
        pictures / "blue.jpg",
        "--labels",
        "cat",
        "--templates",
        tmp_path / "own.txt",
    ]
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "") and "own.txt, line 2: expected a prompt with {} once" in err and prompt in err


def test_pictures_beyond_the_limit_are_not_decoded(pictures, capsys, model_dir):
    argv = ["classify", "--model", model_dir, pictures / "blue.jpg", pictures / "noise.bmp", "--labels", "cat"]
    code, out, err = run(capsys, *argv, "--max-image-pixels", 1500)
    assert code == EXIT_SKIPPED and str(pictures / "blue.jpg") in out
    assert "36 x 50 pixels" in err and "1500" in err
