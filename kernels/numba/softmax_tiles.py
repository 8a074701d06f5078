"""Cross-entropy over rows that are short, or whose classes lie apart in memory.

A tile of up to `width` positions is copied class by class into scratch memory that stays in
cache, so that every inner loop runs over positions, side by side, whatever the strides of the
tensor and however few its classes. Class indices only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import kernel, region
from .pointer import SIDE, load, store, turn
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

# Classes that are summed in the compute dtype.
FEW = 4


@kernel
def copy_in(
    x: Any, start: int, class_stride: int, stride: int, tile: Any, at: int, pitch: int,
    count: int, classes: int,
) -> None:  # fmt: skip
    if stride == 1:
        for c in range(classes):
            for j in range(count):
                store(tile, at + c * pitch + j, load(x, start + c * class_stride + j))
    elif class_stride == 1 and classes >= SIDE and count >= SIDE:
        for j in range(0, count, SIDE):
            k = min(j, count - SIDE)  # the last block may overlap the one before
            for c in range(0, classes, SIDE):
                d = min(c, classes - SIDE)
                turn(x, start + k * stride + d, stride, tile, at + d * pitch + k, pitch)
    else:
        for j in range(count):
            for c in range(classes):
                store(tile, at + c * pitch + j, load(x, start + j * stride + c * class_stride))


@kernel
def cap_tile(
    tile: Any, slopes: Any, at: int, pitch: int, count: int, classes: int, softcap: Any
) -> None:
    """The capped logits in place of the logits, and the derivatives by those."""
    for c in range(classes):
        for j in range(at + c * pitch, at + c * pitch + count):
            x = load(tile, j)
            store(slopes, j, cap_slope(x, softcap))
            store(tile, j, capped(x, softcap))


@kernel
def column_max(tile: Any, at: int, pitch: int, count: int, classes: int, tops: Any, t: int) -> None:
    """tops = maximum over the classes, or 0 where all are -inf: (-inf) - (-inf) is NaN."""
    for j in range(count):
        store(tops, t + j, load(tile, at + j))
    for c in range(1, classes):
        for j in range(count):
            v = load(tile, at + c * pitch + j)
            top = load(tops, t + j)
            store(tops, t + j, v if v > top else top)
    for j in range(count):
        top = load(tops, t + j)
        store(tops, t + j, cast(0, top) if top == cast(-np.inf, top) else top)


@kernel
def column_sums(
    tile: Any, at: int, pitch: int, count: int, classes: int, tops: Any, sums: Any,
    totals: Any, dots: Any, t: int, smooth: Any,
) -> None:  # fmt: skip
    """totals = sum of exp(x - top), put in place of x; dots = sum of smooth_c (x - top).

    A FEW classes are added in the compute dtype, then in float64, in a loop of its own, lest it
    halve the vectors of the exponentials.
    """
    if smooth is not None:
        for j in range(count):
            store(dots, t + j, 0.0)
        for c in range(classes):
            factor = np.float64(load(smooth, c))
            for j in range(count):
                v = load(tile, at + c * pitch + j) - load(tops, t + j)
                store(dots, t + j, load(dots, t + j) + factor * np.float64(v))
    for j in range(count):
        store(totals, t + j, 0.0)
    for begin in range(0, classes, FEW):
        for c in range(begin, min(begin + FEW, classes)):
            for j in range(count):
                e = exp_below_one(load(tile, at + c * pitch + j) - load(tops, t + j))
                store(tile, at + c * pitch + j, e)
                store(sums, t + j, load(sums, t + j) + e if c > begin else e)
        for j in range(count):
            store(totals, t + j, load(totals, t + j) + np.float64(load(sums, t + j)))


@kernel
def column_exponentials(
    tile: Any, at: int, pitch: int, count: int, classes: int, tops: Any, totals: Any, t: int,
    kept_tops: Any, kept_totals: Any, r: int,
) -> None:  # fmt: skip
    """What `column_max` and `column_sums` have left behind in the forward pass."""
    for j in range(count):
        store(tops, t + j, load(kept_tops, r + j))
        store(totals, t + j, load(kept_totals, r + j))
    for c in range(classes):
        for j in range(count):
            k = at + c * pitch + j
            store(tile, k, exp_below_one(load(tile, k) - load(tops, t + j)))


@kernel
def copy_out(
    grad: Any, start: int, class_stride: int, stride: int, tile: Any, slopes: Any, at: int,
    pitch: int, count: int, classes: int, sums: Any, factors: Any, t: int, smooth: Any,
) -> None:  # fmt: skip
    """grad = e * sums - smooth_c * factors, with e from the tile, times the slopes of a cap."""
    for c in range(classes):
        for j in range(count):
            g = load(tile, at + c * pitch + j) * load(sums, t + j)
            if smooth is not None:
                g = g - load(smooth, c) * load(factors, t + j)
            if slopes is not None:
                g = g * load(slopes, at + c * pitch + j)
            if stride == 1:
                store(grad, start + c * class_stride + j, g)
            else:
                store(tile, at + c * pitch + j, g)
    if stride == 1:
        pass
    elif class_stride == 1 and classes >= SIDE and count >= SIDE:
        for j in range(0, count, SIDE):
            k = min(j, count - SIDE)
            for c in range(0, classes, SIDE):
                d = min(c, classes - SIDE)
                turn(tile, at + d * pitch + k, pitch, grad, start + k * stride + d, stride)
    else:
        for j in range(count):
            for c in range(classes):
                v = load(tile, at + c * pitch + j)
                store(grad, start + j * stride + c * class_stride, v)


@kernel
def choose_labels(
    x: Any, start: int, class_stride: int, stride: int, tile: Any, at: int, pitch: int,
    target: Any, r: int, weight: Any, smooth: Any, softcap: Any, hard: float, mass: float,
    ignore_index: int, bad: Any, count: int, classes: int, labels: Any, chosen: Any, exps: Any,
    shares: Any, masses: Any, smooths: Any, t: int,
) -> bool:  # fmt: skip
    """What belongs to each position's class index; False if some position is ignored.

    labels gets it, or -1, chosen its logit, exps its exponential, shares and masses its
    coefficients, smooths its part of `smooth`; ignored positions have zeros.
    """
    complete = True
    for j in range(count):
        label = read_label(target, r + j, ignore_index, classes, bad)
        store(labels, t + j, label)
        share, row_mass = hard, mass
        if label < 0:
            complete = False
            label, share, row_mass = 0, 0.0, 0.0
        share, label_smooth = chosen_coefficients(label, share, weight, smooth)
        if smooth is not None:
            store(smooths, t + j, label_smooth)
            store(masses, t + j, row_mass)
        store(shares, t + j, share)
        logit = load(x, start + j * stride + label * class_stride)
        store(chosen, t + j, capped(logit, softcap))
        store(exps, t + j, load(tile, at + label * pitch + j))
    return complete


@kernel
def losses_of(
    losses: Any, r: int, count: int, tops: Any, totals: Any, dots: Any, chosen: Any, shares: Any,
    masses: Any, smooth: Any, z_loss: Any, t: int,
) -> None:  # fmt: skip
    for j in range(count):
        log_total = log(load(totals, t + j))
        x, top, share = load(chosen, t + j), load(tops, t + j), load(shares, t + j)
        value = chosen_loss(x, top, log_total, share)
        if smooth is not None:
            value += load(masses, t + j) * log_total - load(dots, t + j)
        if z_loss is not None:
            value += squared(z_loss, top, load(totals, t + j))
        store(losses, r + j, value)


@kernel
def factors_of(
    upstream: Any, r: int, scale: float, count: int, tops: Any, sums: Any, totals: Any,
    dots: Any, exps: Any, shares: Any, masses: Any, smooths: Any, smooth: Any, z_loss: Any, t: int,
    zero: Any, step: int,
) -> None:  # fmt: skip
    """What the gradients need, where other numbers have served.

    sums gets what a position's exponentials are to be multiplied by, dots and tops its factor, and
    totals the gradient at the class index (as softmax.chosen_gradient has it).
    """
    if step:
        for j in range(count):
            store(dots, t + j, scale * np.float64(load(upstream, r + j)))
    else:
        for j in range(count):
            store(dots, t + j, scale * np.float64(load(upstream, 0)))
    for j in range(count):
        factor = load(dots, t + j)
        total, share, mass, label_smooth = load(totals, t + j), load(shares, t + j), 0.0, 0.0
        if smooth is not None:
            mass, label_smooth = load(masses, t + j), load(smooths, t + j)
        p = np.float64(load(exps, t + j)) / total
        pull = pull_of(mass + share, z_loss, load(tops, t + j), total)
        store(totals, t + j, factor * chosen_gradient(p, share, pull, label_smooth))
        store(sums, t + j, cast(factor * pull / total, zero))
        store(tops, t + j, cast(factor, zero))


@kernel
def write_labels(
    grad: Any, start: int, class_stride: int, stride: int, slopes: Any, at: int, pitch: int,
    count: int, classes: int, labels: Any, chosen: Any, t: int, zero: Any,
) -> None:  # fmt: skip
    """Write the gradients at the class indices, and exact zeros where a position is ignored."""
    for j in range(count):
        label = load(labels, t + j)
        if label >= 0:
            place = start + j * stride + label * class_stride
            g = load(chosen, t + j)
            if slopes is not None:
                g *= np.float64(load(slopes, at + label * pitch + j))
            store(grad, place, cast(g, zero))
        else:
            for c in range(classes):
                store(grad, start + j * stride + c * class_stride, zero)


@kernel
def tiles_part(
    part: int, parts: int, x: Any, target: Any, weight: Any, smooth: Any, losses: Any, grad: Any,
    upstream: Any, out: Any, bad: Any, labels: Any, slopes: Any, tile: Any, tops: Any, sums: Any,
    chosen: Any, exps: Any, totals: Any, dots: Any, shares: Any, masses: Any, smooths: Any,
    kept_tops: Any, kept_totals: Any, hard: float, mass: float, scale: float, zero: Any,
    softcap: Any, z_loss: Any, statistics: int, wanted: int, step: int, ignore_index: int,
    classes: int, inner: int, rows: int, x_outer: int, x_inner: int, x_class: int, g_outer: int,
    g_inner: int, g_class: int, width: int, pitch: int,
) -> None:  # fmt: skip
    per_outer = (inner + width - 1) // width
    tiles = rows // inner * per_outer
    at, t = part * pitch * classes, part * pitch
    for number in range(part * tiles // parts, (part + 1) * tiles // parts):
        outer, first = number // per_outer, number % per_outer * width
        count = min(width, inner - first)
        start = outer * x_outer + first * x_inner
        g_start = outer * g_outer + first * g_inner
        r = outer * inner + first
        copy_in(x, start, x_class, x_inner, tile, at, pitch, count, classes)
        if softcap is not None:
            cap_tile(tile, slopes, at, pitch, count, classes, softcap)
        if statistics == GIVEN:
            column_exponentials(
                tile, at, pitch, count, classes, tops, totals, t, kept_tops, kept_totals, r
            )  # fmt: skip
        else:
            column_max(tile, at, pitch, count, classes, tops, t)
            column_sums(tile, at, pitch, count, classes, tops, sums, totals, dots, t, smooth)
        if statistics == KEPT:
            for j in range(count):
                store(kept_tops, r + j, load(tops, t + j))
                store(kept_totals, r + j, load(totals, t + j))
        complete = choose_labels(
            x, start, x_class, x_inner, tile, at, pitch, target, r, weight, smooth, softcap,
            hard, mass, ignore_index, bad, count, classes, labels, chosen, exps, shares, masses,
            smooths, t,
        )  # fmt: skip
        if wanted != NOTHING:
            losses_of(
                losses, r, count, tops, totals, dots, chosen, shares, masses, smooth, z_loss, t
            )  # fmt: skip
            if not complete:
                for j in range(count):
                    if load(labels, t + j) < 0:
                        store(losses, r + j, 0.0)
            if wanted == EACH:
                give_each(out, losses, r, count)
        if grad is not None:
            factors_of(
                upstream, r, scale, count, tops, sums, totals, dots, exps, shares, masses, smooths,
                smooth, z_loss, t, zero, step,
            )  # fmt: skip
            copy_out(
                grad, g_start, g_class, g_inner, tile, slopes, at, pitch, count, classes, sums,
                tops, t, smooth,
            )  # fmt: skip
            write_labels(
                grad, g_start, g_class, g_inner, slopes, at, pitch, count, classes, labels, totals,
                t, zero,
            )  # fmt: skip


@region
def softmax_tiles(
    parts: int, x: Any, target: Any, weight: Any, smooth: Any, losses: Any, grad: Any,
    upstream: Any, out: Any, bad: Any, divisor: float, labels: Any, slopes: Any, tile: Any,
    tops: Any, sums: Any, chosen: Any, exps: Any, totals: Any, dots: Any, shares: Any, masses: Any,
    smooths: Any, kept_tops: Any, kept_totals: Any, hard: float, mass: float, scale: float,
    zero: Any, softcap: Any, z_loss: Any, statistics: int, wanted: int, step: int,
    ignore_index: int, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
    x_class: int, g_outer: int, g_inner: int, g_class: int, width: int, pitch: int,
) -> bool:  # fmt: skip
    """Arguments: see cross_entropy.run and softmax_rows. mass is the sum over `smooth`.

    Whether all class indices were in range. labels, tile, tops, sums, chosen, exps, totals, dots,
    shares, masses and smooths are scratch memory, `pitch` numbers a part (tile: a part and class),
    of which `width` are used. slopes is another tile, None where logits aren't capped. kept_tops
    and kept_totals have a number for each position, unless statistics are scratch.
    """
    store(bad, 0, 0)
    on_threads(tiles_part, parts, (
        x, target, weight, smooth, losses, grad, upstream, out, bad, labels, slopes, tile, tops,
        sums, chosen, exps, totals, dots, shares, masses, smooths, kept_tops, kept_totals, hard,
        mass, scale, zero, softcap, z_loss, statistics, wanted, step, ignore_index, classes, inner,
        rows, x_outer, x_inner, x_class, g_outer, g_inner, g_class, width, pitch,
    ))  # fmt: skip
    if wanted == SUM:
        store(out, 0, sum_all(losses, rows) / divisor)
    good: bool = load(bad, 0) == 0
    return good
