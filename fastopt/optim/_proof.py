"""Whether tensors are what they were, and where they are."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.layout import is_released
from ..kernels.tables import (
    BYTES,
    CELL,
    DIFFERENT,
    EMPTY,
    ITEMSIZE,
    KNOWN,
    MOVED,
    OTHERS,
    OWNER,
    SAME,
)

__all__ = ["Items", "Proof", "increment_versions", "items_of"]


@functools.cache
def _compiled() -> Any:
    """The module that proves by compiled code, where numba and torch have what it needs."""
    try:
        from ..kernels.numba import proof
    except ImportError:
        return None
    return proof if proof.available() else None


class _Words(Protocol):
    def fetch(self) -> None: ...
    def look(self, written: list[Any], grads: list[Any]) -> int: ...


class Proof:
    """Of types, dtypes, devices, sizes, strides and memory of a step's tensors.

    It may say no where nothing that matters has changed, never yes where something has. It keeps
    no tensor: each step hands over those that the optimizer has at that time.
    """

    def __init__(
        self,
        written: Sequence[Tensor],
        owners: Sequence[int],
        grads: Sequence[tuple[Tensor, torch.dtype | None]],
        written_cells: np.ndarray,
        grad_cells: np.ndarray,
        states: Sequence[dict[str, Any]] = (),
    ) -> None:
        """
        Args:
            written: what a step writes to; dense.
            owners: of each the place of the gradient without which it is left alone.
            grads: each with None; or, where none is there, its parameter and the dtype that the
                gradient will have.
            written_cells, grad_cells: addresses of the int64 that get each one's address.
            states: where the optimizer has the states.
        """
        self._written, self._grads = _lines(written), _lines([g for g, _ in grads])
        self._written[OWNER], self._written[CELL] = owners, written_cells
        self._grads[CELL] = grad_cells
        for k, (like, dtype) in enumerate(grads):
            if dtype is not None:
                self._grads[ITEMSIZE, k] = dtype.itemsize
                self._grads[BYTES, k] = dtype.itemsize * like.numel()
        self._written[KNOWN] = -1
        self._spans, self._count = np.zeros((2, len(written)), np.int64), np.zeros(1, np.int64)
        make = _compiled().Words if _compiled() else _SlowWords
        words: _Words = make(
            written, grads, self._written, self._grads, self._spans, self._count, states
        )  # fmt: skip
        #: Has what the last step has read of its tensors fetched into the caches.
        self.fetch = words.fetch
        #: What holds of a step's objects (written, grads), None for a gradient that isn't there.
        self.look = words.look

    def addresses(self) -> np.ndarray:
        """Where a step's tensors are, of what is written and of the gradients."""
        return np.concatenate((self._written[KNOWN], self._grads[KNOWN]))

    def overlaps(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether one of these has a byte of what the step writes to."""
        starts, ends = self._spans[:, : self._count[0]]
        return any(((starts < end) & (begin < ends)).any() for begin, end in spans)


def _lines(tensors: Sequence[Tensor]) -> np.ndarray:
    lines = np.zeros((5, len(tensors)), np.int64)
    lines[ITEMSIZE] = [t.itemsize for t in tensors]
    lines[BYTES] = [t.numel() * t.itemsize for t in tensors]
    return lines


class _SlowWords:
    """The same in Python, where compiled code can't ask torch."""

    def __init__(
        self, written: Sequence[Tensor], grads: Sequence[tuple[Tensor, torch.dtype | None]],
        written_lines: np.ndarray, grad_lines: np.ndarray, spans: np.ndarray, count: np.ndarray,
        states: Sequence[dict[str, Any]],
    ) -> None:  # fmt: skip
        self._lines, self._spans, self._count = (written_lines, grad_lines), spans, count
        self._known = [_metadata(t, True) for t in written]
        self._expected = [_metadata(t, False, dtype) for t, dtype in grads]

    def fetch(self) -> None:
        pass

    def look(self, written: list[Any], grads: list[Any]) -> int:
        lines, grad_lines = self._lines
        present = np.array([g is not None for g in grads], np.int64)
        answer = SAME if np.array_equal(present, grad_lines[OWNER]) else OTHERS
        grad_lines[OWNER] = present
        for i, tensor in enumerate(written):
            found = 0
            if present[lines[OWNER, i]]:
                if _metadata(tensor, True) != self._known[i] or is_released(tensor):
                    return DIFFERENT
                found = tensor.data_ptr() if lines[BYTES, i] else EMPTY
            if found != lines[KNOWN, i]:
                lines[KNOWN, i] = found
                ctypes.c_int64.from_address(int(lines[CELL, i])).value = found
                answer = max(answer, MOVED)
        if answer != SAME and not self._sort_spans():
            return DIFFERENT
        starts, ends = self._spans[:, : self._count[0]]
        for k, tensor in enumerate(grads):
            found, size = 0, int(grad_lines[BYTES, k])
            if tensor is not None:
                if _metadata(tensor, False) != self._expected[k] or is_released(tensor):
                    return DIFFERENT
                found = tensor.data_ptr() if size else EMPTY
                if size and ((starts < found + size) & (found < ends)).any():
                    return DIFFERENT
            grad_lines[KNOWN, k] = found
            ctypes.c_int64.from_address(int(grad_lines[CELL, k])).value = found
        return answer

    def _sort_spans(self) -> bool:
        """Write down what memory a step writes to, in order; whether it overlaps nowhere."""
        begins, sizes = self._lines[0][KNOWN], self._lines[0][BYTES]
        there = np.flatnonzero((begins != 0) & (sizes != 0))
        there = there[np.argsort(begins[there])]
        self._count[0] = len(there)
        starts, ends = self._spans[:, : len(there)]
        starts[:] = begins[there]
        ends[:] = starts + sizes[there]
        return not (ends[:-1] > starts[1:]).any()


def _metadata(tensor: Any, written: bool, dtype: torch.dtype | None = None) -> Any:
    """What is to know of a tensor; dtype: of a gradient to come that is like this parameter."""
    if not isinstance(tensor, Tensor):
        return None
    strides = None
    if tensor.layout is torch.strided:  # the stride of a single element means nothing
        strides = [s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1]
    kind, dtype = (type(tensor), tensor.dtype) if dtype is None else (Tensor, dtype)
    inference = written and tensor.is_inference()
    return kind, dtype, tensor.device, tensor.is_neg(), inference, tensor.shape, strides


class Items(Protocol):
    """Which objects a list had. It keeps none of them."""

    def are(self, things: list[Any]) -> bool:
        """Whether a list has these objects, in this order."""
        ...


def items_of(things: list[Any]) -> Items:
    """What objects a list has now."""
    items: Items = _compiled().Items(things) if _compiled() else _SlowItems(things)
    return items


class _SlowItems:
    def __init__(self, things: list[Any]) -> None:
        self._ids = list(map(id, things))

    def are(self, things: list[Any]) -> bool:
        return list(map(id, things)) == self._ids


def increment_versions(tensors: list[Tensor]) -> None:
    """Tell autograd that the values of some tensors have changed.

    A tensor without a version (its values began in inference mode) is passed over in that mode;
    elsewhere torch raises.
    """
    if not (_compiled() and _compiled().increment_versions(tensors)):
        torch.autograd.graph.increment_version(tensors)
