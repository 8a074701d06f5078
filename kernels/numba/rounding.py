"""Numbers stored in 16 bits inside of compiled loops, as kernels/reference/rounding.py has it.

The integer steps of an element are emitted as LLVM's instructions: numba computes with integers of
64 bits, of which a vector has half as many, and whose products take several instructions.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from .. import rounding
from ..formula import translate
from . import vocabulary
from .compiler import FUNCTION_OPTIONS, inlined
from .pointer import Pointer, emit_load, emit_store, emit_stored, load

__all__ = ["key_at", "load_whole", "rounds", "store_rounded"]

_WORD, _FLOAT, _DOUBLE = ir.IntType(32), ir.FloatType(), ir.DoubleType()
_key_of = inlined(translate(rounding.key_of, vocabulary, inlined))


def rounds(slots: Any) -> bool:
    """Whether some of an update's slots are stored otherwise than to nearest."""
    return any(_how(p) != rounding.NEAREST for p in slots)


def _how(pointer: Any) -> str:
    return pointer.rounding if isinstance(pointer, Pointer) else rounding.NEAREST


def key_at(streams: Any, tensor: int, step: float) -> Any:
    """The key of a tensor's random numbers in a step; an empty tuple where none are drawn."""
    raise NotImplementedError


@overload(key_at, strict=False, jit_options=FUNCTION_OPTIONS)
def _key_at(streams: Any, tensor: int, step: float) -> Any:
    def drawn(streams: Any, tensor: int, step: float) -> Any:
        stream = load(streams, tensor)
        return _key_of(stream & 0xFFFFFFFF, (stream >> 32) & 0xFFFFFFFF, int(step))

    def none(streams: Any, tensor: int, step: float) -> Any:
        return ()

    return drawn if isinstance(streams, Pointer) else none


@intrinsic
def load_whole(typingctx: Any, slots: Any, index: Any) -> Any:
    """`load_each` of the parameter and its states, the parameter with its compensation, if any."""
    kept = [k for k, p in enumerate(slots) if _how(p) != rounding.COMPENSATION]
    results = [slots[k].compute if isinstance(slots[k], Pointer) else types.none for k in kept]
    result = types.Tuple(results)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def element(k: int) -> Any:
            if not isinstance(slots[k], Pointer):
                return context.get_dummy_value()
            return emit_load(builder, slots[k], builder.extract_value(args[0], k), args[1])

        values = [element(k) for k in kept]
        for k in set(range(len(slots))) - set(kept):
            values[0] = builder.fadd(values[0], element(k))
        return context.make_tuple(builder, result, values)

    return result(slots, types.intp), codegen


@intrinsic
def store_rounded(typingctx: Any, slots: Any, index: Any, key: Any, values: Any) -> Any:
    """`store_each` of the new parameter and states, each as its slot is stored.

    key: of the random numbers in this step, if any are drawn.
    """
    states = sum(_how(p) != rounding.COMPENSATION for p in slots) - 1

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        words: dict[int, Any] = {}

        def bits(slot: int) -> Any:
            pair, is_second = divmod(rounding.half_of(slot, states), rounding.HALVES)
            if pair not in words:
                first, second = (
                    builder.trunc(builder.extract_value(args[2], k), _WORD) for k in range(2)
                )
                index = builder.trunc(args[1], _WORD)
                words[pair] = _word(builder, index, first, second, pair)
            word = words[pair]
            if is_second:
                return builder.lshr(word, ir.Constant(_WORD, 16))
            return builder.and_(word, ir.Constant(_WORD, 0xFFFF))

        param = None
        for k, p in enumerate(slots):
            if not isinstance(p, Pointer):
                continue
            if p.rounding == rounding.COMPENSATION:
                value = _lost(builder, slots[0], param)
            else:
                value = context.cast(
                    builder, builder.extract_value(args[3], k), values[k], p.compute
                )
                param = value if param is None else param
                if p.rounding == rounding.STOCHASTIC:
                    value = _stochastic(builder, p, value, bits(k))
            emit_store(builder, p, builder.extract_value(args[0], k), args[1], value)
        return context.get_dummy_value()

    return types.void(slots, types.intp, key, values), codegen


def _lost(builder: Any, typ: Pointer, value: Any) -> Any:
    """What a number loses when it is stored; 0 where that is no finite number."""
    lost = builder.fsub(value, emit_stored(builder, typ, value))
    size = builder.call(builder.module.declare_intrinsic("llvm.fabs", [lost.type]), [lost])
    finite = builder.fcmp_ordered("<", size, ir.Constant(lost.type, float("inf")))
    return builder.select(finite, lost, ir.Constant(lost.type, 0.0))


def _word(builder: Any, index: Any, first: Any, second: Any, pair: int) -> Any:
    """`rounding.word_of`, in 32 bits."""

    def constant(number: int) -> Any:
        return ir.Constant(_WORD, number & rounding.MASK)

    def folded(x: Any, bits: int) -> Any:
        return builder.xor(x, builder.lshr(x, constant(bits)))

    x = builder.add(builder.add(index, first), constant(pair * rounding.PAIR))
    x = builder.xor(builder.mul(folded(x, 16), constant(rounding.FIRST)), second)
    x = builder.mul(folded(x, 15), constant(rounding.SECOND))
    return folded(x, 16)


def _stochastic(builder: Any, typ: Pointer, value: Any, bits: Any) -> Any:
    """A number that the element's dtype has, the one above or below, by 16 random bits."""
    wide = typ.compute == types.float64
    value = builder.fptrunc(value, _FLOAT) if wide else value
    image = builder.bitcast(value, _WORD)
    half = typ.element == "float16"
    magnitude = builder.and_(image, ir.Constant(_WORD, 0x7FFFFFFF))
    largest = ir.Constant(_WORD, 0x477FE000 if half else 0x7F7F0000)
    beyond = builder.icmp_unsigned(">", magnitude, largest)
    dropped = 13 if half else 16
    added = builder.lshr(bits, ir.Constant(_WORD, 16 - dropped))
    kept = ir.Constant(_WORD, rounding.MASK & -1 << dropped)
    moved = builder.bitcast(builder.and_(builder.add(image, added), kept), _FLOAT)
    if half:
        small = _below_normal(builder, builder.bitcast(magnitude, _FLOAT), bits)
        sign = builder.and_(image, ir.Constant(_WORD, 0x80000000))
        small = builder.bitcast(builder.or_(builder.bitcast(small, _WORD), sign), _FLOAT)
        is_small = builder.icmp_unsigned("<", magnitude, ir.Constant(_WORD, 0x38800000))
        moved = builder.select(is_small, small, moved)
    result = builder.select(beyond, value, moved)
    return builder.fpext(result, _DOUBLE) if wide else result


def _below_normal(builder: Any, size: Any, bits: Any) -> Any:
    """A number from 0 on as a multiple of the spacing of float16's smallest ones."""

    def constant(number: float) -> Any:
        return ir.Constant(_FLOAT, number)

    units = builder.fmul(size, constant(2.0**24))
    floor = builder.module.declare_intrinsic("llvm.floor", [_FLOAT])
    whole = builder.call(floor, [units])
    chance = builder.fadd(builder.uitofp(bits, _FLOAT), constant(0.5))
    up = builder.fcmp_ordered(
        ">", builder.fsub(units, whole), builder.fmul(chance, constant(2.0**-16))
    )
    whole = builder.fadd(whole, builder.uitofp(up, _FLOAT))
    return builder.fmul(whole, constant(2.0**-24))
