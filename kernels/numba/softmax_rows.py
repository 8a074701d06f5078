"""Cross-entropy over rows whose classes lie side by side in memory.

A row is read from memory once: block by block, while a block is in L1, the maximum so far, the
exponentials and their sum. Where a gradient is wanted the exponentials stay (in its own place,
or, where it is of lower precision, in scratch memory), each block's of the maximum of its time,
so that what is left to do is one multiplication an element. Where a forward pass has left these
maxima and the sum behind, the gradient is computed at once, from the same exponentials.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .compiler import inlined, kernel, region, summing_kernel
from .pointer import from_bits, load, load_bits, per_line, prefetch, store
from .reduction import sum_all
from .softmax import (
    EACH,
    GIVEN,
    KEPT,
    NOTHING,
    SUM,
    cap_slope,
    capped,
    chosen_coefficients,
    chosen_gradient,
    chosen_loss,
    give_each,
    pull_of,
    read_label,
    squared,
)
from .team import on_threads
from .vector_math import cast, exp_below_one, log

BLOCK = 2048
# Rows whose losses are finished together.
GROUP = 64


@inlined
def apart(count: int) -> int:
    """Numbers from one part's to the next's, where each has `count`: whole pairs of cache lines.

    Two threads that write to one line, or to two that are fetched together, wait for each other.
    """
    return (count + 31) // 32 * 32


@kernel
def block_max(x: Any, begin: int, end: int) -> Any:
    """Maximum of x[begin:end], in integers: LLVM does not vectorise that of floats.

    The bits of positive floats are ordered as they are, those of negative ones the other way
    round. A NaN is above infinity or, with the sign bit set, below all.
    """
    highest = lowest = load_bits(x, begin)
    for i in range(begin + 1, end):
        bits = load_bits(x, i)
        highest, lowest = max(highest, bits), min(lowest, bits)
    return from_bits(highest if highest >= 0 else lowest, x)


@summing_kernel
def block_sum_exp(
    x: Any, begin: int, end: int, softcap: Any, shift: Any, exps: Any, out: int, scale: Any
) -> float:
    """Sum of exp(x - shift) <= 1 over x[begin:end], which are kept if wanted.

    scale, if given, multiplies the differences.

    A sum that has 1 in it loses digits of each number added. So it only says how many ones there
    are, most often a single one, and the others have a sum of their own.
    """
    one = cast(1, shift)
    total = rest = cast(0, shift)
    for i in range(end - begin):
        difference = capped(load(x, begin + i), softcap) - shift
        if scale is not None:
            difference = difference * scale
        e = exp_below_one(difference)
        if exps is not None:
            store(exps, out + i, e)
        total += e
        rest += e if e < one else cast(0, shift)
    ones: float = np.rint(np.float64(total) - np.float64(rest))
    return ones + np.float64(rest)


@kernel
def softmax_statistics(
    x: Any, row: int, begin: int, end: int, softcap: Any, zero: Any, exps: Any, out: int,
    shifts: Any, first: int, scale: Any,
) -> tuple[Any, float]:  # fmt: skip
    """(max, sum of exp(x - max)) of classes begin to end of a row; begin is that of a block.

    Right with leading blocks of -inf. exps gets the exponentials, each block's of x - max so far,
    and shifts those maxima. scale, if given, multiplies the differences.
    """
    lowest = cast(-np.inf, zero)
    top, total = lowest, 0.0
    for c in range(begin, end, BLOCK):
        stop = min(c + BLOCK, end)
        here = capped(block_max(x, row + c, row + stop), softcap)
        for i in range(stop, min(stop + BLOCK, end), per_line(x)):
            prefetch(x, row + i)  # memory has nothing to do during the exponentials
        if here > top:
            if top > lowest:
                less = np.float64(top) - np.float64(here)
                if scale is not None:
                    less *= np.float64(scale)
                total *= math.exp(less)
            top = here
        # while all is -inf, anything finite will do: (-inf) - (-inf) is NaN
        shift = top if top > lowest else zero
        total += block_sum_exp(x, row + c, row + stop, softcap, shift, exps, out + c, scale)
        if shifts is not None:
            store(shifts, first + c // BLOCK, top)
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
    x: Any, row: int, softcap: Any, probability: Any, weight: Any, smooth: Any, base: int,
    begin: int, end: int, top: Any,
) -> tuple[float, float]:  # fmt: skip
    """Sums of k_c and of k_c (x_c - max) over a block of classes."""
    zero = cast(0, top)
    total, dot = 0.0, 0.0  # in float64: the two nearly cancel where mass is large
    for c in range(begin, end):
        k = coefficient(probability, weight, smooth, base, c, zero)
        total += np.float64(k)
        dot += np.float64(k) * np.float64(capped(load(x, row + c), softcap) - top)
    return total, dot


@kernel
def row_coefficients(
    x: Any, row: int, softcap: Any, probability: Any, weight: Any, smooth: Any, base: int,
    begin: int, end: int, top: Any,
) -> tuple[float, float]:  # fmt: skip
    """Sums of k_c and of k_c (x_c - max) over classes; zeros for a plain class index."""
    mass, dot = 0.0, 0.0
    if smooth is not None or probability is not None:
        for c in range(begin, end, BLOCK):
            stop = min(c + BLOCK, end)
            k, kx = block_coefficients(
                x, row, softcap, probability, weight, smooth, base, c, stop, top
            )  # fmt: skip
            mass += k
            dot += kx
    return mass, dot


@inlined
def exponential(x: Any, place: int, softcap: Any, shift: Any) -> Any:
    """What `softmax_statistics` has made of a logit, where shift is the maximum of that time."""
    counted = shift if shift > -np.inf else cast(0, shift)
    return exp_below_one(capped(load(x, place), softcap) - counted)


@kernel
def block_gradient(
    x: Any, row: int, softcap: Any, exps: Any, at: int, shift: Any, probability: Any, weight: Any,
    smooth: Any, base: int, grad: Any, out: int, begin: int, end: int, softmax_scale: Any,
    scale: Any,
) -> None:  # fmt: skip
    """The gradients of a block; shift is None where its exponentials are there."""
    zero = cast(0, scale)
    for c in range(begin, end):
        if shift is not None:
            e = exponential(x, row + c, softcap, shift)
        else:  # exps is None where the gradient's own memory has them
            e = load(grad, out + c) if exps is None else load(exps, at + c)
        g = e * softmax_scale
        if smooth is not None or probability is not None:
            g = g - coefficient(probability, weight, smooth, base, c, zero) * scale
        if softcap is not None:
            g = g * cap_slope(load(x, row + c), softcap)
        store(grad, out + c, g)


@kernel
def since(shift: Any, top: Any) -> float:
    """exp(shift - top), most often of two equal numbers."""
    return 1.0 if shift == top else math.exp(np.float64(shift) - np.float64(top))


@kernel
def row_gradient(
    x: Any, row: int, softcap: Any, exps: Any, at: int, shifts: Any, first: int, probability: Any,
    weight: Any, smooth: Any, base: int, grad: Any, out: int, begin: int, end: int, top: Any,
    softmax_scale: float, scale: Any, given: bool,
) -> None:  # fmt: skip
    """given: whether the shifts are a forward pass's, and the exponentials not there."""
    for c in range(begin, end, BLOCK):
        shift, stop = load(shifts, first + c // BLOCK), min(c + BLOCK, end)
        block_scale = cast(softmax_scale * since(shift, top), scale)
        if given:
            block_gradient(
                x, row, softcap, exps, at, shift, probability, weight, smooth, base, grad, out, c,
                stop, block_scale, scale,
            )  # fmt: skip
        else:
            block_gradient(
                x, row, softcap, exps, at, None, probability, weight, smooth, base, grad, out, c,
                stop, block_scale, scale,
            )  # fmt: skip


@kernel
def target_gradient(
    x: Any, row: int, softcap: Any, weight: Any, grad: Any, out: int, begin: int, end: int,
    top: Any, log_total: Any, factor: Any,
) -> None:  # fmt: skip
    """factor * weight_c * -log softmax of classes begin to end: that of their probabilities."""
    for c in range(begin, end):
        slope = factor * (log_total - (capped(load(x, row + c), softcap) - top))
        if weight is not None:
            slope *= load(weight, c)
        store(grad, out + c, slope)


@kernel
def skip_row(grad: Any, out: int, classes: int, zero: Any) -> None:
    """An ignored position's gradient is exactly 0."""
    for c in range(classes):
        store(grad, out + c, zero)


@kernel
def losses_of(
    losses: Any, r: int, count: int, plain: Any, masses: Any, totals: Any, t: int
) -> None:
    """losses = plain + masses * log(totals), of which many are faster at once than one by one."""
    for j in range(count):
        value, mass = load(plain, t + j), load(masses, t + j)
        if mass != 0:  # of an ignored position it is, and its loss exactly 0
            value += mass * log(load(totals, t + j))
        store(losses, r + j, value)


@kernel
def softmax_rows_part(
    part: int, parts: int, x: Any, target: Any, probability: Any, weight: Any, smooth: Any,
    losses: Any, grad: Any, t_grad: Any, upstream: Any, bad: Any, shifts: Any, exps: Any,
    kept_totals: Any, out: Any, plain: Any, masses: Any, totals: Any, hard: float, scale: float,
    zero: Any, softcap: Any, z_loss: Any, statistics: int, wanted: int, step: int,
    ignore_index: int, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
    t_outer: int, t_inner: int,
) -> None:  # fmt: skip
    blocks, given = (classes + BLOCK - 1) // BLOCK, statistics == GIVEN
    first, kept = part * apart(blocks), part * apart(classes)
    end, group = (part + 1) * rows // parts, part * GROUP
    start = part * rows // parts
    for r in range(start, end):
        row = r // inner * x_outer + r % inner * x_inner
        base = r // inner * t_outer + r % inner * t_inner
        label, counts = 0, True
        if target is not None:
            label = read_label(target, r, ignore_index, classes, bad)
            counts = label >= 0
        if statistics:
            first = r * blocks
        value, mass, total = 0.0, 0.0, 1.0
        if counts:
            at = r * classes if exps is None else kept
            if given:
                top, total = load(shifts, first + blocks - 1), load(kept_totals, r)
            elif exps is None:
                top, total = softmax_statistics(
                    x, row, 0, classes, softcap, zero, grad, at, shifts, first, None
                )  # fmt: skip
            else:
                top, total = softmax_statistics(
                    x, row, 0, classes, softcap, zero, exps, at, shifts, first, None
                )  # fmt: skip
            if statistics == KEPT:
                store(kept_totals, r, total)
            mass, dot = row_coefficients(
                x, row, softcap, probability, weight, smooth, base, 0, classes, top
            )  # fmt: skip
            share, label_smooth = 0.0, 0.0
            if target is not None:
                share, label_smooth = chosen_coefficients(label, hard, weight, smooth)
                value = chosen_loss(capped(load(x, row + label), softcap), top, 0.0, share)
            value -= dot
            if z_loss is not None:
                value += squared(z_loss, top, total)
            factor, g_row = scale * np.float64(load(upstream, r * step)), r * classes
            if t_grad is not None:
                target_gradient(
                    x, row, softcap, weight, t_grad, g_row, 0, classes, top,
                    cast(log(total), zero), cast(factor, zero),
                )  # fmt: skip
            if grad is not None:
                pull, g = pull_of(mass + share, z_loss, top, total), 0.0
                if target is not None:
                    shift = load(shifts, first + label // BLOCK)
                    if given:
                        e = exponential(x, row + label, softcap, shift)
                    else:
                        e = load(grad, at + label) if exps is None else load(exps, at + label)
                    p = np.float64(e) * since(shift, top) / total
                    g = factor * chosen_gradient(p, share, pull, label_smooth)
                    if softcap is not None:
                        g *= np.float64(cap_slope(load(x, row + label), softcap))
                row_gradient(
                    x, row, softcap, exps, at, shifts, first, probability, weight, smooth, base,
                    grad, g_row, 0, classes, top, factor * pull / total, cast(factor, zero), given,
                )  # fmt: skip
                if target is not None:
                    store(grad, g_row + label, cast(g, zero))
            mass += share
        elif grad is not None:
            skip_row(grad, r * classes, classes, zero)
        if wanted != NOTHING:
            j = (r - start) % GROUP
            store(plain, group + j, value)
            store(masses, group + j, mass)
            store(totals, group + j, total)
            if j == GROUP - 1 or r == end - 1:
                losses_of(losses, r - j, j + 1, plain, masses, totals, group)
                if wanted == EACH:
                    give_each(out, losses, r - j, j + 1)


@region
def softmax_rows(
    parts: int, x: Any, target: Any, probability: Any, weight: Any, smooth: Any, losses: Any,
    grad: Any, t_grad: Any, upstream: Any, out: Any, bad: Any, divisor: float, shifts: Any,
    exps: Any, plain: Any, masses: Any, totals: Any, kept_totals: Any, hard: float, scale: float,
    zero: Any, softcap: Any, z_loss: Any, statistics: int, wanted: int, step: int,
    ignore_index: int, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
    t_outer: int, t_inner: int,
) -> bool:  # fmt: skip
    """Arguments: see cross_entropy.run. Whether all class indices were in range.

    losses has room for every position's; out gets what is `wanted` of them; upstream is one number
    for all positions (step 0) or one for each (step 1).

    softcap and z_loss are None where there are none. statistics: what becomes of them. Unless
    they are scratch, shifts has the number of its blocks for each row, and kept_totals one.

    Scratch memory: shifts, the number of its blocks a part, and exps, a row a part, or None if
    the gradient's own memory can hold them, both `apart`; plain, masses and totals, GROUP a part.
    """
    store(bad, 0, 0)
    on_threads(softmax_rows_part, parts, (
        x, target, probability, weight, smooth, losses, grad, t_grad, upstream, bad, shifts, exps,
        kept_totals, out, plain, masses, totals, hard, scale, zero, softcap, z_loss, statistics,
        wanted, step, ignore_index, classes, inner, rows, x_outer, x_inner, t_outer, t_inner,
    ))  # fmt: skip
    if wanted == SUM:
        store(out, 0, sum_all(losses, rows) / divisor)
    good: bool = load(bad, 0) == 0
    return good
