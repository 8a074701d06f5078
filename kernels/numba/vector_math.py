"""Scalar functions written so that LLVM turns loops over them into vector code.

``math.exp`` stays a scalar library call without Intel's SVML, and LLVM does not
vectorise a float maximum (NaN makes its order matter). A polynomial and integers do
vectorise. Integer steps are emitted as LLVM instructions: numba widens every int32
operation to int64, which halves the vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from .compiler import FUNCTION_OPTIONS, inlined

# By float type: the integer of its size, the bits of its mantissa, its exponent's bias.
_FORMAT: dict[Any, tuple[Any, int, int]] = {
    types.float32: (types.int32, 23, 127),
    types.float64: (types.int64, 52, 1023),
}
_FLOAT: dict[Any, Any] = {types.int32: types.float32, types.int64: types.float64}


@intrinsic
def cast(typingctx: Any, value: Any, like: Any) -> Any:
    """A number in the dtype of another: keeps constants from widening a float32 loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, like)

    return like(value, like), codegen


def _flip(builder: Any, bits: Any) -> Any:
    """Sign and magnitude to two's complement, or back: invert the lower bits of negatives."""
    width = bits.type.width
    sign = builder.ashr(bits, ir.Constant(bits.type, width - 1))
    return builder.xor(bits, builder.and_(sign, ir.Constant(bits.type, 2 ** (width - 1) - 1)))


@intrinsic
def ordered(typingctx: Any, value: Any) -> Any:
    """An integer image of a float with the same order; NaN lies beyond the infinities."""
    integer = _FORMAT[value][0]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _flip(builder, builder.bitcast(args[0], context.get_value_type(integer)))

    return integer(value), codegen


@intrinsic
def from_ordered(typingctx: Any, image: Any) -> Any:
    """The float whose `ordered` image this is."""
    number = _FLOAT[image]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(_flip(builder, args[0]), context.get_value_type(number))

    return number(image), codegen


@intrinsic
def power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2**n from n + 1.5 * 2**mantissa, whose low bits are those of n."""
    integer, mantissa, bias = _FORMAT[shifted]
    ir_integer = ir.IntType(integer.bitwidth)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir_integer)  # the shifter's own bits leave to the left
        exponent = builder.add(bits, ir.Constant(ir_integer, bias))
        power = builder.shl(exponent, ir.Constant(ir_integer, mantissa))
        return builder.bitcast(power, args[0].type)

    return shifted(shifted), codegen


def exp(x: Any) -> Any:
    """e**x for x <= 0 in x's dtype; exactly 0 where the result would be subnormal; NaN stays.

    x = n ln 2 + r with abs(r) <= ln 2 / 2, then e**r by a polynomial and 2**n through the
    exponent bits. n is rounded by adding and subtracting 1.5 * 2**23 (or 2**52). ln 2 is
    split in two so that n ln 2 is exact where it matters. Within 1 ulp.
    """
    raise NotImplementedError


@overload(exp, jit_options=FUNCTION_OPTIONS)
def _exp(x: Any) -> Any:
    if x == types.float32:
        number: Any = np.float32
        tail = _tail_float32
        shifter, lowest = number(1.5 * 2**23), number(-87.0)
        ln2_high, ln2_low = number(0.693359375), number(-2.12194440e-4)
    else:
        number, tail = np.float64, _tail_float64
        shifter, lowest = number(1.5 * 2**52), number(-708.0)
        ln2_high, ln2_low = number(0.6931471803691238), number(1.9082149292705877e-10)
    log2_e, zero, one, half = number(1.4426950408889634), number(0), number(1), number(0.5)

    def value(x: Any) -> Any:
        clamped = lowest if x < lowest else x  # this way round NaN passes
        shifted = clamped * log2_e + shifter
        n = shifted - shifter
        r = (clamped - n * ln2_high) - n * ln2_low
        result = (((tail(r) * r + half) * r + one) * r + one) * power_of_two(shifted)
        return zero if x < lowest else result

    return value


# (e**r - 1 - r - r*r/2) / r**3 by Taylor: on an interval this short the first term left
# out is below a quarter of an ulp, so a minimax fit would gain nothing.
_F32 = tuple(np.float32(1 / f) for f in (6, 24, 120, 720, 5040))
_F64 = tuple(1 / float(f) for f in np.cumprod(np.arange(1, 14))[2:])


@inlined
def _tail_float32(r: Any) -> Any:
    return (((_F32[4] * r + _F32[3]) * r + _F32[2]) * r + _F32[1]) * r + _F32[0]


@inlined
def _tail_float64(r: Any) -> Any:
    upper = (((_F64[10] * r + _F64[9]) * r + _F64[8]) * r + _F64[7]) * r + _F64[6]
    upper = ((upper * r + _F64[5]) * r + _F64[4]) * r + _F64[3]
    return ((upper * r + _F64[2]) * r + _F64[1]) * r + _F64[0]
