"""Exported models: their engines give what the model gives, in the layout that the Hub's programs read."""

import json
import shutil

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer

from pyramidclip_hf import PyramidCLIPModel, PyramidCLIPProcessor, PyramidCLIPTokenizer
from pyramidclip_hf.backends import load_exported
from pyramidclip_hf.export import export_model
from pyramidclip_hf.image_processing_pyramidclip import PyramidCLIPImageProcessor
from pyramidclip_hf.loading import load_model
from pyramidclip_hf.zero_shot import classify
from tests.pyramidclip_hf.tiny import TOWERS, tiny

onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra export")
pytest.importorskip("onnxscript", reason="needs the extra export")
TEXTS = ["a red bat", "two foxes and a blue boat on a lake in the snow", "!!"]


def saved(folder, tower, pooling="max"):
    vocabulary = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    model = tiny(tower, pooling, text=vocabulary)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    model.save_pretrained(folder)
    PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=TOWERS[tower]["image_size"])).save_pretrained(folder)
    return folder


def pictures(count=9):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 40, 50, 3), generator=generator, dtype=torch.uint8)
    return [Image.fromarray(picture.numpy()) for picture in pixels]


@pytest.fixture(scope="module", params=[("vit", "max"), ("resnet", "eos")], ids=["vit-max", "resnet-eos"])
def exported(request, tmp_path_factory):
    """A folder with a model and its ONNX files in all three types, regions too."""
    tower, pooling = request.param
    folder = saved(tmp_path_factory.mktemp("exported") / tower, tower, pooling)
    files = export_model(
        load_model(str(folder)),
        folder,
        dtypes=("float32", "float16", "int8"),
        regions=True,
        calibration=pictures(),
        texts=TEXTS,
    )
    return folder, files


def inputs(folder, count):
    model = PyramidCLIPModel.from_pretrained(folder).eval()
    processor = PyramidCLIPProcessor.from_pretrained(folder)
    pixels = processor.image_processor(pictures(count), return_tensors="pt")["pixel_values"]
    regions = torch.rand(count, 3, model.config.vision_config.roi_feature_size + 4)
    mask = torch.arange(3)[None] < torch.arange(count)[:, None]
    return model, processor, pixels, regions, mask


@pytest.mark.parametrize("count", [1, 4])
def test_fp32_is_the_model_at_any_batch_size_and_length(exported, count):
    folder, _ = exported
    model, processor, pixels, regions, mask = inputs(folder, count)
    engine = load_exported(str(folder), backend="onnx").model
    for text in TEXTS[:count]:
        ids = processor(text=[text] * count, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            wanted = model.encode_text(ids, normalize=True)
        torch.testing.assert_close(engine.encode_text(ids, normalize=True), wanted, atol=1e-5, rtol=0)
    with torch.no_grad():
        wanted = model.encode_image(pixels), model.encode_rois(regions, mask)
    torch.testing.assert_close(engine.encode_image(pixels), wanted[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(engine.encode_rois(regions, mask), wanted[1], atol=1e-5, rtol=1e-4)


def test_lesser_types_are_near_and_the_report_says_how_near(exported):
    folder, files = exported
    by_name = {file.file: file for file in files}
    assert len(by_name) == 9
    model, _, pixels, _, _ = inputs(folder, 4)
    with torch.no_grad():
        wanted = model.encode_image(pixels, normalize=True)
    for dtype, ending, cosine in (("float16", "_fp16", 0.99999), ("int8", "_quantized", 0.99)):
        got = load_exported(str(folder), backend="onnx", dtype=dtype).model.encode_image(pixels, normalize=True)
        cosines = (got * wanted).sum(dim=1)
        assert cosines.min() > cosine
        assert not torch.equal(got, wanted)
        report = by_name[f"vision_model{ending}.onnx"]
        # Four of the nine pictures that the report is about.
        assert report.least_cosine <= cosines.min() + 1e-6
        assert report.disagreement >= (got - wanted).abs().max() - 1e-6


def test_the_layout_is_what_the_hub_s_programs_look_for(exported):
    folder, _ = exported
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "vision_model.onnx"))
    assert [one.name for one in session.get_inputs()] == ["pixel_values"]
    assert [one.name for one in session.get_outputs()] == ["image_embeds"]
    session = onnxruntime.InferenceSession(str(folder / "onnx" / "text_model_quantized.onnx"))
    assert [one.name for one in session.get_inputs()] == ["input_ids"]
    assert [one.name for one in session.get_outputs()] == ["text_embeds"]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert tokenizer.encode(text).ids == PyramidCLIPTokenizer()(text)["input_ids"]
    assert not [path for path in (folder / "onnx").iterdir() if path.name.startswith(".export-")]


def test_it_is_called_as_the_model_is(exported):
    folder, _ = exported
    model, processor, *_ = inputs(folder, 1)
    engine = load_exported(str(folder), backend="onnx").model
    names = ["a bat", "a fox", "a boat"]
    wanted, got = (classify(one, processor, pictures(3), names) for one in (model, engine))
    for ours, theirs in zip(got, wanted, strict=True):
        assert [one.name for one in ours] == [one.name for one in theirs]
        assert [one.probability for one in ours] == pytest.approx([one.probability for one in theirs], abs=1e-4)


def test_what_is_no_tensor_is_refused_as_by_the_model(exported):
    folder, _ = exported
    engine = load_exported(str(folder), backend="onnx").model
    for encode, given in ((engine.encode_image, torch.zeros(1, 3, 32, 32).numpy()), (engine.encode_text, [[1, 2]])):
        with pytest.raises(ValueError, match='must be a tensor, got .*: call the processor with return_tensors="pt"'):
            encode(given)
    with pytest.raises(ValueError, match="pixel_values must be floats of the processor, got torch.uint8"):
        engine.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_evaluation_s_levels_are_the_model_s(exported):
    folder, _ = exported
    model, processor, pixels, regions, mask = inputs(folder, 3)
    ids = processor(text=TEXTS, padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    batch = {"pixel_values": pixels, "local_pixel_values": pixels.flip(0), "roi_features": regions, "roi_mask": mask}
    batch |= {"input_ids": ids, "summary_input_ids": ids.flip(0), "tag_input_ids": ids}
    levels = ["global", "local", "roi", "caption", "summary", "tags"]
    with torch.no_grad():
        wanted = model.encode_levels(levels, **batch)
    got = load_exported(str(folder), backend="onnx").model.encode_levels(levels, **batch)
    for level in levels:
        torch.testing.assert_close(got[level], wanted[level], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="Level roi lacks its input roi_features"):
        load_exported(str(folder), backend="onnx").model.encode_levels(["roi"], **batch | {"roi_features": None})


def test_wrong_inputs_get_a_sentence(exported):
    folder, _ = exported
    engine = load_exported(str(folder), backend="onnx").model
    size = engine.config.vision_config.image_size
    with pytest.raises(ValueError, match=rf"must be \(batch_size, 3, {size}, {size}\), the size that was exported"):
        engine.encode_image(torch.zeros(1, 3, size + 8, size + 8))
    with pytest.raises(ValueError, match=r"at most 77\)"):
        engine.encode_text(torch.full((1, 78), 49407))
    with pytest.raises(ValueError, match="needs an end token"):
        engine.encode_text(torch.ones(1, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"roi_features must be \(batch_size, regions, 10\)"):
        engine.encode_rois(torch.zeros(1, 2, 7))


def test_what_is_not_the_export_of_this_model_is_refused(exported, tmp_path):
    folder, _ = exported
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    damaged = copy / "onnx" / "text_model.onnx"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    engine = load_exported(str(copy), backend="onnx").model
    with pytest.raises(ValueError, match="is not the file that was exported here: damaged, or of another model"):
        engine.encode_text(torch.tensor([[49406, 320, 49407]]))
    model = PyramidCLIPModel.from_pretrained(copy)
    with torch.no_grad():
        model.logit_scale.add_(1)
    model.save_pretrained(copy)
    with pytest.raises(ValueError, match="exported from other weights than those that lie beside it"):
        load_exported(str(copy), backend="onnx")
    (copy / "onnx" / "export.json").write_text("[]")
    with pytest.raises(ValueError, match="is no record of `pyramidclip export`"):
        load_exported(str(copy), backend="onnx")
    shutil.rmtree(copy / "onnx")
    with pytest.raises(ValueError, match="holds no exported model"):
        load_exported(str(copy), backend="onnx")


def test_int8_needs_pictures_and_nothing_is_kept_that_is_not_the_model(tmp_path, monkeypatch):
    folder = saved(tmp_path / "model", "vit")
    with pytest.raises(ValueError, match="int8 needs pictures like those that it will see"):
        export_model(load_model(str(folder)), folder, dtypes=("int8",))
    assert not (folder / "onnx").exists()
    monkeypatch.setattr("pyramidclip_hf.export._FP32_TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match="away from the model's unit embeddings, expected at most 0e"):
        export_model(load_model(str(folder)), folder)
    assert not list((folder / "onnx").iterdir())


@pytest.mark.slow
def test_another_folder_becomes_complete(tmp_path):
    pytest.importorskip("openvino")
    folder = saved(tmp_path / "model", "vit")
    export_model(load_model(str(folder)), tmp_path / "out", backend="openvino", dtypes=("float32", "float16"))
    model, processor, pixels, _, _ = inputs(folder, 3)
    loaded = load_exported(str(tmp_path / "out"), backend="openvino")
    assert loaded.sha256() == load_model(str(folder)).sha256()
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.encode_image(pixels), model.encode_image(pixels), atol=1e-5, rtol=1e-4)
        ids = processor(text=TEXTS, padding=True, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(loaded.model.encode_text(ids), model.encode_text(ids), atol=1e-5, rtol=1e-4)
    record = json.loads((tmp_path / "out" / "openvino" / "export.json").read_text())
    assert sorted(record["files"]) == [
        "text_model.xml",
        "text_model_fp16.xml",
        "vision_model.xml",
        "vision_model_fp16.xml",
    ]
