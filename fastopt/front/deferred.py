"""Logits that are computed once somebody wants them, and the linear layer that gives them.

A loss that knows them takes the layer's operands instead, and they are never made. For autograd
they are the result of one function. Below autograd, each operation on them gets the real ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._pytree import tree_map_only

from .circumstances import autocasts, is_foreign

__all__ = ["Head", "Logits"]


class Layer(NamedTuple):
    """A linear layer's operands.

    Attributes:
        dtype: that it computes in, which autocast may have chosen.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def state(self) -> list[tuple[int, int]]:
        """What changes with the operands' memory or contents."""
        return [(t.data_ptr(), t._version) for t in self[:3] if t is not None]

    def logits(self) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return linear(self.input.to(self.dtype), self.weight.to(self.dtype), bias)


class Logits(Tensor):
    """A layer's logits, to be computed on first use.

    Attributes:
        _layer: whose operands are still to be those that it was called with.
        _made: the logits, once they are computed.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _layer: Layer
    _state: list[tuple[int, int]]
    _made: Tensor | None

    @staticmethod
    def __new__(cls, layer: Layer, state: list[tuple[int, int]], dtype: torch.dtype) -> Logits:
        shape = (*layer.input.shape[:-1], len(layer.weight))
        make: Any = Tensor._make_wrapper_subclass
        new: Logits = make(cls, shape, dtype=dtype, device=layer.input.device)
        new._layer, new._state, new._made = layer, state, None
        return new

    def layer(self) -> Layer | None:
        """The operands of which a loss may compute itself; None of logits that were written to.

        Raises:
            RuntimeError: the operands are no longer what they were.
        """
        if self._version:
            return None
        if self._layer.state() != self._state:
            raise RuntimeError(
                "these logits were left to be computed when somebody reads them, and the hidden "
                "states or the weight that they are computed from have changed since or were "
                "released; read them before the optimizer's step, or call the model in eval() mode"
            )
        return self._layer

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._to_copy.default and kwargs == {"dtype": torch.float32}:
            (logits,) = args  # Accelerate makes outputs float32
            if logits._made is None:
                return Logits(logits._layer, logits._state, torch.float32)
        args, kwargs = tree_map_only(Logits, Logits._computed, (args, kwargs))
        return function(*args, **kwargs)

    def _computed(self) -> Tensor:
        if self._made is None:
            layer = self.layer()
            assert layer is not None  # nobody has written to what is not there
            self._made = layer.logits().to(self.dtype)
        return self._made

    # These would look for the memory themselves.

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        real: Any = self.clone()
        return real.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        return self.detach().tolist()


class _Deferred(torch.autograd.Function):
    """A linear layer whose result is Logits."""

    @staticmethod
    def forward(ctx: Any, *layer: Any) -> Logits:
        operands = Layer(*layer)
        ctx.save_for_backward(operands.input, operands.weight)
        return Logits(operands, operands.state(), operands.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad,) = grad_outputs
        input, weight = (t.to(grad.dtype) for t in ctx.saved_tensors)
        rows = grad.flatten(0, -2)
        needs = ctx.needs_input_grad
        return (
            grad @ weight if needs[0] else None,
            rows.t() @ input.flatten(0, -2) if needs[1] else None,
            rows.sum(0) if needs[2] else None,
            None,
        )


_apply: Any = _Deferred.apply


class Head(torch.nn.Linear):
    """A linear layer whose logits, in training, are computed once somebody wants them.

    Where its calls are watched or changed by hooks, which may move its weight away, and for what
    only torch can follow, it is torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        operands = (input, self.weight, self.bias)
        if self.training and torch.is_grad_enabled() and not self._has_hooks():
            dtype = None if is_foreign(operands) else _dtype_of(*operands)
            if dtype is not None:
                logits: Logits = _apply(*operands, dtype)
                return logits
        return super().forward(input)

    def _has_hooks(self) -> bool:
        return bool(
            self._forward_hooks or self._forward_pre_hooks
            or self._backward_hooks or self._backward_pre_hooks
        )  # fmt: skip


def _dtype_of(input: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype | None:
    """What the logits of several rows are computed in; None of others, or that don't go together.

    Autocast leaves float64 as it is, and doesn't know tensors without memory.
    """
    if input.dim() < 2 or input.shape[-1] != weight.shape[-1] or input.is_meta:
        return None
    dtypes = {t.dtype for t in (input, weight, bias) if t is not None}
    if autocasts(input.device):
        chosen = torch.get_autocast_dtype(input.device.type)
        return None if torch.float64 in dtypes else chosen
    return input.dtype if len(dtypes) == 1 else None
