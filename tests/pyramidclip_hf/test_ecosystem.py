"""docs/ecosystem.md: its blocks run as they stand there, and what it promises of frozen models and adapters holds."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.modules.batchnorm import _BatchNorm

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
