"""What both traversals of a softmax share: the class index, and the check of class indices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .compiler import kernel
from .pointer import load, store


@kernel
def chosen_loss(x: Any, top: Any, total: float, share: float) -> float:
    """share * -log softmax at the class index, in float64."""
    return share * (np.float64(top) - np.float64(x) + math.log(total))


@kernel
def chosen_gradient(p: float, share: float, mass: float, smooth: Any, label: int) -> float:
    """The gradient at the class index, where softmax is p, in float64.

    In low precision the difference of two rounded numbers p - 1 has no digit left once p
    is near 1, which random logits never show and trained models always do.
    """
    g = (mass + share) * p - share
    if smooth is not None:
        g -= np.float64(load(smooth, label))
    return g


@kernel
def check_targets(
    target: Any, weight: Any, result: Any, ignore_index: int, classes: int, count: int
) -> None:
    """result[0]: index of the first target out of range, or -1; result[1]: sum of the weights."""
    bad, used = 0, 0
    for r in range(count):
        label = load(target, r)
        counts = label != ignore_index
        bad += counts and (label < 0 or label >= classes)
        used += counts
    store(result, 0, -1.0)
    store(result, 1, float(used))
    if bad > 0:
        for r in range(count):
            label = load(target, r)
            if label != ignore_index and (label < 0 or label >= classes):
                store(result, 0, float(r))
                break
    elif weight is not None:
        total = 0.0
        for r in range(count):
            label = load(target, r)
            if label != ignore_index:
                total += np.float64(load(weight, label))
        store(result, 1, total)
