"""The report page, parsed back: what is marked right, what is bold, and that it needs nothing from outside."""

import base64
import html.parser
import io
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image

from training.data.records import Sample
from training.evaluation.classification import classification_metrics
from training.evaluation.retrieval import retrieval_metrics
from training.reports.demo_page import ReportedDemo, ReportedRun, write_report
from training.reports.plots import loss_curves, loss_floor

QUERIES, CLASSES = 12, 7


def sample(number, **fields):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "JPEG")
    texts = {"caption": f"caption <{number}> & more", "summary": f"summary {number}", "tags": [f"tag {number}"]}
    return Sample(key=f"k{number}", image=file.getvalue(), image_suffix="jpg", **{**texts, **fields})


def reported_run(name, title, noise):
    draw = torch.Generator().manual_seed(len(name))
    vectors = torch.nn.functional.normalize(torch.randn(QUERIES, 6, generator=draw), dim=1)
    texts = torch.nn.functional.normalize(vectors + noise * torch.randn(QUERIES, 6, generator=draw), dim=1)
    labels = torch.arange(2 * CLASSES) % CLASSES
    object_scores = torch.nn.functional.one_hot(labels, CLASSES) + noise * torch.randn(
        2 * CLASSES, CLASSES, generator=draw
    )
    log = [
        {"step": step, "loss/total": 3.0 - step / 50, "loss/global_caption": 3.0 - step / 50, "loss/roi_tags": 2.0}
        | {"validation/global_caption/text_to_image_R@1": step / 100}
        for step in (10, 20, 30)
    ]
    return ReportedRun(
        name=name,
        title=title,
        objective="global_caption 1",
        smoothing=0.2 if name == "pyramid" else 0.0,
        steps=30,
        samples=30 * 16,
        seconds=12.5,
        log=log,
        retrieval={"global_caption": retrieval_metrics(vectors, texts)},
        zero_shot=classification_metrics(object_scores, labels),
        caption_scores=texts @ vectors.T,
        object_scores=object_scores,
    )


def make_demo():
    return ReportedDemo(
        runs=[
            reported_run("pyramid", "Pyramid", 0.3),
            reported_run("clip", "CLIP, same samples", 1.0),
            reported_run("clip_same_time", "CLIP, same time", 0.8),
        ],
        scenes=[sample(i) for i in range(3)],
        validation=[sample(i) for i in range(QUERIES)],
        objects=[sample(i) for i in range(2 * CLASSES)],
        labels=[i % CLASSES for i in range(2 * CLASSES)],
        class_names=[f"name {i}" for i in range(CLASSES)],
        template_count=80,
        scale=10.0,
        batch_size=16,
        parameters=123456,
        training_scenes=3,
        attribution="Artwork by OpenMoji, CC BY-SA 4.0",
        reload={"equal": True, "numbers": 999, "pictures": 12, "texts": 12, "training_process": 1, "loading_process": 2}
        | {"folder": "runs/demo/pyramid/final", "different": 0, "largest": 0.0},
        stages=[("drawing the scenes", 1.25, 1.5), ("training", 2.5, 5.0)],
        setup="Two processes.",
        commands="python -m training.demo",
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(make_demo(), path)
    return path.read_text(encoding="utf-8")


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, of a page; every opened element must be closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "br", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def with_class(self, *names):
        return [attrs for _, attrs in self.tags if set(names) <= set((attrs.get("class") or "").split())]


def test_the_page_says_which_targets_are_softened(written):
    text = " ".join("".join(Page(written).texts).split())
    assert (
        "Pyramid: global_caption 1, targets softened by 0.2; CLIP, same samples: global_caption 1, hard targets" in text
    )
    assert "even a perfect one keeps 1.04" in text  # the entropy of 0.8 and fifteen times 0.2 / 15
    assert "plain CLIP" not in text


def test_page_is_self_contained_and_well_formed(written):
    page = Page(written)
    assert page.open == []
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    assert pictures and all(source.startswith("data:image/") for source in pictures)
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]
    text = " ".join(page.texts)
    assert "caption <3> & more" in text  # escaped in the page
    assert text.count("Artwork by OpenMoji, CC BY-SA 4.0") == 2
    assert "ln 16 = 2.77" in text and "123,456 parameters" in text and "3.8" in text
    for source in pictures:
        kind, data = re.match(r"data:image/([a-z+]+);base64,(.*)", source).groups()
        if kind == "svg+xml":
            ElementTree.fromstring(base64.b64decode(data))
        else:
            Image.open(io.BytesIO(base64.b64decode(data))).verify()


def test_right_and_wrong_are_marked(written):
    """Eight queries, the first five pictures of the pyramid and of CLIP, and the sought one beside them."""
    page, expected = Page(written), 0
    for run in make_demo().runs[:2]:
        for query in range(8):
            expected += query in run.caption_scores[query].topk(5).indices.tolist()
    assert 0 < expected < 8 * 2
    assert len(page.with_class("hit", "right")) == expected + 8
    assert len(page.with_class("hit", "wrong")) == 8 * 2 * 5 - expected


def test_aims_that_are_missed_are_said_to_be(tmp_path):
    demo = make_demo()
    demo.runs[0].zero_shot = {**demo.runs[0].zero_shot, "top_1": 0.01}
    demo.reload["equal"], demo.reload["different"] = False, 3
    write_report(demo, tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.with_class("missed")) == 4  # 50 x chance is more than everything with 12 pictures
    assert "3 of 999 numbers differ" in text


def test_equal_results_give_equal_bytes(written, tmp_path):
    write_report(make_demo(), tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == written


def test_loss_floor_is_the_entropy_of_the_target():
    target = torch.full((16,), 0.2 / 15)
    target[3] = 0.8
    assert loss_floor(0.2, 16) == pytest.approx(float(torch.distributions.Categorical(target).entropy()))
    assert loss_floor(0.0, 16) == 0.0
    assert loss_curves([1, 2], {"a": [3.0, 2.0]}, math.log(16), 0.0).startswith("data:image/svg+xml;base64,")
