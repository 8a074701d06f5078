"""A debug allocator: tensors whose memory ends, or begins, exactly at a page nobody may touch.

An access out of bounds crashes the process, as does a write to read-only memory or any use of
memory whose tensor is gone. So what uses this runs in a process of its own, see `run`.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import children
import numpy as np
import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
_NONE, _READ, _WRITE = 0, 1, 2  # PROT_NONE, PROT_READ, PROT_WRITE
_FIXED = 0x10  # MAP_FIXED
SUPPORTED = sys.platform == "linux"

if SUPPORTED:
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    _libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _call(function: Any, *args: Any) -> Any:
    result = function(*args)
    if result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), function.__name__)
    return result


def _map(size: int, address: int | None = None) -> int:
    """Map pages that nobody may touch, in place of others if there is an address."""
    fixed = 0 if address is None else _FIXED
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed
    result: int = _call(_libc.mmap, address, size, _NONE, flags, -1, 0)
    return result


class Guards:
    """Hands out guarded memory.

    Args:
        at_end: whether memory ends at its guard page; else it begins there. (What lies on the
            other side is the rest of a page.)
    """

    def __init__(self, at_end: bool) -> None:
        self._at_end = at_end

    def bytes(self, size: int) -> np.ndarray:
        """Memory, as bytes of no meaning (that make a NaN of any float)."""
        room = -(-size // PAGE) * PAGE
        base = _map(room + 2 * PAGE)
        first = base + PAGE
        if room:
            _call(_libc.mprotect, first, room, _READ | _WRITE)
        start = first + (room - size if self._at_end else 0)
        # One byte more than there is, as NumPy takes no empty buffer.
        memory = (ctypes.c_uint8 * (size + 1)).from_address(start)
        # Of arrays and their views this is the base. The pages are not given back when it ends:
        # no later mapping shall make a stale address valid again.
        weakref.finalize(memory, _map, room + 2 * PAGE, base).atexit = False
        array = np.frombuffer(memory, np.uint8)[:size]
        array.fill(0xFF)
        return array

    def empty(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Uninitialised and contiguous."""
        shape = torch.Size(shape)
        return torch.from_numpy(self.bytes(shape.numel() * dtype.itemsize)).view(dtype).view(shape)

    def copy(self, tensor: Tensor, read_only: bool = False) -> Tensor:
        """The same values in the same strides; the last element ends where the memory does."""
        tensor = tensor.detach()
        reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        count = reach + 1 if tensor.numel() else 0
        flat = self.empty((count,), tensor.dtype)
        ctypes.memmove(flat.data_ptr(), tensor.data_ptr(), count * tensor.itemsize)
        if read_only and count:
            first = flat.data_ptr() // PAGE * PAGE
            room = -(-(count * tensor.itemsize) // PAGE) * PAGE
            _call(_libc.mprotect, first, room, _READ)
        return flat.as_strided(tensor.shape, tensor.stride())

    def like(self, tensor: Tensor, device: Any = None, **options: Any) -> Tensor:
        """As torch.empty_like: dense strides are kept."""
        plain = _empty_like(tensor, device="meta", **options)
        return self.empty((plain.numel(),), plain.dtype).as_strided(plain.shape, plain.stride())

    def install(self) -> None:
        """Let all that kernels and optimizers allocate for themselves be guarded, for good."""
        from fastopt.kernels.numba import memory

        memory.POOLED_BYTES = 0
        memory.empty = self.empty

        def new_empty(tensor: Tensor, *shape: Any, dtype: Any = None, device: Any = None) -> Tensor:
            return self.empty(_sizes(shape), dtype or tensor.dtype)

        torch.Tensor.new_empty = new_empty
        torch.empty_like = self.like
        torch.zeros_like = lambda tensor, **options: self.like(tensor, **options).zero_()
        torch.zeros = lambda *shape, dtype=None, device=None: self.empty(
            _sizes(shape), dtype or torch.get_default_dtype()
        ).zero_()


_empty_like = torch.empty_like


def _sizes(shape: tuple[Any, ...]) -> Any:
    return shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape


class Progress:
    """Notes what is being tried where a crash can't wipe it out."""

    def __init__(self, file: str) -> None:
        self._file = open(file, "w")  # noqa: SIM115

    def __call__(self, *words: object) -> None:
        self._file.seek(0)
        self._file.write(" ".join(map(str, words)))
        self._file.truncate()
        self._file.flush()


def run(function: Callable[..., None], folder: Path, *args: Any, **env: str | None) -> None:
    """Call function(name of a file for Progress, *args) in a process, which must succeed."""
    file = folder / "progress"
    file.write_text("nothing yet")
    try:
        children.run(function, str(file), *args, **env)
    except AssertionError as error:
        raise AssertionError(f"at {file.read_text()!r}: {error}") from None
