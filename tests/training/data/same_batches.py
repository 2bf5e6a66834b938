"""Whether batches are the same."""

import torch


def equal(first, second):
    """Whether two lists of batches have the same bytes."""
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
        for a, b in zip(first, second)
    )
