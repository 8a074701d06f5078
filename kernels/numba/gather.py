"""A gathered loss: from tensors to its two loops.

There is nothing to gain from the gradient in the forward pass, which reads none of what the
gradient is made of: it is always left to the backward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba.core import types

from ..gather import gradient_axis, positions, readable
from ..layout import view_along
from ..operation import Options
from ..reference import out_of_bounds
from . import memory
from .compiler import optional_pointer, pointer
from .gather_loops import CHUNK, gather_all, scatter_all
from .threads import Launcher, parts_for

# Bytes of the gradient that are zeroed, and then get their numbers while they are in a cache.
TILE_BYTES = 1 << 16
# Positions side by side in a tile of planes: at least so many, whole cache lines.
NARROWEST = 64
# Positions to read, and elements of a gradient to write, for a thread to be worth it.
POSITION_GRAIN, GRAIN = 4096, 32_768

Tensors = tuple[torch.Tensor | None, ...]


@functools.cache
def _launcher(loop: Any, *dtypes: torch.dtype | None) -> Launcher:
    """dtypes: of the tensors that are not scratch memory, of which labels are the only integers."""
    slots = [optional_pointer(dtype, k, "float64") for k, dtype in enumerate(dtypes)]
    count = 4 if loop is gather_all else 1
    scratch = [pointer("float64", len(slots) + k, "float64") for k in range(count)]
    numbers = [types.float64] * (0 if loop is gather_all else 2)
    return Launcher(loop, *slots, *scratch, *numbers, *[types.intp] * 8)


def _launch(loop: Any, parts: int, tensors: Tensors, *arguments: Any) -> None:
    launch = _launcher(loop, *[None if t is None else t.dtype for t in tensors])
    launch(parts, *[None if t is None else t.data_ptr() for t in tensors], *arguments)


def _labels_and_weight(options: Options, tensors: Tensors) -> tuple[Any, Any, int]:
    _, target, weight = tensors
    assert target is not None
    record: Any = options.record
    return (
        target.contiguous(),
        None if weight is None else weight.contiguous(),
        record.ignore_index,
    )


def empty_kept(options: Options, tensors: Tensors, needs: tuple[bool, ...]) -> tuple[torch.Tensor]:
    """Room for what a mean has been divided by."""
    return (torch.empty((), dtype=torch.float64, device="cpu"),)


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, None, Tensors]:
    """The loss, and what a mean has been divided by. Raises IndexError for a label out of range."""
    assert tensors[0] is not None
    input, x = readable(tensors[0])
    target, weight, ignore_index = _labels_and_weight(options, tensors)
    rows = x.outer * x.inner
    losses = loss = None
    if options.reduction == "none":
        losses = memory.empty(positions(input), options.dtype)
    else:
        loss = memory.empty_number(options.dtype)
    chunks = -(-rows // CHUNK)
    scratch = torch.empty(3 * chunks + 2, dtype=torch.float64, device="cpu")
    start = scratch.data_ptr()
    _launch(
        gather_all, parts_for(rows, POSITION_GRAIN), (input, target, weight, losses, loss),
        *[start + 8 * k * chunks for k in range(4)], options.reduction == "mean", ignore_index,
        x.classes, x.inner, rows, x.outer_stride, x.inner_stride, x.class_stride,
    )  # fmt: skip
    if scratch[-1].item():
        raise out_of_bounds(target, x.classes, ignore_index)
    result = loss if losses is None else losses
    assert result is not None
    return result, None, (scratch[-2],)


def _number(kept: Tensors) -> float:
    (mass,) = kept
    assert mass is not None
    return mass.item()


def backward(
    options: Options,
    tensors: Tensors,
    grads: None,
    kept: Tensors,
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output. Raises IndexError for a label out of range."""
    input = tensors[0]
    assert input is not None
    target, weight, ignore_index = _labels_and_weight(options, tensors)
    g = gradient_axis(input)
    flat = memory.empty((input.numel(),), input.dtype)
    upstream, scale = None, 1.0
    if options.reduction == "none":
        upstream = grad_output.contiguous()
    else:
        scale = grad_output.item()
    size, outer, inner, narrowest = g.classes * input.itemsize, g.outer, g.inner, NARROWEST
    if g.class_stride == 1:  # the rows of all positions are one after another
        outer, inner, narrowest = 1, g.outer * g.inner, 1
    width = max(TILE_BYTES // size, narrowest)
    parts = parts_for(input.numel(), GRAIN)
    wrongs = np.zeros(parts)
    _launch(
        scatter_all, parts, (target, weight, upstream, flat), wrongs.ctypes.data, scale,
        _number(kept) if options.reduction == "mean" else 1.0, ignore_index, g.classes, outer,
        inner, g.outer_stride, g.classes if g.class_stride == 1 else g.inner_stride,
        g.class_stride, width,
    )  # fmt: skip
    if wrongs.any():
        raise out_of_bounds(target, g.classes, ignore_index)
    return view_along(flat, input.shape, g), None, None
