"""Losses of a compiled backend as functions of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.operation import Options

Tensors = tuple[Tensor | None, ...]


class Habit:
    """What the backward passes of one kind of call have asked for.

    Two in a row for the same number (a loss divided by the batches to accumulate, a GradScaler's
    scale) make the next forward pass leave the gradients for that one behind. They are the same
    to the last bit as those that a backward pass computes.

    Attributes:
        expected: the grad_output to expect.
    """

    __slots__ = ("_last", "expected")

    def __init__(self) -> None:
        self.expected = self._last = 1.0

    def note(self, number: float) -> None:
        if number == self._last and number:  # of zeros the sign would count
            self.expected = number
        self._last = number


def evaluate(backend: Any, options: Options, habit: Habit, tensors: Tensors) -> Tensor:
    """The loss by a compiled backend."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        if habit.expected != 1:
            options = options._replace(grad_output=habit.expected)
        result: Tensor = _FusedLoss.apply(backend, options, habit, *tensors)  # type: ignore[no-untyped-call]
        return result
    loss: Tensor = backend.forward(options, tensors, (False,) * len(tensors))[0]
    return loss


class _FusedLoss(torch.autograd.Function):
    """Any loss by any compiled backend.

    The forward pass may leave the gradients for one grad_output behind, for 1 unless others
    have been asked for, as the usual ``loss.backward()`` does; they are handed over, once.
    Everything else (another or a per-sample grad_output, a second backward) is computed from
    the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Any, options: Options, habit: Habit, *tensors: Tensor | None
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        loss, ctx.grads, ctx.kept = backend.forward(options, tensors, needs)
        ctx.backend, ctx.options, ctx.habit = backend, options, habit
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        needs = ctx.needs_input_grad[3:]
        grads, ctx.grads = ctx.grads, None
        if grad_output is None:
            return (None,) * (3 + len(needs))
        if grad_output.is_neg():
            grad_output = grad_output.resolve_neg()
        if torch.is_grad_enabled() or _is_followed(grad_output):  # create_graph and the like
            grads = _torch_grads(ctx.options, ctx.saved_tensors, grad_output, needs)
        else:
            number = ctx.backend.number_of(grad_output)
            if number is not None:
                ctx.habit.note(number)
            if grads is None or number != ctx.options.grad_output:
                saved = ctx.saved_tensors  # once: activation checkpointing unpacks a tensor once
                if any(t is not None and is_released(t) for t in saved):
                    raise RuntimeError(
                        "the memory of a tensor that a loss was computed from has been released, "
                        "and its gradient for this grad_output is computed from it"
                    )
                given = (saved, grads, ctx.kept, grad_output)
                grads = ctx.backend.backward(ctx.options, *given, needs)
        return (None, None, None, *grads)


def is_released(t: Tensor) -> bool:
    """Whether a tensor with elements has no memory: its storage was resized to 0, most often."""
    null = t.data_ptr() == t.itemsize * t.storage_offset()
    return null and t.numel() > 0 and not t.is_meta


def _is_followed(grad_output: Tensor) -> bool:
    """Whether torch has to see how gradients are computed from this one."""
    functorch = torch._C._functorch
    return (
        functorch.is_batchedtensor(grad_output)
        or functorch.is_legacy_batchedtensor(grad_output)  # is_grads_batched
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _torch_grads(
    options: Options, tensors: Tensors, grad_output: Tensor, needs: tuple[bool, ...]
) -> Tensors:
    """The gradients by torch's own operations, themselves differentiable if need be."""
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]

    def loss_of(*inputs: Tensor) -> Tensor:
        given = iter(inputs)
        places = zip(tensors, needs, strict=True)
        return reference.loss(options, tuple(next(given) if need else t for t, need in places))

    if torch._C._are_functorch_transforms_active():
        found = torch.func.vjp(loss_of, *wanted)[1](grad_output)
    else:
        create_graph = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, so that an input given twice counts once per place.
            inputs = [t.view_as(t) for t in wanted]
            loss = loss_of(*inputs)
        found = torch.autograd.grad(loss, inputs, grad_output, create_graph=create_graph)
    grads = iter(found)
    return tuple(next(grads) if need else None for need in needs)
