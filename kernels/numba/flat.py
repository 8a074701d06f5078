"""The flat traversal of a loss: any number of operands, and results of their common shape.

One pass reads each operand once and writes whatever is wanted: the values, their sum, the
gradients. What is not wanted is None, and not compiled.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

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
from .bound import Forward, bind_loop
from .compiler import summing_loop
from .forms import Loop, address_in, dtypes_of, opened, sums_up
from .pointers import load_each_or_one, moved, store_each, store_products
from .record import Values, value_and_slopes
from .target import widest_vectors
from .threads import parts_for
from .vector_math import cast

# Elements summed in the compute dtype before the sum moves to float64. Chunks are the
# same for any number of threads, and so is the result, to the bit.
CHUNK = 512
# Elements of a call of the loop: what comes before the first one of a call takes as long as a
# hundred of them.
GROUP = 16 * CHUNK
# Elements a thread, below which a second one does not pay: some 50 to 100 µs of work (12 to 16
# bytes an element, from memory). A region waits for the last of its threads, and where another
# process has that one's core, for milliseconds.
GRAIN = 65_536

Tensors = tuple[torch.Tensor | None, ...]


@summing_loop
def flat_run(form: Any, scale: float, first: int, last: int) -> float:
    """Chunks first to last: their values, if wanted, their gradients, and the sum of the values.

    A gradient is `scale` times a slope, and times upstream's element, if there is an upstream.
    """
    widest_vectors()
    record, _, groups, (count, second, inner), factor = opened(form, scale)
    operands, values, grads, upstream, (steps,) = groups
    # At least 1: before a division that can fail LLVM expects failure, and few turns of the loop.
    each, second = max((inner + CHUNK - 1) // CHUNK, 1), max(second, 1)
    total = 0.0
    for chunk in range(first, last):
        block, begin = chunk // each, chunk % each * CHUNK
        here = moved(operands, steps, block // second, block % second)
        out = block * inner
        part = cast(0, factor)
        for i in range(begin, min(begin + CHUNK, inner, count - out)):
            found = value_and_slopes(record, *load_each_or_one(here, i, factor))
            part += found[0]
            store_each(values, out + i, found[:1])
            times = load_each_or_one(upstream, out + i, factor)
            store_products(grads, out + i, found[1:], factor * times[0])
        total += np.float64(part)
    return total if sums_up(form) else 0.0


class _Schedule(NamedTuple):
    """What is the same for all launches of one kind.

    Attributes:
        loop: compiled for the kind.
        numbers, steps: the addresses of the record's numbers and of the operands' steps.
        chunks: how many there are.
        group: chunks whose sums are added up by one thread.
        bytes: of scratch memory.
        kept: what has to live as long.
    """

    loop: Loop
    numbers: int
    steps: int
    chunks: int
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
    loop = _loop(kind, record.settings, operands, fixed, grads, values, upstream, loss)
    group = GROUP // min(max(place.inner, 1), CHUNK)
    chunks = -(-place.places // max(place.inner, 1)) * -(-place.inner // CHUNK)
    addresses = numbers.ctypes.data, steps.ctypes.data
    return _Schedule(loop, *addresses, chunks, group, 8 * -(-chunks // group), (numbers, steps))


@functools.lru_cache(4096)  # of a user's formula each version has forms of its own
def _loop(
    operation: type[Elementwise], flags: tuple[int, ...],
    operands: tuple[torch.dtype | None, ...], fixed: tuple[bool, ...],
    grads: tuple[torch.dtype | None, ...], values: torch.dtype | None,
    upstream: torch.dtype | None, loss: torch.dtype | None,
) -> Loop:  # fmt: skip
    """fixed: of which operands a block has but one number."""
    compute = "float64" if torch.float64 in operands else "float32"
    read = [
        None if d is None else (d, compute, one) for d, one in zip(operands, fixed, strict=True)
    ]
    groups = tuple(read), (values,), grads, (upstream,), (torch.int64,)
    return Loop(flat_run, Values(operation, flags), compute, groups, 3, loss)


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
        record, place, dtypes_of(operands), dtypes_of(grads), *dtypes_of((values, upstream, loss))
    )
    sums, kept = (None, None) if loss is None else memory.scratch(schedule.bytes)
    words = [
        schedule.numbers, *map(address_in, operands), address_in(values), *map(address_in, grads),
        address_in(upstream), schedule.steps, place.places, place.second, place.inner,
    ]  # fmt: skip
    schedule.loop(
        parts_for(place.places, GRAIN), words, scale * record.factor, sums, address_in(loss),
        divisor, schedule.chunks, schedule.group,
    )  # fmt: skip
    del kept


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
    loss = memory.empty_number(options.dtype)
    expected = options.grad_output
    if expected is None or not any(needs):
        _run(options, operands, place, divisor, 0.0, loss=loss)
        return loss, None, ()
    grads = empty_grads(options.record, operands, needs, place, memory.empty)
    _run(options, operands, place, divisor, expected / divisor, grads, loss=loss)
    return loss, to_operands(grads, tensors), ()


def bind(options: Options, tensors: Any, needs: tuple[bool, ...]) -> Forward | None:
    """`forward` for calls like this one, if all that differs between them are addresses."""
    record: Any = options.record
    given = [k for k, t in enumerate(tensors) if t is not None]
    if options.reduction == "none" or not all(
        tensors[k].is_contiguous() and tensors[k].is_floating_point() for k in given
    ):
        return None
    operands, place = walk(tensors)
    followed = [k for k in given if needs[k]]
    divisor = divisor_of(options, tensors, place)
    if (
        divisor is None
        or not place.places
        or any(k >= record.slopes or tensors[k].shape != place.shape for k in followed)
        or any(operands[k] is not tensors[k] for k in given)
    ):
        return None
    dtypes = dtypes_of(tensors)
    wanted = tuple([d if k in followed else None for k, d in enumerate(dtypes[: record.slopes])])
    schedule = _schedule(record, place, dtypes, wanted, None, None, options.dtype)
    words = schedule.numbers, (schedule.steps, place.places, place.second, place.inner)
    return bind_loop(
        schedule.loop, tensors, given, followed, words, options.dtype, divisor, record.factor,
        parts_for(place.places, GRAIN), (schedule.chunks, schedule.group), schedule,
    )  # fmt: skip


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
