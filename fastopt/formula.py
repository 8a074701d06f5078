"""The names that formulas are written in.

Here they work on torch's tensors. Inside a formula that is compiled they are the compiler's own
functions of numbers, which mean the same, also at NaN and infinities.
"""

from .kernels.reference.vocabulary import (
    abs,
    divide,
    erf,
    exp,
    expm1,
    isnan,
    log,
    log1p,
    log_sigmoid,
    maximum,
    minimum,
    power,
    rounded,
    rsqrt,
    sigmoid,
    sign,
    softplus,
    sqrt,
    tanh,
    where,
)

__all__ = [
    "abs",
    "divide",
    "erf",
    "exp",
    "expm1",
    "isnan",
    "log",
    "log1p",
    "log_sigmoid",
    "maximum",
    "minimum",
    "power",
    "rounded",
    "rsqrt",
    "sigmoid",
    "sign",
    "softplus",
    "sqrt",
    "tanh",
    "where",
]
