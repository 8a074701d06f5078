"""A gathered loss: from tensors to launches.

The gradient is made of nothing that the forward pass reads, and is always left to backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..gather import gradient_axis, positions, readable
from ..layout import view_along
from ..operation import Options
from ..reference import out_of_bounds
from . import compiler, reduction
from .compiler import TYPES, compute_dtype, launch
from .cross_entropy import Tiling, tiling
from .gather_loops import gather_rows, mean_of, scatter_rows

# Positions of a program at a time, and the most programs, whose sums one program adds up.
BLOCK, PROGRAMS, THREADS = 512, 2048, 256
# `backward` wants to see what `forward` keeps.
KEEPS = True

Tensors = tuple[torch.Tensor | None, ...]


def _labels_and_weight(options: Options, tensors: Tensors, classes: int) -> tuple[Any, Any, int]:
    _, target, weight = tensors
    assert target is not None
    record: Any = options.record
    target, ignore_index = target.contiguous(), record.ignore_index
    if target.device.type == "cpu":  # in the interpreter nobody waits for a host's look
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if wrong.any():
            raise out_of_bounds(target, classes, ignore_index)
    return target, None if weight is None else weight.contiguous(), ignore_index


def _programs(rows: int) -> tuple[int, int]:
    """How many of them, and the positions of each."""
    span = -(-max(rows, 1) // (BLOCK * PROGRAMS)) * BLOCK
    return max(-(-rows // span), 1), span


def _cut(input: torch.Tensor) -> Tiling:
    machine = compiler.hardware(input.device)
    return tiling(gradient_axis(input), input.itemsize, machine, twice=False)


def forward(
    options: Options, tensors: Tensors, needs: tuple[bool, ...]
) -> tuple[torch.Tensor, None, Tensors]:
    """The loss, and what a mean has been divided by."""
    assert tensors[0] is not None
    input, x = readable(tensors[0])
    target, weight, ignore_index = _labels_and_weight(options, tensors, x.classes)
    rows, compute = x.outer * x.inner, compute_dtype(input.dtype)
    programs, span = _programs(rows)
    losses = partials = masses = None
    if options.reduction == "none":
        losses = input.new_empty(positions(input), dtype=options.dtype)
    else:
        partials = reduction.empty_partials(programs, input)
    if options.reduction == "mean":
        masses = reduction.empty_partials(programs, input)
    launch(
        gather_rows, (programs,), input.device, THREADS, input, target, weight, losses, partials,
        masses, rows, span, ignore_index, x, COMPUTE=TYPES[compute], FLAT=x.outer == 1,
        BLOCK=BLOCK,
    )  # fmt: skip
    if losses is not None:
        return losses, None, ()
    assert partials is not None
    if masses is None:
        return reduction.reduce(partials, options.dtype), None, ()
    loss, mass = input.new_empty((), dtype=options.dtype), partials.new_empty(())
    launch(
        mean_of, (1,), input.device, THREADS, partials, masses, programs, mass, loss,
        BLOCK=reduction.BLOCK,
    )  # fmt: skip
    return loss, None, (mass,)


def backward(
    options: Options,
    tensors: Tensors,
    grads: None,
    kept: Tensors,
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> Tensors:
    """The gradients for any grad_output."""
    input = tensors[0]
    assert input is not None
    g, cut = gradient_axis(input), _cut(input)
    target, weight, ignore_index = _labels_and_weight(options, tensors, g.classes)
    rows = g.outer * g.inner
    flat = input.new_empty(input.numel())
    unit = g.class_stride == 1
    launch(
        scatter_rows, (-(-rows // cut.rows), cut.splits), input.device, cut.threads, target,
        weight, kept[0] if kept else None, grad_output.contiguous(), flat, rows, cut.span,
        ignore_index, g,
        COMPUTE=TYPES[compute_dtype(input.dtype)], PER_ROW=options.reduction == "none",
        FLAT=g.outer == 1, UNIT=unit, WIDE=rows + cut.rows >= 2**31,
        STEP=math.gcd(16, g.classes) if unit else 1, ROWS=cut.rows, COLUMNS=cut.columns,
    )  # fmt: skip
    return view_along(flat, input.shape, g), None, None


def describe(options: Options, tensors: Tensors) -> str:
    """How a call runs, in words."""
    input = tensors[0]
    assert input is not None
    programs, span = _programs(math.prod(positions(input)))
    cut = _cut(input)
    return (
        f"gather, {programs:,} programs of {span} positions; gradient in the backward pass, "
        f"{cut.rows} positions a program, {cut.threads} threads"
    )
