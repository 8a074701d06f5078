"""Compile for GPUs that aren't there: what a launch would run, as machine code.

Inside `compiling` every launch of a Triton kernel, with the arguments and the
specialisation that it would have on that GPU, is compiled and collected instead of run. Only
shapes, dtypes and strides count, so that losses take tensors on the device "meta".

An instruction is known by the statement of a kernel that it comes from: that tells an access
to the logits from one to their statistics, and both from those of a library that is linked in.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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
    """A GPU, and the registers that all threads of a program share (NVIDIA) or that the threads
    of one lane on a SIMD unit, one of four, do (AMD); a thread gets `grain` at a time.
    """

    target: GPUTarget
    hardware: Hardware
    registers: int
    grain: int = 8

    @property
    def amd(self) -> bool:
        return self.target.backend == "hip"

    def holds(self, threads: int, registers: int) -> bool:
        """Whether a program of so many threads, each with so many registers, can run."""
        taken = -(-registers // self.grain) * self.grain
        shares = -(-threads // (4 * self.hardware.warp)) if self.amd else threads
        return threads <= 1024 and taken * shares <= self.registers


MACHINES = {
    "sm_80": Machine(GPUTarget("cuda", 80, 32), Hardware(108, 32, 40 << 20), 65_536),  # A100
    "sm_90": Machine(GPUTarget("cuda", 90, 32), Hardware(132, 32, 50 << 20), 65_536),  # H100, H200
    "sm_100": Machine(GPUTarget("cuda", 100, 32), Hardware(148, 32, 126 << 20), 65_536),  # B200
    "gfx942": Machine(GPUTarget("hip", "gfx942", 64), Hardware(304, 64, 4 << 20), 512),  # MI300X
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


class Instruction(NamedTuple):
    """One line of assembly, and whence it comes.

    Attributes:
        text: the line.
        statement: of the kernel's source, in the form of `ast.unparse`; empty if the compiler
            has joined several.
        caller: the statement that calls the function where that stands; empty in a kernel.
    """

    text: str
    statement: str
    caller: str

    @property
    def access(self) -> tuple[str, int] | None:
        """Of global memory: "load" or "store", and bytes a thread; None for anything else."""
        if found := _PTX_ACCESS.search(self.text):
            kind, vector, bits = found.groups()
            return {"ld": "load", "st": "store"}[kind], int(vector or 1) * int(bits) // 8
        if found := _PTX_COPY.search(self.text):
            return "load", int(found[1], 0)
        if found := _GCN_ACCESS.match(self.text):
            return found[1], _GCN_BYTES[found[2]]
        return None


_PTX_ACCESS = re.compile(
    r"\b(ld|st)\.(?:\w+\.)*?global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
)  # cache modifiers in between
_PTX_COPY = re.compile(r"\bcp\.async\.\w+\.shared\.global[\w.:]* \[[^]]*\], \[[^]]*\], (\w+)")
_GCN_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_[us]?(byte|short|dword(?:x\d)?)")
_GCN_BYTES = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


class Code:
    """A compiled kernel.

    Attributes:
        name: the kernel's.
        machine: that it is for.
        text: PTX or AMD GCN assembly.
        threads: of a program.
        shared: bytes of shared memory that a program takes.
        constants: its compile-time arguments.
        options: what Triton was told.
    """

    def __init__(self, machine: Machine, built: Any, constants: dict[str, Any]) -> None:
        self.name: str = built.metadata.name
        self.machine = machine
        self.text: str = built.asm["amdgcn" if machine.amd else "ptx"]
        self.threads: int = built.metadata.num_warps * machine.hardware.warp
        self.shared: int = built.metadata.shared
        self.constants = constants
        self.options = built.metadata
        self._cubin: bytes = b"" if machine.amd else built.asm["cubin"]

    def __repr__(self) -> str:
        return f"{self.name} of {self.threads} threads"

    @functools.cached_property
    def resources(self) -> dict[str, int]:
        """What the kernel takes: "registers" of a thread, and what must be 0: "spills", "stack"."""
        if self.machine.amd:
            names = {"registers": "vgpr_count", "stack": "private_segment_fixed_size"}
            found = {k: int(self._one(rf"\.{v}:\s*(\d+)", self.text)) for k, v in names.items()}
            spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", self.text)
            return found | {"spills": sum(map(int, spills))}
        names = {"registers": "REG", "stack": "STACK", "spills": "LOCAL"}
        return {k: int(self._one(rf"\b{v}:(\d+)", self._usage())) for k, v in names.items()}

    def _usage(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(self._cubin)
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [tool, "--dump-resource-usage", cubin]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    @staticmethod
    def _one(pattern: str, text: str) -> str:
        (found,) = re.findall(pattern, text)
        return str(found)

    @functools.cached_property
    def instructions(self) -> list[Instruction]:
        """The kernel's own, in the order of the text; functions that it calls are not."""
        paths: dict[str, Path] = {}  # by number and by name
        for number, folder, name in _FILE.findall(self.text):
            path = Path(folder, name)
            paths[number] = paths[path.name] = path
        found = []
        statement = caller = ""
        in_line_assembly = False  # whose own lines count as source lines
        own = self.text.partition(f"\n{self.name}:")[2] or self.text  # NVIDIA has no others
        for line in re.split(r"^\s*\.section|^\.Lfunc_end", own, flags=re.MULTILINE)[
            0
        ].splitlines():
            if "begin inline asm" in line or "end inline asm" in line:
                in_line_assembly = "begin" in line
            elif place := _PLACE.search(line):
                if not in_line_assembly:
                    file, row, *called_from = place.groups()
                    statement = _statement(paths[file], int(row))
                    number, number_row, name, name_row = called_from
                    caller = ""
                    if outer := number or name:
                        caller = _statement(paths[outer], int(number_row or name_row))
            elif text := _INSTRUCTION.match(line):
                found.append(Instruction(text[1], statement, caller))
        return found


_FILE = re.compile(r'^\s*\.file\s+(\d+) "([^"]+)"(?: "([^"]+)")?', re.MULTILINE)
# .loc file row column, and the place of the call in NVIDIA's or in AMD's notation
_PLACE = re.compile(
    r"^\s*\.loc\s+(\d+) (\d+) \d+(?:.*?inlined_at (\d+) (\d+)|.*?@\[ ([\w.]+):(\d+))?"
)
_INSTRUCTION = re.compile(r"^\s+((?:@!?%\w+\s+)?[a-z]\w+[\w.:]*\s.*|s_trap.*|ret;)")


@functools.cache
def _statement(path: Path, row: int) -> str:
    """The simple statement at that row of a file, or the row itself; empty for row 0."""
    if not row:
        return ""
    simple, rows = _statements(path)
    return next((s for first, last, s in simple if first <= row <= last), rows[row - 1].strip())


@functools.cache
def _statements(path: Path) -> tuple[list[tuple[int, int, str]], list[str]]:
    # A formula without some of its arguments is in no file.
    source = "".join(linecache.getlines(path.name if path.name.startswith("<") else str(path)))
    simple = [
        (node.lineno, node.end_lineno or node.lineno, ast.unparse(node))
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.stmt) and not hasattr(node, "body")
    ]
    return simple, source.splitlines()


@contextmanager
def compiling(machine: Machine) -> Iterator[list[Code]]:
    """Collect the code of every kernel launched inside the block, each once."""
    collected: list[Code] = []
    seen: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        built = run(self, *args, grid=grid, warmup=True, **kwargs)
        if not any(built is other for other in seen):
            seen.append(built)
            collected.append(Code(machine, built, kwargs))

    before = driver._active
    driver.set_active(_Driver(machine.target))
    with ExitStack() as stack:
        stack.callback(driver.set_active, before)
        for owner, name, replacement in (
            (JITFunction, "run", compile_only),
            (compiler, "hardware", lambda device: machine.hardware),
            (cross_entropy, "hardware", lambda device: machine.hardware),
            (compiler, "_current", lambda device: nullcontext()),
        ):
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield collected
