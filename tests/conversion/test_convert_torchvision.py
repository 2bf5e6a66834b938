"""Torchvision's ResNet as a folder: the same logits, the same maps in the detector, and what is refused."""

import pytest
import torch
from PIL import Image
from transformers import ResNetForImageClassification

pytest.importorskip("torchvision", reason="the weights are torchvision's")

import torchvision

from conversion.convert_torchvision import CACHED, main
from pyramidclip_hf.processing_pyramidclip import PyramidCLIPProcessor


@pytest.fixture(scope="module")
def weights():
    """Random, of a ResNet-50, with running statistics as far from their start as trained ones."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=7).eval()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(0.5 + torch.rand(buffer.shape) if name.endswith("var") else 0.1 * torch.randn(buffer.shape))
    return model


@pytest.fixture(scope="module")
def folder(weights, tmp_path_factory):
    cache = tmp_path_factory.mktemp("torch")
    (cache / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(weights.state_dict(), cache / "hub" / "checkpoints" / CACHED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(cache))
        assert main(["--output-dir", str(cache / "model")]) == 0
    return cache / "model"


@torch.no_grad()
def test_the_logits_are_torchvisions(weights, folder):
    model = ResNetForImageClassification.from_pretrained(folder).eval()
    noise = Image.effect_noise((300, 260), 80).convert("RGB")
    pixels = PyramidCLIPProcessor.from_pretrained(folder)(images=noise, return_tensors="pt")["pixel_values"]
    known = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.transforms(antialias=True)
    torch.testing.assert_close(pixels[0], known(noise), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(pixels).logits, weights(pixels), atol=1e-4, rtol=1e-4)


def test_what_is_refused(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    assert main(["--output-dir", str(tmp_path / "a")]) == 2
    assert "torchvision.models.resnet50(weights=" in capsys.readouterr().err
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "small.pth")
    assert main(["--checkpoint", str(tmp_path / "small.pth"), "--output-dir", str(tmp_path / "a")]) == 2
    assert "expected a ResNet-50, 101 or 152 under torchvision's names" in capsys.readouterr().err
    damaged = {name: value for name, value in weights.state_dict().items() if name != "layer2.1.bn2.bias"}
    torch.save(damaged, tmp_path / "damaged.pth")
    assert main(["--checkpoint", str(tmp_path / "damaged.pth"), "--output-dir", str(tmp_path / "a")]) == 2
    assert "not the weights of a plain ResNet" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
