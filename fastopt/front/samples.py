"""Tensors that an operation makes sense of, for what compiles, tests or times all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.operation import Elementwise

__all__ = ["operands"]

_DRAW: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
    "": lambda shape: torch.randn(shape, dtype=torch.float64),
    "unit": lambda shape: torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01,
    "positive": lambda shape: torch.rand(shape, dtype=torch.float64) * 3 + 0.1,
    "sign": lambda shape: torch.randint(2, shape).double() * 2 - 1,
    "log": lambda shape: (torch.rand(shape, dtype=torch.float64) * 0.98 + 0.01).log(),
}


def operands(
    operation: type[Elementwise], shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random operands of one shape, by name: those that have to be given."""
    names = [n for n in operation.operands if n not in ("weight", "pos_weight")]
    return {n: _DRAW[operation.domains.get(n, "")](shape).to(dtype) for n in names}
