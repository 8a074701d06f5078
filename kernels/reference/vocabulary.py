"""The names that formulas are written in, on torch's tensors (and numbers among them)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

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


def _like(value: Any, other: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.as_tensor(value, dtype=other.dtype, device=other.device)


def where(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    if isinstance(condition, bool):
        return a if condition else b
    return torch.where(condition, a, b)


def maximum(a: Any, b: Any) -> Any:
    """The larger one; NaN if either is."""
    return torch.maximum(_like(a, b), _like(b, a))


def minimum(a: Any, b: Any) -> Any:
    """The smaller one; NaN if either is."""
    return torch.minimum(_like(a, b), _like(b, a))


def absolute(x: Any) -> Any:
    """The absolute value."""
    return torch.abs(x)


def sign(x: Any) -> Any:
    """-1, 0 or 1; of NaN 0."""
    return torch.sign(x)


def exp(x: Any) -> Any:
    """e to the power x."""
    return torch.exp(x)


def log(x: Any) -> Any:
    """The natural logarithm: -inf of 0, NaN of less."""
    return torch.log(x)


def log1p(x: Any) -> Any:
    """log(1 + x), exact near 0."""
    return torch.log1p(x)


def divide(a: Any, b: Any) -> Any:
    """a / b, correctly rounded; the operator may be off by two units in the last place on GPUs."""
    return a / b


def power(a: Any, b: Any) -> Any:
    """a to the power b, of a from 0 on. In float64 a GPU's may be off by 1e-13 of it."""
    return a**b


def rounded(x: Any, like: Any) -> Any:
    """x in the dtype of another number."""
    return x.to(like.dtype)


def sqrt(x: Any) -> Any:
    """The square root, correctly rounded."""
    return torch.sqrt(x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid(x)


def softplus(x: Any) -> Any:
    """log(1 + exp(x)), without overflow."""
    return -F.logsigmoid(-x)


def log_sigmoid(x: Any) -> Any:
    """log(sigmoid(x)), without overflow."""
    return F.logsigmoid(x)


def isnan(x: Any) -> Any:
    """Whether it is not a number."""
    return torch.isnan(x)
