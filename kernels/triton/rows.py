"""The traversal of a loss over rows: sums over the classes of a row, a value, and its gradient.

A program has some short rows, whole, or one long row tile by tile, twice for its gradient. Bytes
per element in b bytes, for a loss of n columns of which k need a gradient:

=====================  =====================  ==================  ==============
                       forward                backward            together
=====================  =====================  ==================  ==============
gradient in forward    n reads, k writes      none (grad_output   (n + k) b
                                              is 1), else as      (twice that)
                                              many
recomputed             n reads                n reads, k writes   (2n + k) b
=====================  =====================  ==================  ==============

(A row's second reading finds it in registers or in a cache.) The first is chosen, but for
float16: that trains under a GradScaler, whose grad_output is never 1. Whether grad_output is 1 is
seen on the device: a program that finds it so ends.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..operation import Options
from ..reference import loss as torchs
from ..rowwise import Rows, divisor_of, empty_grads, rows_of
from . import reduction
from .compiler import TYPES, as_number, device_function, kernel, launch, number, power_of_2
from .record import constants_of, formula_of, record_numbers
from .vector_math import quotient

# Numbers of a column that a program has at a time: of short rows together, of a row that is longer
# than so many bytes. A thread has 32 bytes of each column at a time; with more, there are GPUs
# whose registers don't suffice.
TILE, LONG_TILE, WHOLE_BYTES = 1024, 2048, 1 << 14
THREADS, BYTES = 128, 32

Tensors = tuple[torch.Tensor | None, ...]


class Tiling(NamedTuple):
    """How rows are divided among programs.

    Attributes:
        rows, columns: of a tile.
        whole: whether a tile has whole rows.
        threads, programs: how many.
    """

    rows: int
    columns: int
    whole: bool
    threads: int
    programs: int


def tiling(rows: Rows) -> Tiling:
    size, columns = rows.compute.itemsize, power_of_2(rows.classes)
    whole = columns * size <= WHOLE_BYTES
    columns = columns if whole else LONG_TILE
    together = max(1, TILE // columns)
    threads = max(THREADS, together * columns * size // BYTES)
    return Tiling(together, columns, whole, threads, -(-rows.number // together))


@device_function
def numbers_at(
    at_class, steps, row, c, mask, within, COLUMNS: tl.constexpr, COMPUTE: tl.constexpr
):  # fmt: skip
    """What operands have at classes c of rows; `within`: those of all rows."""
    numbers = ()
    for k in tl.static_range(len(at_class)):
        if at_class[k] is None:
            numbers = numbers + (1.0,)  # type: ignore[assignment]
        elif k < COLUMNS:
            place = at_class[k] + (row * steps[k] + c)
            found = tl.load(place, mask=mask, other=0.0).to(COMPUTE)
            numbers = numbers + (found,)  # type: ignore[assignment]
        else:
            found = tl.load(at_class[k] + c, mask=within, other=0.0).to(COMPUTE)
            numbers = numbers + (found,)  # type: ignore[assignment]
    return numbers


@device_function
def is_label(label, c):
    """What formulas are told of a class: whether it is the label, if there is one."""
    if label is None:
        return ()
    else:
        return (c == label,)


@device_function
def add_up(sums, h, numbers, of_row, label, c, mask, FOLD: tl.constexpr):
    found = FOLD(h, *(numbers + of_row + is_label(label, c)))
    added = ()
    for k in tl.static_range(len(sums)):
        total = sums[k] + tl.where(mask, found[k], 0.0)
        added = added + (total,)  # type: ignore[assignment]
    return added


@device_function
def store_slopes(
    grads, h, coefficients, numbers, of_row, label, row, c, mask, classes, scale,
    SLOPES: tl.constexpr,
):  # fmt: skip
    found = SLOPES(h, *(coefficients + numbers + of_row + is_label(label, c)))
    for k in tl.static_range(len(grads)):
        if grads[k] is not None:
            tl.store(grads[k] + (row * classes + c), scale * found[k], mask=mask)


@kernel
def row_tiles(
    at_class, steps, by_row, labels, record, values, grads, upstream, grad_output, partials,
    divisor, count, classes, FOLD: tl.constexpr, FINISH: tl.constexpr, SLOPES: tl.constexpr,
    MAKE: tl.constexpr, NAMES: tl.constexpr, FLAGS: tl.constexpr, SUMS: tl.constexpr,
    OPERANDS: tl.constexpr, COMPUTE: tl.constexpr, READY: tl.constexpr, WIDE: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """ROWS rows a program.

    upstream is per row, grad_output one number for all. READY: the gradients are there already,
    if grad_output is 1. steps: of each operand from row to row. OPERANDS: how many are columns.
    """
    scale = tl.full([], 1.0, COMPUTE)
    if grad_output is not None:
        scale = tl.load(grad_output).to(COMPUTE)
        if READY:
            if scale == 1.0:
                return
    if divisor is not None:
        scale = quotient(scale, as_number(divisor, COMPUTE))
    fields = ()
    for k in tl.static_range(len(record)):
        fields = fields + (as_number(record[k], COMPUTE),)  # type: ignore[assignment]
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)[:, None]
    there = row < count
    columns = tl.arange(0, COLUMNS)[None, :]
    of_row = ()
    label = None
    if labels is None:
        for k in tl.static_range(len(by_row)):
            found = tl.load(by_row[k] + row, mask=there, other=0.0).to(COMPUTE)
            of_row = of_row + (found,)  # type: ignore[assignment]
    else:
        label = tl.load(labels + row, mask=there, other=0)
        valid = (label >= 0) & (label < classes)
        tl.device_assert(valid, "Target is out of bounds")
        # Where asserts are not compiled, at least no access out of bounds.
        label = tl.where(valid, label, 0)
        of_row = numbers_at(at_class, steps, row, label, there, there, OPERANDS, COMPUTE)
    sums = ()
    for _k in tl.static_range(SUMS):
        sums = sums + (tl.zeros([ROWS, COLUMNS], COMPUTE),)  # type: ignore[assignment]
    within = columns < classes
    numbers = ()
    if WHOLE:
        mask = there & within
        numbers = numbers_at(at_class, steps, row, columns, mask, within, OPERANDS, COMPUTE)
        sums = add_up(sums, MAKE(fields, FLAGS), numbers, of_row, label, columns, mask, FOLD)
    else:
        for begin in range(0, classes, COLUMNS):
            c = begin + columns
            mask = there & (c < classes)
            tile = numbers_at(at_class, steps, row, c, mask, c < classes, OPERANDS, COMPUTE)
            sums = add_up(sums, MAKE(fields, FLAGS), tile, of_row, label, c, mask, FOLD)
    totals = ()
    for k in tl.static_range(SUMS):
        totals = totals + (tl.sum(sums[k], 1, keep_dims=True),)  # type: ignore[assignment]
    size = (tl.full([ROWS, 1], classes, COMPUTE),)
    found = FINISH(MAKE(fields, FLAGS), *(size + totals + of_row))
    if values is not None:
        tl.store(values + row, found[0], mask=there)
    if partials is not None:
        tl.store(partials + program, tl.sum(tl.where(there, found[0], 0.0)))
    if upstream is not None:
        scale = scale * tl.load(upstream + row, mask=there, other=0.0).to(COMPUTE)
    if len(grads) > 0:
        if WHOLE:
            store_slopes(
                grads, MAKE(fields, FLAGS), found[1:], numbers, of_row, label, row, columns,
                there & within, classes, scale, SLOPES,
            )  # fmt: skip
        else:
            for begin in range(0, classes, COLUMNS):
                c = begin + columns
                mask = there & (c < classes)
                tile = numbers_at(at_class, steps, row, c, mask, c < classes, OPERANDS, COMPUTE)
                store_slopes(
                    grads, MAKE(fields, FLAGS), found[1:], tile, of_row, label, row, c, mask,
                    classes, scale, SLOPES,
                )  # fmt: skip


def _run(
    options: Options,
    tensors: Tensors,
    rows: Rows,
    divisor: float | None,
    grads: Tensors = (),
    values: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    ready: bool = False,
) -> None:
    """Launch.

    Raises:
        RuntimeError: in the interpreter, torch's of a label out of bounds.
    """
    record: Any = options.record
    operation: Any = type(record)
    first = next(t for t in rows.at_class if t is not None)
    if rows.label is not None and rows.label.is_cpu and rows.number:
        if rows.label.min() < 0 or rows.label.max() >= rows.classes:
            torchs(options, tensors)
    cut = tiling(rows)
    wide = (rows.number + cut.rows) * max(rows.classes, *rows.steps) + cut.columns >= 2**31
    launch(
        row_tiles, (cut.programs,), first.device, cut.threads, rows.at_class, rows.steps,
        rows.of_row, rows.label, record_numbers(record, rows.compute), values,
        grads[: len(record.columns)], upstream, grad_output, partials,
        None if divisor is None else number(divisor, rows.compute), rows.number, rows.classes,
        SUMS=record.sums, OPERANDS=len(record.columns), COMPUTE=TYPES[rows.compute], READY=ready,
        WIDE=wide, WHOLE=cut.whole, ROWS=cut.rows, COLUMNS=cut.columns,
        **{name.upper(): formula_of(operation, name) for name in record.formulas},
        **constants_of(record),
    )  # fmt: skip


def _recomputes(options: Options, tensors: Tensors) -> bool:
    """Whether the gradients are left to the backward pass."""
    first = tensors[0]
    assert first is not None
    unknown = options.reduction == "none" or options.grad_output is None
    return unknown or first.dtype == torch.float16


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, tuple[()]]:
    """The loss, and its gradients for a grad_output of 1 or None."""
    operation: Any = type(options.record)
    rows, empty = rows_of(operation, tensors), reduction.empty_on(tensors)
    if options.reduction == "none":
        values = empty(tuple(rows.shape), options.dtype)
        _run(options, tensors, rows, None, values=values)
        return values, None, ()
    grads = None
    if any(needs) and not _recomputes(options, tensors):
        grads = empty_grads(operation, tensors, needs, empty)
    partials = empty((tiling(rows).programs,), rows.compute)
    divisor = divisor_of(options, rows)
    _run(options, tensors, rows, divisor, grads or (), partials=partials)
    return reduction.reduce(partials, options.dtype, divisor=divisor), grads, ()


def backward(
    options: Options,
    tensors: Tensors,
    grads: Tensors | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output; those for 1 stay as they are."""
    operation: Any = type(options.record)
    rows, ready = rows_of(operation, tensors), grads is not None
    found = grads or empty_grads(operation, tensors, needs, reduction.empty_on(tensors))
    if options.reduction == "none":
        upstream = grad_output.contiguous()
        _run(options, tensors, rows, None, found, upstream=upstream)
    else:
        divisor = divisor_of(options, rows)
        _run(options, tensors, rows, divisor, found, grad_output=grad_output, ready=ready)
    return found


def describe(options: Options, tensors: Tensors) -> str:
    """How a call runs, in words."""
    operation: Any = type(options.record)
    cut = tiling(rows_of(operation, tensors))
    size = f"{cut.rows:,} rows" if cut.whole else f"a row in tiles of {cut.columns:,} classes"
    when = "recomputed in backward" if _recomputes(options, tensors) else "in the forward pass"
    return f"rows, {cut.programs:,} programs of {size}, {cut.threads} threads; gradient {when}"
