"""What the configuration refuses, keeps, and how words are chosen by it."""

from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from pyramidclip_hf.vinvl import VinVLConfig, phrase_attributes, phrases


def test_defaults_are_the_released_model():
    config = VinVLConfig()
    assert (config.num_labels, config.num_attributes, config.num_anchors) == (1595, 525, 15)
    assert (config.feature_map_size, config.feature_size) == (1024, 2048)
    assert (config.score_threshold, config.min_detections, config.max_detections) == (0.2, 10, 100)
    assert config.ignore_box_regression is True
    assert len(config.phrase_common_attributes) == 21


def test_names_survive_saving(tmp_path):
    names = {0: "__background__", 1: "horse", 2: "sky"}
    config = VinVLConfig(id2label=names, id2attribute={0: "__no_attribute__", 1: "white"}, layers=(1, 2, 3, 1))
    config.save_pretrained(tmp_path)
    loaded = VinVLConfig.from_pretrained(tmp_path)
    assert loaded.id2label == names and loaded.id2attribute[1] == "white" and loaded.num_attributes == 2
    assert loaded.to_dict() == VinVLConfig.from_dict(config.to_dict()).to_dict()
    assert list(loaded.layers) == [1, 2, 3, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"layers": (3, 8, 36)}, "four positive block counts"),
        ({"min_detections": 11, "max_detections": 10}, "min_detections"),
        ({"max_detections": 0, "min_detections": 0}, "at least 1"),
        ({"box_regression_weights": (1, 1)}, "four numbers"),
        ({"id2label": {1: "horse", 2: "sky"}}, "0 .. n-1"),
        ({"id2attribute": {0: "none"}}, "0 .. n-1"),
        ({"id2attribute": {0: "none", 1: "white"}, "num_attributes": 3}, "num_attributes"),
        ({"score_treshold": 0.5}, "did you mean 'score_threshold'"),
        ({"anchor_sizes": ()}, "num_anchors"),
    ],
)
def test_impossible_values_are_refused(wrong, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        VinVLConfig(**wrong)


@pytest.mark.parametrize(
    ("scored", "expected"),
    [
        # The most confident comes last, before the noun.
        ({"wet": 0.5, "shiny": 0.2}, ["shiny", "wet"]),
        # Common words need 0.1, others more than 0.01.
        ({"white": 0.09, "old": 0.06}, ["old"]),
        ({"white": 0.1, "old": 0.01}, ["white"]),
        # At most three, the best three.
        ({"wet": 0.4, "shiny": 0.1, "young": 0.3, "old": 0.2}, ["old", "young", "wet"]),
        # Together they are the most confident.
        ({"wet": 0.3, "blond": 0.2, "blonde": 0.15}, ["wet", "blond"]),
        ({"blonde": 0.2}, ["blond"]),
        ({}, []),
    ],
)
def test_attributes_of_a_phrase(scored, expected):
    assert phrase_attributes(list(scored), list(scored.values()), VinVLConfig()) == expected


def test_phrase_settings_are_followed():
    names, scores = ["wet", "white", "old"], [0.5, 0.3, 0.2]
    none = VinVLConfig(phrase_max_attributes=0)
    strict = VinVLConfig(phrase_attribute_threshold=0.25, phrase_common_threshold=0.4)
    assert phrase_attributes(names, scores, none) == []
    assert phrase_attributes(names, scores, strict) == ["wet"]


def test_phrases_are_attributes_and_noun():
    found = SimpleNamespace(
        label_names=["horse", "air conditioner"],
        attribute_names=[["brown", "large", "wet"], []],
        attribute_scores=[torch.tensor([0.5, 0.3, 0.06]), torch.zeros(0)],
    )
    assert phrases(found, VinVLConfig()) == ["wet large brown horse", "air conditioner"]
