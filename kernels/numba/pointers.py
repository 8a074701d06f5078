"""Tuples of typed addresses: one access for each of them that is there."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from .pointer import BYTE, IR, Pointer, emit_load, emit_store


@intrinsic
def load_each(typingctx: Any, pointers: Any, index: Any) -> Any:
    """The tuple of ``load(p, index)`` for each p of a tuple; None stays None."""
    results = [p.compute if isinstance(p, Pointer) else types.none for p in pointers]
    result = types.Tuple(results)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            emit_load(builder, p, builder.extract_value(args[0], k), args[1])
            if isinstance(p, Pointer)
            else context.get_dummy_value()
            for k, p in enumerate(pointers)
        ]
        return context.make_tuple(builder, result, values)

    return result(pointers, types.intp), codegen


@intrinsic
def store_each(typingctx: Any, pointers: Any, index: Any, values: Any) -> Any:
    """``store(p, index, value)`` for each pair of two tuples; None is skipped."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for k, p in enumerate(pointers):
            if isinstance(p, Pointer):
                value = builder.extract_value(args[2], k)
                value = context.cast(builder, value, values[k], p.compute)
                emit_store(builder, p, builder.extract_value(args[0], k), args[1], value)
        return context.get_dummy_value()

    return types.void(pointers, types.intp, values), codegen


@intrinsic
def as_stored(typingctx: Any, pointers: Any, values: Any) -> Any:
    """What `load_each` would give after `store_each`: values rounded to the elements' dtypes."""
    result = types.Tuple([p.compute for p in pointers])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero, found = ir.Constant(ir.IntType(64), 0), []
        for k, p in enumerate(pointers):
            room = builder.bitcast(cgutils.alloca_once(builder, ir.IntType(64)), BYTE.as_pointer())
            value = builder.extract_value(args[1], k)
            emit_store(builder, p, room, zero, context.cast(builder, value, values[k], p.compute))
            found.append(emit_load(builder, p, room, zero))
        return context.make_tuple(builder, result, found)

    return result(pointers, values), codegen


@intrinsic
def cast_for(typingctx: Any, value: Any, pointer: Any) -> Any:
    """A number as `store` takes it there; as it is, where there is no pointer."""
    result = pointer.compute if isinstance(pointer, Pointer) else value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, result)

    return result(value, pointer), codegen


@intrinsic
def load_each_or_one(typingctx: Any, pointers: Any, index: Any, like: Any) -> Any:
    """The tuple of ``load(p, index)`` for each p of a tuple; for None a 1 of the type of `like`."""
    results = [p.compute if isinstance(p, Pointer) else like for p in pointers]
    result = types.Tuple(results)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            emit_load(builder, p, builder.extract_value(args[0], k), args[1])
            if isinstance(p, Pointer)
            else context.get_constant(like, 1)
            for k, p in enumerate(pointers)
        ]
        return context.make_tuple(builder, result, values)

    return result(pointers, types.intp, like), codegen


@intrinsic
def store_products(typingctx: Any, pointers: Any, index: Any, values: Any, factor: Any) -> Any:
    """``store(p, index, factor * value)`` for each pair of two tuples; None is skipped."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for k, p in enumerate(pointers):
            if isinstance(p, Pointer):
                value = context.cast(builder, builder.extract_value(args[2], k), values[k], factor)
                product = builder.fmul(value, args[3])
                emit_store(builder, p, builder.extract_value(args[0], k), args[1], product)
        return context.get_dummy_value()

    return types.void(pointers, types.intp, values, factor), codegen


@intrinsic
def moved(typingctx: Any, pointers: Any, steps: Any, first: Any, second: Any) -> Any:
    """Pointers like `pointers`, each further by first and second times its two steps.

    steps: the address of two int64 for each pointer.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        for k, p in enumerate(pointers):
            pointer = builder.extract_value(args[0], k)
            if isinstance(p, Pointer):
                ways = [
                    builder.mul(
                        emit_load(builder, steps, args[1], ir.Constant(ir.IntType(64), 2 * k + j)),
                        args[2 + j],
                    )
                    for j in range(2)
                ]
                base = builder.bitcast(pointer, IR[p.element].as_pointer())
                pointer = builder.gep(base, [builder.add(*ways)])
                pointer = builder.bitcast(pointer, BYTE.as_pointer())
            values.append(pointer)
        return context.make_tuple(builder, pointers, values)

    return pointers(pointers, steps, types.intp, types.intp), codegen


@intrinsic
def at_each(typingctx: Any, pointers: Any, table: Any, stride: Any, index: Any) -> Any:
    """Pointers like `pointers`, to the addresses table[k * stride + index] for k = 0, 1, …"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        position = args[3]
        for p in pointers:
            if isinstance(p, Pointer):
                address = emit_load(builder, table, args[1], position)
                values.append(builder.inttoptr(address, BYTE.as_pointer()))
            else:
                values.append(context.get_dummy_value())
            position = builder.add(position, args[2])
        return context.make_tuple(builder, pointers, values)

    return pointers(pointers, table, types.intp, types.intp), codegen
