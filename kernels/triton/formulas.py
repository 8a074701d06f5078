"""The formulas: what is computed per element. The loops around them are elsewhere.

All arguments of a formula share one compute dtype, and a literal takes theirs. A
comparison with NaN must come out as torch's does.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .. import hyper
from .compiler import device_function as formula
from .vector_math import quotient, root

# -- optimizers -----------------------------------------------------------------------------
#
# `constants` runs once per tensor and step in float64, in a small kernel of its own: all that
# does not depend on the element. `update` runs per element. Both get the fields of a record
# as a tuple of numbers. USES has a dtype for each state, or None: such a state is any number.


@formula
def unchanged(values, step):
    return values


@formula
def adam_constants(values, step):
    h = hyper.Adam(*values)
    return hyper.AdamStep(
        grad_scale=h.grad_scale,
        step_size=h.lr / (1.0 - tl.exp(step * tl.log(h.beta1))),
        beta1=h.beta1,
        beta1_rest=1.0 - h.beta1,
        beta2=h.beta2,
        beta2_rest=1.0 - h.beta2,
        beta2_root=1.0 / tl.sqrt(1.0 - tl.exp(step * tl.log(h.beta2))),
        eps=h.eps,
        weight_decay=tl.where(h.decoupled != 0.0, 0.0, h.weight_decay),
        param_decay=tl.where(h.decoupled != 0.0, 1.0 - h.lr * h.weight_decay, 1.0),
    )


@formula
def sgd(values, param, grad, states, USES: tl.constexpr):
    h = hyper.SGD(*values)
    (momentum_buffer,) = states
    grad *= h.grad_scale
    grad = tl.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
    if USES[0] is not None:
        momentum_buffer = h.momentum * momentum_buffer + h.grad_share * grad
        grad = tl.where(h.nesterov != 0.0, grad + h.momentum * momentum_buffer, momentum_buffer)
    return param - h.lr * grad, (momentum_buffer,)


@formula
def adam(values, param, grad, states, USES: tl.constexpr):
    h = hyper.AdamStep(*values)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad *= h.grad_scale
    param *= h.param_decay
    grad = tl.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
    exp_avg = h.beta1 * exp_avg + h.beta1_rest * grad
    exp_avg_sq = h.beta2 * exp_avg_sq + h.beta2_rest * grad * grad  # grad² may overflow
    second = exp_avg_sq
    if USES[2] is not None:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, tl.PropagateNan.ALL)
        second = max_exp_avg_sq
    denominator = root(second) * h.beta2_root + h.eps
    change = h.step_size * quotient(exp_avg, denominator)
    return param - change, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@formula
def rmsprop(values, param, grad, states, USES: tl.constexpr):
    h = hyper.RMSprop(*values)
    square_avg, momentum_buffer, grad_avg = states
    grad *= h.grad_scale
    grad = tl.where(h.weight_decay != 0.0, grad + h.weight_decay * param, grad)
    square_avg = h.alpha * square_avg + h.alpha_rest * grad * grad
    average = square_avg
    if USES[2] is not None:
        grad_avg = h.alpha * grad_avg + h.alpha_rest * grad
        average = square_avg - grad_avg * grad_avg
        average = tl.where(average < 0, 0.0, average)  # a variance is not, but for rounding
    change = quotient(grad, root(average) + h.eps)
    if USES[1] is not None:
        momentum_buffer = h.momentum * momentum_buffer + change
        change = momentum_buffer
    return param - h.lr * change, (square_avg, momentum_buffer, grad_avg)


CONSTANTS: dict[type, Any] = {hyper.Adam: (adam_constants, len(hyper.AdamStep._fields))}
UPDATE: dict[type, Any] = {hyper.SGD: sgd, hyper.Adam: adam, hyper.RMSprop: rmsprop}
