"""The names of :mod:`torch.nn.utils.clip_grad`: fastopt's clipping, and torch's own of all else."""

from __future__ import annotations

import math
import types
import warnings
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as _torchs

from ..._torchs import names as _names
from ...front.circumstances import PLAIN
from ...kernels.gradients import ORDERS
from ...optim._gradients import Found, look

# As they are when fastopt is imported: torch may have ours under these names later.
_torchs_norm, _torchs_scaling = _torchs._get_total_norm, _torchs._clip_grads_with_norm_
_torchs_clip_norm, _torchs_clip_value = _torchs.clip_grad_norm_, _torchs.clip_grad_value_
_is_compiling, _grad = torch.compiler.is_compiling, attrgetter("grad")

_Tensors = Tensor | Iterable[Tensor]


def clip_grad_norm_(
    parameters: _Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""Scale the gradients of parameters down, all alike, to a norm of at most max_norm.

    The norm is that of all gradients' elements as one vector; gradients change in place:

    .. math::
        n = \Big(\sum_i |g_i|^p\Big)^{1/p}, \qquad
        g_i \leftarrow g_i \cdot \min\Big(1, \frac{\text{max\_norm}}{n + 10^{-6}}\Big)

    One launch reads all of them, and where the factor is 1 nothing is written. An infinite norm
    makes the factor 0 (and infinite gradients NaN), a NaN makes all of them NaN.

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        max_norm: the largest norm that stays as it is.
        norm_type: p; kernels have 2, 1 and infinity, other norms are torch's own code.
        error_if_nonfinite: whether an infinite or NaN norm is an error. The host then has to wait
            for a GPU.
        foreach: torch's choice between two ways of its own, to which kernels are a third.

    Returns:
        The norm before, a 0-d tensor of the gradients' dtype, on their device. In float16 it may
        be infinite where the norm that gradients are scaled by is not.

    Raises:
        RuntimeError: a norm that is not finite, if asked for; nothing has been changed.

    Example:
        >>> linear = torch.nn.Linear(10, 10)
        >>> linear(torch.randn(4, 10)).square().sum().backward()
        >>> norm = fastopt.nn.utils.clip_grad_norm_(linear.parameters(), max_norm=1.0)

    Source: Pascanu, Mikolov, Bengio, On the difficulty of training recurrent neural networks, 2013.
    """
    if _is_compiling():
        return _torchs_clip_norm(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
    found = _look_for_norm("clip_grad_norm_", _grads_of(parameters), float(norm_type))
    if found is None:
        return _torchs_clip_norm(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
    most = float(max_norm)
    norm = _norm(found, float(norm_type), error_if_nonfinite)
    found.scale(most, norm)
    return norm.to(found.table.dtype)


def get_total_norm(
    tensors: _Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    r"""The norm of all elements of some tensors as one vector, in one launch.

    .. math::
        n = \Big(\sum_i |x_i|^p\Big)^{1/p}

    Args:
        tensors: tensors, or one.
        norm_type: p; kernels have 2, 1 and infinity, other norms are torch's own code.
        error_if_nonfinite: whether an infinite or NaN norm is an error.
        foreach: torch's choice between two ways of its own, to which kernels are a third.

    Returns:
        A 0-d tensor of the tensors' dtype, on their device; 0 on the CPU if there are none.

    Raises:
        RuntimeError: a norm that is not finite, if asked for.

    Example:
        >>> norm = fastopt.nn.utils.get_total_norm([torch.ones(3), torch.ones(1)])
        >>> assert norm == 2
    """
    if _is_compiling():
        return _torchs_norm(tensors, norm_type, error_if_nonfinite, foreach)
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    found = _look_for_norm("get_total_norm", tensors, float(norm_type), written=False)
    if found is None:
        return _torchs_norm(tensors, norm_type, error_if_nonfinite, foreach)
    return _norm(found, float(norm_type), error_if_nonfinite).to(found.table.dtype)


def clip_grads_with_norm_(
    parameters: _Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    r"""Scale the gradients of parameters down by a norm that is known already.

    .. math::
        g_i \leftarrow g_i \cdot \min\Big(1, \frac{\text{max\_norm}}{n + 10^{-6}}\Big)

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        max_norm: the largest norm that stays as it is.
        total_norm: n, a 0-d tensor as of :func:`get_total_norm`.
        foreach: torch's choice between two ways of its own, to which kernels are a third.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> weight.square().sum().backward()
        >>> norm = fastopt.nn.utils.get_total_norm([weight.grad])
        >>> fastopt.nn.utils.clip_grads_with_norm_(weight, 1.0, norm)
    """
    if _is_compiling():
        return _torchs_scaling(parameters, max_norm, total_norm, foreach)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    special: tuple[str, ...] = ()
    if not _is_number(total_norm):
        special = ("a total_norm that is no 0-d tensor of a floating dtype",)
    found = look("clip_grads_with_norm_", _grads_of(parameters), special)
    if found is None:
        return _torchs_scaling(parameters, max_norm, total_norm, foreach)
    most = float(max_norm)
    # A copy: it might be one of the gradients, too.
    found.scale(most, total_norm.detach().clone())


def clip_grad_value_(parameters: _Tensors, clip_value: float, foreach: bool | None = None) -> None:
    r"""Clamp every element of the gradients of parameters, in place, in one launch.

    .. math::
        g_i \leftarrow \min(\max(g_i, -c), c)

    NaN stays NaN.

    Args:
        parameters: parameters, or one; those without a gradient are passed over.
        clip_value: c.
        foreach: torch's choice between two ways of its own, to which kernels are a third.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(4))
        >>> weight.square().sum().backward()
        >>> fastopt.nn.utils.clip_grad_value_(weight, 0.5)
        >>> assert weight.grad.eq(0.5).all()
    """
    if _is_compiling():
        return _torchs_clip_value(parameters, clip_value, foreach)
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads, most = _grads_of(parameters), float(clip_value)
    special: tuple[str, ...] = ()
    if grads and not _fits(most, grads[0].dtype):
        special = (f"clip_value={most}, no number of {grads[0].dtype}",)
    found = look("clip_grad_value_", grads, special)
    if found is None:
        return _torchs_clip_value(parameters, clip_value, foreach)
    found.clamp(most)


def _grads_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    return [grad for grad in map(_grad, parameters) if grad is not None]


def _look_for_norm(
    operation: str, tensors: list[Tensor], order: float, written: bool = True
) -> Found | None:
    special: tuple[str, ...] = ()
    if order not in ORDERS:
        special = (f"norm_type={order} (kernels have {', '.join(map(str, ORDERS))})",)
    elif math.isinf(order) and not all(map(Tensor.numel, tensors)):
        special = ("the largest of no elements",)
    return look(operation, tensors, special, written)


def _norm(found: Found, order: float, error_if_nonfinite: bool) -> Tensor:
    norm = found.norm(order)
    if error_if_nonfinite and not norm.isfinite():
        _torchs_norm([norm], order, True)  # says so in its own words
    return norm


def _is_number(total_norm: Any) -> bool:
    return (
        type(total_norm) in PLAIN
        and total_norm.layout is torch.strided
        and total_norm.dim() == 0
        and total_norm.is_floating_point()
    )


def _fits(value: float, dtype: torch.dtype) -> bool:
    """Whether torch takes a number as one of this dtype; NaN has rules of its own."""
    if not dtype.is_floating_point or math.isnan(value):
        return False
    return math.isinf(value) or abs(value) <= torch.finfo(dtype).max


#: What fastopt has of torch.nn.utils.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm)
}

if not TYPE_CHECKING:
    _names_here = {name: FUNCTIONS[name] for name in ("clip_grad_norm_", "clip_grad_value_")}
    __all__, __getattr__, __dir__ = _names(_torchs, _names_here)
