"""Lion, which torch has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from .. import formula as m
from ..kernels.operation import Update
from ._planned import PlannedStep

__all__ = ["Lion"]


class LionUpdate(Update):
    """beta1_rest and beta2_rest are 1 - beta1 and 1 - beta2."""

    lr: float
    beta1: float
    beta1_rest: float
    beta2: float
    beta2_rest: float
    weight_decay: float

    def update(h, param: Any, grad: Any, exp_avg: Any) -> Any:
        grad = grad * h.grad_scale
        way = m.sign(h.beta1 * exp_avg + h.beta1_rest * grad)
        exp_avg = h.beta2 * exp_avg + h.beta2_rest * grad
        return param - h.lr * (way + h.weight_decay * param), exp_avg


class PlainLion(Optimizer):
    """Lion in torch's operations: what torch's own classes are to the other optimizers."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0.0:
            raise ValueError(f"Invalid learning rate: {lr}")
        for place, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"Invalid beta parameter at index {place}: {beta}")
        if not weight_decay >= 0.0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            self._step_supports_amp_scaling = True
        defaults = {
            "lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize,
            "differentiable": differentiable, "fused": fused,
        }  # fmt: skip
        super().__init__(params, defaults)

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = (getattr(self, n, None) for n in ("grad_scale", "found_inf"))
        if found_inf is not None and found_inf.item():
            return loss
        for group in self.param_groups:
            lr, betas = group["lr"], group["betas"]
            lr, beta1, beta2 = (n.squeeze() if isinstance(n, Tensor) else n for n in (lr, *betas))
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if grad.is_sparse:
                    raise RuntimeError("Lion does not support sparse gradients")
                state = self.state[param]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                exp_avg = state["exp_avg"]
                if torch.is_complex(param):
                    param, grad, exp_avg = map(torch.view_as_real, (param, grad, exp_avg))
                if grad_scale is not None:
                    grad = grad / grad_scale.to(grad.device)
                grad = -grad if group["maximize"] else grad
                way = (beta1 * exp_avg + (1 - beta1) * grad).sign()
                exp_avg.copy_(beta2 * exp_avg + (1 - beta2) * grad)
                param.copy_(param - lr * (way + group["weight_decay"] * param))
        return loss


class Lion(PlannedStep, PlainLion):
    r"""Lion: steps of one size, in the direction of a momentum's sign.

    With gradient g (negated if ``maximize``), per element:

    .. code-block:: text

        u ← sign(β₁ m + (1 - β₁) g)
        m ← β₂ m + (1 - β₂) g
        p ← p - lr · (u + weight_decay · p)

    Torch has no such class. Arguments, groups, states and checkpoints are laid out as in those
    that it has, and ``explain`` calls its definition in torch's operations, which is taken where
    no kernel serves, the reference.

    Args:
        params: parameters, or groups of them as dicts.
        lr: learning rate, a number or a one-element tensor; a third to a tenth of AdamW's.
        betas: (β₁, β₂), numbers or one-element tensors.
        weight_decay: as above, decoupled; three to ten times AdamW's.
        maximize: as above.
        differentiable: step within autograd; runs the definition in torch's operations.
        fused: leave a GradScaler's scale and verdict to the step, as in torch's optimizers.
        max_grad_norm: the norm that a step scales its gradients down to, all alike, or None;
            they stay as they are, and their norm is then in ``grad_norm``.
        state_dtype, rounding, seed: states in bfloat16, and how parameters of 16 bits are stored
            (docs/fewer_bytes.md); None is as torch does.

    There is no ``foreach``, as there are no other implementations to choose from, and no
    ``capturable``, as nothing is counted: a step can be captured in a CUDA graph as it is.

    Parameters may be float64, float32, bfloat16 or float16, of any dense layout; all others
    are updated by torch's operations. ``explain`` says which.

    Raises:
        ValueError, RuntimeError: for invalid hyperparameters and for sparse gradients, in the
            words that torch's optimizers have for them.

    Example:
        >>> optimizer = fastopt.optim.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()

    Reference: Chen et al., https://arxiv.org/abs/2302.06675
    """

    _operation = "Lion"
    _record = LionUpdate
    _rates = ("betas",)
    _counts_steps = False

    def _hyper(self, group: dict[str, Any], begins: bool) -> LionUpdate:
        beta1, beta2 = group["betas"]
        return LionUpdate(
            grad_scale=-1.0 if group["maximize"] else 1.0,
            lr=group["lr"],
            beta1=beta1,
            beta1_rest=1 - beta1,
            beta2=beta2,
            beta2_rest=1 - beta2,
            weight_decay=group["weight_decay"],
        )
