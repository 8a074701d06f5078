"""The flat traversal of a loss: any number of operands, and results of their common shape.

Bytes per element in b bytes, for a loss of n operands of which k need a gradient:

=====================  =====================  ==================  ==============
                       forward                backward            together
=====================  =====================  ==================  ==============
gradient in forward    n reads, k writes      none (grad_output   (n + k) b
                                              is 1), else as      (twice that)
                                              many
recomputed             n reads                n reads, k writes   (2n + k) b
=====================  =====================  ==================  ==============

The first is chosen, but for float16: that trains under a GradScaler, whose grad_output is
never 1. Whether grad_output is 1 is seen on the device: a program that finds it so ends.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl

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
from ..operation import Options
from . import reduction
from .compiler import TYPES, as_number, device_function, kernel, launch, number
from .record import constants_of, formula_of, record_numbers
from .vector_math import quotient

# 16 elements a thread: two or four 16-byte loads of each tensor under way at a time.
THREADS, BLOCK = 128, 2048

Tensors = tuple[torch.Tensor | None, ...]


@device_function
def one_block(
    operands, steps, h, values, grads, upstream, scale, place, mask, second, inner,
    FORMULA: tl.constexpr, FIXED: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the elements at `place`, and return their values."""
    numbers = ()
    for k in tl.static_range(len(FIXED)):  # Triton 3.6 doesn't know how long a tuple with None is
        if operands[k] is None:
            numbers = numbers + (1.0,)
        elif FLAT:
            if FIXED[k]:
                numbers = numbers + (tl.load(operands[k]).to(COMPUTE),)
            else:
                numbers = numbers + (tl.load(operands[k] + place, mask=mask).to(COMPUTE),)
        else:
            block = place // inner
            where = block // second * steps[k][0] + block % second * steps[k][1]
            if not FIXED[k]:
                where += place % inner
            numbers = numbers + (tl.load(operands[k] + where, mask=mask).to(COMPUTE),)
    found = FORMULA(h, *numbers)
    if upstream is not None:
        scale = scale * tl.load(upstream + place, mask=mask).to(COMPUTE)
    if values is not None:
        tl.store(values + place, found[0], mask=mask)
    for k in tl.static_range(len(found) - 1):
        if grads[k] is not None:
            tl.store(grads[k] + place, scale * found[k + 1], mask=mask)
    return tl.broadcast_to(found[0], place.shape)  # one number, where each operand is one


@kernel
def flat_blocks(
    operands, steps, record, values, grads, upstream, grad_output, partials, factor, divisor,
    count, second, inner, FORMULA: tl.constexpr, MAKE: tl.constexpr, NAMES: tl.constexpr,
    FLAGS: tl.constexpr, FIXED: tl.constexpr, FLAT: tl.constexpr, COMPUTE: tl.constexpr,
    READY: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of elements a program.

    upstream is per element, grad_output one number for all. READY: the gradients are there
    already, if grad_output is 1. steps: of each operand, see Walk.
    """
    scale = tl.full([], 1.0, COMPUTE)
    if grad_output is not None:
        scale = tl.load(grad_output).to(COMPUTE)
        if READY:
            if scale == 1.0:
                return
    if divisor is not None:
        scale = quotient(scale, as_number(divisor, COMPUTE))
    scale = scale * as_number(factor, COMPUTE)
    numbers = ()
    for k in tl.static_range(len(record)):
        numbers = numbers + (as_number(record[k], COMPUTE),)  # type: ignore[assignment]
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    place = program * BLOCK + tl.arange(0, BLOCK)
    # A mask that ends anywhere would split 16-byte accesses, so only the last block has one.
    if (program + 1) * BLOCK <= count:
        value = one_block(
            operands, steps, MAKE(numbers, FLAGS), values, grads, upstream, scale, place, None,
            second, inner, FORMULA, FIXED, FLAT, COMPUTE,
        )  # fmt: skip
        if partials is not None:
            tl.store(partials + program, tl.sum(value))
    else:
        mask = place < count
        value = one_block(
            operands, steps, MAKE(numbers, FLAGS), values, grads, upstream, scale, place, mask,
            second, inner, FORMULA, FIXED, FLAT, COMPUTE,
        )  # fmt: skip
        if partials is not None:
            tl.store(partials + program, tl.sum(tl.where(mask, value, 0.0)))


def _run(
    options: Options,
    operands: Tensors,
    place: Walk,
    divisor: float | None,
    grads: Tensors = (),
    values: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    ready: bool = False,
) -> None:
    record: Any = options.record
    operation: Any = type(record)
    compute = compute_dtype(operands)
    first = next(t for t in operands if t is not None)
    launch(
        flat_blocks, (_programs(place),), first.device, THREADS, operands,
        tuple(step[:2] for step in place.steps), record_numbers(record, compute), values,
        grads or (None,) * operation.slopes, upstream, grad_output, partials,
        number(record.factor, compute), None if divisor is None else number(divisor, compute),
        place.places, place.second, place.inner,
        FIXED=tuple(step[2] == 0 for step in place.steps), FLAT=place.flat,
        COMPUTE=TYPES[compute], READY=ready, WIDE=place.places + BLOCK >= 2**31, BLOCK=BLOCK,
        FORMULA=formula_of(operation, "value_and_slopes"), **constants_of(record),
    )  # fmt: skip


def _programs(place: Walk) -> int:
    return -(-place.places // BLOCK)


def _recomputes(options: Options, tensors: Tensors) -> bool:
    """Whether the gradients are left to the backward pass.

    So they are where the mean divides by a sum, which only the device knows.
    """
    first = next(t for t in tensors if t is not None)
    weighted = mass_of(options, tensors) is not None
    unknown = options.reduction == "none" or options.grad_output is None
    return unknown or first.dtype == torch.float16 or weighted


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, Tensors | None, tuple[()]]:
    """The loss, and its gradients for a grad_output of 1 or None."""
    operands, place = walk(numbers_of(tensors))
    empty = reduction.empty_on(tensors)
    if options.reduction == "none":
        values = empty_like_walk(operands, options.dtype, place, empty)
        _run(options, operands, place, None, values=values)
        return values, None, ()
    grads = None
    if any(needs) and not _recomputes(options, tensors):
        grads = empty_grads(options.record, operands, needs, place, empty)
    partials = empty((_programs(place),), compute_dtype(operands))
    divisor = divisor_of(options, tensors, place)
    _run(options, operands, place, divisor, grads or (), partials=partials)
    loss = reduction.reduce(partials, options.dtype, divisor=divisor)
    mass = mass_of(options, tensors)
    if mass is not None:
        loss /= mass.sum(dtype=partials.dtype)
    return loss, None if grads is None else to_operands(grads, tensors), ()


def backward(
    options: Options,
    tensors: Tensors,
    grads: Tensors | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output; those for 1 stay as they are."""
    operands, place = walk(numbers_of(tensors))
    empty = reduction.empty_on(tensors)
    if options.reduction == "none":
        upstream = empty_like_walk(operands, grad_output.dtype, place, empty).copy_(grad_output)
        found = empty_grads(options.record, operands, needs, place, empty)
        _run(options, operands, place, None, found, upstream=upstream)
        return to_operands(found, tensors)
    # those of operands that are broadcast have been summed up
    whole = grads is not None and all(g is None or tuple(g.shape) == place.shape for g in grads)
    if grads is not None and whole:
        found, ready = grads[: options.record.slopes], True  # type: ignore[attr-defined]
    else:
        found, ready = empty_grads(options.record, operands, needs, place, empty), False
    mass = mass_of(options, tensors)
    if mass is not None:
        grad_output = grad_output / mass.sum(dtype=compute_dtype(operands))
    divisor = divisor_of(options, tensors, place)
    _run(options, operands, place, divisor, found, grad_output=grad_output, ready=ready)
    return to_operands(found, tensors)


def describe(options: Options, tensors: Tensors) -> str:
    """How a call runs, in words."""
    _, place = walk(numbers_of(tensors))
    when = "recomputed in backward" if _recomputes(options, tensors) else "in the forward pass"
    return (
        f"flat, {_programs(place):,} programs of {BLOCK} elements, {THREADS} threads; "
        f"gradient {when}"
    )
