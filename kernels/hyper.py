"""Hyperparameter records: the vocabulary that all backends share.

One NamedTuple an operation. Its *type* chooses the formula inside a compiled loop, so
a loop needs no closure (which would miss the disk cache) and no flag per operation.
Optimizer records hold numbers only: a step plan stacks them into one float64 table,
a row per parameter group.
"""

from __future__ import annotations

from typing import NamedTuple


class SGD(NamedTuple):
    """Attributes as in torch.optim.SGD.

    grad_scale multiplies each gradient first: -1 to maximise, 1/scale under a GradScaler.
    grad_share is 1 - dampening, or 1 at the first step of a momentum buffer.
    """

    grad_scale: float
    lr: float
    momentum: float
    grad_share: float
    weight_decay: float
    nesterov: float


class Adam(NamedTuple):
    """Attributes as in torch.optim.Adam; grad_scale as in SGD.

    decoupled is 1 if the weight decay is, else 0.
    """

    grad_scale: float
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: float


class AdamStep(NamedTuple):
    """Adam's constants at one step t, derived from Adam in float64.

    step_size is lr / (1 - beta1**t), beta2_root is 1 / sqrt(1 - beta2**t), and the rests
    are 1 - beta1 and 1 - beta2. weight_decay is that of the coupled kind, param_decay the factor
    on the parameter of the decoupled kind, 1 - lr * weight_decay.
    """

    grad_scale: float
    step_size: float
    beta1: float
    beta1_rest: float
    beta2: float
    beta2_rest: float
    beta2_root: float
    eps: float
    weight_decay: float
    param_decay: float


class RMSprop(NamedTuple):
    """Attributes as in torch.optim.RMSprop; grad_scale as in SGD; alpha_rest is 1 - alpha."""

    grad_scale: float
    lr: float
    alpha: float
    alpha_rest: float
    eps: float
    weight_decay: float
    momentum: float
