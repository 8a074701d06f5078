"""Tensors that an operation makes sense of, for what compiles, tests or times all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.operation import Elementwise, Operation, Softmax

__all__ = ["operands", "usual"]

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


def usual(operation: type[Operation], size: int, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Operands of usual calls with so many elements, by name: one call for each kind of loop."""
    if issubclass(operation, Elementwise):
        found = operands(operation, (size,), dtype)
        for name, t in found.items():
            t.requires_grad_(name != "target")
        yield found
    elif issubclass(operation, Softmax):
        for classes in (128, 8):  # rows that are walked as they are, and ones that are turned
            logits = torch.randn(size // classes, classes).to(dtype).requires_grad_()
            yield {"input": logits, "target": torch.zeros(len(logits), dtype=torch.int64)}
    else:
        raise NotImplementedError(f"no samples of {operation.__name__}")
