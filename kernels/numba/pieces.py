"""Cross-entropy of logits that come some rows at a time, by the loops of cross_entropy.py."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..operation import Options
from . import memory
from .cross_entropy import inverse, prepare, run, used_weight

__all__ = ["Pieces"]


class Pieces:
    """See kernels/linear.py. Rows that are ignored are left out."""

    # A piece of logits should be about as long in memory as the gradient of a usual weight, which
    # is read and written for each; and of so many rows a product takes longer than that.
    BYTES, ROWS = 32 << 20, 64

    def __init__(
        self, options: Options, input: torch.Tensor, target: torch.Tensor,
        weight: torch.Tensor | None, classes: int,
    ) -> None:  # fmt: skip
        record: Any = options.record
        self._weight = None if weight is None else weight.contiguous()
        self._options = options
        self.places: torch.Tensor | None = None
        positions = 0.0
        if target.is_floating_point():
            positions = target.numel() // classes
        else:
            target = target.contiguous()
            positions = used_weight(target, self._weight, record.ignore_index, classes)
            rows = input.numel() // input.shape[-1]
            labels = target.view(rows, target.numel() // max(rows, 1)).to(torch.int64)
            counts = (labels != record.ignore_index).any(1)
            if not counts.all():
                self.places = counts.nonzero().view(-1)
        self._divisor = positions if options.reduction == "mean" else 1.0

    @staticmethod
    def early(options: Options, dtype: torch.dtype) -> bool:
        return options.reduction != "none" and options.grad_output is not None

    @staticmethod
    def scaled(
        options: Options, grads: tuple[torch.Tensor | None, ...], grad_output: torch.Tensor
    ) -> bool:
        assert options.grad_output is not None
        factor = grad_output.item() / options.grad_output
        given = [g for g in grads if g is not None]
        # A half would be rounded a second time, unless it is multiplied by a power of two.
        exact = abs(math.frexp(factor)[0]) == 0.5 and abs(factor) >= 1.0
        if not math.isfinite(factor) or not (exact or all(g.itemsize > 2 for g in given)):
            return False
        for g in given:
            g.mul_(factor)
        return True

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return memory.empty(shape, dtype)

    def empty_losses(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.float64, device="cpu")

    def run(
        self, logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor | None,
        overwrite: bool, grad_output: torch.Tensor | None, t_grad: torch.Tensor | None,
    ) -> None:  # fmt: skip
        call = prepare(self._options._replace(reduction="sum"), (logits, target, self._weight))
        grad = logits if overwrite else None
        if self._options.reduction == "none":
            run(call, losses, grad, grad_output, None, 1.0, t_grad)
            return
        number = self._options.grad_output if grad_output is None else grad_output.item()
        run(call, losses, grad, None, None, (number or 0.0) * inverse(self._divisor), t_grad)

    def reduce(self, losses: torch.Tensor) -> torch.Tensor:
        total = float(losses.numpy().sum())  # in one order, on any number of threads
        return torch.tensor(
            total / (self._divisor or math.nan), dtype=self._options.dtype, device="cpu"
        )
