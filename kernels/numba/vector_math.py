"""Scalar functions written so that LLVM turns loops over them into vector code.

``math.exp`` stays a scalar library call without Intel's SVML; a polynomial and integers do
vectorise. Integer steps are emitted as LLVM instructions: numba widens every int32
operation to int64, which halves the vectors.
"""

from __future__ import annotations

import math
import struct
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


@intrinsic
def cast(typingctx: Any, value: Any, like: Any) -> Any:
    """A number in the dtype of another: keeps constants from widening a float32 loop."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, like)

    return like(value, like), codegen


@intrinsic
def split(typingctx: Any, x: Any) -> Any:
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
# Of atanh(s) = s + s**3 / 3 + ..., up to s**21; s is at most 0.172.
_ATANH = tuple(1 / (2 * k + 1) for k in range(1, 11))


@inlined
def log(x: float) -> float:
    """Natural logarithm of a float64 >= 0 that is no subnormal number, within 1.5 ulp."""
    m, e = split(x)
    s = (m - 1.0) / (m + 1.0)
    q = s * s
    upper = (((_ATANH[9] * q + _ATANH[8]) * q + _ATANH[7]) * q + _ATANH[6]) * q + _ATANH[5]
    lower = (((upper * q + _ATANH[4]) * q + _ATANH[3]) * q + _ATANH[2]) * q + _ATANH[1]
    tail = 2.0 * s * (q * (lower * q + _ATANH[0]))
    # 2 s is m - 1 but for s (m - 1), and m - 1 is exact
    result = e * _LN2[0] + ((m - 1.0) - (s * (m - 1.0) - tail) + e * _LN2[1])
    result = -np.inf if x == 0.0 else result
    return result if x < np.inf else x  # NaN stays, too


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


def exp(x: Any) -> Any:
    """e**x for x <= 0 in x's dtype; 0 where the result would be subnormal, or all but; NaN stays.

    x = n ln 2 + r with abs(r) <= ln 2 / 2, then e**r by a polynomial and 2**n through the
    exponent bits. n is rounded by adding and subtracting 1.5 * 2**23 (or 2**52). Within 1 ulp,
    but for float32 below -8, where the x that this is for have lost more, as differences.
    """
    raise NotImplementedError


# Of (e**r - 1 - r) / r**2 for abs(r) <= ln 2 / 2 (Remez; relative errors of e**r 3e-9, 4e-18).
_COEFFICIENTS: dict[Any, tuple[float, ...]] = {
    types.float32: (
        0.4999999345, 0.1666652063, 0.04166838805, 0.00836871688, 0.001381459865,
    ),
    types.float64: (
        0.500000000000001063, 0.166666666666664125, 0.0416666666665301586,
        0.00833333333349446166, 0.00138888889436301129, 0.000198412695065786877,
        0.0000248014930989065507, 2.75575863738401637e-6, 2.7630248379211444e-7,
        2.50000616028356667e-8,
    ),
}  # fmt: skip


_LN2 = (0.6931471803691238, 1.9082149292705877e-10)


@overload(exp, jit_options=FUNCTION_OPTIONS)
def _exp(x: Any) -> Any:
    _, mantissa, bias = _FORMAT[x]
    number: Any = np.float32 if x == types.float32 else np.float64
    polynomial = _polynomial_float32 if x == types.float32 else _polynomial_float64
    shifter = number(1.5 * 2**mantissa + bias)
    lowest = number(-bias * math.log(2))  # its n is -bias, whose 2**n has no bits: 0
    log2_e, one = number(1 / math.log(2)), number(1)
    # ln 2 in two parts, of which float32 has no need: its one part is off by 2e-9.
    high, low = (math.log(2), None) if x == types.float32 else _LN2
    high = number(high)

    def value(x: Any) -> Any:
        clamped = lowest if x < lowest else x  # this way round NaN passes
        shifted = clamped * log2_e + shifter
        n = shifted - shifter
        r = clamped - n * high
        if low is not None:
            r -= n * low
        return ((polynomial(r) * r + one) * r + one) * power_of_two(shifted)

    return value


_F32 = tuple(map(np.float32, _COEFFICIENTS[types.float32]))
_F64 = _COEFFICIENTS[types.float64]


@inlined
def _polynomial_float32(r: Any) -> Any:
    return (((_F32[4] * r + _F32[3]) * r + _F32[2]) * r + _F32[1]) * r + _F32[0]


@inlined
def _polynomial_float64(r: Any) -> Any:
    upper = (((_F64[9] * r + _F64[8]) * r + _F64[7]) * r + _F64[6]) * r + _F64[5]
    return ((((upper * r + _F64[4]) * r + _F64[3]) * r + _F64[2]) * r + _F64[1]) * r + _F64[0]
