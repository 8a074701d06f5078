"""Compile for GPUs that aren't there: what a launch would run, as machine code.

Inside `compiling` every launch of a Triton kernel, with the arguments and the
specialisation that it would have on that GPU, is compiled and collected instead of run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from fastopt.kernels.triton import compiler, cross_entropy
from fastopt.kernels.triton.compiler import Hardware


class Machine(NamedTuple):
    target: GPUTarget
    hardware: Hardware


MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), Hardware(108, 32, 40 << 20)),  # A100
    "sm_90": Machine(GPUTarget("cuda", 90, 32), Hardware(132, 32, 50 << 20)),  # H100, H200
    "sm_100": Machine(GPUTarget("cuda", 100, 32), Hardware(148, 32, 126 << 20)),  # B200
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), Hardware(304, 64, 4 << 20)),  # MI300X
}


class _Driver:
    """As much of a driver as compiling asks for."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        return str(self._target.arch)  # the key of the cache of compiled kernels

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


class Code(NamedTuple):
    """A compiled kernel.

    Attributes:
        name: the kernel's.
        text: PTX or AMD GCN assembly.
        registers: per thread.
        spills: registers that did not fit, in bytes (or, for AMD, in registers).
    """

    name: str
    text: str
    registers: int
    spills: int

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.text))


@contextmanager
def compiling(machine: Machine) -> Iterator[list[Code]]:
    """Collect the code of every kernel launched inside the block."""
    collected: list[Code] = []
    seen: set[int] = set()
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(built) not in seen:
            seen.add(id(built))
            collected.append(_code(built))

    before = driver._active
    driver.set_active(_Driver(machine.target))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_only),
            mock.patch.object(compiler, "hardware", return_value=machine.hardware),
            mock.patch.object(cross_entropy, "hardware", return_value=machine.hardware),
        ):
            yield collected
    finally:
        driver._active = before


def _code(built: Any) -> Code:
    name = built.metadata.name
    if "amdgcn" in built.asm:
        text = built.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", text)))
        return Code(name, text, int(re.findall(r"\.vgpr_count:\s*(\d+)", text)[0]), spills)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(built.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
    (registers,), (local,) = re.findall(r"REG:(\d+)", usage), re.findall(r"LOCAL:(\d+)", usage)
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return Code(name, built.asm["ptx"], int(registers), int(local) + int(stack))
