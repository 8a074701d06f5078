"""Where the tensors of a list are, asked by compiled code in one go.

A proof (proof.py) knows what a step's tensors were. A function that is given a list of gradients
knows nothing, and need not: dense tensors of one dtype on one device are all that it can serve.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba.core import types
from torch import Tensor

from ..tables import BYTES, KNOWN
from .compiler import kernel, locked_entry, pointer, specialise
from .pointer import at, load, store
from .proof import available, sort_spans
from .tensors import (
    DIM,
    FACTS,
    IS_INFERENCE,
    IS_NEG,
    SIZES,
    STRIDES,
    address_of,
    ask,
    ask_whether,
    torch_functions,
)

__all__ = ["available", "survey"]


@kernel
def dense_size(sizes: Any, strides: Any, dim: int) -> int:
    """How many elements a tensor has; -1 if they leave gaps or overlap."""
    total = 1
    for d in range(dim):
        total *= load(sizes, d)
    expected = 1
    for d in range(dim - 1, -1, -1):  # the usual order
        if load(strides, d) == expected:
            expected *= load(sizes, d)
        elif load(sizes, d) != 1:
            break
    if total == 0 or expected == total:
        return total
    expected = 1
    for _ in range(dim):  # any other: each axis begins where those inside of it end
        inner = expected
        for d in range(dim):
            if load(sizes, d) != 1 and load(strides, d) == expected:
                expected *= load(sizes, d)
        if expected == inner:
            break
    return total if expected == total else -1


@locked_entry
def survey_list(
    things: int, items_at: int, count: int, itemsize: int, apart: bool, lines: Any, offsets: Any,
    starts: Any, ends: Any, facts: Any, scratch: Any, scratch_at: int, functions: Any,
    type_at: int, tensor_at: int, tensor: int, parameter: int,
) -> bool:  # fmt: skip
    """What `survey` answers.

    Args:
        things: the list's address.
        apart: whether no two may share memory.
        lines: as those of a proof, of which two are written.
        starts, ends, facts: room.
        tensor, parameter: the two types that they may be of.
    """
    items = at(lines, load(at(lines, things + items_at), 0))
    store(offsets, 0, 0)
    for i in range(count):
        thing = load(items, i)
        kind = load(at(lines, thing + type_at), 0)
        if kind != tensor and kind != parameter:
            return False
        dim = 0
        for k in range(FACTS):
            store(scratch, 0, 0)  # some answers have four bytes only
            if ask(load(functions, k), thing + tensor_at, scratch_at) != 0:
                return False
            dim = load(scratch, 0)
            if i == 0:
                store(facts, k, dim)
            elif k != DIM and load(facts, k) != dim:
                return False
        if ask_whether(load(functions, IS_NEG), thing + tensor_at):
            return False
        if ask_whether(load(functions, IS_INFERENCE), thing + tensor_at):
            return False
        size = 1
        if dim > 0:
            if ask(load(functions, SIZES), thing + tensor_at, scratch_at) != 0:
                return False
            sizes = at(lines, load(scratch, 0))
            if ask(load(functions, STRIDES), thing + tensor_at, scratch_at) != 0:
                return False
            size = dense_size(sizes, at(lines, load(scratch, 0)), dim)
        if size < 0:
            return False
        address = address_of(thing, itemsize, size, scratch, scratch_at, functions, tensor_at)
        if address == 0:
            return False
        store(lines, KNOWN * count + i, address)
        store(lines, BYTES * count + i, size * itemsize)
        store(offsets, i + 1, load(offsets, i) + size)
    # The number of spans goes where nobody looks any more.
    return not apart or sort_spans(lines, count, starts, ends, facts)


@functools.cache
def _compiled() -> Any:
    index, number = pointer("int64", 0), types.intp
    return specialise(
        survey_list, number, number, number, number, types.boolean, index, index, index, index,
        index, index, number, index, number, number, number, number,
    )  # fmt: skip


def survey(tensors: list[Tensor], apart: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Addresses and running counts of elements, as kernels.gradients.Gradients has them.

    Args:
        tensors: some, the first of them strided.
        apart: whether no two may share memory.

    Returns:
        None unless all are plain and dense, of the first one's dtype and device.
    """
    asked, count = torch_functions(), len(tensors)
    room = np.empty(8 * count + 1 + FACTS, np.int64)
    begin = room.ctypes.data
    places = [begin + 8 * k for k in (0, 5 * count, 6 * count + 1, 7 * count + 1, 8 * count + 1)]
    scratch = asked.scratch.ctypes.data
    if not _compiled()(
        id(tensors), asked.items_at, count, tensors[0].itemsize, apart, *places, scratch, scratch,
        asked.functions.ctypes.data, asked.type_at, asked.tensor_at, id(Tensor),
        id(torch.nn.Parameter),
    ):  # fmt: skip
        return None
    return room[KNOWN * count : (KNOWN + 1) * count], room[5 * count : 6 * count + 1]
