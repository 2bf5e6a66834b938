"""What the page of `pyramidclip app` answers, compared with the library called by hand; and its sentences."""

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import pyramidclip_command
from pyramidclip_hf import app
from pyramidclip_hf.app import (
    MAX_HITS,
    Examples,
    Regions,
    TriedModel,
    checked_text,
    distribute_embeddings,
    labels_of,
    open_picture,
    read_regions,
    titles_of,
    wall,
)
from pyramidclip_hf.explain import explain_image, explain_regions
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.zero_shot import IMAGENET_TEMPLATES, classify
from tests.pyramidclip_hf.commands.plain import plain_image_embedding, plain_text_embeddings, save_tiny_model

LABELS = ["cat", "a red bat", "<b>dog</b>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, six pictures, and the pictures' embeddings by either model."""
    folder = tmp_path_factory.mktemp("app")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(6):
        pixels = rng.integers(0, 255, (48 + 8 * number, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number}.png")
    for seed, name in enumerate(("one", "two")):
        save_tiny_model(folder / name, seed)
        words = ["embed", "--model", str(folder / name), str(folder / "pictures"), "--quiet"]
        assert pyramidclip_command.main([*words, "--output", str(folder / f"{name}.npz")]) == 0
    return folder


@pytest.fixture
def models(folder):
    return [TriedModel(load_model(str(folder / name)), name) for name in ("one", "two")]


@pytest.fixture(scope="module")
def picture(folder):
    return Image.open(folder / "pictures" / "3.png").convert("RGB")


@pytest.mark.parametrize(("with_templates", "templates"), [(True, IMAGENET_TEMPLATES), (False, ("{}",))])
def test_classify_is_that_of_the_library(models, picture, with_templates, templates):
    loaded = models[0].loaded
    shares = []
    found = models[0].classify(picture, LABELS, with_templates, shares.append)
    wanted = classify(loaded.model, loaded.processor, [picture], LABELS, templates)[0]
    assert [one.name for one in found] == [one.name for one in wanted] and shares == [0.0]
    assert [one.probability for one in found] == pytest.approx([one.probability for one in wanted], abs=1e-6)


def test_labels_are_embedded_once(models, picture, monkeypatch):
    first = models[0].classify(picture, LABELS, False)
    monkeypatch.setattr(app, "class_embeddings", None)
    assert models[0].classify(picture, LABELS, False) == first
    with pytest.raises(TypeError):
        models[0].classify(picture, [*LABELS, "more"], False)


def test_many_labels_are_embedded_in_parts_with_progress(models, picture):
    labels = [f"label {number}" for number in range(40)]
    shares = []
    found = models[0].classify(picture, labels, False, shares.append)
    loaded = models[0].loaded
    wanted = classify(loaded.model, loaded.processor, [picture], labels, ("{}",))[0]
    assert shares == [0.0, 0.4, 0.8] and {one.name for one in found} == set(labels)
    assert {one.name: one.probability for one in found} == pytest.approx(
        {one.name: one.probability for one in wanted}, abs=1e-6
    )


def test_the_heat_map_is_that_of_the_library(models, picture):
    loaded = models[0].loaded
    why = models[0].explain(picture, "a red bat")
    wanted = explain_image(loaded.model, loaded.processor, picture, "a red bat")
    assert why.score == pytest.approx(wanted.score, abs=1e-6) and not why.parts
    assert np.abs(np.asarray(why.overlay, int) - np.asarray(wanted.overlay(picture), int)).max() <= 1


def test_a_large_picture_comes_back_smaller(models):
    why = models[0].explain(Image.new("RGB", (3000, 1500), "red"), "a red bat")
    assert why.overlay.size == (1024, 512)


def test_regions_are_those_of_the_library(models, picture, tmp_path):
    loaded = models[0].loaded
    width = loaded.model.config.vision_config.roi_feature_size
    features = np.random.default_rng(1).standard_normal((3, width)).astype(np.float16)
    boxes = [[0, 0, 0.5, 0.5], [0.2, 0.1, 0.9, 0.8], [0.5, 0.5, 1, 1]]
    listed = [{"box": box, "label": f"thing{n}", "attributes": ["red"]} for n, box in enumerate(boxes)]
    (tmp_path / "a.json").write_text(json.dumps({"regions": listed}))
    np.save(tmp_path / "a.roi.npy", features)
    picture.save(tmp_path / "a.png")
    regions = Examples.of([str(tmp_path / "a.png")]).regions_of(str(tmp_path / "a.png"))
    why = models[0].explain_regions(picture, regions, "a red bat")
    inputs = loaded.processor(regions=[(features, np.array(boxes))], return_tensors="pt")
    wanted = explain_regions(loaded.model, loaded.processor, inputs["roi_features"], "a red bat")
    assert dict(why.parts) == pytest.approx({f"red thing{n}": float(v) for n, v in enumerate(wanted.relevance)})
    assert [share for _, share in why.parts] == sorted((share for _, share in why.parts), reverse=True)
    assert why.score == pytest.approx(wanted.score)
    with pytest.raises(ValueError, match="These regions have 7 features each, and one reads"):
        models[0].explain_regions(picture, Regions(regions.boxes, regions.names, features[:, :7].astype(float)), "bat")


@pytest.mark.parametrize(
    ("description", "features"),
    [
        ("{", np.zeros((1, 4), np.float16)),
        ("[]", np.zeros((1, 4), np.float16)),
        ('{"regions": []}', np.zeros((0, 4), np.float16)),
        ('{"regions": [{"label": "a"}]}', np.zeros((1, 4), np.float16)),
        ('{"regions": [{"box": [0, 0, 1, 1]}]}', np.zeros((2, 4), np.float16)),
        ('{"regions": [{"box": [0, 0, 1, 1]}]}', np.zeros((1, 4), np.int8)),
        ('{"regions": [{"box": [0, 0, 1, 1]}]}', np.array([[object()]])),
        ('{"regions": [{"box": [0, 0, "x", 1]}]}', np.zeros((1, 4), np.float16)),
        ("[" * 100_000, np.zeros((1, 4), np.float16)),
    ],
)
def test_regions_of_another_form_are_one_sentence(description, features, tmp_path):
    (tmp_path / "a.json").write_text(description)
    np.save(tmp_path / "a.roi.npy", features, allow_pickle=True)
    with pytest.raises(ValueError, match="The regions cannot be read. Expected NAME.json") as refused:
        read_regions(str(tmp_path / "a.json"), str(tmp_path / "a.roi.npy"))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", ["words", "picture"])
def test_search_finds_what_plain_products_find(models, folder, kind):
    distribute_embeddings(models, [str(folder / "two.npz"), str(folder / "one.npz")])
    paths = sorted(str(path) for path in (folder / "pictures").iterdir())
    for model, name in zip(models, ("one", "two")):
        stored = np.stack([plain_image_embedding(str(folder / name), path) for path in paths])
        if kind == "words":
            query, given = plain_text_embeddings(str(folder / name), ["a red bat"])[0], "a red bat"
        else:
            query, given = stored[2], Image.open(paths[2]).convert("RGB")
        order = np.argsort(-(stored @ query))[:4]
        found = model.search(given, 4)
        assert [hit.name for hit in found] == [paths[place] for place in order]
        assert [hit.score for hit in found] == pytest.approx((stored @ query)[order].tolist(), abs=1e-5)
        assert len(model.search(given, 10_000)) == 6 <= MAX_HITS


def test_the_wall_has_placeholders_for_what_is_gone(models, folder):
    models[0].take_embeddings(str(folder / "one.npz"))
    hits = models[0].search("a red bat", 3)
    entries, absent = wall([hits[0], hits[1]._replace(name="/gone/<b>.png"), hits[2]], 10**6)
    assert absent == 1 and [picture.size for picture, _ in entries][1] == (320, 320)
    assert [caption.split()[0] for _, caption in entries] == ["1.", "2.", "3."] and entries[1][1].endswith(" <b>.png")


def test_embeddings_of_another_model_are_refused(models, folder):
    with pytest.raises(ValueError, match="two.npz was made by another model"):
        distribute_embeddings(models[:1], [str(folder / "two.npz")])
    with pytest.raises(ValueError, match="one has .*one.npz already; one file a model"):
        distribute_embeddings(models, [str(folder / "one.npz")] * 2)
    with pytest.raises(ValueError, match="two has nothing to search in"):
        models[1].search("a red bat", 3)


def test_people_who_ask_at_once_get_what_each_gets_alone(models, folder):
    pictures = [open_picture(str(path), 10**6) for path in sorted((folder / "pictures").iterdir())]
    alone = [models[0].classify(one, LABELS, False) for one in pictures]
    heats = [np.asarray(models[0].explain(one, "cat").overlay) for one in pictures]
    results = [SimpleNamespace() for _ in pictures]

    def ask(place):
        for _ in range(3):
            results[place].found = models[0].classify(pictures[place], LABELS, False)
            results[place].heat = np.asarray(models[0].explain(pictures[place], "cat").overlay)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(pictures))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, result in enumerate(results):
        assert result.found == alone[place] and np.array_equal(result.heat, heats[place])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "There are no labels yet"),
        (" \n\t\n ", "There are no labels yet"),
        ("a\n\nb", "Line 2 of the labels is empty"),
        ("\n".join(f"label {n}" for n in range(10_000)), "These are 10,000 labels, and the page takes 1,000"),
        ("a\n" + "x" * 10_000, "The label on line 2 has 10,000 characters, and the page takes 500"),
        ("a\nb\n a ", "The label “a” stands on lines 1 and 3"),
    ],
)
def test_labels_that_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        labels_of(text)


def test_labels_are_tidied():
    assert labels_of("\n a  red\tbat \r\ncat\n\n") == ["a red bat", "cat"]
    assert len(labels_of("\n".join(map(str, range(1000))))) == 1000


def test_texts_that_are_refused():
    for empty in (None, "", " \n"):
        with pytest.raises(ValueError, match="The search is empty"):
            checked_text(empty, "The search")
    with pytest.raises(ValueError, match="The search has 501 characters, and the page takes 500"):
        checked_text("x" * 501, "The search")


def test_pictures_that_are_refused(tmp_path):
    (tmp_path / "words.png").write_text("no picture")
    Image.new("1", (14_200, 14_200)).save(tmp_path / "huge.png")  # 202 megapixels in 25 kB
    Image.new("L", (1100, 1000)).save(tmp_path / "large.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    for name, sentence in (
        ("words.png", "This is no picture, or of a kind that is not read here"),
        ("huge.png", "This picture is too large: at most 1 million pixels"),
        ("large.png", "This picture is too large: at most 1 million pixels"),
        ("cut.jpg", "This picture is damaged"),
    ):
        with pytest.raises(ValueError, match=sentence) as refused:
            open_picture(str(tmp_path / name), 10**6)
        assert str(tmp_path) not in str(refused.value)
    with pytest.raises(ValueError, match="There is no picture yet"):
        open_picture(None, 10**6)


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["runs/demo/pyramid/final", "runs/demo/clip/final"], ["pyramid", "clip"]),
        (["user/name"], ["name"]),
        (["one/name", "two/name"], ["one/name", "two/name"]),
        (["same", "same"], ["same (1)", "same (2)"]),
        (["."], ["."]),
        (["/x/final/"], ["x"]),
    ],
)
def test_titles_say_which_model(names, titles):
    assert titles_of(names) == titles
