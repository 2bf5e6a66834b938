"""Detector and classifier that start from torchvision's ResNet: its maps, runs to their end, refusals."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification

pytest.importorskip("torchvision", reason="the weights are torchvision's")
pytest.importorskip("pycocotools", reason='needs pycocotools: pip install -e ".[detection]"')

from torchvision.models.resnet import Bottleneck, ResNet

from conversion.convert_torchvision import MEAN, STD, main
from pyramidclip_hf.modeling_detection import PyramidCLIPForObjectDetection
from tests.training.to_detect import settings, write_data
from tests.training.to_evaluate import COUNTS, write_pictures
from training import detection, finetune
from training.loop.tracking import read_metrics
from training.settings.finetuning import FinetuneArguments
from training.transfer.detector import initial_detector


@pytest.fixture(scope="module")
def torchvisions():
    torch.manual_seed(0)
    return ResNet(Bottleneck, [1, 2, 1, 1]).eval()


@pytest.fixture(scope="module")
def folder(torchvisions, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    torch.save(torchvisions.state_dict(), path / "file.pth")
    assert main(["--checkpoint", str(path / "file.pth"), "--output-dir", str(path / "folder")]) == 0
    # Pictures of 224 pixels say no more here than small ones.
    processor = json.loads((path / "folder" / "processor_config.json").read_text())
    processor["image_processor"] |= {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    (path / "folder" / "processor_config.json").write_text(json.dumps(processor))
    return str(path / "folder")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    return {
        name: write_data(path / name, count, seed) for seed, (name, count) in enumerate((("train", 4), ("test", 2)))
    }


@torch.no_grad()
def test_the_detectors_trunk_computes_what_torchvisions_does(tmp_path, folder, data, torchvisions):
    args = settings(tmp_path, data, model=folder, model_config=None)
    model, _ = initial_detector(args, ["square", "bar"])
    model.eval()
    pixels = torch.randn(1, 3, 70, 96)
    one = torchvisions
    wanted = one.layer3(one.layer2(one.layer1(one.maxpool(one.relu(one.bn1(one.conv1(pixels)))))))
    found = model.trunk.maps(pixels, 3)[-1]
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(model.trunk.stages[3](found), one.layer4(wanted))
    assert tuple(model.config.image_mean) == MEAN and tuple(model.config.image_std) == STD


def test_a_detector_from_it_runs_and_is_loaded(tmp_path, folder, data):
    args = settings(
        tmp_path / "run", data, model=folder, model_config=None, max_steps=2, test_data=[data["test"]], with_masks=True
    )
    result = detection.run(args)
    assert result.finished and "test/mask_ap" in result.metrics
    model = PyramidCLIPForObjectDetection.from_pretrained(result.final).eval()
    assert model.config.plain and len(model.detect([Image.new("RGB", (64, 48))])) == 1
    assert "a supervised ResNet" in (result.final / "README.md").read_text()
    again = detection.run(settings(
        tmp_path / "run", data, model=folder, model_config=None, max_steps=2, test_data=[data["test"]], with_masks=True,
        resume="latest",
    ))  # fmt: skip
    assert again.finished


def test_a_classifier_from_it_runs_and_is_loaded(tmp_path, folder):
    train, test = (write_pictures(tmp_path / name, COUNTS, seed) for seed, name in enumerate(("train", "test")))
    chosen = {"output_dir": str(tmp_path / "run"), "model": folder, "train_data": train, "test_data": test,
              "global_batch_size": 8, "epochs": 2, "head_epochs": 1, "precision": "fp32", "dataloader_workers": 0,
              "trackers": ["none"], "learning_rate": 1e-3, "log_every_steps": 1}  # fmt: skip
    result = finetune.run(FinetuneArguments(**chosen))
    assert result.finished and "test/top_1" in result.metrics
    lines = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if "head_only" in line]
    assert {line["head_only"] for line in lines} == {0.0, 1.0}
    model = AutoModelForImageClassification.from_pretrained(result.final)
    assert type(model).__name__ == "ResNetForImageClassification" and model.config.num_labels == len(COUNTS)
    assert "the picture encoder of a supervised ResNet" in (result.final / "README.md").read_text()
    with pytest.raises(ValueError, match="transformers' ResNet .* has none"):
        finetune.run(FinetuneArguments(**chosen | {"output_dir": str(tmp_path / "b"), "gradient_checkpointing": True}))


def test_refusals(tmp_path, folder, data):
    with pytest.raises(ValueError, match="model_config is for new weights"):
        initial_detector(settings(tmp_path, data, model=folder), ["square", "bar"])
    config = json.loads((tmp_path.parent / folder / "config.json").read_text())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match="expected the folder that python -m conversion.convert_torchvision writes, got"
    ):
        initial_detector(settings(tmp_path, data, model=str(tmp_path / "other"), model_config=None), ["square", "bar"])
