"""Adafactor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar

from .. import formula as m
from ..dispatch import insisted
from ..kernels.layout import same_layout
from ..kernels.operation import Update
from ..kernels.tables import Averaged, Tables
from ._kinds import Kind
from ._planned import PlannedStep
from ._shards import is_dtensor

__all__ = ["Adafactor"]


class AdafactorUpdate(Update):
    """share is what is new in a mean, rho what the step may change at most, relatively.

    rate is what each change of a parameter is multiplied by: its loop finds it and puts it there.
    """

    lr: float
    beta2_decay: float
    eps1: float
    eps2: float
    d: float
    weight_decay: float
    derived = ("share", "rho", "kept", "rate")

    def at_step(h, step: Any) -> Any:
        rho = m.minimum(h.lr, 1.0 / m.sqrt(step))
        return m.power(step, h.beta2_decay), rho, 1.0 - h.lr * h.weight_decay, rho

    def moved(h: Any, old: Any, new: Any) -> Any:
        """A mean of squares after a step whose own one is new."""
        way = new - old
        return m.where(h.share < 0.5, old + h.share * way, new - way * (1.0 - h.share))

    def rate_of(h: Any, size: Any, change: Any) -> Any:
        """The rate, by the root mean squares of the parameter and of its changes."""
        size = m.where(size > h.eps2, size, h.eps2)
        over = change / h.d
        return size * h.rho / m.where(over > 1.0, over, 1.0)

    def update(h: Any, param: Any, grad: Any, row_var: Any, col_var: Any, variance: Any) -> Any:
        """row_var is divided by its matrix's mean. Where there is one, variance may be anything."""
        mean = variance
        if row_var is not None:
            mean = row_var * col_var
        change = grad * h.grad_scale / m.sqrt(m.maximum(mean, h.eps1 * h.eps1))
        return param * h.kept - h.rate * change, row_var, col_var, variance


class Adafactor(PlannedStep, torch.optim.Adafactor):
    r"""Adafactor: of a matrix, the mean squares of the gradient's rows and columns alone are kept.

    With gradient g (negated if ``maximize``) at step t, of a parameter with at least two dimensions
    (the last two are those of a matrix), and with RMS for the root mean square of all elements:

    .. code-block:: text

        s ← t^beta2_decay
        r ← r + s (mean of g² over each row - r),  c ← c + s (mean of g² over each column - c)
        v ← r c / max(mean of r, eps1)
        u ← g / √max(v, eps1²)
        a ← max(eps2, RMS(p)) · min(lr, 1 / √t) / max(1, RMS(u) / d)
        p ← p (1 - lr · weight_decay) - a u

    Of other parameters v ← v + s (g² - v) is kept. An ``eps1`` of None is the dtype's machine
    epsilon. On a CPU the gradients of all parameters are read three times, and the parameters
    twice, in one parallel region for all that have rows and columns and one for the others. On a
    GPU those with rows and columns take eight launches for all, the others four.

    Args:
        params: parameters, or groups of them as dicts.
        lr: the largest relative change, a number or a one-element tensor.
        eps: the pair (eps1, eps2).
        beta2_decay, d, weight_decay, maximize: as above.
        foreach: torch's choice among its own implementations. The compiled step stands for both.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None;
            they stay as they are, and their norm is then in ``grad_norm``.

    Parameters may be contiguous float64, float32, bfloat16 or float16 ones with gradients of their
    dtype; all others are updated by torch's own code, as are DTensors and all parameters
    of a group with several dtypes and an ``eps1`` of None: there the first one's dtype decides.
    ``explain`` says which.

    Raises:
        ValueError, RuntimeError, ZeroDivisionError: as torch does, for invalid hyperparameters, for
            complex parameters and sparse gradients, and for a parameter without elements.

    Example:
        >>> optimizer = fastopt.optim.Adafactor(model.parameters(), lr=1e-2)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Adafactor`; Shazeer and Stern, https://arxiv.org/abs/1804.04235
    """

    _operation = "Adafactor"
    _elementwise = False
    _record = AdafactorUpdate
    _sees_params = True
    _described_by = "describe_factored"
    _unscaled_only = "Grad scaling should occur outside of optimizer.step()"
    _optional = ("eps",)

    def _hyper(self, group: dict[str, Any], begins: bool) -> AdafactorUpdate:
        eps1, eps2 = group["eps"]
        if eps1 is None:
            eps1 = torch.finfo(group["params"][0].dtype).eps
        return AdafactorUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=_to_scalar(group["lr"]),
            beta2_decay=group["beta2_decay"],
            eps1=eps1,
            eps2=eps2,
            d=group["d"],
            weight_decay=group["weight_decay"],
        )

    def _refuse(self, group: dict[str, Any]) -> str | None:
        eps1, eps2 = group["eps"]
        if eps2 is None:
            return "eps2=None"
        if not group["d"] > 0:
            return f"d={group['d']} where kernels take numbers above 0"
        if any(is_dtensor(p) for p in group["params"]):
            return "a DTensor, of which a row's mean needs all parts"
        if eps1 is None and len({p.dtype for p in group["params"]}) > 1:
            return "eps1=None, which is then the first parameter's, for several dtypes"
        return None

    def _refuse_param(self, param: Tensor) -> str | None:
        if not param.numel():
            return "a parameter without elements, by whose number torch divides"
        if param.grad is not None and param.grad.dtype != param.dtype:
            return "a gradient of another dtype than the parameter's"
        on_gpu = param.device.type != "cpu" or insisted() == "triton"
        if on_gpu and param.dim() > 1 and max(param.shape[-2:]) >= 1 << 30:
            return "a matrix with 2**30 rows or columns, or more"
        return None if param.is_contiguous() else "a parameter that isn't contiguous"

    def _active_of(self, group: dict[str, Any], param: Tensor) -> tuple[str, ...]:
        return ("row_var", "col_var") if param.dim() > 1 else ("variance",)

    def _begin(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        return param.new_zeros(_shape(name, param))

    def _fits(self, name: str, param: Tensor, state: Tensor) -> bool:
        if name == "variance":
            return same_layout(param, state)
        return list(state.shape) == _shape(name, param) and state.is_contiguous()

    @classmethod
    def _usual(cls, size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        (matrix,) = super()._usual(size, dtype)
        vector = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        vector.grad = torch.zeros_like(vector)
        return [matrix, vector]

    def _launcher(
        self, backend: Any, kind: Kind, averaged: Averaged | None
    ) -> Callable[[Tables], Any]:
        launcher: Callable[[Tables], Any] = backend.factored_launcher(
            AdafactorUpdate, (kind.param, *kind.slots), kind.grad, kind.step
        )
        return launcher


def _shape(name: str, param: Tensor) -> list[int]:
    """That of a state."""
    shape = list(param.shape)
    if name != "variance":
        shape[-1 if name == "row_var" else -2] = 1
    return shape
