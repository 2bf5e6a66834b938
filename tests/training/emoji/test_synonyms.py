"""The file of synonyms for the scenes' captions: its words are theirs, and no synonym says something else."""

import random
from pathlib import Path

import numpy as np
import torch

from training.data.words import changed_caption, read_synonyms
from training.emoji import pictures, words
from training.pretrain import further_terms
from training.scale import recipe_config
from training.settings.pretraining import PretrainingArguments
from training.settings.reading import parse_settings

CONFIGS = Path(__file__).parents[3] / "training" / "configs"
SYNONYMS = read_synonyms(CONFIGS / "emoji_synonyms.json")


def captions(count):
    rng = random.Random(0)
    for _ in range(count):
        yield words.web_caption(words.training_things(rng), rng.choice(sorted(pictures.BACKGROUNDS)), rng)


def test_its_words_are_those_of_the_captions_and_most_captions_have_one():
    seen = [{word.lower() for word in caption.split()} for caption in captions(3000)]
    assert SYNONYMS.keys() <= set().union(*seen)
    assert sum(bool(own & SYNONYMS.keys()) for own in seen) > 0.7 * len(seen)


def test_no_synonym_is_the_name_of_another_thing_or_colour():
    names = {*words.OBJECTS, *pictures.TINTS, "small", "big"}
    for word, others in SYNONYMS.items():
        assert not names & set(others) and word not in others


def test_captions_change_by_it():
    rng = np.random.default_rng(0)
    synonyms = {other for others in SYNONYMS.values() for other in others}
    changed = [changed_caption(caption, SYNONYMS, rng).split() for caption in captions(300)]
    assert sum(bool(synonyms & set(own)) for own in changed) > 40


def test_declip_at_the_demo_s_size_is_declip():
    paths = [f"{CONFIGS}/{name}.yaml" for name in ("demo", "declip", "demo_declip")]
    small, whole = (
        parse_settings(PretrainingArguments, ["--config", paths[0], path, "--output-dir", "run"])
        for path in (paths[2], paths[1])
    )
    assert Path(small.synonyms) == Path("training/configs/emoji_synonyms.json") and whole.synonyms is None
    with torch.device("meta"):
        found, expected = further_terms(small, recipe_config(small)), further_terms(whole, recipe_config(whole))
    assert found.pairs == expected.pairs
    assert [(one.name, one.weight) for one in found.terms] == [(one.name, one.weight) for one in expected.terms]
    assert (small.loss_weights, small.label_smoothing, small.view_crop_area) == ({}, 0.0, [0.2, 1.0])
