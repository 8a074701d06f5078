"""More than 2**31 elements, in memory that is mostly not there: offsets need 64 bits."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours

pytestmark = [
    pytest.mark.skipif(BACKEND != "numba", reason="for a GPU: test_gpu.py; too long interpreted"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's way to map memory"),
]

MANY = 2**31 + 4099
TAIL = 4099  # the elements past the 32 bits, alone with numbers other than the rest's


def unbacked(count: int, dtype: torch.dtype) -> Tensor:
    """Zeros; what is only read takes no memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    return torch.frombuffer(mmap.mmap(-1, count * dtype.itemsize, flags=flags), dtype=dtype)


def folded(count: int, dtype: torch.dtype, value: float, block: int = 2**26) -> Tensor:
    """All of the value; everything but the last block is one block of memory, seen many times."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    file = os.memfd_create("folded")
    os.ftruncate(file, 2 * block)
    size = count * dtype.itemsize
    whole = unbacked(-(-size // block) * block, torch.uint8)
    for begin in range(0, size, block):
        last = begin + block >= size
        place = whole.data_ptr() + begin
        fixed = mmap.MAP_SHARED | 0x10  # MAP_FIXED
        access = mmap.PROT_READ | mmap.PROT_WRITE
        assert libc.mmap(place, block, access, fixed, file, block if last else 0) == place
    os.close(file)
    for begin in (0, whole.numel() - block):
        whole[begin : begin + block].view(dtype).fill_(value)
    return whole[:size].view(dtype)


def test_pointwise_loss_of_many() -> None:
    x, y = unbacked(MANY, torch.bfloat16), unbacked(MANY, torch.bfloat16)
    x[-TAIL:] = torch.randn(TAIL)
    y[-TAIL:] = torch.randn(TAIL)
    for operation in ("mse_loss", "l1_loss"):
        with fastopt.use_backend(BACKEND):
            mine = getattr(ours, operation)(x, y, reduction="sum")
        exact = getattr(theirs, operation)(x[-TAIL:].double(), y[-TAIL:].double(), reduction="sum")
        torch.testing.assert_close(mine, exact.to(mine.dtype))


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((3, 200), (2**30 + 7, 1)),  # a row's begin
        ((3, 5), (2**30 + 7, 1)),
        ((3, 10), (1, 2**28 + 7)),  # a class
        ((2, 10, 3), (5, 13, 2**30 + 7)),  # a position within
    ],
)
def test_cross_entropy_far_apart(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    assert reach >= 2**31
    x = unbacked(reach + 1, torch.bfloat16).as_strided(shape, strides)
    x.copy_(3 * torch.randn(shape))
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    near = x.double().contiguous().requires_grad_()
    exact = theirs.cross_entropy(near, target)
    with fastopt.use_backend(BACKEND):
        mine = ours.cross_entropy(x, target)
    torch.testing.assert_close(mine, exact.to(mine.dtype))


def test_step_of_many() -> None:
    """The gradient is 0 but for its last elements, and so nothing else may change."""
    small = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    data = folded(MANY, torch.bfloat16, 3.0)
    param = torch.nn.Parameter(data)
    params = [small[0], param, small[1]]
    for p in small:
        p.grad = torch.ones(3)
    param.grad = unbacked(MANY, torch.bfloat16)
    param.grad[-TAIL:] = torch.arange(TAIL) % 7
    with fastopt.use_backend(BACKEND):
        fastopt.optim.SGD(params, lr=0.25).step()
    torch.testing.assert_close(data[-TAIL:], (3.0 - 0.25 * (torch.arange(TAIL) % 7)).bfloat16())
    assert (data[-TAIL - 2**20 : -TAIL] == 3.0).all()
    assert (data[: 2**26] == 3.0).all()
    for p in small:
        assert (p == 0.75).all()
