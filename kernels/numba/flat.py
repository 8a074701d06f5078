"""The flat traversal of a loss: any number of operands, and results of their common shape.

One pass reads each operand once and writes whatever is wanted: the values, their sum, the
gradients. What is not wanted is None, and not compiled.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba.core import types

from ..broadcast import Walk, walk
from ..elementwise import (
    compute_dtype,
    divisor_of,
    empty_grads,
    empty_like_walk,
    mass_of,
    numbers_of,
    to_operands,
)
from ..operation import Elementwise, Options
from . import memory
from .compiler import dtype_name, kernel, optional_pointer, pointer, region, summing_kernel
from .pointer import load, store
from .pointers import load_each_or_one, moved, store_products
from .record import Values, read_record, value_and_slopes
from .reduction import sum_all
from .target import widest_vectors
from .team import on_threads
from .threads import Launcher, parts_for
from .vector_math import cast

# Elements summed in the compute dtype before the sum moves to float64. Chunks are the
# same for any number of threads, and so is the result, to the bit.
CHUNK = 512
# Elements a thread, below which a second one does not pay: some 50 to 100 µs of work (12 to 16
# bytes an element, from memory). A region waits for the last of its threads, and where another
# process has that one's core, for milliseconds.
GRAIN = 65_536

Tensors = tuple[torch.Tensor | None, ...]


@summing_kernel
def chunk_sum(
    record: Any, operands: Any, values: Any, grads: Any, upstream: Any, scale: Any, out: int,
    begin: int, end: int,
) -> float:  # fmt: skip
    """The sum of the values of the elements begin to end; the results' ones are `out` further."""
    widest_vectors()
    total = cast(0, scale)
    for i in range(begin, end):
        found = value_and_slopes(record, *load_each_or_one(operands, i, scale))
        value = found[0]
        total += value
        if values is not None:
            store(values, out + i, value)
        factor = scale
        if upstream is not None:
            factor = scale * load(upstream, out + i)
        store_products(grads, out + i, found[1:], factor)
    return np.float64(total)


@kernel
def flat_part(
    part: int, parts: int, numbers: Any, operands: Any, steps: Any, values: Any, grads: Any,
    upstream: Any, sums: Any, scale: Any, count: int, second: int, inner: int, group: int,
) -> None:  # fmt: skip
    widest_vectors()
    record = read_record(numbers, scale)
    each = (inner + CHUNK - 1) // CHUNK
    chunks = (count + inner - 1) // max(inner, 1) * each
    groups = (chunks + group - 1) // group
    for g in range(part * groups // parts, (part + 1) * groups // parts):
        total = 0.0
        for chunk in range(g * group, min((g + 1) * group, chunks)):
            block, begin = chunk // each, chunk % each * CHUNK
            here = moved(operands, steps, block // second, block % second)
            total += chunk_sum(
                record, here, values, grads, upstream, scale, block * inner, begin,
                min(begin + CHUNK, inner, count - block * inner),
            )  # fmt: skip
        if sums is not None:
            store(sums, g, total)


@region
def flat_all(
    parts: int, numbers: Any, operands: Any, steps: Any, values: Any, grads: Any, upstream: Any,
    sums: Any, loss: Any, scale: Any, divisor: float, count: int, second: int, inner: int,
    group: int,
) -> None:  # fmt: skip
    """loss = the sum of the values / divisor. sums is scratch memory, a number a group."""
    on_threads(flat_part, parts, (
        numbers, operands, steps, values, grads, upstream, sums, scale, count, second, inner, group,
    ))  # fmt: skip
    if sums is not None:
        chunks = (count + inner - 1) // max(inner, 1) * ((inner + CHUNK - 1) // CHUNK)
        store(loss, 0, sum_all(sums, (chunks + group - 1) // group) / divisor)


class _Schedule(NamedTuple):
    """What is the same for all launches of one kind.

    Attributes:
        launch: the loop, compiled for the kind.
        numbers, steps: the addresses of the record's numbers and of the operands' steps.
        group: chunks whose sums are added up by one thread.
        bytes: of scratch memory.
        kept: what has to live as long.
    """

    launch: Launcher
    numbers: int
    steps: int
    group: int
    bytes: int
    kept: Any


@functools.lru_cache(1024)
def _schedule(
    record: Elementwise, place: Walk, operands: tuple[torch.dtype | None, ...],
    grads: tuple[torch.dtype | None, ...], values: torch.dtype | None,
    upstream: torch.dtype | None, loss: torch.dtype | None,
) -> _Schedule:  # fmt: skip
    """The dtypes are those of the tensors that there are."""
    numbers = np.array(record.values, np.float64)
    steps = np.array([step[:2] for step in place.steps], np.int64)
    fixed = tuple(step[2] == 0 for step in place.steps)
    kind: Any = type(record)
    launch = _launcher(kind, record.settings, operands, fixed, grads, values, upstream, loss)
    group = max(1, CHUNK // max(place.inner, 1))
    chunks = -(-place.places // max(place.inner, 1)) * -(-place.inner // CHUNK)
    addresses = numbers.ctypes.data, steps.ctypes.data
    return _Schedule(launch, *addresses, group, 8 * -(-chunks // group), (numbers, steps))


@functools.cache
def _launcher(
    operation: type[Elementwise], flags: tuple[int, ...],
    operands: tuple[torch.dtype | None, ...], fixed: tuple[bool, ...],
    grads: tuple[torch.dtype | None, ...], values: torch.dtype | None,
    upstream: torch.dtype | None, loss: torch.dtype | None,
) -> Launcher:  # fmt: skip
    """fixed: of which operands a block has but one number."""
    compute = "float64" if torch.float64 in operands else "float32"
    slots = itertools.count(1)
    read = [
        types.none if d is None else pointer(dtype_name(d), next(slots), compute, one)
        for d, one in zip(operands, fixed, strict=True)
    ]
    written = [optional_pointer(d, next(slots), compute) for d in grads]
    sums = None if loss is None else torch.float64
    return Launcher(
        flat_all,
        Values(operation, flags),
        types.Tuple(read),
        pointer("int64", 0),
        optional_pointer(values, next(slots), compute),
        types.Tuple(written),
        optional_pointer(upstream, next(slots), compute),
        optional_pointer(sums, next(slots), "float64"),
        optional_pointer(loss, next(slots), "float64"),
        getattr(types, compute),
        types.float64,
        *[types.intp] * 4,
    )


def _run(
    options: Options,
    operands: Tensors,
    place: Walk,
    divisor: float,
    scale: float,
    grads: Tensors = (),
    values: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    loss: torch.Tensor | None = None,
) -> None:
    """Launch. The gradients are `scale` times the slopes, and upstream's elements, if given."""
    record: Any = options.record
    schedule = _schedule(
        record, place, _dtypes(operands), _dtypes(grads), *_dtypes((values, upstream, loss))
    )
    sums, kept = (None, None) if loss is None else memory.scratch(schedule.bytes)
    schedule.launch(
        parts_for(place.places, GRAIN), schedule.numbers, tuple(map(_address, operands)),
        schedule.steps, _address(values), tuple(map(_address, grads)), _address(upstream), sums,
        _address(loss), scale * record.factor, divisor, place.places, place.second, place.inner,
        schedule.group,
    )  # fmt: skip
    del kept


def _dtypes(tensors: Tensors) -> tuple[torch.dtype | None, ...]:
    return tuple([None if t is None else t.dtype for t in tensors])


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _divisor(options: Options, tensors: Tensors, place: Walk) -> float:
    mass = mass_of(options, tensors)
    if mass is not None:
        total = mass.sum(dtype=compute_dtype(tensors)).item()
        return math.nan if total == 0 else total
    divisor = divisor_of(options, tensors, place)
    assert divisor is not None
    return divisor


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, tuple[()]]:
    """The loss, and its gradients for the grad_output expected; None if there is none."""
    operands, place = walk(numbers_of(tensors))
    if options.reduction == "none":
        values = empty_like_walk(operands, options.dtype, place, memory.empty)
        _run(options, operands, place, 1.0, 1.0, values=values)
        return values, None, ()
    divisor = _divisor(options, tensors, place)
    loss = torch.empty((), dtype=options.dtype, device="cpu")
    expected = options.grad_output
    if expected is None or not any(needs):
        _run(options, operands, place, divisor, 0.0, loss=loss)
        return loss, None, ()
    grads = empty_grads(options.record, operands, needs, place, memory.empty)
    _run(options, operands, place, divisor, expected / divisor, grads, loss=loss)
    return loss, to_operands(grads, tensors), ()


def backward(
    options: Options,
    tensors: Tensors,
    grads: Tensors | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output, computed anew from the inputs."""
    operands, place = walk(numbers_of(tensors))
    found = empty_grads(options.record, operands, needs, place, memory.empty)
    if options.reduction == "none":
        upstream = empty_like_walk(operands, grad_output.dtype, place, memory.empty)
        _run(options, operands, place, 1.0, 1.0, found, upstream=upstream.copy_(grad_output))
    else:
        scale = grad_output.item() / _divisor(options, tensors, place)
        _run(options, operands, place, 1.0, scale, found)
    return to_operands(found, tensors)
