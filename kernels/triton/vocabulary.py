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
    wide = tl.exp(b.to(tl.float64) * tl.log(a.to(tl.float64)))
    return tl.where((b == 0.0) | (a == 1.0), 1.0, wide).to(a.dtype)


@device_function
def absolute(x):
    return tl.abs(x)


@device_function
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


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
