"""The classifier before it is trained."""

import torch

from pyramidclip_hf import PyramidCLIPModel
from training.settings.finetuning import FinetuneArguments
from training.transfer.classifier import initial_classifier


def test_the_encoder_starts_from_saved_weights(tiny_model_folder):
    args = FinetuneArguments(model=tiny_model_folder, train_data="nowhere", seed=7)
    classifier, _ = initial_classifier(args, ["a", "b"])
    expected = PyramidCLIPModel.from_pretrained(tiny_model_folder).vision_model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in classifier.vision_model.state_dict().items())
    assert classifier.classifier.weight.shape == (2, 16)
