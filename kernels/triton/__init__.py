"""The GPU backend: Triton kernels, which take every stream, device and layout as they come.

Importing this module imports triton. With TRITON_INTERPRET=1 in the environment the kernels
run in Triton's interpreter, on CPU tensors, so that they can be tested without a GPU. What a
backend offers is described in fastopt.kernels.numba; this one also says how a call runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from .. import hyper
from . import cross_entropy, pointwise
from .multi_tensor import describe_step
from .multi_tensor import launcher as step_launcher

__all__ = [
    "backward", "describe", "describe_step", "empty_cache", "forward", "is_one", "step_launcher",
]  # fmt: skip

Tensors = tuple[torch.Tensor | None, ...]


def _loop(options: hyper.Loss) -> ModuleType:
    return cross_entropy if isinstance(options.hyper, hyper.CrossEntropy) else pointwise


def forward(
    options: hyper.Loss, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, Any]:
    """The loss, perhaps its gradients for a grad_output of 1, and what backward needs beside."""
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
    """The gradients for any grad_output."""
    result: Tensors
    result = _loop(options).backward(options, tensors, grads, kept, grad_output, needs)
    return result


def is_one(grad_output: torch.Tensor) -> bool:
    """Never known: to look would make the host wait. The kernels of `backward` see to it."""
    return False


def describe(options: hyper.Loss, tensors: Tensors) -> str:
    """How a call runs, in words."""
    words: str = _loop(options).describe(options, tensors)
    return words


def empty_cache() -> None:
    """Nothing is kept: gradients come from torch's own caching allocator."""
