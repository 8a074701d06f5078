"""The work of a region, split over OpenMP's threads."""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .openmp import entries

__all__ = ["on_threads"]

# Names and not addresses are what is in machine code, which is kept on the disk.
for _name, _function in entries().items():
    _address = ctypes.cast(_function, ctypes.c_void_p).value
    assert _address is not None
    llvm.add_symbol(f"fastopt_{_name}", _address)

_INT, _BYTES = ir.IntType(32), ir.IntType(8).as_pointer()


@intrinsic
def on_threads(typingctx: Any, function: Any, parts: Any, args: Any) -> Any:
    """Call ``function(part, parts, *args)`` for each part, each on a thread of its own."""
    signature = function.get_call_type(typingctx, (types.intp, types.intp, *args), {})
    overload = function.dispatcher.overloads[tuple(signature.args)]

    def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
        context.active_code_library.add_linking_library(overload.library)
        count, packed = values[1:]
        shared = cgutils.pack_struct(builder, (count, packed))
        data = builder.bitcast(cgutils.alloca_once_value(builder, shared), _BYTES)
        body = _body(context, builder.module, overload, shared.type, len(args))
        with builder.if_else(builder.icmp_signed(">", count, count.type(1))) as (several, one):
            with several:
                run = _symbol(
                    builder, "GOMP_parallel", ir.VoidType(), body.type, _BYTES, _INT, _INT
                )
                builder.call(run, (body, data, builder.trunc(count, _INT), _INT(0)))
            with one:
                builder.call(body, (data,))
        return context.get_dummy_value()

    return types.none(function, parts, args), codegen


def _body(context: Any, module: Any, overload: Any, shared: Any, count: int) -> Any:
    """What each thread of a team does: every part whose turn it is, if they are more than threads.

    It gets all arguments by their address in memory.
    """
    name = module.get_unique_name("fastopt_body")
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), (_BYTES,)), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block("entry"))
    parts, packed = cgutils.unpack_tuple(
        builder, builder.load(builder.bitcast(body.args[0], shared.as_pointer()))
    )
    args = [builder.extract_value(packed, k) for k in range(count)]
    alone = builder.icmp_signed("<=", parts, parts.type(1))
    first, step = (
        builder.select(
            alone,
            parts.type(otherwise),
            builder.sext(builder.call(_symbol(builder, name, _INT), ()), parts.type),
        )
        for name, otherwise in (("omp_get_thread_num", 0), ("omp_get_num_threads", 1))
    )
    with cgutils.for_range_slice(builder, first, parts, step, inc=True) as (part, _):
        function, described = context.declare_function(module, overload.fndesc), overload.fndesc
        context.call_conv.call_function(
            builder, function, described.restype, described.argtypes, (part, parts, *args)
        )  # it raises nothing
    builder.ret_void()
    return body


def _symbol(builder: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, args)
    return cgutils.get_or_insert_function(builder.module, kind, f"fastopt_{name}")
