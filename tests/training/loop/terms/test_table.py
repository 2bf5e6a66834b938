"""How a run's objective is read, and what it refuses."""

import pytest

from pyramidclip_hf.configuration_pyramidclip import PyramidCLIPConfig
from tests.training.loop.terms.dense_terms import CONFIG
from training.loop.terms.table import KINDS, RUN_PAIRS, read_objective


def test_weights_and_options():
    found = read_objective(
        {
            "views_simclr": {"weight": 0.5, "hidden": 32},
            "view1_caption": 0.1,
            "global_caption_tokens": 2,
            "view2_caption": 0,
        },
        CONFIG,
    )
    assert [(term.name, term.weight) for term in found.terms] == [("views_simclr", 0.5), ("global_caption_tokens", 2.0)]
    assert found.pairs == {"view1_caption": 0.1} and found.levels == ("global", "caption", "view1", "view2")
    assert found.terms[0].options() == {"hidden": 32, "out": 256, "temperature": 0.1}
    assert found.terms[0].head[0].out_features == 32
    assert read_objective(None, CONFIG) == ((), {})


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_says_what_decides_it(name):
    (term,) = read_objective({name: 1.0}, CONFIG).terms
    again = KINDS[name](name, 1.0, term.options(), CONFIG)
    assert again.options() == term.options() and term.wanted


def test_run_pairs_are_views_with_captions():
    assert set(RUN_PAIRS) == {"view1_caption", "view1_caption_aug", "view2_caption", "view2_caption_aug"}


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"views_simcrl": 1}, "expected terms such as views_simclr, .* got 'views_simcrl'"),
        ({"global_caption": 1}, "level pairs of the model are named in loss_weights"),
        ({"views_simclr": -1}, "views_simclr: weight: expected a number of at least 0, got -1"),
        ({"views_simclr": True}, "got True"),
        ({"views_simclr": 10**400}, "weight: expected a number of at least 0, got 1000"),
        ({"views_simclr": {"temperature": 10**400}}, "temperature: expected at least 0.001, got 1000"),
        ({"views_simclr": {"width": 3}}, "views_simclr has no option 'width'; it has weight, hidden, out, temperature"),
        ({"views_simclr": {"hidden": 2.5}}, "hidden: expected a int, got 2.5"),
        ({"views_simclr": {"temperature": 0}}, "temperature: expected at least 0.001, got 0"),
        ({"view1_caption": {"weight": 1, "hidden": 3}}, "view1_caption has no option but weight, got hidden"),
        ({"views_nn": {"texts": ["summary"]}}, "texts: expected some of .*, each once, got .'summary'."),
        ({"views_nn": {"images": []}}, "images: expected picture levels, each once, got ..$"),
        ({"caption_mlm": {"caption": "dirty"}}, "caption: expected clean or masked, got 'dirty'"),
        ({"caption_mlm": {"share": 1.0}}, "share: expected less than 1"),
        ({"caption_mlm": {"share": -0.1}}, "share: expected at least 0.0, got -0.1"),
        ({"views_nn": {"size": 0}}, "size: expected at least 1, got 0"),
        ({"views_simsiam": {"width": 0}}, "width: expected at least 1, got 0"),
        ({"views_simsiam": {"bottleneck": 0}}, "bottleneck: expected at least 1, got 0"),
        ({"global_caption_tokens": {"width": 0}}, "width: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_refused(objective, message):
    with pytest.raises(ValueError, match=f"^objective: .*{message}"):
        read_objective(objective, CONFIG)


def test_masked_words_need_words():
    text = {"vocab_size": 4, "hidden_size": 16, "num_attention_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    config = PyramidCLIPConfig(text_config=text, projection_dim=8)
    with pytest.raises(ValueError, match="a vocabulary of 4 ids has 1 beside begin, end and pad, expected at least 2"):
        read_objective({"caption_mlm": 1}, config)
