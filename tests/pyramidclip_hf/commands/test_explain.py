"""`pyramidclip explain`: the overlay and the score."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.pyramidclip_hf.commands.plain import (
    BROKEN,
    ROTATED,
    WIDEST,
    loaded,
    plain_image_embedding,
    plain_text_embeddings,
    run,
)
from tests.rounding import rounding


def test_explain_writes_the_overlay(pictures, capsys, model_dir, tmp_path):
    from pyramidclip_hf.explain import explain_image

    overlay = tmp_path / "overlay.png"
    argv = ["explain", "--model", model_dir, pictures / ROTATED, "--text", "a fox", "--output", overlay]
    code, out, err = run(capsys, *argv, "--json")
    row = json.loads(out)
    score = plain_text_embeddings(model_dir, ["a fox"])[0] @ plain_image_embedding(model_dir, pictures / ROTATED)
    assert code == 0 and row["score"] == pytest.approx(score, abs=rounding(1, WIDEST)) and row["output"] == str(overlay)
    # Upright: the file holds 60 x 30 pixels.
    assert Image.open(overlay).size == (30, 60)
    model, processor = loaded(model_dir)
    picture = Image.open(pictures / ROTATED)
    expected = explain_image(model, processor, picture, "a fox").overlay(picture)
    assert np.array_equal(np.asarray(Image.open(overlay)), np.asarray(expected))
    code, _, err = run(capsys, *argv)
    assert code == 2 and "--overwrite takes its place" in err
    assert run(capsys, *argv, "--overwrite", "--quiet")[0] == 0
    code, _, err = run(capsys, *argv[:3], pictures, *argv[4:], "--overwrite")
    assert code == 2 and "is a folder: expected the file of one picture" in err
    code, _, err = run(capsys, *argv[:3], pictures / BROKEN[0], *argv[4:], "--overwrite")
    assert code == 2 and BROKEN[0] in err
