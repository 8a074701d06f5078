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
from .compiler import dtype_name, pointer, record_type, region, summing_kernel
from .formulas import value_and_grad
from .pointer import load, store
from .threads import Launcher, parts_for
from .vector_math import cast

# Elements summed in the compute dtype before the sum moves to float64. Chunks are the
# same for any number of threads, and so is the result, to the bit.
CHUNK = 2048
GRAIN = 32_768


@summing_kernel
def chunk_sum(
    record: Any, input: Any, target: Any, values: Any, grad_input: Any, grad_target: Any,
    upstream: Any, scale: Any, begin: int, end: int,
) -> float:  # fmt: skip
    total = cast(0, scale)
    for i in range(begin, end):
        value, d_input, d_target = value_and_grad(record, load(input, i), load(target, i))
        total += value
        factor = scale
        if upstream is not None:
            factor = load(upstream, i)
        if values is not None:
            store(values, i, value)
        if grad_input is not None:
            store(grad_input, i, d_input * factor)
        if grad_target is not None:
            store(grad_target, i, d_target * factor)
    return np.float64(total)


@region
def pointwise_all(
    parts: int, record: Any, input: Any, target: Any, values: Any, grad_input: Any,
    grad_target: Any, upstream: Any, sums: Any, scale: Any, count: int,
) -> None:  # fmt: skip
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


@functools.cache
def _launcher(record: type, *dtypes: str | None) -> Launcher:
    """dtypes: of input, target, values, grad_input, grad_target, upstream; then of sums."""
    compute = "float64" if dtypes[0] == "float64" else "float32"
    slots = [types.none if d is None else pointer(d, k, compute) for k, d in enumerate(dtypes[:6])]
    sums = types.none if dtypes[6] is None else pointer("float64", 6, "float64")
    number = getattr(types, compute)
    return Launcher(pointwise_all, record_type(record, number), *slots, sums, number, types.intp)


def _run(
    record: Any, tensors: tuple[torch.Tensor | None, ...], reduce: bool, scale: float
) -> torch.Tensor | None:
    """Launch over (input, target, values, grad_input, grad_target, upstream); sums if `reduce`."""
    count = tensors[0].numel()  # type: ignore[union-attr]
    sums = torch.empty(-(-count // CHUNK), dtype=torch.float64) if reduce else None
    dtypes = [None if t is None else dtype_name(t.dtype) for t in tensors]
    launch = _launcher(type(record), *dtypes, "float64" if reduce else None)
    addresses = [None if t is None else t.data_ptr() for t in (*tensors, sums)]
    launch(parts_for(count, GRAIN), record, *addresses, scale, count)
    return sums


def _empty_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised, with the tensor's dtype and (dense) strides."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = memory.empty(tuple(tensor.shape[d] for d in order), tensor.dtype)
    return flat.permute([order.index(d) for d in range(tensor.dim())])


def forward(
    options: hyper.Loss, tensors: tuple[torch.Tensor, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None]:
    """The loss, and its gradients for a grad_output of 1 (None where that isn't settled yet)."""
    input, target = tensors
    if options.reduction == "none":
        values = torch.empty_like(input, dtype=options.dtype)
        _run(options.hyper, (input, target, values, None, None, None), False, 1.0)
        return values, None
    grads = tuple(
        _empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True)
    )
    scale = _scale(options, input)
    sums = _run(options.hyper, (input, target, None, *grads, None), True, scale)
    assert sums is not None
    # NumPy's sum, because the order of torch's depends on the number of threads
    loss = torch.tensor(float(sums.numpy().sum()) * scale, dtype=options.dtype)
    return loss, grads if any(needs) else None


def backward(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor, ...],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output, computed anew from the inputs."""
    input, target = tensors
    grads = tuple(
        _empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True)
    )
    upstream, scale = None, 1.0
    if options.reduction == "none":
        # the same layout as the input, element for element
        upstream = torch.empty_like(input, dtype=grad_output.dtype).copy_(grad_output)
    else:
        scale = grad_output.item() * _scale(options, input)
    _run(options.hyper, (input, target, None, *grads, upstream), False, scale)
    return grads


def _scale(options: hyper.Loss, input: torch.Tensor) -> float:
    if options.reduction != "mean":
        return 1.0
    return 1.0 / input.numel() if input.numel() else math.nan
