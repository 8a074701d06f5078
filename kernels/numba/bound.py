"""The backend for calls of one kind, of which sizes, strides and dtypes are settled.

What follows from them is at hand: a loop, its scratch memory, its arguments but for the addresses.
In a training step, whose model has emptied the caches, to find these costs more than many a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..losses import Tensors
from ..operation import Options

__all__ = ["Bound", "Forward"]

#: Of tensors and the expected grad_output: what a backend's `forward` gives, with gradients for
#: the tensors that need them. None if the call is none of that kind any more.
Forward = Callable[[Tensors, float], tuple[torch.Tensor, Tensors, tuple[torch.Tensor, ...]] | None]


class Bound:
    """A backend's part for losses.

    Args:
        backend: serves what is not bound: other gradients than usual, and none at all.
        needs: which of the tensors need gradients.
        forward: for those of this kind. It keeps no tensor of a call.
    """

    def __init__(self, backend: Any, needs: tuple[bool, ...], forward: Forward) -> None:
        self._backend, self._needs, self._forward = backend, needs, forward
        self.backward, self.number_of = backend.backward, backend.number_of
        self.recognises, self.Recognition = backend.recognises, backend.Recognition

    def forward(
        self, options: Options, tensors: Tensors, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor, Tensors | None, Tensors]:
        """As the backend's."""
        if options.grad_output is not None and needs == self._needs:
            found = self._forward(tensors, options.grad_output)
            if found is not None:
                return found
        result: tuple[torch.Tensor, Tensors | None, Tensors]
        result = self._backend.forward(options, tensors, needs)
        return result
