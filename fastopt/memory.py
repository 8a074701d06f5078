"""Memory that fastopt keeps for reuse."""

from __future__ import annotations

import sys

__all__ = ["empty_cache"]


def empty_cache() -> None:
    """Give gradient buffers that wait for reuse back to the system.

    Large gradients on the CPU are computed into buffers that return to a small pool when
    torch frees the tensor; tensors still in use are not touched.

    Example:
        >>> fastopt.empty_cache()
    """
    module = sys.modules.get("fastopt.kernels.numba")  # never used: nothing to release
    if module is not None:
        module.empty_cache()
