"""Divergences of rows of two tensors of logits: see kernels/distillation.py.

A row of each is read from memory once: what its softmax is divided by is found block by block, and
then the sums, out of the cache.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba.core import types

from ..distillation import KEPT, Divergence, Divergences
from . import memory
from .compiler import dtype_name, inlined, kernel, pointer, region, summing_kernel
from .outcomes import GRAIN
from .pointer import load, store
from .record import Values, finish, fold, read_record, slopes
from .softmax_rows import BLOCK, softmax_statistics
from .team import on_threads
from .threads import Launcher, parts_for
from .tuples import added, zeros
from .vector_math import cast, exp_below_one, log

__all__ = ["divergence_gradient", "divergences"]


@inlined
def statistics_of(kept: Any, r: int, scale: float, zero: Any) -> tuple[Any, ...]:
    """What `at_class` is to know of a row, in the dtype to compute in."""
    top, total = load(kept, r * KEPT), load(kept, r * KEPT + 1)
    t_top, t_total = load(kept, r * KEPT + 2), load(kept, r * KEPT + 3)
    return (
        cast(top, zero), cast(1.0 / total, zero), cast(t_top, zero), cast(1.0 / t_total, zero),
        cast(log(t_total) - log(total), zero), cast(scale, zero),
    )  # fmt: skip


@inlined
def at_class(x: Any, i: int, y: Any, j: int, statistics: Any) -> Any:
    """p, q and log q - log p, of the student's logit x[i] and the teacher's y[j]."""
    top, inverse, t_top, t_inverse, shift, scale = statistics
    d, e = (load(x, i) - top) * scale, (load(y, j) - t_top) * scale
    return exp_below_one(d) * inverse, exp_below_one(e) * t_inverse, (e - d) - shift


@summing_kernel
def block_sums(
    record: Any, x: Any, i: int, y: Any, j: int, count: int, statistics: Any, zero: Any
) -> Any:
    totals = zeros(record, zero)
    for c in range(count):
        totals = added(totals, fold(record, *at_class(x, i + c, y, j + c, statistics)))
    return totals


@kernel
def divergences_part(
    part: int, parts: int, numbers: Any, scale: float, x: Any, y: Any, values: Any, kept: Any,
    zero: Any, classes: int, rows: int, stride: int, t_stride: int,
) -> None:  # fmt: skip
    record, exact, narrow = read_record(numbers, zero), read_record(numbers, 0.0), cast(scale, zero)
    for r in range(part * rows // parts, (part + 1) * rows // parts):
        row, t_row = r * stride, r * t_stride
        top, total = softmax_statistics(
            x, row, 0, classes, None, zero, None, 0, None, 0, narrow
        )  # fmt: skip
        t_top, t_total = softmax_statistics(
            y, t_row, 0, classes, None, zero, None, 0, None, 0, narrow
        )  # fmt: skip
        store(kept, r * KEPT, np.float64(top))
        store(kept, r * KEPT + 1, total)
        store(kept, r * KEPT + 2, np.float64(t_top))
        store(kept, r * KEPT + 3, t_total)
        statistics = statistics_of(kept, r, scale, zero)
        totals = zeros(record, 0.0)
        for c in range(0, classes, BLOCK):
            count = min(BLOCK, classes - c)
            found = block_sums(record, x, row + c, y, t_row + c, count, statistics, zero)
            totals = added(totals, found)
        value, known = finish(exact, *totals)
        store(values, r, value)
        store(kept, r * KEPT + 4, known)


@region
def all_divergences(
    parts: int, numbers: Any, scale: float, x: Any, y: Any, values: Any, kept: Any, zero: Any,
    classes: int, rows: int, stride: int, t_stride: int,
) -> None:  # fmt: skip
    on_threads(divergences_part, parts, (
        numbers, scale, x, y, values, kept, zero, classes, rows, stride, t_stride,
    ))  # fmt: skip


@kernel
def row_slopes(
    record: Any, x: Any, row: int, y: Any, t_row: int, statistics: Any, known: Any, factor: Any,
    grad: Any, out: int, classes: int,
) -> None:  # fmt: skip
    for c in range(classes):
        p, q, gap = at_class(x, row + c, y, t_row + c, statistics)
        store(grad, out + c, factor * slopes(record, known, p, q, gap))


@kernel
def gradient_part(
    part: int, parts: int, numbers: Any, scale: float, x: Any, y: Any, upstream: Any, kept: Any,
    grad: Any, zero: Any, classes: int, rows: int, stride: int, t_stride: int,
) -> None:  # fmt: skip
    record = read_record(numbers, zero)
    for r in range(part * rows // parts, (part + 1) * rows // parts):
        statistics = statistics_of(kept, r, scale, zero)
        known, factor = load(kept, r * KEPT + 4), load(upstream, r) * scale
        row_slopes(
            record, x, r * stride, y, r * t_stride, statistics, cast(known, zero),
            cast(factor, zero), grad, r * classes, classes,
        )  # fmt: skip


@region
def all_slopes(
    parts: int, numbers: Any, scale: float, x: Any, y: Any, upstream: Any, kept: Any, grad: Any,
    zero: Any, classes: int, rows: int, stride: int, t_stride: int,
) -> None:  # fmt: skip
    on_threads(gradient_part, parts, (
        numbers, scale, x, y, upstream, kept, grad, zero, classes, rows, stride, t_stride,
    ))  # fmt: skip


@functools.cache
def _launcher(loop: Any, operation: type[Divergence], dtype: torch.dtype) -> Launcher:
    name = dtype_name(dtype)
    compute = "float64" if dtype == torch.float64 else "float32"
    logits = pointer(name, 0, compute)  # of one type, for which functions are compiled once
    tensors = [logits, logits, pointer(compute, 1, "float64"), pointer("float64", 2, "float64")]
    if loop is all_slopes:
        tensors.append(pointer(name, 3, compute))
    number = getattr(types, compute)
    values = Values(operation, ())
    return Launcher(loop, values, types.float64, *tensors, number, *[types.intp] * 4)


def _run(
    loop: Any, record: Divergence, x: torch.Tensor, y: torch.Tensor, *tensors: torch.Tensor
) -> None:
    rows, classes = x.shape
    operation: Any = type(record)
    numbers = np.array(record.values, np.float64)
    parts = min(parts_for(rows * classes, GRAIN), max(rows, 1))
    addresses = [t.data_ptr() for t in (x, y, *tensors)]
    _launcher(loop, operation, x.dtype)(
        parts, numbers.ctypes.data, 1.0 / record.temperature, *addresses, 0.0, classes, rows,
        x.stride(0), y.stride(0),
    )  # fmt: skip


def divergences(record: Divergence, student: torch.Tensor, teacher: torch.Tensor) -> Divergences:
    rows, wide = len(student), torch.promote_types(student.dtype, torch.float32)
    values = torch.empty(rows, dtype=wide, device="cpu")
    kept = torch.empty(rows, KEPT, dtype=torch.float64, device="cpu")
    _run(all_divergences, record, student, teacher, values, kept)
    return Divergences(values, kept)


def divergence_gradient(
    record: Divergence, student: torch.Tensor, teacher: torch.Tensor, kept: torch.Tensor,
    grads: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    out = memory.empty(tuple(student.shape), student.dtype)
    _run(all_slopes, record, student, teacher, grads, kept, out)
    return out
