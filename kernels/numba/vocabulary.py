"""The names that formulas are written in, as functions that loops are vectorised with.

float32 ones that are no single instruction compute in float64 in between: that rounds once, and
needs no care about overflow. What is 0 or 1 in the maths is so to the last bit.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from .compiler import exact, inlined
from .vector_math import cast


@inlined
def where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


@inlined
def maximum(a: Any, b: Any) -> Any:
    larger = a if a > b else b  # b where either is NaN
    return a if a != a else larger


@inlined
def minimum(a: Any, b: Any) -> Any:
    smaller = a if a < b else b
    return a if a != a else smaller


@inlined
def absolute(x: Any) -> Any:
    return abs(x)


@inlined
def sign(x: Any) -> Any:
    zero = cast(0, x)
    up = cast(1, x) if x > zero else zero
    return cast(-1, x) if x < zero else up


@inlined
def divide(a: Any, b: Any) -> Any:
    return a / b


@inlined
def rounded(x: Any, like: Any) -> Any:
    return cast(x, like)


@inlined
def power(a: Any, b: Any) -> Any:
    return a**b


@inlined
def sqrt(x: Any) -> Any:
    return math.sqrt(x)


@inlined
def isnan(x: Any) -> Any:
    return x != x


@inlined
def exp(x: Any) -> Any:
    return cast(_exp(np.float64(x)), x)


@inlined
def log(x: Any) -> Any:
    return cast(_log(np.float64(x)), x)


@inlined
def log1p(x: Any) -> Any:
    return cast(_log1p(np.float64(x)), x)


@inlined
def softplus(x: Any) -> Any:
    y = np.float64(x)
    return cast((y if not y <= 0.0 else 0.0) + _log1p_of_unit(_exp(-abs(y))), x)


@inlined
def log_sigmoid(x: Any) -> Any:
    y = np.float64(x)
    return cast((y if not y >= 0.0 else 0.0) - _log1p_of_unit(_exp(-abs(y))), x)


@inlined
def sigmoid(x: Any) -> Any:
    y = np.float64(x)
    e = _exp(-abs(y))
    return cast((1.0 if y >= 0.0 else e) / (1.0 + e), x)


# -- of float64 ------------------------------------------------------------------------

_SHIFTER = 1.5 * 2**52
_SHIFTER_BITS = struct.unpack("<q", struct.pack("<d", _SHIFTER))[0]
_ROOT_HALF = struct.unpack("<q", struct.pack("<d", math.sqrt(0.5)))[0]
_LOG2_E = 1 / math.log(2)
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
#: Of e**r for abs(r) <= ln 2 / 2: (e**r - 1 - r) / r**2, relative error 4e-18.
_EXP = (
    0.500000000000001063, 0.166666666666664125, 0.0416666666665301586,
    0.00833333333349446166, 0.00138888889436301129, 0.000198412695065786877,
    0.0000248014930989065507, 2.75575863738401637e-6, 2.7630248379211444e-7,
    2.50000616028356667e-8,
)  # fmt: skip
#: Of atanh(s) = s + s**3 / 3 + ..., up to s**21; s is at most 0.172.
_ATANH = tuple(1 / (2 * k + 1) for k in range(1, 11))


@intrinsic
def _halves_of_power(typingctx: Any, shifted: Any) -> Any:
    """Two numbers whose product is 2**n, from n + 1.5 * 2**52 with abs(n) below 2,000."""
    result = types.UniTuple(types.float64, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, double = ir.IntType(64), ir.DoubleType()
        n = builder.sub(builder.bitcast(args[0], i64), ir.Constant(i64, _SHIFTER_BITS))
        half = builder.ashr(n, ir.Constant(i64, 1))
        parts = []
        for exponent in (half, builder.sub(n, half)):
            biased = builder.add(exponent, ir.Constant(i64, 1023))
            parts.append(builder.bitcast(builder.shl(biased, ir.Constant(i64, 52)), double))
        return context.make_tuple(builder, result, parts)

    return result(types.float64), codegen


@intrinsic
def _split(typingctx: Any, x: Any) -> Any:
    """(m, e) with x = m * 2**e and m in [sqrt(1/2), sqrt(2)), of normal numbers > 0."""
    result = types.UniTuple(types.float64, 2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        i64, double = ir.IntType(64), ir.DoubleType()
        bits = builder.bitcast(args[0], i64)
        above = builder.sub(bits, ir.Constant(i64, _ROOT_HALF))
        exponent = builder.ashr(above, ir.Constant(i64, 52))
        mantissa = builder.sub(bits, builder.shl(exponent, ir.Constant(i64, 52)))
        # a small integer to float without a conversion, which AVX2 doesn't have for 64 bits
        shifted = builder.bitcast(builder.add(exponent, ir.Constant(i64, _SHIFTER_BITS)), double)
        number = builder.fsub(shifted, ir.Constant(double, _SHIFTER))
        return context.make_tuple(builder, result, (builder.bitcast(mantissa, double), number))

    return result(types.float64), codegen


@inlined
def _exp(x: Any) -> Any:
    clamped = -750.0 if x < -750.0 else x  # this way round NaN passes
    clamped = 710.0 if clamped > 710.0 else clamped
    shifted = clamped * _LOG2_E + _SHIFTER
    n = shifted - _SHIFTER
    r = clamped - n * _LN2_HIGH
    r -= n * _LN2_LOW
    upper = (((_EXP[9] * r + _EXP[8]) * r + _EXP[7]) * r + _EXP[6]) * r + _EXP[5]
    lower = ((((upper * r + _EXP[4]) * r + _EXP[3]) * r + _EXP[2]) * r + _EXP[1]) * r + _EXP[0]
    first, second = _halves_of_power(shifted)
    return ((lower * r + 1.0) * r + 1.0) * first * second


@exact
def _difference(a: Any, b: Any) -> Any:
    return a - b  # of two products, either of which might become one with the difference


@inlined
def _log_of_sum(f: Any) -> Any:
    """log(1 + f) for f between sqrt(1/2) - 1 and sqrt(2) - 1."""
    s = f / (2.0 + f)
    q = s * s
    upper = (((_ATANH[9] * q + _ATANH[8]) * q + _ATANH[7]) * q + _ATANH[6]) * q + _ATANH[5]
    lower = (((upper * q + _ATANH[4]) * q + _ATANH[3]) * q + _ATANH[2]) * q + _ATANH[1]
    tail = 2.0 * s * (q * (lower * q + _ATANH[0]))
    return f - _difference(s * f, tail)  # 2 s is f but for s f, and f is exact


@inlined
def _log(x: Any) -> Any:
    small = x < 2.2250738585072014e-308
    m, e = _split(x * 18014398509481984.0 if small else x)  # 2**54
    e = e - 54.0 if small else e
    result = e * _LN2_HIGH + (_log_of_sum(m - 1.0) + e * _LN2_LOW)
    result = -np.inf if x == 0.0 else result
    result = np.nan if x < 0.0 else result
    return result if x < np.inf else x  # NaN stays, too


@inlined
def _log1p(x: Any) -> Any:
    u = 1.0 + x
    # what rounding took from u, in proportion; of a tiny x, where u is 1, all of it
    ratio = x / (u - 1.0) if u < np.inf else 1.0
    result = _log(u) * ratio
    return x if u == 1.0 else result


@inlined
def _log1p_of_unit(x: Any) -> Any:
    """log(1 + x) for x from 0 to 1, or NaN."""
    large = x > 0.4142135623730951
    f = (x - 1.0) * 0.5 if large else x
    return _log_of_sum(f) + (0.6931471805599453 if large else 0.0)
