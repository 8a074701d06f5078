"""Elementwise losses of two tensors of equal layout, reduced, with both gradients.

Bytes per element in b bytes, for a loss whose input alone needs a gradient:

=====================  =====================  ==================  ========
                       forward                backward            together
=====================  =====================  ==================  ========
gradient in forward    2 reads, 1 write: 3b   none (grad_output   3b
                                              is 1), else 3b      (6b)
recomputed             2 reads: 2b            2 reads, 1 write    5b
=====================  =====================  ==================  ========

The first is chosen, but for float16: that trains under a GradScaler, whose grad_output is
never 1. Whether grad_output is 1 is seen on the device: a program that finds it so ends.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .. import hyper
from . import reduction
from .compiler import TYPES, as_number, compute_dtype, device_function, kernel, launch, number
from .formulas import VALUE_AND_GRAD
from .vector_math import quotient

# 16 elements a thread: two or four 16-byte loads of each tensor under way at a time.
THREADS, BLOCK = 128, 2048


@device_function
def one_block(
    input, target, numbers, values, grad_input, grad_target, upstream, scale, place, mask,
    FORMULA: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Compute the elements at `place`, and return their values."""
    x = tl.load(input + place, mask=mask).to(COMPUTE)
    y = tl.load(target + place, mask=mask).to(COMPUTE)
    if upstream is not None:
        scale = scale * tl.load(upstream + place, mask=mask).to(COMPUTE)
    value, d_input, d_target = FORMULA(numbers, x, y, scale)
    if values is not None:
        tl.store(values + place, value, mask=mask)
    if grad_input is not None:
        tl.store(grad_input + place, d_input, mask=mask)
    if grad_target is not None:
        tl.store(grad_target + place, d_target, mask=mask)
    return value


@kernel
def pointwise_blocks(
    input, target, record, values, grad_input, grad_target, upstream, grad_output, partials,
    divisor, count, FORMULA: tl.constexpr, COMPUTE: tl.constexpr, READY: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of elements a program.

    upstream is per element, grad_output one number for all. READY: the gradients are there
    already, if grad_output is 1.
    """
    scale = tl.full([], 1.0, COMPUTE)
    if grad_output is not None:
        scale = tl.load(grad_output).to(COMPUTE)
        if READY:
            if scale == 1.0:
                return
    if divisor is not None:
        scale = quotient(scale, tl.cast(divisor, COMPUTE))
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
            input, target, numbers, values, grad_input, grad_target, upstream, scale, place,
            None, FORMULA, COMPUTE,
        )  # fmt: skip
        if partials is not None:
            tl.store(partials + program, tl.sum(value))
    else:
        mask = place < count
        value = one_block(
            input, target, numbers, values, grad_input, grad_target, upstream, scale, place,
            mask, FORMULA, COMPUTE,
        )  # fmt: skip
        if partials is not None:
            tl.store(partials + program, tl.sum(tl.where(mask, value, 0.0)))


def _run(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...],
    values: torch.Tensor | None = None,
    upstream: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    ready: bool = False,
) -> None:
    input, target = tensors
    count = input.numel()
    record = tuple(number(value, options.dtype) for value in options.hyper)
    launch(
        pointwise_blocks, (_programs(count),), input.device, THREADS, input, target, record,
        values, *grads, upstream, grad_output, partials, _divisor(options, input), count,
        FORMULA=VALUE_AND_GRAD[type(options.hyper)], COMPUTE=TYPES[compute_dtype(options.dtype)],
        READY=ready,
        WIDE=count + BLOCK >= 2**31, BLOCK=BLOCK,
    )  # fmt: skip


def _programs(count: int) -> int:
    return -(-count // BLOCK)


def _divisor(options: hyper.Loss, input: torch.Tensor) -> int | None:
    return input.numel() if options.reduction == "mean" else None


def _empty_grads(
    tensors: tuple[torch.Tensor, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor | None, ...]:
    return tuple(
        torch.empty_like(t) if need else None for t, need in zip(tensors, needs, strict=True)
    )


def forward(
    options: hyper.Loss, tensors: tuple[torch.Tensor, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None, tuple[()]]:
    """The loss, and its gradients for a grad_output of 1 or None."""
    input = tensors[0]
    if options.reduction == "none":
        values = torch.empty_like(input, dtype=options.dtype)
        _run(options, tensors, (None, None), values)
        return values, None, ()
    grads = None
    if any(needs) and options.grad_output is not None and input.dtype != torch.float16:
        grads = _empty_grads(tensors, needs)
    programs = _programs(input.numel())
    partials = reduction.empty_partials(programs, input, options.dtype)
    _run(options, tensors, grads or (None, None), partials=partials)
    loss = reduction.reduce(partials, options.dtype, divisor=_divisor(options, input))
    return loss, grads, ()


def backward(
    options: hyper.Loss,
    tensors: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...] | None,
    kept: tuple[()],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output; those for 1 stay as they are."""
    if options.reduction == "none":
        upstream = grad_output
        if upstream.stride() != tensors[0].stride():
            upstream = torch.empty_like(tensors[0], dtype=grad_output.dtype).copy_(grad_output)
        grads = _empty_grads(tensors, needs)
        _run(options, tensors, grads, upstream=upstream)
        return grads
    ready, grads = grads is not None, grads or _empty_grads(tensors, needs)
    _run(options, tensors, grads, grad_output=grad_output, ready=ready)
    return grads


def describe(options: hyper.Loss, tensors: tuple[torch.Tensor, ...]) -> str:
    """How a call runs, in words."""
    fused = options.reduction != "none" and tensors[0].dtype != torch.float16
    return (
        f"pointwise, {_programs(tensors[0].numel()):,} programs of {BLOCK} elements, {THREADS} "
        f"threads; gradient {'in the forward pass' if fused else 'recomputed in backward'}"
    )
