"""Cross-entropy over rows that are short, or whose classes lie apart in memory.

A tile of `width` positions is copied class by class into scratch memory that stays in
cache, so that every inner loop runs over positions, side by side, whatever the strides
of the tensor and however few its classes. Class indices only.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from .compiler import kernel, region
from .pointer import load, store
from .reduction import sum_all
from .softmax import chosen_gradient, chosen_loss
from .vector_math import cast, exp

# Classes summed in the compute dtype before the sum moves to float64.
BLOCK = 64


@kernel
def copy_in(
    x: Any, start: int, class_stride: int, stride: int, tile: Any, at: int, width: int,
    count: int, classes: int,
) -> None:  # fmt: skip
    if stride == 1:
        for c in range(classes):
            for j in range(count):
                store(tile, at + c * width + j, load(x, start + c * class_stride + j))
    elif class_stride == 1:
        for j in range(count):
            for c in range(classes):
                store(tile, at + c * width + j, load(x, start + j * stride + c))
    else:
        for j in range(count):
            for c in range(classes):
                store(tile, at + c * width + j, load(x, start + j * stride + c * class_stride))


@kernel
def column_max(tile: Any, at: int, width: int, count: int, classes: int, tops: Any, t: int) -> None:
    """tops = maximum over the classes, or 0 where all are -inf: (-inf) - (-inf) is NaN."""
    for j in range(count):
        store(tops, t + j, load(tile, at + j))
    for c in range(1, classes):
        for j in range(count):
            v = load(tile, at + c * width + j)
            top = load(tops, t + j)
            store(tops, t + j, v if v > top else top)
    for j in range(count):
        top = load(tops, t + j)
        store(tops, t + j, cast(0, top) if top == cast(-np.inf, top) else top)


@kernel
def column_sums(
    tile: Any, at: int, width: int, count: int, classes: int, tops: Any, sums: Any,
    totals: Any, dots: Any, t: int, smooth: Any,
) -> None:  # fmt: skip
    """totals = sum of exp(x - top), put in place of x; dots = sum of smooth_c (x - top)."""
    for j in range(count):
        store(totals, t + j, 0.0)
        if smooth is not None:
            store(dots, t + j, 0.0)
    for begin in range(0, classes, BLOCK):
        for j in range(count):
            store(sums, t + j, cast(0, load(tops, t + j)))
        for c in range(begin, min(begin + BLOCK, classes)):
            for j in range(count):
                v = load(tile, at + c * width + j) - load(tops, t + j)
                if smooth is not None:
                    dot = np.float64(load(smooth, c)) * np.float64(v)
                    store(dots, t + j, load(dots, t + j) + dot)
                e = exp(v)
                store(tile, at + c * width + j, e)
                store(sums, t + j, load(sums, t + j) + e)
        for j in range(count):
            store(totals, t + j, load(totals, t + j) + np.float64(load(sums, t + j)))


@kernel
def copy_out(
    grad: Any, start: int, class_stride: int, stride: int, tile: Any, at: int, width: int,
    count: int, classes: int, sums: Any, factors: Any, t: int, smooth: Any,
) -> None:  # fmt: skip
    """grad = e * sums - smooth_c * factors, with e from the tile."""
    for c in range(classes):
        for j in range(count):
            g = load(tile, at + c * width + j) * load(sums, t + j)
            if smooth is not None:
                g = g - load(smooth, c) * load(factors, t + j)
            if stride == 1:
                store(grad, start + c * class_stride + j, g)
            else:
                store(tile, at + c * width + j, g)
    if stride != 1:
        for j in range(count):
            for c in range(classes):
                v = load(tile, at + c * width + j)
                store(grad, start + j * stride + c * class_stride, v)


@kernel
def finish_labels(
    grad: Any, start: int, class_stride: int, stride: int, target: Any, r: int, count: int,
    classes: int, chosen: Any, t: int, ignore_index: int, zero: Any,
) -> None:  # fmt: skip
    """Write the gradients at the class indices, and exact zeros where a position is ignored."""
    for j in range(count):
        label = load(target, r + j)
        if label != ignore_index:
            place = start + j * stride + label * class_stride
            store(grad, place, cast(load(chosen, t + j), zero))
        else:
            for c in range(classes):
                store(grad, start + j * stride + c * class_stride, zero)


@region
def softmax_tiles(
    parts: int, x: Any, target: Any, weight: Any, smooth: Any, losses: Any, grad: Any,
    upstream: Any, loss: Any, divisor: float, tile: Any, tops: Any, sums: Any, totals: Any,
    dots: Any, hard: float, mass: float, scale: float, zero: Any, ignore_index: int,
    classes: int, inner: int, rows: int, x_outer: int, x_inner: int, x_class: int,
    g_outer: int, g_inner: int, g_class: int, width: int,
) -> None:  # fmt: skip
    """Arguments: see cross_entropy._run. mass is the sum over `smooth`; tile, tops, sums,
    totals and dots are scratch memory, of width numbers (tile: width * classes) per part.
    """
    per_outer = (inner + width - 1) // width
    tiles = rows // inner * per_outer
    for part in prange(parts):
        at, t = part * width * classes, part * width
        for number in range(part * tiles // parts, (part + 1) * tiles // parts):
            outer, first = number // per_outer, number % per_outer * width
            count = min(width, inner - first)
            start = outer * x_outer + first * x_inner
            g_start = outer * g_outer + first * g_inner
            r = outer * inner + first
            copy_in(x, start, x_class, x_inner, tile, at, width, count, classes)
            column_max(tile, at, width, count, classes, tops, t)
            column_sums(tile, at, width, count, classes, tops, sums, totals, dots, t, smooth)
            for j in range(count):
                label = load(target, r + j)
                share, row_mass, value = 0.0, 0.0, 0.0
                top, total = load(tops, t + j), load(totals, t + j)
                if label != ignore_index:
                    share, row_mass = hard, mass
                    if weight is not None:
                        share *= np.float64(load(weight, label))
                    chosen = load(x, start + j * x_inner + label * x_class)
                    value = chosen_loss(chosen, top, total, share)
                    if smooth is not None:
                        value += mass * math.log(total) - load(dots, t + j)
                if losses is not None:
                    store(losses, r + j, value)
                if grad is not None:
                    factor = scale
                    if upstream is not None:
                        factor *= np.float64(load(upstream, r + j))
                    g = 0.0
                    if label != ignore_index:
                        p = np.float64(load(tile, at + label * width + j)) / total
                        g = chosen_gradient(p, share, row_mass, smooth, label)
                    # These have served; now they hold what the gradient needs.
                    store(sums, t + j, cast(factor * (row_mass + share) / total, zero))
                    store(tops, t + j, cast(factor, zero))
                    store(dots, t + j, factor * g)
            if grad is not None:
                copy_out(
                    grad, g_start, g_class, g_inner, tile, at, width, count, classes, sums, tops,
                    t, smooth,
                )  # fmt: skip
                finish_labels(
                    grad, g_start, g_class, g_inner, target, r, count, classes, dots, t,
                    ignore_index, zero,
                )  # fmt: skip
    if loss is not None:
        store(loss, 0, sum_all(losses, rows) / divisor)
