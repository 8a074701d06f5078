"""The error function, written so that LLVM turns loops over it into vector code."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types
from numba.extending import overload

from .compiler import FUNCTION_OPTIONS, inlined
from .vector_math import cast, exp


def erf(x: Any) -> Any:
    """The error function in x's dtype, within 3 ulp.

    Up to 1 it is x times a polynomial of x**2. Beyond it is 1 - exp(-x**2) times a polynomial of
    (x - 2.5) / (x + 2.5), up to where the difference from 1 has no bits.
    """
    raise NotImplementedError


# erf(x) / x by powers of x**2 up to 1, and erfc(x) * exp(x**2) beyond, by least squares with
# weights until the largest errors are alike (relative 1e-9 and 8e-18, absolute 2e-9 and 2e-17).
_NEAR_32 = tuple(
    map(
        np.float32,
        (
            1.12837916588150263,
            -0.376126269035804383,
            0.112835974634880531,
            -0.0268543287960672443,
            0.00518931194268661768,
            -0.000801885499278638696,
            0.0000788249711008666357,
        ),
    )
)
_NEAR_64 = (
    1.12837916709551257, -0.376126389031835435, 0.112837916709451297, -0.0268661706432569943,
    0.00522397760726994529, -0.000854832598254322506, 0.000120552951126670011,
    -0.000014924740785377575, 1.64474711905946181e-6, -1.62088298568102008e-7,
    1.37215204063510944e-8, -7.7985438505499469e-10,
)  # fmt: skip
_FAR_32 = tuple(
    map(
        np.float32,
        (
            0.210805809059374982,
            -0.371746659189669296,
            0.251680211021906926,
            -0.124802191940002879,
            0.041697901316256861,
        ),
    )
)
_FAR_64 = (
    0.210806364061146935, -0.371736733949149418, 0.25171319320931471, -0.125033052437653349,
    0.0399225398186481946, -0.00399368853361759535, -0.0026423102945947025,
    0.000875825183427789311, 0.000226543548775076755, -0.00013676537876833391,
    -0.0000511154936862355819,
)  # fmt: skip


@overload(erf, jit_options=FUNCTION_OPTIONS)
def _erf(x: Any) -> Any:
    near_series = _near_float32 if x == types.float32 else _near_float64
    far_series = _far_float32 if x == types.float32 else _far_float64

    def value(x: Any) -> Any:
        one, size, middle = cast(1, x), abs(x), cast(2.5, x)
        most = cast(6, x)
        bounded = size if not size > most else most
        near = near_series(size * size) * x
        rest = far_series((bounded - middle) / (bounded + middle)) * exp(-bounded * bounded)
        far = one - rest
        return (far if x >= cast(0, x) else -far) if size > one else near

    return value


@inlined
def _near_float32(q: Any) -> Any:
    c = _NEAR_32
    return (((((c[6] * q + c[5]) * q + c[4]) * q + c[3]) * q + c[2]) * q + c[1]) * q + c[0]


@inlined
def _near_float64(q: Any) -> Any:
    c = _NEAR_64
    upper = (((((c[11] * q + c[10]) * q + c[9]) * q + c[8]) * q + c[7]) * q + c[6]) * q + c[5]
    return ((((upper * q + c[4]) * q + c[3]) * q + c[2]) * q + c[1]) * q + c[0]


@inlined
def _far_float32(t: Any) -> Any:
    c = _FAR_32
    return (((c[4] * t + c[3]) * t + c[2]) * t + c[1]) * t + c[0]


@inlined
def _far_float64(t: Any) -> Any:
    c = _FAR_64
    upper = (((((c[10] * t + c[9]) * t + c[8]) * t + c[7]) * t + c[6]) * t + c[5]) * t + c[4]
    return (((upper * t + c[3]) * t + c[2]) * t + c[1]) * t + c[0]
