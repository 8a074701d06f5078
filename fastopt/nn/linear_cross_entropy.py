"""Cross-entropy of a linear layer's logits, by torch's own code, where torch has it (from 2.13)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..front.call import loss
from ..front.torch_only import TorchOnly, TorchOnlyModule, analyse

__all__: list[str] = []

_REASON = "a linear layer together with its loss, which no kernel has"


class LinearCrossEntropy(TorchOnly):
    operands = ("input", "linear_weight", "target", "linear_bias", "weight")
    reason = _REASON


class _OfModule(TorchOnly):
    operands = ("input", "target")
    reason = _REASON


if TYPE_CHECKING or hasattr(F, "linear_cross_entropy"):
    __all__ += ["LinearCrossEntropyLoss", "linear_cross_entropy"]

    @loss(LinearCrossEntropy, analysis=functools.partial(analyse, LinearCrossEntropy))
    def linear_cross_entropy(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
    ) -> Tensor:
        r"""Cross-entropy of the logits that a linear layer makes, by torch's own code.

        ``cross_entropy(linear(input, linear_weight, linear_bias), target, …)``, with `options` in
        pieces, so that the logits are never all in memory.

        Args:
            input: samples, (in_features,) or (N, in_features).
            linear_weight: (C, in_features) or (C, d1, …, in_features).
            target: class indices, (), (N,) or (N, d1, …); or class probabilities, (C,), (N, C) or
                (N, C, d1, …).
            linear_bias: (C,) or (C, d1, …).
            weight: a weight for each class, (C,).
            reduction: "none", "mean" (default) or "sum".
            ignore_index: class index of positions that count for nothing; None means -100.
            label_smoothing: share of the target spread evenly over all classes, in [0, 1].
            options: a ``torch.nn.LinearCrossEntropyOptions``, how to cut the work into pieces;
                None for the whole at once.

        Returns:
            A tensor of input's dtype.

        Raises:
            RuntimeError, IndexError, ValueError, TypeError: as torch does.
            BackendUnavailable: inside ``use_backend`` of a compiled backend.

        Example:
            >>> loss = fastopt.nn.functional.linear_cross_entropy(hidden, head.weight, tokens)

        Reference: :func:`torch.nn.functional.linear_cross_entropy`
        """
        raise NotImplementedError

    class LinearCrossEntropyLoss(
        TorchOnlyModule, torch.nn.LinearCrossEntropyLoss, operation=_OfModule
    ):
        r"""A linear layer and the cross-entropy of its logits as a module, by torch's own code.

        Args:
            in_features: size of each input sample.
            num_classes: number of classes C.
            out_features: (d1, …) of a loss in several places for each sample.
            bias: whether the layer has a bias.
            device, dtype: of the layer.
            reduction: "none", "mean" (default) or "sum".
            weight: a weight for each class, (C,).
            ignore_index: class index of positions that count for nothing; None means -100.
            label_smoothing: share of the target spread over all classes, in [0, 1].
            options: how to cut the work into pieces, see
                :func:`fastopt.nn.functional.linear_cross_entropy`, as for shapes and errors.

        Example:
            >>> criterion = fastopt.nn.LinearCrossEntropyLoss(256, 50_000)
            >>> criterion(hidden, tokens).backward()

        Reference: :class:`torch.nn.LinearCrossEntropyLoss`
        """

        def forward(self, input: Tensor, target: Tensor) -> Any:
            return self.serve(input, target)
