"""What the CPU can do that numba compiles for, which need not be this one (NUMBA_CPU_NAME)."""

from __future__ import annotations

import functools
import re

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core.registry import cpu_target

__all__ = ["converts_float16", "cpu_name"]

# What LLVM calls where a CPU has no instruction for it. A JIT process doesn't have these
# functions, and ends at the first one.
_LIBRARY = re.compile(r"\b__\w*(?:hfsf|sfhf|h2f|f2h)\w*")


def cpu_name() -> str:
    """As LLVM calls it."""
    name: str = cpu_target.target_context.codegen().magic_tuple()[1]
    return name


@functools.cache
def converts_float16() -> bool:
    """Whether half precision is converted by instructions: asked of the compiler itself."""
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    module = ir.Module()
    module.triple = triple
    half, single = ir.HalfType(), ir.FloatType()
    for name, source, result in (("widen", half, single), ("narrow", single, half)):
        function = ir.Function(module, ir.FunctionType(result, [source]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        convert = builder.fpext if source is half else builder.fptrunc
        builder.ret(convert(function.args[0], result))
    target = llvm.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, features=features)
    return not _LIBRARY.search(machine.emit_assembly(llvm.parse_assembly(str(module))))
