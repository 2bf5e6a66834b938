"""The models at tiny size: attention backends, padding, missing regions, checkpointing, saving, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, CLIPTextConfig, CLIPTextModel

from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPModel,
    PyramidCLIPTextModelWithProjection,
    PyramidCLIPVisionModel,
    PyramidCLIPVisionModelWithProjection,
)
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, LEVELS, TERMS, levels_of
from pyramidclip_hf.modeling_pyramidclip_text import activation_named, text_starts
from tests.plain_forms import lively, plain_form
from tests.pyramidclip_hf.tiny import BOTH, OLD_TORCH, TEXT, WIDEST, make_batch, tiny
from tests.rounding import assert_equal_to_rounding


@pytest.mark.parametrize("pooling", ["max", "eos"])
@BOTH
def test_eager_equals_sdpa(tower, pooling):
    model = tiny(tower, pooling)
    batch, levels = make_batch(model), tuple(LEVELS)
    found = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        assert model.vision_model.config._attn_implementation == attention
        embeds = model.encode_levels(levels, **batch)
        grads = torch.autograd.grad(sum(embed.sum() for embed in embeds.values()), model.visual_projection.weight)
        found[attention] = (*embeds.values(), *grads)
    for eager, sdpa in zip(found["eager"], found["sdpa"], strict=True):
        assert_equal_to_rounding(eager, sdpa, WIDEST)


@pytest.mark.parametrize("pooling", ["max", "eos"])
def test_text_embeddings_do_not_depend_on_padding(pooling):
    model = tiny(pooling=pooling).double()
    ids = torch.tensor([[48, 5, 6, 7, 49]])
    wanted = model.encode_text(ids)
    for pad in (0, 49, 17):
        padded = torch.cat([ids, torch.full((1, 7), pad)], dim=1)
        mask = torch.tensor([[1] * 5 + [0] * 7])
        for length in (7, 12):
            torch.testing.assert_close(model.encode_text(padded[:, :length]), wanted, atol=1e-12, rtol=0)
            masked = model.encode_text(padded[:, :length], mask[:, :length])
            torch.testing.assert_close(masked, wanted, atol=1e-12, rtol=0)
    together = model.encode_text(torch.tensor([[48, 5, 6, 7, 49, 0], [48, 1, 2, 3, 4, 49]]))
    torch.testing.assert_close(together[:1], wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("pooling", ["max", "eos"])
def test_text_embeddings_do_not_depend_on_the_side_of_the_padding(pooling):
    model = tiny(pooling=pooling).double()
    texts = [[48, 5, 6, 7, 49], [48, 9, 49], [48, 1, 2, 3, 4, 5, 6, 49]]
    wanted = torch.cat([model.encode_text(torch.tensor([text])) for text in texts])
    gaps = [8 - len(text) for text in texts]
    mask = torch.tensor([[0] * gap + [1] * len(text) for gap, text in zip(gaps, texts)])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for pad in (0, 49, 17):
        padded = torch.tensor([[pad] * gap + text for gap, text in zip(gaps, texts)])
        for options in [{"attention_mask": mask}, {"attention_mask": mask, "position_ids": positions}]:
            found = model.text_projection(model.text_model(padded, pooled_only=True, **options).pooler_output)
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
        if pad != 17:  # which might be a word
            torch.testing.assert_close(model.encode_text(padded), wanted, atol=1e-12, rtol=0)
            whole = model.text_model(padded, torch.ones_like(padded))
            torch.testing.assert_close(model.text_projection(whole.pooler_output), wanted, atol=1e-12, rtol=0)
    # A start id behind words is no padding, and neither is a text that begins with pads and lacks a start.
    for ids in ([5, 6, 48, 7, 49], [0, 0, 5, 6, 49]):
        starts = text_starts(torch.tensor([ids]), None, model.config.text_config)
        assert starts.tolist() == [0]


def value_gradient_and_kept(function, inputs):
    """What `function` gives, a gradient through it, and how many tensors it keeps for that."""
    leaf, saved = inputs.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: saved.append(kept) or kept, lambda kept: kept):
        values = function(leaf)
    values.sin().sum().backward()
    return values.detach(), leaf.grad, len({tensor.data_ptr() for tensor in saved if tensor.ndim})


def test_quick_gelu_is_the_reference_s_and_keeps_one_tensor():
    inputs = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).mul(4)
    value, gradient, kept = value_gradient_and_kept(activation_named("quick_gelu"), inputs)
    wanted, wanted_gradient, others = value_gradient_and_kept(lambda x: x * torch.sigmoid(1.702 * x), inputs)
    torch.testing.assert_close(value, wanted, atol=1e-14, rtol=1e-13)
    torch.testing.assert_close(gradient, wanted_gradient, atol=1e-14, rtol=1e-13)
    assert kept == 1 < others


def test_a_row_without_end_token_pools_its_last_unmasked_position():
    model = tiny(pooling="eos")
    hidden = model.text_model(torch.tensor([[48, 5, 6, 7, 0]])).last_hidden_state[:, 3]
    pooled = model.text_model(torch.tensor([[48, 5, 6, 7, 0]]), torch.tensor([[1, 1, 1, 1, 0]])).pooler_output
    assert_equal_to_rounding(pooled, hidden, WIDEST)


def test_text_tower_with_eos_pooling_equals_transformers_clip():
    model = tiny(pooling="eos")
    peer = CLIPTextModel(CLIPTextConfig(**TEXT, intermediate_size=128, pad_token_id=0)).eval()
    peer.load_state_dict(model.text_model.state_dict())
    ids = make_batch(model)["input_ids"]
    assert_equal_to_rounding(model.text_model(ids).pooler_output, peer(ids).pooler_output, WIDEST)


@BOTH
def test_padded_regions_change_nothing(tower):
    model = tiny(tower)
    roi = torch.randn(2, 3, 10)
    wanted = model.encode_rois(roi)
    padded = torch.cat([roi, torch.full((2, 2, 10), float("nan"))], dim=1)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    assert_equal_to_rounding(model.encode_rois(padded, mask), wanted, WIDEST)
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    assert_equal_to_rounding(model.encode_rois(padded[:, shuffled], mask[:, shuffled]), wanted, WIDEST)


@BOTH
def test_a_picture_without_regions_is_finite_and_outside_the_region_terms(tower):
    model = tiny(tower).train()
    batch = make_batch(model)
    output = model(**batch, return_loss=True)
    output.loss.backward()
    assert torch.isfinite(output.roi_embeds).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    rows = batch["roi_mask"].any(dim=1)
    assert 2 <= rows.sum() < len(rows)
    scale = model.logit_scale.exp()
    image, text = output.roi_embeds[rows], output.summary_embeds[rows]
    logits = (scale * image @ text.T).double()
    target = torch.full_like(logits, 0.2 / (len(logits) - 1)).fill_diagonal_(0.8)
    wanted = -sum((target * way.log_softmax(1)).sum(1).mean() for way in (logits, logits.T)) / 2
    assert output.loss_terms["roi_summary"].item() == pytest.approx(wanted.item(), rel=1e-5)


@BOTH
@pytest.mark.parametrize("name", TERMS)
def test_level_parameters_are_exactly_those_with_a_gradient(tower, name):
    model = tiny(tower, loss_weights={name: 1.0}, vision={"freeze_patch_embedding": False}).train()
    batch = make_batch(model)
    needed = [LEVELS[level].input for level in TERMS[name]] + ["roi_mask"]
    model(**{key: batch[key] for key in needed}, return_loss=True).loss.backward()
    with_gradient = [key for key, parameter in model.named_parameters() if parameter.grad is not None]
    assert model.level_parameters(levels_of({name: 1.0})) == with_gradient


def test_the_patch_convolution_is_frozen(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    for loaded in (model.train(), PyramidCLIPModel.from_pretrained(tmp_path).train()):
        frozen = [name for name, parameter in loaded.named_parameters() if not parameter.requires_grad]
        assert frozen == ["vision_model.embeddings.patch_embedding.weight"]
    assert all(parameter.requires_grad for parameter in tiny(vision={"freeze_patch_embedding": False}).parameters())


@pytest.mark.parametrize("reentrant", [False, True])
@BOTH
def test_gradient_checkpointing_gives_equal_gradients_and_statistics(tower, reentrant):
    plain, checkpointed = tiny(tower).train(), tiny(tower).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": reentrant})
    batch = make_batch(plain)
    batch = {key: value.requires_grad_() if value.is_floating_point() else value for key, value in batch.items()}
    for model in (plain, checkpointed):
        model.text_model.embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        model(**batch, return_loss=True).loss.backward()
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, two.grad, msg=name)
    for (name, one), two in zip(plain.named_buffers(), checkpointed.buffers(), strict=True):
        assert torch.equal(one, two), name
    assert {int(v) for n, v in plain.named_buffers() if n.endswith("tracked")} == {2}  # global crop, local crop


@BOTH
def test_save_and_load(tower, tmp_path):
    model = tiny(tower)
    batch = make_batch(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    wanted = model(**batch)
    for cls in (PyramidCLIPModel, AutoModel):
        found = cls.from_pretrained(tmp_path)(**batch)
        assert torch.equal(found.logits_per_image, wanted.logits_per_image)
        assert torch.equal(found.roi_embeds, wanted.roi_embeds)
    vision, info = PyramidCLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    pooled = wanted.vision_model_output.pooler_output
    assert torch.equal(model.visual_projection(vision(batch["pixel_values"]).pooler_output), pooled)
    projected = PyramidCLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert torch.equal(projected(batch["pixel_values"]).image_embeds, pooled)
    text = PyramidCLIPTextModelWithProjection.from_pretrained(tmp_path)
    assert torch.equal(text(batch["input_ids"]).text_embeds, wanted.text_model_output.pooler_output)


@BOTH
def test_other_resolutions(tower, tmp_path):
    model = tiny(tower)
    size = model.config.vision_config.image_size
    larger = torch.randn(2, 3, size * 2, size + 32)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model.encode_image(larger)
    assert model.encode_image(larger, interpolate_pos_encoding=True).shape == (2, 16)
    same = torch.randn(2, 3, size, size)
    assert torch.equal(model.encode_image(same, interpolate_pos_encoding=True), model.encode_image(same))
    model.save_pretrained(tmp_path / "small")
    resized = PyramidCLIPForImageClassification.from_pretrained(tmp_path / "small", image_size=size * 2)
    square = torch.randn(2, 3, size * 2, size * 2)
    wanted = model.vision_model(square, interpolate_pos_encoding=True).pooler_output
    assert_equal_to_rounding(resized.vision_model(square).pooler_output, wanted, WIDEST)
    resized.save_pretrained(tmp_path / "large")
    again = PyramidCLIPForImageClassification.from_pretrained(tmp_path / "large")
    assert torch.equal(again(square).logits, resized(square).logits)
    with pytest.raises(ValueError, match="image_size"):
        model.resize_image_positions(size + 1)


@BOTH
def test_forward_and_features_agree(tower):
    model = tiny(tower)
    batch = make_batch(model)
    output = model(**batch)
    image, text = model.encode_image(batch["pixel_values"]), model.encode_text(batch["input_ids"])
    assert_equal_to_rounding(model.get_image_features(batch["pixel_values"]).pooler_output, image, WIDEST)
    assert_equal_to_rounding(model.get_text_features(batch["input_ids"]).pooler_output, text, WIDEST)
    unit_image = image / image.norm(dim=-1, keepdim=True)
    unit_text = text / text.norm(dim=-1, keepdim=True)
    logits = model.logit_scale.exp() * unit_image @ unit_text.T
    assert_equal_to_rounding(output.logits_per_image, logits, WIDEST)
    assert_equal_to_rounding(output.logits_per_text, logits.T, WIDEST)
    assert_equal_to_rounding(model.encode_image(batch["pixel_values"], normalize=True), unit_image, WIDEST)
    for name, level in (("roi_embeds", "roi"), ("summary_embeds", "summary"), ("tag_embeds", "tags")):
        alone = model.encode_levels((level,), **batch)[level]
        assert_equal_to_rounding(output[name], alone / alone.norm(dim=-1, keepdim=True), WIDEST)
    assert model(input_ids=batch["input_ids"]).logits_per_image is None


@pytest.mark.parametrize(("leff", "pictures"), [(0, 2), (1, 2), (1, 3), (0, 3)])
def test_regions_enter_behind_the_blocks_of_pictures_whatever_has_leff(leff, pictures):
    model = lively(tiny(vision={"num_leff_layers": leff, "num_picture_layers": pictures}))
    batch, plain = make_batch(model), plain_form(model)
    regions = batch["roi_features"], batch["roi_mask"]
    assert_equal_to_rounding(model.encode_rois(*regions), plain.encode_rois(*regions), WIDEST)
    pixels = batch["pixel_values"]
    assert_equal_to_rounding(model.encode_image(pixels), plain.encode_image(pixels), WIDEST)
    model.encode_rois(batch["roi_features"], batch["roi_mask"]).sum().backward()
    blocks = [f"vision_model.encoder.layers.{index}." for index in range(3)]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    named = set(model.level_parameters(("roi",)))
    for index, block in enumerate(blocks):
        for names in (trained, named):
            assert any(name.startswith(block) for name in names) == (index >= pictures)


def test_the_plain_clip_loss_is_one_mapping_away():
    model = tiny(loss_weights={"global_caption": 1.0}, label_smoothing=0.0)
    batch = make_batch(model)
    output = model(input_ids=batch["input_ids"], pixel_values=batch["pixel_values"], return_loss=True)
    labels = torch.arange(5)
    wanted = sum(
        torch.nn.functional.cross_entropy(z, labels) for z in (output.logits_per_image, output.logits_per_text)
    )
    torch.testing.assert_close(output.loss, wanted / 2)


def test_initialisation_is_the_reference_s():
    torch.manual_seed(0)
    config = PyramidCLIPConfig(
        text_config={"num_hidden_layers": 2, "vocab_size": 1000, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={"num_hidden_layers": 2, "num_leff_layers": 1, "image_size": 112},
    )
    state = PyramidCLIPModel(config).state_dict()
    text, vision = "text_model.encoder.layers.1.", "vision_model.encoder.layers.0."
    wanted = {
        "text_model.embeddings.token_embedding.weight": 0.02,
        "text_model.embeddings.position_embedding.weight": 0.01,
        f"{text}self_attn.q_proj.weight": 512**-0.5,
        f"{text}self_attn.out_proj.weight": 512**-0.5 * 4**-0.5,
        f"{text}mlp.fc1.weight": 1024**-0.5,
        f"{text}mlp.fc2.weight": 512**-0.5 * 4**-0.5,
        "text_projection.weight": 512**-0.5,
        "visual_projection.weight": 768**-0.5,
        "vision_model.embeddings.position_embedding.weight": 768**-0.5,
        "vision_model.embeddings.roi_projection.weight": 768**-0.5,
        # torch: Xavier uniform over (3 D, D) is +-sqrt(6 / 4 D), Kaiming uniform with a = sqrt(5) is +-fan_in^-0.5.
        f"{vision}self_attn.q_proj.weight": (6 / (4 * 768)) ** 0.5 / 3**0.5,
        f"{vision}mlp.fc1.weight": 768**-0.5 / 3**0.5,
        f"{vision}mlp.depthwise.weight": 9**-0.5 / 3**0.5,
        "vision_model.embeddings.patch_embedding.weight": (3 * 16 * 16) ** -0.5 / 3**0.5,
    }
    for name, std in wanted.items():
        assert state[name].std().item() == pytest.approx(std, rel=0.05), name
    assert state["logit_scale"].item() == pytest.approx(2.65926)
    assert not state[f"{vision}self_attn.q_proj.bias"].any() and not state[f"{text}self_attn.out_proj.bias"].any()
    resnet = tiny("resnet").state_dict()
    assert not resnet["vision_model.trunk.stages.1.layers.0.norm3.weight"].any()
    assert (resnet["vision_model.trunk.stem.norm3.weight"] == 1).all()


def test_the_logit_scale_is_clamped():
    model = tiny()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    model.clamp_logit_scale_()
    assert model.logit_scale.exp().item() == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, b: m(), "at least one of"),
        (lambda m, b: m(pixel_values=b["pixel_values"][:0]), "non-empty"),
        (lambda m, b: m(input_ids=b["input_ids"][:0]), "non-empty"),
        (lambda m, b: m(input_ids=torch.zeros(1, 13, dtype=torch.long)), "13 tokens, the model has 12"),
        (lambda m, b: m(pixel_values=torch.zeros(1, 3, 16, 16)), "16 x 16, the model takes 32 x 32"),
        (lambda m, b: m(pixel_values=torch.zeros(1, 1, 32, 32)), r"\(batch_size, 3, height, width\)"),
        (lambda m, b: m.encode_rois(torch.zeros(1, 2, 9)), "regions, 10"),
        (lambda m, b: m.encode_rois(torch.zeros(1, 2, 10), torch.ones(1, 3)), "roi_mask"),
        (lambda m, b: m.encode_levels(("global", "tags"), pixel_values=b["pixel_values"]), "tag_input_ids"),
        (lambda m, b: m(**{**b, "roi_features": None}, return_loss=True), r"roi_features.*roi_summary.*roi_caption"),
        (lambda m, b: m.freeze("image"), r"freeze\('image'\): expected 'vision' or 'text'"),
        (lambda m, b: m.vision_model(), "one of the two"),
        (lambda m, b: m(input_ids=[[1, 2]]), 'input_ids must be a tensor, got list: .*return_tensors="pt"'),
        (lambda m, b: m.encode_text("a dog"), "input_ids must be a tensor, got str"),
        (
            lambda m, b: m.encode_text(torch.ones(1, 3)),
            "input_ids must be integers of the processor, got torch.float32",
        ),
        (lambda m, b: m.encode_image(torch.zeros(1, 3, 32, 32).numpy()), "pixel_values must be a tensor, got ndarray"),
        (
            lambda m, b: m.encode_image(torch.ones(1, 3, 32, 32).byte()),
            "pixel_values must be floats of the processor, got torch.uint8",
        ),
        (lambda m, b: m.encode_rois([[[0.0] * 10]]), "roi_features must be a tensor, got list"),
    ],
)
def test_wrong_input_is_refused_by_name(call, message):
    model = tiny()
    with pytest.raises(ValueError, match=message):
        call(model, make_batch(model))


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_a_batch_of_one_pair_has_loss_0_and_no_gradient(tower, training):
    model = tiny(tower).train(training)
    output = model(**{name: value[:1] for name, value in make_batch(model).items()}, return_loss=True)
    output.loss.backward()
    assert output.loss_terms and not any([output.loss, *output.loss_terms.values()])
    assert all(not parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)


def statistics(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name or "batches" in name}


@BOTH
@pytest.mark.parametrize("how", ["freeze", "before", "while training", "after"])
def test_a_frozen_tower_keeps_its_running_statistics(tower, how):
    model = tiny(tower)
    before = statistics(model)
    if how == "while training":
        model.train()
    if how == "freeze":
        model.freeze("vision")
    elif how != "after":
        model.vision_model.requires_grad_(False)
    if how != "while training":
        model.train()
    if how == "after":
        for parameter in model.parameters():
            parameter.requires_grad = False
        model.train()
    model(**make_batch(model))
    assert before and all(torch.equal(value, before[name]) for name, value in statistics(model).items())
    model.vision_model.requires_grad_(True).train()
    model(**make_batch(model))
    assert all(not torch.equal(value, before[name]) for name, value in statistics(model).items())


def test_statistics_of_layers_that_learn_move_beside_those_of_frozen_ones():
    model = tiny()
    model.vision_model.encoder.layers[0].requires_grad_(False)
    before = statistics(model.train())
    model(**make_batch(model))
    moved = {name for name, value in statistics(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".layers.1." in name}


def test_default_objective_needs_all_six_levels():
    assert set(tiny().config.loss_weights) == set(DEFAULT_LOSS_WEIGHTS)
    output = tiny()(**make_batch(tiny()), return_loss=True)
    wanted = sum(output.loss_terms[name] for name in DEFAULT_LOSS_WEIGHTS) / 6
    torch.testing.assert_close(output.loss, wanted)


@OLD_TORCH
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no cuda tensors, not even fake ones")
def test_a_resnet_s_convolutions_are_channels_last_on_a_gpu():
    """Seen at the first convolution's input, with tensors that only have a shape, a layout and a device."""
    layouts = {}

    def remember(_, inputs):
        layouts[inputs[0].device.type] = inputs[0].is_contiguous(memory_format=torch.channels_last)

    for device in ("cpu", "cuda"):
        tower = tiny("resnet").vision_model
        tower.trunk.stem.conv1.register_forward_pre_hook(remember)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            tower.to(device)(torch.empty(2, 3, 64, 64, device=device))
    assert layouts == {"cpu": False, "cuda": True}
    model = tiny("resnet")
    pixels = make_batch(model)["pixel_values"]
    found = model.encode_image(pixels.contiguous(memory_format=torch.channels_last))
    assert_equal_to_rounding(found, model.encode_image(pixels), WIDEST)
