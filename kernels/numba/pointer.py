"""Typed addresses, and the only places where a kernel touches memory.

Tensors reach a kernel as integers (``tensor.data_ptr()``): an order of magnitude
cheaper to pass than arrays. A ``Pointer`` type says how to read one: the element's
dtype in memory, the dtype to compute in, and a *slot*. Two slots never alias within
one launch (launchers see to it), which LLVM is told through alias scopes: without them
a loop over five tensors needs more overlap checks than the vectoriser is willing to emit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

SLOTS = 19
_BYTE = ir.IntType(8)
_IR = {
    "float64": ir.DoubleType(),
    "float32": ir.FloatType(),
    "float16": ir.IntType(16),
    "bfloat16": ir.IntType(16),
    "int64": ir.IntType(64),
    "uint8": ir.IntType(8),
}


class Pointer(types.Type):
    """Address of elements stored as `element` and computed with as `compute`.

    Args:
        element: name of the dtype in memory, a key of the table above.
        compute: numba type that `load` yields and `store` takes.
        slot: number of the alias scope, below SLOTS; different slots never overlap.
    """

    def __init__(self, element: str, compute: types.Type, slot: int) -> None:
        assert 0 <= slot < SLOTS
        self.element = element
        self.compute = compute
        self.slot = slot
        super().__init__(f"Pointer({element}, {compute}, {slot})")


class Rows(types.Type):
    """Address of a float64 table with one row per record of type `record`."""

    def __init__(self, record: type) -> None:
        self.record = record
        super().__init__(f"Rows({record.__module__}.{record.__qualname__})")


@register_model(Pointer)
@register_model(Rows)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, _BYTE.as_pointer())


@unbox(Pointer)
@unbox(Rows)
def _unbox_address(typ: types.Type, obj: Any, c: Any) -> NativeValue:
    # long_as_voidptr raises OverflowError/TypeError by itself for anything but an address.
    return NativeValue(
        c.pyapi.long_as_voidptr(obj),
        is_error=cgutils.is_not_null(c.builder, c.pyapi.err_occurred()),
    )


def _element_pointer(builder: Any, pointer: Any, typ: Pointer, index: Any) -> Any:
    base = builder.bitcast(pointer, _IR[typ.element].as_pointer())
    return builder.gep(base, [index])


def _tag(builder: Any, instruction: Any, slot: int) -> None:
    """State that this access overlaps no access of another slot."""
    module = builder.module
    domain = module.add_metadata(["fastopt"])
    scopes = [module.add_metadata([f"slot {i}", domain]) for i in range(SLOTS)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    others = [scope for i, scope in enumerate(scopes) if i != slot]
    instruction.set_metadata("noalias", module.add_metadata(others))


def _emit_load(context: Any, builder: Any, typ: Pointer, pointer: Any, index: Any) -> Any:
    value = builder.load(_element_pointer(builder, pointer, typ, index))
    _tag(builder, value, typ.slot)
    if typ.element == "bfloat16":  # the upper half of a float32
        wide = builder.shl(builder.zext(value, ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        value = builder.bitcast(wide, ir.FloatType())
    elif typ.element == "float16":
        value = builder.fpext(builder.bitcast(value, ir.HalfType()), ir.FloatType())
    elif typ.element == "uint8":
        value = builder.zext(value, ir.IntType(64))
    if typ.compute == types.float64 and typ.element != "float64":
        value = builder.fpext(value, ir.DoubleType())
    return value


def _emit_store(
    context: Any, builder: Any, typ: Pointer, pointer: Any, index: Any, value: Any
) -> None:
    if typ.compute == types.float64 and typ.element != "float64":
        # Halves by way of float32 too: CPUs convert from there, and from float64 LLVM
        # would call a library function that a JIT process doesn't have.
        value = builder.fptrunc(value, ir.FloatType())
    if typ.element == "float16":
        value = builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
    elif typ.element == "bfloat16":
        value = _round_to_bfloat16(builder, value)
    store = builder.store(value, _element_pointer(builder, pointer, typ, index))
    _tag(builder, store, typ.slot)


def _round_to_bfloat16(builder: Any, value: Any) -> Any:
    """Round to nearest, ties to even, in integers; NaN stays a (quiet) NaN."""
    i32 = ir.IntType(32)
    bits = builder.bitcast(value, i32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, ir.Constant(i32, 0x00400000))
    kept = builder.select(is_nan, quiet, rounded)
    return builder.trunc(builder.lshr(kept, ir.Constant(i32, 16)), ir.IntType(16))


@intrinsic
def load(typingctx: Any, pointer: Any, index: Any) -> Any:
    """pointer[index], in the pointer's compute dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _emit_load(context, builder, pointer, *args)

    return pointer.compute(pointer, types.intp), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index] = value, rounded once to the element's dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _emit_store(context, builder, pointer, *args)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, pointer.compute), codegen


@intrinsic
def load_each(typingctx: Any, pointers: Any, index: Any) -> Any:
    """The tuple of ``load(p, index)`` for each p of a tuple; None stays None."""
    results = [p.compute if isinstance(p, Pointer) else types.none for p in pointers]
    result = types.Tuple(results)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            _emit_load(context, builder, p, builder.extract_value(args[0], k), args[1])
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
                _emit_store(context, builder, p, builder.extract_value(args[0], k), args[1], value)
        return context.get_dummy_value()

    return types.void(pointers, types.intp, values), codegen


@intrinsic
def at(typingctx: Any, pointer: Any, address: Any) -> Any:
    """A pointer like `pointer` to the integer `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], _BYTE.as_pointer())

    return pointer(pointer, types.intp), codegen


@intrinsic
def at_each(typingctx: Any, pointers: Any, table: Any, stride: Any, index: Any) -> Any:
    """Pointers like `pointers`, to the addresses table[k * stride + index] for k = 0, 1, …"""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = []
        position = args[3]
        for p in pointers:
            if isinstance(p, Pointer):
                address = _emit_load(context, builder, table, args[1], position)
                values.append(builder.inttoptr(address, _BYTE.as_pointer()))
            else:
                values.append(context.get_dummy_value())
            position = builder.add(position, args[2])
        return context.make_tuple(builder, pointers, values)

    return pointers(pointers, table, types.intp, types.intp), codegen


@intrinsic
def read_row(typingctx: Any, rows: Any, index: Any) -> Any:
    """Row `index` of a table, as its record."""
    size = len(rows.record._fields)
    record = types.NamedUniTuple(types.float64, size, rows.record)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.bitcast(args[0], ir.DoubleType().as_pointer())
        start = builder.mul(args[1], ir.Constant(args[1].type, size))
        values = [
            builder.load(builder.gep(base, [builder.add(start, ir.Constant(start.type, k))]))
            for k in range(size)
        ]
        return context.make_tuple(builder, record, values)

    return record(rows, types.intp), codegen


@intrinsic
def cast_record(typingctx: Any, record: Any, like: Any) -> Any:
    """The record with every field in the compute dtype of the pointer `like`.

    Numba computes float32 * float64 in float64, at half the vector width: constants
    are brought to the elements' dtype once, before the loop.
    """
    result = types.NamedUniTuple(like.compute, len(record), record.instance_class)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            context.cast(builder, builder.extract_value(args[0], k), record[k], like.compute)
            for k in range(len(record))
        ]
        return context.make_tuple(builder, result, values)

    return result(record, like), codegen
