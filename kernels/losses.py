"""What a compiled backend offers for losses, and which of its loops serves a call."""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch

from .linear import Linear
from .operation import Elementwise, Gather, LinearSoftmax, Options, Rowwise

__all__ = ["Loops", "Tensors"]

Tensors = tuple[torch.Tensor | None, ...]


class Loops(NamedTuple):
    """A backend's loops, each with `forward` and `backward` as below."""

    flat: ModuleType
    rows: ModuleType
    softmax: ModuleType
    gather: ModuleType
    linear: Linear

    def of(self, options: Options) -> ModuleType | Linear:
        """The one that serves a loss."""
        record = options.record
        if isinstance(record, Elementwise):
            return self.flat
        if isinstance(record, Rowwise):
            return self.rows
        if isinstance(record, LinearSoftmax):
            return self.linear
        return self.gather if isinstance(record, Gather) else self.softmax

    def forward(
        self, options: Options, tensors: Tensors, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor, Tensors | None, Tensors]:
        """The loss, and perhaps its gradients for the grad_output that is expected.

        Args:
            options: the call without its tensors.
            tensors: as the public function takes them; None where it was given none.
            needs: for each of them, whether its gradient will be asked for.

        Returns:
            The loss; a gradient for each tensor that needs one, or None in place of the
            gradients where they are left to `backward`, as they are where no grad_output is
            expected; and what else that wants to see again.
        """
        result: tuple[torch.Tensor, Tensors | None, Tensors]
        result = self.of(options).forward(options, tensors, needs)
        return result

    def backward(
        self,
        options: Options,
        tensors: Tensors,
        grads: Tensors | None,
        kept: Tensors,
        grad_output: torch.Tensor,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """The gradients for any grad_output, computed from the tensors.

        Args:
            options, tensors, needs: as `forward` had them.
            grads: those that `forward` left, to be overwritten; None if they have been given
                away.
            kept: what else it left.
            grad_output: of the loss's shape.
        """
        result: Tensors
        result = self.of(options).backward(options, tensors, grads, kept, grad_output, needs)
        return result

    def bind(self, options: Options, tensors: Tensors, needs: tuple[bool, ...]) -> Any:
        """`forward` for calls of tensors of these sizes, strides and dtypes, if a loop has that.

        It is a function of tensors and of the grad_output that is expected.
        """
        loop: Any = self.of(options)
        return loop.bind(options, tensors, needs) if hasattr(loop, "bind") else None

    def early(self, options: Options, tensors: Tensors) -> bool:
        """Whether `forward` leaves gradients, by a loop to which none of its own is known."""
        loop, input = self.of(options), tensors[0]
        assert input is not None
        return isinstance(loop, Linear) and loop.pieces.early(options, input.dtype)

    def empty_kept(
        self, options: Options, tensors: Tensors, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor, ...]:
        """Tensors as those that `forward` keeps, where a loop knows them before it runs."""
        loop: Any = self.of(options)
        kept: tuple[torch.Tensor, ...] = ()
        if hasattr(loop, "empty_kept"):
            kept = loop.empty_kept(options, tensors, needs)
        return kept

    def backward_alone(
        self,
        options: Options,
        tensors: Tensors,
        grads: Tensors | None,
        kept: Tensors,
        grad_output: torch.Tensor,
        needs: tuple[bool, ...],
    ) -> Tensors:
        """As `backward`, where of the forward pass no more is left than `empty_kept` says."""
        if getattr(self.of(options), "KEEPS", False):
            kept = self.forward(options, tensors, needs)[2]
        return self.backward(options, tensors, grads, kept, grad_output, needs)
