"""The closed-form objective against targets and logits written out as matrices."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from pyramidclip_hf import loss_pyramidclip
from pyramidclip_hf.configuration_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS, check_loss_weights, levels_of
from pyramidclip_hf.loss_pyramidclip import normalize_embeds, pyramid_loss
from tests.dense_loss import dense_loss

LEVELS = ("global", "local", "roi", "summary", "caption", "tags")


def make_batch(count=11, dim=7, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    raw = {level: torch.randn(count, dim, generator=generator, dtype=dtype).requires_grad_() for level in LEVELS}
    log_scale = torch.tensor(2.3, dtype=dtype, requires_grad=True)
    return raw, log_scale


def both_ways(weights, present, smoothing=0.2, dtype=torch.float32):
    raw, log_scale = make_batch(dtype=dtype)
    embeds = {level: normalize_embeds(value) for level, value in raw.items()}
    ours = pyramid_loss(embeds, log_scale.exp(), weights, smoothing, present=present).loss
    wanted = dense_loss(embeds, log_scale.exp(), weights, smoothing, present)
    leaves = [*raw.values(), log_scale]
    ours_grad = torch.autograd.grad(ours, leaves, retain_graph=True, allow_unused=True)
    wanted_grad = torch.autograd.grad(wanted, leaves, allow_unused=True)
    return ours, wanted, ours_grad, wanted_grad


def everywhere(count=11):
    return {level: torch.ones(count, dtype=torch.bool) for level in LEVELS}


def unevenly():
    generator = torch.Generator().manual_seed(3)
    return everywhere() | {level: torch.rand(11, generator=generator) < 0.6 for level in ("roi", "summary", "tags")}


@pytest.mark.parametrize("present", [everywhere(), unevenly()], ids=["complete", "missing levels"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [*({name: 1.0} for name in TERMS), DEFAULT_LOSS_WEIGHTS], ids=str)
def test_equals_the_dense_form(weights, smoothing, present):
    ours, wanted, ours_grad, wanted_grad = both_ways(weights, present, smoothing)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    for ours_part, wanted_part in zip(ours_grad, wanted_grad, strict=True):
        if wanted_part is not None:
            torch.testing.assert_close(ours_part, wanted_part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("present", [everywhere(), unevenly()], ids=["complete", "missing levels"])
@pytest.mark.parametrize("keys", [[4, 7, 7, 4, 2, 9, 7, 1, 0, 9, -5], [3] * 11, list(range(11))], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_pairs_with_the_same_text_share_the_positives_mass(smoothing, keys, present):
    raw, log_scale = make_batch(dtype=torch.float64)
    embeds, keys = {level: normalize_embeds(value) for level, value in raw.items()}, torch.tensor(keys)
    groups = {"tags": (keys, keys)}
    weights = {"roi_tags": 1.0, "global_caption": 0.5}
    ours = pyramid_loss(embeds, log_scale.exp(), weights, smoothing, present=present, groups=groups).loss
    both = present["roi"] & present["tags"]
    same = (keys[both, None] == keys[both]).double()
    others = (1 - same).sum(1, keepdim=True)
    # The negatives' mass has nowhere to go where all texts are equal; the positives then keep their own share only.
    target = same * (1 - smoothing * (others > 0).double()) / same.sum(1) + (1 - same) * smoothing / others.clamp(min=1)
    torch.testing.assert_close(target.sum(1), torch.ones(len(target), dtype=torch.float64))
    logits = log_scale.exp() * embeds["roi"][both] @ embeds["tags"][both].T
    wanted = sum(-(target * F.log_softmax(z, dim=1)).sum(1).mean() / 2 for z in (logits, logits.T))
    wanted = wanted + dense_loss(embeds, log_scale.exp(), {"global_caption": 0.5}, smoothing, present)
    torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-12)
    leaves = [raw["roi"], raw["tags"], log_scale]
    for found, expected in zip(
        torch.autograd.grad(ours, leaves, retain_graph=True), torch.autograd.grad(wanted, leaves)
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_equals_torch_label_smoothing_with_its_own_share():
    # torch spreads its mass over all N classes, the pair included: a N / (N - 1) of it leaves a on the negatives.
    raw, log_scale = make_batch(dtype=torch.float64)
    image, text = (normalize_embeds(raw[level]) for level in ("global", "caption"))
    logits, labels, share = log_scale.exp() * image @ text.T, torch.arange(11), 0.2 * 11 / 10
    wanted = sum(F.cross_entropy(way, labels, label_smoothing=share) for way in (logits, logits.T)) / 2
    ours = pyramid_loss({"global": image, "caption": text}, log_scale.exp(), {"global_caption": 1.0}, 0.2).loss
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=0)


def test_fp64_stays_fp64():
    ours, wanted, ours_grad, wanted_grad = both_ways(DEFAULT_LOSS_WEIGHTS, unevenly(), dtype=torch.float64)
    torch.testing.assert_close(ours, wanted, atol=1e-12, rtol=1e-12)
    for ours_part, wanted_part in zip(ours_grad, wanted_grad, strict=True):
        torch.testing.assert_close(ours_part, wanted_part, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("rows_per_block", [1, 3, 4, 100])
@pytest.mark.parametrize("columns_per_block", [1, 4, 11, 100])
def test_blocks_do_not_change_the_result(monkeypatch, rows_per_block, columns_per_block):
    monkeypatch.setattr(loss_pyramidclip, "_BLOCK_ENTRIES", rows_per_block * min(columns_per_block, 11))
    monkeypatch.setattr(loss_pyramidclip, "_BLOCK_COLUMNS", columns_per_block)
    ours, wanted, ours_grad, wanted_grad = both_ways(DEFAULT_LOSS_WEIGHTS, unevenly())
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    for ours_part, wanted_part in zip(ours_grad, wanted_grad, strict=True):
        torch.testing.assert_close(ours_part, wanted_part, atol=1e-4, rtol=1e-4)


def test_gradcheck():
    raw, log_scale = make_batch(count=5, dim=3, dtype=torch.float64)
    present = {"roi": torch.tensor([True, True, False, True, True]), "tags": None}

    def loss(roi, tags, log_scale):
        embeds = {"roi": normalize_embeds(roi), "tags": normalize_embeds(tags)}
        return pyramid_loss(embeds, log_scale.exp(), {"roi_tags": 1.0}, 0.2, present=present).loss

    assert torch.autograd.gradcheck(loss, (raw["roi"], raw["tags"], log_scale))


def test_shares_of_processes_sum_to_the_whole():
    raw, log_scale = make_batch(dtype=torch.float64)
    present = unevenly()
    embeds = {level: normalize_embeds(value).detach() for level, value in raw.items()}
    whole = pyramid_loss(embeds, log_scale.exp(), present=present)
    parts = [
        pyramid_loss(
            {level: value[rows] for level, value in embeds.items()},
            log_scale.exp(),
            present={level: mask[rows] for level, mask in present.items()},
            columns=embeds,
            columns_present=present,
        )
        for rows in (slice(0, 2), slice(2, 7), slice(7, 11))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for name in DEFAULT_LOSS_WEIGHTS:
        torch.testing.assert_close(sum(part.terms[name] for part in parts), whole.terms[name])
        assert all(part.counts[name] == whole.counts[name] for part in parts)


@pytest.mark.parametrize("left", [0, 1])
def test_fewer_than_two_pairs_is_zero_with_zero_gradient(left):
    raw, log_scale = make_batch()
    embeds = {level: normalize_embeds(value) for level, value in raw.items()}
    present = {"tags": torch.arange(11) < left}
    result = pyramid_loss(embeds, log_scale.exp(), {"global_tags": 1.0}, 0.2, present=present)
    grads = torch.autograd.grad(result.loss, [raw["global"], raw["tags"], log_scale])
    assert result.loss.item() == 0.0 and result.counts["global_tags"].item() == left
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_half_precision_is_widened_and_autocast_is_off():
    raw, log_scale = make_batch()
    embeds = {level: normalize_embeds(value).bfloat16() for level, value in raw.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pyramid_loss(embeds, log_scale.exp())
    outside = pyramid_loss({level: value.float() for level, value in embeds.items()}, log_scale.exp())
    assert inside.loss.dtype == torch.float32 and torch.equal(inside.loss, outside.loss)


def test_backward_inside_of_autocast():
    """torch advises against it, as its own products then round to bf16; the log-sum-exp neither rounds nor raises."""

    def gradient(loss_of, enabled):
        raw, log_scale = make_batch()
        loss = loss_of(raw, log_scale.exp())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        return raw["global"].grad

    def log_sum_exp(raw, scale):
        return loss_pyramidclip._RowLogSumExp.apply(raw["global"] * scale, raw["caption"], None).sum()

    def whole(raw, scale):
        return pyramid_loss({level: normalize_embeds(value) for level, value in raw.items()}, scale).loss

    assert torch.equal(gradient(log_sum_exp, True), gradient(log_sum_exp, False))
    torch.testing.assert_close(gradient(whole, True), gradient(whole, False), rtol=2e-2, atol=2e-3)


def test_perfect_alignment_meets_its_floor():
    # One-hot embeddings: z = s on the pair and 0 elsewhere; the loss in numbers, without the module under test.
    count, scale, smoothing = 6, 20.0, 0.2
    eye = torch.eye(count)
    embeds = dict.fromkeys(("global", "caption"), eye)
    ours = pyramid_loss(embeds, torch.tensor(scale), {"global_caption": 1.0}, smoothing).loss
    assert ours.item() == pytest.approx(math.log(math.exp(scale) + count - 1) - (1 - smoothing) * scale, rel=1e-6)


def test_a_zero_row_has_finite_gradients():
    zero = torch.zeros(3, 4, requires_grad=True)
    normalize_embeds(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "names no term"),
        ({"global_caption": 0.0}, "names no term"),
        ({"global_captions": 1.0}, "unknown terms"),
        ({"global_caption": -1.0}, "not negative"),
        ({"global_caption": float("nan")}, "finite"),
        (["global_caption"], "mapping"),
    ],
)
def test_wrong_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        check_loss_weights(weights)


def test_errors_name_what_is_wrong():
    raw, log_scale = make_batch()
    embeds = {level: normalize_embeds(value) for level, value in raw.items()}
    scale = log_scale.exp()
    with pytest.raises(ValueError, match=r"roi_summary.*\['roi'\]"):
        pyramid_loss({level: value for level, value in embeds.items() if level != "roi"}, scale)
    with pytest.raises(ValueError, match="at least two samples in the global batch, got 1"):
        pyramid_loss({level: value[:1] for level, value in embeds.items()}, scale)
    with pytest.raises(ValueError, match="same number of samples"):
        pyramid_loss(embeds | {"tags": embeds["tags"][:4]}, scale)


def test_levels_follow_the_terms():
    assert levels_of({"global_caption": 1.0}) == ("global", "caption")
    assert levels_of(DEFAULT_LOSS_WEIGHTS) == LEVELS
    for name, (image, text) in TERMS.items():
        assert levels_of({name: 1.0}) == (image, text)
    assert set(itertools.chain(*TERMS.values())) == set(LEVELS)
    assert math.fsum(DEFAULT_LOSS_WEIGHTS.values()) == pytest.approx(1.0)
