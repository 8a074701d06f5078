"""Cross-entropy of logits that come some rows at a time, by the kernels of cross_entropy.py."""

from __future__ import annotations

from typing import Any

import torch

from ..operation import Options
from . import cross_entropy, reduction
from .compiler import compute_dtype

__all__ = ["Pieces"]


class Pieces:
    """See kernels/linear.py. Rows that are ignored get gradients of 0.

    How many they are only the device knows. So the host can't leave them out, unless it waits.
    """

    # A product by fewer rows takes no longer than reading the weight and adding to its gradient.
    BYTES, ROWS = 256 << 20, 1024

    def __init__(
        self, options: Options, input: torch.Tensor, target: torch.Tensor,
        weight: torch.Tensor | None, classes: int,
    ) -> None:  # fmt: skip
        record: Any = options.record
        self.places: torch.Tensor | None = None
        self._options, self._like = options, input
        self._weight = None if weight is None else weight.contiguous()
        self._masses = None  # by whose sum the mean divides
        soft = target.is_floating_point()
        if not soft:
            target = target.contiguous()
            cross_entropy.check_on_host(target, classes, record.ignore_index)
        if options.reduction == "mean":
            like = input.new_empty(0)
            if soft:
                positions = float(target.numel() // classes)
                self._masses = reduction.empty_partials(1, like).fill_(positions)
            else:
                self._masses = cross_entropy.target_masses(
                    target, self._weight, like, classes, record.ignore_index
                )

    @staticmethod
    def early(options: Options, dtype: torch.dtype) -> bool:
        return not cross_entropy.recomputes(options, dtype)

    @staticmethod
    def scaled(
        options: Options, grads: tuple[torch.Tensor | None, ...], grad_output: torch.Tensor
    ) -> bool:
        for g in grads:
            if g is not None:
                g.mul_(grad_output)
        return True

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self._like.new_empty(shape, dtype=dtype)

    def empty_losses(self, count: int) -> torch.Tensor:
        return reduction.empty_partials(count, self._like)

    def run(
        self, logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor | None,
        overwrite: bool, grad_output: torch.Tensor | None, t_grad: torch.Tensor | None,
    ) -> None:  # fmt: skip
        tensors = (logits, target, self._weight)
        options = self._options._replace(reduction="none", dtype=compute_dtype(logits.dtype))
        wanted = overwrite or t_grad is not None
        found, _, kept = cross_entropy.forward(options, tensors, (wanted, False, False))
        if losses is not None:
            losses.copy_(found.view(-1))
        if not wanted:
            return
        # By another launch: only when all programs of a row have read it may one write there.
        if self._options.reduction != "none":
            options = options._replace(reduction="sum")
        call = cross_entropy.prepare(options, tensors)
        statistics = cross_entropy.Kept._make(kept)._replace(target_masses=self._masses)
        cross_entropy.run(
            call, call.cut(twice=False), statistics, True, logits if overwrite else None,
            grad_output=None if grad_output is None else grad_output.contiguous(), t_grad=t_grad,
        )  # fmt: skip

    def reduce(self, losses: torch.Tensor) -> torch.Tensor:
        return reduction.reduce(losses, self._options.dtype, self._masses)
