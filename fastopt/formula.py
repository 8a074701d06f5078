"""The names that formulas are written in.

Here they work on torch's tensors. Inside a formula that is compiled they are the compiler's own
functions of numbers, which mean the same, also at NaN and infinities.
"""

from .kernels.reference.vocabulary import (
    absolute,
    divide,
    exp,
    isnan,
    log,
    log1p,
    log_sigmoid,
    maximum,
    minimum,
    power,
    rounded,
    sigmoid,
    sign,
    softplus,
    sqrt,
    where,
)

__all__ = [
    "absolute",
    "divide",
    "exp",
    "isnan",
    "log",
    "log1p",
    "log_sigmoid",
    "maximum",
    "minimum",
    "power",
    "rounded",
    "sigmoid",
    "sign",
    "softplus",
    "sqrt",
    "where",
]
