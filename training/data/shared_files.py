"""Files that are learnt from and measured on, whatever they are called and wherever they lie."""

import collections
import filecmp
from collections.abc import Iterable, Sequence
from pathlib import Path


def refuse_shared_files(learnt: Iterable[Path], measured: Sequence[Path], name: str, kind: str = "pictures") -> None:
    """Compares files by size, and where those agree by their bytes.

    Args:
        learnt: what is trained on.
        measured: what the score is of.
        name: of the data that are measured on, for the message.
        kind: what the files are.

    Raises:
        ValueError: some are the same.
    """
    sizes = collections.defaultdict(list)
    for path in learnt:
        sizes[path.stat().st_size].append(path)
    shared = [
        path
        for path in measured
        if any(filecmp.cmp(path, other, shallow=False) for other in sizes.get(path.stat().st_size, ()))
    ]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(measured)} {kind} of {name} are trained on, the first {shared[0]}: what is "
            "measured there says nothing. Take other pictures to measure on"
        )
