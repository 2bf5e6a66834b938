"""Masked words against torch's cross-entropy over a batch."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.loop.terms.dense_terms import CONFIG
from tests.training.tiny import tiny_run_batch
from training.loop.terms import masked_words as module
from training.loop.terms.masked_words import MaskedWords
from training.loop.terms.term import Step, Wanted

TOKENS = Wanted("masked", "tokens")


@pytest.mark.parametrize("entries", [1, 200, 1 << 26])
def test_the_mean_over_all_masked_words(monkeypatch, entries):
    monkeypatch.setattr(module, "_ENTRIES", entries)
    term, batch = MaskedWords("caption_mlm", 1.0, {}, CONFIG).double(), tiny_run_batch()
    hidden = torch.randn(12, 7, 16, dtype=torch.float64, requires_grad=True)
    share = term.share(term.rows({TOKENS: hidden}, batch), Step(batch, torch.ones(()), 0.2))
    labels = torch.full((12, 7), -100)
    for row in range(12):
        for position, label in zip(batch["masked_positions"][row], batch["masked_labels"][row]):
            if label != -100:
                labels[row, position] = label
    expected = F.cross_entropy(term.head(hidden).flatten(0, 1), labels.flatten(), ignore_index=-100)
    torch.testing.assert_close(share.loss, expected)
    at = [hidden, *term.head.parameters()]
    found, wanted = (torch.autograd.grad(loss, at, retain_graph=True) for loss in (share.loss, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert share.answers == CONFIG.text_config.vocab_size


def test_without_a_masked_word_it_is_zero_with_zero_gradients():
    term, batch = MaskedWords("caption_mlm", 1.0, {}, CONFIG).double(), tiny_run_batch()
    batch["masked_labels"][:] = -100
    hidden = torch.randn(12, 7, 16, dtype=torch.float64, requires_grad=True)
    share = term.share(term.rows({TOKENS: hidden}, batch), Step(batch, torch.ones(()), 0.0))
    assert share.loss == 0 and share.answers == 0
    assert not torch.autograd.grad(share.loss, hidden)[0].any()
