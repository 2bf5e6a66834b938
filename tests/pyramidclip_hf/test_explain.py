"""Explanations of models whose weights are set by hand, so that only red cells can speak for the text; and against
plain forms: regions taken out of the sequence, coordinates written into a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPImageProcessor, PyramidCLIPModel, PyramidCLIPProcessor
from pyramidclip_hf.explain import NEUTRAL_TEXTS, _spread, draw_regions, explain_image, explain_regions

FEATURES = 6
RED, BLUE = (255, 0, 0), (0, 0, 255)
TEXT = "a red umbrella"
SIZES = {"vit": 32, "resnet": 64}


def make_model(tower, seed=0, **vision):
    torch.manual_seed(seed)
    small = {"vit": {"patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_leff_layers": 1},
             "resnet": {"layers": [1, 1, 1, 1], "width": 4, "hidden_size": 128, "num_attention_heads": 2}}  # fmt: skip
    config = PyramidCLIPConfig(
        text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "pooling": "eos"},
        vision_config={
            "tower": tower,
            "image_size": SIZES[tower],
            "roi_feature_size": FEATURES,
            **small[tower],
            **vision,
        },
        projection_dim=8,
    )
    return PyramidCLIPModel(config).eval()


@pytest.fixture(scope="module")
def processors():
    """One a tower; the vocabulary is read once."""
    tokenizer = PyramidCLIPProcessor().tokenizer
    return {
        tower: PyramidCLIPProcessor(PyramidCLIPImageProcessor(size={"shortest_edge": size}), tokenizer, FEATURES)
        for tower, size in SIZES.items()
    }


def picture_of(size, red_box):
    """Blue but for a red box (x1, y1, x2, y2) in pixels."""
    picture = Image.new("RGB", size, BLUE)
    picture.paste(RED, red_box)
    return picture


@torch.no_grad()
def redness(processor):
    """(2, 3): functionals of normalised RGB, one 1 on red pixels and 0 on blue ones, one the other way round."""
    pictures = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"][:, :, 0, 0]
    return torch.linalg.pinv(pixels.T)


@torch.no_grad()
def text_direction(model, processor):
    """Unit vectors: towards TEXT from the neutral texts, and something orthogonal to both."""
    batch = processor(text=[TEXT, *NEUTRAL_TEXTS], return_tensors="pt")
    embeds = model.encode_text(batch["input_ids"], batch["attention_mask"], normalize=True)
    direction = torch.nn.functional.normalize(embeds[0] - embeds[1:].mean(dim=0), dim=0)
    other = torch.linalg.qr(torch.cat([embeds.T, torch.randn(8, 1)], dim=1))[0][:, -1]
    return direction, other


@torch.no_grad()
def red_vit(processor, sign=1.0):
    """All tokens are attended to alike; the class token reads redness into channel 6, which moves the picture's
    embedding towards the text (sign 1) or away from it."""
    model = make_model("vit", num_leff_layers=0)
    tower = model.vision_model
    red, blue = redness(processor)
    patch = torch.zeros_like(tower.embeddings.patch_embedding.weight)
    for channel, functional in enumerate((red, -red, blue, -blue)):  # their sum is 0 and LayerNorm only scales them
        patch[channel] = functional[:, None, None] / 64
    tower.embeddings.patch_embedding.weight.copy_(patch)
    tower.embeddings.position_embedding.weight.zero_()
    tower.embeddings.class_embedding.copy_(torch.tensor([0.0] * 4 + [1, -1] + [0] * 10))
    for layer in tower.encoder.layers:
        layer.mlp.fc2.weight.zero_(), layer.mlp.fc2.bias.zero_()
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj):
            projection.weight.zero_(), projection.bias.zero_()
        attention.v_proj.weight[0, 0] = attention.v_proj.weight[8, 0] = 1  # a channel of either head
        attention.out_proj.weight[6, 0] = attention.out_proj.weight[6, 8] = 1
        attention.out_proj.weight[7] = -attention.out_proj.weight[6]  # keeps the mean 0 for the next LayerNorm
    direction, other = text_direction(model, processor)
    model.visual_projection.weight.zero_()
    model.visual_projection.weight[:, 6] = sign * direction
    model.visual_projection.weight[:, 4] = other
    return model


@torch.no_grad()
def red_resnet(processor, sign=1.0):
    """The trunk only scales redness and blueness down, the pooling takes their means, and redness moves the picture's
    embedding towards the text (sign 1) or away from it."""
    model = make_model("resnet")
    trunk, pool = model.vision_model.trunk, model.vision_model.attention_pool
    for convolution in (module for module in trunk.modules() if isinstance(module, torch.nn.Conv2d)):
        convolution.weight.zero_()
        middle = convolution.weight.shape[2] // 2
        convolution.weight[0, 0, middle, middle] = convolution.weight[1, 1, middle, middle] = 1
    trunk.stem.conv1.weight[:2, :, 1, 1] = redness(processor)
    for module in trunk.modules():  # what is beside the shortcuts adds nothing
        if hasattr(module, "expansion"):
            module.norm3.weight.zero_()
    pool.position_embedding.weight.zero_()
    for projection in (pool.q_proj, pool.k_proj, pool.v_proj):
        projection.weight.zero_(), projection.bias.zero_()
    pool.v_proj.weight[0, 0] = pool.v_proj.weight[1, 1] = 1
    direction, other = text_direction(model, processor)
    model.visual_projection.weight.zero_()
    model.visual_projection.weight[:, 0] = sign * direction
    model.visual_projection.bias.copy_(other)
    return model


RED_MODELS = {"vit": red_vit, "resnet": red_resnet}


@pytest.mark.parametrize("tower", SIZES)
def test_heat_lies_where_the_constructed_model_looks(tower, processors):
    processor, model = processors[tower], RED_MODELS[tower](processors[tower])
    # A wide picture: the crop is its middle 96 columns, one cell is 24 (ViT) or 16 (enlarged ResNet) pixels.
    picture = picture_of((144, 96), (72, 48, 96, 96))
    explanation = explain_image(model, processor, picture, TEXT)
    heat = explanation.heat
    assert heat.shape == (96, 144) and heat.dtype == np.float32 and heat.min() >= 0 and heat.max() == 1
    assert heat[60:90, 78:90].min() > 0.5
    around = np.zeros_like(heat)
    around[24:, 48:120] = 1  # interpolation reaches one cell further
    assert (heat * around).sum() > 0.99 * heat.sum()
    assert not heat[:, :24].any() and not heat[:, 120:].any()
    inputs = processor(images=picture, text=TEXT, return_tensors="pt")
    cosine = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
    assert explanation.score == pytest.approx(cosine, abs=1e-5)
    assert explanation.method == {"vit": "attention_gradient", "resnet": "grad_cam"}[tower]

    left = explain_image(model, processor, picture_of((144, 96), (24, 0, 48, 48)), TEXT).heat
    assert left[:48, 24:48].sum() > 0.5 * left.sum() and not left[:, 96:].any()


@pytest.mark.parametrize("tower", SIZES)
def test_nothing_that_speaks_for_the_text_gives_no_heat(tower, processors):
    against = RED_MODELS[tower](processors[tower], sign=-1.0)
    assert not explain_image(against, processors[tower], picture_of((64, 64), (0, 0, 32, 32)), TEXT).heat.any()
    in_favour = RED_MODELS[tower](processors[tower])
    blue = explain_image(in_favour, processors[tower], Image.new("RGB", (64, 64), BLUE), TEXT)
    assert not blue.heat.any() and blue.heat.shape == (64, 64)


def test_bfloat16_and_exif_rotation(processors):
    model, picture = red_vit(processors["vit"]), picture_of((96, 64), (32, 0, 64, 32))
    plain = explain_image(model, processors["vit"], picture, TEXT)
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # to be turned by 270 degrees
    again = explain_image(model, processors["vit"], turned, TEXT)
    assert np.array_equal(plain.heat, again.heat)
    assert again.overlay(turned).tobytes() == plain.overlay(picture).tobytes()
    half = explain_image(model.bfloat16(), processors["vit"], picture, TEXT)
    assert half.heat.dtype == np.float32 and np.abs(half.heat - plain.heat).max() < 0.05


@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ((90, 60), {}),
        ((41, 120), {}),
        ((20, 17), {}),
        ((50, 37), {"do_center_crop": False}),
        ((25, 60), {"do_resize": False}),
        ((71, 64), {"size": {"height": 40, "width": 48}, "crop_size": {"height": 30, "width": 40}}),
    ],
)
def test_heat_goes_back_to_where_the_crop_came_from(size, settings):
    """A picture holds its own coordinates; what the image processor shows of them, spread back, must be the same."""
    image_processor = PyramidCLIPImageProcessor(
        **{"size": {"shortest_edge": 32}, "do_rescale": False, "do_normalize": False, **settings}
    )
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = Image.fromarray(np.stack([x + 100, y + 100, x * 0], axis=-1).astype(np.uint8))
    shown = image_processor(picture, return_tensors="np")["pixel_values"][0].astype(np.float32)
    inside = _spread(np.ones(shown.shape[1:]), image_processor, size) > 0
    # Not at the crop's edge, where there is nothing to interpolate with, nor where padding was added.
    middle = np.zeros_like(inside)
    middle[2:-2, 2:-2] = inside[2:-2, 2:-2]
    for channel, coordinate in ((0, x), (1, y)):
        found = _spread(shown[channel], image_processor, size) - 100
        rows, columns = np.nonzero(inside)
        middle &= (coordinate > coordinate[inside].min() + 2) & (coordinate < coordinate[inside].max() - 2)
        assert len(rows) and np.abs(found - coordinate)[middle].max() < 1.5
    assert middle.sum() > 0.4 * min(inside.sum(), 32 * 32)


@pytest.mark.parametrize("tower", SIZES)
@pytest.mark.parametrize("masked", [False, True])
def test_region_relevance_is_what_the_score_loses_without_the_region(tower, masked, processors):
    model, draw = make_model(tower, seed=3).double(), torch.Generator().manual_seed(1)
    features = torch.randn(5, FEATURES + 4, generator=draw, dtype=torch.float64)
    kept = [0, 2, 4] if masked else list(range(5))
    mask = torch.tensor([place in kept for place in range(5)])
    if masked:
        features[3] = torch.nan  # padding may hold anything
    explanation = explain_regions(model, processors[tower], features, TEXT, mask if masked else None)

    def score(places):
        text = model.encode_text(processors[tower](text=TEXT, return_tensors="pt")["input_ids"], normalize=True)
        return (model.encode_rois(features[places][None], normalize=True) * text).sum().item()

    assert explanation.score == pytest.approx(score(kept), abs=1e-6)
    expected = [score(kept) - score([p for p in kept if p != place]) if place in kept else 0 for place in range(5)]
    assert explanation.relevance == pytest.approx(expected, abs=1e-6) and explanation.relevance.dtype == np.float32
    assert np.abs(explanation.relevance).max() > 1e-3
    batched = explain_regions(model, processors[tower], features[None].numpy(), TEXT, mask[None].numpy())
    assert np.array_equal(batched.relevance, explanation.relevance) or not masked


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [parameter.clone() for parameter in model.parameters()] + [buffer.clone() for buffer in model.buffers()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        model.config._attn_implementation,
        [module.config._attn_implementation for module in model.modules() if hasattr(module, "config")],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
    )


def assert_same_state(before, after):
    for one, other in zip(before, after, strict=True):
        if isinstance(one, list) and any(isinstance(item, torch.Tensor) for item in one):
            assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(one, other, strict=True))
        else:
            assert one == other


@pytest.mark.parametrize("tower", SIZES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_model_stays_as_it_was(tower, mode, processors, monkeypatch):
    model = make_model(tower).train()
    model.text_model.eval()
    model.visual_projection.requires_grad_(False)
    model.set_attn_implementation("sdpa")
    inner = next(model.vision_model.parameters())
    inner.requires_grad_(True)  # frozen by train(), and thawed by the user since
    model.logit_scale.grad = torch.tensor(3.0)
    picture, features = picture_of((70, 64), (0, 0, 32, 32)), torch.randn(3, FEATURES + 4)
    model.vision_model(torch.randn(1, 3, SIZES[tower], SIZES[tower]))  # transformers hooks the model at its first call
    expected = explain_image(model, processors[tower], picture, TEXT)
    with mode():
        before = state_of(model)
        heat = explain_image(model, processors[tower], picture, TEXT).heat
        explain_regions(model, processors[tower], features, TEXT)
        assert_same_state(before, state_of(model))
        assert np.array_equal(heat, expected.heat)
        broken = model.vision_model.encoder.layers[1].mlp if tower == "vit" else model.vision_model.attention_pool
        monkeypatch.setattr(broken, "forward", lambda *args, **kwargs: 1 / 0)
        for explain in (
            lambda: explain_image(model, processors[tower], picture, TEXT),
            lambda: explain_regions(model, processors[tower], features, TEXT),
        ):
            with pytest.raises(ZeroDivisionError):
                explain()
            assert_same_state(before, state_of(model))


def test_frozen_models_are_explained_too(processors):
    model = red_resnet(processors["resnet"]).requires_grad_(False)
    assert explain_image(model, processors["resnet"], picture_of((64, 64), (0, 0, 32, 32)), TEXT).heat.max() == 1


def test_wrong_input_is_refused(processors):
    model, processor = make_model("vit"), processors["vit"]
    picture, features = picture_of((40, 40), (0, 0, 20, 20)), torch.randn(2, FEATURES + 4)
    for text, message in (("", "no tokens"), (" \n", "no tokens"), (None, "Expected one text, got NoneType")):
        with pytest.raises(ValueError, match=message):
            explain_image(model, processor, picture, text)
        with pytest.raises(ValueError, match=message):
            explain_regions(model, processor, features, text)
    with pytest.raises(ValueError, match="vit tower is explained by \"attention_gradient\", got method='grad_cam'"):
        explain_image(model, processor, picture, TEXT, method="grad_cam")
    with pytest.raises(TypeError, match="Expected a PIL picture, got str"):
        explain_image(model, processor, "picture.jpg", TEXT)
    with pytest.raises(TypeError, match="Expected a PyramidCLIPModel, got DataParallel"):
        explain_image(torch.nn.DataParallel(model), processor, picture, TEXT)
    with torch.inference_mode():
        unusable = make_model("vit")
    with pytest.raises(ValueError, match="created under torch.inference_mode"):
        explain_image(unusable, processor, picture, TEXT)
    for regions, mask, message in (
        (features[:, 1:], None, r"Expected roi_features \(K, 10\).*got shape \(2, 9\)"),
        (features[:0], None, r"got shape \(0, 10\)"),
        (features, [True], r"Expected roi_mask \(2,\).*\(1,\)"),
        (features, [False, False], "at least one region"),
        (features * torch.inf, None, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            explain_regions(model, processor, regions, TEXT, mask)


def test_a_model_without_attention_weights_is_refused(processors, monkeypatch):
    """As after fusing, where a module computes what several did."""
    model = make_model("vit")
    attention = model.vision_model.encoder.layers[1].self_attn
    plain = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (plain(*args, **kwargs)[0], None))
    picture = picture_of((40, 40), (0, 0, 20, 20))
    with pytest.raises(ValueError, match=r"fused.*from_pretrained.*\(1 of 2 layers"):
        explain_image(model, processors["vit"], picture, TEXT)
    marked = make_model("resnet")
    marked.vision_model.is_fused = True
    with pytest.raises(ValueError, match="a fused, compiled or quantised model"):
        explain_image(marked, processors["resnet"], picture, TEXT)
    assert explain_regions(marked, processors["resnet"], torch.randn(2, FEATURES + 4), TEXT).relevance.shape == (2,)


def test_overlay_and_regions_are_drawn(processors):
    picture = picture_of((96, 64), (32, 0, 64, 32)).convert("RGBA")
    explanation = explain_image(red_vit(processors["vit"]), processors["vit"], picture, TEXT)
    drawn = np.asarray(explanation.overlay(picture))
    hottest = np.unravel_index(explanation.heat.argmax(), explanation.heat.shape)
    assert drawn.shape == (64, 96, 3)
    assert drawn[hottest].tolist() == [255, 18, 0]  # 0.4 of the red picture, 0.6 of (255, 30, 0)
    grey = Image.new("RGB", (1, 1), BLUE).convert("L").getpixel((0, 0))
    assert np.array_equal(drawn[60, 5], np.rint(0.4 * np.array(BLUE) + 0.6 * grey))
    assert np.array_equal(explanation.overlay(picture, 0), np.asarray(picture.convert("RGB")))
    with pytest.raises(ValueError, match="96 x 64 pixels.*got 40 x 64"):
        explanation.overlay(picture.crop((0, 0, 40, 64)))
    with pytest.raises(ValueError, match="strength must be between 0 and 1, got 60"):
        explanation.overlay(picture, 60)

    boxes, black = [(0.1, 0.1, 0.4, 0.9), (0.6, 0.1, 0.9, 0.9), (0.3, 0.3, 0.3, 0.3)], Image.new("RGB", (100, 100))
    frames = np.asarray(draw_regions(black, boxes, [0.2, -0.1, 0.0])).astype(int)
    assert not np.asarray(black).any()
    red = (frames[..., 0] > 200) & (frames[..., 1] < 100)
    grey = (frames[..., 0] == frames[..., 1]) & (frames[..., 0] > 0)
    assert red[:, :45].any() and not red[:, 55:].any() and grey[:, 55:].any() and not grey[:, :45].any()
    labelled = np.asarray(draw_regions(black, boxes, [0.2, -0.1, 0.0], ["cat", "dog", "pad"]))
    assert (labelled != frames).any()
    at_the_edge = draw_regions(Image.new("RGB", (300, 300)), [(0.8, 0.5, 0.99, 0.9)], [1.0], ["a small balloon"])
    letters = (np.asarray(at_the_edge) > 200).all(-1)
    assert letters[:, :240].any() and not letters[:, -2:].any()  # begins left of its box, and is not cut
    with pytest.raises(ValueError, match=r"relevance \(K,\), got shapes \(3, 4\) and \(2,\)"):
        draw_regions(black, boxes, [0.2, 0.1])
    with pytest.raises(ValueError, match="Expected 3 labels, one a box, got 1"):
        draw_regions(black, boxes, [0.2, 0.1, 0], ["cat"])
    with pytest.raises(ValueError, match="fractions 0..1"):
        draw_regions(black, [(3, 4, 50, 60)], [1.0])
