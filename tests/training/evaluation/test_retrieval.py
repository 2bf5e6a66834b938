"""Retrieval metrics against dense sorting, and ties against every order written out."""

import itertools
import subprocess
import sys

import pytest
import torch

from training.evaluation.retrieval import level_metrics, rank_counts, retrieval_metrics


def sorted_recall(scores: torch.Tensor, right: list[set[int]], k: int) -> float:
    """The textbook form: sort each row, look whether one of the first k is right. Only defined without ties."""
    order = scores.argsort(dim=1, descending=True)
    return sum(bool(set(row[:k].tolist()) & answers) for row, answers in zip(order, right)) / len(right)


def embeddings(images=37, texts=91, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image_embeds = torch.randn(images, width, generator=generator)
    owner = torch.cat([torch.arange(images), torch.randint(images, (texts - images,), generator=generator)])
    owner = owner[torch.randperm(texts, generator=generator)]
    text_embeds = image_embeds[owner] + torch.randn(texts, width, generator=generator)
    return image_embeds, text_embeds, owner


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_equals_sorting_with_several_texts_per_picture(chunk_size):
    image_embeds, text_embeds, owner = embeddings()
    metrics = retrieval_metrics(image_embeds, text_embeds, owner, chunk_size=chunk_size)
    unit_images, unit_texts = (torch.nn.functional.normalize(x.double(), dim=1) for x in (image_embeds, text_embeds))
    scores = unit_images @ unit_texts.T
    texts_of = [set((owner == i).nonzero()[:, 0].tolist()) for i in range(len(image_embeds))]
    for k in (1, 5, 10):
        assert metrics[f"image_to_text_R@{k}"] == pytest.approx(sorted_recall(scores, texts_of, k), abs=1e-12)
        assert metrics[f"text_to_image_R@{k}"] == pytest.approx(
            sorted_recall(scores.T, [{int(i)} for i in owner], k), abs=1e-12
        )
    assert 0.1 < metrics["text_to_image_R@1"] < metrics["text_to_image_R@10"] < 1
    places = (scores.T.argsort(dim=1, descending=True) == owner[:, None]).nonzero()[:, 1] + 1
    assert metrics["text_to_image_mean_rank"] == pytest.approx(places.double().mean().item())


def test_pictures_without_text_are_candidates_only():
    image_embeds = torch.eye(4)
    text_embeds = torch.tensor([[1.0, 0, 0, 2], [0, 1, 0, 0]])  # the first text is nearer to the unnamed picture 3
    metrics = retrieval_metrics(image_embeds, text_embeds, torch.tensor([0, 1]), ks=(1, 2))
    assert metrics["images_without_text"] == 2
    assert metrics["text_to_image_R@1"] == 0.5
    assert metrics["text_to_image_R@2"] == 1.0
    assert metrics["image_to_text_R@1"] == 1.0


@pytest.mark.parametrize(("above", "tied", "right"), [(0, 3, 1), (1, 2, 2), (2, 0, 1), (0, 0, 3), (1, 4, 1)])
def test_ties_are_averaged_over_every_order(above, tied, right):
    scores = [2.0] * above + [1.0] * (tied + right) + [0.5]
    answers = set(range(above + tied, above + tied + right))
    orders = []
    for order in itertools.permutations(range(len(scores))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            orders.append(min(order.index(a) for a in answers))
    ids = torch.tensor([int(i in answers) for i in range(len(scores))])
    counts = rank_counts(torch.ones(1, 1), torch.tensor(scores)[:, None], torch.tensor([1]), ids)
    for k in (1, 2, 3, 5, 10):
        expected = sum(place < k for place in orders) / len(orders)
        assert counts.recall(k).item() == pytest.approx(expected)
    assert counts.rank().item() == pytest.approx(1 + sum(orders) / len(orders))


@pytest.mark.parametrize("chunk_size", [3, 64])
def test_a_collapsed_model_scores_chance(chunk_size):
    vector = torch.randn(1, 33, generator=torch.Generator().manual_seed(1))
    metrics = retrieval_metrics(vector.expand(50, -1), vector.expand(50, -1), chunk_size=chunk_size)
    assert metrics["text_to_image_R@1"] == pytest.approx(1 / 50)
    assert metrics["image_to_text_R@10"] == pytest.approx(10 / 50)


def test_memory_is_linear():
    """16,000 x 16,000 scores would be 1 GB in float32 alone; the chunks stay far below."""
    code = (
        "import resource, torch; from training.evaluation.retrieval import rank_counts\n"
        "embeds = torch.nn.functional.normalize(torch.randn(16_000, 4), dim=1); ids = torch.arange(16_000)\n"
        "rank_counts(embeds[:200], embeds, ids[:200], ids, chunk_size=64)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert rank_counts(embeds, embeds, ids, ids, chunk_size=64).recall(1).mean() == 1\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) * 1024 < 100e6


def test_level_pairs_use_the_samples_that_have_both_levels():
    generator = torch.Generator().manual_seed(3)
    embeds = {level: torch.randn(12, 6, generator=generator) for level in ("global", "roi", "summary", "tags")}
    present = {"roi": torch.arange(12) != 4, "tags": torch.arange(12) % 3 != 0}
    results = level_metrics(embeds, ["roi_tags", "global_summary"], present)
    keep = [i for i in range(12) if i != 4 and i % 3]
    assert results["roi_tags"] == retrieval_metrics(embeds["roi"][keep], embeds["tags"][keep])
    assert results["roi_tags"]["images"] == len(keep)
    assert results["global_summary"] == retrieval_metrics(embeds["global"], embeds["summary"])


def test_level_with_several_texts_per_sample():
    image_embeds, text_embeds, owner = embeddings(images=9, texts=20)
    present = torch.arange(9) != 2
    owner[owner == 7] = 5  # sample 7 has no text
    results = level_metrics(
        {"roi": image_embeds, "caption": text_embeds}, ["roi_caption"], {"roi": present}, {"caption": owner}
    )
    kept = [0, 1, 3, 4, 5, 6, 8]
    texts = [j for j in range(20) if int(owner[j]) in kept]
    expected = retrieval_metrics(
        image_embeds[kept], text_embeds[texts], torch.tensor([kept.index(int(owner[j])) for j in texts])
    )
    assert results == {"roi_caption": expected}
    assert expected["images"] == 7 and expected["images_without_text"] == 0


@pytest.mark.parametrize(
    ("image_embeds", "text_embeds", "owner", "message"),
    [
        (torch.zeros(0, 4), torch.ones(3, 4), None, "image_embeds must be a tensor of shape"),
        (torch.ones(3, 4), torch.ones(3, 5), None, "width 4 but text_embeds 5"),
        (torch.ones(3, 4), torch.ones(4, 4), None, "one text per picture"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 1]), "one entry per text"),
        (torch.ones(3, 4), torch.ones(3, 4), torch.tensor([0, 1, 3]), "rows 0..2"),
        (torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), None, "NaN or infinity in 1 rows"),
    ],
)
def test_errors(image_embeds, text_embeds, owner, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(image_embeds, text_embeds, owner)


def test_level_errors():
    embeds = {"global": torch.ones(3, 2), "caption": torch.ones(3, 2)}
    with pytest.raises(ValueError, match="unknown level pair.*roi_roi.*expected some of"):
        level_metrics(embeds, ["roi_roi"])
    with pytest.raises(ValueError, match="roi_tags needs the embeddings of level.*roi.*tags"):
        level_metrics(embeds, ["roi_tags"])
    with pytest.raises(ValueError, match="only 1 samples have both levels"):
        level_metrics(embeds, ["global_caption"], {"caption": torch.tensor([True, False, False])})
