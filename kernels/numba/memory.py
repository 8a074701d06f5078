"""Large buffers that keep their pages.

A large tensor allocated afresh each step is mapped afresh each step, and touching its pages
first costs more than computing what goes into them. So large buffers are remembered here, and
one that nobody else holds any more is handed out again. They are torch's own memory, so whoever
has one may resize or release it. Torch counts the holders of a storage, views and what autograd
saves included: only where this module is the last of them, at the address where the storage was
made, nobody can see the memory.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Below this malloc serves from its own heap, whose pages are already there.
POOLED_BYTES = 1 << 20
# Buffers that are remembered, in use or not: a training step has one or two in flight per loss.
KEPT_BUFFERS = 4
_ALIGNMENT = 64
# What a thread keeps for its launches' intermediate numbers.
SCRATCH_BYTES = 1 << 19


class _Buffer(NamedTuple):
    owner: torch.Tensor  # bytes; never handed out itself
    address: int  # where they were at first; shared memory, for one, is elsewhere
    size: int


# append and popleft are atomic: whoever has popped a buffer is the only one to examine it.
_buffers: deque[_Buffer] = deque(maxlen=KEPT_BUFFERS)


@functools.cache
def kept_bytes() -> int:
    """What the buffers may have together: an eighth of the memory of the machine or container."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call on this system
        memory = 16 << 30
    with contextlib.suppress(OSError, ValueError):  # where there is no such limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory // 8


def is_pooled(tensor: torch.Tensor) -> bool:
    """Whether memory for a tensor like this one comes from the pool."""
    return tensor.numel() * tensor.itemsize >= POOLED_BYTES


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor, its memory reused where that pays.

    Raises:
        RuntimeError: torch's, for want of memory, of which the pool keeps none by then.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < POOLED_BYTES or not _holders_are_counted():
        return _allocate(shape, dtype)
    buffer = _take(size)
    if buffer is None:
        owner = _allocate((size,), torch.uint8)
        buffer = _Buffer(owner, owner.data_ptr(), size)
    loan = _share(buffer.owner, shape, dtype)
    _remember(buffer)
    return loan


#: Tensors to make others like, which takes half the time of making them anew.
_models: dict[tuple[tuple[int, ...], torch.dtype], torch.Tensor] = {}


def _empty_as(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor of a shape as few have."""
    model = _models.get((shape, dtype))
    if model is None:
        model = _models[shape, dtype] = torch.empty(shape, dtype=dtype, device="cpu")
    return torch.empty_like(model)


def empty_number(dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor without dimensions."""
    return _empty_as((), dtype)


class _Scratch(threading.local):
    memory: torch.Tensor | None = None
    address = 0


_scratch = _Scratch()


def scratch(size: int) -> tuple[int, object]:
    """Uninitialised memory for one launch: its address, and what has to live as long.

    A small one is this thread's own, and the same one each time.
    """
    if size > SCRATCH_BYTES:
        memory = empty((size,), torch.uint8)
        return memory.data_ptr(), memory
    if _scratch.memory is None:
        memory = _allocate((SCRATCH_BYTES + _ALIGNMENT,), torch.uint8)
        _scratch.address = -(-memory.data_ptr() // _ALIGNMENT) * _ALIGNMENT
        _scratch.memory = memory
    return _scratch.address, _scratch.memory


def empty_cache() -> None:
    """Give the buffers that wait for reuse back to the system."""
    _buffers.clear()


def _allocate(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device="cpu")
    except RuntimeError:
        if not _buffers:
            raise
        empty_cache()
    return torch.empty(shape, dtype=dtype, device="cpu")


def _share(owner: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the owner's storage, and no view of the owner to autograd."""
    tensor = _empty_as((0,), dtype)
    tensor.set_(owner, 0, shape)  # type: ignore[call-overload]
    return tensor


def _take(size: int) -> _Buffer | None:
    """A buffer of a fitting size that nobody holds, and that is no longer remembered."""
    for _ in range(len(_buffers)):
        try:
            buffer = _buffers.popleft()
        except IndexError:  # another thread took it
            break
        if size <= buffer.size <= 2 * size and _holders(buffer.owner) == 1:
            if buffer.owner.data_ptr() == buffer.address:
                return buffer
        else:
            _buffers.append(buffer)
    return None


def _remember(buffer: _Buffer) -> None:
    """Keep a buffer, and forget the oldest where there are too many or too much."""
    room = kept_bytes() - buffer.size
    if room < 0:
        return
    while _buffers and sum([other.size for other in tuple(_buffers)]) > room:
        try:
            _buffers.popleft()
        except IndexError:
            break
    _buffers.append(buffer)


# Names of their own, for what each large tensor has to ask; None in a torch that has no such.
_storage_address: Any = getattr(torch._C, "_storage_address", None)
_use_count: Any = getattr(torch._C, "_storage_Use_Count", None)


def _holders(tensor: torch.Tensor) -> int:
    """How many tensors and others hold a tensor's storage.

    It must not be asked through a storage in Python, which would count for ever after.
    """
    count: int = _use_count(_storage_address(tensor))
    return count


@functools.cache
def _holders_are_counted() -> bool:
    """Whether this torch says how many hold a storage; without that nothing is used again."""
    try:
        owner = torch.empty(8, dtype=torch.uint8, device="cpu")
        counts = [_holders(owner)]
        loan = _share(owner, (2,), torch.float32)
        counts.append(_holders(owner))
        row = loan[1:].detach()
        counts.append(_holders(owner))
        del loan, row
        return [*counts, _holders(owner)] == [1, 2, 3, 1]
    except (AttributeError, TypeError, RuntimeError):
        return False
