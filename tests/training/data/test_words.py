"""Changed and masked captions: laws of the draws, and nothing touched that must not be."""

import json

import numpy as np
import pytest

from training.data.inputs import MASKED_ID
from training.data.words import Vocabulary, changed_caption, masked_caption, padded, read_synonyms

SYNONYMS = {"dog": ["hound"], "big": ["large", "great"]}
CAPTION = "A big dog beside another dog"


def rngs(number):
    return (np.random.default_rng((7, seed)) for seed in range(number))


def test_a_changed_caption_is_one_of_three_changes():
    kinds = {"replaced": 0, "swapped": 0, "shorter": 0, "same": 0}
    words = CAPTION.split()
    for rng in rngs(900):
        changed = changed_caption(CAPTION, SYNONYMS, rng).split()
        if changed == words:
            kinds["same"] += 1
        elif len(changed) < len(words):
            assert len(changed) > 0
            kinds["shorter"] += 1
            rest = iter(words)
            assert all(word in rest for word in changed)  # in their order
        elif sorted(changed) == sorted(words):
            kinds["swapped"] += 1
            assert sum(a != b for a, b in zip(changed, words)) == 2
        else:
            kinds["replaced"] += 1
            if "hound" in changed:
                assert changed.count("hound") == 2 and "dog" not in changed
            else:
                assert {"large", "great"} & set(changed)
    assert kinds["replaced"] == pytest.approx(300, abs=50)
    assert kinds["shorter"] == pytest.approx(300 * (1 - 0.9**6), abs=50)


def test_without_synonyms_no_word_is_replaced_and_an_empty_caption_stays():
    for rng in rngs(60):
        assert set(changed_caption(CAPTION, {}, rng).split()) <= set(CAPTION.split())
    assert {changed_caption("", SYNONYMS, rng) for rng in rngs(9)} == {""}
    assert {changed_caption("word", SYNONYMS, rng) for rng in rngs(60)} == {"word"}


def test_masking_has_the_shares_of_bert_and_spares_begin_end_and_padding():
    vocabulary = Vocabulary.of(40, {0, 38, 39}, 39)
    ids = np.array([38, *range(1, 31), 39, 0, 0, 5])
    masked = random = stayed = 0
    for rng in rngs(600):
        found, positions, words = masked_caption(ids, 0.15, vocabulary, rng)
        assert all(1 <= position <= 30 for position in positions)
        assert words == ids[positions].tolist()
        others = np.setdiff1d(np.arange(len(ids)), positions)
        assert np.array_equal(found[others], ids[others])
        for position in positions:
            masked += found[position] == MASKED_ID
            stayed += found[position] == ids[position]
            random += found[position] not in (MASKED_ID, ids[position])
            assert found[position] == MASKED_ID or found[position] in vocabulary.words
    total = masked + random + stayed
    assert total == pytest.approx(600 * 30 * 0.15, rel=0.06)
    assert masked / total == pytest.approx(0.8, abs=0.03) and stayed / total == pytest.approx(0.1 + 0.1 / 37, abs=0.03)


def test_no_masked_word_is_an_empty_row():
    assert padded([[], [3, 4]], -100).tolist() == [[-100, -100], [3, 4]]
    assert padded([[]], 0).shape == (1, 1)


@pytest.mark.parametrize("content", ["[1]", "{}", '{"a": []}', '{"a": [1]}', "no"])
def test_a_file_that_holds_no_synonyms_is_refused(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match="^synonyms .*expected"):
        read_synonyms(tmp_path / "file")
    (tmp_path / "file").write_text(json.dumps(SYNONYMS))
    assert read_synonyms(tmp_path / "file") == SYNONYMS
