"""The queue as a list, and its neighbours by a loop."""

import pytest
import torch
import torch.nn.functional as F

from tests.training.loop.terms.dense_terms import CONFIG, choice
from training.loop.terms import neighbours as module
from training.loop.terms.neighbours import NearestNeighbours, TextQueue
from training.loop.terms.term import Step


def unit(*shape, seed=0):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return F.normalize(drawn, dim=-1)


def as_list(pushed, size):
    """What a queue of `size` holds after the rows of `pushed`, place by place."""
    places = [None] * size
    for number, row in enumerate(pushed):
        places[number % size] = row
    return [row for row in places if row is not None]


@pytest.mark.parametrize("entries", [1, 12, 1 << 24])
def test_the_queue_is_a_list_that_wraps_in_the_middle_of_a_batch(monkeypatch, entries):
    monkeypatch.setattr(module, "_ENTRIES", entries)
    queue, pushed = TextQueue(10, 4), []
    for step in range(6):
        batch = unit(4, 4, seed=step)
        queue.push(batch)
        pushed += batch
        expected = torch.stack(as_list(pushed, 10))
        assert queue.filled == len(expected) and queue.pointer == len(pushed) % 10
        torch.testing.assert_close(queue.rows[: queue.filled], expected)
        asked = unit(3, 4, seed=50 + step)
        nearest = [max(range(len(expected)), key=lambda i: float(expected[i] @ row)) for row in asked]
        torch.testing.assert_close(queue.nearest(asked), expected[nearest])


def test_of_equal_neighbours_the_first_is_taken_whatever_the_blocks(monkeypatch):
    queue = TextQueue(6, 2)
    queue.push(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]))
    queue.rows[2:] += torch.tensor([0.0, 5.0])  # as similar, and to be told apart
    for entries in (1, 2, 100):
        monkeypatch.setattr(module, "_ENTRIES", entries)
        assert queue.nearest(torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, 0.0]]


def test_a_queue_continues_from_its_state():
    queue, other = TextQueue(5, 3), TextQueue(5, 3)
    queue.push(unit(4, 3))
    other.load_state_dict({name: value.clone() for name, value in queue.state_dict().items()})
    for one in (queue, other):
        one.push(unit(3, 3, seed=1))
    assert torch.equal(queue.rows, other.rows) and (queue.pointer, queue.filled) == (other.pointer, other.filled)
    with pytest.raises(RuntimeError, match=r"a queue of \(5, 3\), expected \(6, 3\)"):
        TextQueue(6, 3).load_state_dict(queue.state_dict())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_term_is_that_of_a_list(smoothing):
    """Both texts are looked up before either is pushed, and nothing is while the queue is empty."""
    term, pushed = NearestNeighbours("views_nn", 1.0, {"size": 16}, CONFIG), []
    for number in range(5):
        images, texts = (unit(3, 2, 8, seed=seed).requires_grad_() for seed in (number, 10 + number))
        scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
        share = term.share({"images": images, "texts": texts}, Step({}, scale, smoothing))
        found = torch.autograd.grad(share.loss, [images, scale])
        if not pushed:
            assert share.loss == 0 and share.answers == 0 and not found[0].any() and not found[1].any()
        else:
            known, total = torch.stack(as_list(pushed, 16)), 0.0
            for image in range(2):
                for text in range(2):
                    nearest = known[[int((known @ row).argmax()) for row in texts[:, text].detach()]]
                    total = total + choice(scale * images[:, image] @ nearest.T, range(3), smoothing) / 4
            torch.testing.assert_close(share.loss, total)
            for one, other in zip(found, torch.autograd.grad(total, [images, scale]), strict=True):
                torch.testing.assert_close(one, other)
        term.after_step(True)
        pushed += [*texts[:, 1].detach(), *texts[:, 0].detach()]


def test_a_skipped_step_pushes_nothing_and_one_step_pushes_once():
    term = NearestNeighbours("views_nn", 1.0, {"size": 16}, CONFIG)
    rows = {"images": unit(3, 2, 8), "texts": unit(3, 2, 8, seed=1)}
    for _ in range(2):
        term.share(rows, Step({}, torch.ones(()), 0.0))
    term.after_step(False)
    term.after_step(True)
    assert term.queue.filled == 0
    for _ in range(2):
        term.share(rows, Step({}, torch.ones(()), 0.0))
    term.after_step(True)
    term.after_step(True)
    assert term.queue.filled == 6
