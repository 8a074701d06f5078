"""The names that formulas are written in: in compiled code what they are on torch's tensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED

from fastopt import dispatch
from fastopt import formula as m
from fastopt.kernels.operation import Elementwise, Options

#: By torch in float64, of two numbers.
ORACLES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "abs": lambda a, b: a.abs(),
    "divide": lambda a, b: a / b,
    "erf": lambda a, b: a.erf(),
    "exp": lambda a, b: a.exp(),
    "expm1": lambda a, b: a.expm1(),
    "isnan": lambda a, b: a.isnan().to(a.dtype),
    "log": lambda a, b: a.log(),
    "log1p": lambda a, b: a.log1p(),
    "log_sigmoid": lambda a, b: torch.nn.functional.logsigmoid(a),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "power": lambda a, b: torch.where(a.isnan(), 1.0, a) ** b,
    "rounded": lambda a, b: a,
    "rsqrt": lambda a, b: a.rsqrt(),
    "sigmoid": lambda a, b: a.sigmoid(),
    "sign": lambda a, b: torch.where(a.isnan(), 0.0, a.sign()),
    "softplus": lambda a, b: -torch.nn.functional.logsigmoid(-a),
    "sqrt": lambda a, b: torch.from_numpy(np.sqrt(a.cpu().numpy())).to(a.device),  # torch's is off
    "tanh": lambda a, b: a.tanh(),
    "where": lambda a, b: torch.where(a > b, a, b),
}
#: Those that are rounded once, and to the nearest, on any device.
EXACT = ("abs", "divide", "isnan", "maximum", "minimum", "rounded", "sign", "sqrt", "where")


class Word(Elementwise):
    """One name of the vocabulary, by its number."""

    which: int = 0

    def value_and_slopes(h, input: Any, target: Any) -> Any:
        if h.which == 0:
            value = m.abs(input)
        elif h.which == 1:
            value = m.divide(input, target)
        elif h.which == 2:
            value = m.erf(input)
        elif h.which == 3:
            value = m.exp(input)
        elif h.which == 4:
            value = m.expm1(input)
        elif h.which == 5:
            value = m.where(m.isnan(input), 1.0, 0.0)
        elif h.which == 6:
            value = m.log(input)
        elif h.which == 7:
            value = m.log1p(input)
        elif h.which == 8:
            value = m.log_sigmoid(input)
        elif h.which == 9:
            value = m.maximum(input, target)
        elif h.which == 10:
            value = m.minimum(input, target)
        elif h.which == 11:
            value = m.power(m.where(m.isnan(input), 1.0, input), target)
        elif h.which == 12:
            value = m.rounded(input, target)
        elif h.which == 13:
            value = m.rsqrt(input)
        elif h.which == 14:
            value = m.sigmoid(input)
        elif h.which == 15:
            value = m.sign(input)
        elif h.which == 16:
            value = m.softplus(input)
        elif h.which == 17:
            value = m.sqrt(input)
        elif h.which == 18:
            value = m.tanh(input)
        else:
            value = m.where(input > target, input, target)
        return value, value


def test_each_name_has_an_oracle() -> None:
    assert list(ORACLES) == m.__all__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_name(name: str, dtype: torch.dtype) -> None:
    special = [0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 1e30, 88.5, -88.5, -104.0, 710.0, -746.0, 17.0]
    special += [math.inf, -math.inf, math.nan, 2.5, -0.4, 1e-7]
    pairs = torch.tensor(list(itertools.product(special, special)), dtype=dtype)
    pairs = torch.cat((pairs, 10 * torch.randn(1000, 2, dtype=dtype))).to(DEVICE)
    input, target = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    options = Options(Word(which=list(ORACLES).index(name)), "none", dtype)
    backend = dispatch.load(BACKEND)
    found = backend.forward(options, (input, target), (False, False))[0]
    right = ORACLES[name](input.double(), target.double()).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal  # below, a GPU has 0
    tolerance = 0.0 if name in EXACT else 8 * torch.finfo(dtype).eps
    if name == "power" and dtype == torch.float64 and BACKEND == "triton":
        tolerance = 1e-13
    torch.testing.assert_close(found, right, rtol=tolerance, atol=tiny, equal_nan=True)


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="on GPUs it may be off by a digit")
def test_powers_of_float32() -> None:
    """Rounded once, and of special numbers as C has it, signs of zeros and infinities too."""
    special = [0.0, 0.5, 1.0, 2.0, 2.5, 3.0, 1e-45, 1e-30, 3e38, 16_777_217.0, math.inf, math.nan]
    special += [-number for number in special]
    pairs = torch.tensor(list(itertools.product(special, special)))
    usual = torch.stack([10 * torch.rand(100_000), 20 * torch.randn(100_000)], 1)
    input, target = torch.cat((pairs, usual)).unbind(1)
    given = input.contiguous(), target.contiguous()
    options = Options(Word(which=list(ORACLES).index("power")), "none", torch.float32)
    found = dispatch.load("numba").forward(options, given, (False, False))[0]
    base = torch.where(input.isnan(), 1.0, input).double()  # as the formula has it
    right = (base ** target.double()).float()
    torch.testing.assert_close(found, right, rtol=0, atol=0, equal_nan=True)
    known = ~right.isnan()
    assert torch.equal(found.signbit()[known], right.signbit()[known])


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about loops on the CPU")
def test_vectors_as_wide_as_the_cpu_has() -> None:
    numba = pytest.importorskip("numba")
    from fastopt.kernels.numba.target import widest_vectors

    def loop(x: Any, y: Any) -> None:
        for i in range(len(x)):
            y[i] = 2 * x[i]

    def wide(x: Any, y: Any) -> None:
        widest_vectors()
        for i in range(len(x)):
            y[i] = 2 * x[i]

    narrow, widened = (numba.njit("(f4[::1], f4[::1])")(f) for f in (loop, wide))
    (before,), (after,) = narrow.inspect_asm().values(), widened.inspect_asm().values()
    features = numba.core.registry.cpu_target.target_context.codegen().magic_tuple()[2]
    assert ("zmm" in after) == ("zmm" in before or "+avx512vbmi2" in features.split(","))
