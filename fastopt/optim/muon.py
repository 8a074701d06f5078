"""Muon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import _muon as _torchs
from torch.optim.optimizer import _to_scalar

from .. import formula as m
from ..kernels.operation import Update
from ..kernels.tables import Averaged, Launch, Tables
from ._kinds import Kind
from ._planned import PlannedStep
from ._shards import is_dtensor

__all__ = ["Muon"]

#: Torch's `adjust_lr_fn`, as numbers; any other name leaves the rate as it is.
_ADJUSTMENTS = {None: 0.0, "original": 0.0, "match_rms_adamw": 1.0}
_torchs_products = _torchs._zeropower_via_newtonschulz


class MuonUpdate(Update):
    """Its first stage: the momentum, and in the place of the parameter what is orthogonalized.

    rest is 1 - momentum; the fields from lr on are for the stages after this one.
    """

    momentum: float
    rest: float
    nesterov: float
    lr: float
    weight_decay: float
    adjustment: float
    eps: float
    steps: float
    a: float
    b: float
    c: float

    def update(h, param: Any, grad: Any, momentum_buffer: Any) -> Any:
        grad = grad * h.grad_scale
        way = grad - momentum_buffer
        near, far = momentum_buffer + h.rest * way, grad - h.momentum * way
        momentum_buffer = m.where(h.rest < 0.5, near, far)
        way = momentum_buffer - grad
        near, far = grad + h.momentum * way, momentum_buffer - h.rest * way
        ahead = m.where(h.momentum < 0.5, near, far)
        return m.where(h.nesterov != 0.0, ahead, momentum_buffer), momentum_buffer


class OrthogonalUpdate(Update):
    """Its last stage; grad is the orthogonalized momentum."""

    kept: float
    rate: float

    def update(h, param: Any, grad: Any) -> Any:
        return (param * h.kept - h.rate * (grad * h.grad_scale),)


class Muon(PlannedStep, torch.optim.Muon):
    r"""Muon: momentum that is orthogonalized, for matrices.

    With gradient g, of each parameter as one matrix of A rows and B columns:

    .. code-block:: text

        b ← b + (1 - momentum) · (g - b)
        u ← g + momentum · (b - g)  if nesterov else  b
        o ← u / max(‖u‖, eps), and then ns_steps times, in bfloat16,
            o ← a · o + (b' · S + c · S²) · o    with S = o oᵀ       (ns_coefficients a, b', c)
        r ← √max(1, A / B)  or, with adjust_lr_fn="match_rms_adamw",  0.2 · √max(A, B)
        p ← p · (1 - lr · weight_decay) - lr · r · o

    The momentum of all parameters is one launch, and so is their update. Between them are torch's
    products of matrices, over batches of those of one shape.

    Args:
        params: parameters of two dimensions, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as above.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None;
            they stay as they are, and their norm is then in ``grad_norm``.

    Parameters may be float64, float32, bfloat16 or float16, of any dense layout; all others
    are updated by torch's own code, DTensors too. ``explain`` says which.

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters, for parameters of
            other dimensions, and for complex or sparse ones.

    Example:
        >>> matrices = [p for p in model.parameters() if p.ndim == 2]
        >>> optimizer = fastopt.optim.Muon(matrices, lr=0.02)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: :class:`torch.optim.Muon`; Jordan, https://kellerjordan.github.io/posts/muon/
    """

    _operation = "Muon"
    _elementwise = False
    _record = MuonUpdate
    _counts_steps = False
    _sees_params = True

    def _hyper(self, group: dict[str, Any], begins: bool) -> MuonUpdate:
        a, b, c = group["ns_coefficients"]
        return MuonUpdate(
            grad_scale=1.0,
            momentum=group["momentum"],
            rest=1 - group["momentum"],
            nesterov=float(bool(group["nesterov"])),
            lr=_to_scalar(group["lr"]),
            weight_decay=group["weight_decay"],
            adjustment=_ADJUSTMENTS.get(group["adjust_lr_fn"], 2.0),
            eps=group["eps"],
            steps=float(group["ns_steps"]),
            a=a,
            b=b,
            c=c,
        )

    def _refuse(self, group: dict[str, Any]) -> str | None:
        steps = group["ns_steps"]
        if type(steps) is not int or steps >= 100:
            return f"ns_steps={steps!r} where kernels take integers below 100"
        if any(is_dtensor(p) for p in group["params"]):
            return "a DTensor, of which a product needs all parts"
        if any(p.ndim != 2 for p in group["params"]):
            return "a parameter that is no matrix"
        return None

    def _launcher(
        self, backend: Any, kind: Kind, averaged: Averaged | None
    ) -> Callable[[Tables], Any]:
        # A launch computes in the precision of what it writes to first.
        between = torch.float64 if kind.param == torch.float64 else torch.bfloat16
        first = backend.step_launcher(MuonUpdate, (between, kind.slots[0]), (), kind.grad, None)
        last = backend.step_launcher(OrthogonalUpdate, (kind.param,), (), between, None)
        return lambda tables: Stages(tables, between, first, last)


class Stages:
    """The launches of parameters of one kind, and the products between them."""

    def __init__(
        self, tables: Tables, between: torch.dtype, first: Callable[[Tables], Launch],
        last: Callable[[Tables], Launch],
    ) -> None:  # fmt: skip
        count, fields = len(tables.row_of), len(OrthogonalUpdate.numbers)
        self._tables, self._between = tables, between
        self._first = tables._replace(addresses=np.zeros_like(tables.addresses))
        self._last = tables._replace(
            hypers=np.ones((count, fields)),
            row_of=np.arange(count),  # the rate depends on the shape
            addresses=np.zeros((3, count), np.int64),
        )
        self._momentum, self._update = first(self._first), last(self._last)

    def __call__(
        self, params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Take a step; params: what they are now."""
        t, there = self._tables, self._tables.addresses[-2] != 0
        batches: dict[tuple[Any, ...], list[int]] = {}
        for k in np.flatnonzero(there).tolist():
            key = int(t.row_of[k]), params[k].shape, params[k].stride()
            batches.setdefault(key, []).append(k)
        order = np.array([k for places in batches.values() for k in places])
        ends = np.cumsum(np.diff(t.offsets)[order])
        room = torch.empty(int(ends[-1]), dtype=self._between, device=t.device)
        begins = np.zeros(len(params), np.int64)
        begins[order[1:]] = ends[:-1]
        self._first.addresses[:] = t.addresses
        self._first.addresses[0] = np.where(there, room.data_ptr() + room.itemsize * begins, 0)
        self._last.addresses[0] = t.addresses[0]
        self._last.addresses[1] = self._first.addresses[0]
        self._momentum(grad_scale, found_inf)
        begin, table = 0, self._last.hypers
        for (row, shape, strides), places in batches.items():
            h = MuonUpdate(*t.hypers[row].tolist())
            size = shape.numel()
            batch = room.as_strided((len(places), *shape), (size, *strides), begin)
            _orthogonalize(batch, h)
            table[places, 1:] = 1.0 - h.lr * h.weight_decay, h.lr * _ratio(h.adjustment, *shape)
            begin += len(places) * size
        self._update(None, found_inf)


def _ratio(adjustment: float, rows: int, columns: int) -> float:
    if adjustment == 0.0:
        return float(np.sqrt(max(1.0, rows / columns if columns else 1.0)))
    return float(0.2 * np.sqrt(max(rows, columns))) if adjustment == 1.0 else 1.0


@torch.no_grad()
def _orthogonalize(batch: Tensor, h: MuonUpdate) -> None:
    """Make matrices of one shape nearly orthogonal, in place, as torch does one after another."""
    coefficients, steps = (h.a, h.b, h.c), int(h.steps)
    products = _torchs._zeropower_via_newtonschulz
    if len(batch) == 1 or products is not _torchs_products:
        for matrix in batch:
            matrix.copy_(products(matrix, coefficients, steps, h.eps))
        return
    found = batch.bfloat16()
    found = found.mT if batch.shape[1] > batch.shape[2] else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp_(min=h.eps)
    for _ in range(steps):
        gram = torch.bmm(found, found.mT)
        change = torch.baddbmm(gram, gram, gram, beta=h.b, alpha=h.c)
        found = torch.baddbmm(found, change, found, beta=h.a)
    batch.copy_(found.mT if batch.shape[1] > batch.shape[2] else found)
