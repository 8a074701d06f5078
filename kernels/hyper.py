"""Hyperparameter records: the vocabulary that all backends share.

One NamedTuple an operation. Its *type* chooses the formula inside a compiled loop, so
a loop needs no closure (which would miss the disk cache) and no flag per operation.
Optimizer records hold numbers only: a step plan stacks them into one float64 table,
a row per parameter group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class MSE(NamedTuple):
    """(input - target)**2, elementwise."""


class L1(NamedTuple):
    """abs(input - target), elementwise."""


class CrossEntropy(NamedTuple):
    """-log softmax(input)[target] over a class axis.

    Attributes:
        ignore_index: class index whose positions count for nothing.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0


class Loss(NamedTuple):
    """One loss call without its tensors.

    Attributes:
        hyper: the operation's record, one of the above.
        reduction: "none", "mean" or "sum".
        dtype: the dtype of the result.
        grad_output: what the backward pass is expected to be given, None if that is unknown.
            A backend that can't look at a grad_output before its kernels run is told 1 or None.
    """

    hyper: MSE | L1 | CrossEntropy
    reduction: str
    dtype: torch.dtype
    grad_output: float | None = 1.0


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
