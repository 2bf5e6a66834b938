"""The closed-form objective against targets and logits written out as matrices."""

import contextlib
import itertools
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from pyramidclip_hf import loss_pyramidclip
from pyramidclip_hf.levels_pyramidclip import DEFAULT_LOSS_WEIGHTS, TERMS, check_loss_weights, levels_of
from pyramidclip_hf.loss_pyramidclip import block_of, normalize_embeds, pyramid_loss
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
    block = (min(rows_per_block, 11), min(columns_per_block, 11))
    monkeypatch.setattr(loss_pyramidclip, "block_of", lambda *sizes: block)
    ours, wanted, ours_grad, wanted_grad = both_ways(DEFAULT_LOSS_WEIGHTS, unevenly())
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    for ours_part, wanted_part in zip(ours_grad, wanted_grad, strict=True):
        torch.testing.assert_close(ours_part, wanted_part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("weights", "terms"), [({"global_caption": 1.0}, 1), (DEFAULT_LOSS_WEIGHTS, 6)], ids=["1", "6"]
)
def test_a_term_takes_four_products_and_a_process_its_share_of_them(weights, terms):
    """z, z again, and the gradients of both sides; with a matrix for each direction they are six, or eight."""
    raw, log_scale = make_batch(count=96, dim=32)
    in_place = {torch.ops.aten.addmm_: lambda own, left, right, **more: mm_flop(left, right)}
    alone, quarter = (FlopCounterMode(display=False, custom_mapping=in_place) for _ in range(2))
    with alone:
        pyramid_loss(raw, log_scale.exp(), weights).loss.backward()
    with quarter:
        rows, merge = {level: value[:24] for level, value in raw.items()}, lambda sums: sums[:, :24]
        pyramid_loss(rows, log_scale.exp(), weights, columns=raw, merge=merge).loss.backward()
    assert alone.get_total_flops() == 4 * quarter.get_total_flops() == terms * 4 * (2 * 96 * 96 * 32)


class Operations(TorchDispatchMode):
    """Counts operations that are no views, and the bytes that their results held at most."""

    def __init__(self):
        super().__init__()
        self.count = self.held = self.most = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.is_view:
            return result
        self.count += 1
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known.add(storage)
                self.held += storage.nbytes()
                weakref.finalize(storage, self.release, storage.nbytes())
        self.most = max(self.most, self.held)
        return result

    def release(self, size):
        self.held -= size


def open_clip_term(image, text, scale):
    """As open_clip's ClipLoss has it for one process: a matrix for each direction, both kept for the backward pass."""
    labels = torch.arange(len(image), device=image.device)
    logits = (scale * image @ text.T, scale * text @ image.T)
    return sum(F.cross_entropy(way, labels) for way in logits) / 2


@pytest.fixture
def on_a_gpu(monkeypatch):
    """A function: what a loss and its gradient ask of a GPU, in its blocks, by tensors without data."""
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # knows no such tensors
    monkeypatch.setattr(
        loss_pyramidclip, "block_of", lambda rows, columns, terms, _: block_of(rows, columns, terms, gpu)
    )

    def asked(loss_of, pairs):
        embeds = {level: torch.zeros(pairs, 512, device="meta", requires_grad=True) for level in LEVELS}
        with Operations() as operations:
            loss_of(embeds, torch.tensor(14.3, device="meta")).backward()
        return operations

    return asked


@pytest.mark.parametrize("terms", [1, 6])
def test_blocks_grow_with_the_matrix_to_a_32nd_of_a_card(terms):
    gpu = torch.device("cuda:7")  # which is not there: a card of 80 GB is reckoned with
    for pairs in (2**13, 2**15, 2**18, 2**21):
        height, width = block_of(pairs, pairs, terms, gpu)
        assert loss_pyramidclip.BYTES_PER_ENTRY * terms * height * width <= 80e9 / 32


@pytest.mark.parametrize(("pairs", "seen"), [(8192, 1.11), pytest.param(32768, 17.3, marks=pytest.mark.slow)])
def test_memory_on_a_gpu_is_at_most_a_tenth_of_open_clips(on_a_gpu, pairs, seen):
    theirs = on_a_gpu(lambda embeds, scale: open_clip_term(embeds["global"], embeds["caption"], scale), pairs)
    assert theirs.most / 1e9 == pytest.approx(seen, rel=0.05)  # what an H200 said (docs/speed.md): the count is good
    one = on_a_gpu(lambda embeds, scale: pyramid_loss(embeds, scale, {"global_caption": 1.0}, 0.0).loss, pairs)
    six = on_a_gpu(lambda embeds, scale: pyramid_loss(embeds, scale).loss, pairs)
    assert 10 * one.most < theirs.most
    assert 10 * six.most < 6 * theirs.most


def test_operations_of_six_terms_on_a_gpu(on_a_gpu):
    """Of a batch that is one block, where the host and not the device decides how long the loss takes.

    A form that goes through the terms one by one asked for 743.
    """
    present = {level: torch.ones(1024, dtype=torch.bool, device="meta") for level in ("roi", "summary", "tags")}
    assert 200 < on_a_gpu(lambda embeds, scale: pyramid_loss(embeds, scale, present=present).loss, 1024).count <= 311


@pytest.mark.parametrize("rows", [1, 7, 512, 4096, 32_768])
@pytest.mark.parametrize("terms", [1, 6])
def test_blocks_fit_a_processors_cache_and_fill_a_gpu(rows, terms):
    columns = 32_768
    height, width = block_of(rows, columns, terms, torch.device("cpu"))
    assert 1 <= height <= rows and 1 <= width <= columns and terms * height * width <= 1 << 20
    height, width = block_of(rows, columns, terms, torch.device("cuda"))
    assert height * width >= min(rows * columns, 1 << 21) and 8 * terms * height * width < 3e9


def test_products_are_exact_whatever_the_process_allows(monkeypatch):
    """TF32 on a GPU, bf16 on a processor that has it: a switch that is off while the products of the loss run."""
    seen = []
    for name in ("mm", "addmm_"):
        owner = torch if name == "mm" else torch.Tensor
        plain = getattr(owner, name)
        record = lambda *args, plain=plain, **more: seen.append(allowed()) or plain(*args, **more)  # noqa: E731
        monkeypatch.setattr(owner, name, record)

    def allowed():
        return torch.get_float32_matmul_precision() if old else torch.backends.mkldnn.matmul.fp32_precision

    old = not hasattr(torch.backends, "fp32_precision")
    before = torch.get_float32_matmul_precision()
    exact, *exact_grad = both_ways(DEFAULT_LOSS_WEIGHTS, unevenly())[::2]
    try:
        torch.set_float32_matmul_precision("medium")
        seen.clear()
        found, *found_grad = both_ways(DEFAULT_LOSS_WEIGHTS, unevenly())[::2]
        assert set(seen) == {"highest" if old else "ieee"} and len(seen) == 4 * 6
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found, exact)
    for one, other in zip(found_grad[0], exact_grad[0], strict=True):
        torch.testing.assert_close(one, other)


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
    partial, places = [], (slice(0, 2), slice(2, 7), slice(7, 11))

    def share(rows, merge):
        return pyramid_loss(
            {level: value[rows] for level, value in embeds.items()},
            log_scale.exp(),
            present={level: mask[rows] for level, mask in present.items()},
            columns=embeds,
            columns_present=present,
            merge=merge,
        )

    for rows in places:
        share(rows, lambda sums, rows=rows: partial.append(sums) or sums[:, rows])
    parts = [share(rows, lambda sums, rows=rows: torch.stack(partial)[:, :, rows].logsumexp(0)) for rows in places]
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
        return sum(
            sums.sum()
            for sums in loss_pyramidclip._LogSumExp.apply([(0, 1)], scale, None, None, raw["global"], raw["caption"])
        )

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
    with pytest.raises(ValueError, match="needs samples in the global batch, got none"):
        pyramid_loss({level: value[:0] for level, value in embeds.items()}, scale)
    with pytest.raises(ValueError, match="same number of samples"):
        pyramid_loss(embeds | {"tags": embeds["tags"][:4]}, scale)
    with pytest.raises(ValueError, match="columns and merge belong together"):
        pyramid_loss(embeds, scale, columns=embeds)


def test_levels_follow_the_terms():
    assert levels_of({"global_caption": 1.0}) == ("global", "caption")
    assert levels_of(DEFAULT_LOSS_WEIGHTS) == LEVELS
    for name, (image, text) in TERMS.items():
        assert levels_of({name: 1.0}) == (image, text)
    assert set(itertools.chain(*TERMS.values())) == set(LEVELS)
    assert math.fsum(DEFAULT_LOSS_WEIGHTS.values()) == pytest.approx(1.0)
