"""The names that formulas are written in, as functions that loops are vectorised with.

Logarithms of float32 compute in float64 in between, which rounds once. What is 0 or 1 in the maths
is so to the last bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from . import error_function, powers, vector_math
from .compiler import inlined
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
def abs(x: Any) -> Any:
    return math.fabs(x)


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
    return powers.power(a, b)


@inlined
def sqrt(x: Any) -> Any:
    return math.sqrt(x)


@inlined
def rsqrt(x: Any) -> Any:
    return cast(1, x) / math.sqrt(x)


@inlined
def isnan(x: Any) -> Any:
    return x != x


@inlined
def exp(x: Any) -> Any:
    return vector_math.exp(x)


@inlined
def expm1(x: Any) -> Any:
    return vector_math.expm1(x)


@inlined
def tanh(x: Any) -> Any:
    return vector_math.tanh(x)


@inlined
def erf(x: Any) -> Any:
    return error_function.erf(x)


@inlined
def log(x: Any) -> Any:
    return cast(_log(np.float64(x)), x)


@inlined
def log1p(x: Any) -> Any:
    return cast(_log1p(np.float64(x)), x)


@inlined
def softplus(x: Any) -> Any:
    zero, half = cast(0, x), cast(0.5, x)
    e = vector_math.exp(-abs(x))
    # max(x, 0) + log(1 + e), which is log(2) + log(1 + f) for a large e
    large = e > half
    f = (e - cast(1, x)) * half if large else e  # without a rounding
    constant = cast(0.6931471805599453, x) if large else zero
    linear = x if not x <= zero else zero
    # three sums, and what they round off: where there is a constant it is larger than linear
    base, short = constant + linear, vector_math.shortfall(f)
    log = f - short
    result = base + log
    rest = (log - (result - base)) + ((f - log) - short) + (linear - (base - constant))
    return x if x > cast(100, x) else result + rest  # of infinity there would be NaN left


@inlined
def log_sigmoid(x: Any) -> Any:
    return -softplus(-x)


@inlined
def sigmoid(x: Any) -> Any:
    e, one = vector_math.exp(-abs(x)), cast(1, x)
    above, below = (one if x >= cast(0, x) else e), one + e
    inverse = one / below
    result = above * inverse
    # and what is left of the division, with what the sum below has rounded off
    return result + ((above - result * below) - result * (e - (below - one))) * inverse


@inlined
def _log(x: Any) -> Any:
    small = x < 2.2250738585072014e-308
    result = vector_math.log(x * 18014398509481984.0 if small else x)  # 2**54
    result = result - 37.42994775023705 if small else result  # log(2**54)
    return np.nan if x < 0.0 else result


@inlined
def _log1p(x: Any) -> Any:
    u = 1.0 + x
    # what rounding took from u, in proportion; of a tiny x, where u is 1, all of it
    ratio = x / (u - 1.0) if u < np.inf else 1.0
    result = _log(u) * ratio
    return x if u == 1.0 else result
