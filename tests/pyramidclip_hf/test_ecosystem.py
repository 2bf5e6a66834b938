"""docs/ecosystem.md: its blocks run as they stand there, and what it promises of frozen models and adapters holds."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

import pyramidclip_command
from pyramidclip_hf import PyramidCLIPImageProcessor, PyramidCLIPModel, PyramidCLIPProcessor, PyramidCLIPTokenizer
from tests.pyramidclip_hf.tiny import BOTH, make_batch, tiny

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ecosystem.md"


def block(heading):
    """The Python block below a heading of the page."""
    section = PAGE.read_text(encoding="utf8").split(f"## {heading}\n")[1].split("\n## ")[0]
    return re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]


@pytest.fixture
def names(tmp_path):
    """What the blocks take for granted."""
    torch.manual_seed(0)
    vocabulary = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "max_position_embeddings": 77}
    model = tiny()
    config = model.config
    for name, value in vocabulary.items():
        setattr(config.text_config, name, value)
    PyramidCLIPModel(config).save_pretrained(tmp_path / "model")
    processor = PyramidCLIPProcessor(PyramidCLIPImageProcessor(size=32), PyramidCLIPTokenizer())
    processor.save_pretrained(tmp_path / "model")
    noise = np.random.default_rng(0).integers(0, 255, (5, 40, 40, 3), dtype=np.uint8)
    return {
        "folder": tmp_path / "model",
        "output_folder": str(tmp_path / "out"),
        "pairs": [{"image": Image.fromarray(noise[i]), "caption": f"picture {i}"} for i in range(5)],
        "PyramidCLIPModel": PyramidCLIPModel,
        "PyramidCLIPProcessor": PyramidCLIPProcessor,
    }


def test_freezing(names):
    exec(block("Freezing"), names)
    model = names["model"]
    learns = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns == {"text_model", "text_projection", "logit_scale"}
    assert not any(module.training for module in model.modules() if isinstance(module, _BatchNorm))


@torch.no_grad()
def test_detectors(names):
    exec(block("Detectors"), names)
    trunk, backbone = names["detector"].model.backbone.model.eval(), names["backbone"]
    pixels = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(trunk(pixels).feature_maps, backbone(pixels).feature_maps)


def test_trainer_with_a_last_batch_of_one_pair(names):
    pytest.importorskip("accelerate", reason='needs accelerate: pip install "pyramidclip-hf[train]"')
    exec(block("Trainer").replace("report_to=[]", "report_to=[], use_cpu=True, disable_tqdm=True"), names)
    assert names["trainer"].state.global_step == 6  # 5 pairs in batches of 4, three times
    assert 0 < names["metrics"]["eval_loss"] < 5


@pytest.mark.parametrize("saved", [None, ["norm1", "norm2", "norm3"]])
@BOTH
def test_an_adapter_gives_after_loading_what_it_gave_before(tower, saved, tmp_path):
    peft = pytest.importorskip("peft", reason='needs peft: pip install -e ".[dev]"')
    model = tiny(tower, loss_weights={"global_caption": 1.0})
    batch = {name: value for name, value in make_batch(model).items() if name in ("pixel_values", "input_ids")}
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    adapted = peft.get_peft_model(model, settings).train()
    assert any(norm.training for norm in adapted.modules() if isinstance(norm, _BatchNorm)) == bool(saved)
    optimizer = torch.optim.SGD([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**batch, return_loss=True).loss.backward()
        optimizer.step()
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny(tower, loss_weights={"global_caption": 1.0}), tmp_path).eval()
    with torch.no_grad():
        trained, loaded, untrained = (one(**batch).logits_per_image for one in (adapted.eval(), again, tiny(tower)))
    assert torch.equal(loaded, trained) and not torch.allclose(trained, untrained, atol=1e-3)


def test_the_documented_adapter_trains_what_the_page_says(names):
    pytest.importorskip("peft", reason='needs peft: pip install -e ".[dev]"')
    exec(block("Adapters"), names)
    learns = {name for name, parameter in names["adapted"].named_parameters() if parameter.requires_grad}
    assert learns and all("lora_" in name for name in learns)


@pytest.mark.parametrize("part", ["vision_model", "text_model"])
@BOTH
def test_a_merged_adapter_is_a_plain_model_that_can_be_fused(tower, part):
    peft = pytest.importorskip("peft", reason='needs peft: pip install -e ".[dev]"')
    model = tiny(tower)
    batch = {name: value for name, value in make_batch(model).items() if name in ("pixel_values", "input_ids")}
    settings = peft.LoraConfig(r=4, target_modules=f".*{part}.*(q_proj|v_proj)", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings).eval()
    with pytest.raises(ValueError, match="Merge adapters first"):
        adapted.base_model.model.fuse()
    with torch.no_grad():
        wanted = adapted(**batch).logits_per_image
        fused = adapted.merge_and_unload().fuse()
        assert type(fused) is PyramidCLIPModel and fused.is_fused
        torch.testing.assert_close(fused(**batch).logits_per_image, wanted, atol=1e-4, rtol=0)
        assert not torch.allclose(wanted, tiny(tower)(**batch).logits_per_image, atol=1e-2)


def units(names):
    """Unit embeddings of the pairs by the model itself, each text without padding."""
    model, processor = (
        names[name].from_pretrained(names["folder"]) for name in ("PyramidCLIPModel", "PyramidCLIPProcessor")
    )
    with torch.no_grad():
        pixels = processor(images=[pair["image"] for pair in names["pairs"]], return_tensors="pt")["pixel_values"]
        ids = [processor(text=pair["caption"], return_tensors="pt")["input_ids"] for pair in names["pairs"]]
        texts = torch.cat([model.encode_text(one, normalize=True) for one in ids])
        return model.encode_image(pixels, normalize=True), texts


def test_datasets_map(names):
    pytest.importorskip("datasets", reason='needs datasets: pip install "pyramidclip-hf[train]"')
    exec(block("Datasets"), names)
    batch = names["prepared"][:]
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values"]
    model = PyramidCLIPModel.from_pretrained(names["folder"])
    with torch.no_grad():
        found = (
            model.encode_image(batch["pixel_values"], normalize=True),
            model.encode_text(batch["input_ids"], normalize=True),
        )
    for one, two in zip(found, units(names), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


def test_pipelines(names):
    exec(block("Pipelines"), names)
    assert {one["label"] for one in names["predictions"]} == {"bat", "fox"}
    assert sum(one["score"] for one in names["predictions"]) == pytest.approx(1)


def test_one_tower(names):
    exec(block("One tower"), names)
    model, pixels = PyramidCLIPModel.from_pretrained(names["folder"]), make_batch(tiny())["pixel_values"]
    ids = torch.tensor([[49406, 320, 49407]])
    with torch.no_grad():
        for found, wanted in (
            (names["pictures"](pixels).image_embeds, model.encode_image(pixels)),
            (names["texts"](ids).text_embeds, model.encode_text(ids)),
        ):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    kept = {name.split(".")[0] for name, _ in names["pictures"].named_parameters()}
    assert kept == {"vision_model", "visual_projection"}


def test_copies(names):
    exec(block("Copies"), names)
    pixels = make_batch(tiny())["pixel_values"]
    with torch.no_grad():
        wanted = names["model"].encode_image(pixels)
        for copied in (names["twin"], names["sent"]):
            assert copied.is_fused and torch.equal(copied.encode_image(pixels), wanted)


@pytest.mark.slow
def test_sentence_transformers(names):
    pytest.importorskip("sentence_transformers", reason='needs sentence-transformers: pip install -e ".[dev]"')
    names["pairs"][1]["caption"] = "a red bat and two foxes " * 40  # longer than the context
    with torch.no_grad():
        processor = PyramidCLIPProcessor.from_pretrained(names["folder"])
        ids = processor.tokenizer(names["pairs"][1]["caption"], truncation=True, return_tensors="pt")["input_ids"]
        long = PyramidCLIPModel.from_pretrained(names["folder"]).encode_text(ids, normalize=True)[0]
    exec(block("Sentence Transformers"), names)
    torch.testing.assert_close(torch.from_numpy(names["texts"][1]).cpu(), long, atol=1e-5, rtol=0)
    names["pairs"][1]["caption"] = "short"
    pictures, texts = units(names)
    torch.testing.assert_close(torch.from_numpy(names["pictures"]), pictures, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.from_numpy(names["texts"][2:]), texts[2:], atol=1e-5, rtol=0)


def test_weights_in_int8(names):
    pytest.importorskip(
        "torchao", reason="needs torchao, which makes torch warn at every start: make test-versions has it"
    )
    exec(block("Quantised weights"), names)
    assert type(names["small"].vision_model.encoder.layers[0].self_attn.q_proj.weight.data) is not torch.Tensor
    pixels = make_batch(tiny())["pixel_values"]
    with torch.no_grad():
        wanted = PyramidCLIPModel.from_pretrained(names["folder"]).encode_image(pixels)
        found = names["small"].encode_image(pixels)
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.99 and not torch.equal(found, wanted)
    with pytest.raises(ValueError, match="expected plain weights. A quantised"):
        names["small"].fuse()


def test_a_vector_index(names, tmp_path):
    pytest.importorskip("faiss", reason='needs faiss-cpu: pip install "pyramidclip-hf[search]"')
    for number, pair in enumerate(names["pairs"]):
        pair["image"].save(tmp_path / f"{number}.png")
    output = tmp_path / "pictures.parquet"
    argv = ["embed", "--model", str(names["folder"]), str(tmp_path / "[0-9].png"), "--output", str(output), "--quiet"]
    assert pyramidclip_command.main(argv) == 0
    names["embeddings_file"] = output
    exec(block("Vector indexes"), names)
    assert names["best"] == names["stored"].names[0] and names["scores"][0, 0] == pytest.approx(1, abs=1e-5)
    assert names["scores"][0, 1] < names["scores"][0, 0]
