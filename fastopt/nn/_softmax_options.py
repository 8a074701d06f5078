"""z_loss and softcap: options of cross-entropy that torch's own has not."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction
from torch.nn import functional as F

from ..front.call import LossModule
from ..front.circumstances import autocasts

__all__ = ["SoftmaxModule", "check", "definition"]

# Bound now: a user may put fastopt's functions in the place of torch's.
_torchs = F.cross_entropy


def check(z_loss: Any, softcap: Any) -> None:
    """Raise ValueError for what can't be one of them."""
    if not _is_finite(z_loss) or z_loss < 0:
        raise ValueError(f"z_loss={z_loss!r} (allowed: a finite number >= 0)")
    if softcap is not None and (not _is_finite(softcap) or softcap <= 0):
        raise ValueError(f"softcap={softcap!r} (allowed: a finite number > 0, or None)")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def definition(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Torch's function; with the options, the definition in torch's operations."""
    check(z_loss, softcap)
    usual = z_loss == 0 and softcap is None
    # Of what isn't numbers torch says what is wrong.
    if usual or not (isinstance(input, Tensor) and input.is_floating_point()):
        return _torchs(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    if size_average is not None or reduce is not None:
        reduction = _reduction.legacy_get_string(size_average, reduce)
    dtype = torch.float32 if autocasts(input.device) and input.itemsize < 8 else input.dtype
    # In half precision a cap would be rounded, and the square of a sum overflow.
    target, weight = _wide(target, input.dtype), _wide(weight, input.dtype)
    logits = _wide(input, input.dtype)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = _torchs(
        logits, target, weight, ignore_index=ignore_index, reduction=reduction,
        label_smoothing=label_smoothing,
    )  # fmt: skip
    if z_loss != 0:
        loss = loss + _squares(z_loss, logits, target, weight, ignore_index, reduction)
    return loss.to(dtype)


definition.__qualname__ = _torchs.__name__  # for Python's errors about arguments


def _wide(tensor: Any, dtype: torch.dtype) -> Any:
    """What is of this dtype, if that is half precision, in float32."""
    is_half = isinstance(tensor, Tensor) and tensor.dtype == dtype and dtype.itemsize == 2
    return tensor.float() if is_half else tensor


def _squares(
    z_loss: float, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int,
    reduction: str,
) -> Tensor:  # fmt: skip
    """z_loss times the square of each position's log-sum-exp, reduced as the loss is."""
    squares = z_loss * logits.logsumexp(min(1, logits.dim() - 1)).square()
    divisor: Any = squares.numel()
    if not target.is_floating_point():
        target = target.long()
        counts = target != ignore_index
        squares = torch.where(counts, squares, 0.0)
        used = counts if weight is None else weight[torch.where(counts, target, 0)] * counts
        divisor = used.sum()
    if reduction == "none":
        return squares
    return squares.sum() / divisor if reduction == "mean" else squares.sum()


class SoftmaxModule(LossModule):
    """Mixin in front of a torch loss class, as `LossModule` is, of a loss that has the options.

    An object has them as attributes of its own only where they aren't the usual ones.
    """

    z_loss: float = 0.0
    softcap: float | None = None

    def _set(self, z_loss: float, softcap: float | None) -> None:
        check(z_loss, softcap)
        if z_loss != 0:
            self.z_loss = z_loss
        if softcap is not None:
            self.softcap = softcap

    def _options(self) -> dict[str, Any]:
        options = super()._options()
        if self.z_loss != 0 or self.softcap is not None:
            options.update(self._beyond())
        return options

    def _beyond(self) -> dict[str, Any]:
        given = {"z_loss": self.z_loss, "softcap": self.softcap}
        return {name: v for name, v in given.items() if v != getattr(SoftmaxModule, name)}

    def extra_repr(self) -> str:
        torchs: Any = super()
        words = [f"{name}={value}" for name, value in self._beyond().items()]
        return ", ".join([*filter(None, [torchs.extra_repr()]), *words])
