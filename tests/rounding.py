"""How far two orders of the same fp32 sums may lie apart: for comparisons between processes, thread counts or kernels.

Equal to the bit is only what the code promises to be (resume, order, written bytes). What is computed in fp64 is held
to 1e-9 or less, which no fault passes.
"""

from typing import Any

import numpy as np
import torch


def _array(values: Any) -> np.ndarray:
    return values.detach().numpy() if torch.is_tensor(values) else np.asarray(values)


def rounding(values: Any, summed: int, terms: float = 0.0) -> float:
    """The largest difference that reordering sums of `summed` fp32 numbers can make in a result of this size: each
    addition rounds by half a unit in the last place, in either order.

    Args:
        values: the results, an array or tensor.
        summed: numbers in the longest sum on the way, that is the widest matrix product's inner dimension.
        terms: size of what was summed, where it is larger than the results: because it cancels, as in gradients that
            are nearly 0, or because it was scaled down afterwards.
    """
    return float(summed * np.finfo(np.float32).eps * max(np.abs(_array(values)).max(), terms))


def assert_equal_to_rounding(found: Any, wanted: Any, summed: int, terms: float = 0.0) -> None:
    """`found` and `wanted` are the same fp32 results of sums of up to `summed` numbers, perhaps by other kernels."""
    bound = rounding(wanted, summed, terms)
    np.testing.assert_allclose(_array(found), _array(wanted), rtol=0, atol=bound)
