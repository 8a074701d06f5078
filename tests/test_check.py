"""fastopt.check finds what is wrong with a loss, and nothing where nothing is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKEND

import fastopt
from fastopt import formula as m
from fastopt._check import CheckReport, Finding


@fastopt.loss
def log_likelihood(p: Any, y: Any) -> Any:
    """Of probabilities: defined between 0 and 1 alone."""
    return -(y * m.log(p) + (1.0 - y) * m.log(1.0 - p))


@fastopt.loss
def guarded(x: Any, y: Any, *, scale: float = 1.0) -> Any:
    """With a root that torch's autograd has NaN of where it isn't chosen."""
    return m.where(x > y, m.sqrt(x - y + 1.0) * scale, y)


@fastopt.loss(constant=("w",))
def wrong(x: Any, w: Any) -> Any:
    return w * x * x * x


@wrong.gradient
def wrong_slope(x: Any, w: Any) -> Any:
    return w * m.where(x > 3.9, 0.0, 3.0 * x * x)


@fastopt.loss
def above_ten(x: Any) -> Any:
    return m.sqrt(x - 10.0)


def test_right(capsys: pytest.CaptureFixture[str]) -> None:
    report = fastopt.check(guarded.Module(scale=2.0, reduction="sum"))
    assert report
    assert {f.backend for f in report} >= {"reference", BACKEND}
    printed = capsys.readouterr().out
    assert printed == f"{report}\n"
    assert "WRONG" not in printed
    found = {f.what for f in report if f.backend == BACKEND}
    assert found >= {"float64", "float32", "bfloat16", "strides", "broadcasting", "no elements"}


def test_of_probabilities() -> None:
    assert fastopt.check(log_likelihood)
    p, y = torch.rand(50) * 0.5 + 0.2, (torch.rand(50) > 0.5).float()
    assert fastopt.check(log_likelihood, p, y)


def test_wrong_derivative(capsys: pytest.CaptureFixture[str]) -> None:
    """Of large numbers alone, which normal ones are not: samples show it."""
    x, w = torch.linspace(3.0, 5.0, 100), torch.ones(100)
    report = fastopt.check(wrong, x, w)
    assert not report
    bad = {f.what: f for f in report if not f}
    assert "derivatives against differences" in bad
    assert "by x at x=" in bad["derivatives against differences"].words
    assert "float32" in bad
    assert "WRONG" in capsys.readouterr().out


def test_samples_have_to_fit() -> None:
    with pytest.raises(ValueError, match="above_ten isn't finite for numbers between 0 and 1"):
        fastopt.check(above_ten)
    with pytest.raises(ValueError, match="isn't finite for the samples"):
        fastopt.check(above_ten, torch.ones(3))
    assert fastopt.check(above_ten, torch.rand(30) + 11.0)
    with pytest.raises(TypeError, match="samples of 1 tensors; there are p, y"):
        fastopt.check(log_likelihood, torch.rand(3))
    with pytest.raises(TypeError, match="no option 'scala'"):
        fastopt.check(guarded, scala=2.0)
    with pytest.raises(TypeError, match=r"supported: losses made by fastopt\.loss"):
        fastopt.check(torch.nn.MSELoss())


def test_reports() -> None:
    assert not CheckReport()
    assert CheckReport([Finding("numba", "x", 1.0, 1.0)])
    assert not CheckReport([Finding("numba", "x", 1.0, 1.0), Finding("numba", "y", 2.0, 1.0)])
    nan = float("nan")
    assert not CheckReport([Finding("numba", "x", nan, 1.0)])
