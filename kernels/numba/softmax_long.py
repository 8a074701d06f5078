"""Cross-entropy over few long rows whose classes lie side by side: threads share a row.

Every row is cut into segments, whatever the number of threads that share them, so that the result
is the same to the bit for any. Each segment's statistics, then those of the rows, then each
segment's part of the gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import inlined, kernel, region
from .pointer import load, store
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
from .softmax_rows import (
    BLOCK,
    exponential,
    row_coefficients,
    row_gradient,
    since,
    skip_row,
    softmax_statistics,
    target_gradient,
)
from .team import on_threads
from .vector_math import cast, log

SEGMENT = 16 * BLOCK


@inlined
def reference(top: Any) -> Any:
    """What a segment's x_c - max are counted from: not -inf, where all of them are."""
    return top if top > -np.inf else cast(0, top)


@kernel
def combine(
    first: int, segments: int, tops: Any, totals: Any, masses: Any, dots: Any
) -> tuple[float, float, float, float]:
    """A row's (max, sum of exponentials, sum of k_c, sum of k_c (x_c - max))."""
    top = load(tops, first)
    for s in range(first + 1, first + segments):
        here = load(tops, s)
        if here > top or np.isnan(here):
            top = here
    total, mass, dot = 0.0, 0.0, 0.0
    for s in range(first, first + segments):
        here, k = load(tops, s), load(masses, s)
        total += load(totals, s) * since(here, top)
        mass += k
        dot += load(dots, s) + k * (reference(here) - top)
    return top, total, mass, dot


@kernel
def statistics_part(
    part: int, parts: int, x: Any, probability: Any, weight: Any, smooth: Any, grad: Any,
    shifts: Any, exps: Any, kept_totals: Any, tops: Any, totals: Any, masses: Any, dots: Any,
    zero: Any, softcap: Any, statistics: int, classes: int, inner: int, rows: int, x_outer: int,
    x_inner: int, t_outer: int, t_inner: int,
) -> None:  # fmt: skip
    blocks, segments = (classes + BLOCK - 1) // BLOCK, (classes + SEGMENT - 1) // SEGMENT
    pieces = rows * segments
    for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
        r, begin = piece // segments, piece % segments * SEGMENT
        end = min(begin + SEGMENT, classes)
        row = r // inner * x_outer + r % inner * x_inner
        base = r // inner * t_outer + r % inner * t_inner
        at, first = r * classes, r * blocks
        if statistics == GIVEN:
            top = load(shifts, first + (end - 1) // BLOCK)
            total = load(kept_totals, piece)
        elif exps is None:
            top, total = softmax_statistics(
                x, row, begin, end, softcap, zero, grad, at, shifts, first, None
            )  # fmt: skip
        else:
            top, total = softmax_statistics(
                x, row, begin, end, softcap, zero, exps, at, shifts, first, None
            )  # fmt: skip
        mass, dot = row_coefficients(
            x, row, softcap, probability, weight, smooth, base, begin, end, reference(top)
        )  # fmt: skip
        if statistics == KEPT:
            store(kept_totals, piece, total)
        store(tops, piece, np.float64(top))
        store(totals, piece, total)
        store(masses, piece, mass)
        store(dots, piece, dot)


@kernel
def target_part(
    part: int, parts: int, x: Any, weight: Any, t_grad: Any, tops: Any, masses: Any, dots: Any,
    zero: Any, softcap: Any, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
) -> None:  # fmt: skip
    segments = (classes + SEGMENT - 1) // SEGMENT
    pieces = rows * segments
    for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
        r, begin = piece // segments, piece % segments * SEGMENT
        end, s = min(begin + SEGMENT, classes), r * segments
        row = r // inner * x_outer + r % inner * x_inner
        target_gradient(
            x, row, softcap, weight, t_grad, r * classes, begin, end, cast(load(tops, s), zero),
            cast(load(dots, s), zero), cast(load(masses, s), zero),
        )  # fmt: skip


@kernel
def gradient_part(
    part: int, parts: int, x: Any, target: Any, probability: Any, weight: Any, smooth: Any,
    grad: Any, bad: Any, shifts: Any, exps: Any, tops: Any, totals: Any, masses: Any, dots: Any,
    zero: Any, softcap: Any, statistics: int, ignore_index: int, classes: int, inner: int,
    rows: int, x_outer: int, x_inner: int, t_outer: int, t_inner: int,
) -> None:  # fmt: skip
    blocks, segments = (classes + BLOCK - 1) // BLOCK, (classes + SEGMENT - 1) // SEGMENT
    pieces = rows * segments
    for piece in range(part * pieces // parts, (part + 1) * pieces // parts):
        r, begin = piece // segments, piece % segments * SEGMENT
        end = min(begin + SEGMENT, classes)
        row = r // inner * x_outer + r % inner * x_inner
        base, at = r // inner * t_outer + r % inner * t_inner, r * classes
        s = r * segments
        label, counts = -1, True
        if target is not None:
            label = read_label(target, r, ignore_index, classes, bad)
            counts = label >= 0
        if counts:
            row_gradient(
                x, row, softcap, exps, at, shifts, r * blocks, probability, weight, smooth, base,
                grad, at, begin, end, load(tops, s), load(totals, s), cast(load(masses, s), zero),
                statistics == GIVEN,
            )  # fmt: skip
            if begin <= label < end:
                store(grad, at + label, cast(load(dots, s), zero))
        else:
            skip_row(grad, at + begin, end - begin, zero)


@region
def softmax_long(
    parts: int, x: Any, target: Any, probability: Any, weight: Any, smooth: Any, losses: Any,
    grad: Any, t_grad: Any, upstream: Any, out: Any, bad: Any, divisor: float, shifts: Any,
    exps: Any, tops: Any, totals: Any, masses: Any, dots: Any, kept_totals: Any, hard: float,
    scale: float, zero: Any, softcap: Any, z_loss: Any, statistics: int, wanted: int, step: int,
    ignore_index: int, classes: int, inner: int, rows: int, x_outer: int, x_inner: int,
    t_outer: int, t_inner: int,
) -> bool:  # fmt: skip
    """Arguments: see cross_entropy.run and softmax_rows. Whether all class indices were in range.

    kept_totals has a number for every segment, unless statistics are scratch.

    Scratch memory: shifts, for every block; exps, for every class, or None if the gradient's own
    memory can hold them; tops, totals, masses and dots, for every segment.
    """
    blocks, segments = (classes + BLOCK - 1) // BLOCK, (classes + SEGMENT - 1) // SEGMENT
    store(bad, 0, 0)
    on_threads(statistics_part, parts, (
        x, probability, weight, smooth, grad, shifts, exps, kept_totals, tops, totals, masses, dots,
        zero, softcap, statistics, classes, inner, rows, x_outer, x_inner, t_outer, t_inner,
    ))  # fmt: skip
    for r in range(rows):
        s = r * segments
        top, total, mass, dot = combine(s, segments, tops, totals, masses, dots)
        row, at = r // inner * x_outer + r % inner * x_inner, r * classes
        label, counts = 0, True
        if target is not None:
            label = read_label(target, r, ignore_index, classes, bad)
            counts = label >= 0
        value, share, label_smooth, pull, factor, g = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if counts:
            log_total = log(total)
            value = mass * log_total - dot
            if target is not None:
                share, label_smooth = chosen_coefficients(label, hard, weight, smooth)
                chosen = capped(load(x, row + label), softcap)
                value += chosen_loss(chosen, top, log_total, share)
            if z_loss is not None:
                value += squared(z_loss, top, total)
            pull = pull_of(mass + share, z_loss, top, total)
            factor = scale * np.float64(load(upstream, r * step))
            if target is not None and grad is not None:
                shift = load(shifts, r * blocks + label // BLOCK)
                if statistics == GIVEN:
                    e = exponential(x, row + label, softcap, shift)
                else:
                    e = load(grad, at + label) if exps is None else load(exps, at + label)
                p = np.float64(e) * since(shift, top) / total
                g = factor * chosen_gradient(p, share, pull, label_smooth)
                if softcap is not None:
                    g *= np.float64(cap_slope(load(x, row + label), softcap))
        if wanted != NOTHING:
            store(losses, r, value)
        if t_grad is not None:
            g = log(total)  # there is no class index, which g would be the gradient of
        # These have served; now the row's first segment has what its gradients need.
        store(tops, s, top)
        store(totals, s, factor * pull / total)
        store(masses, s, factor)
        store(dots, s, g)
    if t_grad is not None:
        on_threads(target_part, parts, (
            x, weight, t_grad, tops, masses, dots, zero, softcap, classes, inner, rows, x_outer,
            x_inner,
        ))  # fmt: skip
    if grad is not None:
        on_threads(gradient_part, parts, (
            x, target, probability, weight, smooth, grad, bad, shifts, exps, tops, totals, masses,
            dots, zero, softcap, statistics, ignore_index, classes, inner, rows, x_outer, x_inner,
            t_outer, t_inner,
        ))  # fmt: skip
    if wanted == EACH:
        give_each(out, losses, 0, rows)
    elif wanted == SUM:
        store(out, 0, sum_all(losses, rows) / divisor)
    good: bool = load(bad, 0) == 0
    return good
