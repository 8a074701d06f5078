"""Clipping inside a step: a read of the gradients, whose factor the update takes along."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as _torchs

from ._gradients import look

__all__ = ["check_limit", "divisor", "norm_of", "with_limit"]

_torchs_norm = _torchs._get_total_norm  # as it is when fastopt is imported
_LIMIT = inspect.Parameter(
    "max_grad_norm", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=float | None
)


def check_limit(most: Any) -> None:
    """Raise a ValueError for what is no limit of a norm."""
    if most is not None and not (isinstance(most, Real) and float(most) >= 0):  # NaN isn't
        raise ValueError(f"max_grad_norm={most!r} (supported: None, and numbers from 0 on)")


def with_limit(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that takes what this one takes, and max_grad_norm."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, max_grad_norm: float | None = None, **kwargs: Any) -> None:
        check_limit(max_grad_norm)
        if max_grad_norm is not None:
            self.max_grad_norm = max_grad_norm
        init(self, *args, **kwargs)

    signature = inspect.signature(init)
    parameters = list(signature.parameters.values())
    __init__.__signature__ = signature.replace(parameters=[*parameters, _LIMIT])  # type: ignore[attr-defined]
    __init__.__annotations__ = {**init.__annotations__, "max_grad_norm": float | None}
    return __init__


@torch.no_grad()
def norm_of(grads: list[Tensor], grad_scale: Tensor | None) -> Tensor:
    """The norm of all gradients together, of what they are once divided by a GradScaler's scale.

    Raises:
        BackendUnavailable: the backend insisted on can't serve them.
    """
    found = look("clip_grad_norm_", grads)
    norm = _torchs_norm(grads) if found is None else found.norm(2.0)
    if hasattr(norm, "full_tensor"):  # of DTensors, each process has its part of
        norm = norm.full_tensor()
    return norm if grad_scale is None else norm / grad_scale.to(norm.device)


def divisor(norm: Tensor, most: float, grad_scale: Tensor | None) -> Tensor:
    """What gradients are to be divided by: a GradScaler's scale, and 1 / clip_grad_norm_'s factor.

    That way round an infinite norm makes the gradients 0, infinite ones NaN, and a NaN makes all
    of them NaN, as torch's factor does.
    """
    over = ((norm + 1e-6) / most).clamp_(min=1.0)
    return over if grad_scale is None else over * grad_scale.to(norm.device)
