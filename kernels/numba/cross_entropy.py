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

from ..layout import ClassAxis, class_axis, classes_last, view_along
from ..operation import Options
from ..reference import out_of_bounds
from . import memory
from .bound import Forward
from .compiler import dtype_name, optional_pointer, pointer, specialise
from .pointer import LINE
from .softmax import EACH, GIVEN, KEPT, NOTHING, SCRATCH, SUM, check_targets
from .softmax_long import SEGMENT
from .softmax_rows import BLOCK
from .softmax_schedule import Schedule, schedule, threads_for
from .softmax_tiles import softmax_tiles


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
    dtypes[9] = dtypes[9] or dtypes[8] or call.input.dtype
    if not step:
        dtypes[8], addresses[8] = dtypes[9], _AT[dtypes[9]]
    target_axis = None if call.probability is None else _axis(call.probability)
    plan = schedule(
        call.axis, target_axis, grad is call.input, call.softcap is not None,
        call.z_loss is not None, exact, threads_for(call.axis), *dtypes,
    )  # fmt: skip
    tops, totals = [t.data_ptr() for t in kept if t is not None] or (0, 0)
    mass = 0.0
    if plan.loop is softmax_tiles and call.smooth is not None:
        mass = float(call.smooth.sum(dtype=torch.float64))
    good = _launch(
        plan, addresses, divisor, (call.hard, mass, scale), (call.softcap, call.z_loss),
        (statistics, wanted, step), call.ignore_index, tops, totals,
    )  # fmt: skip
    if not good:
        raise _out_of_bounds(call)


def _launch(
    plan: Schedule, addresses: list[int | None], divisor: float, numbers: tuple[float, ...],
    extras: tuple[float | None, ...], wanted: tuple[int, ...], ignore_index: int, tops: int = 0,
    totals: int = 0,
) -> bool:  # fmt: skip
    """Whether all class indices were in range.

    Args:
        addresses: of all tensors, in the order of `run`.
        numbers: the hard coefficient, the mass of the smooth ones (tiles alone ask for it), the
            scale.
        extras: softcap and z_loss.
        wanted: what of statistics, what of the losses, and whether there is an upstream.
        tops, totals: where the rows' statistics are kept.
    """
    bad, held = memory.scratch(plan.bytes)
    scratch = [None if k is None else bad + k for k in plan.offsets]
    # The positions' losses, before they are narrowed or added up; and what nobody wants.
    addresses[5], addresses[9] = addresses[5] or bad + LINE, addresses[9] or bad + 8
    hard, mass, scale = numbers
    if plan.loop is softmax_tiles:
        del addresses[7], addresses[2]
        scratch.append(tops)
        numbers = (hard, mass, scale, 0.0)
    else:
        scratch[0] = tops or scratch[0]
        numbers = (hard, scale, 0.0)
    good: bool = plan.launch(
        plan.parts, *addresses, bad, divisor, *scratch, totals, *numbers, *extras, *wanted,
        ignore_index, *plan.sizes,
    )  # fmt: skip
    del held
    return good


def _out_of_bounds(call: _Call) -> IndexError:
    assert call.target is not None
    return out_of_bounds(call.target, call.axis.classes, call.ignore_index)


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
    loss = memory.empty_number(options.dtype)
    if expected is None or not any(needs):
        run(call, None, None, None, loss, 0.0, None, statistics, kept)
        return loss, None, kept
    grad, t_grad = grads = [
        _empty_gradient(call.input, call.axis) if need else None for need in needs[:2]
    ]
    run(call, None, grad, None, loss, expected * inverse(call.denominator), t_grad)
    return loss, (*grads, None), ()


def bind(
    options: Options, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> Forward | None:
    """`forward` for calls like this one, if all that differs between them are addresses."""
    input, target, weight = tensors
    assert input is not None
    assert target is not None
    record: Any = options.record
    if (
        options.reduction == "none"
        or record.label_smoothing
        or target.is_floating_point()
        or not all(t is None or t.is_contiguous() for t in (target, weight))
        or not input.numel()
        or needs != (True, False, False)
    ):
        return None
    axis, mean, team = _axis(input), options.reduction == "mean", torch.get_num_threads()
    extras, ignore_index = (record.softcap, record.z_loss or None), record.ignore_index
    weighted, dtype = None if weight is None else weight.dtype, options.dtype
    check, classes, rows = _target_check(target.dtype, weighted), axis.classes, target.numel()
    plan = schedule(
        axis, None, False, extras[0] is not None, extras[1] is not None, False, threads_for(axis),
        input.dtype, target.dtype, None, weighted, None, None, input.dtype, None, dtype, dtype,
    )  # fmt: skip
    simple, wanted = input.is_contiguous() and not memory.is_pooled(input), (SCRATCH, SUM, False)

    def forward(
        tensors: tuple[torch.Tensor | None, ...], expected: float
    ) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...], tuple[()]] | None:
        if torch.get_num_threads() != team:
            return None
        input, target, weight = tensors
        assert input is not None
        assert target is not None
        labels, weights = target.data_ptr(), None if weight is None else weight.data_ptr()
        in_range, used = check(labels, weights, ignore_index, classes, rows)
        if not in_range:
            raise out_of_bounds(target, classes, ignore_index)
        loss = memory.empty_number(dtype)
        grad = torch.empty_like(input) if simple else _empty_gradient(input, axis)
        divisor = used if mean else 1.0
        good = _launch(
            plan,
            [input.data_ptr(), labels, None, weights, None, None, grad.data_ptr(), None,
             _AT[dtype], loss.data_ptr()],
            divisor or math.nan, (1.0, 0.0, expected * inverse(divisor)), extras, wanted,
            ignore_index,
        )  # fmt: skip
        if not good:  # another thread has changed them since
            raise out_of_bounds(target, classes, ignore_index)
        return loss, (grad, None, None), ()

    return forward


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
