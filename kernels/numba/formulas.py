"""The formulas: what is computed per element. The loops around them are elsewhere.

Every number in a formula must come from its arguments or through `cast`: a Python
literal is a float64 to numba, and would halve the vector width of a float32 loop.
"""

from __future__ import annotations

import math
from typing import Any

from .. import hyper
from .compiler import formula_of

# -- optimizers -----------------------------------------------------------------------
#
# `constants` runs once per tensor and step in float64: everything that does not depend
# on the element. `update` runs per element in the compute dtype. A state that this
# configuration does not have is None, and its branch is not compiled.


def constants(record: Any, step: Any) -> Any:
    """What `update` needs of the hyperparameters at this step, as one record."""
    raise NotImplementedError


def update(record: Any, param: Any, grad: Any, *state: Any) -> Any:
    """New (param, *state), in the order of the optimizer's slots."""
    raise NotImplementedError


def unchanged(record: Any, step: Any) -> Any:
    return record


at_step = formula_of(constants, default=unchanged)
optimizer = formula_of(update)


@optimizer(hyper.SGD)
def sgd(h: Any, param: Any, grad: Any, momentum_buffer: Any) -> Any:
    grad = grad * h.grad_scale
    if h.weight_decay != 0:
        grad = grad + h.weight_decay * param
    if momentum_buffer is not None:
        momentum_buffer = h.momentum * momentum_buffer + h.grad_share * grad
        grad = grad + h.momentum * momentum_buffer if h.nesterov != 0 else momentum_buffer
    return param - h.lr * grad, momentum_buffer


@at_step(hyper.Adam)
def adam_constants(h: Any, step: Any) -> Any:
    # lr becomes lr / (1 - beta1**t) and eps stays; the second correction goes into
    # beta2_root = 1 / sqrt(1 - beta2**t), so that an element costs one square root and
    # one division.
    return hyper.AdamStep(
        h.grad_scale,
        h.lr / (1.0 - h.beta1**step),
        h.beta1,
        1.0 - h.beta1,
        h.beta2,
        1.0 - h.beta2,
        1.0 / math.sqrt(1.0 - h.beta2**step),
        h.eps,
        0.0 if h.decoupled else h.weight_decay,
        1.0 - h.lr * h.weight_decay if h.decoupled else 1.0,
    )


@optimizer(hyper.AdamStep)
def adam(h: Any, param: Any, grad: Any, exp_avg: Any, exp_avg_sq: Any, max_exp_avg_sq: Any) -> Any:
    grad = grad * h.grad_scale
    if h.param_decay != 1:
        param = param * h.param_decay
    if h.weight_decay != 0:
        grad = grad + h.weight_decay * param
    exp_avg = h.beta1 * exp_avg + h.beta1_rest * grad
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_rest * grad * grad  # grad² may overflow
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        # torch.maximum: a NaN on either side wins
        second = exp_avg_sq if not (max_exp_avg_sq >= exp_avg_sq) else max_exp_avg_sq
        max_exp_avg_sq = second if max_exp_avg_sq == max_exp_avg_sq else max_exp_avg_sq
        second = max_exp_avg_sq
    denominator = math.sqrt(second) * h.beta2_root + h.eps
    return param - h.step_size * (exp_avg / denominator), exp_avg, exp_avg_sq, max_exp_avg_sq


@optimizer(hyper.RMSprop)
def rmsprop(
    h: Any, param: Any, grad: Any, square_avg: Any, momentum_buffer: Any, grad_avg: Any
) -> Any:
    grad = grad * h.grad_scale
    if h.weight_decay != 0:
        grad = grad + h.weight_decay * param
    square_avg = h.alpha * square_avg + h.alpha_rest * grad * grad
    average = square_avg
    if grad_avg is not None:
        grad_avg = h.alpha * grad_avg + h.alpha_rest * grad
        average = square_avg - grad_avg * grad_avg
        if average < 0:  # a variance is not, but for rounding
            average = average * 0
    change = grad / (math.sqrt(average) + h.eps)
    if momentum_buffer is not None:
        momentum_buffer = h.momentum * momentum_buffer + change
        change = momentum_buffer
    return param - h.lr * change, square_avg, momentum_buffer, grad_avg
