"""Adaptive log-softmax with its loss, by torch's own code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..front.torch_only import TorchOnly, TorchOnlyModule

__all__ = ["AdaptiveLogSoftmaxWithLoss"]


class AdaptiveLogSoftmax(TorchOnly):
    operands = ("input_", "target_")
    reason = "linear layers for clusters of classes that the targets choose, which no kernel has"


class AdaptiveLogSoftmaxWithLoss(
    TorchOnlyModule, torch.nn.AdaptiveLogSoftmaxWithLoss, operation=AdaptiveLogSoftmax
):
    r"""Adaptive log-softmax and its negative log-likelihood, by torch's own code.

    Frequent classes have their places in a softmax of their own, in which the others stand as
    clusters, each with a softmax over a smaller linear layer.

    Args:
        in_features: size of each input sample.
        n_classes: number of classes.
        cutoffs: the classes where clusters begin, the most frequent classes being the first.
        div_value: how many times smaller the layer of each next cluster is.
        head_bias: whether the first layer has a bias.
        device, dtype: of the layers.

    Shapes: input_ (N, in_features) or (in_features,), target_ (N,) or (). The result is a named
    tuple of `output`, the log-probability of each target, and `loss`, minus their mean.

    Raises:
        RuntimeError, ValueError: as torch does, for shapes that don't go together, targets out of
            range and cutoffs that don't rise.
        BackendUnavailable: inside ``use_backend`` of a compiled backend.

    Example:
        >>> criterion = fastopt.nn.AdaptiveLogSoftmaxWithLoss(256, 50_000, [2000, 10_000])
        >>> criterion(hidden, words).loss.backward()

    Reference: :class:`torch.nn.AdaptiveLogSoftmaxWithLoss`
    """

    def forward(self, input_: Tensor, target_: Tensor) -> Any:
        return self.serve(input_, target_)
