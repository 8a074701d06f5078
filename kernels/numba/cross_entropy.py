"""Cross-entropy: from tensors to one of the two traversals.

With coefficients k_c (the weighted and smoothed target distribution of a position),
mass = sum of k_c and p = softmax(x):

    loss         = mass * (max + log sum exp(x - max)) - sum of k_c x_c
    d loss / d x = mass * p_c - k_c

A class index puts one coefficient, `hard` times its class weight, on top of an optional
array `smooth`; probabilities give every class its own, t_c * weight_c + smooth_c.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from numba.core import types

from .. import hyper
from ..layout import ClassAxis, class_axis
from ..reference import out_of_bounds
from . import memory
from .compiler import dtype_name, Region, pointer, specialise
from .softmax import check_targets
from .softmax_rows import softmax_rows
from .softmax_tiles import softmax_tiles
from .threads import Launcher, parts_for

# From this many classes a row fills vectors by itself, if its classes lie side by side.
LONG_ROW = 64
# Positions in a tile, fewer where a tile of that width would not fit a core's L2 cache.
TILE_WIDTH, NARROW_WIDTH, TILE_BYTES = 64, 16, 1 << 19
GRAIN = 16_384


class _Call(NamedTuple):
    """One call, prepared: the coefficients of the formula above, and how to reduce."""

    input: torch.Tensor
    target: torch.Tensor | None  # class indices, contiguous
    probability: torch.Tensor | None
    weight: torch.Tensor | None
    smooth: torch.Tensor | None
    hard: float
    ignore_index: int
    denominator: float


def _prepare(options: hyper.Loss, tensors: tuple[torch.Tensor | None, ...]) -> _Call:
    input, target, weight = tensors
    assert input is not None and target is not None
    shape = _layout_of(input)
    record = options.hyper
    assert isinstance(record, hyper.CrossEntropy)
    smoothing = record.label_smoothing
    smooth = None
    if smoothing:
        compute = torch.float64 if input.dtype == torch.float64 else torch.float32
        smooth = torch.full((shape.classes,), smoothing / shape.classes, dtype=compute)
        if weight is not None:
            smooth *= weight
    if weight is not None:
        weight = weight.contiguous()
    positions = shape.outer * shape.inner
    if target.is_floating_point():
        if smoothing:
            kept = torch.full((shape.classes,), 1 - smoothing, dtype=smooth.dtype)  # type: ignore[union-attr]
            weight = kept if weight is None else kept * weight
        denominator = positions if options.reduction == "mean" else 1.0
        return _Call(input, None, target, weight, smooth, 0.0, -1, denominator)
    target = target.contiguous()
    used = _checked_weight(target, weight, record.ignore_index, shape.classes)
    denominator = used if options.reduction == "mean" else 1.0
    hard = 1.0 - smoothing
    return _Call(input, target, None, weight, smooth, hard, record.ignore_index, denominator)


def _layout_of(tensor: torch.Tensor) -> ClassAxis:
    result = class_axis(tensor)
    assert result is not None, "dispatch admits only layouts that can be walked"
    return result


def _checked_weight(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, classes: int
) -> float:
    """The summed weight of all positions that count; IndexError for a target out of range."""
    result = torch.empty(2, dtype=torch.float64)
    check = _target_check(dtype_name(target.dtype), None if weight is None else dtype_name(weight.dtype))
    check(
        target.data_ptr(), None if weight is None else weight.data_ptr(), result.data_ptr(),
        ignore_index, classes, target.numel(),
    )  # fmt: skip
    bad, used = result.tolist()
    if bad >= 0:
        raise out_of_bounds(target, classes, ignore_index)
    return float(used)


@functools.cache
def _target_check(target: str, weight: str | None) -> Any:
    return specialise(
        check_targets,
        pointer(target, 0),
        types.none if weight is None else pointer(weight, 1, "float64"),
        pointer("float64", 2, "float64"),
        *[types.intp] * 3,
    )


@functools.cache
def _launcher(loop: Region, *dtypes: str | None) -> Launcher:
    """dtypes: of input, target, probability, weight, smooth, losses, grad, upstream."""
    compute = "float64" if dtypes[0] == "float64" else "float32"
    widths = [compute] * 5 + ["float64", compute, "float64"]
    slots = [
        types.none if dtype is None else pointer(dtype, number, width)
        for number, (dtype, width) in enumerate(zip(dtypes, widths, strict=True))
    ]
    number = getattr(types, compute)
    if loop is softmax_rows:
        return Launcher(loop, *slots, types.float64, types.float64, number, *[types.intp] * 8)
    scratch = [pointer(compute, k, compute) for k in (8, 9, 10)]
    totals = [pointer("float64", k, "float64") for k in (11, 12)]
    del slots[2]
    return Launcher(
        loop, *slots, *scratch, *totals, *[types.float64] * 3, number, *[types.intp] * 11
    )


def _run(
    call: _Call,
    losses: torch.Tensor | None,
    grad: torch.Tensor | None,
    upstream: torch.Tensor | None,
    scale: float,
) -> None:
    """Compute losses (one per position) and the gradient, each if wanted.

    The gradient is scale * upstream[position] times the derivative of a position's loss,
    or scale times it without upstream.
    """
    x = _layout_of(call.input)
    rows = x.outer * x.inner
    if rows == 0:
        return
    pointwise = (call.target, call.probability, call.weight, call.smooth, losses, grad, upstream)
    dtypes = [None if t is None else dtype_name(t.dtype) for t in (call.input, *pointwise)]
    addresses = [None if t is None else t.data_ptr() for t in (call.input, *pointwise)]
    parts = min(parts_for(rows * x.classes, GRAIN), rows)
    if x.class_stride == 1 and (x.classes >= LONG_ROW or call.target is None):
        t = x if call.probability is None else _layout_of(call.probability)
        _launcher(softmax_rows, *dtypes)(
            parts, *addresses, call.hard, scale, 0.0, call.ignore_index, x.classes, x.inner, rows,
            x.outer_stride, x.inner_stride, t.outer_stride, t.inner_stride,
        )  # fmt: skip
        return
    fits = x.classes * TILE_WIDTH * 4 <= TILE_BYTES
    width = min(TILE_WIDTH if fits else NARROW_WIDTH, x.inner)
    compute = torch.float64 if call.input.dtype == torch.float64 else torch.float32
    tile = torch.empty(parts * width * (x.classes + 2), dtype=compute)
    totals = torch.empty(2 * parts * width, dtype=torch.float64)
    tops = tile.data_ptr() + parts * width * x.classes * tile.itemsize
    sums = tops + parts * width * tile.itemsize
    scratch = (tile.data_ptr(), tops, sums, totals.data_ptr(), totals.data_ptr() + 8 * parts * width)
    mass = 0.0 if call.smooth is None else float(call.smooth.sum(dtype=torch.float64))
    g = _gradient_layout(x)
    del addresses[2]
    _launcher(softmax_tiles, *dtypes)(
        parts, *addresses, *scratch, call.hard, mass, scale, 0.0, call.ignore_index, x.classes,
        x.inner, rows, x.outer_stride, x.inner_stride, x.class_stride,
        g.outer_stride, g.inner_stride, g.class_stride, width,
    )  # fmt: skip


def _gradient_layout(x: ClassAxis) -> ClassAxis:
    """Dense, with the classes last where the input has them last."""
    stride, classes, inner = x.inner * x.classes, x.classes, x.inner
    if x.class_stride == 1:
        return ClassAxis(classes, x.outer, inner, stride, classes, 1)
    return ClassAxis(classes, x.outer, inner, stride, 1, inner)


def _empty_gradient(input: torch.Tensor) -> torch.Tensor:
    x = _layout_of(input)
    g = _gradient_layout(x)
    flat = memory.empty((input.numel(),), input.dtype)
    if input.dim() == 1:
        return flat
    if input.dim() == 2:
        return flat.as_strided(input.shape, (g.inner_stride, g.class_stride))
    middle = flat.as_strided(
        (x.outer, x.classes, x.inner), (g.outer_stride, g.class_stride, g.inner_stride)
    )
    return middle.unflatten(2, input.shape[2:])


def forward(
    options: hyper.Loss, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None]:
    """The loss, and its gradients for a grad_output of 1 (None where that isn't settled yet)."""
    call = _prepare(options, tensors)
    shape = call.input.shape[:1] + call.input.shape[2:] if call.input.dim() > 1 else ()
    if options.reduction == "none":
        losses = torch.empty(shape, dtype=options.dtype)
        _run(call, losses, None, None, 1.0)
        return losses, None
    losses = torch.empty(shape, dtype=torch.float64)
    grad = _empty_gradient(call.input) if needs[0] else None
    _run(call, losses, grad, None, _inverse(call.denominator))
    # NumPy's sum, because the order of torch's depends on the number of threads
    total = float(losses.numpy().sum())
    loss = torch.tensor(total * _inverse(call.denominator), dtype=options.dtype)
    return loss, None if grad is None else (grad, None, None)


def backward(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor | None, ...],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output, computed anew from the inputs."""
    call = _prepare(options, tensors)
    grad = _empty_gradient(call.input)
    if options.reduction == "none":
        _run(call, None, grad, grad_output.contiguous(), 1.0)
    else:
        _run(call, None, grad, None, grad_output.item() * _inverse(call.denominator))
    return grad, None, None


def _inverse(denominator: float) -> float:
    """1 / denominator, where nothing counts inf: 0 * inf is the NaN that torch's mean gives."""
    return 1.0 / denominator if denominator else math.inf
