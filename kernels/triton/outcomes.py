"""What a softmax over each row says, from one read: see kernels/outcomes.py."""

from __future__ import annotations

import torch
import triton.language as tl

from ..outcomes import Outcomes
from ..reference import out_of_bounds
from .compiler import TYPES, compute_dtype, kernel, launch, power_of_2

__all__ = ["gradient", "outcomes"]

# Classes of a tile, at most (of float64, which takes twice the registers, a quarter of them), and
# bytes that a thread computes with.
TILE, PER_THREAD = 4096, 32


@kernel
def row_outcomes(
    input, target, log_probs, entropies, sums, places, tops, totals, kept, classes, stride,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Those of one row.

    Each lane has its own largest logit, and sums of e^d and of d e^d for d relative to it. It
    starts from the lowest finite number, because inf - inf is NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    x = input + row * stride
    lanes = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], LOWEST, COMPUTE)
    total = tl.zeros([COLUMNS], COMPUTE)
    slope = tl.zeros([COLUMNS], COMPUTE)
    place = tl.full([COLUMNS], 0, tl.int64) + classes
    for start in tl.range(0, classes, COLUMNS):
        column = start + lanes
        mask = column < classes
        value = tl.load(x + column, mask=mask, other=-float("inf")).to(COMPUTE)
        difference = value - top
        factor = tl.exp(-tl.abs(difference))
        rises = difference > 0
        part = tl.where(factor > 0, factor * difference, 0.0)
        risen = tl.where((total > 0) & (factor > 0), factor * slope - total * part, 0.0)
        slope = tl.where(rises, risen, slope + part)
        total = tl.where(rises, total * factor + 1.0, total + factor)
        top = tl.where(rises, value, top)
        place = tl.where(rises, column, place)
    joint = tl.max(top, 0)
    difference = top - joint
    factor = tl.exp(difference)
    part = tl.where(factor > 0, factor * difference, 0.0)
    whole = tl.sum(total * factor)
    tilt = tl.sum(slope * factor + total * part)
    log_total = tl.log(whole)
    label = tl.load(target + row)
    known = (label >= 0) & (label < classes)
    # Where asserts are not compiled, at least NaN and no access out of bounds.
    own = tl.load(x + tl.where(known, label, 0)).to(COMPUTE)
    own = tl.where(known, own - joint - log_total, float("nan"))
    entropy = log_total - tilt / whole
    tl.store(log_probs + row, own)
    tl.store(entropies + row, entropy)
    tl.store(sums + row, joint + log_total)
    first = tl.min(tl.where((top == joint) & (place < classes), place, classes), 0)
    tl.store(places + row, tl.where(first < classes, first, 0))
    tl.store(tops + row, joint)
    tl.store(totals + row, whole)
    tl.store(kept + row, entropy)
    tl.device_assert(known, "Target is out of bounds")


@kernel
def row_slopes(
    input, target, g_log_prob, g_entropy, g_sum, tops, totals, kept, grad, classes, stride, span,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of `span` classes of a row."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * span
    top, total = tl.load(tops + row), tl.load(totals + row)
    by_log_prob, by_entropy = tl.load(g_log_prob + row), tl.load(g_entropy + row)
    level = tl.load(g_sum + row) - by_log_prob - by_entropy * tl.load(kept + row)
    log_total, label = tl.log(total), tl.load(target + row)
    for start in tl.range(begin, tl.minimum(begin + span, classes), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < classes
        value = tl.load(input + row * stride + column, mask=mask, other=-float("inf")).to(COMPUTE)
        difference = value - top
        e = tl.exp(difference)
        p = e / total
        slope = tl.where(p != 0, p * (level - by_entropy * (difference - log_total)), 0.0)
        slope += tl.where(column == label, by_log_prob, 0.0)
        tl.store(grad + row * classes + column, slope, mask=mask)


def tile_of(classes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Its classes, and the threads of a program."""
    columns = min(power_of_2(classes), TILE // 4 if dtype == torch.float64 else TILE)
    return columns, max(columns * dtype.itemsize // PER_THREAD, 32)


def span_of(classes: int, columns: int) -> int:
    """Classes of which a program writes the gradient: some tiles, few enough programs a row."""
    return columns * max(4, classes // (columns << 15))


def outcomes(x: torch.Tensor, target: torch.Tensor) -> Outcomes:
    rows, classes = x.shape
    if target.device.type == "cpu" and ((target < 0) | (target >= classes)).any():  # interpreted
        raise out_of_bounds(target, classes, None)
    wide = compute_dtype(x.dtype)
    numbers = [x.new_empty(rows, dtype=wide) for _ in range(3)]
    places, kept = x.new_empty(rows, dtype=torch.int64), x.new_empty(3, rows, dtype=wide)
    columns, threads = tile_of(classes, wide)
    launch(
        row_outcomes, (rows,), x.device, threads, x, target, *numbers,
        places, *kept, classes, x.stride(0), COMPUTE=TYPES[wide], COLUMNS=columns,
        LOWEST=torch.finfo(wide).min,
    )  # fmt: skip
    log_probs, entropies, sums = numbers
    return Outcomes(log_probs, entropies, sums, places, kept)


def gradient(
    x: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, grads: torch.Tensor
) -> torch.Tensor:
    (rows, classes), wide = x.shape, compute_dtype(x.dtype)
    columns, threads = tile_of(classes, wide)
    out = x.new_empty(rows, classes)
    span = span_of(classes, columns)
    launch(
        row_slopes, (rows, -(-classes // span)), x.device, threads, x,
        target, *grads, *kept, out, classes, x.stride(0), span,
        COMPUTE=TYPES[wide], COLUMNS=columns,
    )  # fmt: skip
    return out
