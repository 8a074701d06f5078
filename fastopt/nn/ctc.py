"""Connectionist temporal classification, by torch's own code."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..front.call import LossModule, loss
from ..front.torch_only import TorchOnly, analyse

__all__ = ["CTCLoss", "ctc_loss"]


class CTC(TorchOnly):
    operands = ("log_probs", "targets", "input_lengths", "target_lengths")
    reason = "a recurrence over time, which no kernel has"


@loss(CTC, analysis=functools.partial(analyse, CTC))
def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    r"""Connectionist temporal classification, by torch's own code.

    :math:`-\log P(y \mid x)`, the probability of all ways to spread the labels y over the time
    steps of x, with blanks in between.

    Args:
        log_probs: log-probabilities of the classes, (T, N, C) or (T, C); float64 or float32.
        targets: labels without blanks, (N, S) or all of them one after another.
        input_lengths, target_lengths: time steps and labels of each sample, (N) or ().
        blank: the class that stands for no label.
        reduction: "none" gives a value per sample, "sum" adds them up, "mean" divides each by its
            number of labels and averages.
        zero_infinity: whether losses of samples that are too short for their labels are 0.

    Returns:
        A tensor of log_probs' dtype.

    Raises:
        RuntimeError, ValueError, TypeError: as torch does, for lengths, labels and dtypes that
            don't go together and unknown reductions.
        BackendUnavailable: inside ``use_backend`` of a compiled backend.

    Example:
        >>> log_p = torch.log_softmax(model(sound), dim=2)           # (time, batch, letters)
        >>> loss = fastopt.nn.functional.ctc_loss(log_p, text, steps, letters)

    Reference: :func:`torch.nn.functional.ctc_loss`
    """
    raise NotImplementedError


class CTCLoss(LossModule, torch.nn.CTCLoss, function=ctc_loss):
    r"""Connectionist temporal classification as a module, by torch's own code.

    Args:
        blank: the class that stands for no label.
        reduction: "none", "mean" (default) or "sum".
        zero_infinity: whether losses of samples that are too short for their labels are 0.

    Formula, shapes, dtypes and errors: see :func:`fastopt.nn.functional.ctc_loss`.

    Example:
        >>> criterion = fastopt.nn.CTCLoss(zero_infinity=True)
        >>> criterion(log_p, text, steps, letters).backward()

    Reference: :class:`torch.nn.CTCLoss`
    """

    def forward(
        self, log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor
    ) -> Tensor:
        return ctc_loss(log_probs, targets, input_lengths, target_lengths, **self._options())
