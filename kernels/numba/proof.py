"""The proof by compiled code that a step's tensors are what they were; see fastopt.optim._proof."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numba.core import types
from torch import Tensor

from ..tables import BYTES, CELL, DIFFERENT, EMPTY, ITEMSIZE, KNOWN, MOVED, OTHERS, OWNER, SAME
from .compiler import kernel, locked_entry, pointer, specialise
from .pointer import at, load, store
from .tensors import (
    INFERENCE,
    NEGATED,
    WORDS,
    address_of,
    are_there,
    bump_versions,
    fetch_lines,
    fetch_storage,
    fetch_tensor,
    length,
    record_tensors,
    same_objects,
    same_tensor,
    torch_functions,
)

__all__ = ["Items", "Words", "available", "increment_versions"]

#: How many tensors before their turn what is known of them is fetched.
AHEAD = 8
#: Cache lines of a tensor that are fetched before a step, from where they were in the last one;
#: and of a dict of states.
NOTED, DICT = 3, 4
_TABLE_AT = 32  # where a dict has its table
#: Fewer tensors than this are not worth the call.
MANY = 32


@kernel
def overlap(starts: Any, ends: Any, spans: int, begin: int, size: int) -> bool:
    """Whether [begin, begin + size) overlaps one of the spans, sorted and apart."""
    low, high = 0, spans  # the first span that ends behind the beginning
    while low < high:
        middle = (low + high) // 2
        if load(ends, middle) > begin:
            high = middle
        else:
            low = middle + 1
    return low < spans and load(starts, low) < begin + size


@kernel
def sort_spans(written: Any, writes: int, starts: Any, ends: Any, count: Any) -> bool:
    """Write down what memory a step writes to, in order; whether it overlaps nowhere."""
    spans = 0
    for i in range(writes):
        begin, size = load(written, KNOWN * writes + i), load(written, BYTES * writes + i)
        if begin != 0 and size != 0:
            store(starts, spans, begin)
            store(ends, spans, begin + size)
            spans += 1
    store(count, 0, spans)
    gap = 1
    while 3 * gap < spans:
        gap = 3 * gap + 1
    while gap > 0:  # a shell sort
        for i in range(gap, spans):
            begin, end = load(starts, i), load(ends, i)
            place = i
            while place >= gap and load(starts, place - gap) > begin:
                store(starts, place, load(starts, place - gap))
                store(ends, place, load(ends, place - gap))
                place -= gap
            store(starts, place, begin)
            store(ends, place, end)
        gap //= 3
    for i in range(spans - 1):  # noqa: SIM110 (compiled code has no generators)
        if load(ends, i) > load(starts, i + 1):
            return False
    return True


@kernel
def fetch_ahead(
    things: Any, i: int, count: int, words: Any, type_at: int, tensor_at: int, storage_at: int
) -> None:  # fmt: skip
    """While the tensor things[i] is asked, have fetched what the next ones will be asked for."""
    if i + AHEAD < count:
        fetch_tensor(load(things, i + AHEAD), load(things, i), words, type_at, tensor_at)
    if i + AHEAD // 2 < count:
        fetch_storage(
            load(things, i + AHEAD // 2), load(things, i), words, type_at, tensor_at, storage_at
        )


@kernel
def note(lines: Any, place: int, thing: int, tensor_at: int, autograd_at: int) -> None:
    """Where a tensor's Python object is, its C++ one and what autograd knows of it."""
    tensor = load(at(lines, thing + tensor_at), 0)
    known = load(at(lines, tensor + autograd_at), 0)
    store(lines, NOTED * place, thing)
    store(lines, NOTED * place + 1, tensor)
    store(lines, NOTED * place + 2, known if known != 0 else tensor)


@locked_entry
def look_at(
    written_list: int, grads_list: int, none: int, writes: int, written: Any, words: Any,
    tensors: int, grads: Any, grad_words: Any, starts: Any, ends: Any, count: Any, scratch: Any,
    scratch_at: int, functions: Any, type_at: int, tensor_at: int, items_at: int,
    storage_at: int, autograd_at: int, lines: Any,
) -> int:  # fmt: skip
    """What `Words.look` answers.

    Args:
        written_list, grads_list, none: addresses of two lists and of None.
        written, grads: the lines of what is written and of the gradients.
        words, grad_words: what is known of them.
        starts, ends, count: the spans of memory that is written, and their number.
        lines: gets addresses of what this has read, for `fetch_lines` before the next time.
    """
    items = at(grads, load(at(grads, grads_list + items_at), 0))
    answer = SAME
    for g in range(tensors):
        present = 0 if load(items, g) == none else 1
        if present != load(grads, OWNER * tensors + g):
            store(grads, OWNER * tensors + g, present)
            answer = OTHERS
    things, place = at(written, load(at(written, written_list + items_at), 0)), 0
    for i in range(writes):
        found = 0  # as of all whose parameter has no gradient, which a step leaves alone
        if load(grads, OWNER * tensors + load(written, OWNER * writes + i)) != 0:
            same = same_tensor(
                load(things, i), words, place, INFERENCE + NEGATED, scratch, scratch_at,
                functions, type_at, tensor_at, False,
            )  # fmt: skip
            if not same:
                return DIFFERENT
            fetch_ahead(things, i, writes, words, type_at, tensor_at, storage_at)
            note(lines, i, load(things, i), tensor_at, autograd_at)
            found = address_of(
                load(things, i), load(written, ITEMSIZE * writes + i),
                load(written, BYTES * writes + i), scratch, scratch_at, functions, tensor_at,
            )  # fmt: skip
            if found == 0:
                return DIFFERENT
        if found != load(written, KNOWN * writes + i):
            store(written, KNOWN * writes + i, found)
            store(at(written, load(written, CELL * writes + i)), 0, found)
            answer = max(answer, MOVED)
        place += length(words, place)
    if answer != SAME and not sort_spans(written, writes, starts, ends, count):
        return DIFFERENT
    spans, place = load(count, 0), 0
    for g in range(tensors):
        found = 0
        if load(grads, OWNER * tensors + g) != 0:
            same = same_tensor(
                load(items, g), grad_words, place, NEGATED, scratch, scratch_at, functions,
                type_at, tensor_at, False,
            )  # fmt: skip
            if not same:
                return DIFFERENT
            fetch_ahead(items, g, tensors, words, type_at, tensor_at, storage_at)
            note(lines, writes + g, load(items, g), tensor_at, autograd_at)
            size = load(grads, BYTES * tensors + g)
            found = address_of(
                load(items, g), load(grads, ITEMSIZE * tensors + g), size, scratch, scratch_at,
                functions, tensor_at,
            )  # fmt: skip
            if found == 0 or (size > 0 and overlap(starts, ends, spans, found, size)):
                return DIFFERENT
        store(grads, KNOWN * tensors + g, found)
        store(at(grads, load(grads, CELL * tensors + g)), 0, found)
        place += length(grad_words, place)
    return answer


class _Compiled:
    """The entry points of this module's kernels."""

    def __init__(self) -> None:
        index, number = pointer("int64", 0), types.intp
        self.record = specialise(
            record_tensors, index, number, index, number, index, number, index, number, number
        )
        self.look = specialise(
            look_at, number, number, number, number, index, index, number, index, index, index,
            index, index, index, number, index, number, number, number, number, number, index,
        )  # fmt: skip
        self.fetch = specialise(fetch_lines, index, number)
        self.same_objects = specialise(same_objects, number, number, index, number)
        self.bump = specialise(
            bump_versions, number, number, number, number, index, number, number, number, number
        )


@functools.cache
def _compiled() -> _Compiled:
    return _Compiled()


def _record(tensors: Sequence[Tensor], flags: int) -> np.ndarray:
    """What is to know of tensors."""
    asked = torch_functions()
    words = np.empty(sum(WORDS + 2 * t.dim() for t in tensors), np.int64)
    objects, scratch = np.fromiter(map(id, tensors), np.int64, len(tensors)), asked.scratch
    if not _compiled().record(
        objects.ctypes.data, len(tensors), words.ctypes.data, flags, scratch.ctypes.data,
        scratch.ctypes.data, asked.functions.ctypes.data, asked.type_at, asked.tensor_at,
    ):  # fmt: skip
        raise RuntimeError("torch did not say what these tensors are")
    return words


class Words:
    """What is known of a step's tensors. It keeps none of them."""

    def __init__(
        self, written: Sequence[Tensor], grads: Sequence[tuple[Tensor, torch.dtype | None]],
        written_lines: np.ndarray, grad_lines: np.ndarray, spans: np.ndarray, count: np.ndarray,
        states: Sequence[dict[str, Any]],
    ) -> None:  # fmt: skip
        """Arguments as those of fastopt.optim._proof.Proof, its lines, spans and their number."""
        asked = torch_functions()
        known, expected = (
            _record(written, INFERENCE + NEGATED),
            _record([g for g, _ in grads], NEGATED),
        )
        place = 0
        for tensor, dtype in grads:
            if dtype is not None:  # none is there: one like its parameter, of this dtype
                like = _record([torch.empty(0, dtype=dtype, device=tensor.device)], NEGATED)
                expected[place], expected[place + 2] = like[0], like[2]
            place += WORDS + 2 * tensor.dim()
        noted = np.zeros(NOTED * (len(written) + len(grads)), np.int64)
        lines = np.concatenate((_lines_of([d for d in states if type(d) is dict]), noted))
        self._arrays = known, expected, written_lines, grad_lines, spans, count, lines
        self._lines = lines.ctypes.data, len(lines) if len(grads) >= MANY else 0
        scratch = asked.scratch.ctypes.data
        self._arguments = (
            id(None), len(written), written_lines.ctypes.data, known.ctypes.data, len(grads),
            grad_lines.ctypes.data, expected.ctypes.data, spans[0].ctypes.data,
            spans[1].ctypes.data, count.ctypes.data, scratch, scratch,
            asked.functions.ctypes.data, asked.type_at, asked.tensor_at, asked.items_at,
            asked.storage_at, asked.autograd_at,
            lines[-len(noted) :].ctypes.data,
        )  # fmt: skip
        self._look = _compiled().look

    def fetch(self) -> None:
        """Have fetched what the last step has read of its tensors.

        A training step's model has emptied the caches, and who follows one object to the next
        waits for memory each time.
        """
        lines, count = self._lines
        if count:
            _compiled().fetch(lines, count)

    def look(self, written: list[Any], grads: list[Any]) -> int:
        """What holds of a step's objects, None for a gradient that isn't there; see tables.py."""
        answer: int = self._look(id(written), id(grads), *self._arguments)
        return answer


def _lines_of(states: Sequence[dict[str, Any]]) -> np.ndarray:
    """Addresses of some dicts, and of their tables' first lines."""
    objects = np.fromiter(map(id, states), np.int64, len(states))
    tables = [ctypes.c_int64.from_address(id(d) + _TABLE_AT).value for d in states]
    offsets = 64 * np.arange(DICT - 1)
    return np.column_stack([objects, np.array(tables)[:, None] + offsets]).ravel()


class Items:
    """Which objects a list had. It keeps none of them."""

    def __init__(self, things: list[Any]) -> None:
        self._ids = np.fromiter(map(id, things), np.int64, len(things))
        self._arguments = torch_functions().items_at, self._ids.ctypes.data, len(things)
        self._same = _compiled().same_objects

    def are(self, things: list[Any]) -> bool:
        """Whether a list has these objects, in this order."""
        same: bool = len(things) == self._arguments[2] and self._same(id(things), *self._arguments)
        return same


@functools.cache
def _bump_arguments() -> tuple[int, ...]:
    asked = torch_functions()
    return (
        asked.bump, asked.functions.ctypes.data, asked.type_at, asked.tensor_at, id(Tensor),
        id(torch.nn.Parameter),
    )  # fmt: skip


def increment_versions(tensors: list[Tensor]) -> bool:
    """Each tensor's version by one; False, and nothing done, where that isn't safe.

    Torch's function ends the process if a tensor has none, as those of inference mode.
    """
    items_at, count = torch_functions().items_at, len(tensors)
    done: bool = _compiled().bump(id(tensors), items_at, count, *_bump_arguments())
    return done


@functools.cache
def available() -> bool:
    """Whether torch has here what is needed, and its answers are right."""
    return are_there() and _are_right(_samples()) and _finds_addresses(_samples(), _samples())


def _samples() -> list[Tensor]:
    with torch.inference_mode(False):
        samples = [
            torch.nn.Parameter(torch.empty(3, 4, device="cpu").t()),
            torch.empty((), device="cpu"),
            torch.empty(2, 0, 3, dtype=torch.float64, device="cpu"),
            torch._neg_view(torch.empty(5, dtype=torch.bfloat16, device="cpu")[1:]),
        ]
    with torch.inference_mode():
        samples.append(torch.empty(2, device="cpu"))
    return samples


def _are_right(samples: list[Tensor]) -> bool:
    all_words = _record(samples, INFERENCE + NEGATED)
    words = iter(all_words.tolist())
    for t in samples:
        kind, layout, _, device, index, dim, flags = itertools.islice(words, WORDS)
        layouts = list(itertools.islice(words, 2 * t.dim()))
        if (kind, dim) != (id(type(t)), t.dim()):
            return False
        if flags != NEGATED * t.is_neg() + INFERENCE * t.is_inference():
            return False
        if layouts != [*t.shape, *t.stride()] or (layout, device, index) != tuple(
            all_words[[1, 3, 4]]
        ):
            return False
    before = [t._version for t in samples[:-1]]
    if increment_versions(samples) or not increment_versions(samples[:-1]):
        return False
    if [t._version for t in samples[:-1]] != [version + 1 for version in before]:
        return False
    items = Items(samples)
    return items.are(samples) and not items.are(samples[::-1]) and not items.are(samples[1:])


def _finds_addresses(written: list[Tensor], grads: list[Tensor]) -> bool:
    count = len(written)
    lines, cells = np.zeros((2, 5, count), np.int64), np.zeros((2, count), np.int64)
    for k, tensors in enumerate((written, grads)):
        lines[k][ITEMSIZE] = [t.itemsize for t in tensors]
        lines[k][BYTES] = [t.numel() * t.itemsize for t in tensors]
        lines[k][CELL] = cells[k].ctypes.data + 8 * np.arange(count)
    lines[0][OWNER] = np.arange(count)
    spans = np.zeros((2, count), np.int64), np.zeros(1, np.int64)
    words = Words(written, [(t, None) for t in grads], lines[0], lines[1], *spans, [])
    answers = [words.look(written, grads) for _ in range(2)]
    expected = [[t.data_ptr() if t.numel() else EMPTY for t in ts] for ts in (written, grads)]
    return answers == [OTHERS, SAME] and bool(cells.tolist() == expected)
