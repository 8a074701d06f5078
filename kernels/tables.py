"""What an optimizer's launch reads: the tables that a step plan keeps up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Launch", "Tables", "Traced"]


class Traced(NamedTuple):
    """A hyperparameter that lives on the tensors' GPU: to be looked up there at each step."""

    row: int
    field: int
    value: torch.Tensor


class Tables(NamedTuple):
    """The arrays of one bucket. A plan writes to them in place; a launcher reads them anew.

    Attributes:
        device: of the tensors.
        hypers: float64, a row of hyperparameters for each kind of tensor.
        traced: the entries of hypers that only the device knows; NaN in this table.
        row_of: int64, each tensor's row.
        offsets: int64, the running count of elements, one entry more than tensors.
        addresses: int64, a line for each slot (parameter and states, unused ones too), one for
            the gradients and one for the step counters (0 where nothing counts), each with an
            entry for every tensor.
        counted_on_device: whether the counters are the device's (which may be the CPU), so that
            a kernel has to count.
    """

    device: torch.device
    hypers: np.ndarray
    traced: list[Traced]
    row_of: np.ndarray
    offsets: np.ndarray
    addresses: np.ndarray
    counted_on_device: bool


#: Update every tensor of a bucket: (grad_scale, found_inf) as a GradScaler leaves them.
Launch = Callable[[torch.Tensor | None, torch.Tensor | None], None]
