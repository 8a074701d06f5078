"""Derivatives that are derived from a formula's source, against torch's autograd and by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import formula as m
from fastopt.front.formula_record import Meaning, record_of_formula
from fastopt.front.written import read

GRID = [-3.0, -1.0, -0.5, -0.0, 0.0, 0.3, 0.5, 1.0, 1.7, 40.0, -40.0, math.inf, -math.inf, math.nan]

# Each name of the vocabulary, of a product, so that there is something to pass on.


def arithmetic(x: Any, y: Any) -> Any:
    return (x + 2.0 * y - x * y / 3.0) / (1.5 + x * x) - (-y) + 1.0 / (2.0 + y * y)


def whole_powers(x: Any, y: Any) -> Any:
    return x**2 + y**3 * x**5 + (x * y + 0.1) ** -2 + x**1 + y**0


def powers(x: Any, y: Any) -> Any:
    return (m.abs(x) + 0.5) ** 1.7 + m.power(m.abs(y) + 0.5, x * 0.1) + (m.abs(x) + 1.0) ** 0.5


def of_zero(x: Any, y: Any) -> Any:
    return m.abs(x) ** 1.5 + m.power(m.abs(y), 2.0 + m.sigmoid(x))


def roots(x: Any, y: Any) -> Any:
    return m.sqrt(x * x + 0.01) + m.rsqrt(0.5 + y * y) * m.divide(x, 2.0)


def exponentials(x: Any, y: Any) -> Any:
    return m.exp(-x * y) + m.expm1(0.3 * x) + m.log(1.0 + x * x) + m.log1p(y * y)


def of_units(x: Any, y: Any) -> Any:
    return m.sigmoid(x * 2.0) * y + m.tanh(y) + m.erf(x) + m.softplus(y) + m.log_sigmoid(x - y)


def kinks(x: Any, y: Any) -> Any:
    return m.abs(x - y) + m.maximum(x, y) * 2.0 + m.minimum(x * 2.0, 0.5) + m.sign(y) * x


def choices(x: Any, y: Any) -> Any:
    near = m.where(x > y, x * y, m.where(y > 0.0, y * 3.0, x))
    return near * m.where(m.isnan(x), 0.0, x) + m.where(x == y, 1.0, y)


def reused(x: Any, y: Any) -> Any:
    d = x - y
    x = d * d
    d = x * d
    return d + x


FORMULAS = [
    arithmetic, whole_powers, powers, of_zero, roots, exponentials, of_units, kinks, choices,
    reused,
]  # fmt: skip


def record_of(function: Callable[..., Any], constant: tuple[str, ...] = ()) -> Any:
    return record_of_formula(Meaning(read(function), constant))


def by_torch(function: Callable[..., Any], *numbers: Tensor, **options: Any) -> list[Tensor]:
    leaves = [n.clone().requires_grad_() for n in numbers]
    value = function(*leaves, **options)
    grads = torch.autograd.grad(value, leaves, torch.ones_like(value), materialize_grads=True)
    return [value.detach(), *grads]


def grid(count: int) -> tuple[Tensor, ...]:
    rows = list(itertools.product(GRID, repeat=count))
    special = torch.tensor(rows, dtype=torch.float64, device="cpu")
    usual = torch.randn(200, count, dtype=torch.float64, device="cpu") * 2
    return torch.cat((special, usual)).unbind(1)


@pytest.mark.parametrize("function", FORMULAS, ids=lambda f: f.__name__)
def test_as_torchs(function: Callable[..., Any]) -> None:
    """Value and slopes are torch's, at kinks, infinities and NaN, too."""
    numbers = grid(2)
    found = record_of(function)().value_and_slopes(*numbers)
    assert len(found) == 3
    for mine, right in zip(found, by_torch(function, *numbers), strict=True):
        if function is choices:  # torch's has NaN of what isn't chosen
            right = torch.where(torch.isnan(right), mine, right)
        torch.testing.assert_close(
            torch.as_tensor(mine).expand_as(right), right, rtol=1e-9, atol=1e-12, equal_nan=True
        )


def test_all_of_the_vocabulary_is_differentiated() -> None:
    names = {name for function in FORMULAS for name in function.__code__.co_names}
    assert names >= set(m.__all__) - {"rounded"}


def root(x: Any) -> Any:
    return m.where(x > 0.0, m.sqrt(x), 0.0)


def nested(x: Any, y: Any) -> Any:
    s = m.log(x)
    inner = m.where(y > 0.0, s * m.sqrt(y), s)
    return m.where(x > 0.0, inner, 0.0) + m.where(x > 1.0, s, 0.0) + y


def larger(x: Any) -> Any:
    return m.maximum(m.sqrt(x), 1.0)


def test_no_nan_of_what_is_not_chosen() -> None:
    """Torch's autograd has NaN there, of 0 times infinity or times NaN."""
    x = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    _, slope = record_of(root)().value_and_slopes(x)
    assert slope.tolist() == [0.0, 0.0, 0.25]
    _, slope = record_of(larger)().value_and_slopes(x)
    assert slope[1:].tolist() == [0.0, 0.25]
    x, y = torch.tensor(list(itertools.product((-1.0, 0.0, 0.5, 2.0), repeat=2))).double().unbind(1)
    value, by_x, by_y = record_of(nested)().value_and_slopes(x, y)
    assert torch.isfinite(value).all()
    times = torch.where(y > 0, y.clamp(min=0).sqrt(), 1.0)
    right = torch.where(x > 0, times / x, 0.0) + torch.where(x > 1, 1 / x, 0.0)
    torch.testing.assert_close(by_x, torch.where(x > 0, right, 0.0))
    half = torch.where(y > 0, x.clamp(min=1e-9).log() / (2 * y.clamp(min=1e-9).sqrt()), 0.0)
    torch.testing.assert_close(by_y, 1.0 + torch.where(x > 0, half, 0.0))


def test_ties_are_shared() -> None:
    x = torch.zeros(1, dtype=torch.float64)
    _, by_x, by_y = record_of(kinks)().value_and_slopes(x + 0.25, x + 0.25)
    assert by_x.item() == 0.0 + 2.0 * 0.5 + 2.0 * 0.5 + 1.0
    assert by_y.item() == -0.0 + 2.0 * 0.5


def huber(input: Any, target: Any, *, delta: float = 1.0) -> Any:
    d = input - target
    size = m.abs(d)
    return m.where(size <= delta, 0.5 * d**2, delta * (size - 0.5 * delta))


def test_as_short_as_by_hand() -> None:
    """Each operation is there once, and what is known is computed beforehand."""
    source = record_of(huber).source
    assert source.count("m.where") == 2
    assert source.count("m.abs") == source.count("<=") == source.count("m.sign") == 1
    *_, last = source.splitlines()
    slope = last.rpartition(", ")[2]
    assert slope.startswith("-")
    assert slope[1:].isidentifier()
    assert "d, h.delta * m.sign(d)" in source


def folded(x: Any) -> Any:
    return x * (m.log(2.0) + 3.0 * 2.0**-1) + m.where(1.0 < 2.0, m.maximum(1.0, 4.0), x)


def test_numbers_alone_are_computed_when_decorated() -> None:
    source = record_of(folded).source
    assert "m." not in source
    assert repr(math.log(2.0) + 1.5) in source
    value, slope = record_of(folded)().value_and_slopes(torch.tensor(2.0, dtype=torch.float64))
    assert value.item() == 2.0 * (math.log(2.0) + 1.5) + 4.0
    assert slope == math.log(2.0) + 1.5


INFINITY = math.inf


def bounded(
    h: Any, m_: Any, *, factor: float = 2.0, numbers: bool = False, option_0: float = 0.5
) -> Any:
    m__ = h * factor - option_0
    return m.where(numbers, m.where(m.abs(m__) < INFINITY, m__ * m_, 0.0), m__ * m__)


@pytest.mark.parametrize("numbers", [False, True])
def test_names_that_records_and_code_have_too(numbers: bool) -> None:
    """`factor` and `numbers` are attributes of all records, `h` and `m_` names of the code."""
    record = record_of(bounded)
    assert record.factor == 1.0
    given = {record.fields["factor"]: 3.0, record.fields["numbers"]: numbers}
    x, y = grid(2)
    found = record(**given).value_and_slopes(x, y)
    right = by_torch(bounded, x, y, factor=3.0, numbers=numbers)
    for mine, its in zip(found, right, strict=True):
        mine = torch.as_tensor(mine, dtype=torch.float64).expand_as(its)
        known = ~torch.isnan(its)  # torch's has NaN of what isn't chosen
        torch.testing.assert_close(mine[known], its[known], rtol=1e-12, atol=1e-12)


def constants(x: Any, y: Any) -> Any:
    return x * y + 2.0 * x


def test_constant_tensors_come_last_and_have_no_slope() -> None:
    record = record_of(constants, ("x",))
    assert record.operands == ("y", "x")
    assert record.followed == ("y",)
    value, by_y = record().value_and_slopes(torch.tensor(5.0), torch.tensor(3.0))
    assert (value, by_y) == (21.0, 3.0)


# fmt: off
def deep(x: Any) -> Any:
    return m.tanh(1.0 + m.exp(-m.tanh(1.0 + m.exp(-m.tanh(1.0 + m.exp(-m.tanh(1.0 + m.exp(
        -m.tanh(1.0 + m.exp(-m.tanh(1.0 + m.exp(-m.tanh(1.0 + m.exp(-x)))))))))))))) * x
# fmt: on


def test_long_expressions_are_in_several_lines() -> None:
    source = record_of(deep).source
    assert max(line.count("(") for line in source.splitlines()) <= 16
    (x,) = grid(1)
    for mine, its in zip(record_of(deep)().value_and_slopes(x), by_torch(deep, x), strict=True):
        torch.testing.assert_close(mine, its, equal_nan=True)
