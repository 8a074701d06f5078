"""Cross-entropy: from tensors to one of the three traversals.

With coefficients k_c (the weighted and smoothed target distribution of a position),
mass = sum of k_c and p = softmax(x):

    loss         = mass * log sum exp(x - max) - sum of k_c (x_c - max) + z_loss * lse**2
    d loss / d x = (mass + 2 * z_loss * lse) * p_c - k_c
    d loss / d t = weight_c * (log sum exp(x - max) - (x_c - max))

where lse = max + log sum exp(x - max). With a softcap x is softcap * tanh(logit / softcap), and
its derivative by a logit is 1 - tanh(logit / softcap)**2.

A class index puts one coefficient, `hard` times its class weight, on top of an optional
array `smooth`; probabilities give every class its own, t_c * weight_c + smooth_c.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numba.core import types

from ..layout import ClassAxis, class_axis, classes_last, dense_axis, view_along
from ..operation import Options
from ..reference import out_of_bounds
from . import memory
from .compiler import dtype_name, optional_pointer, pointer, specialise
from .pointer import LINE
from .softmax import EACH, GIVEN, KEPT, NOTHING, SCRATCH, SUM, check_targets
from .softmax_long import SEGMENT, softmax_long
from .softmax_rows import BLOCK, GROUP, apart, softmax_rows
from .softmax_tiles import softmax_tiles
from .threads import Launcher, parts_for

# From this many classes a row fills vectors by itself, if its classes lie side by side; by the
# bytes of a number.
LONG_ROW = {2: 128, 4: 80, 8: 48}
# Fewer rows than this share their threads, if they are long.
FEW_ROWS = 16
# Positions in a tile: up to WIDE if they lie side by side and leave enough tiles to share (how
# many is a matter of the sizes alone, not of the threads); APART if they are turned, which wants
# all their cache lines at hand; FEW where a tile would not fit a core's L2 cache.
WIDE, APART, FEW = 1024, 64, 16
TILES, TILE_BYTES, L2_BYTES = 64, 3 << 16, 1 << 19
# Numbers a thread, below which a second one does not pay: some 50 µs of work. A region waits for
# the last of its threads, and where another process has that one's core, for milliseconds.
GRAIN = 32_768


class _Call(NamedTuple):
    """One call, prepared: the coefficients of the formula above, and how to reduce."""

    input: torch.Tensor
    axis: ClassAxis
    target: torch.Tensor | None  # class indices, contiguous
    probability: torch.Tensor | None
    weight: torch.Tensor | None
    smooth: torch.Tensor | None
    hard: float
    ignore_index: int
    denominator: float
    softcap: float | None
    z_loss: float | None


def prepare(options: Options, tensors: tuple[torch.Tensor | None, ...]) -> _Call:
    """Raises IndexError for a class index out of range."""
    input, target, weight = tensors
    assert input is not None
    assert target is not None
    if target.is_floating_point():
        input, target = classes_last(input), classes_last(target)
    axis = _axis(input)
    record: Any = options.record
    ignore_index, smoothing = record.ignore_index, record.label_smoothing
    extras = record.softcap, record.z_loss or None
    smooth = None
    if weight is not None:
        weight = weight.contiguous()
    if smoothing:
        double, share = input.dtype == torch.float64, smoothing / axis.classes
        if weight is None:  # by NumPy, since torch's threads hang in a forked child
            number = np.float64 if double else np.float32
            smooth = torch.from_numpy(np.full(axis.classes, share, number))
        else:
            smooth = weight.to(torch.float64 if double else torch.float32) * share
    denominator = 1.0
    if target.is_floating_point():
        if smooth is not None:
            kept = torch.full_like(smooth, 1 - smoothing)
            weight = kept if weight is None else kept * weight
        if options.reduction == "mean":
            denominator = axis.outer * axis.inner
        return _Call(input, axis, None, target, weight, smooth, 0.0, -1, denominator, *extras)
    target = target.contiguous()
    used = used_weight(target, weight, ignore_index, axis.classes)
    if options.reduction == "mean":
        denominator = used
    hard = 1.0 - smoothing
    return _Call(
        input, axis, target, None, weight, smooth, hard, ignore_index, denominator, *extras
    )  # fmt: skip


def _axis(tensor: torch.Tensor) -> ClassAxis:
    axis = class_axis(tensor)
    assert axis is not None, "dispatch admits only layouts that can be walked"
    return axis


def used_weight(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int, classes: int
) -> float:
    """The summed weight of the class indices that count, both tensors contiguous.

    Raises:
        IndexError: one of them is out of range.
    """
    check = _target_check(target.dtype, None if weight is None else weight.dtype)
    addresses = (target.data_ptr(), None if weight is None else weight.data_ptr())
    in_range, used = check(*addresses, ignore_index, classes, target.numel())
    if not in_range:
        raise out_of_bounds(target, classes, ignore_index)
    number: float = used
    return number


@functools.cache
def _target_check(target: torch.dtype, weight: torch.dtype | None) -> Any:
    return specialise(
        check_targets,
        pointer(dtype_name(target), 0),
        optional_pointer(weight, 1, "float64"),
        *[types.intp] * 3,
    )


#: A grad_output of 1, in each dtype that one may have, and where it is.
_ONE: dict[torch.dtype | None, np.ndarray] = {
    torch.float64: np.ones(1),
    torch.float32: np.ones(1, np.float32),
    torch.float16: np.ones(1, np.float16),
    torch.bfloat16: np.array([0x3F80], np.uint16),
}
_AT = {dtype: one.ctypes.data for dtype, one in _ONE.items()}


@functools.cache
def _launcher(
    loop: Any, over: bool, capped: bool, squared: bool, *dtypes: torch.dtype | None
) -> Launcher:
    """Its form of these dtypes, in the order of `run`.

    over: whether the gradient is written over the logits; capped, squared: whether there is a
    softcap, and a z_loss.

    What is read or written once a position is there in every call, wanted or not, so that there
    are few forms to be compiled.
    """
    compute = "float64" if dtypes[0] == torch.float64 else "float32"
    widths = [compute] * 5 + ["float64", compute, compute, "float64", "float64"]
    slots = [optional_pointer(d, k, w) for k, (d, w) in enumerate(zip(dtypes, widths, strict=True))]
    if over:
        slots[6] = slots[0]
    slots.append(pointer("int64", 20))  # whether a class index was bad
    scratch = [pointer(compute, k, compute) for k in range(10, 15)]
    scratch += [pointer("float64", k, "float64") for k in range(15, 20)]
    double, number = types.float64, getattr(types, compute)
    extras = (number if capped else types.none, double if squared else types.none)
    kept_tops, kept_totals = pointer(compute, 21, compute), pointer("float64", 22, "float64")
    if loop is not softmax_tiles:
        exps = types.none if not over and _in_place(dtypes[0], dtypes[6]) else scratch[1]
        lines = scratch[5:8] if loop is softmax_rows else scratch[5:9]
        last = (double, double, number, *extras, *[types.intp] * 11)
        return Launcher(loop, *slots, double, scratch[0], exps, kept_totals, *lines, *last)
    del slots[7], slots[2]
    free = pointer("int64", 2), pointer(compute, 7, compute) if capped else types.none
    last = (double, double, double, number, *extras, *[types.intp] * 15)
    return Launcher(loop, *slots, double, *free, *scratch, kept_tops, kept_totals, *last)


def _in_place(input: torch.dtype | None, grad: torch.dtype | None) -> bool:
    """Whether a gradient's memory can hold intermediate numbers, or none is wanted."""
    return grad is None or (grad == input and grad.itemsize > 2)


def _loop_of(call: _Call) -> Any:
    x = call.axis
    if x.class_stride != 1 or (
        call.target is not None and x.classes < LONG_ROW[call.input.itemsize]
    ):
        return softmax_tiles
    few = x.outer * x.inner < FEW_ROWS and x.classes > 2 * SEGMENT
    return softmax_long if few else softmax_rows


def empty_kept(
    options: Options, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, ...]:
    """Room for what `forward` keeps: the rows' maxima and sums of exponentials.

    It is enough for any of the loops, and so nothing is asked of sizes, which may be symbols.
    """
    input = tensors[0]
    assert input is not None
    if not any(needs) or not (options.grad_output is None or options.reduction == "none"):
        return ()
    sizes = tuple(input.shape)
    classes = sizes[min(1, len(sizes) - 1)]
    rows = math.prod(sizes[:1] + sizes[2:]) if len(sizes) > 1 else 1
    compute = torch.float64 if input.dtype == torch.float64 else torch.float32
    return (
        torch.empty(rows * (-(-classes // BLOCK)), dtype=compute, device="cpu"),
        torch.empty(rows * (-(-classes // SEGMENT)), dtype=torch.float64, device="cpu"),
    )


def run(
    call: _Call,
    losses: torch.Tensor | None,
    grad: torch.Tensor | None,
    upstream: torch.Tensor | None,
    loss: torch.Tensor | None,
    scale: float,
    t_grad: torch.Tensor | None = None,
    statistics: int = SCRATCH,
    kept: tuple[torch.Tensor | None, ...] = (),
) -> None:
    """Compute the positions' losses, or their sum, and the gradients, each if wanted.

    grad may be the logits themselves; t_grad is that of the probabilities. A gradient is scale *
    upstream[position] times the derivative of a position's loss, or scale times it without
    upstream; loss is the sum of the losses over the denominator. kept is what `empty_kept` gives,
    unless statistics are scratch.

    Raises:
        IndexError: a class index was out of range when it was used.
    """
    x = call.axis
    rows = x.outer * x.inner
    divisor = call.denominator or math.nan  # the mean of nothing is NaN, as torch's
    exact = losses is not None and losses.dtype == torch.float64
    each, step = losses is not None and not exact, upstream is not None
    wanted = EACH if each else NOTHING if losses is None and loss is None else SUM
    tensors = (
        call.input, call.target, call.probability, call.weight, call.smooth,
        losses if exact else None, grad, t_grad, upstream, losses if each else loss,
    )  # fmt: skip
    dtypes = [None if t is None else t.dtype for t in tensors]
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    over, capped = grad is call.input, call.softcap is not None
    form = (over, capped, call.z_loss is not None)
    extras = (call.softcap, call.z_loss)
    # The positions' losses, before they are narrowed or added up.
    ends, dtypes[5] = 0 if exact else 8 * apart.py_func(rows), torch.float64
    dtypes[9] = dtypes[9] or dtypes[8] or call.input.dtype
    if not step:
        dtypes[8], addresses[8] = dtypes[9], _AT[dtypes[9]]
    loop = _loop_of(call)
    pieces = max(rows * -(-x.classes // SEGMENT) if loop is softmax_long else rows, 1)
    parts = min(parts_for(rows * x.classes, GRAIN), pieces)
    size = 8 if call.input.dtype == torch.float64 else 4
    kept_tops, kept_totals = [t.data_ptr() for t in kept if t is not None] or (0, 0)
    if loop is not softmax_tiles:
        t = x if call.probability is None else _axis(call.probability)
        lines, line, copies = 3, parts * GROUP, parts
        if loop is softmax_long:
            lines, line, copies = 4, pieces, rows
        # Logits that the gradient is written over have to be there until all of a row are read.
        in_place = not over and _in_place(dtypes[0], dtypes[6])
        blocks, row = (apart.py_func(n) for n in (-(-x.classes // BLOCK), x.classes))
        of_rows = copies * (blocks + (not in_place) * row) * size
        bad, held = memory.scratch(LINE + ends + 8 * lines * line + of_rows)
        start = bad + LINE
        addresses[5], addresses[9] = addresses[5] or start, addresses[9] or bad + 8
        sums = range(start + ends, start + ends + 8 * lines * line, 8 * line)
        shifts = start + ends + 8 * lines * line
        exps = None if in_place else shifts + copies * blocks * size
        good = _launcher(loop, *form, *dtypes)(
            parts, *addresses, bad, divisor, kept_tops or shifts, exps, kept_totals, *sums,
            call.hard, scale, 0.0, *extras, statistics, wanted, step, call.ignore_index, x.classes,
            x.inner, rows, x.outer_stride, x.inner_stride, t.outer_stride, t.inner_stride,
        )  # fmt: skip
        del held
        if not good:
            raise _out_of_bounds(call)
        return
    width, pitch = _tile(x, size)
    line = parts * pitch
    tiles = (1 + capped) * x.classes
    bad, held = memory.scratch(LINE + ends + line * ((tiles + 4) * size + 6 * 8))
    start = bad + LINE
    addresses[5], addresses[9] = addresses[5] or start, addresses[9] or bad + 8
    start += ends
    numbers = start + line * 6 * 8  # those of eight bytes come first, for their alignment
    first = numbers + line * tiles * size
    slopes = numbers + line * x.classes * size if capped else None
    columns = [numbers, *range(first, first + 4 * line * size, line * size)]
    columns += range(start + line * 8, start + 6 * line * 8, line * 8)
    mass = 0.0 if call.smooth is None else float(call.smooth.sum(dtype=torch.float64))
    g = dense_axis(x)
    del addresses[7], addresses[2]
    good = _launcher(softmax_tiles, *form, *dtypes)(
        parts, *addresses, bad, divisor, start, slopes, *columns, kept_tops, kept_totals,
        call.hard, mass, scale, 0.0, *extras, statistics, wanted, step, call.ignore_index,
        x.classes, x.inner, rows, x.outer_stride, x.inner_stride, x.class_stride, g.outer_stride,
        g.inner_stride, g.class_stride, width, pitch,
    )  # fmt: skip
    del held
    if not good:
        raise _out_of_bounds(call)


def _out_of_bounds(call: _Call) -> IndexError:
    assert call.target is not None
    return out_of_bounds(call.target, call.axis.classes, call.ignore_index)


def _tile(x: ClassAxis, size: int) -> tuple[int, int]:
    """How many positions a tile has, and how far apart its classes are."""
    width, position = APART, x.classes * size
    if x.inner_stride == 1:
        widest = min(WIDE, TILE_BYTES // position, x.outer * x.inner // TILES)
        width = max(widest // APART * APART, APART)
    if position * width > L2_BYTES:
        width = FEW
    width = max(min(width, x.inner), 1)
    # Whole cache lines, an odd number of them: classes of one position then share no cache set.
    lines = -(-width * size // LINE)
    return width, (lines | 1) * LINE // size


def _empty_gradient(input: torch.Tensor, x: ClassAxis) -> torch.Tensor:
    if not memory.is_pooled(input) and input.is_contiguous():
        return torch.empty_like(input)
    return view_along(memory.empty((input.numel(),), input.dtype), input.shape, x)


def forward(
    options: Options, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None, tuple[torch.Tensor, ...]]:
    """The loss, and its gradients for the grad_output expected.

    None if there is none: `backward` then computes them from the rows' statistics, which are kept.
    """
    call, kept = prepare(options, tensors), empty_kept(options, tensors, needs)
    expected, statistics = options.grad_output, KEPT if kept and call.input.numel() else SCRATCH
    if options.reduction == "none":
        shape = call.input.shape[:1] + call.input.shape[2:] if call.input.dim() > 1 else ()
        losses = memory.empty(tuple(shape), options.dtype)
        run(call, losses, None, None, None, 1.0, None, statistics, kept)
        return losses, None, kept
    loss = torch.empty((), dtype=options.dtype, device="cpu")
    if expected is None or not any(needs):
        run(call, None, None, None, loss, 0.0, None, statistics, kept)
        return loss, None, kept
    grad, t_grad = grads = [
        _empty_gradient(call.input, call.axis) if need else None for need in needs[:2]
    ]
    run(call, None, grad, None, loss, expected * inverse(call.denominator), t_grad)
    return loss, (*grads, None), ()


def backward(
    options: Options,
    tensors: tuple[torch.Tensor | None, ...],
    grads: tuple[torch.Tensor | None, ...] | None,
    kept: tuple[torch.Tensor | None, ...],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output, computed from the inputs and what `forward` has kept."""
    call = prepare(options, tensors)
    statistics = GIVEN if kept and call.input.numel() else SCRATCH
    grad, t_grad, _ = grads or [
        _empty_gradient(call.input, call.axis) if need else None for need in needs
    ]
    if options.reduction == "none":
        run(call, None, grad, grad_output.contiguous(), None, 1.0, t_grad, statistics, kept)
    else:
        scale = grad_output.item() * inverse(call.denominator)
        run(call, None, grad, None, None, scale, t_grad, statistics, kept)
    return grad, t_grad, None


def inverse(denominator: float) -> float:
    """1 / denominator, NaN for 0."""
    return 1.0 / denominator if denominator else math.nan
