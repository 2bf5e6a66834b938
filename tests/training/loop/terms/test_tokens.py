"""Token pairs in blocks against four loops."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from tests.training.loop.terms.dense_terms import CONFIG, token_score, tokens
from training.loop.terms import tokens as module
from training.loop.terms.encoding import token_mask
from training.loop.terms.term import Step
from training.loop.terms.tokens import TokenPair, block_of, token_scores


def rows_of_tokens(size=5, image_tokens=3, text_tokens=4, width=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(min(2, text_tokens), text_tokens + 1, (size,), generator=draw)
    return {
        "images": F.normalize(torch.randn(size, image_tokens, width, generator=draw, dtype=torch.float64), dim=-1),
        "texts": F.normalize(torch.randn(size, text_tokens, width, generator=draw, dtype=torch.float64), dim=-1),
        "mask": torch.arange(text_tokens) < lengths[:, None],
        "present": torch.tensor([True] * (size - 1) + [False]),
    }


def step(smoothing=0.0):
    return Step({}, torch.ones(()), smoothing)


def found(rows, smoothing=0.0, **options):
    """Loss, answers, and the gradients at tokens and scale."""
    rows = {name: row.clone().requires_grad_(row.is_floating_point()) for name, row in rows.items()}
    term = TokenPair("global_caption_tokens", 1.0, {"width": 6, **options}, CONFIG).double()
    share = term.share(rows, step(smoothing))
    share.loss.backward()
    return share.loss.item(), int(share.answers), rows["images"].grad, rows["texts"].grad, term.logit_scale.grad


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("entries", [1, 40, 1 << 20])
def test_values_and_gradients_are_those_of_four_loops(monkeypatch, smoothing, entries):
    monkeypatch.setattr(module, "_CPU_ENTRIES", entries)
    rows = rows_of_tokens()
    loss, answers, *gradients = found(rows, smoothing)
    images, texts = (rows[name].clone().requires_grad_() for name in ("images", "texts"))
    scale = torch.tensor(CONFIG.logit_scale_init_value, dtype=torch.float64, requires_grad=True)
    expected = tokens(images, texts, rows["mask"], rows["present"], scale.exp(), smoothing)
    expected.backward()
    assert answers == 4 and loss == pytest.approx(expected.item(), rel=1e-7)  # the parameter's start is fp32
    for gradient, wanted in zip(gradients, (images.grad, texts.grad, scale.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    assert not gradients[0][4].any() and not gradients[1][4].any()  # the pair without text


def test_gradients_are_those_of_finite_differences():
    rows = rows_of_tokens(4, 2, 3, 3)
    rows["present"][:] = True
    term = TokenPair("global_caption_tokens", 1.0, {"width": 3}, CONFIG).double()

    def loss(images, texts):
        return term.share({**rows, "images": images, "texts": texts}, step(0.1)).loss

    assert torch.autograd.gradcheck(loss, tuple(rows[name].requires_grad_() for name in ("images", "texts")))


def test_padding_changes_nothing_and_neither_does_the_order_of_tokens():
    rows = rows_of_tokens()
    expected = found(rows)
    padded = dict(rows)
    padded["texts"] = torch.cat([rows["texts"], torch.full((5, 2, 6), 9.0, dtype=torch.float64)], 1)
    padded["mask"] = F.pad(rows["mask"], (0, 2))
    loss, _, of_images, of_texts, _ = found(padded)
    assert loss == pytest.approx(expected[0], rel=1e-12)
    torch.testing.assert_close(of_images, expected[2])
    torch.testing.assert_close(of_texts[:, :4], expected[3])
    assert not of_texts[:, 4:].any()
    order = torch.tensor([2, 0, 1])
    assert found({**rows, "images": rows["images"][:, order]})[0] == pytest.approx(expected[0], rel=1e-12)


def test_one_token_a_side_is_the_contrast_of_pairs():
    rows = rows_of_tokens(6, 1, 1)
    rows["mask"][:], rows["present"][:] = True, True
    logits = (1 / 0.07) * rows["images"][:, 0] @ rows["texts"][:, 0].T
    own = torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert found(rows)[0] == pytest.approx(expected.item(), rel=1e-5)


def test_below_two_pairs_it_is_zero_with_zero_gradients():
    rows = rows_of_tokens()
    for there in (0, 1):
        rows["present"][:] = torch.arange(5) < there
        loss, answers, *gradients = found(rows, 0.2)
        assert loss == 0 and answers == there and not any(gradient.any() for gradient in gradients)


def test_real_tokens_end_with_the_first_end_token_and_id_0_is_a_word():
    ids = torch.tensor([[38, 0, 5, 39, 0, 0], [38, 39, 39, 39, 39, 39], [38, 1, 2, 3, 4, 5]])
    assert token_mask(ids, 39).sum(1).tolist() == [4, 2, 6]


def test_scores_are_those_of_the_loops():
    rows = rows_of_tokens()
    full = torch.ones(5, 3, dtype=torch.bool)
    scores = token_scores(rows["images"], full, rows["texts"], rows["mask"])
    for i in range(5):
        for j in range(5):
            expected = token_score(rows["images"][i], full[i], rows["texts"][j], rows["mask"][j])
            assert scores[i, j].item() == pytest.approx(expected.item(), rel=1e-12)


def test_of_equal_tokens_the_first_gets_the_gradient():
    rows = rows_of_tokens()
    rows["mask"][:] = True
    rows["texts"][:, 1:] = rows["texts"][:, :1]
    term = TokenPair("global_caption_tokens", 1.0, {"width": 6}, CONFIG).double()
    texts = rows["texts"].clone().requires_grad_()
    scores = module._TokenScores.apply(
        rows["images"],
        torch.ones(5, 3, dtype=torch.bool),
        texts,
        rows["mask"],
        rows["present"],
        term.logit_scale.exp(),
    )
    scores[0].sum().backward()
    assert texts.grad[:4, 0].any() and not texts.grad[:, 1:].any()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_blocks_hold_what_they_may(device):
    most = module._CPU_ENTRIES if device == "cpu" else module._DEVICE_ENTRIES
    for rows, columns in ((4096, 4096), (128, 4096), (3, 5)):
        height, width = block_of(rows, columns, 49, 77, torch.device(device))
        assert 1 <= height <= rows and 1 <= width <= columns
        assert height * width * 49 * 77 <= max(most, 49 * 77)


def peak_above_inputs(pairs):
    """(bytes of the inputs, bytes at the peak of a step above them), of pictures of 49 and texts of 77 tokens."""
    with FakeTensorMode():
        images, texts = (torch.empty(pairs, length, 256, requires_grad=True) for length in (49, 77))
        mask, present = torch.ones(pairs, 77, dtype=torch.bool), torch.ones(pairs, dtype=torch.bool)
        term, tracker = TokenPair("global_caption_tokens", 1.0, {}, CONFIG), MemTracker()
        tracker.track_external(images, texts, mask, present)
        with tracker:
            rows = {"images": images, "texts": texts, "mask": mask, "present": present}
            term.share(rows, step(0.1)).loss.backward()
        (peak,) = (found["Total"] for found in tracker.get_tracker_snapshot("peak").values())
        inputs = images.nbytes + texts.nbytes
        return inputs, peak - inputs


@pytest.mark.slow
def test_4096_pairs_need_less_than_3_gb_above_their_tokens(monkeypatch):
    """Where dense similarities are 236 GB: a multiple of the inputs, measured, and a constant, the blocks."""
    monkeypatch.setattr(module, "_CPU_ENTRIES", module._DEVICE_ENTRIES)
    (small, first), (large, second) = peak_above_inputs(256), peak_above_inputs(512)
    slope = (second - first) / (large - small)
    inputs = 4 * 4096 * (49 + 77) * 256
    assert 0 < slope < 4 and first + slope * (inputs - small) < 3e9, (slope, first, second)
    term = TokenPair("global_caption_tokens", 1.0, {}, CONFIG)
    assert term.loss_bytes(512, 512, {"global": 49, "caption": 77}) == pytest.approx(second + large, rel=0.1)


def strongest(row, mask, columns, column_masks, keep):
    """Numbers of the tokens of a row that a cut keeps, by loops."""
    best = {
        place: max((token @ other).item() for one, real in zip(columns, column_masks) for other in one[real])
        for place, token in enumerate(row)
        if mask[place]
    }
    return sorted(best, key=lambda place: -best[place])[: math.ceil(keep * len(best))]


@pytest.mark.parametrize("entries", [1, 1 << 20])
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_a_cut_is_the_term_on_the_tokens_that_are_most_similar_to_any_of_the_other_side(monkeypatch, entries, keep):
    monkeypatch.setattr(module, "_CPU_ENTRIES", entries)
    rows = rows_of_tokens(5, 6, 8)
    loss, answers, *gradients = found(rows, 0.1, keep=keep)
    images, texts = (rows[name].clone().requires_grad_() for name in ("images", "texts"))
    there, full = rows["present"].nonzero()[:, 0], torch.ones(5, 6, dtype=torch.bool)
    of_images = [strongest(images[i], full[i], texts[there], rows["mask"][there], keep) for i in range(5)]
    of_texts = [strongest(texts[i], rows["mask"][i], images[there], full[there], keep) for i in range(5)]
    assert {len(one) for one in of_images} == {math.ceil(keep * 6)} and len({len(one) for one in of_texts}) > 1
    left = torch.zeros(5, 8, dtype=torch.bool)
    for number, own in enumerate(of_texts):
        left[number, own] = True
    cut = torch.stack([images[number, own] for number, own in enumerate(of_images)])
    scale = torch.tensor(CONFIG.logit_scale_init_value, dtype=torch.float64, requires_grad=True)
    expected = tokens(cut, texts, left, rows["present"], scale.exp(), 0.1)
    expected.backward()
    assert answers == 4 and loss == pytest.approx(expected.item(), rel=1e-7)
    for gradient, wanted in zip(gradients, (images.grad, texts.grad, scale.grad), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    assert not gradients[1][~left].any()


def test_a_cut_keeps_no_padding_however_similar_it_is():
    """Real tokens point away from the column's; padding, the third one, does not."""
    rows = F.normalize(torch.tensor([[[1.0, 0.2, 0], [0.2, 1, 0], [0, 0, 1]]]), dim=-1)
    mask, column = torch.tensor([[True, True, False]]), F.normalize(torch.tensor([[[-1.0, -1, 0]]]), dim=-1)
    every = torch.ones(1, 1, dtype=torch.bool)
    for present in (torch.tensor([True]), torch.tensor([False])):
        kept, real = module._kept(0.6, rows, mask, column, every, present)
        assert sorted(kept[0][real[0]].tolist()) == [0, 1] and real.sum() == 2


def test_the_scale_stays_at_or_below_100():
    term = TokenPair("global_caption_tokens", 1.0, {}, CONFIG)
    for start, end in ((9.0, math.log(100)), (1.0, 1.0), (-3.0, -3.0)):
        term.logit_scale.data.fill_(start)
        term.after_step(True)
        assert term.logit_scale.item() == pytest.approx(end)


def test_a_cut_keeps_one_token_at_least_and_has_a_range():
    rows = rows_of_tokens()
    rows["present"][:] = False
    assert found(rows, keep=0.01)[0] == 0
    for keep in (0, 1.5):
        with pytest.raises(ValueError, match=r"keep: expected a share in \(0, 1\]"):
            TokenPair("global_caption_tokens", 1.0, {"keep": keep}, CONFIG)
