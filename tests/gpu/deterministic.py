"""`training.pretrain` under deterministic algorithms: `python -m tests.gpu.deterministic WORDS`.

The words are those of `training.pretrain`. CUBLAS_WORKSPACE_CONFIG has to be set before.
"""

import sys
from collections.abc import Sequence

import torch


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and returns the exit code."""
    from training import pretrain

    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        return pretrain.main(sys.argv[1:] if argv is None else argv)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


if __name__ == "__main__":
    sys.exit(main())
