"""Cross-entropy: from tensors to launches.

With coefficients k_c (the weighted and smoothed target distribution of a position),
mass = sum of k_c and p = softmax(x):

    loss         = mass * log sum exp(x - max) - sum of k_c (x_c - max) + z_loss * lse**2
    d loss / d x = (mass + 2 * z_loss * lse) * p_c - k_c
    d loss / d t = kept * weight_c * (log sum exp(x - max) - (x_c - max))

where lse = max + log sum exp(x - max). A softcap has softcap * tanh(logit / softcap) for x.

Bytes per logit in b bytes (a position's target, loss and statistics are some 24 bytes more):

=====================  ==========================  ==========================  =========
                       forward                     backward                    together
=====================  ==========================  ==========================  =========
gradient in forward    1 read, 1 write: 2b         none (grad_output is 1),    2b
                                                   else 1 read, 1 write        (4b)
recomputed             1 read: b                   1 read, 1 write: 2b         3b
=====================  ==========================  ==========================  =========

A row too long for registers is read twice in forward; the second reading, from its end, finds
it in a cache as long as the rows under way together fit there (see `tiling`). The first line
is chosen, but for float16: that trains under a GradScaler, whose grad_output is never 1.
Whether grad_output is 1 is seen on the device: a program that finds it so ends at once.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from ..layout import ClassAxis, class_axis, classes_last, dense_axis, view_along
from ..operation import Options
from ..reference import out_of_bounds
from . import reduction
from .compiler import TYPES, Hardware, compute_dtype, hardware, launch, number, power_of_2
from .softmax import row_statistics, softmax_rows, target_mass

# Elements in registers of a program's tile, 16 a thread: two (bfloat16) or four (float32)
# 16-byte loads under way, and room for the two accumulators that each element has.
TILE, PER_THREAD = 4096, 16
# Of short rows every few elements need an address of their own, and half a tile the registers.
SHORT_ROW = 256
# A single program may have 1024 threads. Rows up to here need not be read twice.
LONGEST_TILE = 16_384
# Where positions lie side by side: classes of a tile, so that 64 positions stand beside them.
STRIDED_COLUMNS = 64
# Positions and programs of the kernel that sums up the targets' weights.
MASS_SPAN, MASS_PROGRAMS = 4096, 128
# `backward` wants to see what `forward` keeps.
KEEPS = True


class Tiling(NamedTuple):
    """How a call is cut into programs.

    Attributes:
        rows, columns: positions and classes of a tile.
        threads: of a program.
        span: classes of a program, all of them unless rows are split.
        splits: programs side by side in a row.
    """

    rows: int
    columns: int
    threads: int
    span: int
    splits: int

    @property
    def single(self) -> bool:
        """Whether a tile holds whole rows."""
        return self.splits == 1 and self.span <= self.columns


@functools.lru_cache(maxsize=1024)
def tiling(
    axis: ClassAxis, itemsize: int, machine: Hardware, twice: bool = True, plain: bool = True
) -> Tiling:
    """The rules for block sizes.

    Args:
        axis: of the logits.
        itemsize: bytes of a logit.
        machine: the device.
        twice: whether rows too long for a tile are read twice; otherwise every part of a row
            stands by itself, and there may be as many as there are.
        plain: whether there is but a class index; what else a call has needs registers, too.
    """
    positions, classes = axis.outer * axis.inner, axis.classes
    width = power_of_2(classes)
    if axis.class_stride == 1:
        columns = min(width, LONGEST_TILE if width <= LONGEST_TILE else TILE)
        in_flight = min(4 * machine.processors, positions) * classes * itemsize  # 4 a processor
        if width > LONGEST_TILE and twice and in_flight > machine.cache and itemsize < 8:
            # Fewer rows at once, or the second reading would miss the cache: one program fills
            # a processor (with float64 it would need more registers than that has).
            columns = 2 * TILE
    else:
        columns = min(width, STRIDED_COLUMNS)
    tile = TILE // 2 if axis.class_stride == 1 and columns < SHORT_ROW else TILE
    rows = max(tile // columns, 1)
    # With few positions rather more programs than full tiles.
    rows = min(rows, power_of_2(-(-positions // (2 * machine.processors))))
    if axis.class_stride != 1:
        rows = max(rows, min(32, power_of_2(positions)))  # a warp side by side
    full = plain and tile == TILE and (columns <= TILE or columns >= classes)
    per_thread = PER_THREAD if full else PER_THREAD // 2
    threads = max(min(rows * columns // per_thread, 1024), machine.warp)
    blocks = -(-positions // rows)
    span = classes
    if classes > columns:
        if not twice:  # a grid has at most 65,535 programs along a row
            span = columns * max(4, classes // (columns << 15))
        elif blocks < machine.processors:  # few long rows: split them
            splits = -(-2 * machine.processors // max(blocks, 1))
            span = -(-classes // (splits * columns)) * columns
    return Tiling(rows, columns, threads, span, max(-(-classes // span), 1))


class _Call(NamedTuple):
    """One call, prepared: the coefficients of the formula above, and how to reduce."""

    input: torch.Tensor
    axis: ClassAxis
    target: torch.Tensor | None  # class indices, contiguous
    probability: torch.Tensor | None
    weight: torch.Tensor | None
    weight_sum: torch.Tensor | None
    kept: float  # of the target, 1 - label_smoothing
    smooth: float  # spread to each class
    ignore_index: int
    reduction: str
    softcap: float | None
    z_loss: float

    @property
    def positions(self) -> int:
        return self.axis.outer * self.axis.inner

    def cut(self, twice: bool = True) -> Tiling:
        """Into programs."""
        machine = hardware(self.input.device)
        return tiling(self.axis, self.input.itemsize, machine, twice, self.plain)

    @property
    def plain(self) -> bool:
        """Whether a position's target is but a class index, and no logit is capped."""
        return self.probability is None and self.weight is None and self.softcap is None


class Kept(NamedTuple):
    """What forward keeps for backward, beside the tensors: the rows' statistics."""

    tops: torch.Tensor
    totals: torch.Tensor
    masses: torch.Tensor | None
    target_masses: torch.Tensor | None


def prepare(options: Options, tensors: tuple[torch.Tensor | None, ...]) -> _Call:
    input, target, weight = tensors
    assert input is not None
    assert target is not None
    if target.is_floating_point():
        input, target = classes_last(input), classes_last(target)
    axis = class_axis(input)
    assert axis is not None, "dispatch admits only layouts that can be walked"
    record: Any = options.record
    ignore_index, smoothing = record.ignore_index, record.label_smoothing
    if weight is not None:
        weight = weight.contiguous()
    weight_sum = None
    probability = None
    if target.is_floating_point():
        target, probability = None, target
    else:
        target = target.contiguous()
        if smoothing and weight is not None:
            weight_sum = weight.sum(dtype=compute_dtype(input.dtype))
        check_on_host(target, axis.classes, ignore_index)
    return _Call(
        input, axis, target, probability, weight, weight_sum, 1.0 - smoothing,
        smoothing / axis.classes, ignore_index, options.reduction, record.softcap, record.z_loss,
    )  # fmt: skip


def check_on_host(target: torch.Tensor, classes: int, ignore_index: int) -> None:
    """In the interpreter, where nobody waits for a host's look: IndexError of bad ones."""
    if target.device.type == "cpu":
        wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
        if wrong.any():
            raise out_of_bounds(target, classes, ignore_index)


def target_masses(
    target: torch.Tensor, weight: torch.Tensor | None, like: torch.Tensor, classes: int,
    ignore_index: int,
) -> torch.Tensor:  # fmt: skip
    """Partial sums of the class indices' weights, by which a mean divides; of `like`'s dtype."""
    positions = target.numel()
    programs = min(max(-(-positions // MASS_SPAN), 1), MASS_PROGRAMS)
    masses = reduction.empty_partials(programs, like)
    launch(
        target_mass, (programs,), like.device, 256, target, weight, masses, positions,
        -(-positions // programs), classes, ignore_index,
        COMPUTE=TYPES[compute_dtype(like.dtype)], BLOCK=1024,
    )  # fmt: skip
    return masses


def _constants(call: _Call, cut: Tiling) -> dict[str, Any]:
    """The compile-time arguments that both kernels have."""
    compute = compute_dtype(call.input.dtype)
    return {
        "COMPUTE": TYPES[compute],
        "SMOOTH": call.smooth != 0,
        "FLAT": call.axis.outer == 1,
        "UNIT": call.axis.class_stride == 1,
        "STEP": _step(call),
        "WIDE": call.positions + cut.rows >= 2**31,
        "ROWS": cut.rows,
        "COLUMNS": cut.columns,
        "STAGES": _stages(call, cut),
        "LOWEST": torch.finfo(compute).min,
    }


def _stages(call: _Call, cut: Tiling) -> int:
    """Tiles under way at a time, where those to come wait in shared memory.

    Three of 16 KiB leave room for several programs on a processor and for the smallest shared
    memories; a larger tile has enough loads under way by itself.
    """
    fits = cut.rows * cut.columns * call.input.itemsize <= 16 << 10
    return 3 if call.plain and fits and not cut.single else 1


def _step(call: _Call) -> int:
    """A power of two that all rows' starts and ends are multiples of, in elements.

    Triton itself sees only whether a number is a multiple of 16; 1000 classes are one of 8.
    """
    x, t = call.axis, _probability_axis(call)
    if x.class_stride != 1:
        return 1
    strides = (x.inner_stride, x.outer_stride, t.inner_stride, t.outer_stride)
    return math.gcd(16, x.classes, *strides)


def _numbers(call: _Call) -> tuple[float | None, ...]:
    numbers = (call.kept, call.smooth, call.softcap)
    return tuple(None if n is None else number(n, call.input.dtype) for n in numbers)


def _probability_axis(call: _Call) -> ClassAxis:
    axis = call.axis if call.probability is None else class_axis(call.probability)
    assert axis is not None
    return axis


def _split_statistics(call: _Call, cut: Tiling) -> Kept:
    """Line by line, those of each split."""
    room = call.positions * cut.splits
    tops, totals = (reduction.empty_partials(room, call.input) for _ in range(2))
    masses = None if call.probability is None else torch.empty_like(tops)
    launch(
        row_statistics, (-(-call.positions // cut.rows), cut.splits), call.input.device,
        cut.threads, call.input, call.probability, call.weight, tops, totals, masses,
        call.positions, cut.span, call.axis, _probability_axis(call), *_numbers(call),
        **_constants(call, cut),
    )  # fmt: skip
    return Kept(tops, totals, masses, None)


def run(
    call: _Call,
    cut: Tiling,
    kept: Kept | None,
    given: bool,
    grad: torch.Tensor | None = None,
    losses: torch.Tensor | None = None,
    partials: torch.Tensor | None = None,
    grad_output: torch.Tensor | None = None,
    ready: bool = False,
    t_grad: torch.Tensor | None = None,
) -> None:
    """Launch the kernel over all positions; see there."""
    tops, totals, masses, divisors = kept or (None,) * 4
    lines = tops.numel() // max(call.positions, 1) if given and tops is not None else 1
    g = dense_axis(call.axis)
    z_loss = number(call.z_loss, call.input.dtype) if call.z_loss else None
    launch(
        softmax_rows, (-(-call.positions // cut.rows), cut.splits), call.input.device,
        cut.threads, call.input, call.target, call.probability, call.weight, call.weight_sum,
        tops, totals, masses, lines, divisors, 0 if divisors is None else divisors.numel(),
        call.positions if call.reduction == "mean" else None, grad_output, losses, partials, grad,
        t_grad, call.positions, cut.span, call.ignore_index, call.axis, _probability_axis(call), g,
        *_numbers(call), z_loss, GIVEN=given, READY=ready,
        PER_ROW=call.reduction == "none", G_UNIT=g.class_stride == 1, SINGLE=cut.single,
        LINES=power_of_2(lines), **_constants(call, cut),
    )  # fmt: skip


def _empty_gradient(call: _Call) -> torch.Tensor:
    flat = call.input.new_empty(call.input.numel())
    return view_along(flat, call.input.shape, call.axis)


def recomputes(options: Options, dtype: torch.dtype) -> bool:
    """Whether gradients are left to the backward pass."""
    unknown = options.reduction == "none" or options.grad_output is None
    return unknown or dtype == torch.float16


def forward(
    options: Options, tensors: tuple[torch.Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...] | None, tuple[torch.Tensor | None, ...]]:
    """The loss, and its gradients for a grad_output of 1 or None."""
    call = prepare(options, tensors)
    input, cut = call.input, call.cut()
    split = cut.splits > 1
    kept = None
    if split:
        kept = _split_statistics(call, cut)
    elif any(needs):
        tops, totals = (reduction.empty_partials(call.positions, input) for _ in range(2))
        soft = None if call.probability is None else torch.empty_like(tops)
        kept = Kept(tops, totals, soft, None)
    masses = None
    if options.reduction == "mean" and call.target is not None:
        masses = target_masses(
            call.target, call.weight, input, call.axis.classes, call.ignore_index
        )  # fmt: skip
    if kept is not None:
        kept = kept._replace(target_masses=masses)
    grads: tuple[torch.Tensor | None, ...] | None = None
    if any(needs) and not recomputes(options, input.dtype):
        grads = tuple(_empty_gradient(call) if need else None for need in needs)
    shape = input.shape[:1] + input.shape[2:] if input.dim() > 1 else ()
    if options.reduction == "none":
        losses = input.new_empty(shape, dtype=options.dtype)
        lines = reduction.empty_partials(cut.splits * call.positions, input) if split else losses
        run(call, cut, kept, split, losses=lines)
        if split:
            losses.copy_(lines.view(cut.splits, *shape).sum(0))
        return losses, None, kept or ()
    blocks = -(-call.positions // cut.rows) * cut.splits
    partials = reduction.empty_partials(blocks, input)
    grad, t_grad, _ = grads or (None,) * 3
    run(call, cut, kept, split, grad, partials=partials, t_grad=t_grad)
    divisor = call.positions if options.reduction == "mean" else None
    loss = reduction.reduce(partials, options.dtype, masses, divisor)
    return loss, grads, kept or ()


def backward(
    options: Options,
    tensors: tuple[torch.Tensor | None, ...],
    grads: tuple[torch.Tensor | None, ...] | None,
    kept: tuple[torch.Tensor | None, ...],
    grad_output: torch.Tensor,
    needs: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients for any grad_output; those for 1 stay as they are."""
    call = prepare(options, tensors)
    cut = call.cut(twice=False)
    grad, t_grad, _ = grads or [_empty_gradient(call) if need else None for need in needs]
    run(
        call, cut, Kept._make(kept), True, grad, grad_output=grad_output.contiguous(),
        ready=grads is not None, t_grad=t_grad,
    )  # fmt: skip
    return grad, t_grad, None


def describe(options: Options, tensors: tuple[torch.Tensor | None, ...]) -> str:
    """How a call runs, in words."""
    input, target, weight = tensors
    assert input is not None
    assert target is not None
    axis = class_axis(input)
    assert axis is not None
    record: Any = options.record
    plain = weight is None and not target.is_floating_point() and record.softcap is None
    if target.is_floating_point():
        axis = axis._replace(class_stride=1)  # else it is copied
    cut = tiling(axis, input.itemsize, hardware(input.device), plain=plain)
    if cut.single:
        rows = f"{cut.rows} whole rows a program, read once"
    elif cut.splits == 1:
        rows = f"{cut.rows} rows a program, read twice in tiles of {cut.columns} classes"
    else:
        rows = f"rows split over {cut.splits} programs of {cut.span} classes"
    when = "recomputed in backward" if recomputes(options, input.dtype) else "in the forward pass"
    return f"softmax, {rows}, {cut.threads} threads; gradient {when}"
