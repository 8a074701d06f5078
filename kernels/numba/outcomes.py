"""What a softmax over each row says, from one read: see kernels/outcomes.py."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba.core import types

from ..outcomes import Outcomes
from ..reference import out_of_bounds
from . import memory
from .compiler import dtype_name, inlined, kernel, pointer, region, summing_kernel
from .pointer import load, store
from .softmax_rows import BLOCK, block_max
from .team import on_threads
from .threads import Launcher, parts_for
from .vector_math import cast, exp, log

__all__ = ["gradient", "outcomes"]

# Numbers a thread, below which a second one does not pay.
GRAIN = 32_768


@summing_kernel
def block_sums(x: Any, begin: int, end: int, shift: Any) -> tuple[float, float]:
    """Sums of e^d and of d e^d over d = x - shift <= 0.

    The ones among them are counted apart, beside which small numbers would lose their digits.
    """
    zero, one = cast(0, shift), cast(1, shift)
    total = rest = slope = zero
    for i in range(begin, end):
        d = load(x, i) - shift
        e = exp(d)
        total += e
        rest += e if e < one else zero
        slope += e * d if e > zero else zero
    ones = np.rint(np.float64(total) - np.float64(rest))
    return ones + np.float64(rest), np.float64(slope)


@inlined
def place_of(x: Any, begin: int, end: int, top: Any) -> int:
    """Where the largest is first, or the first NaN."""
    for i in range(begin, end):
        value = load(x, i)
        if value == top or np.isnan(value):
            return i - begin
    return 0


@kernel
def outcomes_part(
    part: int, parts: int, x: Any, target: Any, log_probs: Any, entropies: Any, sums: Any,
    places: Any, tops: Any, totals: Any, kept: Any, bad: Any, zero: Any, classes: int, rows: int,
    stride: int,
) -> None:  # fmt: skip
    lowest = cast(-np.inf, zero)
    for r in range(part * rows // parts, (part + 1) * rows // parts):
        row, top, at = r * stride, lowest, 0
        total, slope = 0.0, 0.0
        for c in range(0, classes, BLOCK):
            end = min(c + BLOCK, classes)
            here = block_max(x, row + c, row + end)
            if here > top or (np.isnan(here) and not np.isnan(top)):
                if top > lowest:
                    less = np.float64(top) - np.float64(here)
                    factor = np.exp(less)
                    slope = factor * (slope + less * total) if factor > 0.0 else 0.0
                    total *= factor
                top, at = here, c
            shift = top if top > lowest else zero
            t, s = block_sums(x, row + c, row + end, shift)
            total += t
            slope += s
        log_total = log(total)
        label = load(target, r)
        if label < 0 or label >= classes:
            store(bad, 0, 1)
            label = 0
        entropy = log_total - slope / total
        store(log_probs, r, np.float64(load(x, row + label)) - np.float64(top) - log_total)
        store(entropies, r, entropy)
        store(sums, r, np.float64(top) + log_total)
        store(places, r, at + place_of(x, row + at, row + min(at + BLOCK, classes), top))
        store(tops, r, np.float64(top))
        store(totals, r, total)
        store(kept, r, entropy)


@region
def all_outcomes(
    parts: int, x: Any, target: Any, log_probs: Any, entropies: Any, sums: Any, places: Any,
    tops: Any, totals: Any, kept: Any, bad: Any, zero: Any, classes: int, rows: int, stride: int,
) -> None:  # fmt: skip
    store(bad, 0, 0)
    on_threads(outcomes_part, parts, (
        x, target, log_probs, entropies, sums, places, tops, totals, kept, bad, zero, classes,
        rows, stride,
    ))  # fmt: skip


@kernel
def block_slopes(
    x: Any, row: int, grad: Any, out: int, classes: int, top: Any, log_total: Any, inverse: Any,
    level: Any, tilt: Any,
) -> None:  # fmt: skip
    """p_c (level - tilt log p_c)."""
    zero = cast(0, top)
    for c in range(classes):
        d = load(x, row + c) - top
        e = exp(d)
        slope = e * inverse * (level - tilt * (d - log_total))
        store(grad, out + c, slope if e != zero else zero)


@kernel
def gradient_part(
    part: int, parts: int, x: Any, target: Any, g_log_prob: Any, g_entropy: Any, g_sum: Any,
    tops: Any, totals: Any, kept: Any, grad: Any, bad: Any, zero: Any, classes: int, rows: int,
    stride: int,
) -> None:  # fmt: skip
    for r in range(part * rows // parts, (part + 1) * rows // parts):
        row, out = r * stride, r * classes
        top, total, entropy = load(tops, r), load(totals, r), load(kept, r)
        by_log_prob, by_entropy, by_sum = load(g_log_prob, r), load(g_entropy, r), load(g_sum, r)
        log_total = log(total)
        level = by_sum - by_log_prob - by_entropy * entropy
        label = load(target, r)
        if label < 0 or label >= classes:
            store(bad, 0, 1)
            label = 0
        chosen = load(x, row + label)
        block_slopes(
            x, row, grad, out, classes, cast(top, zero), cast(log_total, zero),
            cast(1.0 / total, zero), cast(level, zero), cast(by_entropy, zero),
        )  # fmt: skip
        d = np.float64(chosen) - top
        e = np.exp(d)
        other = by_log_prob * ((total - e) / total)  # 1 - p, which p itself has no digits of
        own = 0.0
        if e > 0.0:
            own = e / total * (by_sum - by_entropy * (d - log_total + entropy))
        store(grad, out + label, cast(own + other, zero))


@region
def all_slopes(
    parts: int, x: Any, target: Any, g_log_prob: Any, g_entropy: Any, g_sum: Any, tops: Any,
    totals: Any, kept: Any, grad: Any, bad: Any, zero: Any, classes: int, rows: int, stride: int,
) -> None:  # fmt: skip
    store(bad, 0, 0)
    on_threads(gradient_part, parts, (
        x, target, g_log_prob, g_entropy, g_sum, tops, totals, kept, grad, bad, zero, classes,
        rows, stride,
    ))  # fmt: skip


@functools.cache
def _launcher(loop: Any, dtype: torch.dtype) -> Launcher:
    compute = "float64" if dtype == torch.float64 else "float32"
    x, target = pointer(dtype_name(dtype), 0, compute), pointer("int64", 1)
    results = [pointer(compute, k, "float64") for k in range(2, 5)]
    kept = [pointer("float64", k, "float64") for k in range(5, 8)]
    slots = (
        [*results, pointer("int64", 8), *kept]
        if loop is all_outcomes
        else [*results, *kept, pointer(dtype_name(dtype), 8, compute)]
    )
    number = getattr(types, compute)
    return Launcher(loop, x, target, *slots, pointer("int64", 9), number, *[types.intp] * 3)


def _run(loop: Any, x: torch.Tensor, target: torch.Tensor, *tensors: torch.Tensor) -> None:
    rows, classes = x.shape
    bad = torch.empty(1, dtype=torch.int64, device="cpu")
    parts = min(parts_for(rows * classes, GRAIN), max(rows, 1))
    addresses = [t.data_ptr() for t in (x, target, *tensors, bad)]
    _launcher(loop, x.dtype)(parts, *addresses, 0.0, classes, rows, x.stride(0))
    if bad.item():
        raise out_of_bounds(target, classes, None)


def outcomes(x: torch.Tensor, target: torch.Tensor) -> Outcomes:
    rows, wide = len(x), torch.promote_types(x.dtype, torch.float32)
    numbers = [torch.empty(rows, dtype=wide, device="cpu") for _ in range(3)]
    places = torch.empty(rows, dtype=torch.int64, device="cpu")
    kept = torch.empty(3, rows, dtype=torch.float64, device="cpu")
    _run(all_outcomes, x, target, *numbers, places, *kept)
    log_probs, entropies, sums = numbers
    return Outcomes(log_probs, entropies, sums, places, kept)


def gradient(
    x: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, grads: torch.Tensor
) -> torch.Tensor:
    out = memory.empty(tuple(x.shape), x.dtype)
    _run(all_slopes, x, target, *grads, *kept, out)
    return out
