"""Divergences of rows of two tensors of logits: see kernels/distillation.py.

A program has a row of each, which the forward pass reads twice, the second time out of the cache
where that holds the rows of all programs that run at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

from ..distillation import KEPT as _KEPT
from ..distillation import Divergence, Divergences
from .compiler import TYPES, as_number, compute_dtype, device_function, kernel, launch, number
from .outcomes import span_of, tile_of
from .record import constants_of, formula_of, record_numbers
from .softmax import join, with_one_more

__all__ = ["divergence_gradient", "divergences"]

# Numbers of a row that the backward pass wants: the largest logit over T and the sum of
# exponentials of the student and of the teacher, and what `finish` gives beside the value.
KEPT = tl.constexpr(_KEPT)


@device_function
def logits_at(x, column, mask, scale, COMPUTE: tl.constexpr):
    return tl.load(x + column, mask=mask, other=-float("inf")).to(COMPUTE) * scale


@device_function
def probabilities(a, b, top, inverse, t_top, t_inverse, shift):
    """p, q and log q - log p, of the student's and the teacher's logits."""
    d, e = a - top, b - t_top
    return tl.exp(d) * inverse, tl.exp(e) * t_inverse, (e - d) - shift


@kernel
def row_divergences(
    student, teacher, record, scale, values, kept, classes, stride, t_stride, FOLD: tl.constexpr,
    FINISH: tl.constexpr, MAKE: tl.constexpr, NAMES: tl.constexpr, FLAGS: tl.constexpr,
    SUMS: tl.constexpr, COMPUTE: tl.constexpr, COLUMNS: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """That of one row. Each lane has its own sums until all of the row is read."""
    fields = ()
    for k in tl.static_range(len(record)):
        fields = fields + (as_number(record[k], COMPUTE),)  # type: ignore[assignment]
    scale = as_number(scale, COMPUTE)
    row = tl.program_id(0).to(tl.int64)
    x, y = student + row * stride, teacher + row * t_stride
    lanes = tl.arange(0, COLUMNS)
    top = tl.full([COLUMNS], LOWEST, COMPUTE)
    t_top = tl.full([COLUMNS], LOWEST, COMPUTE)
    total = tl.zeros([COLUMNS], COMPUTE)
    t_total = tl.zeros([COLUMNS], COMPUTE)
    for start in tl.range(0, classes, COLUMNS):
        column = start + lanes
        mask = column < classes
        top, total = with_one_more(top, total, logits_at(x, column, mask, scale, COMPUTE))
        t_top, t_total = with_one_more(t_top, t_total, logits_at(y, column, mask, scale, COMPUTE))
    top, total = join(top, total, 0)
    t_top, t_total = join(t_top, t_total, 0)
    inverse, t_inverse = 1.0 / total, 1.0 / t_total
    shift = tl.log(t_total) - tl.log(total)
    sums = ()
    for _k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([COLUMNS], COMPUTE),)  # type: ignore[assignment]
    for start in tl.range(0, classes, COLUMNS):
        column = start + lanes
        mask = column < classes
        a = logits_at(x, column, mask, scale, COMPUTE)
        b = logits_at(y, column, mask, scale, COMPUTE)
        numbers = probabilities(a, b, top, inverse, t_top, t_inverse, shift)
        found = FOLD(MAKE(fields, FLAGS), *numbers)  # past the row's end p and q are 0, and so it
        added = ()
        for k in tl.static_range(SUMS):
            added = added + (sums[k] + found[k],)  # type: ignore[assignment]
        sums = added
    totals = ()
    for k in tl.static_range(SUMS):
        totals = totals + (tl.sum(sums[k], 0),)  # type: ignore[assignment]
    found = FINISH(MAKE(fields, FLAGS), *totals)
    tl.store(values + row, found[0])
    kept += row * KEPT
    tl.store(kept, top)
    tl.store(kept + 1, total)
    tl.store(kept + 2, t_top)
    tl.store(kept + 3, t_total)
    tl.store(kept + 4, found[1])


@kernel
def row_divergence_slopes(
    student, teacher, record, scale, upstream, kept, grad, classes, stride, t_stride, span,
    SLOPES: tl.constexpr, MAKE: tl.constexpr, NAMES: tl.constexpr, FLAGS: tl.constexpr,
    COMPUTE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of `span` classes of a row."""
    fields = ()
    for k in tl.static_range(len(record)):
        fields = fields + (as_number(record[k], COMPUTE),)  # type: ignore[assignment]
    scale = as_number(scale, COMPUTE)
    row = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * span
    kept += row * KEPT
    top, total, t_top, t_total = (
        tl.load(kept), tl.load(kept + 1), tl.load(kept + 2), tl.load(kept + 3)
    )  # fmt: skip
    known, factor = tl.load(kept + 4), tl.load(upstream + row) * scale
    inverse, t_inverse = 1.0 / total, 1.0 / t_total
    shift = tl.log(t_total) - tl.log(total)
    for start in tl.range(begin, tl.minimum(begin + span, classes), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mask = column < classes
        a = logits_at(student + row * stride, column, mask, scale, COMPUTE)
        b = logits_at(teacher + row * t_stride, column, mask, scale, COMPUTE)
        p, q, gap = probabilities(a, b, top, inverse, t_top, t_inverse, shift)
        slope = SLOPES(MAKE(fields, FLAGS), known, p, q, gap)
        tl.store(grad + row * classes + column, factor * slope, mask=mask)


def divergences(record: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> Divergences:
    (rows, classes), wide = student.shape, compute_dtype(student.dtype)
    values = student.new_empty(rows, dtype=wide)
    kept = student.new_empty(rows, KEPT.value, dtype=wide)
    columns, threads = tile_of(classes, wide)
    if wide == torch.float64:  # whose exponentials and logarithms take many registers
        threads *= 2
    operation: Any = type(record)
    launch(
        row_divergences, (rows,), student.device, threads, student, teacher,
        record_numbers(record, wide), number(1.0 / record.temperature, wide), values, kept,
        classes, student.stride(0), teacher.stride(0), FOLD=formula_of(operation, "fold"),
        FINISH=formula_of(operation, "finish"), SUMS=record.sums, COMPUTE=TYPES[wide],
        COLUMNS=columns, LOWEST=torch.finfo(wide).min, **constants_of(record),
    )  # fmt: skip
    return Divergences(values, kept)


def divergence_gradient(
    record: Divergence, student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor,
    grads: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    (rows, classes), wide = student.shape, compute_dtype(student.dtype)
    columns, threads = tile_of(classes, wide)
    operation: Any = type(record)
    out = student.new_empty(rows, classes)
    span = span_of(classes, columns)
    launch(
        row_divergence_slopes, (rows, -(-classes // span)), student.device, threads, student,
        teacher, record_numbers(record, wide), number(1.0 / record.temperature, wide), grads,
        kept, out, classes, student.stride(0), teacher.stride(0), span,
        SLOPES=formula_of(operation, "slopes"), COMPUTE=TYPES[wide], COLUMNS=columns,
        **constants_of(record),
    )  # fmt: skip
    return out
