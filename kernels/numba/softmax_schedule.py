"""How a cross-entropy of certain sizes runs: by which loop, in what scratch memory, how compiled.

All of it is settled once for calls of the same sizes, strides and dtypes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from numba.core import types

from ..layout import ClassAxis, dense_axis
from .compiler import optional_pointer, pointer
from .pointer import LINE
from .softmax_long import SEGMENT, softmax_long
from .softmax_rows import BLOCK, GROUP, apart, softmax_rows
from .softmax_tiles import softmax_tiles
from .threads import Launcher, parts_for

__all__ = ["FEW_ROWS", "Schedule", "schedule", "threads_for"]

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


class Schedule(NamedTuple):
    """What is the same for all calls of the same sizes, strides and dtypes.

    Attributes:
        loop: the one that serves them.
        launch: its form.
        parts: on how many threads.
        bytes: of scratch memory, which begins with whether a class index was bad; from LINE on it
            has the positions' losses, unless they are wanted as they are.
        offsets: where its other parts are, in the order of the loop's arguments; None for none.
        sizes: the loop's last arguments.
    """

    loop: Any
    launch: Launcher
    parts: int
    bytes: int
    offsets: tuple[int | None, ...]
    sizes: tuple[int, ...]


def threads_for(x: ClassAxis) -> int:
    """On how many threads a call would pay."""
    return parts_for(x.outer * x.inner * x.classes, GRAIN)


@functools.lru_cache(1024)
def schedule(
    x: ClassAxis, probability: ClassAxis | None, over: bool, capped: bool, squared: bool,
    exact: bool, threads: int, *dtypes: torch.dtype | None,
) -> Schedule:  # fmt: skip
    """That of a call.

    Args:
        x: where the logits are.
        probability: where their probabilities are, if these are the target.
        over: whether the gradient is written over the logits.
        capped, squared: whether there is a softcap, and a z_loss.
        exact: whether the positions' losses are wanted in float64.
        threads: the most that there are for it.
        dtypes: of all tensors, in the order of cross_entropy.run.
    """
    rows, size = x.outer * x.inner, 8 if dtypes[0] == torch.float64 else 4
    loop = _loop_for(x, probability is not None, dtypes[0])
    pieces = max(rows * -(-x.classes // SEGMENT) if loop is softmax_long else rows, 1)
    parts = min(threads, pieces)
    ordered = (*dtypes[:5], torch.float64, *dtypes[6:])
    launch = _launcher(loop, over, capped, squared, *ordered)
    start = LINE + (0 if exact else 8 * apart.py_func(rows))
    if loop is not softmax_tiles:
        t = probability or x
        lines, line, copies = 3, parts * GROUP, parts
        if loop is softmax_long:
            lines, line, copies = 4, pieces, rows
        # Logits that the gradient is written over have to be there until all of a row are read.
        in_place = not over and _in_place(dtypes[0], dtypes[6])
        blocks, row = (apart.py_func(n) for n in (-(-x.classes // BLOCK), x.classes))
        shifts = start + 8 * lines * line
        exps = shifts + copies * blocks * size
        end = exps if in_place else exps + copies * row * size
        offsets = (shifts, None if in_place else exps, *range(start, shifts, 8 * line))
        strides = (x.outer_stride, x.inner_stride, t.outer_stride, t.inner_stride)
        return Schedule(loop, launch, parts, end, offsets, (x.classes, x.inner, rows, *strides))
    width, pitch = _tile(x, size)
    line, g = parts * pitch, dense_axis(x)
    numbers = start + line * 6 * 8  # those of eight bytes come first, for their alignment
    slopes = numbers + line * x.classes * size
    first = slopes + line * x.classes * size if capped else slopes
    end = first + 4 * line * size
    offsets = (
        start, slopes if capped else None, numbers, *range(first, end, line * size),
        *range(start + line * 8, numbers, line * 8),
    )  # fmt: skip
    sizes = (
        x.classes, x.inner, rows, x.outer_stride, x.inner_stride, x.class_stride, g.outer_stride,
        g.inner_stride, g.class_stride, width, pitch,
    )  # fmt: skip
    return Schedule(loop, launch, parts, end, offsets, sizes)


def _loop_for(x: ClassAxis, soft: bool, dtype: torch.dtype | None) -> Any:
    """soft: whether the target is probabilities, which have to lie as the logits."""
    size = 8 if dtype == torch.float64 else 4 if dtype == torch.float32 else 2
    if x.class_stride != 1 or (not soft and x.classes < LONG_ROW[size]):
        return softmax_tiles
    few = x.outer * x.inner < FEW_ROWS and x.classes > 2 * SEGMENT
    return softmax_long if few else softmax_rows


@functools.cache
def _launcher(
    loop: Any, over: bool, capped: bool, squared: bool, *dtypes: torch.dtype | None
) -> Launcher:
    """Its form of these dtypes, in the order of cross_entropy.run.

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
        return Launcher(loop, *slots, double, scratch[0], exps, *lines, kept_totals, *last)
    del slots[7], slots[2]
    free = pointer("int64", 2), pointer(compute, 7, compute) if capped else types.none
    last = (double, double, double, number, *extras, *[types.intp] * 15)
    return Launcher(loop, *slots, double, *free, *scratch, kept_tops, kept_totals, *last)


def _in_place(input: torch.dtype | None, grad: torch.dtype | None) -> bool:
    """Whether a gradient's memory can hold intermediate numbers, or none is wanted."""
    return grad is None or (grad == input and grad.itemsize > 2)


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
