"""Cross-entropy over rows whose classes lie side by side in memory.

A row is read from memory once: block by block, while a block is in L1, the maximum so far, the
exponentials and their sum. Where a gradient is wanted the exponentials stay (in its own place,
or, where it is of lower precision, in scratch memory), each block's of the maximum of its time,
so that what is left to do is one multiplication an element.
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
from .vector_math import cast, exp, from_ordered, log, ordered

BLOCK = 2048


@kernel
def block_max(x: Any, begin: int, end: int) -> Any:
    """Maximum of x[begin:end], through the floats' ordered integer images."""
    best = ordered(load(x, begin))
    for i in range(begin + 1, end):
        best = max(best, ordered(load(x, i)))
    return from_ordered(best)


@summing_kernel
def block_sum_exp(x: Any, begin: int, end: int, shift: Any, exps: Any, out: int) -> float:
    """Sum of exp(x - shift) over x[begin:end], which are kept if wanted."""
    total = cast(0, shift)
    for i in range(end - begin):
        e = exp(load(x, begin + i) - shift)
        if exps is not None:
            store(exps, out + i, e)
        total += e
    return np.float64(total)


@kernel
def softmax_statistics(
    x: Any, row: int, classes: int, zero: Any, exps: Any, out: int, shifts: Any, first: int
) -> tuple[Any, float]:
    """(max, sum of exp(x - max)) of a row; right with leading blocks of -inf.

    exps gets the exponentials, each block's of x - max so far, and shifts those maxima.
    """
    lowest = cast(-np.inf, zero)
    top, total = lowest, 0.0
    for block in range((classes + BLOCK - 1) // BLOCK):
        begin = block * BLOCK
        end = min(begin + BLOCK, classes)
        here = block_max(x, row + begin, row + end)
        if here > top:
            if top > lowest:
                total *= math.exp(np.float64(top) - np.float64(here))
            top = here
        # while all is -inf, anything finite will do: (-inf) - (-inf) is NaN
        shift = top if top > lowest else zero
        total += block_sum_exp(x, row + begin, row + end, shift, exps, out + begin)
        if exps is not None:
            store(shifts, first + block, top)
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
def block_gradient(
    exps: Any, at: int, probability: Any, weight: Any, smooth: Any, base: int, grad: Any,
    out: int, begin: int, end: int, softmax_scale: Any, scale: Any,
) -> None:  # fmt: skip
    zero = cast(0, scale)
    for c in range(begin, end):
        k = coefficient(probability, weight, smooth, base, c, zero)
        # exps is None where the gradient's own memory has them
        e = load(grad, out + c) if exps is None else load(exps, at + c)
        store(grad, out + c, e * softmax_scale - k * scale)


@kernel
def since(shift: Any, top: Any) -> float:
    """exp(shift - top), most often of two equal numbers."""
    return 1.0 if shift == top else math.exp(np.float64(shift) - np.float64(top))


@kernel
def row_gradient(
    exps: Any, at: int, shifts: Any, first: int, probability: Any, weight: Any, smooth: Any,
    base: int, grad: Any, out: int, classes: int, top: Any, softmax_scale: float, scale: Any,
) -> None:  # fmt: skip
    for block in range((classes + BLOCK - 1) // BLOCK):
        block_scale = softmax_scale * since(load(shifts, first + block), top)
        block_gradient(
            exps, at, probability, weight, smooth, base, grad, out, block * BLOCK,
            min(block * BLOCK + BLOCK, classes), cast(block_scale, scale), scale,
        )  # fmt: skip


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
    grad: Any, upstream: Any, loss: Any, divisor: float, shifts: Any, exps: Any, hard: float,
    scale: float, zero: Any, ignore_index: int, classes: int, inner: int, rows: int,
    x_outer: int, x_inner: int, t_outer: int, t_inner: int,
) -> None:  # fmt: skip
    """Arguments: see cross_entropy._run.

    exps and shifts are scratch memory, a row and its blocks' shifts a part; exps is None if the
    gradient's own memory can hold them.
    """
    blocks = (classes + BLOCK - 1) // BLOCK
    for part in prange(parts):
        first = part * blocks
        for r in range(part * rows // parts, (part + 1) * rows // parts):
            row = r // inner * x_outer + r % inner * x_inner
            base = r // inner * t_outer + r % inner * t_inner
            label = 0
            if target is not None:
                label = load(target, r)
                if label == ignore_index:
                    skip_row(r, losses, grad, classes, zero)
                    continue
            if exps is None:
                at = r * classes
                top, total = softmax_statistics(x, row, classes, zero, grad, at, shifts, first)
            else:
                at = part * classes
                top, total = softmax_statistics(x, row, classes, zero, exps, at, shifts, first)
            mass, dot = row_coefficients(x, row, probability, weight, smooth, base, classes, top)
            share = 0.0
            if target is not None:
                share = hard
                if weight is not None:
                    share *= np.float64(load(weight, label))
            if losses is not None:
                value, log_total = 0.0, log(total)
                if target is not None:
                    value = chosen_loss(load(x, row + label), top, log_total, share)
                if smooth is not None or probability is not None:
                    value += mass * log_total - dot
                store(losses, r, value)
            if grad is not None:
                factor = scale
                if upstream is not None:
                    factor *= np.float64(load(upstream, r))
                p = 0.0
                if target is not None:
                    e = load(grad, at + label) if exps is None else load(exps, at + label)
                    p = np.float64(e) * since(load(shifts, first + label // BLOCK), top) / total
                row_gradient(
                    exps, at, shifts, first, probability, weight, smooth, base, grad,
                    r * classes, classes, top, factor * (mass + share) / total,
                    cast(factor, zero),
                )  # fmt: skip
                if target is not None:
                    label_smooth = 0.0
                    if smooth is not None:
                        label_smooth = np.float64(load(smooth, label))
                    g = chosen_gradient(p, share, mass, label_smooth)
                    store(grad, r * classes + label, cast(factor * g, zero))
    if loss is not None:
        store(loss, 0, sum_all(losses, rows) / divisor)
