"""What the CPU can do that numba compiles for, which need not be this one (NUMBA_CPU_NAME)."""

from __future__ import annotations

import functools
import re
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

__all__ = ["converts_float16", "cpu_name", "widest_vectors"]

# What LLVM calls where a CPU has no instruction for it. A JIT process doesn't have these
# functions, and ends at the first one.
_LIBRARY = re.compile(r"\b__\w*(?:hfsf|sfhf|h2f|f2h)\w*")


def cpu_name() -> str:
    """As LLVM calls it."""
    name: str = cpu_target.target_context.codegen().magic_tuple()[1]
    return name


@intrinsic
def widest_vectors(typingctx: Any) -> Any:
    """Have the loops of the function that calls this vectorised in the CPU's widest vectors.

    LLVM keeps to 256 bits, for the first CPUs that had 512 ran slower with those. Those that have
    AVX-512 VBMI2 don't: loops that compute more than they wait for memory take 0.7 to 0.8 of the
    time.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if "+avx512vbmi2" in context.codegen().magic_tuple()[2].split(","):
            # llvmlite's own method takes none of those that have a value
            set.add(builder.function.attributes, '"prefer-vector-width"="512"')
        return context.get_dummy_value()

    return types.none(), codegen


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
