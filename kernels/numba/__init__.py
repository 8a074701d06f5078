"""The CPU backend: Numba kernels, one parallel region a call.

Importing this module imports numba. A backend offers `forward` and `backward` (described in
kernels/losses.py) and `is_one` for losses, `step_launcher` for optimizers, and `empty_cache`.
"""

from __future__ import annotations

import torch

from ..losses import Loops
from . import cross_entropy, pointwise
from .memory import empty_cache
from .multi_tensor import launcher as step_launcher

__all__ = ["backward", "empty_cache", "forward", "is_one", "step_launcher"]

_loops = Loops(pointwise, cross_entropy)
forward, backward = _loops.forward, _loops.backward


def is_one(grad_output: torch.Tensor) -> bool:
    """Whether grad_output is known to be 1, and gradients for that to be right as they are."""
    return grad_output.dim() == 0 and grad_output.item() == 1.0
