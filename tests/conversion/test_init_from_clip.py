"""Starting from transformers' CLIPModel, open_clip and OpenAI files: the features stay the same."""

import json
import os

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel

from conversion.clip_sources import read_clip
from conversion.init_from_clip import feature_cosines, main, start_model, summarise
from conversion.leff_start import leff_from_mlp
from pyramidclip_hf import PyramidCLIPConfig, PyramidCLIPModel
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.modeling_pyramidclip import PyramidCLIPLeFFLayer

VOCABULARY, LENGTH = 60, 20
OPEN_CLIP_TEXT = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": 48, "heads": 3, "layers": 11}
OPEN_CLIP_VISION = {
    "vit": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16, "mlp_ratio": 3.0},
    "resnet": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32},
}


def inputs(image_size, batch=3):
    """Pictures, and texts of different length that end with the highest id, padded with 0."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(batch, 3, image_size, image_size, generator=generator)
    ids = torch.randint(1, VOCABULARY - 2, (batch, LENGTH), generator=generator)
    ids[:, 0] = VOCABULARY - 2
    for row, end in enumerate((5, LENGTH - 1, 9)):
        ids[row, end], ids[row, end + 1 :] = VOCABULARY - 1, 0
    return pixels, ids


def randomised(model):
    """Weights as far from their initial symmetry as trained ones, running statistics included."""
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
        elif tensor.is_floating_point() and tensor.ndim <= 1 and "logit" not in name:
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def transformers_folder(request, tmp_path_factory):
    tower = {"num_hidden_layers": 3, "intermediate_size": 160, "hidden_act": request.param}
    text = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": LENGTH,
            "bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}  # fmt: skip
    vision = {"hidden_size": 48, "num_attention_heads": 3, "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-4}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=24))
    folder = tmp_path_factory.mktemp("transformers") / "clip"
    randomised(clip).save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], size={"shortest_edge": 32}).save_pretrained(folder)
    return folder


def open_clip_model(tower, quick_gelu=True, custom_text=False):
    from open_clip.model import CLIP, CustomTextCLIP

    torch.manual_seed(0)
    model = (CustomTextCLIP if custom_text else CLIP)(
        24, OPEN_CLIP_VISION[tower], OPEN_CLIP_TEXT, quick_gelu=quick_gelu
    )
    return randomised(model)


def open_clip_json(tower, quick_gelu=True, **vision):
    towers = {"vision_cfg": OPEN_CLIP_VISION[tower] | vision, "text_cfg": OPEN_CLIP_TEXT}
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "interpolation": "bilinear"}
    return {"model_cfg": {"embed_dim": 24, "quick_gelu": quick_gelu, **towers}, "preprocess_cfg": preprocess}


def assert_same_features(folder, wanted_pictures, wanted_texts, pixels, ids):
    model = PyramidCLIPModel.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels), wanted_pictures, atol=1e-4, rtol=0)
        torch.testing.assert_close(model.encode_text(ids), wanted_texts, atol=1e-4, rtol=0)
    return model


def test_features_of_transformers_clip(transformers_folder, tmp_path, capsys):
    assert main(["--model", str(transformers_folder), "--output-dir", str(tmp_path / "start")]) == 0
    clip = CLIPModel.from_pretrained(transformers_folder)
    pixels, ids = inputs(32)
    with torch.no_grad():
        pictures, texts = clip.get_image_features(pixels).pooler_output, clip.get_text_features(ids).pooler_output
        logits = clip(input_ids=ids, pixel_values=pixels).logits_per_image
    model = assert_same_features(tmp_path / "start", pictures, texts, pixels, ids)
    with torch.no_grad():
        ours = model(input_ids=ids, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(ours, logits, atol=1e-4, rtol=1e-5)
    shown = capsys.readouterr().out
    assert "New:\n  vision_model.embeddings.roi_projection.weight\npicture features: cosine" in shown
    assert "1.0000 (lowest 1.0000)" in shown
    processor = PyramidCLIPImageProcessor.from_pretrained(tmp_path / "start")
    assert list(processor.image_mean) == [0.1, 0.2, 0.3] and processor.crop_size["height"] == 32


def test_end_token_2_of_old_configurations_means_the_highest_id(transformers_folder, tmp_path):
    clip = CLIPModel.from_pretrained(transformers_folder)
    clip.config.text_config.eos_token_id = 2
    clip.save_pretrained(tmp_path / "old")
    assert main(["--model", str(tmp_path / "old"), "--output-dir", str(tmp_path / "start")]) == 0
    pixels, ids = inputs(32)
    old = CLIPModel.from_pretrained(tmp_path / "old")
    assert old.config.text_config.eos_token_id == 2
    with torch.no_grad():
        wanted = old.get_image_features(pixels).pooler_output, old.get_text_features(ids).pooler_output
    assert_same_features(tmp_path / "start", *wanted, pixels, ids)


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_features_of_open_clip_folders(tower, quick_gelu, tmp_path):
    clip = open_clip_model(tower, quick_gelu)
    folder = tmp_path / "clip"
    folder.mkdir()
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_json(tower, quick_gelu)), encoding="utf8")
    assert main(["--model", str(folder), "--output-dir", str(tmp_path / "start")]) == 0
    pixels, ids = inputs(OPEN_CLIP_VISION[tower]["image_size"])
    with torch.no_grad():
        wanted = clip.encode_image(pixels), clip.encode_text(ids)
    model = assert_same_features(tmp_path / "start", *wanted, pixels, ids)
    assert model.config.text_config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    assert model.config.vision_config.num_attention_heads == {"vit": 4, "resnet": 8}[tower]
    processor = PyramidCLIPImageProcessor.from_pretrained(tmp_path / "start")
    assert list(processor.image_std) == [0.2, 0.2, 0.2] and processor.resample == 2


@pytest.mark.parametrize("kind", ["json", "flags", "text in a class of its own", "half", "torchscript"])
def test_features_of_weight_files(kind, tmp_path, refused):
    clip = open_clip_model("vit", quick_gelu=kind != "json", custom_text=kind.startswith("text"))
    path, more = tmp_path / "clip.pt", ["--vision-heads", "4", "--text-heads", "3"]
    tensors = clip.state_dict()
    if kind == "json":
        path, more = tmp_path / "clip.safetensors", ["--config", str(tmp_path / "clip.json")]
        (tmp_path / "clip.json").write_text(json.dumps(open_clip_json("vit", False)["model_cfg"]), encoding="utf8")
        from safetensors.torch import save_file

        save_file(tensors, path)
    elif kind == "torchscript":
        # As OpenAI's archives: the weights under their names, and three numbers beside them.
        holder = script_holder(tensors | {"input_resolution": torch.tensor(32), "context_length": torch.tensor(LENGTH),
                                          "vocab_size": torch.tensor(VOCABULARY)})  # fmt: skip
        torch.jit.script(holder).save(path)
        words = ["--model", path, "--output-dir", tmp_path / "start", *more]
        refused(main, words, "TorchScript archive.*--allow-torchscript")
        more.append("--allow-torchscript")
    else:
        if kind == "half":
            clip.half().float()
            tensors = {name: tensor.half() for name, tensor in tensors.items()}
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in tensors.items()}}, path)
    assert main(["--model", str(path), "--output-dir", str(tmp_path / "start"), *more]) == 0
    pixels, ids = inputs(32)
    with torch.no_grad():
        wanted = clip.encode_image(pixels), clip.encode_text(ids)
    assert_same_features(tmp_path / "start", *wanted, pixels, ids)


def script_holder(tensors):
    """A module whose state dict has these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        module = root
        *parents, leaf = name.split(".")
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(leaf, tensor.clone())
    return root


def leff_start(tmp_path, num_leff_layers=2, pooling="eos"):
    torch.save(open_clip_model("vit").state_dict(), tmp_path / "clip.pt")
    source = read_clip(tmp_path / "clip.pt", vision_heads=4, text_heads=3)
    return source, *start_model(source, num_leff_layers, pooling, 16)


def test_leff_keeps_the_function_on_patch_tokens(tmp_path):
    """In eval mode, the block's output on patches is the MLP block's up to one constant that LayerNorm takes out."""
    torch.manual_seed(0)
    width, grid = 64, 5
    config = PyramidCLIPConfig(vision_config={"hidden_size": width, "image_size": 80, "num_hidden_layers": 1,
                                              "num_leff_layers": 1}).vision_config  # fmt: skip
    mlp = {"layer_norm2.weight": 1 + 0.3 * torch.randn(width), "layer_norm2.bias": 0.2 * torch.randn(width),
           "mlp.fc1.weight": torch.randn(256, width) / 8, "mlp.fc1.bias": 0.3 * torch.randn(256) - 0.3,
           "mlp.fc2.weight": torch.randn(width, 256) / 24, "mlp.fc2.bias": 0.1 * torch.randn(width)}  # fmt: skip
    config._attn_implementation = "eager"
    layer = PyramidCLIPLeFFLayer(config).eval()
    with torch.no_grad():
        layer.load_state_dict(leff_from_mlp(mlp, "quick_gelu"), strict=False)
        tokens = 2 * torch.randn(4, 1 + grid * grid, width)
        normed = F.layer_norm(tokens, (width,), mlp["layer_norm2.weight"], mlp["layer_norm2.bias"])
        inner = F.linear(normed, mlp["mlp.fc1.weight"], mlp["mlp.fc1.bias"])
        wanted = F.linear(inner * torch.sigmoid(1.702 * inner), mlp["mlp.fc2.weight"], mlp["mlp.fc2.bias"])
        got = layer.feed_forward(layer.layer_norm2(tokens), (grid, grid))
        for output in (got, layer.train().feed_forward(layer.layer_norm2(tokens), (grid, grid))):
            centred = [x[:, 1:] - x[:, 1:].mean(-1, keepdim=True) for x in (output, wanted)]
            assert F.cosine_similarity(*(x.flatten() for x in centred), dim=0) > 0.97
            assert (centred[0] - centred[1]).square().mean() < 0.06 * centred[1].square().mean()
    torch.testing.assert_close(got[:, 0], 0.1 * normed[:, 0])


def test_leff_start_lists_what_is_new_and_can_train(tmp_path):
    source, model, new, changed = leff_start(tmp_path)
    parts = ("norm1", "depthwise", "norm2", "norm3")
    assert {name for name in new if ".roi_" not in name} == {
        name for name in model.state_dict() if any(f"layers.{i}.mlp.{part}." in name for i in (0, 1) for part in parts)
    }
    assert set(changed) == {
        f"vision_model.encoder.layers.{i}.{name}" for i in (0, 1)
        for name in ("layer_norm2.weight", "layer_norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight",
                     "mlp.fc2.bias")
    }  # fmt: skip
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    cosines = feature_cosines(model, source)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers()) and not model.training
    assert cosines["text"].min() > 0.9999
    assert cosines["picture"].min() > 0.6 and cosines["picture, train mode"].min() > 0.6
    pixels, ids = inputs(32)
    model.config.loss_weights = {"global_caption": 1.0}
    model.train()(pixel_values=pixels, input_ids=ids, return_loss=True).loss.backward()
    for name, parameter in model.named_parameters():
        if "encoder.layers" in name and ".mlp." in name:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_maximum_pooling_can_be_asked_for(tmp_path):
    _, model, _, _ = leff_start(tmp_path, num_leff_layers=0, pooling="max")
    assert model.config.text_config.pooling == "max"


def test_seed_decides_the_new_parameters(tmp_path):
    torch.save(open_clip_model("vit").state_dict(), tmp_path / "clip.pt")
    source = read_clip(tmp_path / "clip.pt", vision_heads=4, text_heads=3)
    first, again, other = (start_model(source, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    name = "vision_model.embeddings.roi_projection.weight"
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])


def test_names_are_folded():
    names = [f"layers.x.layers.{index}.a" for index in (0, 1, 2, 4)] + ["roi.b"]
    assert summarise(names) == ["layers.x.layers.0-2.a", "layers.x.layers.4.a", "roi.b"]


@pytest.fixture
def not_started(refused, tmp_path):
    """As `refused`, and no folder may appear."""

    def check(arguments, match):
        refused(main, ["--output-dir", tmp_path / "start", *arguments], match)
        assert not (tmp_path / "start").exists()

    return check


def test_leff_does_not_go_into_a_resnet_or_too_many_blocks(tmp_path, not_started):
    torch.save(open_clip_model("resnet").state_dict(), tmp_path / "clip.pt")
    heads = ["--vision-heads", 8, "--text-heads", 3]
    not_started(["--model", tmp_path / "clip.pt", *heads, "--num-leff-layers", 1], "LeFF is for the ViT")
    torch.save(open_clip_model("vit").state_dict(), tmp_path / "clip.pt")
    not_started(["--model", tmp_path / "clip.pt", *heads, "--num-leff-layers", 4], "between 0 and num_hidden")


@pytest.mark.parametrize(
    "vision", [{"timm_model_name": "resnet50"}, {"attentional_pool": True}, {"pool_type": "avg"}, {"no_ln_pre": True},
               {"some_new_option": 3}]
)  # fmt: skip
def test_open_clip_models_that_compute_something_else(vision, tmp_path, not_started):
    torch.save(open_clip_model("vit").state_dict(), tmp_path / "clip.pt")
    (tmp_path / "clip.json").write_text(json.dumps(open_clip_json("vit", **vision)), encoding="utf8")
    arguments = ["--model", tmp_path / "clip.pt", "--config", tmp_path / "clip.json"]
    not_started(arguments, f"vision_cfg asks for .*{next(iter(vision))}")


def test_what_is_no_clip_model(tmp_path, not_started):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}', encoding="utf8")
    not_started(["--model", tmp_path / "bert"], "is no CLIP model")
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pt")
    not_started(["--model", tmp_path / "x.pt"], "no weights of a CLIP model")
    state_dict = open_clip_model("vit").state_dict()
    torch.save(state_dict | {"visual.extra": torch.ones(2)}, tmp_path / "x.pt")
    not_started(["--model", tmp_path / "x.pt", "--text-heads", "3"], r"unused \['visual.extra'\]")
    not_started(["--model", tmp_path / "bert", "--hidden-act", "gelu"], "are for a file of weights")
    not_started(["--model", tmp_path / "nowhere.pt"], "no such file or folder")
    not_started(["--model", tmp_path / "nowhere"], "no such file or folder")
    not_started(["--model", "some/model"], "the Hub cannot be asked")


def test_folder_with_a_model_needs_overwrite(transformers_folder, tmp_path, refused):
    arguments = ["--model", str(transformers_folder), "--output-dir", str(tmp_path / "start")]
    assert main(arguments) == 0
    refused(main, arguments, "already holds a model")
    assert main([*arguments, "--overwrite", "--pooling", "max"]) == 0
    assert PyramidCLIPConfig.from_pretrained(tmp_path / "start").text_config.pooling == "max"
    assert os.listdir(tmp_path) == ["start"]
