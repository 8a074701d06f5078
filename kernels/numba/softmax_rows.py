"""Cross-entropy over rows whose classes lie side by side in memory.

A row is read from memory once: the maximum and the sum of exponentials are built up
together, block by block while a block is in L1, and the gradient re-reads the row from
L2. It computes exp again, which costs less than storing the first one, and rounds less.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import prange

from .compiler import kernel, region, summing_kernel
from .pointer import load, store
from .reduction import sum_all
from .softmax import chosen_gradient, chosen_loss
from .vector_math import cast, exp, from_ordered, ordered

BLOCK = 2048


@kernel
def block_max(x: Any, begin: int, end: int) -> Any:
    """Maximum of x[begin:end], through the floats' ordered integer images."""
    best = ordered(load(x, begin))
    for i in range(begin + 1, end):
        best = max(best, ordered(load(x, i)))
    return from_ordered(best)


@summing_kernel
def block_sum_exp(x: Any, begin: int, end: int, shift: Any) -> float:
    total = cast(0, shift)
    for i in range(begin, end):
        total += exp(load(x, i) - shift)
    return np.float64(total)


@kernel
def softmax_statistics(x: Any, row: int, classes: int, zero: Any) -> tuple[Any, float]:
    """(max, sum of exp(x - max)) of a row; right with leading blocks of -inf."""
    lowest = cast(-np.inf, zero)
    top, total = lowest, 0.0
    for begin in range(row, row + classes, BLOCK):
        end = min(begin + BLOCK, row + classes)
        here = block_max(x, begin, end)
        if here > top:
            if top > lowest:
                total *= math.exp(np.float64(top) - np.float64(here))
            top = here
        # while all is -inf, anything finite will do: (-inf) - (-inf) is NaN
        total += block_sum_exp(x, begin, end, top if top > lowest else zero)
    return top, total


@kernel
def coefficient(probability: Any, weight: Any, smooth: Any, base: int, c: int, zero: Any) -> Any:
    """The target's coefficient of class c, but for the class index of a hard target."""
    k = zero
    if smooth is not None:
        k = load(smooth, c)
    if probability is not None:
        t = load(probability, base + c)
        if weight is not None:
            t = t * load(weight, c)
        k = k + t
    return k


@summing_kernel
def block_coefficients(
    x: Any, row: int, probability: Any, weight: Any, smooth: Any, base: int,
    begin: int, end: int, top: Any,
) -> tuple[float, float]:  # fmt: skip
    """Sums of k_c and of k_c (x_c - max) over a block of classes."""
    zero = cast(0, top)
    total, dot = 0.0, 0.0  # in float64: the two nearly cancel where mass is large
    for c in range(begin, end):
        k = coefficient(probability, weight, smooth, base, c, zero)
        total += np.float64(k)
        dot += np.float64(k) * np.float64(load(x, row + c) - top)
    return total, dot


@kernel
def row_coefficients(
    x: Any, row: int, probability: Any, weight: Any, smooth: Any, base: int, classes: int, top: Any
) -> tuple[float, float]:
    """Sums of k_c and of k_c (x_c - max) over a row; zeros for a plain class index."""
    mass, dot = 0.0, 0.0
    if smooth is not None or probability is not None:
        for begin in range(0, classes, BLOCK):
            end = min(begin + BLOCK, classes)
            k, kx = block_coefficients(x, row, probability, weight, smooth, base, begin, end, top)
            mass += k
            dot += kx
    return mass, dot


@kernel
def row_gradient(
    x: Any, row: int, probability: Any, weight: Any, smooth: Any, base: int, grad: Any,
    out: int, classes: int, top: Any, softmax_scale: Any, scale: Any,
) -> None:  # fmt: skip
    zero = cast(0, scale)
    for c in range(classes):
        k = coefficient(probability, weight, smooth, base, c, zero)
        store(grad, out + c, exp(load(x, row + c) - top) * softmax_scale - k * scale)


@kernel
def skip_row(r: int, losses: Any, grad: Any, classes: int, zero: Any) -> None:
    """An ignored position: loss and gradient are exactly 0."""
    if losses is not None:
        store(losses, r, 0.0)
    if grad is not None:
        for c in range(classes):
            store(grad, r * classes + c, zero)


@region
def softmax_rows(
    parts: int, x: Any, target: Any, probability: Any, weight: Any, smooth: Any, losses: Any,
    grad: Any, upstream: Any, loss: Any, divisor: float, hard: float, scale: float, zero: Any,
    ignore_index: int, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
    t_outer: int, t_inner: int,
) -> None:  # fmt: skip
    """Arguments: see cross_entropy._run."""
    for part in prange(parts):
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            row = r // inner * x_outer + r % inner * x_inner
            base = r // inner * t_outer + r % inner * t_inner
            label = 0
            if target is not None:
                label = load(target, r)
                if label == ignore_index:
                    skip_row(r, losses, grad, classes, zero)
                    continue
            top, total = softmax_statistics(x, row, classes, zero)
            mass, dot = row_coefficients(x, row, probability, weight, smooth, base, classes, top)
            share = 0.0
            if target is not None:
                share = hard
                if weight is not None:
                    share *= np.float64(load(weight, label))
            if losses is not None:
                value = 0.0
                if target is not None:
                    value = chosen_loss(load(x, row + label), top, total, share)
                if smooth is not None or probability is not None:
                    value += mass * math.log(total) - dot
                store(losses, r, value)
            if grad is not None:
                factor = scale
                if upstream is not None:
                    factor *= np.float64(load(upstream, r))
                row_gradient(
                    x, row, probability, weight, smooth, base, grad, r * classes, classes, top,
                    cast(factor * (mass + share) / total, zero), cast(factor, zero),
                )  # fmt: skip
                if target is not None:
                    p = math.exp(np.float64(load(x, row + label)) - np.float64(top)) / total
                    g = chosen_gradient(p, share, mass, smooth, label)
                    store(grad, r * classes + label, cast(factor * g, zero))
    if loss is not None:
        store(loss, 0, sum_all(losses, rows) / divisor)
