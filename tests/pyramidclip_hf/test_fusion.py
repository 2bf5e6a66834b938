"""The inference form against the plain form of tests/plain_forms.py, the reference's numbers, and the model itself."""

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel

from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPModel,
    PyramidCLIPTextModelWithProjection,
    PyramidCLIPVisionModel,
    PyramidCLIPVisionModelWithProjection,
    fusion_pyramidclip,
)
from tests.golden import NAMES, OUTPUTS, golden_batch, golden_model, golden_vectors
from tests.plain_forms import lively, plain_form
from tests.pyramidclip_hf.tiny import BOTH, OLD_TORCH, WIDEST, make_batch, tiny
from tests.rounding import assert_equal_to_rounding

LINEAR = pytest.mark.parametrize("linear", ["torch", "onednn"])
FIELDS = ("image_embeds", "local_image_embeds", "roi_embeds", "text_embeds", "summary_embeds", "tag_embeds",
          "logits_per_image")  # fmt: skip


def close(found, wanted):
    """To rounding, of what the tiny models sum."""
    assert found.dtype == wanted.dtype == torch.float32
    assert_equal_to_rounding(found, wanted, WIDEST)


def assert_equal_to_plain(fused, plain, batch):
    close(fused.encode_image(batch["pixel_values"]), plain.encode_image(batch["pixel_values"]))
    close(fused.encode_text(batch["input_ids"]), plain.encode_text(batch["input_ids"]))
    mask = batch["roi_mask"]
    wanted = plain.encode_rois(batch["roi_features"].masked_fill(~mask[..., None], 0), mask)
    close(fused.encode_rois(batch["roi_features"], mask), wanted)
    wanted = plain.encode_rois(batch["roi_features"], torch.ones_like(mask))
    close(fused.encode_rois(batch["roi_features"]), wanted)


@LINEAR
@pytest.mark.parametrize("pooling", ["max", "eos"])
@BOTH
def test_equals_the_plain_form(tower, pooling, linear):
    model = lively(tiny(tower, pooling))
    plain, batch = plain_form(model), make_batch(model)
    wanted = model(**batch)
    with torch.inference_mode():
        assert_equal_to_plain(model, plain, batch)
        assert model.fuse(linear=linear) is model
        assert_equal_to_plain(model, plain, batch)
        found = model(**batch)
    for name in FIELDS:
        close(found[name], wanted[name].detach())


# flex_attention compiles for most of a minute; `make gpu`'s pass at toy size, which the quick tests run, has it too.
@pytest.mark.parametrize(
    "attention", ["sdpa", "eager", pytest.param("flex_attention", marks=[OLD_TORCH, pytest.mark.slow])]
)
@pytest.mark.parametrize("name", NAMES)
def test_meets_the_reference(name, attention):
    if attention == "flex_attention" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("Inductor's flex kernel does not compile without vector instructions")
    model, wanted = golden_model(name).fuse(), golden_vectors(name)
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        embeds = model.encode_levels(tuple(OUTPUTS), **golden_batch(name))
    for level, key in OUTPUTS.items():
        torch.testing.assert_close(embeds[level], wanted[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("recorded_before", [False, True])
@BOTH
def test_those_who_ask_for_all_tokens_get_them(tower, recorded_before):
    model = lively(tiny(tower, "eos"))
    model.set_attn_implementation("eager")
    fused, batch = copy.deepcopy(model), make_batch(model)
    ask = {"output_hidden_states": True, "output_attentions": True}
    with torch.inference_mode():
        if recorded_before:
            fused(**batch, **ask)
        fused.fuse()
        wanted, found = model(**batch, **ask), fused(**batch, **ask)
        for name in ("vision_model_output", "text_model_output"):
            close(found[name].last_hidden_state, wanted[name].last_hidden_state)
            for kind in ("hidden_states", "attentions"):
                for one, two in zip(found[name][kind], wanted[name][kind], strict=True):
                    close(one, two)
        regions = {"roi_features": batch["roi_features"], "roi_mask": batch["roi_mask"]}
        wanted, found = model.vision_model(**regions, **ask), fused.vision_model(**regions, **ask)
        close(found.last_hidden_state, wanted.last_hidden_state)
        close(found.pooler_output, wanted.pooler_output)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["max", "eos"])
@BOTH
def test_only_what_pooling_needs_is_computed_and_it_is_the_same(tower, pooling, attention):
    model = lively(tiny(tower, pooling))
    model.set_attn_implementation(attention)
    batch = make_batch(model)
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    ids[0], mask[0, 7:] = 5, 0  # a row without end token
    calls = (
        (model.vision_model, {"pixel_values": batch["pixel_values"]}),
        (model.vision_model, {"roi_features": batch["roi_features"], "roi_mask": batch["roi_mask"]}),
        (model.text_model, {"input_ids": ids, "attention_mask": mask}),
    )
    for part, inputs in calls:
        full, pooled = part(**inputs), part(**inputs, pooled_only=True)
        assert full.last_hidden_state is not None and pooled.last_hidden_state is None
        close(pooled.pooler_output, full.pooler_output)
        weights = [weight for weight in part.parameters() if weight.requires_grad]
        wanted, found = (
            torch.autograd.grad(output.pooler_output.square().sum(), weights, allow_unused=True)
            for output in (full, pooled)
        )
        for one, two in zip(found, wanted, strict=True):
            assert (one is None) == (two is None)
            if one is not None:
                assert_equal_to_rounding(one, two, WIDEST, terms=1)  # some are sums of about 1 that cancel


@pytest.mark.parametrize("fused", [False, True])
def test_padding_behind_the_longest_text_is_cut_off_without_gradients(fused):
    model = lively(tiny(pooling="eos"))
    ids = make_batch(model)["input_ids"].clone()
    ids[:, 1:] = 5
    ids[0, 4], ids[1:, 2] = (model.config.text_config.eos_token_id,) * 2
    ids[:, 5:] = 0
    expected = model.get_text_features(ids[:, :5]).pooler_output.detach()
    if fused:
        model = model.fuse()
    lengths = []
    model.text_model.encoder.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    with torch.no_grad():
        close(model.encode_text(ids), expected)
        close(model.encode_text(ids, position_ids=torch.arange(ids.shape[1])[None]), expected)
        ids[0, 4] = 5  # no end token: the last position counts, or the last that the mask shows
        model.encode_text(ids)
        model.encode_text(ids, attention_mask=torch.arange(ids.shape[1]).expand_as(ids) < 6)
        everything = model.get_text_features(ids)
    assert lengths == [5, 5, ids.shape[1], 6, ids.shape[1]]
    assert everything.last_hidden_state.shape[1] == ids.shape[1]
    with torch.enable_grad():  # a step of the training never waits for a length
        model.encode_text(ids[1:])
    assert lengths[-1] == ids.shape[1]


@pytest.mark.parametrize("leff", [0, 3])
def test_any_number_of_leff_blocks_and_any_size(leff):
    model = lively(tiny(vision={"num_leff_layers": leff}))
    fused, batch = copy.deepcopy(model).fuse(), make_batch(model)
    wide = torch.randn(2, 3, 40, 56, generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        close(fused.encode_image(batch["pixel_values"]), plain_form(model).encode_image(batch["pixel_values"]))
        close(fused.encode_image(wide, interpolate_pos_encoding=True),
              model.encode_image(wide, interpolate_pos_encoding=True))  # fmt: skip
        regions = batch["roi_features"], batch["roi_mask"]
        close(fused.encode_rois(*regions), model.encode_rois(*regions))


@BOTH
def test_other_activations_stay_themselves(tower):
    model = lively(tiny(tower, vision={"hidden_act": "gelu"}))
    model.config.text_config.hidden_act = "relu"
    for layer in model.text_model.encoder.layers:
        layer.mlp.activation_fn = nn.ReLU()
    fused, batch = copy.deepcopy(model).fuse(), make_batch(model)
    with torch.inference_mode():
        found, wanted = fused(**batch), model(**batch)
    for name in FIELDS:
        close(found[name], wanted[name])
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())


@BOTH
def test_without_oneDNN_s_operations_torch_s_own_are_used(tower, monkeypatch):
    monkeypatch.setattr(fusion_pyramidclip, "_has_operations", lambda *names: False)
    fusion_pyramidclip._onednn_is_faster.cache_clear()
    model = lively(tiny(tower))
    plain, batch = plain_form(model), make_batch(model)
    with pytest.raises(ValueError, match="oneDNN"):
        model.fuse(linear="onednn")
    with torch.inference_mode():
        assert_equal_to_plain(model.fuse(), plain, batch)
    fusion_pyramidclip._onednn_is_faster.cache_clear()


@LINEAR
@BOTH
def test_other_dtypes_before_and_after(tower, linear):
    model = lively(tiny(tower))
    plain, batch = plain_form(model), make_batch(model)
    pixels = batch["pixel_values"]
    with torch.inference_mode():
        wanted = plain.encode_image(pixels)
        plain_error = (copy.deepcopy(model).bfloat16().encode_image(pixels).float() - wanted).abs().max()
        before = copy.deepcopy(model).bfloat16().fuse(linear=linear)
        after = copy.deepcopy(model).fuse(linear=linear).bfloat16()
        for fused in (before, after):
            assert fused.dtype == torch.bfloat16
            assert (fused.encode_image(pixels).float() - wanted).abs().max() <= 2 * plain_error
            assert fused.encode_text(batch["input_ids"]).dtype == torch.bfloat16
        double = copy.deepcopy(model).double().fuse(linear=linear)
        torch.testing.assert_close(double.encode_image(pixels), plain.double().encode_image(pixels.double()),
                                   atol=1e-12, rtol=0)  # fmt: skip
        fused = model.fuse(linear=linear)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (fused.encode_image(pixels).float() - wanted).abs().max() <= 2 * plain_error


@LINEAR
@BOTH
def test_gradients_to_the_inputs_and_inputs_left_alone(tower, linear):
    model = lively(tiny(tower))
    fused = copy.deepcopy(model).fuse(linear=linear)
    pixels = make_batch(model)["pixel_values"].contiguous(memory_format=torch.channels_last)
    kept, gradients = pixels.clone(), []
    for part in (model, fused):
        given = pixels.clone().requires_grad_()
        gradients.append(torch.autograd.grad(part.encode_image(given).square().sum(), given)[0])
    close(gradients[1], gradients[0])
    assert not any(weight.requires_grad for weight in fused.parameters())
    with torch.inference_mode():
        first = fused.encode_image(pixels)
        assert torch.equal(fused.encode_image(pixels), first) and torch.equal(pixels, kept)


@BOTH
def test_single_towers_and_heads(tower):
    whole = lively(tiny(tower, "eos"))
    batch, vision, text = make_batch(whole), whole.config.vision_config, whole.config.text_config
    heads = [
        (PyramidCLIPVisionModel(vision), "pixel_values"),
        (PyramidCLIPVisionModelWithProjection(vision), "pixel_values"),
        (PyramidCLIPForImageClassification(copy.deepcopy(whole.config)), "pixel_values"),
        (PyramidCLIPTextModelWithProjection(text), "input_ids"),
    ]
    for head, name in heads:
        lively(head.eval())
        fused = copy.deepcopy(head).fuse()
        for options in ({}, {"output_hidden_states": True}):
            with torch.inference_mode():
                wanted, found = head(batch[name], **options), fused(batch[name], **options)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                several = isinstance(value, tuple)
                for one, two in zip(
                    found[key] if several else [found[key]], value if several else [value], strict=True
                ):
                    close(one, two)


@BOTH
def test_a_fused_model_says_what_it_cannot_do_any_more(tower, tmp_path):
    model = tiny(tower).fuse()
    calls = [model.train, model.state_dict, lambda: model.load_state_dict({}), lambda: model.save_pretrained(tmp_path),
             model.vision_model.train, model.text_model.state_dict]  # fmt: skip
    for call in calls:
        with pytest.raises(RuntimeError, match=r"needs the plain form.*from_pretrained"):
            call()
    assert not list(tmp_path.iterdir())
    assert model.eval() is model and not any(module.training for module in model.modules())


@BOTH
def test_weights_of_fused_parts_are_never_taken_for_plain_ones(tower):
    plain, fused = tiny(tower), tiny(tower).fuse()
    parts = ["text_model.encoder", "vision_model.encoder" if tower == "vit" else "vision_model.trunk"]
    for part in parts:
        for given, taker in ((fused, plain), (plain, fused)):
            with pytest.raises(RuntimeError, match="Error.* in loading state_dict"):
                taker.get_submodule(part).load_state_dict(given.get_submodule(part).state_dict())
    same = ["visual_projection", "text_model.embeddings"]
    for part in same + (["vision_model.embeddings"] if tower == "vit" else ["vision_model.attention_pool"]):
        plain.get_submodule(part).load_state_dict(fused.get_submodule(part).state_dict())


@pytest.mark.slow
@OLD_TORCH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@BOTH
def test_compiled_with_freezing_it_stays_what_it_is(tower, dtype):
    """Inductor fails in bf16 over slices that are written in place."""
    torch._dynamo.reset()
    fused = lively(tiny(tower, "eos")).to(dtype).fuse()
    pixels = make_batch(fused)["pixel_values"].to(dtype)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        wanted, found = fused.encode_image(pixels), torch.compile(fused.encode_image)(pixels)
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    assert (found - wanted).abs().max() <= allowed * wanted.abs().max()


@BOTH
def test_fusing_again_and_tower_by_tower(tower):
    model = lively(tiny(tower))
    plain, batch = plain_form(model), make_batch(model)
    model.vision_model.fuse()
    assert model.vision_model.is_fused and not model.is_fused
    blocks = [id(module) for module in model.vision_model.modules()]
    assert model.fuse().fuse() is model
    assert [id(module) for module in model.vision_model.modules()] == blocks
    with torch.inference_mode():
        assert_equal_to_plain(model, plain, batch)


@BOTH
def test_a_model_with_one_fused_tower_is_left_whole_by_what_it_cannot_do(tower, tmp_path):
    model = tiny(tower)
    model.text_model.fuse()
    for call in (model.train, model.state_dict, lambda: model.save_pretrained(tmp_path / "model")):
        with pytest.raises(RuntimeError, match="of this PyramidCLIPTextModel into its weights"):
            call()
    assert not any(module.training for module in model.modules()) and not list(tmp_path.iterdir())
    assert not model.vision_model.train().eval().is_fused and model.vision_model.state_dict()


def test_the_defaults_for_new_tensors_do_not_matter():
    model, batch = lively(tiny()), make_batch(tiny())
    wanted = model.encode_image(batch["pixel_values"]).detach()
    fusion_pyramidclip._onednn_is_faster.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        model.fuse()
    finally:
        torch.set_default_dtype(torch.float32)
    close(model.encode_image(batch["pixel_values"]), wanted)


class Adapter(nn.Linear):
    pass


class Wrapper(nn.Module):
    """An adapter as today's peft has them: not a subclass, but with the wrapped layer's weight."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer, self.lora = base_layer, nn.Linear(base_layer.in_features, base_layer.out_features)

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, hidden_states):
        return self.base_layer(hidden_states) + self.lora(hidden_states)


def change(path, name, make):
    """Replaces what the submodule at `path` calls `name` by `make` of it."""

    def apply(model):
        target = model.get_submodule(path)
        setattr(target, name, make(getattr(target, name, None)))

    return apply


LEFF = "vision_model.encoder.layers.0.mlp"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: model.train(), r"train mode: call eval\(\)"),
        (change(LEFF, "fc1", lambda old: Adapter(old.in_features, old.out_features).eval()), "fc1 is a Adapter"),
        (change(LEFF, "fc2", lambda old: Wrapper(old).eval()), "mlp.fc2 is a Wrapper"),
        (
            change("text_model.encoder.layers.0.self_attn", "v_proj", lambda old: Wrapper(old).eval()),
            "v_proj is a Wrapper",
        ),
        (change(f"{LEFF}.norm2", "track_running_stats", lambda old: False), "norm2 keeps no running statistics"),
        (change("", "text_projection", lambda old: old.to("meta")), "text_projection.weight has no values"),
        (change("text_model", "_hf_hook", lambda old: "a hook"), "text_model is dispatched"),
    ],
)
def test_what_cannot_be_fused_is_refused_and_left_as_it_was(spoil, message):
    model = tiny()
    spoil(model)
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        model.fuse()
    assert [id(module) for module in model.modules()] == before and not model.is_fused


def test_adapters_of_the_attention_pooling_are_refused_and_those_of_the_projections_stay():
    model = tiny("resnet")
    change("vision_model.attention_pool", "k_proj", lambda old: Wrapper(old).eval())(model)
    with pytest.raises(ValueError, match="k_proj is a Wrapper"):
        model.fuse()
    model = lively(tiny("resnet"))
    change("", "visual_projection", lambda old: Wrapper(old).eval())(model)
    pixels = make_batch(model)["pixel_values"]
    wanted = model.encode_image(pixels).detach()
    close(model.fuse().encode_image(pixels), wanted)


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match='"auto", "torch" or "onednn", got \'mkl\''):
        tiny().fuse(linear="mkl")


class Operations(TorchDispatchMode):
    """Counts what the host asks a device to do: no views, and no memory alone."""

    NOTHING = ("aten._unsafe_view", "aten.empty", "aten.promote_types")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or str(function).startswith(self.NOTHING))
        return function(*args, **(kwargs or {}))


def asked(call):
    with torch.no_grad(), Operations() as operations:
        call()
    return operations.count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embedding_a_picture_asks_for_what_clip_model_does_and_the_convolutions(dtype):
    """Twelve blocks, nine with LeFF, as ViT-B has them."""
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 12, "image_size": 32, "patch_size": 16}
    text = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    plain = lively(PyramidCLIPModel(PyramidCLIPConfig(vision_config=sizes, text_config=text))).eval().to(dtype)
    fused = copy.deepcopy(plain).fuse(linear="torch")
    clip = CLIPModel(CLIPConfig(vision_config=sizes | {"intermediate_size": 128}, text_config=text)).eval().to(dtype)
    pixels = torch.randn(2, 3, 32, 32, dtype=dtype)
    theirs = asked(lambda: clip.get_image_features(pixel_values=pixels))
    assert 150 < asked(lambda: fused.encode_image(pixels)) <= theirs + 9
    assert (
        asked(lambda: plain.encode_image(pixels)) <= 1.65 * theirs
    )  # BatchNorm is beside each convolution and product


def test_on_a_gpu_a_resnet_stays_as_it_is(monkeypatch):
    """There its fused form was slower than the plain one."""
    plain = lively(tiny("resnet", "eos"))
    fused, batch = copy.deepcopy(plain), make_batch(plain)
    monkeypatch.setattr(fusion_pyramidclip, "_on_gpu", lambda module: True)
    fused.fuse(linear="torch")
    assert fused.is_fused and fused.vision_model.is_fused
    assert [type(part) for part in fused.vision_model.modules()] == [
        type(part) for part in plain.vision_model.modules()
    ]
    pixels = batch["pixel_values"]
    assert asked(lambda: fused.encode_image(pixels)) == asked(lambda: plain.encode_image(pixels))
    with torch.no_grad():
        # Convolutions of weights that lie elsewhere may round otherwise: those of torch 2.13 do.
        close(fused.encode_image(pixels), plain.encode_image(pixels))
        close(fused.encode_text(batch["input_ids"]), plain.encode_text(batch["input_ids"]))


@OLD_TORCH
@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no cuda tensors, not even fake ones")
def test_where_a_model_is_decides_what_is_fused():
    model = tiny("resnet", "eos")
    assert not fusion_pyramidclip._on_gpu(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert fusion_pyramidclip._on_gpu(model.to("cuda"))
