"""The kernels of a gathered loss: one number a position is read, zeros but for it are written.

Names of strides: x is the input's ClassAxis, g the gradient's. STEP, UNIT and FLAT are as in the
traversal of cross-entropy.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import device_function, kernel
from .reduction import sum_all
from .softmax import part, row_starts, tile
from .vector_math import quotient


@device_function
def chosen(target, weight, row, inside, classes, ignore_index, COMPUTE: tl.constexpr):
    """Each position's class, whether it counts, and its class weight."""
    label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
    counts = inside & (label != ignore_index)
    valid = (label >= 0) & (label < classes)
    tl.device_assert(valid | (label == ignore_index), "Target is out of bounds")
    # Where asserts are not compiled, at least NaN and no access out of bounds.
    label = tl.where(valid, label, 0)
    share = tl.where(valid, 1.0, float("nan")).to(COMPUTE)
    if weight is not None:
        share *= tl.load(weight + label, mask=counts, other=0.0).to(COMPUTE)
    return label, counts, share


@kernel(do_not_specialize=["ignore_index"])
def gather_rows(
    input, target, weight, losses, partials, masses, rows, span, ignore_index, x,
    COMPUTE: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses of `span` positions, or the sums of losses and weights, each if wanted."""
    begin = tl.program_id(0).to(tl.int64) * span
    end = tl.minimum(begin + span, rows)
    total, mass = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    for start in range(begin, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < end
        label, counts, share = chosen(target, weight, row, inside, x.classes, ignore_index, COMPUTE)
        place = row_starts(row, x, FLAT, 1) + label * x.class_stride
        value = -share * tl.load(input + place, mask=counts, other=0.0).to(COMPUTE)
        value = tl.where(counts, value, 0.0)
        if losses is not None:
            tl.store(losses + row, value, mask=inside)
        total += value
        mass += tl.where(counts, share, 0.0)
    if partials is not None:
        tl.store(partials + tl.program_id(0), tl.sum(total))
    if masses is not None:
        tl.store(masses + tl.program_id(0), tl.sum(mass))


@kernel
def mean_of(partials, masses, count, mass, loss, BLOCK: tl.constexpr):
    """mass = the summed weight; loss = the sum over it, infinite or NaN where that is 0."""
    whole = sum_all(masses, count, BLOCK)
    tl.store(mass, whole)
    tl.store(loss, quotient(sum_all(partials, count, BLOCK), whole))


@kernel(do_not_specialize=["ignore_index"])
def scatter_rows(
    target, weight, mass, grad_output, grad, rows, span, ignore_index, g,
    COMPUTE: tl.constexpr, PER_ROW: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of `span` classes of some positions."""
    row, begin, end = part(span, g, WIDE, STEP, ROWS)
    inside = row < rows
    label, counts, share = chosen(target, weight, row, inside, g.classes, ignore_index, COMPUTE)
    if PER_ROW:
        scale = tl.load(grad_output + row, mask=inside, other=0.0).to(COMPUTE)
    else:
        scale = tl.load(grad_output).to(COMPUTE)
        if mass is not None:
            scale = quotient(scale, tl.load(mass))
    slope = tl.where(counts, -share * scale, 0.0)
    starts = row_starts(row, g, FLAT, STEP)
    for start in range(begin, end, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        here = tl.where(column[None, :] == label[:, None], slope[:, None], 0.0)
        mask = inside[:, None] & (column < end)[None, :]
        tl.store(tile(grad, starts, column, g, UNIT), here, mask=mask)
