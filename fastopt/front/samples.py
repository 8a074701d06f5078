"""Tensors that an operation makes sense of, for what compiles, tests or times all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..kernels.operation import Elementwise, Gather, LinearSoftmax, Operation, Rowwise, Softmax

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


def usual(
    operation: type[Operation], size: int, dtype: torch.dtype, widths: tuple[int, ...] = (128, 8)
) -> Iterator[dict[str, Tensor]]:
    """Operands of usual calls with so many elements, by name: one call for each kind of loop.

    There are none where torch has the loss in other dtypes only.

    Args:
        operation, size, dtype: of the operands.
        widths: of rows, a call each. The usual ones are walked as they are, and turned.
    """
    if dtype.itemsize == 2 and not getattr(operation, "halves_on_cpu", True):
        return
    if issubclass(operation, Elementwise):
        found = operands(operation, (size,), dtype)
        for name, t in found.items():
            t.requires_grad_(name != "target")
        yield found
        return
    if not issubclass(operation, Rowwise | Softmax | Gather | LinearSoftmax):
        raise NotImplementedError(f"no samples of {operation.__name__}")
    for classes in widths:
        rows = size // classes
        labels = torch.zeros(rows, dtype=torch.int64)
        if issubclass(operation, Rowwise):
            found = {}
            for name in operation.required:
                shape = (rows, classes) if name in operation.columns else (rows,)
                found[name] = _DRAW[operation.domains.get(name, "")](shape).to(dtype)
                found[name].requires_grad_(name in operation.columns and name != "target")
            yield {**found, **({operation.label: labels} if operation.label else {})}
        elif issubclass(operation, LinearSoftmax):
            x, w = torch.randn(rows, 8).to(dtype), torch.randn(classes, 8).to(dtype)
            yield {
                "input": x.requires_grad_(), "linear_weight": w.requires_grad_(), "target": labels
            }  # fmt: skip
        else:
            logits = torch.randn(rows, classes).to(dtype)
            yield {"input": logits.requires_grad_(), "target": labels}
