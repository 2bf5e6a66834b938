"""How far two orders of the same fp32 sums may lie apart: for comparisons between processes, thread counts or kernels.

Equal to the bit is only what the code promises to be (resume, order, written bytes).
"""

import numpy as np


def rounding(values, summed: int) -> float:
    """The largest difference that reordering sums of `summed` fp32 numbers can make in a result of this size: each
    addition rounds by half a unit in the last place, in either order.

    Args:
        values: the results, an array or tensor.
        summed: numbers in the longest sum on the way, that is the widest matrix product's inner dimension.
    """
    return float(summed * np.finfo(np.float32).eps * np.abs(np.asarray(values)).max())


def assert_equal_to_rounding(found, wanted, summed: int) -> None:
    """`found` and `wanted` are the same fp32 results of sums of up to `summed` numbers, perhaps by other kernels."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=0, atol=rounding(wanted, summed))
