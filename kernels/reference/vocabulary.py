"""The names that formulas are written in, on torch's tensors (and numbers among them).

Of numbers alone the result is a number, computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

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


def _of(function: Callable[[torch.Tensor], torch.Tensor], x: Any) -> Any:
    """A function of tensors at a tensor, or at a number."""
    if isinstance(x, torch.Tensor):
        return function(x)
    return function(torch.tensor(x, dtype=torch.float64, device="cpu")).item()


def _both(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], a: Any, b: Any) -> Any:
    """The same of two arguments."""
    like = a if isinstance(a, torch.Tensor) else b
    if not isinstance(like, torch.Tensor):
        return _of(lambda x: function(x, x.new_tensor(b)), a)
    return function(*[
        x if isinstance(x, torch.Tensor)
        else torch.as_tensor(x, dtype=like.dtype, device=like.device)
        for x in (a, b)
    ])  # fmt: skip


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    if isinstance(condition, bool):
        return a if condition else b
    if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
        # of two numbers torch makes a tensor of the default dtype, which may round them
        a = torch.as_tensor(a, dtype=torch.float64, device=condition.device)
    return torch.where(condition, a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN if either is."""
    return _both(torch.maximum, a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN if either is."""
    return _both(torch.minimum, a, b)


def abs(x: Any) -> Any:
    """The absolute value."""
    return _of(torch.abs, x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; of NaN 0."""
    return _of(torch.sign, x)


def exp(x: Any) -> Any:
    """e to the power x."""
    return _of(torch.exp, x)


def expm1(x: Any) -> Any:
    """exp(x) - 1, exact near 0."""
    return _of(torch.expm1, x)


def log(x: Any) -> Any:
    """The natural logarithm: -inf of 0, NaN of less."""
    return _of(torch.log, x)


def log1p(x: Any) -> Any:
    """log(1 + x), exact near 0."""
    return _of(torch.log1p, x)


def divide(a: Any, b: Any) -> Any:
    """a / b, correctly rounded; the operator may be off by two units in the last place on GPUs."""
    return _both(torch.divide, a, b)


def power(a: Any, b: Any) -> Any:
    """a to the power b, of a from 0 on, or of a whole b. In float64 a GPU's may be off by 1e-13."""
    return _both(torch.pow, a, b)


def rounded(x: Any, like: Any) -> Any:
    """x in the dtype of another number."""
    return x.to(like.dtype)


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded."""
    return _of(torch.sqrt, x)


def rsqrt(x: Any) -> Any:
    """1 / sqrt(x)."""
    return _of(torch.rsqrt, x)


def tanh(x: Any) -> Any:
    """The hyperbolic tangent."""
    return _of(torch.tanh, x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _of(torch.sigmoid, x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    return -log_sigmoid(-x)


def log_sigmoid(x: Any) -> Any:
    """log(sigmoid(x)), without overflow."""
    return _of(F.logsigmoid, x)


def erf(x: Any) -> Any:
    """The error function: 2 / sqrt(pi) times the integral of exp(-t * t) from 0 to x."""
    return _of(torch.erf, x)


def isnan(x: Any) -> Any:
    """Whether it is not a number."""
    return _of(torch.isnan, x)
