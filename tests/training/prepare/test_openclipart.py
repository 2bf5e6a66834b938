"""Drawings of strangers with their own words: what becomes of a dozen files, good and bad."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from tests.training.prepare.small_data import picture
from training.data.records import BadSample
from training.data.sources import open_data_set
from training.prepare import openclipart
from training.prepare.sources.clip_art import caption
from training.prepare.steps.svg import Drawer

pytest.importorskip("resvg_py", reason='needs the extra "demo"')

NAMESPACES = (
    'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    'xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"'
)
RED = '<rect width="50%" height="100%" fill="#f00"/>'


def svg(content=RED, size='width="40" height="20"', title="", description="", keywords=(), licence="", head=""):
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    work = f"<dc:title>{title}</dc:title><dc:description>{description}</dc:description>"
    work += f"<dc:subject><rdf:Bag>{items}</rdf:Bag></dc:subject>"
    work += "<dc:creator><cc:Agent><dc:title>Ann</dc:title></cc:Agent></dc:creator>"
    work += f'<cc:license rdf:resource="{licence}"/>' if licence else ""
    about = f"<metadata><rdf:RDF><cc:Work>{work}</cc:Work></rdf:RDF></metadata>"
    return f"{head}<svg {NAMESPACES} {size}>{about}{content}</svg>"


def href(name):
    return f'<image width="40" height="20" xlink:href="{name}"/>'


def bomb():
    """A thousand million letters out of nine lines."""
    entities = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    return f'<!DOCTYPE svg [<!ENTITY e0 "aaaaaaaaaa">{entities}]>'


HAT = ("hat", " ", "baseball  cap")
FREE = "http://web.resource.org/cc/PublicDomain"
GOOD = {
    "a/cap.svg": svg(title="Baseball Cap", description="A blue cap.", keywords=HAT, licence=FREE),
    "a/points.svg": svg(title="points", size='width="36pt" height="18pt"'),
    "b/long.svg": svg(title="long", size='width="1e9" height="1"'),
    "b/latin.svg": svg(title="café", head='<?xml version="1.0" encoding="ISO-8859-1"?>').encode("latin-1"),
    "b/plain.svg": f"<svg {NAMESPACES} width='9' height='9'><title>plain title</title>{RED}</svg>",
    "inside.svg": svg(title="inside", content=href("data:image/jpeg;base64," + base64.b64encode(picture(0)).decode())),
}  # fmt: skip
BAD = {
    "c/agent.svg": (svg(), "no-caption"),
    "c/bomb.svg": (svg(title="&e9;", head=bomb()), "bad-xml"),
    "c/broken.svg": (svg(title="x")[:-20], "bad-xml"),
    "c/copyleft.svg": (svg(title="x", licence="http://creativecommons.org/licenses/GPL/2.0/"), "other-licence"),
    "c/deep.svg": (svg(title="x", content="<g>" * 50_000 + "</g>" * 50_000), "crashed"),
    "c/elsewhere.svg": (svg(title="x", content=href("https://example.com/a.png")), "external-picture"),
    "c/file.svg": (svg(title="x", content=href("C:\\pictures\\a.png")), "external-picture"),
    "c/nothing.svg": ("<html/>", "not-drawn"),
}


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_files_become_pairs_or_are_named(tmp_path, capsys):
    source, output = tmp_path / "svg", tmp_path / "out"
    write(source, GOOD | {name: content for name, (content, _) in BAD.items()})
    (source / "link.svg").symlink_to(source / "inside.svg")
    words = ["--source", str(source), "--output-dir", str(output), "--side", "64", "--samples-per-shard", "5"]
    assert openclipart.main(words) == 0
    assert "14 in = 6 out + 8 rejected" in capsys.readouterr().out
    problems = [json.loads(line) for line in (output / "reports/pack.problems.jsonl").read_text().splitlines()]
    assert {one["path"]: one["reason"] for one in problems} == {name: reason for name, (_, reason) in BAD.items()}
    data = open_data_set(output)
    found = {}
    for unit in data.units:
        reader = data.open(unit)
        for number in range(unit.samples):
            members = reader.read(number)
            record = json.loads(members["json"])
            found[record["path"]] = members["txt"].decode(), record["tags"], Image.open(io.BytesIO(members["png"]))
    assert found.keys() == GOOD.keys()
    assert found["a/cap.svg"][:2] == ("Baseball Cap. A blue cap.", ["hat", "baseball cap"])
    assert found["b/latin.svg"][0] == "café" and found["b/plain.svg"][0] == "plain title"
    assert {name: drawn.size for name, (*_, drawn) in found.items()} == {
        "a/cap.svg": (64, 32), "a/points.svg": (64, 32), "b/long.svg": (64, 1), "b/latin.svg": (64, 32),
        "b/plain.svg": (64, 64), "inside.svg": (64, 32),
    }  # fmt: skip
    drawn = np.asarray(found["a/points.svg"][2].convert("RGB"))
    assert (drawn[:, :30] == (255, 0, 0)).all() and (drawn[:, 34:] == 255).all()


def test_no_file_of_this_machine_is_drawn(tmp_path):
    """An SVG inside of an SVG names a picture that is there, which resvg alone would read."""
    (tmp_path / "secret.png").write_bytes(solid())
    inner = base64.b64encode(svg(href(str(tmp_path / "secret.png"))).encode()).decode()
    with Drawer(40) as drawer:
        drawn = drawer.draw(svg(href(f"data:image/svg+xml;base64,{inner}"), title="x").encode())
        assert np.asarray(Image.open(io.BytesIO(drawn.png)).convert("L")).min() == 255
        with pytest.raises(BadSample, match=r"16777217 bytes, at most"):
            drawer.draw(b" " * (16 << 20) + b"x")


def solid():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (0, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_file_that_takes_too_long_costs_itself_alone():
    noise = '<feTurbulence baseFrequency="0.1" numOctaves="1000000"/>'
    noise = f'<filter id="f" x="0" y="0" width="1" height="1">{noise}</filter>'
    endless = svg(f'{noise}<rect width="40" height="20" filter="url(#f)"/>', title="x").encode()
    with Drawer(400, seconds=0.5) as drawer:
        with pytest.raises(BadSample, match="too-slow-to-draw"):
            drawer.draw(endless)
        drawer.seconds = 20
        assert drawer.draw(GOOD["a/cap.svg"].encode()).title == "Baseball Cap"


@pytest.mark.parametrize(
    ("title", "description", "expected"),
    [("A", "", "A"), ("", "B", "B"), ("A", "a", "A"), ("A.", "B", "A. B"), ("A", "B", "A. B"), ("", "", "")],
)
def test_captions(title, description, expected):
    assert caption(title, description) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "{empty}"], r"no \*\.svg in it"),
        (["--source", "{empty}/none"], "there is no such file or folder"),
        (["--source", "{empty}", "--side", "8"], "--side: expected 16 to 4096, got 8"),
    ],
)
def test_mistakes_are_said(tmp_path, capsys, words, message):
    words = [word.format(empty=tmp_path) for word in words]
    assert openclipart.main([*words, "--output-dir", str(tmp_path / "out")]) == 2
    assert re.search(message, capsys.readouterr().err)
