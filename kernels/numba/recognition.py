"""The same call again: told by compiled code, in one question.

Asked from Python, what a call's tensors are takes some thirty questions, and in a training step,
whose model has emptied the caches, each of them waits for memory.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba.core import types
from torch import Tensor

from .compiler import kernel, locked_entry, pointer, specialise
from .pointer import at, load
from .tensors import (
    LAYERS,
    MODES,
    NEGATED,
    REQUIRES_GRAD,
    TRACE,
    WORDS,
    address_of,
    answer_of,
    are_there,
    ask_whether,
    length,
    same_tensor,
    torch_functions,
)

__all__ = ["Recognition"]


@kernel
def nothing_around(states: Any) -> bool:
    """Whether no mode, no transform and no trace of torch wants to see what is called."""
    for k in range(MODES):
        if answer_of(load(states, k)) != 0:
            return False
    layers = at(states, answer_of(load(states, LAYERS)))  # their vector: its begin, its end
    trace = at(states, answer_of(load(states, TRACE)))  # a pointer to one, or to nothing
    nothing: bool = load(layers, 0) == load(layers, 1) and load(trace, 0) == 0
    return nothing


@locked_entry
def same_call(
    things: int, recording: bool, items_at: int, count: int, objects: Any, needs: Any,
    itemsizes: Any, words: Any, scratch: Any, scratch_at: int, functions: Any, states: Any,
    type_at: int, tensor_at: int,
) -> bool:  # fmt: skip
    """What `Recognition.fits` answers; when recording, what is to know of tensors is written down.

    Args:
        things: the address of a tuple of `count` objects, which are in it from items_at on.
        objects: the address of each that is no tensor, 0 for a tensor.
        needs: whether a tensor requires a gradient.
        itemsizes: of a tensor.
        words: what is known of the tensors.
        functions, states: addresses of the functions that are asked.
    """
    if not recording and not nothing_around(states):
        return False
    place = 0
    for i in range(count):
        thing = load(at(words, things + items_at), i)
        if load(objects, i) != 0:
            if thing != load(objects, i):
                return False
            continue
        same = same_tensor(
            thing, words, place, NEGATED, scratch, scratch_at, functions, type_at, tensor_at,
            recording,
        )  # fmt: skip
        if not same:
            return False
        follows = ask_whether(load(states, REQUIRES_GRAD), load(at(words, thing + tensor_at), 0))
        if follows != (load(needs, i) != 0):
            return False
        if address_of(thing, load(itemsizes, i), 1, scratch, scratch_at, functions, tensor_at) == 0:
            return False
        place += length(words, place)
    return True


@functools.cache
def _compiled() -> Any:
    index, number = pointer("int64", 0), types.intp
    return specialise(
        same_call, number, types.boolean, number, number, index, index, index, index, index,
        number, index, index, number, number,
    )  # fmt: skip


class Recognition:
    """What is to know of a call's arguments, to be compared with those of later calls.

    It keeps those alive that are no tensors, so that no other object has their addresses.

    Args:
        things: all arguments, and the names of those that were given by name. Its tensors are
            plain, have elements and memory, and are not lazily negated.

    Raises:
        RuntimeError: torch did not say what a tensor is.
    """

    def __init__(self, things: tuple[Any, ...]) -> None:
        asked = torch_functions()
        tensors = [t for t in things if isinstance(t, Tensor)]
        is_tensor = [isinstance(t, Tensor) for t in things]
        objects = [0 if tensor else id(t) for t, tensor in zip(things, is_tensor, strict=True)]
        needs = [tensor and t.requires_grad for t, tensor in zip(things, is_tensor, strict=True)]
        sizes = [t.itemsize if tensor else 0 for t, tensor in zip(things, is_tensor, strict=True)]
        arrays = [np.array(column, np.int64) for column in (objects, needs, sizes)]
        arrays.append(np.empty(sum(WORDS + 2 * t.dim() for t in tensors), np.int64))
        self._kept = [t for t, tensor in zip(things, is_tensor, strict=True) if not tensor], arrays
        self._count = len(things)
        self._arguments = (
            asked.tuple_items_at, len(things), *[array.ctypes.data for array in arrays],
            asked.scratch.ctypes.data, asked.scratch.ctypes.data, asked.functions.ctypes.data,
            asked.states.ctypes.data, asked.type_at, asked.tensor_at,
        )  # fmt: skip
        self._ask = _compiled()
        if not self._ask(id(things), True, *self._arguments):
            raise RuntimeError("torch did not say what these tensors are")

    def fits(self, things: tuple[Any, ...]) -> bool:
        """Whether a call with these is the same, its tensors' elements and addresses aside."""
        same: bool = len(things) == self._count and self._ask(id(things), False, *self._arguments)
        return same


@functools.cache
def available() -> bool:
    """Whether torch has here what is needed, and its answers are right."""
    return are_there() and _is_right()


def _is_right() -> bool:
    one, other = torch.empty(3, 4, device="cpu"), torch.empty(3, 4, device="cpu")
    known = Recognition((one, "a"))
    others = (
        other[:2], other.view(12), other.t().contiguous().t(), other.double(), other.to("meta"),
        torch._neg_view(other), torch.nn.Parameter(other), other.clone().requires_grad_(),
    )  # fmt: skip
    found = [known.fits((one.clone(), "a")), known.fits((one, "b"))]
    found += [known.fits((t, "a")) for t in others]
    with torch.overrides.BaseTorchFunctionMode():
        found.append(known.fits((one, "a")))
    with torch.utils._python_dispatch.TorchDispatchMode():  # type: ignore[no-untyped-call]
        found.append(known.fits((one, "a")))
    inside: list[bool] = []

    def ask(x: Tensor) -> Tensor:
        inside.append(known.fits((one, "a")))
        return x

    torch.func.vmap(ask)(torch.empty(2, device="cpu"))
    wrong = [*found[1:], *inside]
    return found[0] and known.fits((one, "a")) and not any(wrong)
