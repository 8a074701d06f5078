"""What a softmax over each row says of the row and of a class, as every backend gives it."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["Outcomes"]


class Outcomes(NamedTuple):
    """Of rows of logits x, of which each has a class index y.

    A backend has `outcomes(x, target)`, which gives this, and `gradient(x, target, kept, grads)`,
    where grads are those of the first three, one after another, as one contiguous tensor: with p
    the softmax and H the entropy it is

        p_c (g_sum - g_log_prob - g_entropy (log p_c + H)) + g_log_prob [c = y]

    x is (N, C) with its classes side by side, target (N,), int64. Either raises IndexError for a
    class index out of range (on a GPU it is a device-side assert).

    Attributes:
        log_prob: log p_y, in float32 at least, as all of these.
        entropy: -sum of p_c log p_c.
        log_sum_exp: log of the sum of e^x_c.
        argmax: the first of the largest logits, int64.
        kept: what `gradient` wants to see again, (3, N): the largest logit, the sum of e^x_c
            relative to it, and the entropy. Where x is a part of the classes, those of all classes
            make it the part of the gradient.
    """

    log_prob: torch.Tensor
    entropy: torch.Tensor
    log_sum_exp: torch.Tensor
    argmax: torch.Tensor
    kept: torch.Tensor
