"""The names that formulas are written in, as functions of Triton's blocks.

Triton's own exponential of a float32 is off by as many units in the last place as its argument
is large, and has no logarithm of 1 + x.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import device_function
from .vector_math import quotient, root

sqrt, divide = root, quotient


@device_function
def where(condition, a, b):
    return tl.where(condition, a, b)


@device_function
def maximum(a, b):
    return tl.maximum(a, b, tl.PropagateNan.ALL)


@device_function
def minimum(a, b):
    return tl.minimum(a, b, tl.PropagateNan.ALL)


@device_function
def rounded(x, like):
    return x.to(like.dtype)


@device_function
def power(a, b):
    exponent, size = tl.cast(b, tl.float64), tl.abs(a).to(tl.float64)
    wide = tl.where(size == 1.0, 1.0, tl.exp(exponent * tl.log(size)))
    # of a negative number there are whole powers alone, of which odd ones are negative
    half = exponent * 0.5
    odd = tl.where(tl.floor(exponent) == exponent, tl.where(tl.floor(half) != half, 1.0, 0.0), 0.5)
    below = tl.where(a == 0.0, quotient(tl.full(a.shape, 1.0, a.dtype), a), a) < 0.0  # -0.0 is, too
    wide = tl.where(below, tl.where(odd == 1.0, -wide, wide), wide)
    none = tl.where(a < 0.0, tl.where(a > float("-inf"), odd, 0.0), 0.0) == 0.5
    wide = tl.where(none, float("nan"), wide)
    wide = tl.where(b == 0.0, 1.0, wide)
    return tl.where(a == 1.0, 1.0, wide).to(a.dtype)


@device_function
def abs(x):
    return tl.abs(x)


@device_function
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@device_function
def rsqrt(x):
    return quotient(tl.full(x.shape, 1.0, x.dtype), root(x))


@device_function
def isnan(x):
    return x != x


@device_function
def exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        # 2**n in two halves, of which neither overflows where the product doesn't
        n = tl.floor(tl.minimum(tl.maximum(x, -200.0), 200.0) * 1.4426950408889634 + 0.5)
        r = (x - n * 0.693145751953125) - n * 1.42860682030941723212e-6
        half = tl.floor(n * 0.5)
        result = tl.exp2(r * 1.4426950408889634) * tl.exp2(half) * tl.exp2(n - half)
        result = tl.where(x > 100.0, float("inf"), tl.where(x < -110.0, 0.0, result))
        return tl.where(x != x, x, result)


@device_function
def expm1(x):
    # near 0 by its series, whose terms beyond have no bits in float64
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = near * (1 / 17) + 1.0
    for k in tl.static_range(16, 1, -1):
        series = series * near * (1 / k) + 1.0
    return tl.where(x == near, series * near, exp(x) - 1.0)


@device_function
def tanh(x):
    less = expm1(-2.0 * tl.abs(x))
    above = quotient(-less, 2.0 + less)
    return tl.where(x >= 0.0, above, -above)


@device_function
def erf(x):
    return tl.erf(x)


@device_function
def log(x):
    return tl.log(x)


@device_function
def log1p(x):
    u = 1.0 + x
    # what rounding took from u, in proportion; of a tiny x, where u is 1, all of it
    ratio = tl.where(u < float("inf"), quotient(x, tl.where(u == 1.0, 1.0, u - 1.0)), 1.0)
    return tl.where(u == 1.0, x, tl.log(u) * ratio)


@device_function
def log1p_of_unit(x):
    """log(1 + x) for x from 0 to 1, or NaN."""
    if x.dtype == tl.float64:
        return log1p(x)
    else:
        large = x > 0.4142135623730951
        f = tl.where(large, (x - 1.0) * 0.5, x)
        s = quotient(f, 2.0 + f)  # log(1 + f) is 2 atanh(s), and 2 s is f - s f
        q = s * s
        series = ((q * (1 / 11) + (1 / 9)) * q + (1 / 7)) * q + (1 / 5)
        tail = 2.0 * s * q * (series * q + (1 / 3))
        return f - (s * f - tail) + tl.where(large, 0.6931471805599453, 0.0)


@device_function
def softplus(x):
    return tl.where(x <= 0.0, 0.0, x) + log1p_of_unit(exp(-tl.abs(x)))


@device_function
def log_sigmoid(x):
    return tl.where(x >= 0.0, 0.0, x) - log1p_of_unit(exp(-tl.abs(x)))


@device_function
def sigmoid(x):
    e = exp(-tl.abs(x))
    return quotient(tl.where(x >= 0.0, 1.0, e), 1.0 + e)
