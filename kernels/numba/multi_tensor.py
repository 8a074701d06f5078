"""One optimizer update over all tensors of a bucket, in one parallel region.

The tensors' elements count as one flat range, split evenly over the threads: a thread
finds its first tensor by bisection and walks on from there, so many small tensors and
one huge one are the same case and need no table of chunks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import overload

from ..operation import Update
from ..rounding import NEAREST, STOCHASTIC
from ..tables import Averaged, Launch, Tables
from .compiler import DRAFT_OPTIONS, dtype_name, kernel, pointer, region
from .pointer import at, load, prefetch, store
from .pointers import as_stored, at_each, cast_for, load_each, store_each
from .record import Values, at_step, completed, next_numbers, read_record, row_at, update
from .rounding import key_at, load_whole, rounds, store_rounded
from .team import on_threads
from .threads import Launcher, parts_for
from .tuples import cast_each, zeros_for

# Elements per thread below which a second thread does not pay: some 100 µs of work in a training
# step, whose model has emptied the caches (28 bytes an element of Adam, 1.5 ns from memory). To
# start a region takes 2 µs, but it ends with the last of its threads: where another process has
# that one's core, a step of fewer elements would wait for milliseconds to gain microseconds.
GRAIN = 65_536
# Parts begin on multiples of this, so that no two threads write to one cache line.
ALIGN = 64
# How many tensors before their turn the first bytes of what is theirs are fetched: many small ones
# lie anywhere in memory, and a training step's model has emptied the caches.
AHEAD = 4
# Elements that are updated before their average is: they are in the nearest cache then. In one loop
# a compiler would join other products with sums than in a loop of the update alone, and the
# parameters would have other bits.
BLOCK = 1024


@kernel
def update_span(record: Any, slots: Any, grads: Any, key: Any, begin: int, end: int) -> None:
    """Update elements begin to end of one tensor."""
    for i in range(begin, end):
        values = load_each(slots, i)
        new = update(record, values[0], load(grads, i), *values[1:])
        store_each(slots, i, new)


@kernel
def update_span_rounded(
    record: Any, slots: Any, grads: Any, key: Any, begin: int, end: int
) -> None:
    """The same where some slots are stored otherwise than to nearest.

    key: of the random numbers in this step; empty where none are drawn.
    """
    for i in range(begin, end):
        values = load_whole(slots, i)
        new = update(record, values[0], load(grads, i), *values[1:])
        store_rounded(slots, i, key, new)


def update_and_average(
    record: Any, rule: Any, slots: Any, averages: Any, grads: Any, key: Any, begin: int, end: int
) -> None:
    """The same, and a rule's update of their average, if there is one, by the new parameter."""
    raise NotImplementedError


@overload(update_and_average, strict=False, jit_options=DRAFT_OPTIONS)
def _update_and_average(
    record: Any, rule: Any, slots: Any, averages: Any, grads: Any, key: Any, begin: int, end: int
) -> Any:
    span = update_span_rounded if rounds(slots) else update_span

    def alone(
        record: Any, rule: Any, slots: Any, averages: Any, grads: Any, key: Any,
        begin: int, end: int,
    ) -> None:  # fmt: skip
        span(record, slots, grads, key, begin, end)

    def by_turns(
        record: Any, rule: Any, slots: Any, averages: Any, grads: Any, key: Any,
        begin: int, end: int,
    ) -> None:  # fmt: skip
        averaging = record_at(rule, 0, 1.0, (), averages[0])
        while begin < end:
            stop = min(begin + BLOCK, end)
            span(record, slots, grads, key, begin, stop)
            update_span(averaging, averages, slots[0], (), begin, stop)
            begin = stop

    return by_turns if len(averages) else alone


@kernel
def record_at(rows: Any, row: int, count: float, numbers: Any, like: Any) -> Any:
    """What `update` needs of a row of hyperparameters in the step of that count.

    numbers: the states that are one, before the step and after it.
    """
    hyper = read_record(row_at(rows, row), 0.0)
    return completed(hyper, at_step(hyper, count, *cast_each(numbers, 0.0)), like)


@kernel
def numbers_after(rows: Any, row: int, count: float, scalars: Any, numbers: Any, step: Any) -> Any:
    """What the states that are one number are after a step."""
    hyper = read_record(row_at(rows, row), 0.0)
    return as_stored(scalars, next_numbers(hyper, cast_for(count, step), *numbers))


@kernel
def numbers_at(scalars: Any, table: Any, position: int, tensors: int) -> Any:
    """The states that are one number; position: of the first one's address in the table."""
    return load_each(at_each(scalars, table, tensors, position), 0)


@kernel
def step_count(step: Any, table: Any, position: int) -> float:
    """The step that this update is; 0 where the optimizer does not count."""
    if step is None:
        return 0.0
    return np.float64(load(at(step, load(table, position)), 0)) + 1.0


@kernel
def fetch_tensors(table: Any, lines: int, tensors: int, t: int) -> None:
    """Have the first bytes of all tensors in a column of the table fetched."""
    if t < tensors:
        for line in range(lines):
            prefetch(at(table, load(table, line * tensors + t)), 0)


@kernel
def update_part(
    part: int, parts: int, rows: Any, row_of: Any, offsets: Any, table: Any, tensors: int,
    slots: Any, averages: Any, scalars: Any, grads: Any, step: Any, rule: Any, streams: Any,
) -> None:  # fmt: skip
    total = load(offsets, tensors)
    begin = part * total // parts // ALIGN * ALIGN
    end = total if part + 1 == parts else (part + 1) * total // parts // ALIGN * ALIGN
    t, high = 0, tensors  # offsets[t] <= begin < offsets[high]
    while high - t > 1:
        middle = (t + high) // 2
        if load(offsets, middle) <= begin:
            t = middle
        else:
            high = middle
    first = len(slots) + len(averages)  # the line of the first number, and behind them those
    lines = first + len(scalars)  # of the gradients and of the counters
    row, count = -1, -1.0
    numbers = zeros_for(scalars)
    record = record_at(rows, 0, 1.0, numbers + numbers, grads)
    while begin < end:
        start = load(offsets, t)
        stop = min(load(offsets, t + 1), end)
        if stop > begin:
            fetch_tensors(table, lines + 2, tensors, t + AHEAD)
            count_here = step_count(step, table, (lines + 1) * tensors + t)
            row_here = load(row_of, t)
            numbers_here = numbers_at(scalars, table, first * tensors + t, tensors)
            # A power costs as much as 100 elements.
            if row_here != row or count_here != count or numbers_here != numbers:
                row, count, numbers = row_here, count_here, numbers_here
                after = numbers_after(rows, row, count, scalars, numbers, step)
                record = record_at(rows, row, count, numbers + after, grads)
            here = at_each(slots, table, tensors, t)
            averages_here = at_each(averages, table, tensors, len(slots) * tensors + t)
            grads_here = at(grads, load(table, lines * tensors + t))
            key = key_at(streams, t, count)
            update_and_average(
                record, rule, here, averages_here, grads_here, key, begin - start, stop - start
            )
            begin = stop
        t += 1


@kernel
def count_step(
    rows: Any, row_of: Any, table: Any, tensors: int, first: int, scalars: Any, step: Any
) -> None:
    """Bring the counters, and the states that are one number, to where they are after the step.

    first: the line of the first number.
    """
    lines = first + len(scalars)
    row, count = -1, -1.0
    numbers = new = zeros_for(scalars)
    for t in range(tensors):
        if load(table, lines * tensors + t) == 0:  # it has no gradient
            continue
        place = first * tensors + t
        count_here, row_here = step_count(step, table, (lines + 1) * tensors + t), load(row_of, t)
        numbers_here = numbers_at(scalars, table, place, tensors)
        if row_here != row or count_here != count or numbers_here != numbers:
            row, count, numbers = row_here, count_here, numbers_here
            new = numbers_after(rows, row, count, scalars, numbers, step)
        store_each(at_each(scalars, table, tensors, place), 0, new)
        counter = at(step, load(table, (lines + 1) * tensors + t))
        store(counter, 0, cast_for(count, step))


@region
def update_all(
    parts: int, rows: Any, row_of: Any, offsets: Any, table: Any, tensors: int,
    slots: Any, averages: Any, scalars: Any, grads: Any, step: Any, rule: Any, streams: Any,
) -> None:  # fmt: skip
    on_threads(
        update_part, parts,
        (
            rows, row_of, offsets, table, tensors, slots, averages, scalars, grads, step, rule,
            streams,
        ),
    )  # fmt: skip
    if step is not None:
        first = len(slots) + len(averages)
        count_step(rows, row_of, table, tensors, first, scalars, step)


def _own_dtype(dtype: torch.dtype) -> str:
    """What numbers of a dtype are computed in."""
    return "float64" if dtype == torch.float64 else "float32"


@functools.lru_cache(1024)  # of a user's rule each version is another one
def launcher(
    record: type[Update],
    slots: tuple[torch.dtype | None, ...],
    scalars: tuple[torch.dtype, ...],
    grad: torch.dtype,
    step: torch.dtype | None,
    averaged: Averaged | None = None,
    rounding: tuple[str, ...] | None = None,
) -> Callable[[Tables], Launch]:
    """The compiled update for one kind of bucket, to be bound to a bucket's tables.

    Args:
        record: the class of hyperparameters and formulas.
        slots: dtypes of the parameter and of each state, None for an unused state.
        scalars: dtypes of the states that are one number.
        grad: dtype of the gradients.
        step: dtype of the step counters, or None.
        averaged: the parameters' averages, if the step has them.
        rounding: how each slot is stored (kernels/rounding.py); None if all are to nearest.
    """
    assert slots[0] is not None
    compute = _own_dtype(slots[0])
    stored = rounding or (NEAREST,) * len(slots)
    slot_types = [
        types.none if d is None else pointer(dtype_name(d), k, compute, rounding=stored[k])
        for k, d in enumerate(slots)
    ]
    drawn = STOCHASTIC in stored
    averages = [] if averaged is None else [
        pointer(dtype_name(averaged.dtype), len(slots), compute)
    ]  # fmt: skip
    index = pointer("int64", 7)
    compiled = Launcher(
        update_all,
        Values(record, ()),
        index,
        index,
        index,
        types.intp,
        types.Tuple(slot_types),
        types.Tuple(averages),
        types.Tuple([pointer(dtype_name(d), 7, _own_dtype(d)) for d in scalars]),
        pointer(dtype_name(grad), len(slots) + len(averages), compute),
        types.none if step is None else pointer(dtype_name(step), 7, dtype_name(step)),
        types.none if averaged is None else Values(averaged.record, ()),
        index if drawn else types.none,
    )
    tag = (
        tuple(None if d is None else 0 for d in slots),
        (0,) * len(averages),
        (0,) * len(scalars),
        0,
        None if step is None else 0,
    )

    def bind(tables: Tables) -> Launch:
        arrays = (tables.hypers, tables.row_of, tables.offsets, tables.addresses)
        addresses = [array.ctypes.data for array in arrays]
        numbers = np.zeros(0 if averaged is None else len(averaged.record.numbers))
        rule = None if averaged is None else numbers.ctypes.data
        streams = None if tables.streams is None else tables.streams.ctypes.data
        arguments = (*addresses, len(tables.row_of), *tag, rule, streams)

        def update(grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
            if found_inf is not None and found_inf.item():
                return
            elements = int(tables.offsets[-1])
            if tables.rule is not None:
                numbers[:] = [float(number) for number in tables.rule]
            if grad_scale is None:
                compiled(parts_for(elements, GRAIN), *arguments)
                return
            scales = tables.hypers[:, 0].copy()  # the first field of every record
            tables.hypers[:, 0] /= grad_scale.item()
            try:
                compiled(parts_for(elements, GRAIN), *arguments)
            finally:
                tables.hypers[:, 0] = scales

        return update

    return bind
