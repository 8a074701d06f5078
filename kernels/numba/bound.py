"""The backend for calls of one kind, of which sizes, strides and dtypes are settled.

What follows from them is at hand: a loop, its scratch memory, its arguments but for the addresses.
In a training step, whose model has emptied the caches, to find these costs more than many a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..losses import Tensors
from ..operation import Options
from . import memory
from .forms import Loop

__all__ = ["Bound", "Forward", "bind_loop"]

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


def bind_loop(
    loop: Loop,
    tensors: Any,
    order: list[int],
    followed: list[int],
    words: tuple[int, tuple[int, ...]],
    dtype: torch.dtype,
    divisor: float,
    factor: float,
    parts: int,
    shares: tuple[int, int],
    kept: object,
    labelled: bool = False,
) -> Forward:
    """`forward` by a loop whose words are its operands' addresses, the gradients', and constants.

    Args:
        loop, parts, shares: what is launched, on how many threads, how many units and groups.
        tensors: a call's.
        order: the places of those tensors that are operands, as the loop has them.
        followed: the places of those that have gradients, of their own sizes.
        words: the constants before and after those addresses.
        dtype: of the loss.
        divisor, factor: of the sum, and of the gradients.
        kept: what has to live as long.
        labelled: whether behind the gradients and the first constant comes the address of a
            word that is set where a label is out of bounds.
    """
    team, (first, last), (units, group) = torch.get_num_threads(), words, shares
    large, size = [memory.is_pooled(tensors[k]) for k in followed], 8 * -(-units // group)

    def forward(tensors: Any, expected: float) -> tuple[torch.Tensor, Tensors, tuple[()]] | None:
        if torch.get_num_threads() != team:
            return None
        loss = memory.empty_number(dtype)
        grads: list[Any] = [None] * len(tensors)
        words = [first, *[tensors[k].data_ptr() for k in order]]
        for k, pooled in zip(followed, large, strict=True):
            like = tensors[k]
            grads[k] = grad = (
                memory.empty(like.shape, like.dtype) if pooled else torch.empty_like(like)
            )
            words.append(grad.data_ptr())
        words += last
        if labelled:
            wrong = np.zeros(1, np.int64)
            words.insert(-1, wrong.ctypes.data)
        sums, held = memory.scratch(size)
        scale = expected / divisor * factor
        loop(parts, words, scale, sums, loss.data_ptr(), divisor, units, group)
        del held
        if labelled and wrong[0]:
            return None  # the backend says so
        return loss, tuple(grads), ()

    forward.kept = kept  # type: ignore[attr-defined]
    return forward
