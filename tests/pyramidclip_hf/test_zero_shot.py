"""Prompt ensembles, classification and retrieval against forms without batches, sorting or chunks."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel, zero_shot
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor
from pyramidclip_hf.zero_shot import (
    IMAGENET_TEMPLATES,
    class_embeddings,
    classify,
    image_embeddings,
    retrieve,
    text_embeddings,
)
from tests.rounding import assert_equal_to_rounding

# The longest sum of the tiny model: a patch of 3 x 16 x 16 pixels.
WIDEST = 768
NAMES = ["cat", "great white shark", "tench", "a rather long name of a class", "dog"]


@pytest.fixture(scope="module", params=["max", "eos"])
def model(request):
    torch.manual_seed(0)
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": request.param}
    vision = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_leff_layers": 1}  # fmt: skip
    return PyramidCLIPModel(PyramidCLIPConfig(projection_dim=8, text_config=text, vision_config=vision)).eval()


@pytest.fixture(scope="module")
def processor():
    return PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32))


class WordModel(torch.nn.Module):
    """Embeds a text as counts of three words and a picture as its mean colour."""

    dtype, device = torch.float32, torch.device("cpu")
    words = ("red", "green", "blue")

    def __init__(self, tokenizer):
        super().__init__()
        self.ids = [tokenizer(word)["input_ids"][1] for word in self.words]
        self.logit_scale = torch.nn.Parameter(torch.tensor(math.log(10.0)))
        self.frozen = torch.nn.Dropout()
        self.seen = []

    def encode_text(self, input_ids, attention_mask=None, normalize=False):
        assert normalize and not self.training and not torch.is_grad_enabled()
        self.seen.append(tuple(input_ids.shape))
        counts = torch.stack([(input_ids == i).sum(1) for i in self.ids], dim=1).float() + 0.01
        return torch.nn.functional.normalize(counts, dim=1)

    def encode_image(self, pixel_values, normalize=False):
        assert normalize and not self.training and not torch.is_grad_enabled()
        self.seen.append(tuple(pixel_values.shape))
        return torch.nn.functional.normalize(pixel_values.mean(dim=(2, 3)) + 2, dim=1)


@pytest.fixture
def words(processor):
    model = WordModel(processor.tokenizer).train()
    model.frozen.eval()
    return model


def plain(colour):
    return Image.new("RGB", (40, 32), colour)


def test_the_eighty_prompts():
    open_clip = pytest.importorskip("open_clip.zero_shot_metadata")
    assert list(IMAGENET_TEMPLATES) == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(set(IMAGENET_TEMPLATES)) == 80


def test_class_embeddings_equal_one_prompt_at_a_time(model, processor):
    templates = IMAGENET_TEMPLATES[:6]
    expected = []
    with torch.no_grad():
        for name in NAMES:
            rows = []
            for template in templates:
                ids = processor.tokenizer(template.format(name), return_tensors="pt")
                rows.append(model.encode_text(**ids, normalize=True)[0])
            mean = torch.stack(rows).mean(dim=0)
            expected.append(mean / mean.norm())
    for batch_size in (4, 7, 1000):
        made = class_embeddings(model, processor, NAMES, templates, batch_size=batch_size)
        assert made.dtype == torch.float32
        assert_equal_to_rounding(made, torch.stack(expected), WIDEST)
    by_tokenizer = class_embeddings(model, processor.tokenizer, NAMES, templates)
    assert_equal_to_rounding(by_tokenizer, made, WIDEST)


def test_text_and_image_embeddings_keep_the_order(model, processor):
    pictures = [plain((30 * i, 200 - 20 * i, 90)) for i in range(7)]
    with torch.no_grad():
        texts = [
            model.encode_text(**processor.tokenizer(name, return_tensors="pt"), normalize=True)[0] for name in NAMES
        ]
        images = [
            model.encode_image(**processor(images=one, return_tensors="pt"), normalize=True)[0] for one in pictures
        ]
    assert_equal_to_rounding(text_embeddings(model, processor, NAMES, 2), torch.stack(texts), WIDEST)
    for given in (pictures, iter(pictures)):
        made = image_embeddings(model, processor, given, batch_size=3)
        assert_equal_to_rounding(made, torch.stack(images), WIDEST)
    assert torch.equal(
        image_embeddings(model, processor.image_processor, pictures), image_embeddings(model, processor, pictures)
    )


def test_probabilities_equal_the_models_own_logits(model, processor):
    picture = plain((200, 40, 10))
    predictions = classify(model, processor, [picture], NAMES)[0]
    texts = [f"a photo of a {name}." for name in NAMES]
    with torch.no_grad():
        logits = model(**processor(images=picture, text=texts, return_tensors="pt")).logits_per_image[0]
    expected = dict(zip(NAMES, logits.softmax(dim=0).tolist()))
    assert {p.name: p.probability for p in predictions} == pytest.approx(expected, abs=1e-4)
    assert [p.name for p in predictions] == sorted(NAMES, key=lambda name: -expected[name])


def test_classify_names_the_colour(words, processor):
    images = [plain("red"), plain("blue"), plain((0, 255, 0))]
    predictions = classify(words, processor, images, ["blue", "red", "green"], top_k=2)
    assert [[p.name for p in row][0] for row in predictions] == ["red", "blue", "green"]
    assert [len(row) for row in predictions] == [2, 2, 2]
    embeds = class_embeddings(words, processor, ["blue", "red", "green"])
    again = classify(words, processor, images, ["blue", "red", "green"], class_embeds=embeds)
    assert [row[0].name for row in again] == ["red", "blue", "green"]
    assert sum(p.probability for p in again[0]) == pytest.approx(1)


def test_the_models_mode_comes_back_also_after_an_error(words, processor):
    assert words.training and not words.frozen.training
    classify(words, processor, [plain("red")], ["red"])
    assert words.training and not words.frozen.training and torch.is_grad_enabled()
    with pytest.raises(OSError):
        image_embeddings(words, processor, [__file__])
    assert words.training and torch.is_grad_enabled()


def test_batches_are_as_large_as_asked_and_alike_in_length(words, processor):
    text_embeddings(words, processor, ["red", "red " * 20, "blue", "blue " * 21], batch_size=2)
    assert words.seen == [(2, 23), (2, 3)]
    words.seen.clear()
    image_embeddings(words, processor, [plain("red")] * 5, batch_size=2)
    assert [shape[0] for shape in words.seen] == [2, 2, 1]


def test_retrieve_equals_the_whole_matrix(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    queries, candidates = torch.randn(23, 8, generator=generator), torch.randn(40, 8, generator=generator)
    scores = queries @ candidates.T
    expected = scores.argsort(dim=1, descending=True)[:, :5]
    for at_a_time in (1, 100, 1 << 24):
        monkeypatch.setattr(zero_shot, "_SCORES_AT_A_TIME", at_a_time)
        matches = retrieve(queries, candidates, k=5)
        assert torch.equal(matches.indices, expected)
        assert_equal_to_rounding(matches.scores, scores.gather(1, expected), queries.shape[1])
    assert retrieve(queries, candidates[:3], k=10).indices.shape == (23, 3)
    assert retrieve(queries[:0], candidates).indices.shape == (0, 10)


def test_retrieve_holds_a_bounded_number_of_scores(monkeypatch):
    monkeypatch.setattr(zero_shot, "_SCORES_AT_A_TIME", 1000)
    rows = []
    original = torch.Tensor.topk
    monkeypatch.setattr(
        torch.Tensor, "topk", lambda self, *a, **k: rows.append(self.numel()) or original(self, *a, **k)
    )
    retrieve(torch.randn(50, 4), torch.randn(300, 4), k=3)
    assert max(rows) <= 1000
    assert sum(rows) == 50 * 300


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "at least one class name"),
        ("cat", ["{}"], "at least one class name"),
        (["cat", " "], ["{}"], "' ' at place 1"),
        (["cat", None], ["{}"], "None at place 1"),
        (["cat", "dog", " Cat"], ["{}"], r"repeated: \['cat'\]"),
        (["cat"], [], "at least one template"),
        (["cat"], "{}", "at least one template"),
        (["cat"], ["a photo"], "exactly one"),
        (["cat"], ["{} {}"], "exactly one"),
    ],
)
def test_wrong_names_and_templates_are_refused(words, processor, names, templates, message):
    with pytest.raises(ValueError, match=message):
        class_embeddings(words, processor, names, templates)


def test_other_wrong_input_is_refused(words, processor):
    with pytest.raises(ValueError, match="one row a class"):
        classify(words, processor, [plain("red")], ["red", "blue"], class_embeds=torch.ones(3, 3))
    with pytest.raises(ValueError, match="at least one picture"):
        classify(words, processor, [], ["red"])
    for one in ("red.png", plain("red"), np.zeros((8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="put it into a list"):
            image_embeddings(words, processor, one)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        text_embeddings(words, processor, ["red"], batch_size=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        classify(words, processor, [plain("red")], ["red"], top_k=0)
    with pytest.raises(ValueError, match="at least one text"):
        text_embeddings(words, processor, [])
    with pytest.raises(ValueError, match="at least one candidate"):
        retrieve(torch.ones(2, 3), torch.ones(0, 3))


def test_a_gpu_has_two_batches_at_a_time(monkeypatch):
    """The next batch is read and begun before the one before is waited for; three are never there at once."""
    said, open_now, most = [], set(), []

    def begun(model, pixel_values, device):
        number = int(pixel_values[0])
        said.append(f"begun {number}")
        open_now.add(number)
        most.append(len(open_now))

        def finish():
            said.append(f"waited for {number}")
            open_now.remove(number)
            return pixel_values

        return finish

    def read():
        for number in range(4):
            said.append(f"read {number}")
            yield number, torch.tensor([number])

    monkeypatch.setattr(zero_shot, "_begun", begun)
    found = list(zero_shot.embeddings_ahead(torch.nn.Identity(), read(), "cuda"))
    assert [(key, int(embeds)) for key, embeds in found] == [(number, number) for number in range(4)]
    assert max(most) == 2
    for number in range(3):
        assert said.index(f"begun {number + 1}") < said.index(f"waited for {number}")
    said.clear()
    assert len(list(zero_shot.embeddings_ahead(torch.nn.Identity(), read(), "cpu"))) == 4
    assert said[:4] == ["read 0", "begun 0", "waited for 0", "read 1"]


def test_embeddings_that_are_no_numbers_are_refused(model, processor):
    broken = copy.deepcopy(model)
    for parameter in broken.parameters():
        parameter.data.fill_(math.nan)
    for call in (
        lambda: class_embeddings(broken, processor, NAMES[:2], ["a {}"]),
        lambda: text_embeddings(broken, processor, ["a cat"]),
        lambda: image_embeddings(broken, processor, [Image.new("RGB", (32, 32))]),
    ):
        with pytest.raises(ValueError, match="Expected embeddings of finite numbers, got NaN or infinity: the model's"):
            call()
