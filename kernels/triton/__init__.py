"""The GPU backend: Triton kernels, which take every stream, device and layout as they come.

Importing this module imports triton. With TRITON_INTERPRET=1 in the environment the kernels
run in Triton's interpreter, on CPU tensors, so that they can be tested without a GPU. What a
backend offers is described in fastopt.kernels.numba; this one also says how a call runs.
"""

from __future__ import annotations

import torch

from ..linear import Linear
from ..losses import Loops, Tensors
from ..operation import Options
from . import cross_entropy, flat, gather, rows
from .distillation import divergence_gradient, divergences
from .factored import describe_factored
from .factored import launcher as factored_launcher
from .multi_tensor import describe_step
from .multi_tensor import launcher as step_launcher
from .norm import clamp_all, scale_all, total_norm
from .outcomes import gradient, outcomes
from .pieces import Pieces

__all__ = [
    "Pieces", "backward", "backward_alone", "clamp_all", "describe", "describe_factored",
    "describe_step", "divergence_gradient", "divergences", "early", "empty_cache", "empty_kept",
    "factored_launcher", "forward", "gradient", "number_of", "outcomes", "scale_all",
    "step_launcher", "total_norm",
]  # fmt: skip

_loops = Loops(flat, rows, cross_entropy, gather, Linear(Pieces))
forward, backward = _loops.forward, _loops.backward
early, empty_kept, backward_alone = _loops.early, _loops.empty_kept, _loops.backward_alone


def number_of(grad_output: torch.Tensor) -> None:
    """Never known: to look would make the host wait. The kernels of `backward` ask if it is 1."""


def describe(options: Options, tensors: Tensors) -> str:
    """How a call runs, in words."""
    words: str = _loops.of(options).describe(options, tensors)
    return words


def empty_cache() -> None:
    """Nothing is kept: gradients come from torch's own caching allocator."""
