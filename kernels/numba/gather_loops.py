"""The loops of a gathered loss: forward reads one number a position, backward writes zeros."""

from __future__ import annotations

from typing import Any

from .compiler import kernel, region
from .pointer import load, store
from .reduction import sum_all
from .team import on_threads
from .vector_math import cast

# Positions whose sums are one number for the second stage, whatever the number of threads.
CHUNK = 1024


@kernel
def share_of(weight: Any, label: int) -> float:
    """The class weight of a label that is in range."""
    return 1.0 if weight is None else load(weight, label)


@kernel
def gather_chunk(
    x: Any, target: Any, weight: Any, losses: Any, ignore_index: int, classes: int, inner: int,
    outer_stride: int, inner_stride: int, class_stride: int, begin: int, end: int,
) -> tuple[float, float, int]:  # fmt: skip
    """Of positions begin to end: the sums of losses and weights, and how many labels are wrong."""
    total, mass, wrong = 0.0, 0.0, 0
    row, i = begin // inner * outer_stride, begin % inner
    for r in range(begin, end):
        label, value = load(target, r), 0.0
        if label != ignore_index:
            if 0 <= label < classes:
                share = share_of(weight, label)
                value = -share * load(x, row + i * inner_stride + label * class_stride)
                total += value
                mass += share
            else:
                wrong += 1
        if losses is not None:
            store(losses, r, value)
        i += 1
        if i == inner:
            row, i = row + outer_stride, 0
    return total, mass, wrong


@kernel
def gather_part(
    part: int, parts: int, x: Any, target: Any, weight: Any, losses: Any, totals: Any, masses: Any,
    wrongs: Any, ignore_index: int, classes: int, inner: int, rows: int, outer_stride: int,
    inner_stride: int, class_stride: int,
) -> None:  # fmt: skip
    chunks = (rows + CHUNK - 1) // CHUNK
    for chunk in range(part * chunks // parts, (part + 1) * chunks // parts):
        begin = chunk * CHUNK
        total, mass, wrong = gather_chunk(
            x, target, weight, losses, ignore_index, classes, inner, outer_stride,
            inner_stride, class_stride, begin, min(begin + CHUNK, rows),
        )  # fmt: skip
        store(totals, chunk, total)
        store(masses, chunk, mass)
        store(wrongs, chunk, float(wrong))


@region
def gather_all(
    parts: int, x: Any, target: Any, weight: Any, losses: Any, loss: Any, totals: Any,
    masses: Any, wrongs: Any, found: Any, averages: int, ignore_index: int, classes: int,
    inner: int, rows: int, outer_stride: int, inner_stride: int, class_stride: int,
) -> None:  # fmt: skip
    """found = the summed weight, and the number of wrong labels.

    totals, masses and wrongs are scratch memory, a number a chunk.
    """
    chunks = (rows + CHUNK - 1) // CHUNK
    on_threads(gather_part, parts, (
        x, target, weight, losses, totals, masses, wrongs, ignore_index, classes, inner, rows,
        outer_stride, inner_stride, class_stride,
    ))  # fmt: skip
    mass = sum_all(masses, chunks)
    store(found, 0, mass)
    store(found, 1, sum_all(wrongs, chunks))
    if loss is not None:
        store(loss, 0, sum_all(totals, chunks) / (mass if averages else 1.0))


@kernel
def clear(grad: Any, begin: int, end: int, zero: Any) -> None:
    for i in range(begin, end):
        store(grad, i, zero)


@kernel
def scatter_part(
    part: int, parts: int, target: Any, weight: Any, upstream: Any, grad: Any, wrongs: Any,
    scale: float, divisor: float, ignore_index: int, classes: int, outer: int, inner: int,
    outer_stride: int, inner_stride: int, class_stride: int, width: int,
) -> None:  # fmt: skip
    across = (inner + width - 1) // width
    tiles, factor = outer * across, -scale / divisor
    wrong = 0
    for tile in range(part * tiles // parts, (part + 1) * tiles // parts):
        first, base = tile // across * inner, tile // across * outer_stride
        begin = tile % across * width
        end = min(begin + width, inner)
        if class_stride == 1:
            clear(grad, base + begin * classes, base + end * classes, cast(0, scale))
        else:
            for c in range(classes):
                plane = base + c * class_stride
                clear(grad, plane + begin, plane + end, cast(0, scale))
        for i in range(begin, end):
            label = load(target, first + i)
            if label != ignore_index:
                if 0 <= label < classes:
                    slope = share_of(weight, label) * factor
                    if upstream is not None:
                        slope *= load(upstream, first + i)
                    store(grad, base + i * inner_stride + label * class_stride, slope)
                else:
                    wrong += 1
    store(wrongs, part, float(wrong))


@region
def scatter_all(
    parts: int, target: Any, weight: Any, upstream: Any, grad: Any, wrongs: Any, scale: float,
    divisor: float, ignore_index: int, classes: int, outer: int, inner: int, outer_stride: int,
    inner_stride: int, class_stride: int, width: int,
) -> None:  # fmt: skip
    """The gradient, tile by tile; wrongs = the number of wrong labels of each part."""
    on_threads(scatter_part, parts, (
        target, weight, upstream, grad, wrongs, scale, divisor, ignore_index, classes, outer, inner,
        outer_stride, inner_stride, class_stride, width,
    ))  # fmt: skip
