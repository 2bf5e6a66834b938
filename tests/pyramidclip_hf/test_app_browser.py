"""The page of `pyramidclip app` in a real browser, as a person uses it (`make test-app`); with pictures in runs/."""

import base64
import json
import re
import shutil

import pytest
from PIL import Image

from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES, classify
from tests.pyramidclip_hf.commands.plain import loaded, plain_image_embedding, plain_text_embeddings
from tests.pyramidclip_hf.page import CHECKOUT, COLOURS, make_folder, running_page

pytestmark = [pytest.mark.slow, pytest.mark.loopback]
SHOTS = CHECKOUT / "runs" / "app"
WINDOWS = {"desktop": (1280, 900, "light"), "phone": (390, 844, "dark")}
LABELS = ["a cat", "a dog", "a red bat"]  # of the file that the page begins with
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def address(folder, tmp_path_factory):
    pytest.importorskip("gradio", reason="needs Gradio and Playwright, which `make test-app` has")
    words = ["--compare", folder / "two", "--embeddings", folder / "one.npz", folder / "two.npz"]
    words += ["--examples", folder / "pictures", "--labels-file", folder / "labels.txt"]
    with running_page(folder, *words, home=tmp_path_factory.mktemp("home")) as (process, address, errors):
        yield address
        assert process.poll() is None and not [line for line in errors if "Traceback" in line], errors


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright, which `make test-app` has")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path, f"expected one of {', '.join(BROWSERS)} on the PATH, as in apt-get install chromium"
    with playwright.sync_playwright() as started:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", *camera])
        yield browser
        browser.close()


@pytest.fixture(params=WINDOWS)
def page(request, browser, address):
    """The page in a window; at the end nothing was asked of another host, and no script failed."""
    width, height, scheme = WINDOWS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.size, asked, failed = request.param, [], []
    page.on("request", lambda one: asked.append(one.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#classify")
    yield page
    hosts = {url.split("/")[2] for url in asked if url.startswith(("http", "ws"))}
    assert hosts == {address.split("/")[2]} and not failed, (hosts, failed)
    context.close()


def shot(page, name):
    """A picture of the whole page; nothing is wider than the window."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.screenshot(path=SHOTS / f"{page.size}-{name}.png", full_page=True)


def give(page, path):
    page.set_input_files("#picture input[type=file]", path)
    page.wait_for_selector("#picture img")


def bars(page, place="#bars"):
    """(label, percent) from the top."""
    page.wait_for_selector(f"{place} dd")
    rows = page.locator(f"{place} dl").all()
    return [(row.locator("dt").inner_text(), int(row.locator("dd").inner_text().strip("%"))) for row in rows]


def wanted_bars(folder, model, name, labels, templates=("{}",)):
    picture = Image.open(folder / "pictures" / name).convert("RGB")
    found = classify(*loaded(str(folder / model)), [picture], labels, templates)[0]
    return [(one.name, one.probability) for one in found]


def same(shown, wanted):
    assert [label for label, _ in shown] == [label for label, _ in wanted]
    assert [percent for _, percent in shown] == pytest.approx([100 * share for _, share in wanted], abs=0.51)


def captions(page, place):
    page.wait_for_selector(f"{place} .caption-label")
    return [
        re.split(r"[. ]+", text, maxsplit=1)[1] for text in page.locator(f"{place} .caption-label").all_inner_texts()
    ]


def wanted_captions(folder, model, query, count):
    paths = [folder / "pictures" / f"{colour}.png" for colour in COLOURS]
    scores = {path.name: float(plain_image_embedding(str(folder / model), path) @ query) for path in paths}
    best = sorted(scores, key=scores.get, reverse=True)[:count]
    return [f"{scores[name]:.3f} {name}" for name in best]


def open_part(page, name):
    page.get_by_role("tab", name=name).click()


def test_classify(page, folder):
    give(page, folder / "pictures" / "red.png")
    labels = ["a cat", "<b>a dog</b>", "a red bat"]
    page.fill("#labels textarea", "\n".join(labels))
    page.get_by_label("In CLIP's 80 sentences").uncheck()
    page.click("#classify")
    same(bars(page), wanted_bars(folder, "one", "red.png", labels))
    shot(page, "classify")
    # Another picture takes the answer away.
    page.get_by_label("Remove Image").click()
    page.wait_for_selector("#bars dd", state="detached")


def test_an_example_is_one_click(page, folder):
    page.locator("button.gallery-item").nth(sorted(COLOURS).index("green")).click()
    page.wait_for_selector("#picture img")
    page.get_by_label("In CLIP's 80 sentences").uncheck()
    page.click("#classify")
    same(bars(page), wanted_bars(folder, "one", "green.png", LABELS))


def copied(page, path):
    """Puts a picture into the clipboard, as another program does."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    data = base64.b64encode(path.read_bytes()).decode()
    page.evaluate(
        """async (data) => {
            const picture = new Blob([Uint8Array.from(atob(data), (one) => one.charCodeAt())], {type: "image/png"});
            await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]);
        }""",
        data,
    )


def test_a_picture_is_pasted(page, folder):
    """By the button, then by Ctrl-V in its place; words are still pasted where words go."""
    page.get_by_label("In CLIP's 80 sentences").uncheck()
    copied(page, folder / "pictures" / "yellow.png")
    page.get_by_label("Paste from clipboard").click()
    page.wait_for_selector("#picture img")
    page.click("#classify")
    same(bars(page), wanted_bars(folder, "one", "yellow.png", LABELS))
    copied(page, folder / "pictures" / "purple.png")
    page.keyboard.press("Control+v")
    page.wait_for_selector("#bars dd", state="detached")
    page.wait_for_selector("#picture img")
    page.click("#classify")
    same(bars(page), wanted_bars(folder, "one", "purple.png", LABELS))
    page.evaluate("navigator.clipboard.writeText('a fox')")
    page.fill("#labels textarea", "")
    page.focus("#labels textarea")
    page.keyboard.press("Control+v")
    assert page.input_value("#labels textarea") == "a fox" and page.locator("#picture img").count() == 1


def test_a_picture_is_taken_with_the_camera(page):
    """Chromium's own camera, which shows a green picture with a clock."""
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("document.querySelector('#picture video')?.videoWidth > 0")
    shot(page, "camera")
    page.get_by_label("capture photo").click()
    page.wait_for_selector("#picture img")
    page.get_by_label("In CLIP's 80 sentences").uncheck()
    page.click("#classify")
    assert sorted(label for label, _ in bars(page)) == sorted(LABELS)
    page.wait_for_selector("#picture video", state="detached")


def tab_to(page, selector):
    """Presses Tab until the element has the focus."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"Tab does not reach {selector}")


def test_by_keyboard_alone(page, folder):
    """Picture, labels, check box and button by Tab, Enter and Space; arrows turn to another part."""
    tab_to(page, "#picture button")
    opened = []
    page.on("filechooser", lambda chooser: opened.append(chooser))
    for _ in range(30):  # a slow machine draws the button before it does anything
        page.keyboard.press("Enter")
        page.wait_for_timeout(1000)
        if opened:
            break
    opened[0].set_files(folder / "pictures" / "blue.png")
    page.wait_for_selector("#picture img")
    tab_to(page, "#labels textarea")
    page.keyboard.press("Control+a")
    page.keyboard.insert_text("a red bat\na bear")
    tab_to(page, "input[type=checkbox]")
    page.keyboard.press("Space")
    tab_to(page, "#classify")
    page.keyboard.press("Enter")
    same(bars(page), wanted_bars(folder, "one", "blue.png", ["a red bat", "a bear"]))
    page.reload()
    page.wait_for_selector("#classify")
    tab_to(page, "button.gallery-item")
    page.keyboard.press("Enter")
    page.wait_for_selector("#picture img")
    tab_to(page, "[role=tab][aria-selected=true]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#heat")
    assert page.evaluate("document.activeElement.innerText") == "Why"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#compare")


def test_every_control_has_a_name(page):
    """What a screen reader reads: no button, field or picture without words."""
    nameless = """() => [...document.querySelectorAll('button, input, textarea, img, [role=tab]')].filter(e => {
        if (e.type === 'file' || e.matches('button[aria-label] img')) return false;
        if (!e.checkVisibility() || e.closest('[aria-hidden=true]')) return false;
        const named = e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title || e.alt
            || e.innerText?.trim() || e.closest('label')?.innerText?.trim() || e.labels?.[0]?.innerText
            || e.getAttribute('placeholder') || e.querySelector('img[alt]')?.alt;
        return !named;
    }).map(e => e.outerHTML.slice(0, 200))"""
    for part in ("Classify", "Why", "Search", "Compare"):
        open_part(page, part)
        page.wait_for_timeout(300)
        assert page.evaluate(nameless) == []


def test_why(page, folder):
    give(page, folder / "pictures" / "red.png")
    open_part(page, "Why")
    page.click("#text input")
    page.keyboard.type("a red bat")
    page.keyboard.press("Enter")
    page.click("#heat")
    page.wait_for_selector("#overlay img")
    said = page.locator("#told p").first.inner_text()
    query = plain_text_embeddings(str(folder / "one"), ["a red bat"])[0]
    score = plain_image_embedding(str(folder / "one"), folder / "pictures" / "red.png") @ query
    assert said.startswith("The picture's score for “a red bat”:")
    assert float(said.rpartition(" ")[2]) == pytest.approx(score, abs=1e-3)
    shot(page, "why")
    page.click("#regions")
    page.wait_for_selector("#told li")
    assert {text.split()[0] for text in page.locator("#told li").all_inner_texts()} == {"part0", "part1"}
    shot(page, "regions")
    give_another = folder / "pictures" / "green.png"
    page.get_by_label("Remove Image").click()
    give(page, give_another)
    page.click("#regions")
    page.wait_for_selector(".said [role=alert]")
    assert "This picture comes without regions" in page.locator(".said [role=alert]:visible").inner_text()


def test_search(page, folder):
    open_part(page, "Search")
    page.locator("#query").locator("input, textarea").fill("a red bat")
    page.keyboard.press("Enter")
    query = plain_text_embeddings(str(folder / "one"), ["a red bat"])[0]
    assert captions(page, "#hits") == wanted_captions(folder, "one", query, 6)
    shot(page, "search")
    give(page, folder / "pictures" / "blue.png")
    page.click("#by-picture")
    page.wait_for_function("document.querySelector('#hits .caption-label').innerText.endsWith('1.000 blue.png')")
    query = plain_image_embedding(str(folder / "one"), folder / "pictures" / "blue.png")
    assert captions(page, "#hits") == wanted_captions(folder, "one", query, 6)


def test_compare(page, folder):
    give(page, folder / "pictures" / "red.png")
    page.get_by_label("In CLIP's 80 sentences").uncheck()
    open_part(page, "Compare")
    page.click("#compare")
    page.locator("#both-query").locator("input, textarea").fill("a cat")
    page.click("#compare-search")
    for number, model in enumerate(("one", "two")):
        same(bars(page, f"#bars-{number}"), wanted_bars(folder, model, "red.png", LABELS))
        query = plain_text_embeddings(str(folder / model), ["a cat"])[0]
        assert captions(page, f"#hits-{number}") == wanted_captions(folder, model, query, 6)
    shot(page, "compare")


def test_what_is_wrong_is_a_sentence(page, folder, tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    (tmp_path / "large.jpg").write_bytes(bytes(21 << 20))
    Image.new("1", (14_200, 14_200)).save(tmp_path / "huge.png")  # 202 megapixels
    for name, sentence in (("words.png", "This is no picture"), ("huge.png", "This picture is too large")):
        page.set_input_files("#picture input[type=file]", tmp_path / name)
        page.wait_for_selector(f"[role=alert]:has-text('{sentence}')")
        if name == "words.png":
            shot(page, "broken")
        page.get_by_label("Remove Image").click()
        page.wait_for_selector("[role=alert]", state="detached")
    page.set_input_files("#picture input[type=file]", tmp_path / "large.jpg")
    page.wait_for_selector("text=exceed the maximum allowed size of 20")
    page.reload()
    page.wait_for_selector("#classify")
    page.click("#classify")
    page.wait_for_selector("[role=alert]:has-text('There is no picture yet')")
    give(page, folder / "pictures" / "red.png")
    many = "\n".join(f"label {number}" for number in range(10_000))
    fill = "(box, text) => { box.value = text; box.dispatchEvent(new Event('input', {bubbles: true})) }"
    for text, sentence in (
        (many, "These are 10,000 labels, and the page takes 1,000"),
        ("a\n\nb", "Line 2 of the labels is empty"),
        ("x" * 10_000, "The label on line 1 has 10,000 characters"),
        ("", "There are no labels yet"),
    ):
        page.eval_on_selector("#labels textarea", fill, text)
        page.click("#classify")
        page.wait_for_selector(f"[role=alert]:has-text('{sentence}')")


def test_two_people_at_once(browser, address, folder):
    """Each gets the answer to what each asked."""
    pages = [browser.new_context().new_page() for _ in range(2)]
    for page, colour in zip(pages, COLOURS):
        page.set_default_timeout(120_000)
        page.goto(address)
        page.wait_for_selector("#classify")
        give(page, folder / "pictures" / f"{colour}.png")
    for page in pages:
        page.click("#classify")
    for page, colour in zip(pages, COLOURS):
        same(bars(page), wanted_bars(folder, "one", f"{colour}.png", LABELS, IMAGENET_TEMPLATES))
        page.context.close()


def test_colours_can_be_told_apart(page):
    """Text against what is behind it: at least 4.5 to 1, as WCAG wants it."""
    script = (CHECKOUT / "tests" / "pyramidclip_hf" / "contrast.js").read_text(encoding="utf8")
    for part in ("Classify", "Why", "Search", "Compare"):
        open_part(page, part)
        page.wait_for_timeout(500)
        faint = page.evaluate(script)
        assert faint == [], json.dumps(faint, indent=1)
