"""Losses of a compiled backend as functions of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ..kernels import reference
from ..kernels.layout import is_released, released_error
from ..kernels.operation import Options

Tensors = tuple[Tensor | None, ...]


class Expected:
    """What the backward passes of one kind of call are expected to ask for.

    The forward pass leaves the gradients for that grad_output behind, the same to the last bit
    as those that a backward pass computes. At first it is 1. A backward pass that asks for
    another number makes it unknown, and then the gradients are computed once, in the backward
    pass, until one number has come often enough in a row (a loss divided by the batches to
    accumulate, a GradScaler's scale). Each wrong guess doubles how often that is, so that numbers
    which go on changing cost hardly a gradient in vain; one that holds for long ends that.

    Threads may note numbers at once. At worst a guess is then wrong, and a guess is compared with
    what is asked for before its gradients are handed over.

    Attributes:
        number: the grad_output to expect, None if that is unknown.
    """

    MOST_NEEDED, SETTLED = 64, 100
    __slots__ = ("_last", "_needed", "_run", "number")

    def __init__(self) -> None:
        self.number: float | None = 1.0
        self._last, self._run, self._needed = 1.0, 0, 1

    def number_for(self, options: Options, tensors: Tensors) -> float | None:
        """What a call's forward pass is to compute gradients for, None if it isn't to.

        Where they are sooner scaled than computed, and lose nothing, they are always computed.
        """
        if self.number is None and options.record.rescaled:
            halves = any(t is not None and t.itemsize == 2 for t in tensors)
            return None if halves else 1.0
        return self.number

    def note(self, number: float) -> None:
        """Learn from one backward pass."""
        if number == self._last:
            self._run += 1
        else:
            if self.number is not None:
                self._needed = min(2 * self._needed, self.MOST_NEEDED)
            self.number, self._last, self._run = None, number, 1
        if self._run >= self.SETTLED:
            self._needed = 1
        if self._run >= self._needed and number:  # of the gradients for zeros the sign would count
            self.number = number


def evaluate(
    backend: Any, options: Options, expected: Expected, tensors: Tensors, followed: bool
) -> Tensor:
    """The loss by a compiled backend. followed: whether any of the tensors requires a gradient."""
    if followed and is_grad_enabled():
        # Hooks on saved tensors are there to save memory, and gradients would pass them by.
        hooked = _top_hooks(True) is not None
        if hooked or expected.number != 1:
            number = None if hooked else expected.number_for(options, tensors)
            options = options._replace(grad_output=number)
        result: Tensor = _apply(backend, options, expected, *tensors)
        return result
    loss: Tensor = backend.forward(options, tensors, (False,) * len(tensors))[0]
    return loss


def _probe_hooks(_: bool) -> object:
    """The same as `_top_hooks` for torch before 2.8: hooks that are there can't be forbidden."""
    if _autograd._saved_tensors_hooks_get_disabled_error_message() is not None:
        return None
    try:
        _autograd._saved_tensors_hooks_disable("")
    except RuntimeError:
        return True
    finally:
        _autograd._saved_tensors_hooks_enable()
    return None


_autograd: Any = torch._C._autograd
is_grad_enabled = torch.is_grad_enabled
#: What packs the tensors that a function saves, as under activation checkpointing; else None.
_top_hooks = getattr(_autograd, "_top_saved_tensors_default_hooks", _probe_hooks)


class _FusedLoss(torch.autograd.Function):
    """Any loss by any compiled backend.

    The forward pass may leave the gradients for one grad_output behind; they are handed over,
    once. Everything else (another or a per-sample grad_output, a second backward) is computed from
    the inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Any, options: Options, expected: Expected, *tensors: Tensor | None
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        loss, ctx.grads, kept = backend.forward(options, tensors, needs)
        ctx.backend, ctx.options, ctx.expected = backend, options, expected
        saved = (*tensors, *kept)
        ctx.given = tuple([t is not None for t in saved])  # who reads saved_tensors finds no None
        ctx.save_for_backward(*[t for t in saved if t is not None])
        ctx.set_materialize_grads(False)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        if is_dynamo_compiling():  # compiled autograd reads this function
            from .untraced import backward

            return backward(_FusedLoss, ctx, *grad_outputs)
        (grad_output,) = grad_outputs
        needs = ctx.needs_input_grad[3:]
        grads = vars(ctx).pop("grads", None)  # at once: threads may go back through one graph
        if grad_output is None:
            return (None,) * (3 + len(needs))
        if grad_output.is_neg():
            grad_output = grad_output.resolve_neg()
        if is_grad_enabled() or _is_followed(grad_output):  # create_graph and the like
            tensors, _ = saved(ctx)
            grads = reference_grads(ctx.options, tensors, grad_output, needs)
        else:
            number = ctx.backend.number_of(grad_output)
            if number is not None:
                ctx.expected.note(number)
            if grads is None or number != ctx.options.grad_output:
                tensors, kept = saved(ctx)
                for t in tensors:
                    if t is not None and is_released(t):
                        raise released_error("a tensor that a loss has been computed from", t)
                given = (tensors, grads, kept, grad_output)
                grads = ctx.backend.backward(ctx.options, *given, needs)
        return (None, None, None, *grads)


# What torch.autograd.Function does before has to do with transforms, which are not around here.
_apply: Any = super(torch.autograd.Function, _FusedLoss).apply


def saved(ctx: Any) -> tuple[Tensors, Tensors]:
    """The call's tensors, and what forward kept beside them."""
    found = iter(ctx.saved_tensors)  # once: activation checkpointing unpacks a tensor once
    every = tuple([next(found) if given else None for given in ctx.given])
    count = len(ctx.needs_input_grad) - 3
    return every[:count], every[count:]


def _is_followed(grad_output: Tensor) -> bool:
    """Whether torch has to see how gradients are computed from this one."""
    return (
        _transforms()
        or _dispatches() > 0
        or forward_ad._current_level >= 0
        or _is_batched(grad_output)
        or _is_legacy_batched(grad_output)  # is_grads_batched
    )


# Names of their own, for what each backward pass asks when a model has emptied the caches.
_is_batched: Any = torch._C._functorch.is_batchedtensor
_is_legacy_batched: Any = torch._C._functorch.is_legacy_batchedtensor
_transforms, _dispatches = (
    torch._C._are_functorch_transforms_active, torch._C._len_torch_dispatch_stack
)  # fmt: skip


def reference_grads(
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
