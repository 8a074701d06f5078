"""The norm of all gradients together, and their scaling or clamping, by a table of addresses.

A program has one block of one tensor, which it looks up in a table on the device, as in an
optimizer's step. The norm's programs leave a number each, which one more program folds in an
order that depends on their count alone. Scaling asks for the norm on the device: where there is
nothing to scale a program ends there, and the host never waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import torch
import triton.language as tl

from ..gradients import Gradients
from .compiler import TYPES, as_number, compute_dtype, device_function, kernel, launch, number
from .device_table import DeviceTable, current_stream
from .reduction import BLOCK as FOLDED
from .reduction import sum_all
from .updates import entries
from .vector_math import quotient, root

__all__ = ["clamp_all", "scale_all", "total_norm"]

THREADS = 256
# Sets of sizes whose tables stay on the device; a model has one or two.
_KEPT = 8


@device_function
def block_at(table, tensor_of, tensors, BLOCK: tl.constexpr):
    """Of this program's block: its tensor's address, its offset, what is left from there on.

    And whether the block is whole, and the address a multiple of 16.
    """
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    address, count, first, aligned = entries(table, tensor, tensors, 4)
    begin = (program - first) * BLOCK
    return address, begin, count - begin, (begin + BLOCK <= count) & (aligned != 0)


@device_function
def fold(values, ORDER: tl.constexpr):
    """The sum of squares or of sizes, or the largest size, NaN if one is."""
    if ORDER == 2:
        return tl.sum(values * values)
    elif ORDER == 1:
        return tl.sum(tl.abs(values))
    else:
        missing = tl.sum((values != values).to(tl.int32))
        return tl.where(missing == 0, tl.max(tl.abs(values)), float("nan"))


@kernel
def fold_blocks(
    table, tensor_of, tensors, partials, DTYPE: tl.constexpr, ORDER: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    address, begin, left, whole = block_at(table, tensor_of, tensors, BLOCK)
    start = address.to(tl.pointer_type(DTYPE))
    lanes = tl.arange(0, BLOCK)
    if whole:
        values = tl.load(tl.multiple_of(start, 16) + begin + lanes).to(COMPUTE)
    else:
        values = tl.load(start + begin + lanes, mask=lanes < left, other=0.0).to(COMPUTE)
    tl.store(partials + tl.program_id(0), fold(values, ORDER))


@kernel
def finish_norm(partials, count, norm, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    if ORDER == 2:
        found = root(sum_all(partials, count, BLOCK))
    elif ORDER == 1:
        found = sum_all(partials, count, BLOCK)
    else:
        lanes = tl.arange(0, BLOCK)
        most = tl.zeros([BLOCK], partials.dtype.element_ty)
        for begin in range(0, count, BLOCK):
            here = tl.load(partials + begin + lanes, mask=begin + lanes < count, other=0.0)
            most = tl.where((here > most) | (here != here), here, most)
        found = fold(most, ORDER)
    tl.store(norm, found)


@kernel(do_not_specialize=["most"])
def scale_blocks(
    table, tensor_of, tensors, norm, most, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply by most / (norm + 1e-6), unless that is 1 or more; NaN isn't."""
    factor = quotient(as_number(most, COMPUTE), tl.load(norm).to(COMPUTE) + 1e-6)
    if factor >= 1.0:
        return
    address, begin, left, whole = block_at(table, tensor_of, tensors, BLOCK)
    start = address.to(tl.pointer_type(DTYPE))
    lanes = tl.arange(0, BLOCK)
    if whole:
        places = tl.multiple_of(start, 16) + begin + lanes
        tl.store(places, tl.load(places).to(COMPUTE) * factor)
    else:
        places = start + begin + lanes
        values = tl.load(places, mask=lanes < left).to(COMPUTE)
        tl.store(places, values * factor, mask=lanes < left)


@device_function
def clamped(values, most):
    """Within [-most, most]; NaN stays."""
    values = tl.where(values < -most, -most, values)
    return tl.where(values > most, most, values)


@kernel(do_not_specialize=["most"])
def clamp_blocks(
    table, tensor_of, tensors, most, DTYPE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    most = as_number(most, COMPUTE)
    address, begin, left, whole = block_at(table, tensor_of, tensors, BLOCK)
    start = address.to(tl.pointer_type(DTYPE))
    lanes = tl.arange(0, BLOCK)
    if whole:
        places = tl.multiple_of(start, 16) + begin + lanes
        tl.store(places, clamped(tl.load(places).to(COMPUTE), most))
    else:
        places = start + begin + lanes
        values = tl.load(places, mask=lanes < left).to(COMPUTE)
        tl.store(places, clamped(values, most), mask=lanes < left)


def block_size(dtype: torch.dtype) -> int:
    """Elements of a program: four 16-byte loads under way for each thread, of halves two."""
    return THREADS * (8 if dtype == torch.float64 else 16)


class _Tables:
    """Of tensors of these sizes: which program has which block, and where the tensors are.

    Of each tensor a table has the address, the elements, the first block, and whether the address
    is a multiple of 16.
    """

    def __init__(self, offsets: np.ndarray, block: int, device: torch.device) -> None:
        sizes = np.diff(offsets)
        blocks = -(-sizes // block)
        self.blocks, self._lock = int(blocks.sum()), threading.Lock()
        lines = np.zeros((4, len(sizes)), np.int64)
        lines[1], lines[2] = sizes, np.cumsum(blocks) - blocks
        self._lines = DeviceTable(lines, device)
        tensor_of = np.repeat(np.arange(len(sizes), dtype=np.int32), blocks)
        self._tensor_of = DeviceTable(tensor_of, device)

    def at(self, addresses: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, int]:
        """What a kernel is given, with the tensors at these addresses."""
        with self._lock:
            host = self._lines.host
            host[0], host[3] = addresses, addresses % 16 == 0
            return self._lines.current(), self._tensor_of.current(), len(addresses)


_kept: OrderedDict[object, _Tables] = OrderedDict()
_kept_lock = threading.Lock()


def _tables(grads: Gradients) -> _Tables:
    """Kept by the sizes, and by the stream that their memory belongs to."""
    device, block = grads.device, block_size(grads.dtype)
    key = device, current_stream(device), block, grads.offsets.tobytes()
    with _kept_lock:
        found = _kept.pop(key, None) or _Tables(grads.offsets, block, device)
        _kept[key] = found
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)
    return found


def total_norm(grads: Gradients, order: float) -> torch.Tensor:
    """The norm of all, a 0-d tensor. order: one of gradients.ORDERS."""
    compute, tables = compute_dtype(grads.dtype), _tables(grads)
    norm = torch.empty((), dtype=compute, device=grads.device)
    partials = torch.empty(tables.blocks, dtype=compute, device=grads.device)
    kind = 0 if order == float("inf") else int(order)
    launch(
        fold_blocks, (tables.blocks,), grads.device, THREADS, *tables.at(grads.addresses),
        partials, DTYPE=TYPES[grads.dtype], ORDER=kind, COMPUTE=TYPES[compute],
        BLOCK=block_size(grads.dtype),
    )  # fmt: skip
    launch(
        finish_norm, (1,), grads.device, 512, partials, tables.blocks, norm, ORDER=kind,
        BLOCK=FOLDED,
    )  # fmt: skip
    return norm


def scale_all(grads: Gradients, most: float, norm: torch.Tensor) -> None:
    """Multiply by most / (norm + 1e-6), if that is not 1 or more: then nothing is even read."""
    norm = norm.to(grads.device, non_blocking=True)
    _change(scale_blocks, grads, norm, most)


def clamp_all(grads: Gradients, most: float) -> None:
    """Bring every element into [-most, most]; NaN stays."""
    _change(clamp_blocks, grads, None, most)


def _change(function: object, grads: Gradients, norm: torch.Tensor | None, most: float) -> None:
    compute, tables = compute_dtype(grads.dtype), _tables(grads)
    launch(
        function, (tables.blocks,), grads.device, THREADS, *tables.at(grads.addresses),
        *(() if norm is None else (norm,)), number(most, compute), DTYPE=TYPES[grads.dtype],
        COMPUTE=TYPES[compute], BLOCK=block_size(grads.dtype),
    )  # fmt: skip
