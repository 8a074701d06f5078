"""Gradient buffers that keep their pages.

A large tensor allocated afresh each step is mapped afresh each step, and touching its
pages first costs more than computing what goes into them. So large buffers come from
here, and return when torch frees the tensor's storage: torch holds the NumPy array that
owns the memory, and the array's end calls back. A tensor that the user keeps simply never returns.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import numpy as np
import torch

# Below this malloc serves from its own heap, whose pages are already there.
POOLED_BYTES = 1 << 20
# Buffers kept for reuse: a training step has one or two in flight per loss.
KEPT_BUFFERS = 4
_ALIGNMENT = 64
# What a thread keeps for its launches' intermediate numbers.
SCRATCH_BYTES = 1 << 19

# append and popleft are atomic: a finalizer may run in the middle of `empty`.
_free: deque[np.ndarray] = deque(maxlen=KEPT_BUFFERS)


def is_pooled(tensor: torch.Tensor) -> bool:
    """Whether memory for a tensor like this one comes from the pool."""
    return tensor.numel() * tensor.itemsize >= POOLED_BYTES


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor, its memory reused where that pays."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < POOLED_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = _take(size)
    # A new array object for each loan: its end, not that of the memory, ends the loan.
    loan = memory[:size]
    weakref.finalize(loan, _free.append, memory).atexit = False
    return torch.from_numpy(loan).view(dtype).view(shape)


class _Scratch(threading.local):
    memory: np.ndarray | None = None
    address = 0


_scratch = _Scratch()


def scratch(size: int) -> tuple[int, object]:
    """Uninitialised memory for one launch: its address, and what has to live as long.

    A small one is this thread's own, and the same one each time.
    """
    if size > SCRATCH_BYTES:
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return memory.data_ptr(), memory
    if _scratch.memory is None:
        _scratch.memory = np.empty(SCRATCH_BYTES + _ALIGNMENT, np.uint8)
        _scratch.address = -(-_scratch.memory.ctypes.data // _ALIGNMENT) * _ALIGNMENT
    return _scratch.address, _scratch.memory


def _take(size: int) -> np.ndarray:
    for _ in range(len(_free)):
        try:
            memory = _free.popleft()
        except IndexError:  # another thread took it
            break
        if size <= memory.size <= 2 * size:
            return memory
        _free.append(memory)
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size]


def empty_cache() -> None:
    """Give the buffers that wait for reuse back to the system."""
    _free.clear()
