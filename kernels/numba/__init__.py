"""The CPU backend: Numba kernels, one parallel region a call.

Importing this module imports numba. A backend offers `forward`, `backward`, `backward_alone`,
`early` and `empty_kept` (described in kernels/losses.py) and `number_of` for losses, `outcomes`
and `gradient` for rows of logits (kernels/outcomes.py), `divergences` and `divergence_gradient`
for two such tensors (kernels/distillation.py), `step_launcher` and `factored_launcher` for
optimizers, `total_norm`, `scale_all` and `clamp_all` for gradients (described in
fastopt.nn.utils.clip_grad), `empty_cache`. This one has a `Recognition` of calls as well, where it
`recognises` any, and `bind` for kinds of them.
"""

from __future__ import annotations

import sys

import torch

from ..linear import Linear
from ..losses import Loops, Tensors
from ..operation import Options
from . import cross_entropy, flat, gather, rows
from .bound import Bound
from .distillation import divergence_gradient, divergences
from .factored import launcher as factored_launcher
from .memory import empty_cache
from .multi_tensor import launcher as step_launcher
from .norm import clamp_all, scale_all, total_norm
from .outcomes import gradient, outcomes
from .pieces import Pieces
from .recognition import Recognition
from .recognition import available as recognises

__all__ = [
    "Pieces", "Recognition", "backward", "backward_alone", "bind", "clamp_all",
    "divergence_gradient", "divergences", "early", "empty_cache", "empty_kept",
    "factored_launcher", "forward", "gradient", "number_of", "outcomes", "recognises",
    "scale_all", "step_launcher", "total_norm",
]  # fmt: skip

_loops = Loops(flat, rows, cross_entropy, gather, Linear(Pieces))
forward, backward = _loops.forward, _loops.backward
early, empty_kept, backward_alone = _loops.early, _loops.empty_kept, _loops.backward_alone


def bind(options: Options, tensors: Tensors, needs: tuple[bool, ...]) -> Bound | None:
    """This backend for calls of the same kind as this one, where it gains from that."""
    forward = _loops.bind(options, tensors, needs)
    return None if forward is None else Bound(sys.modules[__name__], needs, forward)


def number_of(grad_output: torch.Tensor) -> float | None:
    """A grad_output as a number, None if it is none or to look would make the host wait."""
    return grad_output.item() if grad_output.dim() == 0 else None
