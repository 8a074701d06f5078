"""The CPU backend: Numba kernels, one parallel region a call.

Importing this module imports numba. A backend offers `forward` and `backward` for losses
and `step_launcher` for optimizers.
"""

from __future__ import annotations

from types import ModuleType

import torch

from .. import hyper
from . import cross_entropy, pointwise
from .memory import empty_cache
from .multi_tensor import launcher as step_launcher

__all__ = ["backward", "empty_cache", "forward", "step_launcher"]


def _loop(options: hyper.Loss) -> ModuleType:
    return cross_entropy if isinstance(options.hyper, hyper.CrossEntropy) else pointwise


def forward(
    options: hyper.Loss, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None]:
    """The loss, and its gradients for a grad_output of 1.

    Args:
        options: the call without its tensors.
        tensors: as the public function takes them; None where it was given none.
        needs: for each of them, whether its gradient will be asked for.

    Returns:
        The loss, and a gradient for each tensor that needs one, or None in place of the
        gradients where they depend on a grad_output that isn't known yet.
    """
    result: tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None]
    result = _loop(options).forward(options, tensors, needs)
    return result


def backward(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor | None, ...],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for this grad_output, computed from the tensors alone."""
    result: tuple[torch.Tensor | None, ...]
    result = _loop(options).backward(options, tensors, grad_output, needs)
    return result
