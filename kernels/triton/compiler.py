"""What the compiler is told, once: options, launch, device, and the hardware to plan for."""

from __future__ import annotations

import functools
import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

#: A kernel, and a function that kernels call. Triton compiles a kernel anew for integers that are
#: 1 or multiples of 16; where that wins nothing, `do_not_specialize` names them.
kernel = triton.jit
device_function = triton.jit

# Said aloud because versions of Triton differ in their defaults. Fused multiply-adds are
# what nvcc gives torch's own kernels. `debug` compiles tl.device_assert; the overflow checks
# that come with it would double every kernel's arithmetic.
OPTIONS = {"enable_fp_fusion": True, "debug": True, "sanitize_overflow": False}

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Hardware(NamedTuple):
    """What the rules for block sizes go by.

    Attributes:
        processors: streaming multiprocessors, compute units or the like.
        warp: threads that run in step.
        cache: bytes of the cache that all processors share.
    """

    processors: int
    warp: int
    cache: int


@functools.cache
def hardware(device: torch.device) -> Hardware:
    """Of one device; for the interpreter on CPU tensors, a machine small enough to split rows."""
    if device.type == "cpu":
        return Hardware(4, 32, 1 << 20)
    properties: Any = torch.get_device_module(device).get_device_properties(device)
    # Names differ between CUDA and XPU; the defaults are those of a middling GPU.
    return Hardware(
        getattr(properties, "multi_processor_count", getattr(properties, "gpu_subslice_count", 64)),
        getattr(properties, "warp_size", 32),
        getattr(properties, "L2_cache_size", getattr(properties, "last_level_cache_size", 4 << 20)),
    )


def launch(
    function: Any, grid: tuple[int, ...], device: torch.device, threads: int, *arguments: Any,
    **constants: Any,
) -> None:  # fmt: skip
    """Run a kernel on a device, whichever one is current; no programs, no launch.

    Args:
        function: the kernel.
        grid: programs along each axis.
        device: that of the tensors.
        threads: of a program, a power of two and at least a warp.
        arguments, constants: the kernel's.
    """
    if 0 in grid:
        return
    warps = max(threads // hardware(device).warp, 1)
    with _current(device):
        function[grid](*arguments, **constants, num_warps=warps, **OPTIONS)


def _current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    if device.type == "cpu":
        return nullcontext()
    module: Any = torch.get_device_module(device)
    if module.current_device() == device.index:
        return nullcontext()
    current: AbstractContextManager[Any] = module.device(device)
    return current


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def power_of_2(at_least: int) -> int:
    """The smallest one; Triton's own function takes microseconds."""
    return 1 << max(at_least - 1, 0).bit_length()


def number(value: float, dtype: torch.dtype) -> float | int:
    """A number as an argument for `as_number`: Triton takes Python floats as float32."""
    if dtype == torch.float64:
        return int.from_bytes(struct.pack("<d", value), "little", signed=True)
    return value


@device_function
def as_number(value, dtype: tl.constexpr):
    """The other end of `number`."""
    if dtype == tl.float64:
        return tl.cast(value, tl.int64).to(tl.float64, bitcast=True)
    else:
        return tl.cast(value, tl.float32)
