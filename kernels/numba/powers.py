"""Powers of float32, from logarithms and exponentials of float64, in whole vectors.

C's function takes one number at a time, ten times as long. Of float64, and so of what a step of an
optimizer computes once, it is taken as it is: its results are Python's, to the bit.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from .compiler import FUNCTION_OPTIONS
from .vector_math import exp, log

__all__ = ["power"]


def power(a: Any, b: Any) -> Any:
    """a**b, of special numbers as IEEE 754 has it; of float32 rounded once."""
    raise NotImplementedError


@overload(power, jit_options=FUNCTION_OPTIONS)
def _power(a: Any, b: Any) -> Any:
    def by_library(a: Any, b: Any) -> Any:
        return a**b

    def by_logarithm(a: Any, b: Any) -> Any:
        base, exponent = np.float64(a), np.float64(b)
        size, half = abs(base), exponent * 0.5
        result = exp(exponent * log(size))
        whole = np.floor(exponent) == exponent
        signed = math.copysign(result, base)
        result = signed if whole and np.floor(half) != half else result
        no_number = base < 0.0 and not whole and size < np.inf
        result = np.nan if no_number else result
        # 1 to an infinite power, and any number to the power 0, whose product would be NaN
        result = 1.0 if base == 1.0 or exponent == 0.0 else result
        result = 1.0 if size == 1.0 and abs(exponent) == np.inf else result
        return np.float32(result)

    return by_logarithm if a == b == types.float32 else by_library
