"""Every formula once more, in NumPy's long double: what float64 itself is measured against.

On x86 that is 64 bits of mantissa, eleven more than float64 has; elsewhere it may be no more
than float64, which PRECISE says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any  # of long doubles

PRECISE = bool(np.finfo(np.longdouble).nmant >= 63)


def exact(tensor: Tensor) -> Array:
    """A tensor's numbers, class indices left as they are."""
    if tensor.is_floating_point():
        return tensor.detach().cpu().double().numpy().astype(np.longdouble)
    return tensor.cpu().numpy().astype(np.int64)


# -- losses: the value of each element or position, and the gradient for grad_output ------


def _difference(value: Callable[[Array], Array], slope: Callable[[Array], Array]) -> Any:
    def loss(reduction: str, upstream: Array, input: Array, target: Array) -> tuple[Array, Array]:
        difference = input - target
        share = upstream / (difference.size if reduction == "mean" else 1)
        return _reduced(value(difference), reduction), slope(difference) * share

    return loss


def _reduced(values: Array, reduction: str, divisor: Array | None = None) -> Array:
    if reduction == "none":
        return values
    total = values.sum()
    return total / (values.size if divisor is None else divisor) if reduction == "mean" else total


def _cross_entropy(
    reduction: str,
    upstream: Array,
    input: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> tuple[Array, Array]:
    axis = min(1, input.ndim - 1)
    logits, slope = np.moveaxis(input, axis, -1), np.longdouble(1)
    if softcap is not None:
        bent = np.tanh(logits / np.longdouble(softcap))
        logits, slope = softcap * bent, (1 - bent) * (1 + bent)
    classes = logits.shape[-1]
    weight = np.ones(classes, np.longdouble) if weight is None else weight
    smoothing = np.longdouble(label_smoothing)
    if target.dtype == np.int64:
        counts = target != ignore_index
        label = np.where(counts, target, 0)
        hot = np.zeros(logits.shape, np.longdouble)
        np.put_along_axis(hot, label[..., None], 1, axis=-1)
        hot *= counts[..., None]
        divisor = (weight[label] * counts).sum()
    else:
        counts = np.ones(logits.shape[:-1], bool)
        hot, divisor = np.moveaxis(target, axis, -1), np.longdouble(counts.sum())
    # Every variant is a cross-entropy with some non-negative numbers q in place of the labels.
    q = ((1 - smoothing) * hot + smoothing / classes * counts[..., None]) * weight
    peak = logits.max(axis=-1, keepdims=True)
    exps = np.exp(logits - peak)
    total = exps.sum(axis=-1, keepdims=True)
    losses = -(q * (logits - peak - np.log(total))).sum(axis=-1)
    squared = np.longdouble(z_loss) * counts
    log_sum = (peak + np.log(total))[..., 0]
    losses = losses + squared * log_sum**2
    share = upstream / divisor if reduction == "mean" else upstream
    share = np.broadcast_to(share, losses.shape)[..., None]
    pull = q.sum(axis=-1) + 2 * squared * log_sum
    grad = (pull[..., None] * exps / total - q) * share * slope
    return _reduced(losses, reduction, divisor), np.moveaxis(grad, -1, axis)


_LOSSES = {
    "mse_loss": _difference(lambda d: d * d, lambda d: 2 * d),
    "l1_loss": _difference(np.abs, np.sign),
    "cross_entropy": _cross_entropy,
}


def loss(
    operation: str, tensors: tuple[Tensor, ...], reduction: str, upstream: Tensor, **options: Any
) -> tuple[Array, Array]:
    """The loss and the gradient of its input."""
    given = map(exact, tensors)
    found: tuple[Array, Array] = _LOSSES[operation](reduction, exact(upstream), *given, **options)
    return found


# -- optimizers: one step, from the state before it -----------------------------------------


def _sgd(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    if o["momentum"]:
        old = s["momentum_buffer"]
        s["momentum_buffer"] = g if first else o["momentum"] * old + (1 - o["dampening"]) * g
        g = g + o["momentum"] * s["momentum_buffer"] if o["nesterov"] else s["momentum_buffer"]
    return p - o["lr"] * g


def _adam(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * p
    b1, b2 = o["betas"]
    s["step"] = s["step"] + 1
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    square = s["exp_avg_sq"]
    if o["amsgrad"]:
        square = s["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], square)
    root = np.sqrt(square / (1 - b2 ** s["step"])) + o["eps"]
    return p - o["lr"] / (1 - b1 ** s["step"]) * s["exp_avg"] / root


def _rmsprop(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    s["step"] = s["step"] + 1
    s["square_avg"] = o["alpha"] * s["square_avg"] + (1 - o["alpha"]) * g * g
    square = s["square_avg"]
    if o["centered"]:
        s["grad_avg"] = o["alpha"] * s["grad_avg"] + (1 - o["alpha"]) * g
        square = square - s["grad_avg"] ** 2
    change = g / (np.sqrt(square) + o["eps"])
    if o["momentum"]:
        change = s["momentum_buffer"] = o["momentum"] * s["momentum_buffer"] + change
    return p - o["lr"] * change


def _adagrad(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    rate = o["lr"] / (1 + s["step"] * o["lr_decay"])
    s["step"] = s["step"] + 1
    s["sum"] = s["sum"] + g * g
    return p - rate * g / (np.sqrt(s["sum"]) + o["eps"])


def _adadelta(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    s["step"] = s["step"] + 1
    s["square_avg"] = o["rho"] * s["square_avg"] + (1 - o["rho"]) * g * g
    d = np.sqrt((s["acc_delta"] + o["eps"]) / (s["square_avg"] + o["eps"])) * g
    s["acc_delta"] = o["rho"] * s["acc_delta"] + (1 - o["rho"]) * d * d
    return p - o["lr"] * d


def _adamax(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    b1, b2 = o["betas"]
    s["step"] = s["step"] + 1
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_inf"] = np.maximum(b2 * s["exp_inf"], np.abs(g) + o["eps"])
    return p - o["lr"] / (1 - b1 ** s["step"]) * s["exp_avg"] / s["exp_inf"]


def _radam(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * p
    b1, b2 = o["betas"]
    t = s["step"] = s["step"] + 1
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    longest = 2 / (1 - b2) - 1
    length = longest - 2 * t * b2**t / (1 - b2**t)
    change = o["lr"] / (1 - b1**t) * s["exp_avg"]
    if length > 5:
        ratio = (length - 4) * (length - 2) / ((longest - 4) * (longest - 2))
        r = np.sqrt(ratio * longest / length)
        change = change * r * np.sqrt(1 - b2**t) / (np.sqrt(s["exp_avg_sq"]) + o["eps"])
    return p - change


def _nadam(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    if o["decoupled_weight_decay"]:
        p = p * (1 - o["lr"] * o["weight_decay"])
    else:
        g = g + o["weight_decay"] * p
    b1, b2 = o["betas"]
    t = s["step"] = s["step"] + 1
    mu, following = (b1 * (1 - 0.96 ** (k * o["momentum_decay"]) / 2) for k in (t, t + 1))
    product = s["mu_product"] = s["mu_product"] * mu
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    root = np.sqrt(s["exp_avg_sq"] / (1 - b2**t)) + o["eps"]
    p = p - o["lr"] * (1 - mu) / (1 - product) * g / root
    return p - o["lr"] * following / (1 - product * following) * s["exp_avg"] / root


def _asgd(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    g = g + o["weight_decay"] * p
    t = s["step"] = s["step"] + 1
    p = p * (1 - o["lambd"] * s["eta"]) - s["eta"] * g
    s["ax"] = s["ax"] + s["mu"] * (p - s["ax"])
    s["eta"] = o["lr"] / (1 + o["lambd"] * o["lr"] * t) ** o["alpha"]
    s["mu"] = 1 / np.maximum(1, t - o["t0"])
    return p


def _rprop(o: dict[str, Any], s: dict[str, Array], p: Array, g: Array, first: bool) -> Array:
    turn = np.sign(g) * np.sign(s["prev"])
    (less, more), (least, most) = o["etas"], o["step_sizes"]
    s["step"] = s["step"] + 1
    size = s["step_size"] * np.where(turn > 0, more, np.where(turn < 0, less, 1))
    s["step_size"] = np.clip(size, least, most)
    s["prev"] = np.where(turn < 0, 0, g)
    return p - np.sign(s["prev"]) * s["step_size"]


_UPDATES = {
    "SGD": _sgd, "Adam": _adam, "AdamW": _adam, "RMSprop": _rmsprop, "Adagrad": _adagrad,
    "Adadelta": _adadelta, "Adamax": _adamax, "RAdam": _radam, "Rprop": _rprop,
    "NAdam": _nadam, "ASGD": _asgd,
}  # fmt: skip


def _long(value: Any) -> Any:
    """A hyperparameter; a Python float is taken for the float64 it is."""
    if isinstance(value, tuple):
        return tuple(map(_long, value))
    return np.longdouble(value) if type(value) in (int, float) else value


def step(
    operation: str, group: dict[str, Any], state: dict[str, Tensor], param: Tensor, grad: Tensor
) -> dict[str, Array]:
    """The parameter (under "param") and the states after a step; the arguments stay."""
    options = {k: _long(v) for k, v in group.items() if k != "params"}
    states = {k: exact(t) for k, t in state.items() if isinstance(t, torch.Tensor)}
    g = -exact(grad) if options["maximize"] else exact(grad)
    updated = _UPDATES[operation](options, states, exact(param), g, not state)
    return {"param": updated, **states}
