"""What the traversals of a softmax share: class indices, their check, and options of the loss."""

from __future__ import annotations

from typing import Any

import numpy as np

from .compiler import entry, exact, inlined, kernel
from .pointer import load, store
from .vector_math import cast, log, tanh


@inlined
def read_label(target: Any, r: int, ignore_index: int, classes: int, bad: Any) -> int:
    """A position's class index, -1 if it is ignored.

    Another thread may write to the class indices while a kernel runs. So what was found right
    before may no longer be: each is checked where it is read, and read once for all its uses.
    One out of range is ignored, and noted in `bad`.
    """
    label: int = load(target, r)
    if label == ignore_index:
        return -1
    if label < 0 or label >= classes:
        store(bad, 0, 1)
        return -1
    return label


@inlined
def chosen_coefficients(label: int, hard: float, weight: Any, smooth: Any) -> tuple[float, float]:
    """Of a class index: its coefficient on top of `smooth`, and its part of that."""
    share, label_smooth = hard, 0.0
    if weight is not None:
        share *= np.float64(load(weight, label))
    if smooth is not None:
        label_smooth = np.float64(load(smooth, label))
    return share, label_smooth


@inlined
def chosen_loss(x: Any, top: Any, log_total: float, share: float) -> float:
    """share * -log softmax at the class index, in float64."""
    return share * (np.float64(top) - np.float64(x) + log_total)


@inlined
def chosen_gradient(p: float, share: float, pull: float, smooth: float) -> float:
    """The gradient at the class index, where softmax is p and p's factor is pull, in float64.

    In low precision the difference of two rounded numbers p - 1 has no digit left once p
    is near 1, which random logits never show and trained models always do.
    """
    return pull * p - share - smooth


@inlined
def capped(x: Any, softcap: Any) -> Any:
    """A logit as the softmax has it."""
    return x if softcap is None else _product(softcap, tanh(x / softcap))


@exact
def _product(a: Any, b: Any) -> Any:
    return a * b  # as one operation with the difference from the largest, that would not be 0


@inlined
def cap_slope(x: Any, softcap: Any) -> Any:
    """The derivative of a capped logit."""
    one, t = cast(1, x), tanh(x / softcap)
    return (one - t) * (one + t)


@inlined
def squared(z_loss: float, top: Any, total: float) -> float:
    """The part of a position's loss that is the square of its log-sum-exp."""
    log_sum: float = np.float64(top) + log(total)
    return z_loss * log_sum * log_sum


@inlined
def pull_of(mass: float, z_loss: Any, top: Any, total: float) -> float:
    """What the softmax is multiplied by in the gradient: all coefficients, and that of a square."""
    return mass if z_loss is None else mass + 2.0 * z_loss * (np.float64(top) + log(total))


# What a call wants of the positions' losses: nothing, their sum, each.
NOTHING, SUM, EACH = 0, 1, 2
# What becomes of a row's statistics, its maxima and the sum of its exponentials: they are scratch,
# or kept for a backward pass, or given by the forward pass.
SCRATCH, KEPT, GIVEN = 0, 1, 2


@kernel
def give_each(out: Any, losses: Any, r: int, count: int) -> None:
    """out = losses of positions, narrowed."""
    for j in range(count):
        store(out, r + j, load(losses, r + j))


@entry
def check_targets(
    target: Any, weight: Any, ignore_index: int, classes: int, count: int
) -> tuple[bool, float]:
    """Whether every target is in range, and the summed weight of those that count."""
    bad, used = 0, 0
    for r in range(count):
        label = load(target, r)
        counts = label != ignore_index
        bad += counts and (label < 0 or label >= classes)
        used += counts
    total = float(used)
    if weight is not None and bad == 0:
        total = 0.0
        for r in range(count):
            label = load(target, r)
            if label != ignore_index and 0 <= label < classes:
                total += np.float64(load(weight, label))
    return bad == 0, total
