"""Scalar functions written so that LLVM turns loops over them into vector code.

``math.exp`` stays a scalar library call without Intel's SVML; a polynomial and integers do
vectorise. Integer steps are emitted as LLVM instructions: numba widens every int32
operation to int64, which halves the vectors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, overload

from .compiler import FUNCTION_OPTIONS, exact, inlined

# By float type: the integer of its size, the bits of its mantissa, its exponent's bias.
_FORMAT: dict[Any, tuple[Any, int, int]] = {
    types.float32: (types.int32, 23, 127),
    types.float64: (types.int64, 52, 1023),
}


@intrinsic
def cast(typingctx: Any, value: Any, like: Any) -> Any:
    """A number in the dtype of another: keeps constants from widening a float32 loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, like)

    return like(value, like), codegen


@intrinsic
def _split(typingctx: Any, x: Any) -> Any:
    """(m, e) as float64 with x = m * 2**e and m in [sqrt(1/2), sqrt(2)), of normal numbers > 0."""
    result = types.UniTuple(types.float64, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64 = ir.IntType(64)
        bits = builder.bitcast(args[0], i64)
        # counted from sqrt(1/2), so that whole powers of two begin there
        above = builder.sub(bits, ir.Constant(i64, _ROOT_HALF))
        exponent = builder.ashr(above, ir.Constant(i64, 52))
        mantissa = builder.sub(bits, builder.shl(exponent, ir.Constant(i64, 52)))
        # a small integer to float without a conversion, which AVX2 doesn't have for 64 bits
        shifter = struct.unpack("<q", struct.pack("<d", 1.5 * 2**52))[0]
        shifted = builder.bitcast(builder.add(exponent, ir.Constant(i64, shifter)), ir.DoubleType())
        number = builder.fsub(shifted, ir.Constant(ir.DoubleType(), 1.5 * 2**52))
        return context.make_tuple(
            builder, result, (builder.bitcast(mantissa, ir.DoubleType()), number)
        )

    return result(types.float64), codegen


_ROOT_HALF = struct.unpack("<q", struct.pack("<d", math.sqrt(0.5)))[0]


@inlined
def log(x: float) -> float:
    """Natural logarithm of a float64 >= 0 that is no subnormal number, within 1.5 ulp."""
    m, e = _split(x)
    f = m - 1.0
    result = e * _LN2[0] + ((f - shortfall(f)) + e * _LN2[1])
    result = -np.inf if x == 0.0 else result
    return result if x < np.inf else x  # NaN stays, too


def shortfall(f: Any) -> Any:
    """f - log(1 + f) for f between -0.3 and 0.5, in f's dtype, within 2 ulp."""
    raise NotImplementedError


# Of atanh(s) = s + s**3 / 3 + ..., up to s**21, or s**11 in float32; s is at most 0.2.
_ATANH = tuple(1 / (2 * k + 1) for k in range(1, 11))
_ATANH_32 = tuple(map(np.float32, _ATANH[:5]))


@overload(shortfall, jit_options=FUNCTION_OPTIONS)
def _shortfall(f: Any) -> Any:
    series = _series_float32 if f == types.float32 else _series_float64

    def value(f: Any) -> Any:
        two = cast(2, f)
        s = f / (two + f)
        # of log(1 + f) = 2 s + ... the 2 s is f but for s f
        return _difference(s * f, two * s * series(s * s))

    return value


@exact
def _difference(a: Any, b: Any) -> Any:
    return a - b  # of two products, either of which might become one with the difference


@inlined
def _series_float32(q: Any) -> Any:
    c = _ATANH_32
    return q * ((((c[4] * q + c[3]) * q + c[2]) * q + c[1]) * q + c[0])


@inlined
def _series_float64(q: Any) -> Any:
    upper = (((_ATANH[9] * q + _ATANH[8]) * q + _ATANH[7]) * q + _ATANH[6]) * q + _ATANH[5]
    lower = (((upper * q + _ATANH[4]) * q + _ATANH[3]) * q + _ATANH[2]) * q + _ATANH[1]
    return q * (lower * q + _ATANH[0])


@intrinsic
def power_of_two(typingctx: Any, shifted: Any) -> Any:
    """2**n from n + bias + 1.5 * 2**mantissa, whose low bits are those of n + bias."""
    integer, mantissa, _ = _FORMAT[shifted]
    ir_integer = ir.IntType(integer.bitwidth)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], ir_integer)  # the shifter's own bits leave to the left
        power = builder.shl(bits, ir.Constant(ir_integer, mantissa))
        return builder.bitcast(power, args[0].type)

    return shifted(shifted), codegen


@intrinsic
def halves_of_power(typingctx: Any, shifted: Any) -> Any:
    """Two numbers whose product is 2**n, from n + bias + 1.5 * 2**mantissa, of any n of use."""
    integer, mantissa, bias = _FORMAT[shifted]
    ir_integer = ir.IntType(integer.bitwidth)
    result = types.UniTuple(shifted, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def constant(number: int) -> Any:
            return ir.Constant(ir_integer, number)

        # the bits of 1.5 * 2**mantissa, which are those of its exponent and a half
        shifter = ((bias + mantissa) << mantissa) | (1 << (mantissa - 1))
        n = builder.sub(builder.bitcast(args[0], ir_integer), constant(shifter + bias))
        half = builder.ashr(n, constant(1))
        parts = []
        for exponent in (half, builder.sub(n, half)):
            biased = builder.add(exponent, constant(bias))
            parts.append(builder.bitcast(builder.shl(biased, constant(mantissa)), args[0].type))
        return context.make_tuple(builder, result, parts)

    return result(shifted), codegen


def exp(x: Any) -> Any:
    """e**x in x's dtype, within 1 ulp; infinity, 0, NaN and subnormal numbers as they should be.

    x = n ln 2 + r with abs(r) <= ln 2 / 2, then e**r by a polynomial and 2**n through the
    exponent bits. n is rounded by adding and subtracting 1.5 * 2**23 (or 2**52).
    """
    raise NotImplementedError


def exp_below_one(x: Any) -> Any:
    """`exp` for x <= 0, with 0 where the result would be subnormal, or all but.

    float32's error is larger below -8, where the x that this is for have lost more, as differences.
    """
    raise NotImplementedError


def exp_and_less(x: Any) -> Any:
    """`exp_below_one`, and that less 1 with all of its digits, near 0 too."""
    raise NotImplementedError


def expm1(x: Any) -> Any:
    """e**x - 1 in x's dtype, within 2 ulp, with all of its digits near 0."""
    raise NotImplementedError


@inlined
def tanh(x: Any) -> Any:
    """In x's dtype, within 3 ulp; 1 and -1 exactly far out, NaN of NaN."""
    one, two = cast(1, x), cast(2, x)
    e, less = exp_and_less(-two * abs(x))
    near = e > cast(0.5, x)
    part = (-less if near else two * e) / (one + e)
    above = part if near else one - part
    return above if x >= cast(0, x) else -above


# Of (e**r - 1 - r) / r**2 for abs(r) <= ln 2 / 2 (relative errors of e**r 3e-9, 2e-10, 4e-18).
_SHORT = tuple(
    map(
        np.float32,
        (
            0.4999999345,
            0.1666652063,
            0.04166838805,
            0.00836871688,
            0.001381459865,
        ),
    )
)
_F32 = tuple(
    map(
        np.float32,
        (
            0.5000000014,
            0.1666666668,
            0.0416664642,
            0.008333310845,
            0.001393373072,
            0.0001989108046,
        ),
    )
)
_F64 = (
    0.500000000000001063, 0.166666666666664125, 0.0416666666665301586,
    0.00833333333349446166, 0.00138888889436301129, 0.000198412695065786877,
    0.0000248014930989065507, 2.75575863738401637e-6, 2.7630248379211444e-7,
    2.50000616028356667e-8,
)  # fmt: skip


# In two parts, of which n times the first has no rounding.
_LN2 = (0.6931471803691238, 1.9082149292705877e-10)
_LN2_32 = (0.693359375, -2.12194440e-4)


@overload(exp, jit_options=FUNCTION_OPTIONS)
def _exp(x: Any) -> Any:
    return _code(x, whole=True)


@overload(exp_below_one, jit_options=FUNCTION_OPTIONS)
def _exp_below_one(x: Any) -> Any:
    return _code(x, whole=False)


@overload(exp_and_less, jit_options=FUNCTION_OPTIONS)
def _exp_and_less(x: Any) -> Any:
    return _code(x, whole=False, both=True)


@overload(expm1, jit_options=FUNCTION_OPTIONS)
def _expm1(x: Any) -> Any:
    return _code(x, whole=True, both=True)


def _code(x: Any, whole: bool, both: bool = False) -> Callable[[Any], Any]:
    """e**x for any x, or for x <= 0 alone; with `both` e**x - 1, or both of them for x <= 0."""
    _, mantissa, bias = _FORMAT[x]
    number: Any = np.float32 if x == types.float32 else np.float64
    polynomial = _polynomial_float32 if x == types.float32 else _polynomial_float64
    shifter = number(1.5 * 2**mantissa + bias)
    # Of the lowest number 2**n has no bits: 0. Of the highest the result is infinite.
    lowest = number(-math.log(2) * (bias + mantissa + 2 if whole else bias))
    highest = number(math.log(2) * (bias + 1.1))
    log2_e, one = number(1 / math.log(2)), number(1)
    large = number(mantissa)  # whose power loses nothing to a difference of 1
    high, low = map(number, _LN2_32 if x == types.float32 else _LN2)
    if x == types.float32 and not whole:
        polynomial, high, low = _polynomial_short, number(math.log(2)), None  # off by 2e-9

    def value(x: Any) -> Any:
        clamped = lowest if x < lowest else x  # this way round NaN passes
        if whole:
            clamped = highest if clamped > highest else clamped
        shifted = clamped * log2_e + shifter
        n = shifted - shifter
        rest = clamped - n * high
        r = rest if low is None else rest - n * low
        if both and not whole:
            power, more = power_of_two(shifted), (polynomial(r) * r + one) * r
            return power + power * more, (power - one) + power * more
        if not whole:
            return ((polynomial(r) * r + one) * r + one) * power_of_two(shifted)
        # with what the three sums round off, so that the result is rounded once
        above = r * r * polynomial(r)
        more = r + above
        power = one + more
        lost = (above - (more - r)) + ((rest - r) - n * low)
        power += (more - (power - one)) + lost
        first, second = halves_of_power(shifted)
        if not both:
            return power * first * second
        scale = first * second
        near = (scale - one) + scale * (more + lost)
        return power * first * second - one if x > large else near

    return value


@inlined
def _polynomial_short(r: Any) -> Any:
    return (((_SHORT[4] * r + _SHORT[3]) * r + _SHORT[2]) * r + _SHORT[1]) * r + _SHORT[0]


@inlined
def _polynomial_float32(r: Any) -> Any:
    lower = ((_F32[5] * r + _F32[4]) * r + _F32[3]) * r + _F32[2]
    return (lower * r + _F32[1]) * r + _F32[0]


@inlined
def _polynomial_float64(r: Any) -> Any:
    upper = (((_F64[9] * r + _F64[8]) * r + _F64[7]) * r + _F64[6]) * r + _F64[5]
    return ((((upper * r + _F64[4]) * r + _F64[3]) * r + _F64[2]) * r + _F64[1]) * r + _F64[0]
