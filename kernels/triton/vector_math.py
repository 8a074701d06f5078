"""Division and square root rounded as IEEE 754 and torch have it.

Triton's own float32 operators are off by up to two units in the last place, and flush what is
below 1e-38; those of float64 are exact. An optimizer has the time, which memory bandwidth
leaves; in the softmax the exact ones cost registers that long rows don't have.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import device_function


@device_function
def root(value):
    if value.dtype == tl.float32:
        return tl.sqrt_rn(value)
    else:
        return tl.sqrt(value)


@device_function
def quotient(dividend, divisor):
    if dividend.dtype == tl.float32:
        return tl.div_rn(dividend, divisor)
    else:
        return dividend / divisor
