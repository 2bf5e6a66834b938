"""What Transformers' own tools do with these classes: Auto classes, pipelines, placement, dtypes, compile, export."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

from pyramidclip_hf import (
    PyramidCLIPConfig,
    PyramidCLIPForImageClassification,
    PyramidCLIPImageProcessor,
    PyramidCLIPModel,
    PyramidCLIPProcessor,
    PyramidCLIPTextModel,
    PyramidCLIPTokenizer,
    PyramidCLIPVisionModel,
)
from tests.pyramidclip_hf.tiny import BOTH, OLD_TORCH, TOWERS, WIDEST
from tests.rounding import assert_equal_to_rounding


def tiny_config(tower, pooling="max"):
    text = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pooling": pooling}
    return PyramidCLIPConfig(projection_dim=16, vision_config=TOWERS[tower], text_config=text)


@pytest.fixture(scope="module", params=TOWERS)
def folder(request, tmp_path_factory):
    """A saved model with its processor, as a user downloads it."""
    path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = PyramidCLIPModel(tiny_config(request.param)).eval()
    model.save_pretrained(path)
    size = model.config.vision_config.image_size
    image_processor = PyramidCLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    PyramidCLIPProcessor(image_processor, PyramidCLIPTokenizer()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0).integers(0, 255, (3, 90, 70, 3), dtype=np.uint8)
    return [Image.fromarray(array) for array in noise]


def test_auto_classes_find_ours(folder):
    assert type(AutoConfig.from_pretrained(folder)) is PyramidCLIPConfig
    assert type(AutoModel.from_pretrained(folder)) is PyramidCLIPModel
    assert type(AutoModelForZeroShotImageClassification.from_pretrained(folder)) is PyramidCLIPModel
    assert type(AutoModelForImageClassification.from_pretrained(folder)) is PyramidCLIPForImageClassification
    assert type(AutoProcessor.from_pretrained(folder)) is PyramidCLIPProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is PyramidCLIPImageProcessor
    assert type(AutoTokenizer.from_pretrained(folder)) is PyramidCLIPTokenizer


@BOTH
def test_tokens_can_be_added(tower, tmp_path):
    model = PyramidCLIPModel(tiny_config(tower)).eval()
    ids = torch.tensor([[49406, 320, 1929, 49407]])
    before = model.encode_text(ids)
    assert model.get_input_embeddings() is model.text_model.embeddings.token_embedding
    model.resize_token_embeddings(49410)
    torch.testing.assert_close(model.encode_text(ids), before)
    new = model.encode_text(torch.tensor([[49406, 49409, 49407]]))
    model.save_pretrained(tmp_path)
    again = PyramidCLIPModel.from_pretrained(tmp_path)
    assert again.config.text_config.vocab_size == 49410 == len(again.get_input_embeddings().weight)
    torch.testing.assert_close(again.encode_text(ids), before)
    torch.testing.assert_close(again.encode_text(torch.tensor([[49406, 49409, 49407]])), new)


def test_zero_shot_pipeline_equals_the_model(folder, pictures):
    labels = ["a dog", "a remarkably long name of a cat", "!"]
    classify = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")
    model, processor = PyramidCLIPModel.from_pretrained(folder), PyramidCLIPProcessor.from_pretrained(folder)
    texts = [f"This is a photo of {label}." for label in labels]
    for picture in pictures:
        found = {entry["label"]: entry["score"] for entry in classify(picture, candidate_labels=labels)}
        # One text at a time, without padding: what the pipeline pads with must not matter.
        image = model.encode_image(processor(images=picture, return_tensors="pt").pixel_values, normalize=True)
        each = [
            model.encode_text(processor(text=text, return_tensors="pt").input_ids, normalize=True) for text in texts
        ]
        wanted = (model.logit_scale.exp() * image @ torch.cat(each).T).softmax(-1)[0]
        for label, score in zip(labels, wanted.tolist(), strict=True):
            assert_equal_to_rounding(found[label], score, WIDEST, terms=model.logit_scale.exp().item())


def test_image_classification_and_feature_pipelines(folder, pictures, tmp_path):
    model = PyramidCLIPForImageClassification.from_pretrained(folder, num_labels=3)
    processor = PyramidCLIPImageProcessor.from_pretrained(folder)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    found = pipeline("image-classification", model=str(tmp_path), device="cpu")(pictures[0], top_k=3)
    with torch.no_grad():
        pixels = processor(pictures[0], return_tensors="pt").pixel_values
        wanted = model(pixels).logits.softmax(-1)[0].sort(descending=True).values
    assert_equal_to_rounding([entry["score"] for entry in found], wanted, WIDEST)
    vision = PyramidCLIPVisionModel.from_pretrained(folder)
    extract = pipeline("image-feature-extraction", model=vision, image_processor=processor, device="cpu")
    with torch.no_grad():
        tokens = vision(pixels).last_hidden_state
    assert_equal_to_rounding(extract(pictures[0]), tokens, WIDEST)


def _inputs(model):
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[49406, 320, 1929, 49407], [49406, 320, 49407, 0]])
    return {
        "pixel_values": torch.randn(2, 3, size, size, generator=generator),
        "input_ids": ids,
        "roi_features": torch.randn(2, 4, 10, generator=generator),
        "roi_mask": torch.tensor([[True] * 4, [True, False, False, False]]),
    }


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map_offloads(folder, tmp_path, place):
    pytest.importorskip("accelerate", reason='needs accelerate: pip install "pyramidclip-hf[train]"')
    plain = PyramidCLIPModel.from_pretrained(folder)
    inputs = _inputs(plain)
    parts = {"text_model": place, "vision_model": place, "visual_projection": "cpu", "text_projection": place}
    device_map = {**parts, "logit_scale": "cpu"} if place == "disk" else "auto"
    loaded = PyramidCLIPModel.from_pretrained(
        folder, device_map=device_map, max_memory={"cpu": "4GB"}, offload_folder=tmp_path
    )
    if place == "disk":
        assert next(loaded.vision_model.parameters()).device.type == "meta"
    with torch.no_grad():
        wanted, found = plain(**inputs), loaded(**inputs)
    assert_equal_to_rounding(found.logits_per_image, wanted.logits_per_image, WIDEST)
    assert_equal_to_rounding(found.roi_embeds, wanted.roi_embeds, WIDEST)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_and_stays_near(folder, dtype):
    plain = PyramidCLIPModel.from_pretrained(folder)
    half = PyramidCLIPModel.from_pretrained(folder, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    inputs = _inputs(plain)
    with torch.no_grad():
        wanted, found = plain(**inputs), half(**inputs)
    assert found.image_embeds.dtype == torch.float32
    for name in ("image_embeds", "text_embeds", "roi_embeds"):
        assert torch.nn.functional.cosine_similarity(found[name], wanted[name]).min() > 0.99


def test_sharded_save_and_load(folder, tmp_path):
    model = PyramidCLIPModel.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="2MB")
    shards = set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1
    again = PyramidCLIPModel.from_pretrained(tmp_path)
    for (name, one), two in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


_MEASURE = """
import resource, sys, torch
from pyramidclip_hf import PyramidCLIPModel
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = PyramidCLIPModel.from_pretrained(sys.argv[1])
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)
"""


def test_loading_takes_the_memory_of_one_copy(tmp_path):
    # 100 MB, so that what the interpreter does beside the weights does not show.
    config = PyramidCLIPConfig(
        text_config={"num_hidden_layers": 2}, vision_config={"hidden_size": 512, "num_hidden_layers": 4}
    )
    PyramidCLIPModel(config).save_pretrained(tmp_path)
    measured = subprocess.run([sys.executable, "-c", _MEASURE, tmp_path], capture_output=True, text=True, check=True)
    # The file is mapped while it is copied, so at most two copies are resident; building first would add a third.
    assert float(measured.stdout) < 2.3


FORMS = pytest.mark.parametrize(
    "prepare", [lambda model: model, lambda model: model.fuse("onednn")], ids=["plain", "fused"]
)


@OLD_TORCH
@BOTH
@FORMS
@pytest.mark.parametrize("pooling", ["max", "eos"])
def test_towers_compile_without_graph_breaks(tower, pooling, prepare):
    model = prepare(PyramidCLIPModel(tiny_config(tower, pooling)).eval())
    inputs = _inputs(model)
    with torch.no_grad():
        for part, name in ((model.vision_model, "pixel_values"), (model.text_model, "input_ids")):
            compiled = torch.compile(part, fullgraph=True, backend="eager")
            found = compiled(inputs[name]).pooler_output
            assert_equal_to_rounding(found, part(inputs[name]).pooler_output, WIDEST)


@BOTH
@FORMS
def test_towers_export(tower, prepare):
    model = prepare(PyramidCLIPModel(tiny_config(tower)).eval())
    inputs, batch = _inputs(model), torch.export.Dim("batch", min=2, max=64)

    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model.encode_image(pixel_values)

    class Text(Image):
        def forward(self, input_ids):
            return self.model.encode_text(input_ids)

    for module, name in ((Image(), "pixel_values"), (Text(), "input_ids")):
        exported = torch.export.export(module, (inputs[name],), dynamic_shapes=({0: batch},), strict=False).module()
        for count in (2, 5):
            rows = inputs[name].repeat(3, *[1] * (inputs[name].ndim - 1))[:count]
            with torch.no_grad():
                assert_equal_to_rounding(exported(rows), module(rows), WIDEST)


def test_a_text_tower_alone_saves_and_loads(folder, tmp_path):
    PyramidCLIPTextModel.from_pretrained(folder).save_pretrained(tmp_path)
    alone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(alone) is PyramidCLIPTextModel and not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.tensor([[49406, 320, 49407]])
    assert torch.equal(alone(ids).pooler_output, PyramidCLIPModel.from_pretrained(folder).text_model(ids).pooler_output)
