"""The CPU backend: Numba kernels, one parallel region a call.

Importing this module imports numba. A backend offers `forward`, `backward` and
`is_one` for losses, `step_launcher` for optimizers, and `empty_cache`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .. import hyper
from . import cross_entropy, pointwise
from .memory import empty_cache
from .multi_tensor import launcher as step_launcher

__all__ = ["backward", "empty_cache", "forward", "is_one", "step_launcher"]

Tensors = tuple[torch.Tensor | None, ...]


def _loop(options: hyper.Loss) -> ModuleType:
    return cross_entropy if isinstance(options.hyper, hyper.CrossEntropy) else pointwise


def forward(
    options: hyper.Loss, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, Any]:
    """The loss, and its gradients for a grad_output of 1.

    Args:
        options: the call without its tensors.
        tensors: as the public function takes them; None where it was given none.
        needs: for each of them, whether its gradient will be asked for.

    Returns:
        The loss; a gradient for each tensor that needs one, or None in place of the
        gradients where they are left to `backward`; and what else that wants to see again.
    """
    result: tuple[torch.Tensor, Tensors | None, Any]
    result = _loop(options).forward(options, tensors, needs)
    return result


def backward(
    options: hyper.Loss,
    tensors: Tensors,
    grads: Tensors | None,
    kept: Any,
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output, computed from the tensors.

    Args:
        options, tensors, needs: as `forward` had them.
        grads: those that `forward` left, to be overwritten; None if they have been given away.
        kept: what else it left.
        grad_output: of the loss's shape.
    """
    result: Tensors
    result = _loop(options).backward(options, tensors, grads, kept, grad_output, needs)
    return result


def is_one(grad_output: torch.Tensor) -> bool:
    """Whether grad_output is known to be 1, and gradients for that to be right as they are."""
    return grad_output.dim() == 0 and grad_output.item() == 1.0
