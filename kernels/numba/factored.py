"""An update by the mean squares of a gradient's rows and columns, over all tensors of a bucket.

What is added up is so within a tile of a matrix (tiles.py), in float64, and then over the tiles in
their order: so all sums are the same for any number of threads.

Bytes per element are 24 in float32: gradients are read for the means, for the size of the changes
and for the update, parameters at first and last, where they are written as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core import types

from ..operation import Update
from ..tables import Tables
from .compiler import dtype_name, kernel, optional_pointer, pointer, region, summing_kernel
from .memory import scratch
from .multi_tensor import GRAIN, step_count
from .norm import sum_of_squares
from .pointer import at, load, store
from .pointers import cast_for
from .record import Values, at_step, completed, moved, rate_of, read_record, row_at, update
from .reduction import block_sum
from .team import on_threads
from .threads import Launcher, parts_for
from .tiles import (
    COLUMN_SUMS,
    COLUMNS,
    HEIGHT,
    MATRIX,
    ROW_SUMS,
    ROWS,
    TILE,
    WIDTH,
    entry_of,
    next_tensor,
    shapes_of,
    tile_at,
    tiles_of,
)  # fmt: skip
from .vector_math import cast
from .vocabulary import maximum

__all__ = ["launcher"]


@kernel
def record_of(work: Any, t: int, step: Any, like: Any) -> Any:
    """The numbers of a tensor's update at this step."""
    rows, row_of, _, _, table, tensors, _ = work
    hyper = read_record(row_at(rows, load(row_of, t)), 0.0)
    count = step_count(step, table, (STEP_LINE * tensors) + t)
    return completed(hyper, at_step(hyper, count), like)


# Lines of addresses: the parameter, both factors or the variance, the gradient, the counter.
PARAM_LINE, ROW_LINE, COLUMN_LINE, VARIANCE_LINE, GRAD_LINE, STEP_LINE = range(6)


@kernel
def tensor_of(pointer: Any, table: Any, line: int, tensors: int, t: int) -> Any:
    """A pointer to what a line has of a tensor."""
    return at(pointer, load(table, line * tensors + t))


@kernel
def columns_of(rows: Any, columns: Any, table: Any, tensors: int, t: int) -> Any:
    """A pointer to col_var, or to the variance where there is no row_var."""
    if rows is None:
        return tensor_of(columns, table, VARIANCE_LINE, tensors, t)
    return tensor_of(columns, table, COLUMN_LINE, tensors, t)


# -- the means --------------------------------------------------------------------------------


@summing_kernel
def add_row(grads: Any, begin: int, count: int, scale: float, room: Any, columns: int) -> float:
    """Add a row's squares to the columns' sums; their own sum."""
    total = 0.0
    for j in range(count):
        value = load(grads, begin + j) * scale
        square = value * value
        total += square
        store(room, columns + j, load(room, columns + j) + square)
    return total


@kernel
def clear(room: Any, begin: int, count: int) -> None:
    for j in range(begin, begin + count):
        store(room, j, 0.0)


@kernel
def add(room: Any, begin: int, count: int, into: int) -> None:
    for j in range(count):
        store(room, into + j, load(room, into + j) + load(room, begin + j))


@kernel
def move(record: Any, means: Any, place: int, new: float) -> None:
    store(means, place, moved(record, load(means, place), new))


@kernel
def move_columns(
    record: Any, means: Any, place: int, count: int, room: Any, sums: int, height: int
) -> None:
    for j in range(count):
        move(record, means, place + j, load(room, sums + j) / height)


@kernel
def sum_part(
    part: int, parts: int, work: Any, params: Any, rows: Any, columns: Any, grads: Any, step: Any
) -> None:
    """Sums of each tile; means that are a single tile's."""
    _, _, shapes, offsets, table, tensors, room = work
    first, last, t = tiles_of(part, parts, shapes, offsets, tensors)
    buffer = entry_of(shapes, COLUMN_SUMS, tensors, tensors) + tensors + part * COLUMNS
    for tile in range(first, last):
        t = next_tensor(shapes, tensors, t, tile)
        if load(table, GRAD_LINE * tensors + t) == 0:
            continue
        height, width = entry_of(shapes, HEIGHT, tensors, t), entry_of(shapes, WIDTH, tensors, t)
        matrix, down_at, across_at, down, across = tile_at(shapes, tensors, t, tile)
        param = tensor_of(params, table, PARAM_LINE, tensors, t)
        column_means = columns_of(rows, columns, table, tensors, t)
        grad = tensor_of(grads, table, GRAD_LINE, tensors, t)
        record = record_of(work, t, step, grads)
        left, top = across_at * COLUMNS, matrix * height + down_at * ROWS
        count = min(COLUMNS, width - left)
        bottom = min(top + ROWS, (matrix + 1) * height)
        clear(room, buffer, count)
        squares = 0.0
        for i in range(top, bottom):
            begin = i * width + left
            squares += sum_of_squares(param, begin, begin + count)
            total = add_row(grad, begin, count, record.grad_scale, room, buffer)
            if rows is not None:
                if across == 1:
                    row_means = tensor_of(rows, table, ROW_LINE, tensors, t)
                    move(record, row_means, i, total / width)
                else:
                    sums = entry_of(shapes, ROW_SUMS, tensors, t)
                    store(room, sums + i * across + across_at, total)
        store(room, tile, squares)
        if down == 1:
            move_columns(record, column_means, matrix * width + left, count, room, buffer, height)
        else:
            sums = entry_of(shapes, COLUMN_SUMS, tensors, t)
            sums += (matrix * down + down_at) * width + left
            clear(room, sums, count)
            add(room, buffer, count, sums)


@kernel
def join_part(
    part: int, parts: int, work: Any, params: Any, rows: Any, columns: Any, grads: Any, step: Any
) -> None:
    """Means of what several tiles have parts of, by the first of them."""
    _, _, shapes, offsets, table, tensors, room = work
    first, last, t = tiles_of(part, parts, shapes, offsets, tensors)
    for tile in range(first, last):
        t = next_tensor(shapes, tensors, t, tile)
        if load(table, GRAD_LINE * tensors + t) == 0:
            continue
        height, width = entry_of(shapes, HEIGHT, tensors, t), entry_of(shapes, WIDTH, tensors, t)
        matrix, down_at, across_at, down, across = tile_at(shapes, tensors, t, tile)
        column_means = columns_of(rows, columns, table, tensors, t)
        record = record_of(work, t, step, grads)
        if down_at == 0 and down > 1:
            left = across_at * COLUMNS
            count = min(COLUMNS, width - left)
            sums = entry_of(shapes, COLUMN_SUMS, tensors, t) + matrix * down * width + left
            for k in range(1, down):
                add(room, sums + k * width, count, sums)
            move_columns(record, column_means, matrix * width + left, count, room, sums, height)
        if rows is not None:  # noqa: SIM102 - what is not compiled where it is None
            if across_at == 0 and across > 1:
                row_means = tensor_of(rows, table, ROW_LINE, tensors, t)
                sums = entry_of(shapes, ROW_SUMS, tensors, t)
                top = matrix * height + down_at * ROWS
                for i in range(top, min(top + ROWS, (matrix + 1) * height)):
                    total = block_sum(room, sums + i * across, sums + (i + 1) * across)
                    move(record, row_means, i, total / width)


@kernel
def mean_part(
    part: int, parts: int, work: Any, params: Any, rows: Any, columns: Any, grads: Any, step: Any
) -> None:
    """The mean of each matrix's rows, by its first tile."""
    _, _, shapes, offsets, table, tensors, room = work
    first, last, t = tiles_of(part, parts, shapes, offsets, tensors)
    for tile in range(first, last):
        t = next_tensor(shapes, tensors, t, tile)
        matrix, down_at, across_at, _, _ = tile_at(shapes, tensors, t, tile)
        if load(table, GRAD_LINE * tensors + t) != 0 and down_at == 0 and across_at == 0:  # noqa: SIM102 - as above
            if rows is not None:
                row_means = tensor_of(rows, table, ROW_LINE, tensors, t)
                record = record_of(work, t, step, grads)
                height = entry_of(shapes, HEIGHT, tensors, t)
                mean = block_sum(row_means, matrix * height, (matrix + 1) * height) / height
                place = entry_of(shapes, MATRIX, tensors, t) + matrix
                store(room, place, maximum(mean, record.eps1))


# -- the changes ------------------------------------------------------------------------------


@kernel
def updated(record: Any, param: Any, grad: Any, row: Any, column: Any) -> Any:
    """The parameter's new element."""
    if row is None:
        return update(record, param, grad, None, None, column)[0]
    return update(record, param, grad, row, column, column)[0]


@summing_kernel
def changes_of_row(
    record: Any, grads: Any, begin: int, count: int, row: Any, columns: Any, left: int
) -> float:
    """The sum of squares; the record keeps nothing of a parameter, and has a rate of -1."""
    total = 0.0
    for j in range(count):
        grad = load(grads, begin + j)
        change = np.float64(updated(record, cast(0, grad), grad, row, load(columns, left + j)))
        total += change * change
    return total


@kernel
def update_row(
    record: Any, params: Any, grads: Any, begin: int, count: int, row: Any, columns: Any, left: int
) -> None:
    for j in range(count):
        param, grad = load(params, begin + j), load(grads, begin + j)
        store(params, begin + j, updated(record, param, grad, row, load(columns, left + j)))


@kernel
def change_part(
    part: int, parts: int, work: Any, params: Any, rows: Any, columns: Any, grads: Any, step: Any,
    updates: bool,
) -> None:  # fmt: skip
    """Update each tile, or leave the sum of its changes' squares."""
    hypers, row_of, shapes, offsets, table, tensors, room = work
    first, last, t = tiles_of(part, parts, shapes, offsets, tensors)
    tiles = entry_of(shapes, TILE, tensors, tensors)
    rates = entry_of(shapes, COLUMN_SUMS, tensors, tensors)
    for tile in range(first, last):
        t = next_tensor(shapes, tensors, t, tile)
        if load(table, GRAD_LINE * tensors + t) == 0:
            continue
        height, width = entry_of(shapes, HEIGHT, tensors, t), entry_of(shapes, WIDTH, tensors, t)
        matrix, down_at, across_at, _, _ = tile_at(shapes, tensors, t, tile)
        param = tensor_of(params, table, PARAM_LINE, tensors, t)
        means = columns_of(rows, columns, table, tensors, t)
        grad = tensor_of(grads, table, GRAD_LINE, tensors, t)
        hyper = read_record(row_at(hypers, load(row_of, t)), 0.0)
        count_here = step_count(step, table, STEP_LINE * tensors + t)
        share, rho, kept, rate = at_step(hyper, count_here)
        kept, rate = (kept, load(room, rates + t)) if updates else (0.0, -1.0)
        record = completed(hyper, (share, rho, kept, rate), grads)
        left, top = across_at * COLUMNS, matrix * height + down_at * ROWS
        count = min(COLUMNS, width - left)
        squares = 0.0
        for i in range(top, min(top + ROWS, (matrix + 1) * height)):
            begin, place = i * width + left, matrix * width + left
            row = row_factor(rows, i, shapes, table, tensors, t, matrix, room)
            if updates:
                update_row(record, param, grad, begin, count, row, means, place)
            else:
                squares += changes_of_row(record, grad, begin, count, row, means, place)
        if not updates:
            store(room, tiles + tile, squares)


@kernel
def row_factor(
    rows: Any, i: int, shapes: Any, table: Any, tensors: int, t: int, matrix: int, room: Any
) -> Any:
    """A row's mean by that of its matrix; None where there are no rows."""
    if rows is None:
        return None
    mean = load(room, entry_of(shapes, MATRIX, tensors, t) + matrix)
    row = load(tensor_of(rows, table, ROW_LINE, tensors, t), i)
    return cast(np.float64(row) / mean, row)


@kernel
def set_rates(work: Any, grads: Any, step: Any) -> None:
    """By what each tensor's changes are to be multiplied."""
    _, _, shapes, offsets, table, tensors, room = work
    tiles = entry_of(shapes, TILE, tensors, tensors)
    rates = entry_of(shapes, COLUMN_SUMS, tensors, tensors)
    for t in range(tensors):
        if load(table, GRAD_LINE * tensors + t) == 0:
            continue
        record = record_of(work, t, step, grads)
        count = load(offsets, t + 1) - load(offsets, t)
        first, last = entry_of(shapes, TILE, tensors, t), entry_of(shapes, TILE, tensors, t + 1)
        size = np.sqrt(block_sum(room, first, last) / count)
        change = np.sqrt(block_sum(room, tiles + first, tiles + last) / count)
        store(room, rates + t, rate_of(record, size, change))


@region
def update_factored(
    parts: int, hypers: Any, row_of: Any, shapes: Any, offsets: Any, table: Any, tensors: int,
    room: Any, wide: Any, narrow: Any, step: Any,
) -> None:  # fmt: skip
    """The step. wide: pointers to what sums are of, in float64; narrow: what changes are of."""
    work = (hypers, row_of, shapes, offsets, table, tensors, room)
    on_threads(sum_part, parts, (work, *wide, step))
    on_threads(join_part, parts, (work, *wide, step))
    on_threads(mean_part, parts, (work, *wide, step))
    on_threads(change_part, parts, (work, *narrow, step, False))
    set_rates(work, wide[3], step)
    on_threads(change_part, parts, (work, *narrow, step, True))
    for t in range(tensors):
        if load(table, GRAD_LINE * tensors + t) != 0:
            count = step_count(step, table, STEP_LINE * tensors + t)
            store(at(step, load(table, STEP_LINE * tensors + t)), 0, cast_for(count, step))


@functools.cache
def launcher(
    record: type[Update],
    slots: tuple[torch.dtype | None, ...],
    grad: torch.dtype,
    step: torch.dtype,
) -> Callable[[Tables], Callable[..., None]]:
    """The compiled update for one kind of bucket, to be bound to a bucket's tables.

    Args:
        record: the class of hyperparameters and formulas.
        slots: dtypes of the parameter, of row_var and col_var, and of variance: None for what is
            not in use, which are the former or the latter.
        grad: dtype of the gradients.
        step: dtype of the step counters.
    """
    param, row, column, variance = slots
    assert param is not None
    compute = "float64" if param == torch.float64 else "float32"

    def pointers(compute: str) -> types.Tuple:
        dtypes = param, row, column or variance, grad
        return types.Tuple([optional_pointer(d, k, compute) for k, d in enumerate(dtypes)])

    index = pointer("int64", 7)
    compiled = Launcher(
        update_factored, Values(record, ()), index, index, index, index, types.intp,
        pointer("float64", 4, "float64"), pointers("float64"), pointers(compute),
        pointer(dtype_name(step), 7, dtype_name(step)),
    )  # fmt: skip
    tags = 0, None if row is None else 0, 0, 0

    def bind(tables: Tables) -> Callable[..., None]:
        shapes: np.ndarray | None = None
        size = 0

        def launch(
            params: list[torch.Tensor], grad_scale: torch.Tensor | None,
            found_inf: torch.Tensor | None,
        ) -> None:  # fmt: skip
            nonlocal shapes, size
            if found_inf is not None and found_inf.item():
                return
            if shapes is None:
                shapes, size = shapes_of([p.shape for p in params])
            parts = parts_for(int(tables.offsets[-1]), GRAIN)
            room, kept = scratch(8 * (size + parts * COLUMNS))
            hypers = tables.hypers.copy()
            if grad_scale is not None:
                hypers[:, 0] /= grad_scale.item()  # the first field of every record
            arrays = hypers, tables.row_of, shapes, tables.offsets, tables.addresses
            addresses = [array.ctypes.data for array in arrays]
            compiled(parts, *addresses, len(params), room, tags, tags, 0)
            del kept

        return launch

    return bind
