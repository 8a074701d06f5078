"""The traversal of a loss over rows: sums over the classes of a row, a value, and its gradient.

A row is read twice while it is in the cache, once for the sums and once for the gradient. What
is not wanted is None, and not compiled.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from ..operation import Options, Rowwise
from ..reference import loss as torchs
from ..rowwise import Rows, divisor_of, empty_grads, rows_of
from . import memory
from .bound import Forward, bind_loop
from .compiler import dtype_name, kernel, loop, summing_kernel
from .forms import Loop, address_in, dtypes_of, opened, sums_up
from .labels import is_label, label_of, numbers_of_row
from .pointers import load_each_or_one, moved, store_each, store_products
from .record import Values, finish, fold, slopes
from .target import widest_vectors
from .threads import parts_for
from .tuples import added, cast_each, zeros

# Classes summed in the compute dtype before the sums move to float64; rows of so many classes
# together have one sum. Neither depends on the number of threads, so the result doesn't, either.
CHUNK = 512
GRAIN = 32_768

Tensors = tuple[torch.Tensor | None, ...]


@summing_kernel
def chunk_sums(
    record: Any, at_class: Any, of_row: Any, label: Any, like: Any, begin: int, end: int
) -> Any:
    """What the formula sums, over the classes begin to end of a row."""
    widest_vectors()
    totals = zeros(record, like)
    for c in range(begin, end):
        numbers = load_each_or_one(at_class, c, like) + of_row + is_label(label, c)
        totals = added(totals, fold(record, *numbers))
    return totals


@kernel
def row_slopes(
    record: Any, coefficients: Any, at_class: Any, of_row: Any, label: Any, grads: Any,
    factor: Any, out: int, classes: int,
) -> None:  # fmt: skip
    """The gradients at the classes of a row; the first one's is `out` further."""
    widest_vectors()
    for c in range(classes):
        numbers = load_each_or_one(at_class, c, factor) + of_row + is_label(label, c)
        found = slopes(record, *(coefficients + numbers))
        store_products(grads, out + c, found, factor)


@kernel
def one_row(
    record: Any, exact: Any, at_class: Any, of_row: Any, label: Any, grads: Any, factor: Any,
    row: int, classes: int,
) -> float:  # fmt: skip
    """The value of a row. exact: the record in float64."""
    totals = zeros(record, 0.0)
    for begin in range(0, classes, CHUNK):
        end = min(begin + CHUNK, classes)
        found = chunk_sums(record, at_class, of_row, label, factor, begin, end)
        totals = added(totals, found)
    size = (np.float64(classes),)
    outcome = finish(exact, *(size + totals + of_row))
    coefficients = cast_each(outcome[1:], factor)
    row_slopes(record, coefficients, at_class, of_row, label, grads, factor, row * classes, classes)
    return np.float64(outcome[0])


@loop
def rows_run(form: Any, scale: float, first: int, last: int) -> float:
    """Rows first to last: their values and gradients, if wanted, and the sum of the values.

    `wrong` becomes 1 if a label is out of bounds.
    """
    widest_vectors()
    record, exact, groups, (classes,), number = opened(form, scale)
    at_class, by_row, (labels,), values, grads, upstream, (steps, wrong) = groups
    total = 0.0
    for row in range(first, last):
        here = moved(at_class, steps, row, 0)
        factor = number * load_each_or_one(upstream, row, number)[0]
        label = label_of(labels, row, classes, wrong)
        of_row = numbers_of_row(by_row, here, label, row, number)
        value = one_row(record, exact, here, of_row, label, grads, factor, row, classes)
        store_each(values, row, (value,))
        total += value
    return total if sums_up(form) else 0.0


@functools.cache
def _loop(
    operation: type[Rowwise],
    flags: tuple[int, ...],
    compute: str,
    at_class: tuple[torch.dtype | None, ...],
    by_row: tuple[torch.dtype | None, ...],
    grads: tuple[torch.dtype | None, ...],
    values: torch.dtype | None,
    upstream: torch.dtype | None,
    loss: torch.dtype | None,
) -> Loop:
    label = None if operation.label is None else torch.int64
    exact = None if values is None else (values, "float64", False)
    groups = (
        at_class, by_row, (label,), (exact,), grads, (upstream,), (torch.int64, torch.int64),
    )  # fmt: skip
    return Loop(rows_run, Values(operation, flags), compute, groups, 1, loss)


def _arrays(record: Any, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The record's numbers, and the steps of what has a number at each class."""
    steps = np.array([(step, 0) for step in rows.steps], np.int64)
    return np.array(record.values, np.float64), steps


def _group(rows: Rows) -> int:
    """Rows that have one sum."""
    return max(1, CHUNK // rows.classes)


def _parts(rows: Rows) -> int:
    return min(parts_for(rows.number * rows.classes, GRAIN), max(rows.number, 1))


def _run(
    options: Options,
    tensors: Tensors,
    rows: Rows,
    divisor: float,
    scale: float,
    grads: Tensors = (),
    values: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
) -> None:
    """Launch. The gradients are `scale` times the slopes, and upstream's elements, if given.

    Raises:
        RuntimeError: torch's, of a label out of bounds.
    """
    record: Any = options.record
    operation: Any = type(record)
    grads = grads[: len(record.columns)]
    compiled = _loop(
        operation,
        record.settings,
        dtype_name(rows.compute),
        *[dtypes_of(each) for each in (rows.at_class, rows.of_row, grads)],
        *dtypes_of((values, upstream, loss)),
    )
    numbers, steps = _arrays(record, rows)
    wrong, group = np.zeros(1, np.int64), _group(rows)
    sums, kept = None, None
    if loss is not None:
        sums, kept = memory.scratch(8 * -(-rows.number // group))
    words = [
        numbers.ctypes.data, *map(address_in, rows.at_class), *map(address_in, rows.of_row),
        address_in(rows.label), address_in(values), *map(address_in, grads), address_in(upstream),
        steps.ctypes.data, wrong.ctypes.data, rows.classes,
    ]  # fmt: skip
    loss_at = address_in(loss)
    compiled(_parts(rows), words, scale, sums, loss_at, divisor, rows.number, group)
    del kept
    if wrong[0]:
        torchs(options, tensors)
        raise RuntimeError("target out of range")  # there was one, but no more


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, tuple[()]]:
    """The loss, and its gradients for the grad_output expected; None if there is none."""
    operation: Any = type(options.record)
    rows = rows_of(operation, tensors)
    if options.reduction == "none":
        values = memory.empty(tuple(rows.shape), options.dtype)
        _run(options, tensors, rows, 1.0, 1.0, values=values)
        return values, None, ()
    divisor, expected = divisor_of(options, rows), options.grad_output
    loss = memory.empty_number(options.dtype)
    if expected is None or not any(needs):
        _run(options, tensors, rows, divisor, 0.0, loss=loss)
        return loss, None, ()
    grads = empty_grads(operation, tensors, needs, memory.empty)
    _run(options, tensors, rows, divisor, expected / divisor, grads, loss=loss)
    return loss, grads, ()


def bind(options: Options, tensors: Any, needs: tuple[bool, ...]) -> Forward | None:
    """`forward` for calls like this one, if all that differs between them are addresses."""
    record: Any = options.record
    operation: Any = type(record)
    named = dict(zip(operation.operands, tensors, strict=True))
    numbers = [t for name, t in named.items() if t is not None and name != operation.label]
    if (
        options.reduction == "none"
        or not all(t is None or t.is_contiguous() for t in tensors)
        or not all(t.is_floating_point() for t in numbers)
    ):
        return None
    rows = rows_of(operation, tensors)
    if not rows.number:
        return None
    names = (*operation.columns, *operation.by_class, *operation.by_row, operation.label)
    order = [operation.operands.index(n) for n in names if named.get(n) is not None]
    columns = operation.operands[: len(operation.columns)]
    followed = [k for k, name in enumerate(columns) if needs[k] and named[name] is not None]
    grads = tuple([named[name].dtype if k in followed else None for k, name in enumerate(columns)])
    loop = _loop(
        operation, record.settings, dtype_name(rows.compute),
        *[dtypes_of(each) for each in (rows.at_class, rows.of_row)], grads, None, None,
        options.dtype,
    )  # fmt: skip
    values, steps = _arrays(record, rows)
    return bind_loop(
        loop, tensors, order, followed,
        (values.ctypes.data, (steps.ctypes.data, rows.classes)), options.dtype,
        divisor_of(options, rows), 1.0, _parts(rows), (rows.number, _group(rows)),
        (values, steps), labelled=True,
    )  # fmt: skip


def backward(
    options: Options,
    tensors: Tensors,
    grads: Tensors | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output, computed anew from the operands."""
    operation: Any = type(options.record)
    rows = rows_of(operation, tensors)
    found = empty_grads(operation, tensors, needs, memory.empty)
    if options.reduction == "none":
        _run(options, tensors, rows, 1.0, 1.0, found, upstream=grad_output.contiguous())
    else:
        scale = grad_output.item() / divisor_of(options, rows)
        _run(options, tensors, rows, 1.0, scale, found)
    return found
