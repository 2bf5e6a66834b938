"""The page that classifies inside the browser, opened from disk in one, against the model in torch."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pyramidclip_command
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.tokenization_pyramidclip import clean_text
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES, classify
from tests.pyramidclip_hf.commands.plain import save_tiny_model
from training import static_page

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PACKAGES = Path(sys.prefix) / "node_modules"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript", reason='needs pip install "pyramidclip-hf[export]"')
    folder = tmp_path_factory.mktemp("static")
    save_tiny_model(folder / "model", 0)
    words = ["export", "--model", str(folder / "model"), "--output", str(folder / "onnx"), "--quiet"]
    assert pyramidclip_command.main(words) == 0
    return folder


@pytest.mark.slow
def test_what_is_missing_is_named(exported, tmp_path, capsys):
    words = ["--model", str(exported / "onnx"), "--packages", str(tmp_path), "--output-dir", str(tmp_path / "page")]
    assert static_page.main(words) == 2
    assert "ort.wasm.bundle.min.mjs; install both packages with npm first" in capsys.readouterr().err
    assert static_page.main([*words[:1], str(exported / "model"), *words[2:]]) == 2
    assert not (tmp_path / "page").exists()


@pytest.fixture(scope="module")
def page(exported):
    """The page from disk in a browser; it asks nobody for anything."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which `make test-app` has")
    if not PACKAGES.is_dir():
        pytest.skip(f"needs two packages of npm in {PACKAGES}, where `make test-app` puts them")
    words = ["--model", str(exported / "onnx"), "--packages", str(PACKAGES), "--output-dir", str(exported / "page")]
    assert static_page.main(words) == 0
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, f"expected one of {', '.join(BROWSERS)} on the PATH, as in apt-get install chromium"
    asked = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(180_000)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"file://{exported / 'page' / 'index.html'}")
        page.wait_for_function("!document.getElementById('classify').disabled")
        yield page
        browser.close()
    assert asked and {url.split(":")[0] for url in asked} <= {"file", "data", "blob"}


def answer(page, picture, labels, templates=False):
    page.set_input_files("#file", picture)
    page.fill("#labels", labels)
    page.set_checked("#templates", templates)
    page.click("#classify")
    page.wait_for_function("!document.getElementById('classify').disabled")
    rows = page.locator("#bars li").all()
    shares = page.locator("#bars [data-share]").all()
    return [
        (row.locator("span").first.inner_text(), float(share.get_attribute("data-share")))
        for row, share in zip(rows, shares, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(160, 90), (37, 61), (32, 32), (20, 500)])
@pytest.mark.parametrize("templates", [False, True])
def test_it_answers_as_the_model_does(exported, page, tmp_path, size, templates):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    labels = ["a cat", "A Red  Bat &amp; “friends”", "日本語 3d", "it's <b>bold</b> ﬁne"]
    loaded = load_model(str(exported / "model"))
    prompts = IMAGENET_TEMPLATES if templates else ("{}",)
    names = [" ".join(label.split()) for label in labels]
    wanted = classify(loaded.model, loaded.processor, [str(tmp_path / "noise.png")], names, prompts)[0]
    found = answer(page, tmp_path / "noise.png", "\n".join(labels), templates)
    assert dict(found) == pytest.approx({one.name: one.probability for one in wanted}, abs=2e-3)


@pytest.mark.slow
def test_its_tokens_are_the_models(page):
    """The texts that the reference was asked for; what only ftfy repairs, a wrong encoding, is left out."""
    golden = json.loads((CHECKOUT / "tests/fixtures/tokenizer_golden.json").read_text(encoding="utf8"))
    cleaned = page.evaluate("texts => texts.map(cleaned)", [one["text"] for one in golden])
    differing = [one["text"] for one, words in zip(golden, cleaned) if clean_text(one["text"]) != words]
    assert all("mojibake" in text for text in differing) and len(differing) <= 1, differing
    assert "texts in a wrong encoding (â€™ for ’) are not repaired" in page.locator(".note").inner_text()
    assert clean_text("itâ€™s") == "it's" and page.evaluate("cleaned('itâ€™s')") != "it's"


@pytest.mark.slow
def test_bad_input_is_a_sentence(page, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    for picture, labels, sentence in (
        ("words.png", "a", "This is no picture"),
        ("red.png", "", "There are no labels yet"),
        ("red.png", "a\n\nb", "Line 2 of the labels is empty"),
        ("red.png", "a\na", "stands there twice"),
        ("red.png", "x" * 501, "more than 500 characters"),
        ("red.png", "\n".join(map(str, range(1001))), "the page takes 1000"),
    ):
        assert answer(page, tmp_path / picture, labels) == []
        assert re.search(sentence, page.locator("#said").inner_text())
