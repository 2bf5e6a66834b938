"""`pyramidclip search`: the ranks, files that are no embeddings, the contact sheet and the page."""

import html
import json
import re

import numpy as np
from PIL import Image

from pyramidclip_hf.embedding_files import read_embeddings
from pyramidclip_hf.picture_files import contact_sheet
from tests.pyramidclip_hf.commands.plain import (
    BROKEN,
    COLOURS,
    WIDEST,
    loaded,
    plain_image_embedding,
    plain_text_embeddings,
    run,
)
from tests.rounding import assert_equal_to_rounding


def test_search_ranks_by_cosine(embedded, pictures, capsys, model_dir):
    texts, image = ["a red bat", "fox"], str(pictures / "a/red.png")
    code, out, err = run(capsys, "search", embedded, "--text", *texts, "--image", image, "--top-k", 3, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["query"] for row in rows] == [q for q in [*texts, image] for _ in range(3)]
    stored = read_embeddings(embedded)
    queries = [*plain_text_embeddings(model_dir, texts), plain_image_embedding(model_dir, image)]
    for number, query in enumerate(queries):
        scores = stored.embeddings @ query
        best = np.argsort(-scores)[:3]
        own = rows[3 * number : 3 * number + 3]
        assert [row["path"] for row in own] == [stored.names[place] for place in best]
        assert [row["rank"] for row in own] == [1, 2, 3]
        assert_equal_to_rounding([row["score"] for row in own], scores[best], WIDEST, terms=1)
    assert rows[6]["path"] == image
    assert_equal_to_rounding(rows[6]["score"], 1, WIDEST)
    plain = run(capsys, "search", embedded, "--text", texts[0], "--top-k", 1)[1]
    assert plain == f"{texts[0]}\t1\t{rows[0]['score']:.4f}\t{rows[0]['path']}\n"


def test_search_refuses_another_model(embedded, model_dir, other_model_dir, capsys, tmp_path):
    code, out, err = run(capsys, "search", embedded, "--model", other_model_dir, "--text", "fox")
    assert (code, out) == (2, "") and "another model" in err and model_dir in err and other_model_dir in err
    # A copy of the model is the same model.
    for part in loaded(model_dir):
        part.save_pretrained(tmp_path)
    assert run(capsys, "search", embedded, "--model", tmp_path, "--text", "fox")[0] == 0


def test_what_is_wrong_is_said_before_anything_is_printed(embedded, pictures, capsys, tmp_path):
    (tmp_path / "font.txt").write_text("no font")
    (tmp_path / "table.csv").write_text("image,caption\n")
    no_picture = "expected the file of one picture (such as .jpg .jpeg .jfif .png)"
    for words, message in [
        (["--text", "fox", "--output", tmp_path / "a.png", "--font", tmp_path / "font.txt"], "TrueType"),
        (["--text", "fox", "--output", tmp_path / "a.png", "--font", tmp_path / "gone.ttf"], "gone.ttf"),
        (["--image", tmp_path / "table.csv"], no_picture),
        (
            ["--image", "a red bat"],
            "a red bat: there is no such file or folder. Expected: the file of a picture; --text",
        ),
        (["--text", pictures / "blue.jpg"], "that is a file, whose name would be taken for words: "),
        (["--text", "fox", "--image", tmp_path / "gone.jpg"], "gone.jpg: there is no such file or folder"),
        (["--text", "fox", "--image", pictures], f"--image {pictures} is a folder: expected the file of one picture"),
    ]:
        code, out, err = run(capsys, "search", embedded, *words)
        assert (code, out) == (2, "") and message in err and "Errno" not in err and err.count("\n") == 1, err


def test_files_that_are_no_embeddings(embedded, capsys, tmp_path):
    def refused(name, message):
        code, out, err = run(capsys, "search", tmp_path / name, "--text", "fox")
        assert (code, out) == (2, "") and message in err, err

    refused("gone.npz", "there is no such file or folder")
    (tmp_path / "x.csv").touch()
    refused("x.csv", ".parquet or .npz")
    (tmp_path / "cut.npz").write_bytes(embedded.read_bytes()[:500])
    refused("cut.npz", "damaged")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    refused("foreign.npz", "no file of embeddings")
    np.savez(tmp_path / "pickled.npz", metadata=np.array({"kind": "path"}, dtype=object), allow_pickle=True)
    refused("pickled.npz", "allow_pickle=False")
    with np.load(embedded) as arrays:
        stored = dict(arrays)
    np.savez(tmp_path / "long.npz", **{**stored, "embedding": stored["embedding"] * 2})
    refused("long.npz", "not of unit length")
    np.savez(tmp_path / "short.npz", **{**stored, "embedding": stored["embedding"][1:]})
    refused("short.npz", "for 7")


def test_the_contact_sheet_shows_the_hits_in_order(embedded, pictures, capsys, tmp_path):
    sheet = tmp_path / "sheet.png"
    argv = ["search", embedded, "--image", pictures / "blue.jpg", "--text", "a fox", "--top-k", 7, "--json"]
    code, out, err = run(capsys, *argv, "--output", sheet)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and str(sheet) in err
    pixels = np.asarray(Image.open(sheet).convert("RGB")).astype(int)

    def first_seen(colour):
        """(row, column) of the topmost pixel of a colour; JPEG and WebP move it a little."""
        places = np.argwhere(np.abs(pixels - colour).max(axis=-1) <= 8)
        assert len(places) > 10_000, "a thumbnail of a plain colour is 208 x 156 pixels"
        return places[0]

    rank = {row["path"]: row["rank"] for row in rows[:7]}
    ranks = {name: rank[str(pictures / name)] for name in COLOURS}
    tops = {name: tuple(first_seen(colour)) for name, colour in COLOURS.items()}
    by_rank = sorted(COLOURS, key=ranks.get)
    same_row = [name for name in by_rank if ranks[name] <= 5]
    assert [tops[name][1] for name in same_row] == sorted(tops[name][1] for name in same_row)
    assert all(tops[name][0] > max(tops[other][0] for other in same_row) for name in by_rank if ranks[name] > 5)


def test_a_missing_picture_has_a_placeholder(embedded, pictures, capsys, tmp_path, monkeypatch):
    hits = [("nowhere/gone.png",), (str(pictures / "a/red.png"),), (str(pictures / BROKEN[0]),)]
    found = [[type("Hit", (), {"rank": n + 1, "score": 0.5, "name": name})() for n, (name,) in enumerate(hits)]]
    sheet, absent = contact_sheet([("a query that is long " * 20, None)], found, "of 3 pictures")
    assert absent == 2
    whole, none_absent = contact_sheet([("a query that is long " * 20, None)], [found[0][1:2] * 3], "of 3 pictures")
    assert none_absent == 0 and whole.size == sheet.size
    red = np.abs(np.asarray(sheet).astype(int) - COLOURS["a/red.png"]).max(axis=-1) <= 8
    three = np.abs(np.asarray(whole).astype(int) - COLOURS["a/red.png"]).max(axis=-1) <= 8
    assert 3 * red.sum() == three.sum() > 0
    # An embeddings file whose pictures have moved: the list is printed and the sheet drawn all the same.
    with np.load(embedded) as arrays:
        stored = dict(arrays)
    moved = np.array([f"moved{name}" for name in stored["path"].tolist()])
    np.savez(tmp_path / "moved.npz", **{**stored, "path": moved})
    argv = ["search", tmp_path / "moved.npz", "--text", "fox", "--top-k", 2, "--output", tmp_path / "sheet.jpg"]
    code, out, err = run(capsys, *argv)
    assert code == 0 and out.count("\n") == 2 and "2 pictures of the sheet could not be read" in err
    assert Image.open(tmp_path / "sheet.jpg").format == "JPEG"


def test_the_page_shows_the_hits_in_order_and_escapes_what_data_say(embedded, pictures, capsys, tmp_path):
    page = tmp_path / "sheet.html"
    argv = ["search", embedded, "--text", "<script>alert(1)</script>", "--image", pictures / "blue.jpg", "--top-k", 3]
    code, out, err = run(capsys, *argv, "--output", page)
    assert code == 0 and f"{page}: page" in err
    text = page.read_text(encoding="utf8")
    assert "<script" not in text and "&lt;script&gt;alert(1)" in text and "http" not in text.replace("http-equiv", "")
    names = [line.split("\t")[-1] for line in out.splitlines()]
    assert re.findall(r'title="([^"]+)"', text) == [html.escape(name) for name in names]
    assert text.count('src="data:image/jpeg;base64,') == len(names) + 1  # and the picture that was asked with
    assert run(capsys, *argv, "--output", page)[0] == 2, "a page that is there stays"
