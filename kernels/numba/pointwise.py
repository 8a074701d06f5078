"""Elementwise losses of two tensors of equal layout, reduced, with both gradients.

One pass reads input and target once and writes whatever is wanted: the values, their
sum, the gradients. What is not wanted is None, and not compiled.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numba import prange
from numba.core import types

from .. import hyper
from . import memory
from .compiler import optional_pointer, record_type, region, summing_kernel
from .formulas import value_and_grad
from .pointer import load, store
from .reduction import sum_all
from .threads import Launcher, parts_for
from .vector_math import cast

# Elements summed in the compute dtype before the sum moves to float64. Chunks are the
# same for any number of threads, and so is the result, to the bit.
CHUNK = 512
# Elements a thread, below which a second one does not pay: some 50 to 100 µs of work (12 to 16
# bytes an element, from memory). A region waits for the last of its threads, and where another
# process has that one's core, for milliseconds.
GRAIN = 65_536


@summing_kernel
def chunk_sum(
    record: Any, input: Any, target: Any, values: Any, grad_input: Any, grad_target: Any,
    upstream: Any, scale: Any, begin: int, end: int,
) -> float:  # fmt: skip
    total = cast(0, scale)
    for i in range(begin, end):
        factor = scale
        if upstream is not None:
            factor = load(upstream, i)
        value, d_input, d_target = value_and_grad(record, load(input, i), load(target, i), factor)
        total += value
        if values is not None:
            store(values, i, value)
        if grad_input is not None:
            store(grad_input, i, d_input)
        if grad_target is not None:
            store(grad_target, i, d_target)
    return np.float64(total)


@region
def pointwise_all(
    parts: int, record: Any, input: Any, target: Any, values: Any, grad_input: Any,
    grad_target: Any, upstream: Any, sums: Any, loss: Any, scale: Any, divisor: float, count: int,
) -> None:  # fmt: skip
    """loss = the sum of the values / divisor. sums is scratch memory, a number a chunk."""
    chunks = (count + CHUNK - 1) // CHUNK
    for part in prange(parts):
        for chunk in range(part * chunks // parts, (part + 1) * chunks // parts):
            begin = chunk * CHUNK
            total = chunk_sum(
                record, input, target, values, grad_input, grad_target, upstream, scale,
                begin, min(begin + CHUNK, count),
            )  # fmt: skip
            if sums is not None:
                store(sums, chunk, total)
    if sums is not None:
        store(loss, 0, sum_all(sums, chunks) / divisor)


@functools.cache
def _launcher(record: type, *dtypes: torch.dtype | None) -> Launcher:
    """dtypes: of input, target, values, grad_input, grad_target, upstream, sums, loss."""
    compute = "float64" if torch.float64 in dtypes[:2] else "float32"
    widths = [compute] * 6 + ["float64"] * 2
    slots = [optional_pointer(d, k, w) for k, (d, w) in enumerate(zip(dtypes, widths, strict=True))]
    number = getattr(types, compute)
    return Launcher(
        pointwise_all, record_type(record, number), *slots, number, types.float64, types.intp
    )


def _run(options: hyper.Loss, grad_output: float, *tensors: torch.Tensor | None) -> None:
    """Launch over (input, target, values, grad_input, grad_target, upstream, sums, loss)."""
    count = tensors[0].numel()  # type: ignore[union-attr]
    divisor = 1.0
    if options.reduction == "mean":
        divisor = float(count) or math.nan  # the mean of nothing is NaN, as torch's
    kind: Any = type(options.hyper)
    launch = _launcher(kind, *[None if t is None else t.dtype for t in tensors])
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    scale = grad_output / divisor
    launch(parts_for(count, GRAIN), options.hyper, *addresses, scale, divisor, count)


def _empty_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised, with the tensor's (dense) strides."""
    if not memory.is_pooled(tensor):
        return torch.empty_like(tensor, dtype=dtype)
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = memory.empty(tuple(tensor.shape[d] for d in order), dtype)
    return flat.permute([order.index(d) for d in range(tensor.dim())])


def _empty_grad(tensor: torch.Tensor, need: bool) -> torch.Tensor | None:
    return _empty_as(tensor, tensor.dtype) if need else None


def forward(
    options: hyper.Loss, tensors: tuple[torch.Tensor, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None, tuple[()]]:
    """The loss, and its gradients for the grad_output expected; None if there is none."""
    input, target = tensors
    if options.reduction == "none":
        values = _empty_as(input, options.dtype)
        _run(options, 1.0, input, target, values, None, None, None, None, None)
        return values, None, ()
    left = options.grad_output is not None and any(needs)
    grads = tuple(map(_empty_grad, tensors, needs)) if left else (None, None)
    sums = input.new_empty(-(-input.numel() // CHUNK), dtype=torch.float64)
    loss = input.new_empty((), dtype=options.dtype)
    _run(options, options.grad_output or 0.0, input, target, None, *grads, None, sums, loss)
    return loss, grads if left else None, ()


def backward(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...] | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output, computed anew from the inputs."""
    input, target = tensors
    grads = grads or tuple(map(_empty_grad, tensors, needs))
    if options.reduction == "none":
        # in the layout of the input, element for element
        upstream = _empty_as(input, grad_output.dtype).copy_(grad_output)
        _run(options, 1.0, input, target, None, *grads, upstream, None, None)
    else:
        _run(options, grad_output.item(), input, target, None, *grads, None, None, None)
    return grads
