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

from ..rounding import NEAREST

SLOTS = 23
BYTE = ir.IntType(8)
IR = {
    "float64": ir.DoubleType(),
    "float32": ir.FloatType(),
    "float16": ir.IntType(16),
    "bfloat16": ir.IntType(16),
    "int64": ir.IntType(64),
    "uint8": ir.IntType(8),
}
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}
#: Of the square blocks that are turned at once.
SIDE = 8
#: Bytes of a cache line.
LINE = 64


class Pointer(types.Type):
    """Address of elements stored as `element` and computed with as `compute`.

    Args:
        element: name of the dtype in memory, a key of the table above.
        compute: numba type that `load` yields and `store` takes.
        slot: number of the alias scope, below SLOTS; different slots never overlap.
        fixed: whether there is one element alone, which every index means.
        rounding: how an optimizer's launch stores its elements (kernels/rounding.py).
    """

    def __init__(
        self, element: str, compute: types.Type, slot: int, fixed: bool = False,
        rounding: str = NEAREST,
    ) -> None:  # fmt: skip
        assert 0 <= slot < SLOTS
        self.element = element
        self.compute = compute
        self.slot = slot
        self.fixed = fixed
        self.rounding = rounding
        words = f"{element}, {compute}, {slot}" + (", fixed" if fixed else "")
        words += "" if rounding == NEAREST else f", {rounding}"
        super().__init__(f"Pointer({words})")


@register_model(Pointer)
class AddressModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: types.Type) -> None:
        super().__init__(dmm, fe_type, BYTE.as_pointer())


@unbox(Pointer)
def unbox_address(typ: types.Type, obj: Any, c: Any) -> NativeValue:
    # long_as_voidptr raises OverflowError/TypeError by itself for anything but an address.
    return NativeValue(
        c.pyapi.long_as_voidptr(obj),
        is_error=cgutils.is_not_null(c.builder, c.pyapi.err_occurred()),
    )


def _element_pointer(builder: Any, pointer: Any, typ: Pointer, index: Any) -> Any:
    base = builder.bitcast(pointer, IR[typ.element].as_pointer())
    return base if typ.fixed else builder.gep(base, [index])


def _many(typ: Any, width: int) -> Any:
    """The type of `width` numbers side by side, of which one is itself."""
    return typ if width == 1 else ir.VectorType(typ, width)


def _constant(value: Any, number: int) -> Any:
    """`number` in the integer type of a value, in each of its lanes."""
    vector = isinstance(value.type, ir.VectorType)
    return ir.Constant(value.type, [number] * value.type.count if vector else number)


def _tag(builder: Any, instruction: Any, slot: int) -> None:
    """State that this access overlaps no access of another slot."""
    module = builder.module
    domain = module.add_metadata(["fastopt"])
    scopes = [module.add_metadata([f"slot {i}", domain]) for i in range(SLOTS)]
    instruction.set_metadata("alias.scope", module.add_metadata([scopes[slot]]))
    others = [scope for i, scope in enumerate(scopes) if i != slot]
    instruction.set_metadata("noalias", module.add_metadata(others))


def emit_load(builder: Any, typ: Pointer, pointer: Any, index: Any, width: int = 1) -> Any:
    place = _element_pointer(builder, pointer, typ, index)
    element = IR[typ.element]
    if width > 1:
        place = builder.bitcast(place, _many(element, width).as_pointer())
    value = builder.load(place, align=_BYTES[typ.element])
    _tag(builder, value, typ.slot)
    return _widen(builder, typ, value, width)


def _widen(builder: Any, typ: Pointer, value: Any, width: int = 1) -> Any:
    """What is in memory as the numbers to compute with, which float64 is rounded to."""
    if typ.element == "bfloat16":  # the upper half of a float32
        wide = builder.zext(value, _many(ir.IntType(32), width))
        wide = builder.shl(wide, _constant(wide, 16))
        value = builder.bitcast(wide, _many(ir.FloatType(), width))
    elif typ.element == "float16":
        value = builder.bitcast(value, _many(ir.HalfType(), width))
        value = builder.fpext(value, _many(ir.FloatType(), width))
    elif typ.element == "uint8":
        value = builder.zext(value, _many(ir.IntType(64), width))
    if typ.compute == types.float64 and typ.element != "float64":
        value = builder.fpext(value, _many(ir.DoubleType(), width))
    elif typ.compute == types.float32 and typ.element == "float64":
        value = builder.fptrunc(value, _many(ir.FloatType(), width))
    return value


def emit_store(
    builder: Any, typ: Pointer, pointer: Any, index: Any, value: Any, width: int = 1
) -> None:
    value = _narrow(builder, typ, value, width)
    place = _element_pointer(builder, pointer, typ, index)
    if width > 1:
        place = builder.bitcast(place, value.type.as_pointer())
    store = builder.store(value, place, align=_BYTES[typ.element])
    _tag(builder, store, typ.slot)


def emit_stored(builder: Any, typ: Pointer, value: Any) -> Any:
    """What would be loaded once a number is stored."""
    return _widen(builder, typ, _narrow(builder, typ, value, 1))


def _narrow(builder: Any, typ: Pointer, value: Any, width: int) -> Any:
    """A number as it is in memory, rounded once."""
    if typ.compute == types.float64 and typ.element != "float64":
        # Halves by way of float32 too: CPUs convert from there, and from float64 LLVM
        # would call a library function that a JIT process doesn't have.
        value = builder.fptrunc(value, _many(ir.FloatType(), width))
    elif typ.compute == types.float32 and typ.element == "float64":
        value = builder.fpext(value, _many(ir.DoubleType(), width))
    if typ.element == "float16":
        value = builder.fptrunc(value, _many(ir.HalfType(), width))
        value = builder.bitcast(value, _many(ir.IntType(16), width))
    elif typ.element == "bfloat16":
        value = _round_to_bfloat16(builder, value, width)
    return value


def _round_to_bfloat16(builder: Any, value: Any, width: int) -> Any:
    """Round to nearest, ties to even, in integers; NaN stays a (quiet) NaN."""
    bits = builder.bitcast(value, _many(ir.IntType(32), width))
    odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(bits, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    quiet = builder.or_(bits, _constant(bits, 0x00400000))
    kept = builder.select(is_nan, quiet, rounded)
    return builder.trunc(builder.lshr(kept, _constant(bits, 16)), _many(ir.IntType(16), width))


@intrinsic
def load(typingctx: Any, pointer: Any, index: Any) -> Any:
    """pointer[index], in the pointer's compute dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_load(builder, pointer, *args)

    return pointer.compute(pointer, types.intp), codegen


@intrinsic
def load_bits(typingctx: Any, pointer: Any, index: Any) -> Any:
    """The bits of pointer[index], a signed integer of the element's size."""
    integer = types.Integer.from_bitwidth(8 * _BYTES[pointer.element], signed=True)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _element_pointer(builder, args[0], pointer, args[1])
        place = builder.bitcast(place, context.get_value_type(integer).as_pointer())
        bits = builder.load(place, align=_BYTES[pointer.element])
        _tag(builder, bits, pointer.slot)
        return bits

    return integer(pointer, types.intp), codegen


@intrinsic
def from_bits(typingctx: Any, bits: Any, pointer: Any) -> Any:
    """What `load` makes of an element of these bits."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _widen(builder, pointer, builder.bitcast(args[0], IR[pointer.element]))

    return pointer.compute(bits, pointer), codegen


@intrinsic
def store(typingctx: Any, pointer: Any, index: Any, value: Any) -> Any:
    """pointer[index] = value, rounded once to the element's dtype."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        emit_store(builder, pointer, *args)
        return context.get_dummy_value()

    return types.void(pointer, types.intp, pointer.compute), codegen


@intrinsic
def turn(
    typingctx: Any, source: Any, first: Any, pitch: Any, out: Any, out_first: Any, out_pitch: Any
) -> Any:
    """out[j, k] = source[k, j] for k and j below SIDE, of matrices whose rows are a pitch apart.

    In registers: one by one the numbers would go through memory at more than a cycle each.
    """
    assert source.compute == out.compute

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        typ, start, step, to, to_start, to_step = args
        rows = []
        for k in range(SIDE):
            at = builder.add(start, builder.mul(step, ir.Constant(step.type, k)))
            rows.append(emit_load(builder, source, typ, at, SIDE))
        half = SIDE // 2
        while half:  # swap the off-diagonal quarters of ever smaller squares
            for k in range(SIDE):
                if not k & half:
                    upper, lower = rows[k], rows[k | half]
                    for row, offset in ((k, 0), (k | half, half)):
                        mask = [
                            (j | offset) if not j & half else SIDE + (j & ~half | offset)
                            for j in range(SIDE)
                        ]
                        mask = ir.Constant(ir.VectorType(ir.IntType(32), SIDE), mask)
                        rows[row] = builder.shuffle_vector(upper, lower, mask)
            half //= 2
        for k in range(SIDE):
            at = builder.add(to_start, builder.mul(to_step, ir.Constant(to_step.type, k)))
            emit_store(builder, out, to, at, rows[k], SIDE)
        return context.get_dummy_value()

    index = types.intp
    return types.void(source, index, index, out, index, index), codegen


@intrinsic
def per_line(typingctx: Any, pointer: Any) -> Any:
    """How many elements a cache line has."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.intp, LINE // _BYTES[pointer.element])

    return types.intp(pointer), codegen


@intrinsic
def prefetch(typingctx: Any, pointer: Any, index: Any) -> Any:
    """Have the cache line of pointer[index] fetched while other work goes on."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, number = BYTE.as_pointer(), ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [address],
            fnty=ir.FunctionType(ir.VoidType(), [address, number, number, number]),
        )
        place = _element_pointer(builder, args[0], pointer, args[1])
        # to read it; into the L2 cache; it is data
        how = [ir.Constant(number, n) for n in (0, 2, 1)]
        builder.call(function, [builder.bitcast(place, address), *how])
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def at(typingctx: Any, pointer: Any, address: Any) -> Any:
    """A pointer like `pointer` to the integer `address`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[1], BYTE.as_pointer())

    return pointer(pointer, types.intp), codegen
