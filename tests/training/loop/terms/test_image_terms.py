"""SimCLR and SimSiam against whole matrices and written-out cosines."""

import pytest
import torch

from tests.training.loop.terms.dense_terms import CONFIG, simclr, simsiam
from training.loop.terms.simclr import ImageContrast
from training.loop.terms.simsiam import ImageLikeness
from training.loop.terms.term import Step

CONTRAST = {"hidden": 7, "out": 5}
LIKENESS = {"width": 6, "bottleneck": 4}


def term_and_rows(kind, options, size=6, width=16):
    torch.manual_seed(0)
    term = kind("term", 1.0, options, CONFIG).double()
    rows = {view: torch.randn(size, width, dtype=torch.float64, requires_grad=True) for view in ("view1", "view2")}
    return term, rows


def step(smoothing=0.0):
    return Step({}, torch.ones(()), smoothing)


def gradients(loss, term, rows):
    inputs = [*rows.values(), *term.parameters()]
    return torch.autograd.grad(loss, inputs, retain_graph=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("training", [True, False])
def test_simclr_is_that_of_the_whole_matrix(training, smoothing):
    term, rows = term_and_rows(ImageContrast, CONTRAST)
    term.train(training)
    share = term.share(rows, step(smoothing))
    expected = simclr(term.head(rows["view1"]), term.head(rows["view2"]), 0.1, smoothing)
    torch.testing.assert_close(share.loss, expected)
    for found, wanted in zip(gradients(share.loss, term, rows), gradients(expected, term, rows), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)
    assert share.answers == 11
    swapped = {"view1": rows["view2"], "view2": rows["view1"]}
    torch.testing.assert_close(term.share(swapped, step(smoothing)).loss, share.loss)


def test_simclr_of_one_pair_is_exactly_zero():
    term, rows = term_and_rows(ImageContrast, CONTRAST, size=1)
    assert term.eval().share(rows, step(0.2)).loss == 0


def test_simsiam_is_written_out_and_holds_its_targets():
    term, rows = term_and_rows(ImageLikeness, LIKENESS, width=8)
    share = term.share(rows, step(0.2))
    expected = simsiam(term.projector, term.predictor, rows["view1"], rows["view2"])
    torch.testing.assert_close(share.loss, expected)
    for found, wanted in zip(gradients(share.loss, term, rows), gradients(expected, term, rows), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-7)
    assert share.answers == -1 and -1 <= share.loss <= 1


def test_statistics_of_a_step_are_those_of_two_batches():
    term, rows = term_and_rows(ImageContrast, CONTRAST)
    term.share(rows, step())
    assert term.head[1].num_batches_tracked == 2
