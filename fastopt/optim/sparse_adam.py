"""SparseAdam."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import _to_scalar

from .. import dispatch
from .. import formula as m
from ..dispatch import Decision, Request
from ..kernels.layout import is_released
from ..kernels.operation import Update
from ..kernels.tables import Tables
from ._following import average_after
from ._kinds import group_specials
from ._memory import Place, find_sharing
from ._planned import PlannedStep
from ._proof import increment_versions
from ._seams import circumstances
from ._sort import size_of

__all__ = ["SparseAdam"]

_PLAIN = (Tensor, torch.nn.Parameter)
_STATES = ("exp_avg", "exp_avg_sq")


class SparseAdamUpdate(Update):
    """rest1 is 1 - β₁, rest2 is 1 - β₂, step_size has both bias corrections."""

    step_size: float
    rest1: float
    rest2: float
    eps: float

    def update(h: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any) -> Any:
        grad = grad * h.grad_scale
        exp_avg = exp_avg + h.rest1 * (grad - exp_avg)
        exp_avg_sq = exp_avg_sq + h.rest2 * (grad * grad - exp_avg_sq)
        change = m.divide(h.step_size * exp_avg, m.sqrt(exp_avg_sq) + h.eps)
        return param - change, exp_avg, exp_avg_sq


class Member(NamedTuple):
    """A parameter, its group, and its gradient without repeated indices, None if there is none."""

    param: Tensor
    group: dict[str, Any]
    grad: Tensor | None


class SparseAdam(PlannedStep, torch.optim.SparseAdam):
    r"""Adam for sparse gradients: what they have no entries for stays as it is, averages too.

    With the entries g of a gradient (negated if ``maximize``), those of one index added up, at step
    t of their parameter, per element of those entries:

    .. code-block:: text

        m ← m + (1 - β₁) (g - m)
        v ← v + (1 - β₂) (g² - v)
        p ← p - lr · √(1 - β₂ᵗ) / (1 - β₁ᵗ) · m / (√v + eps)

    Torch adds up the entries of an index; the rows of all parameters are then one launch. A
    gradient without entries counts as a step, and changes nothing.

    Args:
        params: dense parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor.
        betas, eps, maximize: as above.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None, where
            torch has a norm of sparse gradients.

    Parameters may be contiguous float64, float32, bfloat16 or float16 ones on a CPU, with gradients
    of their dtype; all others are updated by torch's own code: on a GPU a launch would have to wait
    for the rows' numbers. ``explain`` says which.

    Raises:
        ValueError, RuntimeError: as torch does, for invalid hyperparameters, for sparse or complex
            parameters, and for dense gradients.

    Example:
        >>> words = torch.nn.Embedding(1_000, 16, sparse=True)
        >>> optimizer = fastopt.optim.SparseAdam(words.parameters(), lr=1e-3)
        >>> words(torch.tensor([3, 7, 3])).sum().backward(); optimizer.step()

    Reference: :class:`torch.optim.SparseAdam`
    """

    _operation = "SparseAdam"
    _elementwise = False
    _record = SparseAdamUpdate
    _rates = ("betas",)

    @classmethod
    def _usual(cls, size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        (param,) = super()._usual(size, dtype)
        param.grad = torch.ones_like(param).to_sparse(1)
        return [param]

    def _decisions(self, compiled: bool = False) -> tuple[Decision, ...]:
        found: dict[tuple[tuple[torch.dtype, ...], tuple[str, ...]], list[Tensor]] = {}
        around = (*self._around(), *["sparse gradients inside torch.compile"] * compiled)
        for group in self.param_groups:
            for param in group["params"]:
                kind = _kind(param, self.state.get(param, {}))
                special = (*around, *_specials(self, group, param))
                found.setdefault((kind, special), []).append(param)
        return tuple(
            self._decide(kind, special, params) for (kind, special), params in found.items()
        )

    def _around(self) -> tuple[str, ...]:
        """Why torch's code has to update all parameters."""
        written = [
            (Place(k, name), t)
            for k, param in enumerate(p for g in self.param_groups for p in g["params"])
            for name, t in (("", param), *self.state.get(param, {}).items())
            if isinstance(t, Tensor)
        ]
        around = circumstances(self)
        if not around and find_sharing(written, []) is not None:
            return ("parameters or states that share memory",)
        return around

    def _decide(
        self, kind: tuple[torch.dtype, ...], special: tuple[str, ...], params: list[Tensor]
    ) -> Decision:
        device, size = params[0].device.type, sum(map(size_of, params))
        insisted = dispatch.insisted()
        return dispatch.choose(
            Request(self._operation, device, kind, size, special, insisted=insisted)
        )

    def _take_step(
        self, by_reference: Callable[[list[Tensor]], None], grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        around = self._around()
        served: dict[tuple[torch.dtype, ...], list[Member]] = {}
        backends: dict[tuple[torch.dtype, ...], str] = {}
        torchs: list[Tensor] = []
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                kind = _kind(param, self.state.get(param, {}))
                special = (*around, *_specials(self, group, param))
                grad = None if special else param.grad.coalesce()
                if grad is not None and not _is_within(grad, param):
                    special = ("a gradient with entries outside of its parameter",)
                backend = self._decide(kind, special, [param]).backend
                if backend == "reference":
                    torchs.append(param)
                else:
                    backends[kind] = backend
                    served.setdefault(kind, []).append(Member(param, group, grad))
        if torchs:
            by_reference(torchs)
        for kind, members in served.items():
            launcher = dispatch.load(backends[kind]).step_launcher(
                SparseAdamUpdate, kind[:3], (), kind[3], None
            )
            self._update(members, launcher, grad_scale)
        average_after(self, found_inf)

    def _update(
        self, members: list[Member], launcher: Callable[[Tables], Any], grad_scale: Tensor | None
    ) -> None:
        """Update the parameters of one kind."""
        hypers: list[tuple[Any, ...]] = []
        widths: list[np.ndarray] = []
        row_of: list[np.ndarray] = []
        addresses: list[np.ndarray] = []
        held: list[Tensor] = []
        for param, group, grad in members:
            state = self.state[param]
            if not state:
                state["step"] = 0
                for name in _STATES:
                    state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["step"] += 1
            hypers.append(_hyper(group, state["step"]).row)
            values = grad._values().contiguous()  # type: ignore[union-attr]
            rows = _rows(grad)
            width = values.numel() // max(len(rows), 1)
            written = [param.detach(), state["exp_avg"].detach(), state["exp_avg_sq"].detach()]
            held += [*written, values]  # the memory that the launch goes to
            widths.append(np.full(len(rows), width))
            row_of.append(np.full(len(rows), len(row_of)))
            places = [t.data_ptr() + rows * (width * t.itemsize) for t in written]
            order = np.arange(len(rows)) * (width * values.itemsize)
            addresses.append(np.stack([*places, values.data_ptr() + order, 0 * rows]))
        offsets = np.cumsum([0, *np.concatenate(widths)], dtype=np.int64)
        tables = Tables(
            device=members[0].param.device,
            hypers=np.array(hypers, np.float64),
            traced=[],
            row_of=np.concatenate(row_of).astype(np.int64),
            offsets=offsets,
            addresses=np.ascontiguousarray(np.concatenate(addresses, axis=1), np.int64),
            counted_on_device=False,
        )
        if offsets[-1]:
            launcher(tables)(grad_scale, None)
        changed = [p for p, _, grad in members if grad is not None and grad._nnz()]
        changed += [self.state[p][name] for p in changed for name in _STATES]
        increment_versions(changed)
        del held


def _hyper(group: dict[str, Any], step: int) -> SparseAdamUpdate:
    beta1, beta2 = map(float, group["betas"])
    size = _to_scalar(group["lr"]) * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    sign = -1.0 if group.get("maximize", False) else 1.0
    return SparseAdamUpdate(sign, size, 1 - beta1, 1 - beta2, group["eps"])


def _kind(param: Tensor, state: dict[str, Any]) -> tuple[torch.dtype, ...]:
    """Dtypes of the parameter, of its states and of its gradient."""
    states = [state.get(name) for name in _STATES]
    dtypes = [s.dtype if isinstance(s, Tensor) else param.dtype for s in states]
    return param.dtype, *dtypes, param.dtype if param.grad is None else param.grad.dtype


def _specials(optimizer: SparseAdam, group: dict[str, Any], param: Tensor) -> tuple[str, ...]:
    """Why only torch can update a parameter, or say what is wrong with it."""
    special = [*group_specials(optimizer, group)]
    state, grad = optimizer.state.get(param, {}), param.grad
    if torch.is_inference_mode_enabled() or param.is_inference():
        special.append("inference mode")
    if param.device.type != "cpu" or dispatch.insisted() == "triton":
        special.append("rows whose numbers a launch on a GPU would have to wait for")
    if type(param) not in _PLAIN or param.layout is not torch.strided or param.is_neg():
        special.append("a parameter that is no plain tensor")
    elif not param.dim() or not param.is_contiguous() or is_released(param):
        special.append("a parameter without dimensions, or that isn't contiguous")
    if grad is not None:
        if type(grad) is not Tensor or grad.layout is not torch.sparse_coo:
            special.append(f"a gradient of layout {grad.layout}")
        elif grad.dtype != param.dtype or grad.device != param.device or grad.is_neg():
            special.append("a gradient of another dtype or device than the parameter's")
    if state and type(state.get("step")) is not int:
        special.append("a state 'step' that is no integer")
    for name in _STATES if state else ():
        value = state.get(name)
        if (
            type(value) is not Tensor or value.shape != param.shape or value.is_inference()
            or value.device != param.device or not value.is_contiguous() or is_released(value)
        ):  # fmt: skip
            special.append(f"a state {name!r} that doesn't lie as its parameter")
    return tuple(special)


def _rows(grad: Any) -> np.ndarray:
    """Which rows a gradient has entries for, numbered through all of its sparse dimensions."""
    indices = grad._indices().numpy()
    sizes = grad.shape[: grad.sparse_dim()]
    rows = np.zeros(indices.shape[1], np.int64)
    for index, size in zip(indices, sizes, strict=True):
        rows = rows * size + index
    return rows


def _is_within(grad: Any, param: Tensor) -> bool:
    """Whether a gradient has entries for elements of its parameter alone."""
    indices = grad._indices().numpy()
    sizes = np.array(grad.shape[: grad.sparse_dim()])[:, None]
    return grad.shape == param.shape and bool(((indices >= 0) & (indices < sizes)).all())
